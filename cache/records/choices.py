"""What a cache's records can be asked to hold. This file imports nothing, so that the command line starts at once."""

from typing import Literal

Precision = Literal["uint8", "float16", "float32"]
SequenceName = Literal["random", "spread"]  # how the numbers of a sample's views follow each other
Interpolation = Literal["bilinear", "bicubic"]  # how images are resized for the teacher

TEMPERATURES = (1.0, 2.0, 3.0, 4.0)  # at which the tail is stored unless told otherwise

StoreName = Literal["zarr", "hdf5", "ffcv"]  # what a cache lies in: see pipeline/stores.py
FileStore = Literal["hdf5", "ffcv"]  # those that it can be packed into
