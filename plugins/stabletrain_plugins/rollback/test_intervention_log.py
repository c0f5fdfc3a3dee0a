"""What a log of interventions says when it is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stabletrain.errors import UserError
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention
from stabletrain_plugins.rollback.intervention_log import InterventionLog, read
from stabletrain_plugins.rollback.intervention_record import Fingerprint

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


def cut(path: Path, keep: int) -> None:
    """Cut the last line to its first ``keep`` bytes."""
    content = path.read_bytes().rstrip(b"\n")
    path.write_bytes(content[: content.rfind(b"\n") + 1 + keep])


@pytest.mark.parametrize("keep", [1, 5, 30, 60, 200])
def test_a_run_that_is_killed_in_a_line_and_resumed_is_repeated(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: the next record is glued to the cut line, and the whole log is refused."""
    path = tmp_path / "interventions.jsonl"
    log = InterventionLog(path, MINE)
    log.append(made(10))
    log.append(made(20))
    cut(path, keep)
    log.record_resume(15)
    log.append(made(21))
    assert read(path, MINE) == [made(10), made(21)]
    assert "line 2" in caplog.text


@pytest.mark.parametrize("keep", [1, 60])
def test_a_line_lost_by_a_power_failure_is_written_again_on_resume(tmp_path: Path, keep: int) -> None:
    """Bug: the line is taken for discarded although the checkpoint has its rollback: its batches are used again."""
    path = tmp_path / "interventions.jsonl"
    log = InterventionLog(path, MINE)
    log.append(made(10))
    log.append(made(20))
    cut(path, keep)
    log.record_resume(25, (made(10), made(20)))
    log.append(level(30))
    assert read(path, MINE) == [made(10), made(20), level(30)]


def damage(text: str, **fields: Any) -> str:
    return json.dumps({**json.loads(text), **fields})


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:40],
        lambda text: "\0" * len(text),
        lambda text: "[]",
        lambda text: text[:40] + text,
        lambda text: damage(text, step="10"),
        lambda text: damage(text, step=True),
        lambda text: damage(text, step=10.5),
        lambda text: damage(text, applied=[1]),
        lambda text: damage(text, applied="ab"),
        lambda text: damage(text, excluded=["abc"]),
        lambda text: damage(text, excluded=[[["a"]]]),
        lambda text: damage(text, excluded=None),
        lambda text: damage(text, to=None),
        lambda text: damage(text, to="5"),
        lambda text: damage(text, rewarm=-1),
        lambda text: damage(text, baselines="other"),
        lambda text: damage(text, rewound="yes"),
        lambda text: damage(text, unknown=1),
        lambda text: damage(text, action="other"),
        lambda text: damage(text, action=["rollback"]),
    ],
)
def test_a_damaged_line_that_matters_is_named(tmp_path: Path, change: Any) -> None:
    """Bug: a traceback, or a replay without the rollback that the line described, which is another training."""
    path = tmp_path / "interventions.jsonl"
    log = InterventionLog(path, MINE)
    for step in (5, 10, 20):
        log.append(made(step))
    lines = path.read_text().splitlines()
    lines[1] = change(lines[1])
    path.write_text("\n\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"line 3 of .*interventions\.jsonl is damaged.*plugins\.spike\.replay=null"):
        read(path, MINE)
    path.write_text("\n".join(lines) + "\n" + '{"action": "resume", "step": -1}\n')
    assert read(path, MINE) == []


@pytest.mark.parametrize("content", ["text\n", "1\n2\n", '{"action": "rollb', '{"a": 1}\n', "\0"])
def test_a_file_without_interventions_is_refused(tmp_path: Path, content: str) -> None:
    """Bug: any file is taken for a log without rollbacks, and the replay repeats nothing."""
    path = tmp_path / "interventions.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"line 1 of .* is no intervention"):
        read(path, MINE)
