"""The checkpoints of a run as MLflow's logged models: metadata and the path, no copy of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.runtime.records.run_files import CHECKPOINTS
from stabletrain.tracking.sqlite_file import check_file
from stabletrain.tracking.store import open_client
from stabletrain.tracking.store_errors import translate_errors

MODEL_TYPE = "checkpoint"
_VERIFIED = "step-*/manifest.json"
_STEP = re.compile(r"step[-=_](\d{1,15})")
_FORBIDDEN = re.compile(r"[/:.%\"']")


def checkpoints_in(folder: Path) -> dict[str, Path]:
    """Return the checkpoints that a run has kept, by name; links to them are left out.

    Args:
        folder: of the run.

    Raises:
        OSError: if the folder cannot be read.
    """
    inside = folder / CHECKPOINTS
    verified = [manifest.parent for manifest in inside.glob(_VERIFIED)]
    found = [path for path in (*verified, *inside.glob("*.ckpt")) if not path.is_symlink()]
    return {path.name: path for path in sorted(found)}


def sync_models(uri: str, run_id: str, folder: Path, *, link: bool = False) -> None:
    """List the checkpoints of a run's folder as its logged models, and no others of this folder.

    Args:
        uri: MLflow tracking URI.
        run_id: the run.
        folder: of the run.
        link: make them outputs of the run, too, which cannot be undone: for the end, when they are kept.

    Raises:
        StoreError: if the store cannot be used.
        OSError: if the folder cannot be read.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    kept = checkpoints_in(folder)
    with translate_errors(uri):
        check_file(uri, timeout=5.0)
        client = open_client(uri)
        run = client.get_run(run_id)
        listed = _listed(client, run.info.experiment_id, run_id, folder)
        for name in listed.keys() - kept.keys():
            client.delete_logged_model(listed[name])
        for name in sorted(kept.keys() - listed.keys()):
            made = client.create_logged_model(
                run.info.experiment_id,
                name=_FORBIDDEN.sub("-", name)[:250],
                source_run_id=run_id,
                model_type=MODEL_TYPE,
                tags={"path": str(kept[name]), "step": str(_step(name))},
            )
            client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
            listed[name] = made.model_id
        if link:
            known = {each.model_id for each in getattr(run.outputs, "model_outputs", [])}
            new = [name for name in sorted(kept) if listed[name] not in known]
            if new:
                client.log_outputs(run_id, [LoggedModelOutput(listed[name], _step(name)) for name in new])


def _listed(client: Any, experiment_id: str, run_id: str, folder: Path) -> dict[str, str]:
    """The ids of the logged models of this folder's checkpoints, by the checkpoints' names."""
    found: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", page_token=token)
        for model in page:
            tags: Mapping[str, str] = model.tags or {}
            path = Path(tags.get("path", ""))
            if model.model_type == MODEL_TYPE and path.parent == folder / CHECKPOINTS:
                found[path.name] = model.model_id
        token = page.token
        if not token:
            return found


def _step(name: str) -> int:
    """The step in a checkpoint's name; 0 if it has none."""
    number = _STEP.search(name)
    return int(number[1]) if number else 0
