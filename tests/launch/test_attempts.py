"""The record of a run's attempts, the budget of restarts, and the launcher's loop, without processes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stabletrain.config.problems import ConfigError, Problem
from stabletrain.launch import run_attempts
from stabletrain.launch.attempt_end import AttemptEnd, Begun, conclude, end_attempt
from stabletrain.launch.attempts import (
    Attempt,
    append_attempt,
    goes_on_itself,
    read_attempts,
    resume_of_attempt,
    this_attempt,
)
from stabletrain.launch.began import Began, write_began
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import RankEnd, read_ends, write_end
from stabletrain.launch.restart_budget import given_up, without_progress
from stabletrain.launch.result import Result, read_result
from stabletrain.launch.run_folder import write_run_yaml
from stabletrain.launch.start_up import StartFailed, StartInterrupted, StartUp
from stabletrain.runtime.checkpoints import CheckpointInfo, Saver, Store
from stabletrain.runtime.records.recipe import recipe_hash

SAVED = {"checkpoints": {"_target_": "stabletrain.SaveCheckpoints", "folder": None}}


def died(number: int, step: int, cause: Any = "killed", **more: Any) -> Attempt:
    return Attempt(attempt=number, start="", end="", cause=cause, step=step, **more)


def series(*steps: int) -> list[Attempt]:
    return [died(number, step) for number, step in enumerate(steps, 1)]


@pytest.mark.parametrize(
    ("steps", "counted"),
    [
        ([], 0),
        ([412], 1),
        ([412, 412, 412], 3),
        ([412, 611], 2),
        ([412, 612], 1),
        ([412, 500, 611, 612], 1),  # three deaths, each a little further, and then the 200 steps are reached
        ([412, 30, 35], 3),  # it has come less far than before
        ([0, 0], 2),
        ([100, 400, 700, 1000, 1300], 1),  # a machine that dies again and again, and gets on
    ],
)
def test_progress_refills_the_budget(steps: list[int], counted: int) -> None:
    """Bugs: a fault at one place is repeated for ever, also if it throws the run back; a run that gets on is ended."""
    assert len(without_progress(series(*steps), 200)) == counted


def test_a_preemption_is_no_death() -> None:
    """Bug: a job that is preempted three times in its first minutes is given up."""
    attempts = [died(1, 5, "terminated"), died(2, 6, "terminated"), died(3, 6, "killed"), died(4, 7, "interrupted")]
    assert [each.attempt for each in without_progress(attempts, 200)] == [3]


def test_giving_up_says_what_the_deaths_have_in_common() -> None:
    """Bug: the same exception at the same step on the same rank reads like three accidents."""
    same = [died(n, 412, "failed", ranks=(1,), message="rank 1: RuntimeError: a bug", host="a") for n in (1, 2)]
    text = given_up(same, 200, "crash-2.txt").message
    assert "2 attempts died at step 412" in text
    assert "each time the same: rank 1: RuntimeError: a bug" in text
    assert "the data of step 412, crash-2.txt" in text
    rank = [died(n, 410 + n, ranks=(1,), message=f"{n}", host="node7") for n in (1, 2)]
    assert "each time rank 1 on node7" in given_up(rank, 200, "crash-2.txt").message
    assert given_up(rank, 200, "").exit_code == 3


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Bugs: a field is lost; a line that somebody else has written, or half of one, ends the run."""
    written = died(2, 7, ranks=(0, 3), host="a", from_step=5, steps_lost=2, seconds_lost=1.5, ready="x")
    append_attempt(tmp_path, written)
    wrong: list[dict[str, Any]] = [{"cause": "eaten"}, {"step": -1}, {"ranks": [True]}, {"ranks": 3}, {"ready": 5}]
    base = json.loads((tmp_path / "attempts.jsonl").read_text())
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.writelines(json.dumps({**base, **each}) + "\n" for each in wrong)
        file.write('{"attempt": 1}\n[1]\n{"atte')
    assert read_attempts(tmp_path) == [written]
    assert read_attempts(tmp_path / "missing") == []


def test_an_attempt_goes_on_from_its_own_run_only(tmp_path: Path) -> None:
    """Bugs: a run that was resumed from another one, and died before its first checkpoint, begins with new weights;
    one that has a checkpoint of its own goes back to that of the other run."""
    config = {"run_dir": str(tmp_path / "run"), "resume": "/other/run/checkpoints"}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert resume_of_attempt(config) == "/other/run/checkpoints"
    assert not goes_on_itself({**config, "resume": resume_of_attempt(config)})
    saver = Saver(Store(tmp_path / "run" / "checkpoints"))
    saver.begin("a")
    saver.save({"global_step": 3}, CheckpointInfo(step=3, run="a"), wait=True)
    saver.close()
    assert resume_of_attempt(config) == str(tmp_path / "run" / "checkpoints")
    assert goes_on_itself({**config, "resume": resume_of_attempt(config)})


