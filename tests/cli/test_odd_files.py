"""Pipes and devices in the place of files, streams that a shell has closed, and a disk that fills up under a run."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.tests.helpers.commands import Place
from kdcache.tests.helpers.oddthings import put_in_place
from kdcache.train.loop.logs.logs import Logs


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_no_pipe_or_device_is_read(place: Place, data: str, refused: Callable[..., str], kind: str) -> None:
    for name in ("t.csv", "t.jsonl", "t.parquet", "m.json", "w.pth", "w.safetensors", "c.h5", "c.beton", "out.html"):
        put_in_place(Path(name), kind)
    for table in ("t.csv", "t.jsonl", "t.parquet"):
        refused(f"build --teacher resnet8 --data files:{table}", table, "plain file")
    refused(f"build --teacher resnet8 {data} --weights {place.weights} --class-map m.json", "m.json", "plain file")
    for weights in ("w.pth", "w.safetensors"):
        refused(f"build --teacher resnet8 {data} --weights {weights}", weights)
    for cache in ("c.h5", "c.beton"):
        refused(f"train {data} --cache {cache} --student resnet8", cache)
    refused(f"report {place.cache} --out out.html", "out.html", "not a plain file")
    put_in_place(Path("kdcache.toml"), kind)
    refused("ls", "kdcache.toml is not a plain file")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(place: Place, closed: str) -> None:
    shutil.copytree(place.top2, "copy")
    line = f"{sys.executable} -m kdcache.cli rm copy {closed}"
    done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and Path("copy/identity.json").exists()
    assert "Traceback" not in done.stderr and ("2>&-" in closed or "there is no terminal to ask on" in done.stderr)


def test_a_disk_that_fills_up_is_an_error_of_the_thread_that_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = Logs(tmp_path, [], pytest.fail)
    logs.line({"epoch": 1, "loss": 1.0})
    full = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    events = logs._open["TensorBoard"]._events  # type: ignore[attr-defined]
    before, events._file._stream = events._file._stream, full
    with pytest.raises(OSError, match="No space left") as caught:
        logs.line({"epoch": 2, "loss": 1.0})
    assert "tensorboard/events" in str(caught.value.filename)
    events._file._stream = before
    full.close()
    logs.close()
