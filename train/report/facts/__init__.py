"""What a report tells, as plain data: the page and --json show the same."""
