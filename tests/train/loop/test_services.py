"""The loggers that --log names: wandb offline and MLflow in a folder, really run, and what the command line says."""

import csv
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.cache.errors import CorruptError, InputError, KdcacheError
from kdcache.tests.contracts.loggers import ServiceContract, lines
from kdcache.tests.helpers import wandbfiles
from kdcache.tests.helpers.servers import answering, send
from kdcache.train.config import LOGS, TrainConfig, parse_log
from kdcache.train.evaluate import examine_run
from kdcache.train.loop.logs.logs import CHOICES, Logged, Logs, require_loggers
from kdcache.train.loop.logs.services import Findings, Picture, flat
from kdcache.train.run import train

SECRET = "hunter22"


@pytest.fixture(autouse=True)
def _places(tmp_path_factory, monkeypatch):
    """wandb offline and MLflow in a folder of its own, with nobody's login and nothing that calls home."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    own = tmp_path_factory.mktemp("own")
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "HOME": own, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (own / "mlruns").as_uri(), "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))


class TestWandB(ServiceContract):
    name = "wandb"

    def read(self, folder):
        return wandbfiles.history(folder)

    def test_a_line_is_there_before_the_next_and_without_a_close(self, tmp_path):
        """Offline, wandb writes when it ends. After a kill its lines are sent again, and its folder goes."""
        code = (
            "import json, os, sys\n"
            "from pathlib import Path\n"
            "from kdcache.train.loop.logs.wandb import WandB\n"
            "first, *more = json.loads(sys.argv[2])\n"
            "logger = WandB.open(Path(sys.argv[1]), [first], print)\n"
            "for line in more:\n"
            "    logger.line(line)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        first = self.opened(tmp_path, [])
        first.line(lines(1)[0])
        first.close()
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), json.dumps(lines(1, 2, 3))], capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
        resumed = self.opened(tmp_path, lines(1, 2))
        for line in lines(3, 4):
            resumed.line(line)
        resumed.close()
        assert self.read(tmp_path) == lines(1, 2, 3, 4)
        runs = {record.run.run_id for record in wandbfiles.offline(tmp_path) if record.HasField("run")}
        assert runs == {json.loads((tmp_path / "wandb.json").read_text())["run"]}

    def test_without_a_login_it_is_offline_and_says_so(self, tmp_path, monkeypatch):
        monkeypatch.delenv("WANDB_MODE")
        said = []
        Logs(tmp_path, [], said.append, self.logged).close()
        assert said == [f"note: wandb is offline, since nobody is logged in: wandb sync {tmp_path}/wandb/offline-run-*"]
        assert list((tmp_path / "wandb").glob("offline-run-*"))


class TestMLflow(ServiceContract):
    name = "MLflow"

    def read(self, folder):
        client, run = client_and_run(folder)
        found = {}
        for name in client.get_run(run).data.metrics:
            for metric in client.get_metric_history(run, name):
                assert name not in found.setdefault(metric.step, {})
                found[metric.step][name] = metric.value
        return [found[step] for step in sorted(found)]

    def test_a_store_that_is_gone_for_a_while(self, tmp_path, monkeypatch):
        monkeypatch.setattr("kdcache.train.loop.logs.services._PATIENCE", 0.0)
        store = tmp_path / "store"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
        said = []
        logs = Logs(tmp_path, [], said.append, self.logged)
        logs.line(lines(1)[0])
        store.rename(tmp_path / "gone")
        logs.line(lines(2)[0])
        assert len(said) == 1 and said[0].startswith("warning: MLflow cannot log the run in ")
        for left in (tmp_path / "gone").rglob("meta.yaml"):
            left.parent.mkdir(parents=True, exist_ok=True)
        if store.exists():  # MLflow may have begun it anew
            store.rename(tmp_path / "anew")
        (tmp_path / "gone").rename(store)
        logs.line(lines(3)[0])
        logs.close()
        assert self.read(tmp_path) == lines(1, 2, 3)

    def test_a_database_needs_the_whole_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sqlalchemy", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="mlflow-skinny is not enough: pip install mlflow, or name a server"):
            Logs(tmp_path, [], pytest.fail, self.logged)

    def test_nothing_that_the_server_answers_is_told(self, tmp_path, monkeypatch):
        answers = (
            (401, b'{"error_code": "UNAUTHENTICATED", "message": "hunter22 has expired"}', "UNAUTHENTICATED"),
            (403, b"<html>hunter22 may not do this</html>", "error code 403"),
        )
        for status, body, words in answers:
            with answering(lambda handler, _, s=status, b=body: send(handler, s, b)) as address:
                monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", "//me:pa55word@"))
                with pytest.raises(KdcacheError, match=f"MLflow cannot log the run in .*{words}") as caught:
                    Logs(tmp_path, [], pytest.fail, self.logged)
            shown = "".join(traceback.format_exception(caught.value))
            assert SECRET not in shown and "pa55word" not in shown


def client_and_run(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(), json.loads((folder / "mlflow.json").read_text())["run"]


def test_a_run_with_all_of_them(home, tmp_path, monkeypatch):
    """Stopped after an epoch and resumed: one run in each, with settings, figures and pictures; no secret."""
    monkeypatch.setattr(sys, "argv", ["kdcache", "train", "--cache", f"https://me:{SECRET}@there/kd"])
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    out = tmp_path / "run"

    def stop(text):
        if text.startswith("epoch 1/"):
            raise KeyboardInterrupt

    asked = {
        "loss": "kd",
        "cache": str(home / "default"),
        "student": "resnet8",
        "out": str(out),
        "log": "tensorboard,csv,wandb,mlflow",
        "device": "cpu",
    }
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(epochs=2, **asked), stop)
    client, run = client_and_run(out)
    assert client.get_run(run).info.status == "KILLED"
    train(TrainConfig(resume=True, out=str(out)), lambda text: None)
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert wandbfiles.history(out) == history and len((out / "metrics.csv").read_text().splitlines()) == 3
    found = client.get_run(run)
    assert found.info.status == "FINISHED" and found.data.metrics.keys() == history[1].keys()
    require_end(out, history, client, run)
    assert len(client.get_metric_history(run, "loss_kd")) == 2
    told = wandbfiles.config(out)
    settings = json.loads((out / "config.json").read_text())
    assert told["cache"] == found.data.params["cache"] == settings["cache"] and told["cache_teacher"] == "resnet8"
    assert told["loss_options"] == settings["loss_options"] and found.data.params["loss_options.temperature"]
    assert told["provenance"]["command"] == found.data.tags["kdcache.command"].replace("'", "")
    assert "***@there" in told["provenance"]["command"]
    everything = b"".join(p.read_bytes() for p in (out / "wandb").rglob("*") if p.is_file() and p.suffix != ".log")
    assert everything and SECRET.encode() not in everything
    pictures = client.list_artifacts(run, "views")
    captions = Path(client.download_artifacts(run, "views/captions.txt")).read_text().splitlines()
    assert len(pictures) == 9 and len(captions) == 8 and captions[0].startswith("view0: label: ")


def require_end(out, history, client, run):
    """The last epoch's line and MLflow's table say what `kdcache eval` says of the run."""
    examined = examine_run(str(out))
    told, line = examined.analysis, history[1]
    expected = {
        **examined.figures, "agreement_top5": told.evaluation.top5, "training_agreement": told.training.top1,
        "training_agreement_top5": told.training.top5, "temperature": told.calibration.temperature,
        "scaled_nll": told.calibration.after.nll, "scaled_ece": told.calibration.after.ece,
        "worst_class_top1": min(told.per_class.accuracy),
    }  # fmt: skip
    assert {k: v for k, v in line.items() if k not in ("epoch", "seconds") and "loss" not in k} == expected
    assert line["ece"] == told.calibration.before.ece and line.keys() - history[0].keys() == expected.keys() - {
        *examined.figures
    }
    summary = json.loads((out / "summary.json").read_text())
    assert {k: summary[k] for k in expected} == expected
    last = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))[1]
    assert {k: float(v) for k, v in last.items()} == line
    table = Path(client.download_artifacts(run, "analysis/classes.csv")).read_text().splitlines()
    rows = {row["class"]: (int(row["images"]), int(row["correct"])) for row in csv.DictReader(table)}
    by = told.per_class
    assert rows == dict(zip(by.names, zip(by.images, by.correct, strict=True), strict=True))
    assert table[1].endswith(f",{line['worst_class_top1']}") and len(client.list_artifacts(run, "analysis")) == 3


class Ending:
    """What a run's end may tell."""

    def __init__(self, pixels):
        self._told = Findings(("class", "top1"), (("cat", 0.25), ("dog", None)), (Picture("confusion", pixels, "cat"),))

    def findings(self):
        return self._told


