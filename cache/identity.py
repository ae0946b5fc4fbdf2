"""What a cache is: the immutable description whose hash is its key."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Final, Literal, TypeVar, get_args

import pydantic
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdcache.cache.errors import CorruptError, MismatchError
from kdcache.cache.records.choices import Interpolation, SequenceName

# Format 2 is format 1 and views that are mixed or spread, and ensembles. All else is written as format 1, for ever.
FORMAT: Final = 1
MIXED_FORMAT: Final = 2
# Far above any real one; a larger file is refused before it is parsed.
MAX_JSON_BYTES = 1 << 20
# How uint8 records are coded (records/records.py).
STEP = 1 / 8  # the step of gaps and tails, in nats
NO_TAIL = 254  # the code of an empty tail; 255 is left to mark a hole

Sha256 = str
SplitName = Literal["train", "eval"]


class Strict(BaseModel):
    """A model that refuses unknown keys, other types, NaN and later changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def differences(self, other: Strict, mine: str = "the cache has", theirs: str = "asked for") -> list[str]:
        """List the fields in which the two differ, one line each."""
        a, b = _flat(self), _flat(other)
        names = dict.fromkeys([*a, *b])
        return [f"{n}: {mine} {a.get(n)}, {theirs} {b.get(n)}" for n in names if a.get(n) != b.get(n)]


class TeacherIdentity(Strict):
    """The network that answers: architecture, its tensors' hash, and how it wants its pixels.

    interpolation: how images are resized. Bilinear is left out of the JSON, as it was when there was no other.
    """

    architecture: str
    weights: Sha256
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: int = Field(ge=1, le=2**14)
    numeric: Literal["float32", "bf16"]
    interpolation: Interpolation = "bilinear"

    @model_serializer(mode="wrap")
    def _without_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        if self.interpolation == "bilinear":
            del out["interpolation"]
        return out

    @property
    def network(self) -> str:
        """The name that builds it: the architecture without its note on the stem."""
        return self.architecture.split(" ")[0]


class DataIdentity(Strict):
    """One split of a dataset: samples by stable index.

    full_contents: whether every file was hashed. files: whether the images are files, whose sizes the cache then holds.
    """

    name: str
    split: SplitName
    samples: int = Field(ge=1, le=2**40)
    fingerprint: Sha256
    full_contents: bool
    files: bool


class ViewsIdentity(Strict):
    """How views are drawn and rendered. How many there are is not part of it: views can be added.

    policy: the policy that views are drawn by. Imported caches have `stored`, where boxes and flips lie in the shards,
    or `foreign`, where the seeds of another project's transforms lie there. sequence: whether the numbers of a sample's
    views are independent, or spread evenly. mixed: whether training views are of two samples each (records/pairs.py).
    The usual values of both are left out of the JSON, which is then that of format 1.
    """

    policy: str
    seed: int = Field(ge=0, lt=2**63)
    renderer: str
    sequence: SequenceName = "random"
    mixed: bool = False

    @property
    def imported(self) -> bool:
        """Whether another project made them, and its teacher is not at hand."""
        return self.policy in ("stored", "foreign")

    @property
    def format(self) -> Literal[1, 2]:
        """The oldest format that has such views."""
        return MIXED_FORMAT if self.mixed or self.sequence != "random" else FORMAT

    @model_serializer(mode="wrap")
    def _without_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        if self.sequence == "random":
            del out["sequence"]
        if not self.mixed:
            del out["mixed"]
        return out

    @model_validator(mode="after")
    def _is_drawn(self) -> ViewsIdentity:
        if self.imported and self.format != FORMAT:
            raise ValueError("imported views are neither mixed nor spread")
        return self


class RecordIdentity(Strict):
    """What is stored for one (view, sample).

    labels: how many each training record has; where views are mixed, the second one is the partner's. lacks: what is
    not known of an imported cache: the labels' gaps, or the records of the evaluation split. An empty one is left out
    of the JSON, so that the keys of other caches stay as they were before there were imports.
    """

    classes: int = Field(ge=2, lt=2**32)
    k: int | None = Field(ge=1)
    temperatures: tuple[float, ...]
    precision: Literal["uint8", "float16", "float32"]
    tail_std: bool
    labels: int = Field(ge=0, le=2)
    lacks: tuple[Literal["evaluation", "target_gap"], ...] = ()

    @property
    def dense(self) -> bool:
        return self.k is None

    @property
    def tails(self) -> int:
        """The number of temperatures for which the tail, and so the class prior, is stored."""
        return len(self.temperatures) + self.tail_std

    @property
    def target_gaps(self) -> int:
        """The number of labels whose gaps are stored."""
        return 0 if "target_gap" in self.lacks else self.labels

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        if not self.lacks:
            del out["lacks"]
        return out

    @model_validator(mode="after")
    def _is_one(self) -> RecordIdentity:
        if self.k is None:
            if self.precision == "uint8" or self.tails:
                raise ValueError("dense records have float gaps and no tail")
        elif self.k >= self.classes or not self.temperatures or not all(0 < t < 1000 for t in self.temperatures):
            raise ValueError("top-k records have fewer classes than the teacher, and temperatures from 0 to 1000")
        if list(self.lacks) != sorted(set(self.lacks)) or (self.dense and "target_gap" in self.lacks):
            raise ValueError("what is lacking is named once, in order, and dense records lack no gap")
        return self


