"""Lists image files in folders, and reads their sizes and their pixels."""

import contextlib
import hashlib
import math
import os
import stat
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self, TypeVar, overload

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import decode_file, image_size, in_one_line
from kdcache.pipeline.data.memory import recall, remember

FilesDone = Callable[[int, int], None]  # files done, files in all
Triple = tuple[float, float, float]
T = TypeVar("T")

SUFFIXES = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
_NAMED = 5  # suffixes that one message names
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
_UNDECODABLE = tuple(sorted(set(IMG_EXTENSIONS) - set(SUFFIXES)))
_SMALL_SIDE = 64  # pixels
_SMALL_TOTAL = 1 << 30  # bytes
_CHUNK = 256  # files in one task
_WORTH_A_THREAD = 4e-4  # seconds for a file; with less work, threads mostly wait for the interpreter's lock
_STATISTICS_CHUNK = 1 << 20  # pixels
_PIECE = 1 << 16  # paths at a time
_TEXT = ("utf-8", "surrogateescape")  # as the system encodes names of files


class Paths(Sequence[str]):
    """Many paths or other names, held as one text: some 5 bytes more than its own for each of them.

    Each str of a tuple would take 60 bytes more, and again as much in every worker process that looks at it, because
    Python counts references in the objects themselves.
    """

    def __init__(self, text: bytes | bytearray, ends: np.ndarray) -> None:
        """text: each name with a NUL behind it. ends [N]: where these NULs are."""
        self._text = text
        self._ends = ends.astype(np.uint32 if len(text) < 2**32 else np.uint64, copy=False)

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Take the names one by one. UnicodeEncodeError for one that no file can have."""
        text, ends = bytearray(), array("Q")
        for name in names:
            text += name.encode(*_TEXT)
            ends.append(len(text))
            text += b"\0"
        return cls(text, np.frombuffer(ends, np.uint64))

    @classmethod
    def from_array(cls, stored: np.ndarray) -> Self:
        """The names that `as_array` gave."""
        text = stored.tobytes() + b"\0" * bool(stored.size)
        found = [np.flatnonzero(np.frombuffer(text, np.uint8, _piece(i, len(text)), i) == 0) + i for i in _starts(text)]
        return cls(text, np.concatenate([np.empty(0, np.int64), *found]))

    def as_array(self) -> np.ndarray:
        """All names as one text, uint8, with a NUL between each and the next."""
        return np.frombuffer(self._text, np.uint8)[:-1]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, at: int | np.integer) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | np.integer | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        start = int(self._ends[place - 1]) + 1 if place else 0
        return self._text[start : int(self._ends[place])].decode(*_TEXT)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _PIECE):
            start = int(self._ends[first - 1]) + 1 if first else 0
            ends = self._ends[first : first + _PIECE]
            yield from self._text[start : int(ends[-1])].decode(*_TEXT).split("\0")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((bytes(self._text[:_PIECE]), len(self)))


def _starts(text: bytes) -> range:
    return range(0, len(text), _STATISTICS_CHUNK)


def _piece(start: int, total: int) -> int:
    return min(_STATISTICS_CHUNK, total - start)


@dataclass(frozen=True, eq=False)
class Folder:
    """What load_folder found. mean and std (of pixels in 0..1) are measured for small images, else ImageNet's."""

    sizes: np.ndarray  # int32 [N, 2], H and W
    images: torch.Tensor | None  # uint8 [N, H, W, 3]
    mean: Triple
    std: Triple


def list_images(root: Path) -> tuple[Paths, Counter[str]]:
    """List all images under `root`: their relative POSIX paths in byte order, and the number of other files by suffix.

    Hidden files and folders are left out, as is_hidden has it. Links are followed, but links that would count images
    twice are refused. InputError for such a link, and for a folder that cannot be read, that holds no images, or that
    holds images that cannot be decoded.
    """
    undecodable: list[str] = []
    others: Counter[str] = Counter()
    paths = Paths.of(_images_below(root, undecodable, others))
    if undecodable:
        raise InputError(
            f"{min(undecodable)}: {root} holds {len(undecodable)} files of formats that cannot be decoded "
            f"({' '.join(_UNDECODABLE)}): convert them to .png, or move them away"
        )
    if not paths:
        raise InputError(f"{root}: holds no images ({' '.join(SUFFIXES)}){left_out(others)}")
    return paths, others