def test_pictures_tables_and_settings_reach_tensorboard_and_wandb(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    logged = Logged(
        "tensorboard,wandb",
        {"epochs": 1, "loss_options": {"beta": 2}},
        lambda model: [Picture("a", pixels, "label: cat")],
        Ending(pixels),
    )
    logs = Logs(tmp_path, [], pytest.fail, logged)
    logs.line(lines(1)[0])
    logs.end(None)
    logs.close()
    images = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/**/*.png"))
    assert len(images) == 2 and all(np.array_equal(np.asarray(Image.open(i))[..., :3], pixels) for i in images)
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/**/*.json")
    assert json.loads(table.read_text())["data"] == [["cat", 0.25], ["dog", None]]
    assert "label: cat" in str(wandbfiles.history(tmp_path, pictures=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Images("views/a")) == len(events.Images("analysis/confusion")) == 1
    (told,) = events.Tensors("analysis/classes/text_summary")
    assert told.tensor_proto.string_val[0].decode().splitlines()[2:] == ["| cat | 0.25 |", "| dog |  |"]
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("settings/text_summary")]
    assert "| loss_options.beta | 2 |" in texts[0]


@pytest.mark.parametrize("name", CHOICES)
def test_a_logger_without_its_package_is_one_line(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    if name == "csv":
        require_loggers(name)
        return
    with pytest.raises(InputError, match=f"--log {name} needs a package that is not installed: pip install {name}$"):
        require_loggers(f"csv,{name}")


def test_a_sweep_is_a_group(tmp_path):
    (tmp_path / "sweep.json").touch()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Logs(tmp_path / name, [], pytest.fail, Logged("wandb,mlflow")).close()
        client, run = client_and_run(tmp_path / name)
        assert client.get_run(run).data.tags["kdcache.sweep"] == tmp_path.name
        assert client.get_run(run).info.run_name == name
        groups = {r.run.run_group for r in wandbfiles.offline(tmp_path / name) if r.HasField("run")}
        assert groups == {tmp_path.name}


def test_the_names_of_loggers():
    assert list(CHOICES) == list(LOGS)
    assert parse_log("wandb, csv,wandb") == "csv,wandb" and parse_log("none") == "none"
    for wrong, message in (("csv,x", "x is no logger"), ("", "name loggers"), ("none,csv", "none alone")):
        with pytest.raises(ValueError, match=message):
            parse_log(wrong)
    usual = [name for name in ("metrics.jsonl", "TensorBoard", "metrics.csv", "wandb", "MLflow") if Logged().has(name)]
    assert usual == ["metrics.jsonl", "TensorBoard"]
    assert [Logged("none").has(name) for name in ("metrics.jsonl", "TensorBoard")] == [True, False]
    assert list(flat({"a": 1, "b": {"c": {"d": None}}})) == [("a", "1"), ("b.c.d", "None")]


def test_a_damaged_note_of_a_service_is_one_line(tmp_path):
    (tmp_path / "mlflow.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"mlflow.json is not what kdcache writes \('run'\): remove it"):
        Logs(tmp_path, [], pytest.fail, Logged("mlflow"))
