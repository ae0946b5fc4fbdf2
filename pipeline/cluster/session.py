"""A Ray cluster that this process belongs to for a while: joined where one runs, else started on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from kdcache.cache.errors import InputError, first_sentence, kind_and_message
from kdcache.pipeline.process.rank import this_rank

HERE = "here"  # stands for no address: the cluster that runs on this machine, or else one that is started
_ANSWER_SECONDS = 10.0
_STORE_BYTES = 512 * 2**20  # of Ray's objects, on a cluster that is started here, beside the teacher
_ADDRESS = re.compile(r"auto|local|[\w.-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")


def require_address(address: str) -> None:
    """InputError for an address that cannot be joined, or where Ray is not installed."""
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address}: Ray's client does not stream what workers answer: run this on a node of the cluster "
            "with --ray auto, for example by: ray job submit -- kdcache build --ray auto ..."
        )
    if address != HERE and not _ADDRESS.fullmatch(address):
        raise InputError(f"--ray {address} is no address: give auto, HOST:PORT (as 10.0.0.1:6379), or --ray alone")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs the package ray: pip install ray")
    if this_rank().world > 1:
        raise InputError("--ray starts processes by itself: run it without torchrun")


@contextmanager
def joined(address: str, teacher_bytes: int) -> Iterator[None]:
    """Belong to the cluster at that address. Where the process belongs to one already, it is that one, and stays.

    teacher_bytes: about how much a worker is given. InputError where the cluster cannot be joined or started.

    Ray prints what happens in its cluster to standard output, where only a command's result belongs. So that leads
    nowhere meanwhile; Ray's own logs have it all.
    """
    require_address(address)
    import ray

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        if ray.is_initialized():
            yield
            return
        _init(address, teacher_bytes)
        try:
            yield
        finally:
            ray.shutdown()


def _init(address: str, teacher_bytes: int) -> None:
    import ray

    usual = {"log_to_driver": False, "logging_level": "CRITICAL"}
    # A process without a GPU of its own keeps what CUDA_VISIBLE_DEVICES says; Ray warns that this will be so later.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _require_answer(os.environ.get("RAY_ADDRESS", "") if address in (HERE, "auto") else address)
    try:
        if address != HERE:
            ray.init(address, **usual)
            return
        try:
            ray.init("auto", **usual)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS"):  # it names a cluster, so that none is to be started
                raise
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init("local", include_dashboard=False, object_store_memory=_STORE_BYTES + 2 * teacher_bytes, **usual)
    except (ConnectionError, RuntimeError, ValueError, OSError) as e:  # as Ray words it, in a line or a page
        raise InputError(
            f"the Ray cluster {'' if address == HERE else address + ' '}cannot be joined from here: {first_sentence(e)}"
            "; this machine has to be one of its nodes (ray start --address HOST:PORT)"
        ) from e


def _require_answer(address: str) -> None:
    """InputError unless something answers at HOST:PORT: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise InputError(
            f"no Ray cluster answers at {address}: {kind_and_message(e)}; ray start --head starts one, and tells where"
        ) from e


def nodes() -> list[dict[str, float]]:
    """What each living node has, as Ray counts it."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
