"""Ways to damage the content of a file or a text, for fuzzing: bytes, JSON, TOML, lines and words.

Each way takes sound content, the contents of other files to splice from, and a random generator, and gives other
content. All chance comes from the generator, so that a seed gives the same case again.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

Damage = Callable[[bytes, Sequence[bytes], random.Random], bytes]
_NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_ODD_TEXTS = (
    "", " ", "x", "null", "nan", "inf", "-inf", "1e999", "-1", "0", "1", "1.5", "2147483648", "18446744073709551616",
    "9" * 4299, "9" * 5000, "0x10", "1_000", "٣", "²", "../../etc/passwd", "/dev/zero", "module:function",
    "timm/resnet18", "a\nb", "a\r\nb\u2028c", "\0", "\x1b[2J", "\ud800", "\udcff", "é" * 300, "x" * 100_000,
    "{}", "[]", "%s", "'", '"',
)  # fmt: skip


# ---- bytes ----


def one_bit(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    content = bytearray(good)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwritten(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    content = bytearray(good)
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def number(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A number that is a bound of some type, in the place of whatever stands there."""
    size, order = rng.choice([1, 2, 4, 4, 8, 8]), rng.choice("<>")
    packed = struct.pack(order + {1: "B", 2: "H", 4: "I", 8: "Q"}[size], rng.choice(_NUMBERS) % 256**size)
    at = rng.randrange(len(good)) // rng.choice([1, size]) * 1
    return good[:at] + packed[: len(good) - at] + good[at + size :]


