"""Jobs side by side: ``--jobs``."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import LAUNCH

from stabletrain.launch.result import read_result
from stabletrain.launch.side_by_side import run_each, shares
from stabletrain.launch.start_up import StartInterrupted, StartUp

TINY = str(LAUNCH / "tiny.yaml")


def each(items: Any, work: Any, at_once: int, ends: Any = lambda done: False, start_up: Any = None) -> list[Any]:
    return list(run_each(items, work, at_once=at_once, start_up=start_up or StartUp(), ends=ends))


def test_as_many_as_asked_for_and_every_item_once() -> None:
    """Bugs: more than N run at a time, or fewer; an item is taken twice or never; two threads ask for the next one at
    once, of a generator that is not made for it."""
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3, timeout=10)

    def work(item: int, place: int) -> tuple[int, int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if item < 3:
            together.wait()
        with lock:
            running -= 1
        return item, place

    def items() -> Any:
        for item in range(9):
            time.sleep(0.001)
            yield item

    done = each(items(), work, 3)
    assert sorted(item for item, _ in done) == list(range(9))
    assert {place for _, place in done} == {0, 1, 2}
    assert most == 3
    assert each(range(4), lambda item, place: (item, place), 1) == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_ends_everything(at_once: int) -> None:
    """Bugs: a new item begins after an interrupted one, a signal or an error; the error or a result is lost."""
    begun: list[int] = []

    def work(item: int, place: int) -> int:
        begun.append(item)
        if item == 1:
            time.sleep(0.05)
        return item

    assert sorted(each(range(100), work, at_once, ends=lambda done: done == 1)) == sorted(begun)
    assert len(begun) < 100 or at_once == 2
    begun.clear()
    start_up = StartUp()

    def signalled(item: int, place: int) -> int:
        start_up.signum = signal.SIGINT
        return work(item, place)

    assert len(each(range(50), signalled, at_once, start_up=start_up)) <= at_once

    def fails(item: int, place: int) -> int:
        if place == 0:
            raise ValueError("the mistake")
        raise StartInterrupted(signal.SIGINT)

    with pytest.raises((ValueError, StartInterrupted)) as found:
        each(range(50), fails, at_once)
    assert at_once == 2 or found.type is ValueError


def test_cores_are_divided() -> None:
    """Bugs: a core that nobody uses, or a run without any."""
    for have in range(1, 9):
        for count in range(1, 12):
            found = shares(list(range(have)), count)
            assert len(found) == count
            assert all(found)
            assert {core for share in found for core in share} == set(range(have)) or count < 1
            if count <= have:
                assert sum(map(len, found)) == have


@pytest.mark.slow
def test_jobs_side_by_side_are_those_of_one_after_the_other(cli) -> None:
    """Bugs: one failure ends the others; runs mix in MLflow; the bits differ; threads are fewer than the recipe's;
    output of two runs is mixed within a line; a worker has all cores."""
    words = ("-m", "model.does=raise,sigkill,nothing", "model.at=2", "seed=7", "logger=mlflow", "launch.threads=2")
    alone, done = cli.tiny(*words, "run_dir=one"), cli.tiny(*words, "run_dir=both", "--jobs", "2")
    assert alone.returncode == done.returncode == 1, done.stderr
    for number, end in zip("012", ("failed", "killed", "finished"), strict=True):
        one, both = (read_result(cli.folder / folder / number) for folder in ("one", "both"))
        assert one is not None
        assert both is not None
        assert one.end == both.end
        losses = [
            {key: value for key, value in each.metrics.items() if "throughput/" not in key} for each in (one, both)
        ]
        assert losses[0] == losses[1]
        assert (both.end, both.threads) == (end, None if end == "killed" else 2)
    assert "job 0: " in done.stdout
    parents = [run.data.tags.get("mlflow.parentRunId") for run in cli.runs()]
    statuses = [run.info.status for run, parent in zip(cli.runs(), parents, strict=True) if parent is not None]
    assert sorted(statuses) == ["FAILED", "FAILED", "FINISHED", "FINISHED", "KILLED", "KILLED"]
    assert len(set(parents)) == 3, "None, and two sweeps"
    if len(os.sched_getaffinity(0)) > 1:
        assert "of the cores, and 2 threads" in done.stderr


@pytest.mark.slow
def test_ctrl_c_reaches_all(cli, tmp_path: Path) -> None:
    """Bugs: a signal ends one run only, or all without a checkpoint; a further run begins after it."""
    process = cli.start(
        "train", TINY, "--trust", "tiny_workload", "-m", "seed=1,2,3", "model.pause=0.05", "trainer.max_steps=100000",
        "model.does=tell", "model.at=2", "--jobs", "2", "logger=mlflow", "run_dir=r",
    )  # fmt: skip
    both = [tmp_path / "r" / number / "worker.log" for number in "01"]
    deadline = time.monotonic() + 250
    try:
        while not all(file.exists() and "tiny step 2" in file.read_text() for file in both):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    results = [read_result(tmp_path / "r" / number) for number in "01"]
    assert [result.end for result in results if result is not None] == ["interrupted"] * 2
    assert all(result.checkpoint for result in results if result is not None)
    assert not (tmp_path / "r" / "2").exists()
    assert errors.count("stopping after this batch") == 1
    assert {run.info.status for run in cli.runs()} == {"KILLED"}


def test_jobs_without_a_sweep(cli) -> None:
    """Bug: the option is ignored."""
    done = cli.tiny("--jobs", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train: --jobs 3 needs several runs; add -m")
