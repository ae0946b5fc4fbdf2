"""Rounds the gaps and tails of top-k records to uint8 codes, in steps of 1/8 nat (records.py).

A number that is rounded by itself is off by 6% at most, and so is Z, the sum by which every probability is divided: on
real logits the label's probability was off by 4% in one of 100 records. Errors are therefore carried from number to
number until the sum is right, as error diffusion does (Floyd and Steinberg 1976). The tail has no finer step, so the
head's classes make up for it too: all gaps are moved by a common distance before they are rounded, no farther than
brings Z within TOLERANCE; then single codes are moved by one step where that is not enough. Records that are within
TOLERANCE already stay as they are, and so do classes that have too little mass to be of use, because every code that is
moved costs some divergence. This is done at temperature 1, at which losses take the label's probability. At each
temperature the tail then takes what the head lacks or has too much there, up to half a step.

Shapes: B batch, K stored classes, T stored temperatures, S distances. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.cache.identity import NO_TAIL, STEP

TOLERANCE = 1 / 128  # relative, of Z
PRICE = 1 / 4  # of the tolerance, which moving codes by a step has to gain
FARTHEST = 3  # steps by which a gap is moved at most before it is rounded
_PLACES = 4  # distances that are tried a step
_SINGLE = 3  # how many single codes are moved at most


def coded(
    gaps: Tensor, tail: Tensor, own: Tensor, left_out: int, temperatures: tuple[float, ...], carry: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes uint8 of gaps [B, K - 1] and of tails [B, T] of `left_out` classes, both float32 in nats.

    own: bool [B, K - 1], which classes are labels, whose gaps are read from elsewhere. carry: whether errors are
    carried; otherwise each number is rounded by itself, as earlier versions did.
    """
    codes, most = torch.round(gaps / STEP), math.log(left_out)
    if carry and gaps.shape[1]:
        t = 1.0 if 1.0 in temperatures else min(temperatures)
        codes = _carried(gaps / STEP, tail[:, temperatures.index(t)], own, most, t)
        lacks = [(_masses(gaps, own, t) - _masses(codes * STEP, own, t)).sum(1) for t in temperatures]
        whole = (tail.exp() + torch.stack(lacks, 1)).clamp(min=torch.finfo(tail.dtype).tiny).log()
        tail = torch.where(torch.isneginf(tail), tail, whole.clamp(tail - STEP / 2, tail + STEP / 2))
    distances = torch.diff(codes, dim=1, prepend=torch.zeros_like(codes[:, :1])).clamp(max=255).to(torch.uint8)
    last = distances.sum(1, dtype=torch.float32) * STEP
    below = torch.stack([_below(tail[:, at], last, most, t) for at, t in enumerate(temperatures)], 1)
    return distances, below.masked_fill(torch.isneginf(tail), NO_TAIL).to(torch.uint8)


def _carried(exact: Tensor, tail: Tensor, own: Tensor, most: float, t: float) -> Tensor:
    """Codes [B, K - 1], never falling along a row, of gaps in steps; tail [B]: that at temperature t."""
    masses = _masses(exact * STEP, own, t)
    allowed = TOLERANCE * (1 + (exact * -STEP / t).exp().sum(1) + tail.exp())
    moves = torch.arange(-FARTHEST * _PLACES, FARTHEST * _PLACES + 1, device=exact.device) / _PLACES
    tried = torch.round(exact.unsqueeze(1) + moves.unsqueeze(1)).clamp(min=0)  # [B, S, K - 1]
    lacks = masses.sum(1, keepdim=True) - _masses(tried * STEP, own.unsqueeze(1), t).sum(2)
    lacks = lacks + _lost(tail.unsqueeze(1), tried[:, :, -1] * STEP, most, t)
    best = _cost(lacks, allowed.unsqueeze(1), moves.abs()).argmin(1, keepdim=True)
    codes, lack = tried.take_along_dim(best.unsqueeze(2), 1).squeeze(1), lacks.gather(1, best)
    for _ in range(_SINGLE):
        codes, lack = _one_moved(codes, lack, exact, own, allowed.unsqueeze(1), t)
    return codes


def _one_moved(
    codes: Tensor, lack: Tensor, exact: Tensor, own: Tensor, allowed: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """Codes [B, K - 1] and what Z still lacks [B, 1], after the best move of one code by one step, if any is good.

    The last code stays, because the tail is counted from it.
    """
    step = torch.where(lack < 0, 1.0, -1.0)
    moved = codes + step
    lower, upper = torch.zeros_like(codes), codes.clone()
    lower[:, 1:], upper[:, :-1] = codes[:, :-1], codes[:, 1:]
    upper[:, -1] = -1  # which no code fits
    far = (moved - exact).abs()
    fits = (lower <= moved) & (moved <= upper) & (far <= FARTHEST + 0.5)
    lacks = lack + _masses(codes * STEP, own, t) - _masses(moved * STEP, own, t)
    cost, best = _cost(lacks, allowed, far).masked_fill(~fits, torch.inf).min(1, keepdim=True)
    good = cost - PRICE * allowed * (codes - exact).abs().gather(1, best) < (lack.abs() - allowed).clamp(min=0)
    at_best = torch.arange(codes.shape[1], device=codes.device) == best
    return torch.where(good & at_best, moved, codes), torch.where(good, lacks.gather(1, best), lack)


def _cost(lack: Tensor, allowed: Tensor, distance: Tensor) -> Tensor:
    """What Z lacks beyond what is allowed, and the price of the distance."""
    return (lack.abs() - allowed).clamp(min=0) + PRICE * allowed * distance


def _masses(gaps: Tensor, own: Tensor, t: float) -> Tensor:
    """exp(-gaps / t), and 0 for classes whose gaps are read from elsewhere."""
    return (gaps / -t).exp().masked_fill(own, 0.0)


def _below(tail: Tensor, last: Tensor, most: float, t: float) -> Tensor:
    """The codes of tails: steps below the largest possible tail, which the last gap in nats gives."""
    return torch.round((most - last / t - tail) / STEP).clamp(0, NO_TAIL - 1)


def _lost(tail: Tensor, last: Tensor, most: float, t: float) -> Tensor:
    """The mass that tails lose by their codes."""
    read = (most - last / t - _below(tail, last, most, t) * STEP).exp()
    return torch.where(torch.isneginf(tail), 0.0, tail.exp() - read)
