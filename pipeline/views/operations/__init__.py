"""The operations that views are made of, one class each."""
