"""The losses, by the names of docs/losses.md. How they are called stands in base.py, their table in options.py."""

from kdcache.train.losses.base import Batch, ByParts, Loss, Needs, Parts, option, part
from kdcache.train.losses.families.correlation import CMKD, DIST, LogitStd
from kdcache.train.losses.families.decoupled import DKD, GKD, IKL
from kdcache.train.losses.families.kd import BDKD, CE, KD, MSE, WSLD, SkewKL, SkewRKL
from kdcache.train.losses.families.nkd import NKD, TFNKD, USKD

__all__ = [
    "BDKD",
    "CE",
    "CMKD",
    "DIST",
    "DKD",
    "GKD",
    "IKL",
    "KD",
    "MSE",
    "NKD",
    "TFNKD",
    "USKD",
    "WSLD",
    "Batch",
    "ByParts",
    "LogitStd",
    "Loss",
    "Needs",
    "Parts",
    "SkewKL",
    "SkewRKL",
    "option",
    "part",
]
