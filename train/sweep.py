"""Several losses and seeds from one cache: a run folder for each, and one table that compares them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcache.cache.errors import CorruptError, InputError, KdcacheError, machine_error
from kdcache.cache.files import replace_file
from kdcache.cache.sealed import read_sealed, sealed
from kdcache.train import group
from kdcache.train.config import TrainConfig
from kdcache.train.loop.runfolder import config_of
from kdcache.train.losses.options import read_spec
from kdcache.train.plan.choosing import choose_cache
from kdcache.train.plan.resuming import given_by, resumed
from kdcache.train.run import train

FILE = "sweep.json"
_OUT = "runs/sweep"
# What the table shows of each summary's last weights: heading, key, factor, digits.
_COLUMNS = (
    ("top-1 (%)", "top1", 100, 2), ("nll", "nll", 1, 4), ("ece", "ece", 1, 4), ("agreement (%)", "agreement", 100, 2),
    ("s an epoch", "seconds_an_epoch", 1, 1),
)  # fmt: skip
# The figure to compare losses by, where a part of the training images was held out.
_VALIDATION = ("validation (%)", "validation_top1", 100, 2)


def sweep(
    config: TrainConfig,
    losses: Sequence[str],
    seeds: Sequence[int],
    say: Callable[[str], None] = print,
    given: Collection[str] | None = None,
) -> dict[str, Any]:
    """Train every loss with every seed. Returns `runs` (each a summary or an error) and `losses`, as in sweep.json.

    config: the settings of all runs. `config.out` is the folder that holds the runs' folders. With `config.resume`,
    finished runs are kept and the others go on; all take the settings of the first run that is there, except for the
    fields in `given` (see train). If a run fails, its error is noted and the next run starts. A wrong loss or a missing
    cache is raised before the first run. Under torchrun all ranks train each student together.
    """
    with group.joined(config.device):
        return _sweep(config, losses, seeds, group.said_once(say), given)


def asked_before(out: str | None) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The losses and seeds of the sweep in a folder; None if there is no sweep."""
    file = Path(out or _OUT) / FILE
    if not file.exists():
        return None
    try:
        found = read_sealed(file, "remove it, and give --loss and --seed")
        asked = [(str(run["loss"]), int(run["seed"])) for run in found["runs"]]
        losses, seeds = found.get("asked", zip(*asked, strict=True))
        return tuple(dict.fromkeys(map(str, losses))), tuple(dict.fromkeys(map(int, seeds)))
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError) as e:
        raise CorruptError(f"{file} is not what kdcache writes ({e}): remove it, and give --loss and --seed") from e


def asked(
    config: TrainConfig, losses: Sequence[str], seeds: Sequence[int], given: Collection[str], loss_is_set: bool
) -> tuple[Sequence[str | None], Sequence[int]]:
    """The losses and seeds to train: those that were typed, if nothing is resumed.

    If something is resumed, what was not typed is taken from the sweep in `config.out`. If there is no sweep and
    nothing was typed, a single run is resumed, whose loss is None unless a setting names one (`loss_is_set`).
    """
    before = asked_before(config.out) if config.resume else None
    if before is not None:
        return (losses if "loss" in given else before[0]), (seeds if "seed" in given else before[1])
    if config.resume and not {"loss", "seed"} & set(given):
        return (losses[0] if loss_is_set else None,), seeds[:1]
    return losses, seeds


def _sweep(
    config: TrainConfig,
    losses: Sequence[str],
    seeds: Sequence[int],
    say: Callable[[str], None],
    given: Collection[str] | None,
) -> dict[str, Any]:
    for spec in losses:
        read_spec(spec)
    if len(set(losses)) < len(losses) or len(set(seeds)) < len(seeds):
        raise InputError("a loss or a seed is given twice")
    out = Path(config.out or _OUT)
    folders = {(spec, seed): out / f"{_name(spec)}-seed{seed}" for spec in losses for seed in seeds}
    started = group.from_first(lambda: [path for path in folders.values() if (path / "config.json").exists()])
    if started and not config.resume and not group.restarted():
        raise InputError(f"{started[0]} holds a run already: give --resume to go on with the sweep, or another --out")
    # A folder's name says its run's loss and seed.
    given = set(given_by(config) if given is None else given) - {"loss", "seed"}
    if started:
        had = group.from_first(lambda: config_of(started[0]))
        common = {name: value for name, value in had.items() if name not in ("loss", "loss_options", "seed")}
        config = resumed(config, common, given, started[0], say)
    # The cache is looked up once, so that all runs use the same one.
    with group.one_first():
        cache = choose_cache(config)
    runs: list[dict[str, Any]] = []
    _write(out, cache.key, losses, seeds, runs)
    for (spec, seed), path in folders.items():
        one = replace(config, loss=spec, seed=seed, out=str(path), resume=path in started, cache=cache.where)
        run: dict[str, Any] = {"loss": spec, "seed": seed, "run": str(path)}
        try:
            run["summary"] = train(one, say, keep_finished=True, given=given)
        except KdcacheError as e:
            group.require_alike(e, str(path))
            run["error"] = str(e)
        except (MemoryError, RuntimeError) as e:
            if group.world() > 1 or (reason := machine_error(e)) is None:
                raise
            run["error"] = reason
        if "error" in run:
            say(f"{spec}, seed {seed} failed: {run['error']}")
        runs.append(run)
        result = _write(out, cache.key, losses, seeds, runs)
    return result


def _write(
    out: Path, key: str, losses: Sequence[str], seeds: Sequence[int], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write sweep.json as far as the sweep has come, and return its content."""
    compared = [_compared(runs, spec) for spec in losses]
    result = {"cache": key, "asked": [list(losses), list(seeds)], "runs": runs, "losses": compared}
    if group.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / FILE, sealed(result))
    return result


def _name(spec: str) -> str:
    return spec.replace(":", "-").replace(",", "-")


def _compared(runs: list[dict[str, Any]], spec: str) -> dict[str, Any]:
    """The mean of each figure over the loss's seeds and, for two seeds or more, its spread (standard deviation)."""
    mine = [run for run in runs if run["loss"] == spec]
    good = [run["summary"] for run in mine if "error" not in run]
    figures = {}
    for key in good[0] if good else ():
        values = [summary.get(key) for summary in good]
        if all(isinstance(v, float) for v in values):
            spread = statistics.stdev(values) if len(values) > 1 else None
            figures[key] = {"mean": statistics.fmean(values), "spread": spread}
    return {"loss": spec, "seeds": len(good), "failed": len(mine) - len(good), "figures": figures}


def table(result: dict[str, Any]) -> str:
    """A line for each loss with mean ± standard deviation over its seeds, and one for each run that failed."""
    held_out = any(_VALIDATION[1] in loss["figures"] for loss in result["losses"])
    columns = (_VALIDATION, *_COLUMNS) if held_out else _COLUMNS
    rows = [["loss", "seeds", *(heading for heading, *_ in columns)]]
    for loss in result["losses"]:
        rows.append([loss["loss"], str(loss["seeds"])])
        for _, key, factor, digits in columns:
            figure = loss["figures"].get(key)
            text = "-"
            if figure is not None:
                text = f"{factor * figure['mean']:.{digits}f}"
                if figure["spread"] is not None:
                    text += f" ± {factor * figure['spread']:.{digits}f}"
            rows[-1].append(text)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"FAILED {run['loss']}, seed {run['seed']}: {run['error']}" for run in result["runs"] if "error" in run]
    return "\n".join(lines)
