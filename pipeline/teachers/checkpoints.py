"""Checkpoints as people save them: read without running code, and searched for the tensors of one network.

A file may hold a state dict alone, or one in a dictionary beside an optimiser's state, settings and figures, or several
of them, such as a network and the average of its weights; and wrappers put `module.` or `_orig_mod.` before the names.
All of that is written here as one dictionary, whose keys are the names on the way to a tensor, joined by dots:
`state_dict.module.conv1.weight`. What stands before a network's own names is the tensors' place.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdcache.cache.errors import CorruptError, InputError, first_sentence
from kdcache.cache.files import is_folder, is_there, sha256
from kdcache.cache.sealed import inflates

State = dict[str, Tensor]

# Dictionaries that hold a network's tensors, in the order in which they are looked for where names do not tell.
_CONTAINERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state", "model",
    "net", "network", "module",
)  # fmt: skip
# What wrappers and training code put before all names.
_WRAPPERS = ("module", "_orig_mod", "model", "net", "network", "student", "teacher", "backbone", "encoder")
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged)([._]|$)")
# A file may hold dictionaries that contain themselves, many times over.
_DEEPEST = 8
_IS_HASH = re.compile(r"[0-9a-f]{64}")
_MOST = 1_000_000

# Reads what torch.load refuses to read as tensors alone; {} are the two files.
_CONVERT = (
    "import torch; "
    "f = lambda v: f(v.state_dict()) if hasattr(v, 'state_dict') else "
    "{{k: f(w) for k, w in v.items() if isinstance(w, (dict, torch.Tensor)) or hasattr(w, 'state_dict')}} "
    "if isinstance(v, dict) else v; "
    "torch.save(f(torch.load({!r}, map_location='cpu', weights_only=False)), {!r})"
)
_CONVERT_SCRIPT = "import torch; torch.save(torch.jit.load({!r}, map_location='cpu').state_dict(), {!r})"


class _LeftOut:
    """Stands in a loaded file for a value that is no tensor and whose class is never imported."""

    def __new__(cls, *_args: object, **_options: object) -> _LeftOut:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _Mapping:
    """Stands for the class of a dictionary whose class is never imported. The content is kept, as a plain one."""

    def __new__(cls, *_args: object, **_options: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}  # torch.load fills no others


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_LEFT_OUT = (
    "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta", "uuid.UUID",
    "numpy.dtype", "numpy.ndarray", *(f"{m}.{f}" for m in _NUMPY for f in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Int32", "Int64", "Float16", "Float32", "Float64", "Str")),
    *(f"pathlib.{pure}{kind}Path" for pure in ("", "Pure") for kind in ("Posix", "Windows")),
    *(f"pathlib._local.{pure}{kind}Path" for pure in ("", "Pure") for kind in ("Posix", "Windows")),
    "pathlib.Path", "pathlib.PurePath",
    *(f"builtins.{kind}" for kind in ("list", "dict", "int", "float", "str", "bool")),
)  # fmt: skip
_MAPPINGS = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
)  # fmt: skip
# Harmless classes that checkpoints hold beside tensors. torch.load calls what is named here in place of them, so that
# nothing of them is imported or run.
_HARMLESS: list[Any] = [
    *((_LeftOut, name) for name in _LEFT_OUT),
    *((_Mapping, name) for name in _MAPPINGS),
]


@dataclass(frozen=True)
class Part:
    """A network's tensors in a checkpoint, by the network's own names.

    place: what stands before their names in the file, '' where nothing does. others: further places of such tensors.
    """

    state: State
    place: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What to say after the file's name; '' where the file holds the network's tensors alone."""
        said = f"#{self.place}" if self.place else ""
        if self.others:
            said += f" (the average; others in it are {', '.join(f'#{other}' for other in self.others)})"
        return said


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors in a file by the names on the way to them.

    boxes: the places at which dictionaries begin. notes: kdcache's own, as text. part: where the user says that the
    network's tensors are. checked: whether the file had checksums of all that is here, as kdcache writes them.
    """

    path: Path
    tensors: State
    boxes: frozenset[str] = frozenset()
    notes: str | None = None
    part: str | None = None
    checked: bool = False

    def find(
        self,
        names: Collection[str],
        renamed: Callable[[State], State] = dict,
        optional: Collection[str] = (),
    ) -> Part | None:
        """The tensors of the network that has these names; None where no place has them all and no more.

        renamed: translates the names of other releases and projects to the network's. optional: names that may be
        missing, as may the counts of batches that norms have seen.

        Of several places the one with averaged weights is taken, as timm does. InputError where that does not decide.
        """
        own = set(names)
        needed = {name for name in own if not name.endswith("num_batches_tracked")} - set(optional)
        counts = Counter(place for key in self.tensors for place in _places(key))
        found: dict[str, State] = {}
        for place, count in counts.items():
            if count >= len(needed) and self._is_asked_for(place):
                state = renamed(self._under(place))
                if needed <= state.keys() <= own:
                    found[place.removesuffix(".")] = state
        return self._chosen(found) if found else None

    def _chosen(self, found: dict[str, State]) -> Part:
        places = list(found)
        first = found[places[0]]
        if all(_equal(first, found[place]) for place in places[1:]):
            return Part(first, places[0])
        averaged = [place for place in places if _AVERAGED.search(place)]
        if len(averaged) == 1:
            place = averaged[0]
            return Part(found[place], place, tuple(other for other in places if other != place))
        ways = ", ".join(f"{self.path}#{place}" for place in places)
        raise InputError(f"{self.path} holds several networks of this kind: say which, as one of {ways}")

    def unwrapped(self) -> Part:
        """The tensors without the dictionaries and wrappers that are known, for names that `find` does not know.

        InputError where there are none.
        """
        place = ""
        while inner := next((f"{place}{name}." for name in _CONTAINERS if f"{place}{name}." in self.boxes), None):
            place = inner
        state = self._under(place)
        while state and (wrapper := next(iter(state)).partition(".")[0]) in _WRAPPERS:
            if not all(name.startswith(f"{wrapper}.") for name in state if name != "n_averaged"):
                break
            place += f"{wrapper}."
            state = self._under(place)
        if self.part is not None:
            place = f"{self.part}."
            state = self._under(place)
            if not state:
                tops = ", ".join(dict.fromkeys(key.partition(".")[0] for key in self.tensors))
                raise InputError(f"{self.path} holds nothing at #{self.part}: it has {tops[:200]}")
        if not state:
            raise InputError(f"{self.path} holds no tensors")
        return Part(state, place.removesuffix("."))

    def _is_asked_for(self, place: str) -> bool:
        return self.part is None or place.startswith(f"{self.part}.")

    def _under(self, place: str) -> State:
        return {key[len(place) :]: tensor for key, tensor in self.tensors.items() if key.startswith(place)}


def open_checkpoint(file: str | Path) -> Checkpoint:
    """Read the tensors in a file, without running code from it. FILE#PLACE says where the network's are.

    InputError for a file that is none, is damaged, or can only be read by running code from it.
    """
    path, part = split_place(file)
    if not is_there(path) or not path.is_file():
        raise InputError(f"{path} is a folder, not a weights file" if is_folder(path) else f"no weights file at {path}")
    if path.suffix == ".safetensors":
        tensors, about = _read_safetensors(path)
        checked = _require_sound(path, tensors, about)
        return Checkpoint(path, tensors, notes=about.get("kdcache"), part=part, checked=checked)
    tensors, boxes = {}, set[str]()
    _flatten(_loaded(path), path, "", 0, tensors, boxes)
    return Checkpoint(path, tensors, frozenset(boxes), part=part)


def split_place(file: str | Path) -> tuple[Path, str | None]:
    """A file, and the place in it that is named after a `#`; None where none is."""
    name, mark, place = str(file).rpartition("#")
    if not mark or is_there(Path(file)):
        return Path(file), None
    return Path(name), place.strip(".")


def _places(key: str) -> list[str]:
    """Everything that ends where a name in the key begins: '', 'model.', 'model.module.', ..."""
    return [key[:i] for i in [0, *(m.end() for m in re.finditer(r"\.", key))]]


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _flatten(value: object, path: Path, place: str, depth: int, tensors: State, boxes: set[str]) -> None:
    if isinstance(value, Tensor):
        tensors[place.removesuffix(".")] = value
    elif isinstance(value, dict) and depth <= _DEEPEST:
        boxes.add(place)
        if len(tensors) + len(boxes) > _MOST:
            raise InputError(f"{path} holds more than {_MOST:,} tensors and dictionaries, which no checkpoint has")
        for name, inner in value.items():
            _flatten(inner, path, f"{place}{name}.", depth + 1, tensors, boxes)


def _loaded(path: Path) -> object:
    """What torch.load gives for tensors and harmless values alone. InputError for a file that needs more."""
    try:
        if inflates(path):
            raise InputError(
                f"{path} is compressed, as no file of torch.save is: unpack it, and save the tensors again"
            )
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # pickle's protocol and the like, before the error that counts
            return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, OSError):
        raise
    except Exception as e:  # bytes that are no pickle raise whatever comes first: KeyError, EOFError, ...
        if "TorchScript" in str(e):
            line = _command(_CONVERT_SCRIPT, path)
            raise InputError(f"{path} is a TorchScript program, which could be any code: convert it with {line}") from e
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise InputError(
                f"{path} holds {code[1]} besides tensors, which could be any code: nothing of it was run. If you trust "
                f"whoever made the file, convert it with {_command(_CONVERT, path)}"
            ) from e
        raise InputError(
            f"{path} is damaged, or neither a state dict of tensors nor .safetensors ({first_sentence(e)})"
        ) from e


def _command(code: str, path: Path) -> str:
    code = code.format(str(path), str(path.with_name(f"{path.stem}-tensors.pth")))
    # The code has single quotes, which shlex would make hard to read.
    return f"python -c {shlex.quote(code)}" if set(code) & set('"$`\\!') else f'python -c "{code}"'


def weights_hash(state: State) -> str:
    """The sha256, in hexadecimal, of the tensors' names, types, shapes and bytes, in the order of their names."""
    h = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        h.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def checksums(state: State, notes: str) -> dict[str, str]:
    """What a file of kdcache's says of its own tensors and notes, so that damage to either is found."""
    return {"notes_sha256": sha256(notes.encode()), "weights_sha256": weights_hash(state)}


def _require_sound(path: Path, state: State, about: Mapping[str, str]) -> bool:
    """Whether a file has checksums of tensors and notes. CorruptError where they are not those of what it holds."""
    had = {name: about[name] for name in ("notes_sha256", "weights_sha256") if name in about}
    if "notes_sha256" in had and _IS_HASH.fullmatch(path.stem):
        # A teacher that an earlier version filed has the hash of its tensors in its name alone.
        had.setdefault("weights_sha256", path.stem)
    if had:
        found = checksums(state, about.get("kdcache", ""))
        if odd := [name.removesuffix("_sha256") for name in had if had[name] != found[name]]:
            raise CorruptError(
                f"{path} is damaged, its {' and '.join(odd)} are not those that were written: copy it again, or remove "
                "it and run the command that wrote it"
            )
    return len(had) == 2


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"{path} is damaged, or no safetensors file: {e}") from e