def _images_below(root: Path, undecodable: list[str], others: Counter[str]) -> Iterator[str]:
    """The paths of the images, in byte order: those of a folder come where its name with a slash behind it stands.

    Files of other kinds are added to the two lists.
    """
    skip = len(os.fspath(root)) + 1
    real_root = root.resolve()
    # Folders that are being gone through, each with the folders of the links that led there.
    stack = [(os.fspath(root), _entries(os.fspath(root)), tuple[Path, ...]())]
    while stack:
        folder, entries, led = stack[-1]
        name = next(entries, None)
        if name is None:
            stack.pop()
        elif name.endswith("/"):
            path = f"{folder}/{name[:-1]}"
            if os.path.islink(path):  # noqa: PTH114  Paths take seconds
                led = (*led, Path(folder).resolve())
                _refuse_twice(Path(path), led, real_root)
            stack.append((path, _entries(path), led))
        else:
            suffix = name[name.rfind(".") :].lower() if "." in name else ""
            if suffix in SUFFIXES:
                yield f"{folder}/{name}"[skip:]
            elif suffix in _UNDECODABLE:
                undecodable.append(f"{folder}/{name}")
            else:
                others[suffix] += 1


def _entries(folder: str) -> Iterator[str]:
    """The names of what lies in a folder, in byte order, but for what is hidden. Those of folders end with a slash."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not is_hidden(entry.name):
                        names.append(f"{entry.name}/")
                elif not entry.name.startswith("."):
                    names.append(entry.name)
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be listed: {e.strerror}") from e
    # Text without other letters sorts as its bytes do, in half the time.
    return iter(sorted(names, key=None if all(map(str.isascii, names)) else os.fsencode))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out: hidden ones, and the folder that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _refuse_twice(link: Path, folders: Sequence[Path], root: Path) -> None:
    """Raise InputError for a link to a folder that is listed anyway, or that holds a folder on the way to the link."""
    target = link.resolve()
    inside = target.is_relative_to(root) and not any(map(is_hidden, target.relative_to(root).parts))
    if inside or any(folder.is_relative_to(target) for folder in folders):
        raise InputError(f"{link}: a link to {target}, whose images would be counted here again: remove it")


def left_out(others: Counter[str]) -> str:
    """The end of a line that tells how many files are not read, by suffix; empty where there are none."""
    if not others:
        return ""
    most = sorted(others.items(), key=lambda one: (-one[1], one[0]))[:_NAMED]
    named = ", ".join(f"{n:,} {suffix or 'without a suffix'}" for suffix, n in most)
    more = f", {len(others) - _NAMED} more kinds" if len(others) > _NAMED else ""
    return f"; {others.total():,} files are left out, {named}{more}"


def load_folder(root: Path, paths: Sequence[str], home: Path, *, decode: bool = True) -> Folder:
    """Load the sizes of the images and, where all are equal and small, their pixels too (unless `decode` is off).

    Small means up to 64 pixels a side and 1 GiB in all. Sizes and statistics are remembered in home/datasets under
    a hash of the listing (paths, bytes, times of change), so a second opening reads no headers. InputError
    names the first file that cannot be read, and the number of such files.
    """
    key = _listing_key(root, paths)
    known = _recall(home, key, len(paths))
    sizes = known.sizes if known else _header_sizes(root, paths)
    small = are_small(sizes)
    images = _decode_all(root, paths, sizes) if small and (decode or not known) else None
    if known:
        return Folder(sizes, images, known.mean, known.std)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if images is None else mean_std(images.numpy())
    remember(home, key, {"sizes": sizes, "mean": np.array(mean), "std": np.array(std)})
    return Folder(sizes, images if decode else None, mean, std)


def unreadable_files(root: Path, paths: Sequence[str], progress: FilesDone | None = None) -> list[str]:
    """Decode every file and list a line 'path: reason' for each that cannot be decoded."""

    def problem(i: int) -> str | None:
        try:
            decode_file(root / paths[i])
        except InputError as e:
            return str(e)
        return None

    return [line for line in _each(problem, len(paths), progress) if line]


def listing(root: Path, paths: Sequence[str], *, times: bool = False) -> Iterator[bytes]:
    """A line a file, many at once: its path, its size in bytes and, if asked, its time of change in ns.

    A million files take seconds, nearly all of them for asking the system. InputError names a file that is gone.
    """
    folder = os.open(root, os.O_RDONLY)

    def lines(task: range) -> bytes:
        found = []
        for path in paths[task.start : task.stop]:
            try:
                about = os.stat(path, dir_fd=folder)
            except OSError as e:
                raise InputError(f"{in_one_line(root / path)}: cannot be read: {e.strerror}") from e
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"{in_one_line(root / path)}: not a plain file")
            changed = f" {about.st_mtime_ns}" if times else ""
            found.append(f"{path}\0{about.st_size}{changed}\n")
        return os.fsencode("".join(found))

    try:
        yield from _in_chunks(lines, len(paths))
    finally:
        os.close(folder)


def file_digests(root: Path, paths: Sequence[str]) -> Iterator[bytes]:
    """The sha256 of each file's content. InputError names a file that cannot be read."""

    def digest(i: int) -> bytes:
        try:
            with (root / paths[i]).open("rb") as f:
                return hashlib.file_digest(f, "sha256").digest()
        except OSError as e:
            raise InputError(f"{in_one_line(root / paths[i])}: cannot be read: {e.strerror}") from e

    return _each(digest, len(paths))


