"""Logits stored as TinyViT's and FKD's code store them."""

import numpy as np
import pytest
import torch

from kdcache.cache.records.records import Records

CLASSES, K, VIEWS = ("ant", "bee", "cat", "dog", "eel"), 3, 3
RNG = np.random.default_rng


def quiet(_):
    pass


def same_files(a, b):
    """Whether two folders hold the same files."""
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (a, b))
    return bool(one) and one == two


# Both formats as their projects' code writes them


def softmax64(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def top(p, k, dtype):
    """ids and probabilities of the k largest, equal ones in no order of their ids, as topk and argsort leave them."""
    ids = np.argsort(-p[..., ::-1].astype(np.float32), -1, kind="stable")[..., :k]
    ids = p.shape[-1] - 1 - ids
    return ids, np.take_along_axis(p, ids, -1).astype(dtype)


def write_tinyvit(folder, keys, p, seeds, k=K, ranks=2, first_epoch=0):
    """p [V, N, C] and seeds [V, N]: an epoch's samples are shuffled, and one is there again, with other answers."""
    for v, (rows, of_rows) in enumerate(zip(p, seeds, strict=True)):
        epoch = folder / f"logits_top{k}_epoch{v + first_epoch}"
        epoch.mkdir(parents=True)
        order = RNG(v).permutation(len(keys))
        for rank in range(ranks):
            mine = order[rank::ranks]
            padding = order[:1] if rank else order[:0]
            (epoch / f"rank{rank}-keys.txt").write_text("".join(f"{keys[i]}\n" for i in [*mine, *padding]))
            with (epoch / f"rank{rank}-values.bin").open("wb") as f:
                for number, i in enumerate([*mine, *padding]):
                    ids, values = top(rows[i] if number < len(mine) else rows[i][::-1], k, np.float16)
                    f.write(np.int32(of_rows[i]).tobytes() + ids.astype(np.int16).tobytes() + values.tobytes())
    return folder


def write_fkd(folder, data, p, boxes, flips, k=K, dtype=np.float32, kind="arrays"):
    """p [V, N, C], boxes [V, N, 4], flips [V, N]."""
    for i, path in enumerate(data.paths):
        height, width = data.sizes[i].tolist()
        file = folder / "imagenet/train" / path.split("/")[0] / f"{path.split('/')[1].split('.')[0]}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        crops = [torch.FloatTensor([b[0] / height, b[1] / width, b[2] / height, b[3] / width]) for b in boxes[:, i]]
        ids, values = (torch.from_numpy(a) for a in top(p[:, i], k, np.float32))
        output = torch.stack([torch.stack([a, b]) for a, b in zip(ids, values, strict=True)])
        state = [torch.stack(crops), torch.from_numpy(flips[:, i]), output]
        if kind == "arrays":
            state = [a.numpy().astype(dtype) if a.is_floating_point() else a.numpy() for a in state]
        torch.save(state, file)
    return folder


def require_records(records: Records, p, dtype):
    """The records are the K largest of p [N, C] as stored in that type, and what remains of them as the tail."""
    order = np.lexsort((np.broadcast_to(np.arange(p.shape[1]), p.shape), -p.astype(dtype)), -1)[:, :K]
    assert np.array_equal(records.classes.long().numpy(), order)
    kept = np.take_along_axis(p, order, 1)
    got = records.dense(1.0, "uniform").double().numpy()
    bound = 1e-4 if dtype == np.float32 else 2e-3
    np.testing.assert_allclose(np.take_along_axis(got, order, 1), kept, rtol=4e-3, atol=bound)
    rest = 1 - kept.sum(1)
    np.testing.assert_allclose(1 - np.take_along_axis(got, order, 1).sum(1), rest, rtol=4e-3, atol=bound)
    # Not known is which of the other classes has it: all of them have as much.
    others = np.delete(got[5], order[5])
    assert others == pytest.approx(others[0], rel=1e-3) and records.target_gap.shape == (len(p), 0)
