"""A run that continues another one begins with its record of steps."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stabletrain.launch.bounded import is_count, read_json
from stabletrain.runtime.records.regular_file import only_regular
from stabletrain.runtime.records.run_files import RUN_YAML, STEPS


def take_over_steps(config: Mapping[str, Any]) -> None:
    """Copy ``steps.bin`` of the run whose checkpoint is resumed, unless there is one in the run's folder.

    When the training starts, the steps that are made again are removed from the copy. A file that cannot be copied is
    left out: the record then begins where the run resumes.

    Args:
        config: the content of run.yaml.
    """
    target = Path(config["run_dir"]) / STEPS
    if target.exists():
        return
    with suppress(OSError):
        folder = resumed_folder(config)
        source = None if folder is None else folder / STEPS
        if source is None or not stat.S_ISREG(source.lstat().st_mode):
            return  # a link in a folder from elsewhere may lead to any file of the user, and the copy is an artifact
        part = target.with_name(f"{STEPS}.part")
        with open(source, "rb", opener=only_regular) as earlier, open(part, "wb") as copy:
            shutil.copyfileobj(earlier, copy)
        os.replace(part, target)


def read_resumes(path: Path) -> list[int]:
    """Return the numbers of attempted steps at which a run was resumed; empty if that is not recorded.

    Args:
        path: of ``resumes.json``, which anybody may have written.
    """
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, list) and all(map(is_count, content)):
            return content
    return []


def resumed_folder(config: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run whose checkpoint is resumed; None if it is in no run's folder.

    Args:
        config: the content of run.yaml.
    """
    resume = config.get("resume")
    if not isinstance(resume, str):
        return None
    path = Path(resume).resolve()
    return next((each for each in (path, *path.parents) if (each / RUN_YAML).is_file()), None)
