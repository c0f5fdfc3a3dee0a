"""What a log of interventions says when it is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stabletrain.errors import UserError
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention
from stabletrain_plugins.rollback.intervention_log import Fingerprint, InterventionLog, read

MINE = Fingerprint("model", "recipe", 1)


def made(step: int) -> Intervention:
    return Intervention(step, step - 5, None, (step, step - 5), (("samples", 1, "b"),), (), 3, "restore", "p", "c")


def level(step: int) -> AcceptedLevel:
    return AcceptedLevel(step, step - 7, (("samples", 1, "b"),), (3.0, 0.1), (1.0, 2e-9), 3, 1.55, 1.0, "p: c")


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Bug: an intervention is changed by writing and reading it."""
    log = InterventionLog(tmp_path / "interventions.jsonl", MINE)
    log.record_resume(3)
    assert not (tmp_path / "interventions.jsonl").exists(), "a run without interventions has no log"
    log.append(made(10))
    log.append(level(15))
    log.append(made(20))
    assert read(tmp_path, MINE) == [made(10), level(15), made(20)]


def test_interventions_that_a_restart_discarded_are_not_read(tmp_path: Path) -> None:
    """Bug: a rollback is made twice, because the run was killed after it and resumed from before it."""
    log = InterventionLog(tmp_path / "interventions.jsonl", MINE)
    log.append(made(10))
    log.append(made(20))
    log.record_resume(15)
    assert read(tmp_path, MINE) == [made(10)]
    log.append(made(21))
    assert read(tmp_path, MINE) == [made(10), made(21)]


def test_the_log_of_a_resumed_run_starts_with_all_that_was_made(tmp_path: Path) -> None:
    """Bug: rollbacks, then levels: a rollback after a level is read as one that a restart discarded."""
    log = InterventionLog(tmp_path / "interventions.jsonl", MINE)
    log.record_resume(40, (made(10), made(30), level(20)))
    assert read(tmp_path, MINE) == [made(10), level(20), made(30)]
    log.record_resume(25)
    log.append(level(26))
    assert read(tmp_path, MINE) == [made(10), level(20), level(26)]


@pytest.mark.parametrize("missing", [[], ["rewound"]])
def test_a_log_from_before_levels_were_accepted(tmp_path: Path, missing: list[str]) -> None:
    """Bug: a run of an earlier version cannot be repeated."""
    record: dict[str, Any] = {"action": "rollback", **made(10)._asdict(), **MINE._asdict()}
    for field in missing:
        del record[field]
    (tmp_path / "interventions.jsonl").write_text(json.dumps(record) + "\n")
    assert read(tmp_path, MINE) == [made(10)]


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    """Bug: a log cannot be read because the process was killed while it wrote."""
    path = tmp_path / "interventions.jsonl"
    log = InterventionLog(path, MINE)
    log.append(made(10))
    path.write_text(path.read_text() + '{"action": "rollb')
    assert read(path, MINE) == [made(10)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Fingerprint("other", "recipe", 1), "another model or optimizer"),
        (Fingerprint("model", "other", 1), "another recipe"),
        (Fingerprint("model", "recipe", 2), "with 1 processes, and this one has 2"),
    ],
)
def test_another_runs_log_is_refused(tmp_path: Path, other: Fingerprint, message: str) -> None:
    """Bug: interventions are made in a run that they do not belong to."""
    InterventionLog(tmp_path / "interventions.jsonl", MINE).append(made(10))
    with pytest.raises(UserError, match=message):
        read(tmp_path, other)


def test_a_disk_error_does_not_end_the_run(tmp_path: Path) -> None:
    """Bug: a run dies because its log cannot be written."""
    (tmp_path / "file").write_text("")
    log = InterventionLog(tmp_path / "file" / "interventions.jsonl", MINE)
    log.append(made(10))
    log.append(made(20))
    (tmp_path / "file").unlink()
    log.append(made(30))
    assert [each.step for each in read(tmp_path / "file", MINE)] == [10, 20, 30], "written when the disk works again"
