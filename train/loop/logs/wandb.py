"""Weights & Biases: a run there, or offline in the run's folder, for `wandb sync` to upload later."""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdcache.train.loop.logs.services import PROJECT, Findings, Picture, Service

# wandb itself would send the command line as it was typed, the host and the code. `settings` gives what is safe of it.
_COLLECTS_NOTHING = {
    "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False, "disable_git": True,
    "save_code": False,
}  # fmt: skip


class WandB(Service):
    """Takes its own settings from WANDB_MODE, WANDB_PROJECT, WANDB_RUN_GROUP and so on. Without a login it is offline.

    Offline, wandb writes a folder for each start of a run, and writes its last lines only when it ends. So the folder
    of a start that was killed is removed by the next one, which sends all of its lines again.
    """

    name, file, keeps_at_once = "wandb", "wandb.json", False

    def _begin(self) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _is_logged_in() else "offline")
        if mode == "offline" and not os.environ.get("WANDB_MODE"):
            self.say(f"note: wandb is offline, since nobody is logged in: wandb sync {self.folder}/wandb/offline-run-*")
        if (killed := self.state.pop("open", None)) and mode == "offline":
            shutil.rmtree(self.folder / "wandb" / Path(killed).name, ignore_errors=True)
        known = {name: value for name, value in _COLLECTS_NOTHING.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=self.folder.name,
            id=self.run or secrets.token_hex(4),
            group=os.environ.get("WANDB_RUN_GROUP") or self.group,
            resume="allow",
            reinit="create_new",  # others of this process may be open
            dir=str(self.folder),
            mode=mode,  # type: ignore[arg-type,unused-ignore]
            settings=wandb.Settings(console="off", silent=True, **known),
        )
        self.run = str(self._run.id)
        self.skip(self._run.starting_step - 1)  # online it knows what it has
        self.state["open"] = Path(self._run.dir).parent.name
        if mode == "online":
            self.say(f"wandb: {self._run.url}")

    def _tell(self, facts: Mapping[str, Any]) -> None:
        self._run.config.update(dict(facts), allow_val_change=True)

    def _send(self, line: dict[str, Any]) -> None:
        self._run.log({name: float(value) for name, value in line.items()}, step=line["epoch"])

    def _show(self, pictures: Sequence[Picture]) -> None:
        import wandb

        self._run.log({"views": [wandb.Image(p.pixels, caption=p.caption) for p in pictures]}, commit=False)

    def _tabulate(self, findings: Findings) -> None:
        import wandb

        pictures = {f"analysis/{p.name}": wandb.Image(p.pixels, caption=p.caption) for p in findings.pictures}
        table = wandb.Table(columns=list(findings.columns), data=[list(row) for row in findings.rows])
        self._run.log({**pictures, "analysis/classes": table}, commit=False)  # in the last epoch's step

    def _end(self) -> None:
        self._run.finish(exit_code=0 if self.is_whole else 1)
        self.state.pop("open", None)


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False
