"""MLflow: a run on the tracking server, or in the database, that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.cache.errors import InputError
from kdcache.train.loop.logs.services import PROJECT, Findings, Picture, Service, flat

_MOST_PARAMETERS, _LONGEST = 100, 500  # of a request, and of a value: what servers of all versions take
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class MLflow(Service):
    """A run in the experiment MLFLOW_EXPERIMENT_NAME, by default kdcache. Settings are parameters, provenance is tags.

    Without MLFLOW_TRACKING_URI it is where MLflow puts it by default, a database in the current directory.
    """

    name, file = "MLflow", "mlflow.json"

    def _begin(self) -> None:
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
        )  # its own seven take minutes, while training waits
        import mlflow
        from mlflow.tracking import MlflowClient

        # A resumed run goes on where it is, also from another directory.
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.state.get("uri") or mlflow.get_tracking_uri()
        if uri.startswith(_DATABASES) and importlib.util.find_spec("sqlalchemy") is None:
            raise InputError(
                "--log mlflow keeps its runs in a database here, for which mlflow-skinny is not enough: pip install "
                "mlflow, or name a server in MLFLOW_TRACKING_URI"
            )
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self.state["uri"] = uri
        self._client = MlflowClient(tracking_uri=uri)
        if self.run is not None:
            self._client.update_run(self.run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        tags = {"kdcache.folder": str(self.folder.absolute()), "mlflow.source.name": "kdcache"}
        tags |= {} if self.group is None else {"kdcache.sweep": self.group}
        self.run = str(self._client.create_run(experiment, tags=tags, run_name=self.folder.name).info.run_id)

    def _tell(self, facts: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        rest = dict(facts)
        tags = [RunTag(f"kdcache.{k}", v) for k, v in flat(rest.pop("provenance", {}))]
        # Parameters cannot change: what a resumed run is given anew, such as where its cache lies, stays as it was.
        before = self._client.get_run(self.run).data.params
        new = [Param(k, v[:_LONGEST]) for k, v in flat(rest) if k not in before]
        for first in range(0, len(new), _MOST_PARAMETERS):
            self._client.log_batch(self.run, params=new[first : first + _MOST_PARAMETERS])
        self._client.log_batch(self.run, tags=tags)

    def _send(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        figures = [Metric(name, float(value), now, line["epoch"]) for name, value in line.items()]
        self._client.log_batch(self.run, metrics=figures)

    def _show(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            self._client.log_image(self.run, picture.pixels, artifact_file=f"views/{picture.name}.png")
        text = "\n".join(f"{picture.name}: {picture.caption}" for picture in pictures)
        self._client.log_text(self.run, text + "\n", "views/captions.txt")

    def _tabulate(self, findings: Findings) -> None:
        for picture in findings.pictures:
            self._client.log_image(self.run, picture.pixels, artifact_file=f"analysis/{picture.name}.png")
            self._client.log_text(self.run, picture.caption + "\n", f"analysis/{picture.name}.txt")
        text = io.StringIO()  # not log_table, which mlflow-skinny lacks
        csv.writer(text, lineterminator="\n").writerows([findings.columns, *findings.rows])
        self._client.log_text(self.run, text.getvalue(), "analysis/classes.csv")

    def _end(self) -> None:
        self._client.set_terminated(self.run, "FINISHED" if self.is_whole else "KILLED")
