"""Make the folder of a run before its worker starts, so that a folder that cannot be written is found early."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stabletrain.config.yaml_file import read_yaml
from stabletrain.errors import UserError
from stabletrain.runtime.records.run_files import CHECKPOINTS, ENVIRONMENT, RUN_YAML

_PROBE = 65_536
"""Bytes that a run's folder must have room for; run.yaml and the logs are about as large."""


def choose_run_folder(recipe: str, wanted: str | None, *, job: int | None = None) -> Path:
    """Return the absolute path of a run's folder, without making it.

    Args:
        recipe: the recipe's name.
        wanted: the config key ``run_dir``; None: ``runs/<recipe>/<time>-<id>`` in the current folder.
        job: number of the job in a sweep: the run's folder is ``<wanted>/<job>``.
    """
    if wanted is None:
        return Path("runs", recipe, f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}").absolute()
    path = Path(wanted).expanduser().absolute()
    return path if job is None else path / str(job)


def make_run_folder(path: Path) -> None:
    """Make the folder of a run, with an empty run.yaml: of two that are started at once, one gets the folder.

    Args:
        path: from `choose_run_folder`.

    Raises:
        UserError: if the folder cannot be made or written, or contains another run.
    """
    taken = f"run_dir: {path} already contains a run; choose another folder, or delete it"
    if (path / RUN_YAML).exists():
        raise UserError(taken)
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"\0" * _PROBE)  # on a full disk, an empty file can still be made
        finally:
            probe.unlink(missing_ok=True)
        try:
            (path / RUN_YAML).touch(exist_ok=False)
        except FileExistsError:
            raise UserError(taken) from None
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write to {path} ({error.strerror or error}); choose a folder that can be written, "
            f"run_dir=FOLDER"
        ) from None


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


def read_run_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a run.yaml that anybody may have written.

    Args:
        path: in the run's folder; it is another run's file, or a copy, if it names another folder.

    Raises:
        UserError: if it cannot be read, is no run.yaml, or names another folder than its own as ``run_dir``.
    """
    config = read_yaml(path, exponents=False)
    needed = ("run_dir", "launch", "model", "data", "trainer")
    if not config.keys() >= set(needed):
        raise UserError(f"{path}: expected the run.yaml of a run, with the keys {', '.join(needed)}")
    folder = path.absolute().parent
    named = config["run_dir"]
    if not isinstance(named, str) or os.path.realpath(named) != os.path.realpath(folder):
        raise UserError(f"{path}: run_dir: expected the file's own folder, {folder}, got {named!r:.200}; correct it")
    return config


def remove_unused(folder: Path, *, keep_folder: bool) -> None:
    """Remove what was made for a run that did not start.

    Args:
        folder: the run's folder.
        keep_folder: whether the folder itself existed before; what else is in it stays.
    """
    if not keep_folder:
        shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(folder / ENVIRONMENT, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / RUN_YAML).unlink()
    with contextlib.suppress(OSError):
        (folder / CHECKPOINTS).rmdir()
