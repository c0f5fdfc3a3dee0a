"""A run that continues another one begins with its record of steps."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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
    resume = config.get("resume")
    if not isinstance(resume, str) or target.exists():
        return
    with suppress(OSError):
        path = Path(resume).resolve()
        source = next((each / STEPS for each in (path, *path.parents) if (each / RUN_YAML).is_file()), None)
        if source is None or not stat.S_ISREG(source.lstat().st_mode):
            return  # a link in a folder from elsewhere may lead to any file of the user, and the copy is an artifact
        part = target.with_name(f"{STEPS}.part")
        with open(source, "rb", opener=only_regular) as earlier, open(part, "wb") as copy:
            shutil.copyfileobj(earlier, copy)
        os.replace(part, target)
