"""The losses themselves, one file a family; the table that names them is in train/losses/options.py."""
