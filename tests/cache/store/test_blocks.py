"""Some rows of a chunk: only blocks that hold them are decompressed, and what is damaged is named."""

from contextlib import suppress

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc

from kdcache.cache.errors import CorruptError
from kdcache.cache.store.chunks import decode_part, decode_rows, encode_part
from kdcache.cache.store.layout import ArraySpec

ROWS = 120_000
# Among others, rows that begin in one block and end in another.
KINDS = {
    "ids": (ROWS, 20, "uint16"),
    "codes": (ROWS * 3, 9, "uint8"),
    "narrow": (ROWS * 10, 1, "float16"),
    "dense": (60, 21_841, "float16"),
    "float32": (1200, 1000, "float32"),
    "one block": (50, 3, "uint8"),
}


def part_of(kind, random=False):
    """A part that is one row short of its chunk, and the chunk's bytes. random: such as cannot be compressed."""
    rows, width, dtype = KINDS[kind]
    rng = np.random.default_rng(3)
    if random:
        data = rng.integers(0, 256, (rows - 1, width * np.dtype(dtype).itemsize), np.uint8).view(dtype)
    else:
        data = np.sort(rng.integers(0, 99, (rows - 1, width)), 1).astype(dtype)
    spec = ArraySpec("gaps", (2 * rows - 1, width), rows, dtype, ("sample", "rank"))
    return spec, data, encode_part(spec, 1, data)


PARTS = {(kind, random): part_of(kind, random) for kind in KINDS for random in (False, True)}


@given(st.sampled_from(sorted(PARTS)), st.data())
def test_some_rows_are_those_of_the_whole(which, data):
    spec, whole, content = PARTS[which]
    rows = data.draw(st.lists(st.integers(0, len(whole) - 1), unique=True, max_size=30).map(sorted))
    ends = data.draw(st.sampled_from([[], [0], [len(whole) - 1], [0, len(whole) - 1]]))
    places = np.unique(np.array([*rows, *ends], np.int64))
    found = decode_rows(spec, 1, content, "here", places)
    assert found.dtype == whole.dtype and found.shape == (len(places), whole.shape[1])
    assert found.tobytes() == whole[places].tobytes() == decode_part(spec, 1, content, "here")[places].tobytes()


def decompressed(monkeypatch, call):
    """How many bytes Blosc made while that was called."""
    made, real = [], blosc.decompress

    def counting(source, dest=None):
        out = real(source, dest)
        made.append(len(out) if dest is None else dest.nbytes)
        return out

    with monkeypatch.context() as m:
        m.setattr(blosc, "decompress", counting)
        call()
    return sum(made)


@pytest.mark.parametrize("kind", ["ids", "codes", "narrow", "dense", "float32"])
def test_only_blocks_that_hold_them_are_decompressed(kind, monkeypatch):
    spec, whole, content = PARTS[kind, False]
    block, row = int.from_bytes(content[8:12], "little"), whole[:1].nbytes
    for places in ([7], [0, len(whole) - 1]):
        made = decompressed(monkeypatch, lambda of=places: decode_rows(spec, 1, content, "here", np.array(of)))
        assert row <= made <= len(places) * 2 * block and made < spec.chunk_bytes
    every = np.arange(len(whole))
    assert decompressed(monkeypatch, lambda: decode_rows(spec, 1, content, "here", every)) == spec.chunk_bytes


def framed(frame):
    """The chunk that these bytes of Blosc's are."""
    return bytes(frame) + google_crc32c.value(bytes(frame)).to_bytes(4, "little")


def test_blocks_may_lie_in_any_order():
    """Several threads write them as they are done."""
    spec, whole, content = PARTS["ids", False]
    frame = content[:-4]
    count = -(-spec.chunk_bytes // int.from_bytes(frame[8:12], "little"))
    starts = np.frombuffer(frame, "<i4", count, 16)
    blocks = [frame[a:b] for a, b in zip(starts, [*starts[1:], len(frame)], strict=True)]
    order = np.random.default_rng(0).permutation(count)
    moved, at = np.empty(count, "<i4"), 16 + 4 * count
    for i in order:
        moved[i], at = at, at + len(blocks[i])
    other = framed(frame[:16] + moved.tobytes() + b"".join(blocks[i] for i in order))
    places = np.array([1, 999, 12_345, 100_000, ROWS - 2])
    assert other != content and (decode_part(spec, 1, other, "here") == whole).all()
    assert (decode_rows(spec, 1, other, "here", places) == whole[places]).all()


@pytest.mark.parametrize("start", [-1, 0, 15, 2**31 - 1, "end"])
def test_blocks_that_lie_elsewhere_are_refused(start):
    spec, _, content = PARTS["ids", False]
    frame = bytearray(content[:-4])
    frame[16:20] = (len(frame) if start == "end" else start).to_bytes(4, "little", signed=True)
    with pytest.raises(CorruptError, match="here: its blocks do not lie within it"):
        decode_rows(spec, 1, framed(frame), "here", np.array([5]))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31))
def test_lies_about_blocks_give_an_error_or_rows_and_take_no_memory(size, start):
    spec, whole, content = PARTS["codes", False]
    frame = bytearray(content[:-4])
    frame[8:12], frame[20:24] = size.to_bytes(4, "little"), start.to_bytes(4, "little")
    with suppress(CorruptError):
        assert decode_rows(spec, 1, framed(frame), "here", np.array([5, 4000])).shape == (2, whole.shape[1])


def test_a_chunk_that_is_damaged_or_of_another_size_is_refused():
    spec, _, content = PARTS["ids", False]
    flipped = content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    for bad, said in (
        (flipped, "checksum"),
        (content[:-1], "compressed bytes"),
        (PARTS["codes", False][2], "declares"),
    ):
        with pytest.raises(CorruptError, match=f"^here: .*{said}"):
            decode_rows(spec, 1, bad, "here", np.array([5]))
