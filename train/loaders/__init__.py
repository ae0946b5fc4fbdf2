"""Batches of images, labels and records."""