def beginning(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Damage among the first bytes, where headers are."""
    return rng.choice([one_bit, overwritten, number])(good[:96], others, rng) + good[96:]


def ending(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Damage among the last bytes, where some formats have their tables."""
    if len(good) < 2:
        return one_bit(good, others, rng)
    at = max(1, len(good) - 96)
    return good[:at] + rng.choice([one_bit, overwritten, number])(good[at:], others, rng)


def cut(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return good[: rng.randrange(len(good))]


def removed(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(good))
    return good[:at] + good[at + rng.choice([1, 2, 30, 512]) :]


def inserted(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(good) + 1)
    return good[:at] + rng.randbytes(rng.choice([1, 2, 30, 512])) + good[at:]


def longer(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return good + rng.choice([good, b"\0", b"\n", bytes(1000), rng.randbytes(rng.randint(1, 2000))])


def doubled(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A piece that stands there again, once or many times."""
    at = rng.randrange(len(good))
    piece = good[at : at + rng.choice([1, 8, 64, 512])]
    return good[:at] + piece * rng.choice([2, 2, 3, 50]) + good[at + len(piece) :]


def spliced(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A piece of another file, or of the same one, in the place of what stands there."""
    other = rng.choice([*others, good]) or good
    start, at = rng.randrange(len(other)), rng.randrange(len(good))
    piece = other[start : start + rng.choice([4, 32, 256, len(other)])]
    return good[:at] + piece + good[at + len(piece) :]


def zeroed(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(good))
    size = min(rng.choice([4, 64, 512, len(good)]), len(good) - at)
    return good[:at] + rng.choice([b"\0", b"\xff"]) * size + good[at + size :]


def another(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Something else altogether."""
    made = (
        b"",
        b"\0",
        b"\n",
        b"{}",
        b"[]",
        b"null",
        bytes(4096),
        rng.randbytes(300),
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
    )
    return rng.choice([*made, *others[:3]])


BYTES: tuple[Damage, ...] = (
    one_bit, one_bit, one_bit, overwritten, overwritten, number, number, beginning, beginning, ending, ending, cut,
    removed, inserted, longer, doubled, spliced, spliced, zeroed, another,
)  # fmt: skip


# ---- JSON ----


def _raw(rng: random.Random) -> str:
    """A JSON value, or what is almost one, as text."""
    deep = rng.choice([50, 400, 480, 900, 990, 5000, 100_000])
    nested = rng.choice(["[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "[" * deep])
    plain = rng.choice(
        [
            "null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity",
            "-Infinity", "2147483648", "9223372036854775808", "1" + "0" * 30, "9" * 4299, "9" * 5000, "01", "+1", "1_0",
            "[]", "{}", "[[]]", "[null]", "[1,2]", '["a","b"]', '{"a":1}', '{"a":1,"a":2}', "'x'", "undefined",
        ]
    )  # fmt: skip
    text = json.dumps(rng.choice(_ODD_TEXTS))
    return rng.choice([plain, plain, plain, text, text, nested])


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values that lie in others."""
    found: list[tuple[Any, ...]] = []
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += [(*path, key), *_places(one, (*path, key))]
    return found


def _nudged(value: Any, rng: random.Random) -> Any:
    """A value that is almost the same."""
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, int(bool(value)), "true", None])
    if isinstance(value, int | float):
        return rng.choice([value + 1, -value, value * 2**20, value + 0.5, str(value), [value], bool(value)])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            [value[:at], value + "\n", value.upper(), value[:at] + "x" + value[at + 1 :], value * 2, [value]]
        )
    return rng.choice([[value], list(value), dict.fromkeys(map(str, value), 1), value])


_MARK = "@@here@@"


def json_value(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A value of a JSON text that is another, is missing, has another name, or stands there twice."""
    try:
        value = json.loads(good)
    except (ValueError, RecursionError):
        return rng.choice(BYTES)(good, others, rng)
    raw = _raw(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(value)
        if not places:
            return raw.encode("utf-8", "surrogatepass")
        *way, key = rng.choice(places)
        inner = value
        for step in way:
            inner = inner[step]
        how = rng.randrange(6)
        if how == 0:
            del inner[key]
        elif how == 1:
            inner[key] = _nudged(inner[key], rng)
        elif how == 2 and isinstance(inner, dict):
            inner[rng.choice(_ODD_TEXTS)] = inner.pop(key)
        elif how == 3 and isinstance(inner, dict):
            raw = f"{json.dumps(inner[key])},{json.dumps(key)}:{raw}"  # the key stands there twice
            inner[key] = _MARK
        else:
            inner[key] = _MARK
    indent = rng.choice([None, None, 2])
    text = json.dumps(value, indent=indent, ensure_ascii=rng.random() < 0.8, sort_keys=rng.random() < 0.5)
    return text.replace(json.dumps(_MARK), raw).encode("utf-8", "surrogatepass")


def json_text(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """The same JSON in another coding, with more around it, or cut."""
    text = good.decode("utf-8", "replace")
    return rng.choice(
        [
            b"\xef\xbb\xbf" + good, text.encode("utf-16"), text.encode("utf-32"), good * 2, good + b",",
            good.rstrip()[:-1], good.replace(b'"', b"'"), good.replace(b"\n", b"\r\n"), b"[" + good + b"]",
            b'{"a":' + good + b"}",
            b"\n" * 100 + good, good.replace(b":", b" : "), good.replace(b",", b",,", 1), b"[" * 100_000,
            b'{"a":' * 100_000, good.replace(b'"', b'"\xff', 1), good.replace(b"0", b"1e5"),
        ]
    )  # fmt: skip


JSON: tuple[Damage, ...] = (*[json_value] * 12, json_text, json_text, *BYTES[:10])


# ---- TOML, tables of lines, short texts ----


def toml_line(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A line of a TOML file with another key or value, a line more, or a line twice."""
    lines = good.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    key, equals, value = lines[at].partition("=")
    deep = rng.choice([100, 900, 5000, 50_000])
    raw = rng.choice(
        [
            "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "inf", "-nan", "true", "0x1F", "1e400", "9" * 5000,
            "1_000", '"\\u0000"', '"\\uD800"', '"""a\nb"""', "'''x'''", "{a = 1}", "{}", "[]",
            "[1, 'a']", "[[1], [2]]",
            "[" * deep + "]" * deep, "{a = " * deep + "1" + "}" * deep, '"' + "x" * 100_000 + '"',
            json.dumps(rng.choice(_ODD_TEXTS)), value, value,
        ]
    )  # fmt: skip
    key = rng.choice(
        [
            key,
            key,
            key,
            "",
            '""',
            "a.b.c",
            ".".join("a" * deep),
            "'x'",
            '"\\u001b"',
            key.strip() + "x",
            "[train]",
            "home",
        ]
    )
    table = rng.choice(
        ["[train]", "[[train]]", "[nosuch]", "[a.b]", "[", "[]", "[ls]", "[" + ".".join("a" * deep) + "]"]
    )
    changed = rng.choice([f"{key}={raw}", f"{key}{equals}{raw}", raw, table, f"{lines[at]}\n{lines[at]}", ""])
    return "\n".join([*lines[:at], changed, *lines[at + rng.choice([0, 1, 1]) :]]).encode("utf-8", "surrogatepass")


def one_line(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A line of a text that is another, is missing, stands there twice or elsewhere."""
    lines = good.split(b"\n")
    at = rng.randrange(len(lines))
    how = rng.randrange(6)
    if how == 0:
        del lines[at]
    elif how == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif how == 2:
        lines[at] = json_value(lines[at], others, rng) if lines[at][:1] == b"{" else one_word(lines[at], others, rng)
    elif how == 3 and lines[at]:
        lines[at] = rng.choice(BYTES)(lines[at], others, rng)
    elif how == 4:
        lines[at] = b'"' + lines[at]
    else:
        return rng.choice(
            [good.replace(b"\n", b"\r\n"), good.replace(b"\n", b"\r"), b"\xef\xbb\xbf" + good, good.rstrip()]
        )
    return b"\n".join(lines)


_WORD = re.compile(r"\w+|\W")


def one_word(good: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Words and signs of a short text that are others, are missing, or stand elsewhere."""
    words = _WORD.findall(good.decode("utf-8", "surrogateescape"))
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(words) + 1)
        how = rng.randrange(5)
        if how == 0:
            words[at : at + rng.randint(1, 3)] = []
        elif how == 1 or not words:
            words.insert(at, rng.choice(_ODD_TEXTS))
        elif how == 2:
            words.insert(at, rng.choice(words))
        elif how == 3:
            words.insert(at, rng.choice("()[]{},:;=?&#@!*/\\.-+_ \t\n~%$'\"|<>"))
        else:
            words[at : at + 1] = [rng.choice(_ODD_TEXTS)]
    return "".join(words).encode("utf-8", "surrogatepass")


TOML: tuple[Damage, ...] = (*[toml_line] * 12, one_word, one_word, *BYTES[:10])
LINES: tuple[Damage, ...] = (*[one_line] * 12, one_word, one_word, json_text, *BYTES[:10])
WORDS: tuple[Damage, ...] = (*[one_word] * 8, one_bit, overwritten, doubled, spliced, cut)