def test_checkpoints_behind_a_link_are_those_of_the_run(tmp_path: Path) -> None:
    """Bug: a user's link from ``checkpoints`` to a large disk: a further attempt goes on from there, but says that it
    begins anew, and removes the events and interventions of the first one."""
    disk, folder = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    folder.mkdir()
    (folder / "checkpoints").symlink_to(disk)
    Saver(Store(disk), background=False).save({"state_dict": {}}, CheckpointInfo(step=3, run="a"), wait=True)
    config: dict[str, Any] = {"run_dir": str(folder), "resume": None}
    assert goes_on_itself({**config, "resume": resume_of_attempt(config)})
    assert not goes_on_itself({**config, "resume": str(disk)})


def test_a_further_attempt_finds_its_checkpoints_in_a_folder_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: a job that SLURM starts again begins with new weights, beside its checkpoints; or it goes on from those of
    another run in that folder."""
    disk = tmp_path / "disk"
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"), "resume": None, "seed": 1, "plugins": {"checkpoints": {"folder": str(disk)}}
    }  # fmt: skip
    (tmp_path / "run").mkdir()

    def save(step: int, recipe: str | None) -> None:
        info = CheckpointInfo(step=step, run="a", recipe=recipe)
        Saver(Store(disk), background=False).save({"state_dict": {}}, info, wait=True)

    monkeypatch.setenv("STABLETRAIN_ATTEMPT", "2")
    write_run_yaml(config)
    save(3, "another")
    assert resume_of_attempt(config) is None
    save(4, recipe_hash(tmp_path / "run", but=("chaos",)))
    assert resume_of_attempt(config) == str(disk)
    assert goes_on_itself({**config, "resume": str(disk)})
    os.utime(tmp_path / "run" / "run.yaml", (2e9, 2e9))
    assert resume_of_attempt(config) is None  # of an earlier run with the same recipe


def test_the_number_comes_from_the_environment() -> None:
    """Bug: a process that nobody numbered has no number."""
    assert [this_attempt({"STABLETRAIN_ATTEMPT": text}) for text in ("", "3", "0", "x", "9" * 30)] == [1, 3, 1, 1, 1]


# ---- the end of an attempt -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """The content of a run.yaml of two processes."""
    launch = {"kind": "torchrun", "processes": 2, "nodes": 1, "timeout": "5min", "restarts": 1, "progress_steps": 200}
    return {"run_dir": str(tmp_path), "resume": None, "plugins": SAVED, "launch": launch}


def end(run: Mapping[str, Any], ended: ProcessEnd, *ends: RankEnd, number: int = 1, begun: bool = True) -> AttemptEnd:
    folder = Path(run["run_dir"])
    for each in ends:
        write_end(each, folder)
    if begun:
        write_began(Began(attempt=number, from_step=0, steps_lost=0, time_ns=5), folder)
    return end_attempt(run, ended, Begun(number=number, start_ns=1, last_step_ns=0, ready_ns=2))


def rank(number: int, end: Any, message: str = "", **more: Any) -> RankEnd:
    return RankEnd(rank=number, result=Result(end=end, message=message, steps=4), **more)


BUG = rank(1, "failed", "RuntimeError: a bug", time_ns=1)
LOST = rank(0, "failed", "RuntimeError: Connection closed by peer", time_ns=2, consequence=True, at="step 4")
FAILED = ProcessEnd(code=1)


@pytest.mark.parametrize(
    ("ends", "ended", "begun", "restart"),
    [
        ([LOST], FAILED, True, True),  # rank 1 was killed
        ([LOST], FAILED, False, True),  # before the first step, too
        ([], FAILED, False, True),
        ([BUG, LOST], FAILED, True, True),
        ([BUG, LOST], FAILED, False, False),  # a bug that has never let a step through
        ([rank(0, "refused", "no data"), rank(1, "refused", "no data")], FAILED, False, False),
        ([rank(0, "stopped", agreed=True), rank(1, "stopped", agreed=True)], ProcessEnd(code=0), True, False),
        ([rank(0, "terminated", agreed=True), rank(1, "terminated", agreed=True)], FAILED, True, False),
        ([LOST], ProcessEnd(code=1, signum=2), True, False),  # Ctrl-C
        ([rank(0, "finished"), rank(1, "finished")], ProcessEnd(code=0), True, False),
    ],
)
def test_what_is_restarted(
    run: dict[str, Any], ends: list[RankEnd], ended: ProcessEnd, begun: bool, restart: bool
) -> None:
    """Bugs: a mistake, a plugin's stop, Ctrl-C or a preemption is repeated; a death is not."""
    found = end(run, ended, *ends, begun=begun)
    assert found.restart == restart
    assert found.result.exit_code != 3 or found.result.message == ""
    assert not end({**run, "launch": {**run["launch"], "restarts": 0}}, ended, *ends, begun=begun).restart


def test_the_last_death_is_the_end_with_exit_code_3(run: dict[str, Any], tmp_path: Path) -> None:
    """Bugs: the run is restarted once too often; result.json says "failed", and a scheduler repeats the job."""
    assert end(run, FAILED, LOST).restart
    second = end(run, FAILED, LOST, number=2)
    assert not second.restart
    assert (second.result.end, second.result.exit_code) == ("stopped", 3)
    assert read_result(tmp_path) == second.result
    assert [(each.attempt, each.ranks, each.step) for each in read_attempts(tmp_path)] == [(1, (1,), 4), (2, (1,), 4)]


