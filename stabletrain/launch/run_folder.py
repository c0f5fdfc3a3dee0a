"""Make the folder of a run before its worker starts, so that a folder that cannot be written is found early."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stabletrain.errors import UserError
from stabletrain.runtime.records.run_files import CHECKPOINTS, RUN_YAML

_PROBE = 65_536
"""Bytes that a run's folder must have room for; run.yaml and the logs are about as large."""


def make_run_folder(recipe: str, wanted: str | None, *, job: int | None = None) -> Path:
    """Make the folder of a run and return its absolute path.

    Args:
        recipe: the recipe's name.
        wanted: the config key ``run_dir``; None: ``runs/<recipe>/<time>-<id>`` in the current folder.
        job: number of the job in a sweep: the run's folder is ``<wanted>/<job>``.

    Raises:
        UserError: if the folder cannot be made or written, or contains another run.
    """
    if wanted is None:
        path = Path("runs", recipe, f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}").absolute()
    else:
        path = Path(wanted).expanduser().absolute()
        path = path if job is None else path / str(job)
    if (path / RUN_YAML).exists():
        raise UserError(f"run_dir: {path} already contains a run; choose another folder, or delete it")
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"\0" * _PROBE)  # on a full disk, an empty file can still be made
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write to {path} ({error.strerror or error}); choose a folder that can be written, "
            f"run_dir=FOLDER"
        ) from None
    return path


def write_run_yaml(config: Mapping[str, Any]) -> Path:
    """Write run.yaml into the run's folder and return its path.

    Args:
        config: the resolved config: plain mappings, lists and values.

    Raises:
        UserError: if it cannot be written.
    """
    path = Path(config["run_dir"]) / RUN_YAML
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write {path} ({error.strerror or error}); choose a folder on a disk with free space, "
            "run_dir=FOLDER"
        ) from None
    return path
