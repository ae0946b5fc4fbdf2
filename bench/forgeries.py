"""Ways to forge files of the formats that kdcache reads: what is damaged fits its own checksums and lengths again.

They are used as those of damages.py. What a forger has signed is for readers to refuse where it cannot be, and never to
crash on; other values than before are no fault of theirs.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps

import google_crc32c  # zarr's
from damages import BYTES, JSON, Damage, json_value, one_word, spliced

from kdcache.cache.sealed import sealed
from kdcache.pipeline.ffcv.format import ALLOCATION, HEADER, TRAILER

_BLOCK = 512  # of HDF5's user block, and of tars


def forgery(way: Damage) -> Damage:
    """Mark a way, and give back the sound content where the way cannot be gone."""

    @wraps(way)
    def tried(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
        try:
            return way(good, others, rng)
        except (ValueError, LookupError, TypeError, struct.error, RecursionError, zipfile.BadZipFile):
            return good

    tried.forges = True  # type: ignore[attr-defined]
    return tried


def _any(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return rng.choice(BYTES)(good, others, rng) if good else rng.randbytes(8)


# ---- JSON with a checksum of itself ----


@forgery
def unsealed(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Without the checksum, as earlier versions wrote it, and damaged."""
    value = json.loads(good)
    del value["sha256"]
    return rng.choice(JSON)(json.dumps(value).encode(), others, rng)


