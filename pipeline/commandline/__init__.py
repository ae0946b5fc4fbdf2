"""What every command has: its options, the settings, one line for each mistake, and what is printed."""
