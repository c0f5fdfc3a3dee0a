"""Fixtures for tests of several folders."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HELPERS, environment

with contextlib.suppress(ImportError):  # the tests of a GPU run without it
    import hypothesis

    # a loaded machine is no fault of the code under test
    hypothesis.settings.register_profile(
        "no_time", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("no_time")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
OnTwoRanks = Callable[[Path | str], Path]


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore the handlers after each test: one that is left, as after a fit that fails, would end a later test."""
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    yield
    for each, handler in before.items():
        if signal.getsignal(each) is not handler:
            signal.signal(each, handler)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> OnTwoRanks:
    """Run a script by torchrun in two processes; returns the folder that it was given, once both have succeeded."""

    def run(script: Path | str) -> Path:
        folder = tmp_path_factory.mktemp("two_ranks")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        variables = environment(HELPERS, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        done = subprocess.run([*command, str(folder)], env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return run


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One migrated database for the session; a copy of it for each test is 20 times faster than migrating."""
    from stabletrain.tracking import ensure_store

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    ensure_store(f"sqlite:///{path}")
    return path