class MemberIdentity(Strict):
    """One of the caches that an ensemble's cache is made of: its key, and the weight of its answers in the mean."""

    key: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    weight: float = Field(gt=0, lt=1)


def id_dtype(classes: int) -> str:
    """The name of the smallest unsigned type that holds every class id and one more value, which marks a hole."""
    return "uint8" if classes < 2**8 else "uint16" if classes < 2**16 else "uint32"


class Identity(Strict):
    """The content address of a cache is the sha256 of this, as canonical JSON.

    class_map: sha256 of the teacher's class for each of the dataset's, or None where they are the same. members: the
    caches whose mean answers this one holds, in the order of their keys. It is left out of the JSON where there are
    none, as it was before there were ensembles.
    """

    format: Literal[1, 2] = FORMAT
    teacher: TeacherIdentity
    data: DataIdentity
    evaluation: DataIdentity
    views: ViewsIdentity
    record: RecordIdentity
    class_map: Sha256 | None
    part: int = Field(ge=1, le=2**24)
    members: tuple[MemberIdentity, ...] = ()

    @property
    def key(self) -> str:
        return hashlib.sha256(canonical(self)).hexdigest()

    def split(self, name: SplitName) -> DataIdentity:
        """The split of that name."""
        return self.data if name == "train" else self.evaluation

    @property
    def sample_labels(self) -> int:
        """The number of labels that a single sample has."""
        return self.record.labels // 2 if self.views.mixed else self.record.labels

    def record_of(self, name: SplitName) -> RecordIdentity:
        """What is stored in that split: the evaluation split is never mixed."""
        if name == "train" or not self.views.mixed:
            return self.record
        return self.record.model_copy(update={"labels": self.sample_labels})

    @property
    def without_teacher(self) -> str | None:
        """Why no live teacher can answer as its records do, to be put behind its name; None where one can."""
        if self.members:
            return "holds the mean of several teachers' answers, and there is no one teacher to ask"
        return "was imported, and its teacher is not at hand" if self.views.imported else None

    @model_serializer(mode="wrap")
    def _without_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        if not self.members:
            del out["members"]
        return out

    @model_validator(mode="after")
    def _is_of_its_format(self) -> Identity:
        if self.members and self.format != MIXED_FORMAT:
            raise ValueError(f"ensembles belong to format {MIXED_FORMAT}")
        if not self.members and self.format != self.views.format:
            raise ValueError(f"such views belong to format {self.views.format}")
        if self.views.mixed and self.record.labels == 1:
            raise ValueError("mixed records have two labels or none")
        return self

    @model_validator(mode="after")
    def _has_members_in_order(self) -> Identity:
        keys = [member.key for member in self.members]
        if len(keys) == 1 or keys != sorted(set(keys)):
            raise ValueError("the members of an ensemble are two or more, each named once, in the order of their keys")
        if keys and abs(math.fsum(member.weight for member in self.members) - 1) > 1e-9:
            raise ValueError("the weights of an ensemble's members add up to 1")
        return self

    def require(self, other: Identity, where: str) -> None:
        """MismatchError with every differing field unless `other` is the same identity."""
        if found := self.differences(other):
            raise MismatchError(f"{where} is another cache than the one asked for: " + "; ".join(found))


def canonical(model: BaseModel) -> bytes:
    """Encode as JSON with sorted keys, fixed separators and ASCII only: equal content gives equal bytes."""
    return json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], data: bytes, where: str, advice: str) -> M:
    """The strict model in `data`, or a CorruptError that names the file and the field and ends with the advice."""
    raw, problem = _json(data)
    if problem:
        raise CorruptError(f"{where} {problem}; {advice}")
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, bool):  # which equals 1
        raise CorruptError(f"{where} is not what kdcache writes: format: {found} is no number; {advice}")
    known = get_args(model.model_fields["format"].annotation) if "format" in model.model_fields else (FORMAT,)
    if type(found) is int and found > max(known):
        raise MismatchError(f"{where} has format {found}; this kdcache reads up to format {max(known)}: update kdcache")
    if type(found) is int and found == 0:
        raise MismatchError(f"{where} has format 0, from before the first release: build the cache again elsewhere")
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as e:
        problem = first_problem(e)
    # Not in the except clause: pydantic's error holds the data, which a server may have sent.
    raise CorruptError(f"{where} is not what kdcache writes: {problem}; {advice}")


def first_problem(error: pydantic.ValidationError) -> str:
    """The first field that is wrong, and why, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def _json(data: bytes) -> tuple[Any, str]:
    """The value that JSON text stands for; or else what is wrong with the text."""
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates), ""
    except (ValueError, RecursionError) as e:
        return None, f"is not valid JSON ({e})"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """All fields by their names, also those that the JSON leaves out; tuples are lists, as there."""
    if not isinstance(value, BaseModel):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    out: dict[str, Any] = {}
    for name in type(value).model_fields:
        out.update(_flat(getattr(value, name), f"{prefix}.{name}" if prefix else name))
    return out
