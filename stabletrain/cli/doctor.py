"""The command ``doctor``: examine a recipe, print the report, write it as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from stabletrain.errors import UserError
from stabletrain.launch.launcher import LaunchRequest, examine_job, prepare
from stabletrain.runtime.records.writable import unwritable

_EXIT_FINDINGS = 4


def examine(request: LaunchRequest, json_file: Path | None, skip: Sequence[str], seconds: float) -> int:
    """Examine a recipe, print the report, and return the exit code: 0 without findings, else 4.

    Args:
        request: recipe and overrides, without sweeps.
        json_file: where the report is written as JSON, too; None: nowhere.
        skip: names of checks that are left out.
        seconds: after which no further step is made.

    Raises:
        UserError: if the recipe, or an option, has a mistake.
    """
    if not seconds > 0:
        raise UserError(f"doctor: --seconds: expected more than 0, got {seconds:g}")
    if json_file is not None and (reason := unwritable(str(json_file), folder=False)):
        raise UserError(f"doctor: --json: {reason}; choose another file")
    (job,) = prepare(request)
    width = shutil.get_terminal_size((120, 24)).columns
    found = examine_job(job, request, {"skip": list(skip), "seconds": seconds, "width": width})
    print("\n".join(found["lines"]), flush=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found["content"], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nreport: {json_file}", flush=True)
    return _EXIT_FINDINGS if found["content"]["findings"] else 0
