"""The views of each sample: how they are drawn and how they are rendered."""
