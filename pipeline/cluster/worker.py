"""What runs on the cluster's nodes: a worker has the teacher, and answers as a build in one process would."""

from __future__ import annotations

import pickle
import re
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError, kind_and_message
from kdcache.cache.identity import SplitName
from kdcache.cache.records.encoding import tail_distribution
from kdcache.pipeline.build.answers import Copy, Renders, answers, require_sound, teacher_renderer, view_parameters
from kdcache.pipeline.build.build import compiled, probe
from kdcache.pipeline.build.builder import AHEAD, way_of
from kdcache.pipeline.build.plan import BuildPlan
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.cluster.apart import Apart
from kdcache.pipeline.cluster.place import Place, at_this_node
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process import provenance
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.teachers.teacher import Teacher

_SECONDS, _BYTES = 1.0, 8 * 2**20  # after which answers are sent: many small messages would keep the builder busy


@dataclass(frozen=True, eq=False)
class Job:
    """What a worker is given beside the place. teacher: pickled. labels: int64 [N, L] by split.

    plan: the build's, without its source, which each worker opens for itself. decoders: see `Layout`.
    """

    place: Any  # a reference to the Place, which is Ray's
    teacher: bytes
    labels: Mapping[SplitName, NDArray[np.int64]]
    plan: Mapping[str, Any]
    defaults: Any
    device: str
    threads: int
    decoders: int


class Opened(NamedTuple):
    """A worker that is ready: its node, how it computes logits (`way_of`), and what commits say of it."""

    node: str
    way: str
    writer: dict[str, str]


class Block(NamedTuple):
    """Records of some rows of a shard, by its place in the work: arrays by name, and their share of the prior."""

    place: int
    rows: range
    arrays: dict[str, NDArray[Any]]
    sums: NDArray[np.float64] | None

    def arrive(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], NDArray[np.float64] | None]:
        """As `Copy.arrive`. The worker has checked the logits."""
        return self.arrays, np.ones(len(self.rows), bool), self.sums


class Work(NamedTuple):
    """Shards of one part: which views, from which row on each, and whether each has a share of the prior."""

    split: SplitName
    rows: range
    views: list[int]
    starts: list[int]
    sums: list[bool]


class Worker:
    """An actor that answers for shards. It opens data and teacher when it is first asked to."""

    def __init__(self) -> None:
        self._job: Job
        self._plan: BuildPlan
        self._renderers: dict[str, Renders]

    def open(self, job: Job, place: Place) -> Opened:
        """Open the data and the teacher: first of all, and again where Ray has started the worker anew.

        A KdcacheError, as from every method, names the node.
        """
        with at_this_node():
            self._job, self._renderers = job, {}
            self._plan = _opened(job, place)
            teacher = self._plan.source.teacher
            return Opened(socket.gethostname(), _kind(teacher), _about(teacher))

    def probe(self, images: int) -> tuple[float, float, list[str]]:
        """What `probe` finds for a build of so many images, and what it says."""
        said: list[str] = []
        with at_this_node():
            plan = self._plan
            renderer = teacher_renderer(plan.source.train, plan.source, plan.workers)
            rate, record_bytes = probe(plan, images, renderer, said.append)
        return rate, record_bytes, said

    def answer(self, work: Work) -> Iterator[list[Block]]:
        """The records of shards, in the order and in the batches of a build in one process."""
        with at_this_node():
            plan = self._plan
            source, identity = plan.source, plan.identity
            data = source.train if work.split == "train" else source.evaluation
            drawn = [view_parameters(data, identity, view, work.rows) for view in work.views]
            labels = self._job.labels[work.split]
            renderer = self._renderer(data, work.split)
            under_way: deque[tuple[int, range, Copy]] = deque()
            gathered: list[Block] = []
            size, since = 0, time.monotonic()
            for answer in answers(source, renderer, labels, drawn, work.starts, work.rows, plan.batch):
                sums = tail_distribution(answer.logits, answer.records) if work.sums[answer.place] else None
                under_way.append((answer.place, answer.rows, Copy(answer, sums)))
                if len(under_way) <= AHEAD:
                    continue
                gathered.append(self._block(work, *under_way.popleft()))
                size += sum(array.nbytes for array in gathered[-1].arrays.values())
                if size > _BYTES or time.monotonic() - since > _SECONDS:
                    yield gathered
                    gathered, size, since = [], 0, time.monotonic()
            yield gathered + [self._block(work, *last) for last in under_way]

    def _block(self, work: Work, place: int, rows: range, copy: Copy) -> Block:
        """The records of some rows, once they are on the host. InputError where they cannot be stored."""
        arrays, finite, sums = copy.arrive()
        where = f"view {work.views[place]}, sample {{}} of {work.split}"
        require_sound(arrays, finite, where, rows, self._plan.identity.record.classes)
        return Block(place, rows, arrays, sums)

    def _renderer(self, data: Dataset, split: SplitName) -> Renders:
        """What renders the images of a split; that of the other one ends with its processes."""
        if split not in self._renderers:
            plan, job = self._plan, self._job
            files = not data.in_memory and job.decoders
            self._renderers = {
                split: Apart(job.place, split, plan.source.teacher.device, job.decoders)
                if files
                else teacher_renderer(data, plan.source, plan.workers)
            }
        return self._renderers[split]


def _opened(job: Job, place: Place) -> BuildPlan:
    """The build's plan with data and teacher of this node. InputError where they cannot be opened."""
    place.enter()
    torch.set_num_threads(job.threads)
    device = pick_device(job.device)
    try:
        teacher: Teacher = pickle.loads(job.teacher)
    except Exception as e:  # the user's own classes may be missing here, or need what is missing
        raise InputError(f"the teacher's network cannot be made here: {kind_and_message(e)}") from e
    model = teacher.model.to(device).to(memory_format=torch.channels_last)
    source = Source(
        place.open("train"), place.open("eval"), job.labels["train"], job.labels["eval"],
        replace(teacher, model=model, device=device), place.identity, job.defaults,
    )  # fmt: skip
    return compiled(BuildPlan(source=source, **job.plan), lambda line: None)


def _about(teacher: Teacher) -> dict[str, str]:
    return provenance.writer(str(teacher.device), teacher.compiled is not None)


def _kind(teacher: Teacher) -> str:
    """How logits are computed here, as `way_of` tells it, and by what: other GPUs give other last bits."""
    name = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else ""
    return "_".join([way_of(teacher), *re.findall(r"[A-Za-z0-9]+", name)])
