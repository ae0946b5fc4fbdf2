"""The kinds of datasets, one file each; the table that names them is in pipeline/data/dataset.py."""
