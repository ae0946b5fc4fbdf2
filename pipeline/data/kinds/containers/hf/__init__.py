"""Hugging Face data sets, on this disk or by their name on the hub."""
