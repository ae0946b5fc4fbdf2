"""Several processes train one student: the same as one does, and what happens when one of them dies."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from kdcache.cache import encode
from kdcache.train import ranks
from kdcache.train.presets import LOSSES, make_loss

RANKS = 2


def start_ranks(job, out):
    """Runs the function of that name, below, on joined ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, job, str(out)],
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]
    assert [one.wait(timeout=120) for one in started] == [0] * RANKS


# Losses


def value_and_gradients(loss, rows, batch):
    """The loss of some rows, weighted by their share, its gradient for their logits, and those of uskd's head."""
    logits, labels, records, weights, features = batch
    s = logits[rows].clone().requires_grad_()
    more = {"features": features[rows]} if loss.needs.features else {}
    value = loss(s, labels[rows], records[rows], None if weights is None else weights[rows], **more)
    value = value * ranks.weight(len(rows), len(logits))
    head = list(loss.parameters()) if loss.needs.features else []
    gradient, *of_head = torch.autograd.grad(value, [s, *head])
    return value.detach(), gradient, of_head


def loss_errors(out):
    """For every loss, labels and split: how far value and gradients are from one process's, relative to the largest."""
    # The losses compute in float32, whose rounding would hide mistakes.
    torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64
    torch.manual_seed(0)
    count, classes = 12, 10
    logits, teacher = 3 * torch.randn(2, count, classes, dtype=torch.float64)
    features = torch.randn(count, 6, dtype=torch.float64)
    y = torch.randint(0, classes, (count, 2))
    share = torch.rand(count, 1, dtype=torch.float64)
    share = torch.cat([share, 1 - share], 1)
    cases = {}
    for name in LOSSES:
        for labels, weights in ((y[:, 0], None), (y, share)):
            loss = make_loss(name, 32)
            if weights is not None and not loss.needs.mixed:
                continue
            if loss.needs.features:
                loss.make_head(6, classes)
                loss.head.double()
            records = encode(teacher, labels, precision="float32")
            cases[f"{name}, {labels.dim()}"] = loss, (logits, labels, records, weights, features)
    everything = torch.arange(count)
    alone = {case: value_and_gradients(*made[:1], everything, *made[1:]) for case, made in cases.items()}
    found = {}
    with ranks.joined("cpu"):
        for first in (6, 9):
            mine = everything.split([first, count - first])[ranks.rank()]
            for case, (loss, batch) in cases.items():
                value, gradient, of_head = value_and_gradients(loss, mine, batch)
                want, want_gradient, want_of_head = alone[case]
                # As DDP does: the mean over ranks.
                pairs = [(ranks.total(value) / RANKS, want), (gradient / RANKS, want_gradient[mine])]
                pairs += [(ranks.total(g) / RANKS, w) for g, w in zip(of_head, want_of_head, strict=True)]
                errors = [float((g - w).abs().max() / w.abs().max()) for g, w in pairs]
                found[f"{case}, {first}"] = max(max(e) for e in ranks.everyones(errors))
        if ranks.rank() == 0:
            Path(out).write_text(json.dumps(found))


def test_losses_of_ranks_are_those_of_the_whole_batch(tmp_path):
    start_ranks("loss_errors", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {case.split(",")[0] for case in found} == set(LOSSES)
    assert {case: error for case, error in found.items() if not error < 1e-12} == {}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