def mean_std(images: np.ndarray) -> tuple[Triple, Triple]:
    """The mean and the standard deviation of each channel of uint8 [N, H, W, 3], scaled to 0..1.

    The sums are exact, so that the results are the same on every machine.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    pixels = images.reshape(-1, 3)
    for i in range(0, len(pixels), _STATISTICS_CHUNK):
        for channel, values in zip(counts, pixels[i : i + _STATISTICS_CHUNK].T, strict=True):
            channel += np.bincount(values, minlength=256)
    levels = np.arange(256)
    n, total, squares = len(pixels), (counts @ levels).tolist(), (counts @ levels**2).tolist()
    mean = [t / (255 * n) for t in total]
    variance = [(n * s - t * t) / (255 * n) ** 2 for t, s in zip(total, squares, strict=True)]
    std = [max(math.sqrt(v), 1 / 255) for v in variance]  # images of one colour must not divide by zero
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _each(work: Callable[[int], T], n: int, progress: FilesDone | None = None) -> Iterator[T]:
    """Yield work(0), ..., work(n - 1)."""
    done = 0
    for part in _in_chunks(lambda task: [work(i) for i in task], n):
        done += len(part)
        if progress:
            progress(done, n)
        yield from part


def _in_chunks(work: Callable[[range], T], n: int) -> Iterator[T]:
    """Yield work(range) for 0..n-1 in pieces, in order. Threads do the work, unless the first is too quick for them."""
    tasks = [range(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]
    start = time.perf_counter()
    first = [work(task) for task in tasks[:1]]
    slow = time.perf_counter() - start > _WORTH_A_THREAD * min(_CHUNK, n)
    threads = ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) if slow else contextlib.nullcontext()
    with threads as pool:
        yield from chain(first, (pool.map if pool else map)(work, tasks[1:]))


def _listing_key(root: Path, paths: Sequence[str]) -> str:
    digest = hashlib.sha256(b"kdcache listing 1\n")
    for lines in listing(root, paths, times=True):
        digest.update(lines)
    return digest.hexdigest()


def _recall(home: Path, key: str, n: int) -> Folder | None:
    """What load_folder has remembered; None where there is nothing or it does not fit: the headers are read again."""
    stored = recall(home, key) or {}
    if not stored.keys() >= {"sizes", "mean", "std"}:
        return None
    sizes, mean, std = stored["sizes"], stored["mean"].tolist(), stored["std"].tolist()
    if sizes.shape != (n, 2) or sizes.dtype != np.int32 or len(mean) != 3 or len(std) != 3:
        return None
    return Folder(sizes, None, tuple(mean), tuple(std))


def _header_sizes(root: Path, paths: Sequence[str]) -> np.ndarray:
    def size(i: int) -> tuple[int, int] | str:
        try:
            return image_size(root / paths[i])
        except InputError as e:
            return str(e)

    sizes, problems = np.empty((len(paths), 2), np.int32), _Problems()
    for i, found in enumerate(_each(size, len(paths))):
        if isinstance(found, str):
            problems.note(found)
        else:
            sizes[i] = found
    problems.refuse(root, paths)
    return sizes


def are_small(sizes: np.ndarray) -> bool:
    """Whether images of these sizes [N, 2] have one size, and are small enough to be held in memory."""
    h, w = sizes[0].tolist()
    fits = max(h, w) <= _SMALL_SIDE and len(sizes) * h * w * 3 <= _SMALL_TOTAL
    return fits and bool((sizes == sizes[0]).all())


def _decode_all(root: Path, paths: Sequence[str], sizes: np.ndarray) -> torch.Tensor:
    """Decode all images, which are of one size, to uint8 [N, H, W, 3]."""
    h, w = sizes[0].tolist()
    pixels = np.empty((len(paths), h, w, 3), dtype=np.uint8)

    def decode(i: int) -> str | None:
        try:
            pixels[i] = decode_file(root / paths[i], sizes[i]).numpy().transpose(1, 2, 0)
        except InputError as e:
            return str(e)
        return None

    problems = _Problems()
    for problem in filter(None, _each(decode, len(paths))):
        problems.note(problem)
    problems.refuse(root, paths)
    return torch.from_numpy(pixels)


@dataclass
class _Problems:
    """Images that cannot be read: the line that tells of the first one, and how many there are."""

    first: str = ""
    count: int = 0

    def note(self, line: str) -> None:
        self.first = self.first or line
        self.count += 1

    def refuse(self, root: Path, paths: Sequence[str]) -> None:
        """InputError if there is one."""
        if self.count:
            raise InputError(
                f"{self.first}; {self.count} of {len(paths)} images in {root} cannot be read: "
                "kdcache build --list-unreadable with the same --data lists every one"
            )
