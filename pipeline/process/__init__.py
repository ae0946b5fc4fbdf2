"""What belongs to a process: its rank, its settings, its progress."""
