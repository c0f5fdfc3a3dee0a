"""No run stays RUNNING: an interrupted opening settles its run, and later processes settle those of dead ones."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stabletrain.tracking import ownership, runs
from stabletrain.tracking.ownership import OWNER, RUN_DIR, WORKER, Owner, this_process
from stabletrain.tracking.runs import create_run, settle_abandoned, start_run


@pytest.fixture(autouse=True)
def quick_record(monkeypatch):
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})


@pytest.fixture(scope="module")
def dead():
    """The identity of a process that has ended."""
    code = "from stabletrain.tracking.ownership import this_process; print(this_process().to_tag())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    owner = Owner.of(done.stdout.strip())
    assert owner is not None
    return owner


def statuses(client) -> list[str]:
    experiments = [each.experiment_id for each in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("boom"), MemoryError()])
@pytest.mark.parametrize(
    "where",
    [
        "stabletrain.tracking.runs.write_params",
        "stabletrain.tracking.git_record.write_git",
        "mlflow.MlflowClient.log_artifacts",
        "mlflow.MlflowClient.create_run",
    ],
)
def test_an_opening_that_ends_early_settles_its_run(uri, client, monkeypatch, where, error):
    """Bug: Ctrl-C, SIGTERM or a full disk between the creation of a run and its start leaves it RUNNING for ever."""
    from mlflow import MlflowClient

    create = MlflowClient.create_run

    def fail(*arguments, **named):
        if where.endswith("create_run"):
            create(*arguments, **named)  # the store has committed, the caller never sees the id
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(error)):
            start_run({"seed": 1}, uri=uri, experiment="demo")
    assert statuses(client) == ["FAILED" if isinstance(error, Exception) else "KILLED"]


def test_a_resume_that_ends_early_settles_its_run(uri, client, monkeypatch):
    """Bug: a run that had a final status is RUNNING for ever after a failed resume."""
    run_id = start_run({}, uri=uri, experiment="demo")
    client.set_terminated(run_id, "FINISHED")
    monkeypatch.setattr(runs, "write_params", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        start_run({}, uri=uri, experiment="demo", run_id=run_id)
    assert statuses(client) == ["KILLED"]


def test_a_logger_that_fails_to_open_settles_its_run(uri, client, monkeypatch):
    """Bug: the run of a script stays RUNNING after Ctrl-C while it is opened."""
    from stabletrain.tracking import MLflowLogger, logger

    monkeypatch.setattr(logger.MetricWriter, "__init__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        MLflowLogger(uri).log_metrics({"a": 1.0})
    assert statuses(client) == ["KILLED"]


def test_a_store_that_fails_while_opening_raises_its_own_error(uri, tmp_path, monkeypatch):
    """Bug: the attempt to settle the run hides why it could not be opened."""

    def fail(*_):
        (tmp_path / "mlflow.db").unlink()
        raise OSError("first cause")

    monkeypatch.setattr(runs, "write_params", fail)
    with pytest.raises(OSError, match="first cause"):
        start_run({}, uri=uri, experiment="demo")


def test_a_run_whose_processes_are_dead_is_settled(uri, client, dead):
    """Bug: after a kill of launcher and worker, a run is RUNNING for ever."""
    run_id = create_run(uri, "demo", tags={OWNER: dead.to_tag(), WORKER: dead.to_tag()})
    assert settle_abandoned(uri) == 1
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert str(dead.pid) in run.data.tags["stabletrain.settled"]
    assert settle_abandoned(uri) == 0


def alive() -> dict[str, str]:
    return {OWNER: this_process().to_tag()}


@pytest.mark.parametrize(
    "tags",
    [
        lambda dead: {OWNER: this_process().to_tag()},
        lambda dead: {OWNER: dead.to_tag(), WORKER: this_process().to_tag()},
        lambda dead: {OWNER: this_process().to_tag(), WORKER: dead.to_tag()},
        lambda dead: {OWNER: dead._replace(host="elsewhere").to_tag()},
        lambda dead: {OWNER: dead._replace(namespace="1").to_tag()},
        lambda dead: {OWNER: dead.to_tag() + ":more"},
        lambda dead: {OWNER: f"{dead.host}:x:y:z:0"},
        lambda dead: {OWNER: f"{dead.host}:{dead.boot}:{dead.namespace}:{'9' * 500}:0"},
        lambda dead: {OWNER: dead.to_tag(), WORKER: "odd"},
        lambda dead: {WORKER: dead.to_tag()},
        lambda dead: {},
    ],
)
def test_other_runs_are_left_alone(uri, client, dead, tags):
    """Bug: a run that still trains, or one of another machine or program, is set to KILLED."""
    create_run(uri, "demo", tags=tags(dead))
    assert settle_abandoned(uri) == 0
    assert statuses(client) == ["RUNNING"]


def test_process_ids_that_are_used_again_and_reboots(uri, client, monkeypatch):
    """Bug: a later process with the same id keeps a dead run RUNNING, as does every restart of the machine."""
    monkeypatch.setattr(ownership, "_namespace", lambda: str(0xEFFFFFFC))
    mine = this_process()
    for owner in (mine._replace(started="1"), mine._replace(boot="earlier")):
        create_run(uri, "demo", tags={OWNER: owner.to_tag()})
    assert settle_abandoned(uri) == 2
    assert not ownership.is_gone(mine._replace(boot="earlier"), same_disk=False), "of a server, hosts may be confused"


def test_containers_of_equal_names_on_two_machines(monkeypatch):
    """Bug: with a store on a network disk, a container settles the live run of its namesake on another machine."""
    monkeypatch.setattr(ownership, "_namespace", lambda: "4026532500")
    assert not ownership.is_gone(this_process()._replace(boot="of another machine"), same_disk=True)


def test_a_process_that_proc_does_not_show(monkeypatch, dead):
    """Bug: where /proc hides the processes of other users (hidepid), their live runs are set to KILLED."""
    assert ownership.is_gone(dead, same_disk=True)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not ownership.is_gone(dead, same_disk=True)


def test_a_run_that_is_resumed_on_another_machine(uri, client, dead):
    """Bug: a run that a scheduler will resume is set to KILLED, as the process that it once had has ended."""
    run_id = create_run(uri, "demo", tags={OWNER: dead.to_tag(), WORKER: dead.to_tag()})
    start_run({}, uri=uri, experiment="demo", run_id=run_id, owner=False)
    assert settle_abandoned(uri) == 0
    assert statuses(client) == ["RUNNING"]


def test_a_killed_process_that_its_parent_has_not_collected(uri, client):
    """Bug: a zombie counts as alive, so the run of a killed worker in a container stays RUNNING."""
    code = "from stabletrain.tracking.ownership import this_process as t; print(t().to_tag(), flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        create_run(uri, "demo", tags={OWNER: process.stdout.readline().strip()})
        assert settle_abandoned(uri) == 0
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert settle_abandoned(uri) == 1
    finally:
        process.kill()
        process.communicate()


def test_a_result_in_the_folder_says_how_the_run_ended(uri, client, dead, tmp_path):
    """Bug: a worker that finished after its launcher was killed is shown as KILLED."""
    for name in ("finished", "unknown"):
        create_run(uri, "demo", name=name, tags={OWNER: dead.to_tag(), RUN_DIR: str(tmp_path / name)})
    assert settle_abandoned(uri, lambda folder: "FINISHED" if folder.name == "finished" else None) == 2
    assert sorted(statuses(client)) == ["FINISHED", "KILLED"]


def test_settling_is_quick_and_never_raises(uri, client, tmp_path):
    """Bug: each command waits for the store, or fails because of somebody else's runs."""
    for _ in range(20):
        create_run(uri, "demo", tags=alive())
    settle_abandoned(uri)
    started = time.perf_counter()
    settle_abandoned(uri)
    assert time.perf_counter() - started < 0.5  # 0.03 s when measured alone
    (Path(tmp_path) / "mlflow.db").write_bytes(b"damaged" * 1000)
    assert settle_abandoned(uri) == 0
