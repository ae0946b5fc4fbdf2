"""The weighted mean of several teachers' probabilities at temperature 1, as records.

The mean's logits are its logarithm: z_c = log sum_m w_m p_m(c), computed in float64. p_m is exact where the records are
dense. Of top-k records it is exact, up to their precision, for the stored classes and the labels. The rest of the mass
is spread over all other classes as the member's own class prior has it, which is how a student reads such a cache too.
The mean's own records hold classes that a member stores or that are labels, never one that is known from priors alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records.encoding import encode, tail_distribution
from kdcache.cache.records.records import Records

TEMPERATURE = 1.0


class Mean(NamedTuple):
    """The mean of B records, and its share of the class prior, float64 [T, C]; None unless it is asked for."""

    records: Records
    sums: Tensor | None


def mean_of(members: Sequence[Records], weights: Sequence[float], record: RecordIdentity, sums: bool = False) -> Mean:
    """The mean of the members' answers for the same B views, encoded as `record` says. weights: they add up to 1.

    InputError for answers that are not finite.
    """
    logs = torch.stack([log_probabilities(member) + math.log(w) for member, w in zip(members, weights, strict=True)])
    z = torch.logsumexp(logs, 0)
    z -= z.amax(1, keepdim=True)  # in float64, before it is rounded to float32
    known = None if record.dense else torch.stack([_known(member) for member in members]).any(0)
    found = encode(
        z, members[0].labels, record.k, record.temperatures, record.precision, record.tail_std, known=known
    )  # fmt: skip
    return Mean(found, tail_distribution(z, found) if sums else None)


def log_probabilities(records: Records) -> Tensor:
    """Logarithms of the probabilities at temperature 1, float64 [B, C]. Top-k records must store that temperature.

    The probabilities are those of `Records.dense(1, "prior")`, but in logarithms none is too small to be a number.
    """
    gaps = records.decoded_gaps().double()
    if records.classes is None:
        return torch.log_softmax(-gaps, 1)
    at, labels, ids = records.temperatures.index(TEMPERATURE), records.labels.long(), records.classes.long()
    assert records.prior is not None
    spread = records.prior[at].double().log().masked_fill(_known(records), -torch.inf)
    # nan_to_num: where no class is left, there is nothing to spread.
    z = torch.log_softmax(spread, 1).nan_to_num(-torch.inf) + records.decoded_tail(at).double().unsqueeze(1)
    stored = torch.cat([gaps.new_zeros(len(gaps), 1), -gaps], 1)  # the first is the largest
    target = -records.target_gap.double()
    # Of a label among the stored classes the finer of two numbers counts: gaps of uint8 are in steps of an eighth.
    pairs = [(labels, target), (ids, stored)]
    for where, value in pairs[::-1] if records.gaps.dtype == torch.uint8 else pairs:
        z = z.scatter(1, where, value)
    return torch.log_softmax(z, 1)


def _known(records: Records) -> Tensor:
    """Bool [B, C]: the classes that records hold a gap of."""
    every = records.gaps.new_ones((len(records), records.num_classes), dtype=torch.bool)
    if records.classes is None:
        return every
    return (~every).scatter(1, records.classes.long(), True).scatter(1, records.labels.long(), True)