@forgery
def resealed(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Damaged, and with a checksum that fits."""
    value = json.loads(good)
    del value["sha256"]
    return sealed(json.loads(json_value(json.dumps(value).encode(), others, rng)))


SEALED: tuple[Damage, ...] = (*JSON, *[unsealed] * 8, *[resealed] * 6)


# ---- zip files, as torch.save and numpy.savez write them ----


@lru_cache(1)
def _bomb() -> tuple[bytes, int]:
    """600 MB of zeros, deflated, and their CRC."""
    deflate, block, crc = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20), 0
    piece = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)  # after which the next one is the same again
    for _ in range(600):
        crc = zlib.crc32(block, crc)
    return piece * 600 + deflate.flush(), crc


def _npy(good: bytes, rng: random.Random) -> bytes:
    """An array with a header that says something else."""
    length = int.from_bytes(good[8:10], "little")
    said = good[10 : 10 + length].decode("latin-1")
    odd = (
        "'|O'",
        "'<U400000000'",
        "'V0'",
        "'<i8'",
        "'<f2'",
        "(10**12,)",
        "(-1,)",
        "(4000000000000,)",
        "()",
        "(0, 0)",
        "True",
        "{}",
    )
    words = said.replace("'shape': ", "'shape': @").split("@")
    if rng.random() < 0.5:
        said = words[0] + f"{rng.choice(odd)}, }}"
    elif rng.random() < 0.5:
        said = said.replace(said.partition("'descr': ")[2].partition(",")[0], rng.choice(odd))
    else:
        said = (
            one_word(said.encode(), (), rng).decode("utf-8", "replace").encode("latin-1", "replace").decode("latin-1")
        )
    text = said.encode("latin-1")[:60_000]
    return good[:8] + len(text).to_bytes(2, "little") + text + good[10 + length :]


@forgery
def zipped(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A zip file of which one entry is damaged, renamed, missing, doubled or enormous, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        entries = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    at, how = rng.randrange(len(entries)), rng.randrange(9)
    if rng.random() < 0.5:  # what torch.load runs
        at = next((i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl")), at)
    name, content = entries[at]
    if how == 0:
        del entries[at]
    elif how == 1:
        entries[at] = (rng.choice(["", "x", "../x", "é", name + "x", name.upper(), "a/" * 200 + "x"]), content)
    elif how == 2:
        entries.append((name + "2", _any(content, others, rng)))
    elif content.startswith(b"\x93NUMPY") and rng.random() < 0.6:
        entries[at] = (name, _npy(content, rng))
    else:
        entries[at] = (name, _any(content, others, rng))
    out, stored = (
        io.BytesIO(),
        rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
    )
    with zipfile.ZipFile(out, "w", stored) as new:
        for name, content in entries:
            new.writestr(zipfile.ZipInfo(name), content, stored)
    return out.getvalue()


@forgery
def bombed(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A zip file of which one entry is a few bytes that stand for very many."""
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        names = old.namelist()
        entries = {name: old.read(name) for name in names}
    chosen, header = rng.choice(names), 30
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in names:
            new.writestr(name, b"" if name == chosen else entries[name])
    content, (deflated, crc) = out.getvalue(), _bomb()
    # The empty entry's local header and its entry in the directory get the sizes of the bomb.
    with zipfile.ZipFile(io.BytesIO(content)) as again:
        info = again.getinfo(chosen)
        start = info.header_offset + header + len(chosen.encode())
        sizes = struct.pack("<III", rng.choice([0, crc]), len(deflated), 600 << 20)
        body = bytearray(content[:start] + deflated + content[start + info.compress_size :])
        body[info.header_offset + 14 : info.header_offset + 26] = sizes
        grown = len(deflated) - info.compress_size
    at = body.rindex(b"PK\x01\x02")
    for entry in _entries(bytes(body)):
        at = int.from_bytes(body[entry + 42 : entry + 46], "little")
        if body[entry + 46 : entry + 46 + len(chosen.encode())] == chosen.encode():
            body[entry + 16 : entry + 28] = sizes
        if at > info.header_offset:
            body[entry + 42 : entry + 46] = (at + grown).to_bytes(4, "little")
    end = body.rindex(b"PK\x05\x06")
    directory = int.from_bytes(body[end + 16 : end + 20], "little")
    body[end + 16 : end + 20] = (directory + grown).to_bytes(4, "little")
    return bytes(body)


def _entries(content: bytes) -> list[int]:
    """Where the entries of a zip file's directory begin."""
    at, found = content.rindex(b"PK\x05\x06"), []
    while (at := content.rfind(b"PK\x01\x02", 0, at)) >= 0:
        found.append(at)
        if len(found) >= 200:
            break
    return found


ZIP: tuple[Damage, ...] = (*BYTES, *BYTES, *[zipped] * 40, bombed)


# ---- safetensors ----


@forgery
def safetensors_header(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A header of safetensors that says something else, in a length that fits."""
    end = 8 + int.from_bytes(good[:8], "little")
    header = rng.choice(JSON)(good[8:end], others, rng)
    return len(header).to_bytes(8, "little") + header + good[end:]


def resaved(save: Callable[[dict[str, object]], bytes]) -> Damage:
    """Notes that say something else, in a file whose checksums fit. save(notes) writes such a file."""

    @forgery
    def notes(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
        end = 8 + int.from_bytes(good[:8], "little")
        text = json.loads(good[8:end])["__metadata__"]["kdcache"]
        return save(json.loads(json_value(text.encode(), others, rng)))

    return notes


SAFETENSORS: tuple[Damage, ...] = (*BYTES, *[safetensors_header] * 12)


# ---- tars ----

_FIELDS = (
    (0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (265, 32),
    (297, 32), (329, 8), (337, 8), (345, 155),
)  # fmt: skip


@forgery
def tar_header(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A field of a tar's header that says something else, with a checksum that fits."""
    content, headers, at = bytearray(good), [], 0
    while at + _BLOCK <= len(good) and good[at : at + _BLOCK].strip(b"\0"):
        headers.append(at)
        at += _BLOCK + -(-int(good[at + 124 : at + 135].strip(b"\0 ") or b"0", 8) // _BLOCK) * _BLOCK
    at = rng.choice(headers)
    start, size = rng.choice([*_FIELDS, (124, 12), (124, 12), (156, 1), (156, 1), (0, 100)])
    kinds = (b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"5", b"D", b"V", b"\xff")
    octal = b"%o" % rng.choice([0, 1, 511, 512, 2**31, 2**33 - 1])
    odd: list[bytes] = [
        b"7" * size, b"\x80" + rng.randbytes(size - 1) if size > 1 else rng.choice(kinds), b"\xff" * size,
        b"-1" + b" " * size, b"", b"a\nb.jpg", b"\x1b[2J.jpg", rng.randbytes(size), b"0" * (size - 1) + b"\0",
        b"../../x.jpg", b"\xffx.jpg", b"9" * size, octal, b".jpg", b"a.jpg", b"a.json", b"a.cls",
    ]  # fmt: skip
    content[at + start : at + start + size] = rng.choice(odd)[:size].ljust(size, b"\0")
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + _BLOCK])
    return bytes(content)


TAR: tuple[Damage, ...] = (*BYTES, *[tar_header] * 20)


# ---- stores ----


@forgery
def chunk(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A chunk of zarr with damaged content, and with a checksum and a header that fit."""
    body = bytearray(_any(good[:-4], [other[:-4] for other in others], rng))
    if rng.random() < 0.7 and len(body) >= 16:  # a header that declares what belongs there
        body[4:8], body[12:16] = good[4:8], len(body).to_bytes(4, "little")
    return bytes(body) + google_crc32c.value(bytes(body)).to_bytes(4, "little")


CHUNK: tuple[Damage, ...] = (*BYTES, *[chunk] * 40)


@forgery
def packed_head(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A packed cache whose head or index says something else, with digests that fit."""
    head = json.loads(good[:_BLOCK])
    offset, size = head["index"]
    if rng.random() < 0.4:
        return (
            json_value(json.dumps(head, sort_keys=True, separators=(",", ":")).encode(), others, rng)[:_BLOCK].ljust(
                _BLOCK, b"\n"
            )
            + good[_BLOCK:]
        )
    index = json_value(good[offset : offset + size], others, rng)
    content = good[_BLOCK:] + index
    head |= {
        "index": [_BLOCK + len(good) - _BLOCK, len(index)],
        "index_sha256": hashlib.sha256(index).hexdigest(), "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    return json.dumps(head, sort_keys=True, separators=(",", ":")).encode().ljust(_BLOCK, b"\n") + content


PACKED: tuple[Damage, ...] = (*BYTES, *[packed_head] * 15)


def packed_images(table_end: int) -> Damage:
    """A .beton whose notes, table or images say something else, with digests that fit. The table ends at that byte."""

    @forgery
    def forged(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
        place = HEADER.fields["allocations"][1]
        (tables_at,) = struct.unpack_from("<Q", good, place)
        _, length, version, magic = TRAILER.unpack(good[tables_at - TRAILER.size : tables_at])
        begin = tables_at - TRAILER.size - length
        notes, rest, tables = json.loads(good[begin : begin + length]), good[:begin], good[tables_at:]
        how = rng.randrange(5)
        if how == 0:
            notes = json.loads(json_value(json.dumps(notes).encode(), others, rng))
        elif how == 1:
            rest = _same_length(rest[:table_end], others, rng) + rest[table_end:]
        elif how == 2:
            tables = _same_length(tables, others, rng)
        elif how == 3:  # an image of another kind in the place of one
            number = rng.randrange(len(tables) // ALLOCATION.itemsize // 2) * 2
            _, at, size = struct.unpack_from("<QQQ", tables, number * ALLOCATION.itemsize)
            image = _any(rng.choice([*others, rest[at : at + size]]), others, rng)
            rest = rest[:at] + image[:size].ljust(size, b"\0") + rest[at + size :]
        else:
            rest = _same_length(rest, others, rng)
        text = json.dumps(notes, separators=(",", ":")).encode()
        if how != 1:
            rest = rest[:place] + struct.pack("<Q", len(rest) + len(text) + TRAILER.size) + rest[place + 8 :]
        if isinstance(notes, dict) and isinstance(notes.get("table"), str):
            table = hashlib.sha256(rest[:table_end] + tables).hexdigest().encode()
            text = text.replace(notes["table"].encode(), table) if len(notes["table"]) == 64 else text
        return rest + text + TRAILER.pack(hashlib.sha256(text).digest(), len(text), version, magic) + tables

    return forged


def _same_length(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return rng.choice([spliced, *BYTES[:11]])(good, others, rng)[: len(good)].ljust(len(good), b"\0")
