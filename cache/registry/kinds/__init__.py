"""The kinds of places of a registry, one file each; the table that names them is in cache/registry/backends.py."""
