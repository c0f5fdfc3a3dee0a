"""Signals that arrive while the launcher finishes a run: the run has its true status in the store."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stabletrain.launch import mlflow_run
from stabletrain.launch.result import End, Result
from stabletrain.launch.start_up import AFTER_TRAINING, StartInterrupted, StartUp
from stabletrain.tracking import artifacts, runs


@pytest.mark.parametrize(("end", "status"), [("finished", "FINISHED"), ("failed", "FAILED")])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("presses", [1, 2])
def test_a_signal_while_files_are_sent(
    end: End,
    status: str,
    signum: signal.Signals,
    presses: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Bugs: the run stays RUNNING, or a finished one becomes KILLED; the store's client swallows the signal."""
    settled: list[tuple[Any, ...]] = []

    def slow(*_: object) -> None:
        for _ in range(presses):
            try:
                os.kill(os.getpid(), signum)
            except Exception:  # as in a client that tries again
                continue

    monkeypatch.setattr(artifacts, "upload_files", slow)
    monkeypatch.setattr(runs, "set_final_status", lambda uri, run_id, status, *, force: settled.append((status, force)))
    logger = {"_target_": mlflow_run.MLFLOW_LOGGER, "tracking_uri": "sqlite:///x.db", "run_id": "1"}
    config = {"run_dir": str(tmp_path), "logger": logger}
    with StartUp() as start_up:
        start_up.doing = AFTER_TRAINING
        if presses == 1:
            assert mlflow_run.finish_run(config, Result(end=end)) is None
        else:
            with pytest.raises(StartInterrupted) as raised:
                mlflow_run.finish_run(config, Result(end=end))
            assert raised.value.result.exit_code == (130 if signum == signal.SIGINT else 143)
    assert settled == [(status, True)]
    said = capfd.readouterr().err
    assert said.count("the run has ended") == 1
    assert said.count("ending at once") == presses - 1
