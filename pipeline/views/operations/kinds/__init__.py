"""The operations themselves, one file for those of a kind."""