def test_the_crash_report_begins_with_the_cause(run: dict[str, Any], tmp_path: Path) -> None:
    """Bugs: the broken connection of the other rank is taken for the cause; the last words of the rank that was killed
    are shown nowhere; a log of megabytes is copied."""
    logs = tmp_path / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").write_text("".join(f"line {n}\n" for n in range(100_000)))
    (logs / "rank-1.log").write_text("reading shard 7 \x1b[31m\n")
    report = end(run, FAILED, LOST).report
    assert report is not None
    text, shown = report.path.read_text(), report.shown()
    for each in (text, shown):
        assert each.index("first cause: rank 1") < each.index("consequence: rank 0 on ")
        assert "reading shard 7 \\x1b[31m" in each
    assert "line 99980\n" in text
    assert "line 99979\n" not in text
    assert "line 99999" not in shown


# ---- the loop --------------------------------------------------------------------------------------------------------


class Fake:
    """The processes of an attempt that end as they are told to."""

    def __init__(self, run: Mapping[str, Any], number: int, outcome: Any) -> None:
        self.begun = Begun(number=number, start_ns=1)
        self._run, self._number, self._outcome = run, number, outcome

    def check(self) -> None:
        if isinstance(self._outcome, BaseException):
            raise self._outcome

    def train(self, used: object) -> ProcessEnd:
        return FAILED

    def end(self, config: Mapping[str, Any], ended: ProcessEnd) -> AttemptEnd:
        attempt = died(self._number, self._outcome[0], self._outcome[1], from_step=0)
        result = Result(end=self._outcome[1], message="so")
        return conclude(config, attempt, result, may_restart=self._outcome[1] in ("killed", "failed"))


def go_on(run: dict[str, Any], *outcomes: Any) -> tuple[Result, list[int], list[int]]:
    """Let attempts end one after the other; returns the run's end, and the attempts that were started and reopened."""
    started: list[int] = []
    reopened: list[int] = []

    @contextmanager
    def start(config: Mapping[str, Any], number: int) -> Iterator[Any]:
        started.append(number)
        yield Fake(run, number, outcomes[number - 1])

    first = Fake(run, 1, outcomes[0]).end(run, FAILED)
    result = run_attempts.go_on(run, first, start, StartUp(), reopened.append)
    return result, started, reopened


def test_attempts_follow_each_other(run: dict[str, Any]) -> None:
    """Bugs: an attempt too many or too few; the run in MLflow is not reopened."""
    result, started, reopened = go_on(run, (5, "killed"), (900, "killed"), (950, "finished"))
    assert (result.end, started, reopened) == ("finished", [2, 3], [2, 3])
    assert [each.attempt for each in read_attempts(Path(run["run_dir"]))] == [1, 2, 3]


def test_a_death_before_training_counts(run: dict[str, Any]) -> None:
    """Bug: processes that die while they import are started again for ever, or end the run at the first time."""
    run["launch"]["restarts"] = 2
    result, started, _ = go_on(
        run, (5, "killed"), StartFailed("error: the worker was ended by signal 9"), (6, "killed")
    )
    assert (result.exit_code, started) == (3, [2, 3])
    assert "signal 9" in read_attempts(Path(run["run_dir"]))[1].message


def test_the_end_of_another_node_that_was_faster_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: another node refuses the run before this one has imported torch; its word is removed, and the waiting rank 0
    is blamed, which the launcher itself has killed."""
    monkeypatch.setattr(run_attempts, "wait_for", lambda *_: ProcessEnd(code=1))
    nothing: Any = object()
    config = {"run_dir": str(tmp_path)}
    begun = Begun(number=1, start_ns=1)
    processes = run_attempts.Processes(nothing, nothing, config, begun, nothing, None, nodes=nothing)
    write_end(RankEnd(rank=1, result=Result(end="refused", message="node 1: not trusted")), tmp_path)
    processes.train(lambda: None)
    assert [end.rank for end in read_ends(tmp_path)] == [1]


def test_a_mistake_found_later_ends_the_run(run: dict[str, Any]) -> None:
    """Bug: a run whose checkpoints are all damaged is started again and again."""
    result, started, _ = go_on(run, (5, "killed"), ConfigError([Problem("resume", "all are damaged")]))
    assert (result.end, started) == ("failed", [2])
    assert "all are damaged" in result.message


def test_ctrl_c_between_two_attempts(run: dict[str, Any], tmp_path: Path) -> None:
    """Bugs: Ctrl-C while no process trains ends the launcher with a traceback, or is forgotten and the run goes on;
    the run has "killed" as its end."""
    result, started, reopened = go_on(run, (5, "killed"), StartInterrupted(2))
    assert (result.end, result.exit_code, started, reopened) == ("interrupted", 130, [2], [])
    assert "attempt 1 had died: so" in result.message
    assert read_result(tmp_path) == result
