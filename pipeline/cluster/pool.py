"""The workers of a build: as many as there is work for, wherever Ray has room for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.cache.errors import InputError, KdcacheError, kind_and_message
from kdcache.pipeline.cluster.layout import Layout
from kdcache.pipeline.cluster.worker import Opened, Worker

_MOST = 256  # workers that are asked for at once
_DEATHS = 5  # one after the other, without an answer in between


@dataclass(eq=False)
class Hand:
    """A worker as its pool knows it. opened: None as long as it is not ready."""

    actor: Any
    opened: Opened | None = None


class Pool:
    """Workers that open by themselves, and are opened again where one has died: Ray restarts it where there is room.

    Those that have no room yet wait in Ray's queue, by which a cluster that grows by itself knows what to start.
    """

    def __init__(self, layout: Layout, job: Any, place: Any) -> None:
        import ray

        self.layout = layout
        self._given = job, place
        self._actor = ray.remote(Worker).options(
            num_cpus=layout.cpus, num_gpus=layout.gpus, max_restarts=-1, max_task_retries=0
        )
        self._opening: dict[Any, Hand] = {}
        self.idle: list[Hand] = []
        self._busy: set[Hand] = set()
        self._deaths = 0
        self._way: Opened | None = None

    @property
    def waits(self) -> list[Any]:
        """References to what will be there when a worker is ready: for `ray.wait`, then for `ready`."""
        return list(self._opening)

    @property
    def size(self) -> int:
        """Workers that are ready."""
        return len(self.idle) + len(self._busy)

    def want(self, count: int) -> None:
        """Ask for more workers, or let those go that have nothing to do, until there are so many."""
        import ray

        surplus = len(self._opening) + self.size - min(count, _MOST)
        for _ in range(-surplus):
            self._open(Hand(self._actor.remote()))
        for reference in list(self._opening)[::-1][: max(0, surplus)]:
            ray.kill(self._opening.pop(reference).actor)
            surplus -= 1
        for _ in range(min(surplus, len(self.idle))):
            ray.kill(self.idle.pop().actor)

    def ready(self, reference: Any) -> None:
        """Take a worker in that has opened, or has failed to. KdcacheError, which names the node, where it cannot."""
        hand = self._opening.pop(reference)
        try:
            hand.opened = outcome(reference)
        except LostError:
            self.lost(hand)
            return
        assert hand.opened is not None
        self._way = self._way or hand.opened
        if hand.opened.way.split("_")[0] != self._way.way.split("_")[0]:
            raise InputError(
                f"the teacher answers in another way on node {hand.opened.node} ({hand.opened.way}) than on "
                f"{self._way.node} ({self._way.way}): give --no-compile or --compile"
            )
        self.idle.append(hand)

    def take(self) -> Hand | None:
        """A worker that is free, which is busy from now on; None where there is none."""
        if not self.idle:
            return None
        hand = self.idle.pop(0)
        self._busy.add(hand)
        return hand

    def free(self, hand: Hand) -> None:
        """The worker has done its work."""
        self._busy.discard(hand)
        self.idle.append(hand)

    def answered(self) -> None:
        """A worker has answered, so that those that have died before did so one by one."""
        self._deaths = 0

    def lost(self, hand: Hand) -> None:
        """A worker has died, or its node. InputError where several have died and none has answered meanwhile."""
        self._busy.discard(hand)
        self._deaths += 1
        if self._deaths >= _DEATHS:
            where = f", the last on node {hand.opened.node}" if hand.opened else ""
            raise InputError(
                f"{self._deaths} workers died one after the other{where}: often memory is short, so lower "
                "--batch-size, or give each more with --workers; Ray's logs say more (ray logs cluster)"
            )
        self._open(hand)

    def _open(self, hand: Hand) -> None:
        # Ray retries it until there is room for the worker, on whatever node.
        self._opening[hand.actor.open.options(max_task_retries=-1).remote(*self._given)] = hand

    def close(self) -> None:
        """Let all workers go."""
        self.want(0)
        for hand in self._busy:
            import ray

            ray.kill(hand.actor)


class LostError(Exception):
    """The worker that was to answer has died, or cannot be reached."""


def outcome(reference: Any) -> Any:
    """What a worker gave back. KdcacheError as it was raised there; LostError where the worker is gone."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, KdcacheError):
            raise e.cause from None
        raise InputError(f"a worker failed: {kind_and_message(e.cause)}") from None
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.WorkerCrashedError) as e:
        raise LostError from e
    except ray.exceptions.RayError as e:
        raise InputError(f"the Ray cluster cannot go on: {kind_and_message(e)[:300]}") from e
