"""The folder of one run: made before anything is started, so that a place that cannot be written is found early."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stabletrain.errors import UserError

RUN_YAML = "run.yaml"


def make_run_folder(recipe: str, wanted: str | None, *, job: int | None = None) -> Path:
    """Make the folder of a run and return its absolute path.

    Args:
        recipe: the recipe's name.
        wanted: the folder asked for by ``run_dir``, or None for ``runs/<recipe>/<time>-<id>`` in the current folder.
        job: number of the job in a sweep, which becomes a folder below ``wanted``.

    Raises:
        UserError: if the folder cannot be made or written, or holds another run.
    """
    if wanted is None:
        path = Path("runs", recipe, f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}").absolute()
    else:
        path = Path(wanted).expanduser().absolute()
        path = path if job is None else path / str(job)
    if (path / RUN_YAML).exists():
        raise UserError(f"run_dir: {path} holds a run already; name another folder, or delete it")
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write in {path} ({error.strerror or error}); "
            f"name a folder that you may write, run_dir=FOLDER"
        ) from None
    return path


def write_run_yaml(config: Mapping[str, Any]) -> Path:
    """Write ``run.yaml`` into the run's folder and return its path.

    Args:
        config: the resolved run; plain mappings, lists and values.
    """
    path = Path(config["run_dir"]) / RUN_YAML
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    return path
