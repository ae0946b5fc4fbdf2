"""Caches as one FFCV file."""
