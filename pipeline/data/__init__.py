"""Datasets by stable index, whatever they are read from."""
