"""Encodes a teacher's logits as records, and finds the class prior that spreads their tails.

For shapes and for what is stored see records.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.cache.errors import InputError
from kdcache.cache.identity import id_dtype
from kdcache.cache.records.choices import TEMPERATURES, Precision
from kdcache.cache.records.records import STD_FLOOR, STD_TAU, Records
from kdcache.cache.records.rounding import coded


def encode(
    logits: Tensor,
    labels: Tensor | None,
    k: int | None = None,
    temperatures: tuple[float, ...] = TEMPERATURES,
    precision: Precision | None = None,
    tail_std: bool = False,
    check: bool = True,
    known: Tensor | None = None,
    carry: bool = True,
) -> Records:
    """Records of the logits [B, C] with labels [B], [B, L] or None, on the logits' device.

    k: classes to store; None or C: dense, exact at every temperature. precision: of gaps and tail, by default uint8 for
    top-k records and float16 for dense ones. tail_std: store what logit standardisation needs (dense records have it
    anyway). check: whether labels, logits and std are checked here, which on a GPU means to wait for them; otherwise
    the caller checks them (`require_std`). known: bool [B, C], which classes top-k records may hold: k or more, and the
    labels; None for all. carry: whether uint8 is rounded so that errors cancel (rounding.py), or each number by itself,
    as earlier versions did. InputError for k > C, labels out of range, uint8 dense, logits that are not finite, and
    with tail_std those whose std float16 cannot hold.
    """
    z = logits.detach().float()
    count, classes = z.shape
    k = classes if k is None else k
    if not 1 <= k <= classes:
        raise InputError(f"k = {k} does not fit {classes} classes: take 1 to {classes}")
    precision = precision or default_precision(k == classes)
    if k == classes and precision == "uint8":
        raise InputError("uint8 is for top-k records: dense ones are exact, in float16 or float32")
    if check and not bool(torch.isfinite(z).all()):
        row = int((~torch.isfinite(z)).any(1).nonzero()[0])
        raise InputError(f"the teacher's logits are not finite (row {row} of the batch)")
    y = z.new_empty((count, 0), dtype=torch.long) if labels is None else labels.long().reshape(count, -1)
    if check and y.numel() and not (0 <= int(y.min()) and int(y.max()) < classes):
        raise InputError(f"labels reach from {int(y.min())} to {int(y.max())}, but the teacher has {classes} classes")
    stored = z if known is None else z.masked_fill(~known, -torch.inf)
    top = stored.amax(1, keepdim=True)
    dtype = getattr(torch, id_dtype(classes))
    target_gap = _float(top - z.gather(1, y), torch.float16)
    if k == classes:
        gaps = _float(top - z, getattr(torch, precision))
        return Records(None, gaps, target_gap, z.new_empty((count, 0)).half(), y.to(dtype), classes, ())
    # A stable sort, because topk leaves the order of ties open.
    ordered, ids = torch.sort(stored, dim=1, descending=True, stable=True)
    ids = ids[:, :k].contiguous()
    gaps = top - ordered[:, 1:k]
    rest = (z - top).scatter(1, ids, -torch.inf).scatter(1, y, -torch.inf)
    tail = torch.stack([torch.logsumexp(rest / t, 1) for t in temperatures], 1)
    std = _std_and_tail(z, rest) if tail_std else None
    if std is not None and check:
        require_std(std, classes)
    if precision == "uint8":
        own = (ids[:, 1:].unsqueeze(2) == y.unsqueeze(1)).any(2)
        gaps, tail = coded(gaps, tail, own, classes - k, temperatures, carry)
    else:
        gaps, tail = _float(gaps, getattr(torch, precision)), _floor(tail).half()
    return Records(ids.to(dtype), gaps, target_gap, tail, y.to(dtype), classes, tuple(temperatures), std)


def _std_and_tail(z: Tensor, rest: Tensor) -> Tensor:
    """[B, 2] the std of logits [B, C], and the tail at 2 std; rest [B, C]: the tail's logits, -inf elsewhere."""
    sigma = z.std(1, keepdim=True).half().float()
    tail = torch.logsumexp(rest / ((sigma + STD_FLOOR) * STD_TAU), 1, keepdim=True)
    return _floor(torch.cat([sigma, tail], 1)).half()


def require_std(tail_std: Tensor, classes: int) -> None:
    """InputError where a standard deviation [B, 2] (the first column) was too large for float16."""
    if bool(torch.isinf(tail_std[:, 0]).any()):
        raise InputError(
            f"the teacher's logits have a standard deviation above {torch.finfo(torch.float16).max:,.0f}, more than "
            f"--tail-std can store: build without it, or dense records with --topk {classes} --precision float32"
        )


def default_precision(dense: bool) -> Precision:
    """The precision that `encode` takes unless it is told another."""
    return "float16" if dense else "uint8"


def _float(gap: Tensor, dtype: torch.dtype) -> Tensor:
    return gap.clamp(max=torch.finfo(dtype).max).to(dtype)


def _floor(tail: Tensor) -> Tensor:
    # -inf means that nothing remains: a tail too small for float16 is not that.
    return torch.where(torch.isneginf(tail), tail, tail.clamp(min=torch.finfo(torch.float16).min))


def tail_distribution(logits: Tensor, records: Records) -> Tensor:
    """Sum over the batch of the tail's distribution at each stored temperature, float64 [T, C].

    The class prior is the mean of these over view 0. A record without a tail adds nothing. With tail_std there is one
    row more.
    """
    assert records.classes is not None
    z = logits.detach().double()
    rest = z.scatter(1, records.classes.long(), -torch.inf).scatter(1, records.labels.long(), -torch.inf)
    temperatures: list[float | Tensor] = [*records.temperatures]
    if records.tail_std is not None:
        temperatures.append((records.tail_std[:, :1].double() + STD_FLOOR) * STD_TAU)
    return torch.stack([torch.softmax(rest / t, 1).nan_to_num(0.0).sum(0) for t in temperatures])


def class_prior(sums: Tensor) -> Tensor:
    """The prior float32 [T, C] from summed tail distributions [T, C].

    A thousandth is spread evenly, so that a class the tail never held keeps a positive weight.
    """
    total = sums.sum(1, keepdim=True)
    even = torch.full_like(sums, 1 / sums.shape[1])
    share = torch.where(total > 0, sums / total.clamp(min=1e-300), even)
    return (0.999 * share + 0.001 * even).float()
