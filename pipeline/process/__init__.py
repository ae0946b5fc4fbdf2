"""What belongs to a process: its rank, its device, its progress and who it is."""
