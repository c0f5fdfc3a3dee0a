"""Two real processes under torchrun, one of which fails: the run's end is its own, soon, and shown once."""

import time

import pytest

pytestmark = pytest.mark.slow

CASES = {
    "a bug on rank 0": (["model.does=raise", "model.rank=0"], 1, "failed", "rank 0: RuntimeError: a bug in", 1),
    "a bug on rank 1": (["model.does=raise", "model.rank=1"], 1, "failed", "rank 1: RuntimeError: a bug in", 1),
    "the same bug on both": (["model.does=raise"], 1, "failed", "RuntimeError: a bug in the user's module", 1),
    "a mistake": (["model.does=mistake", "model.rank=1"], 1, "failed", "rank 1: data.path: this file ended early", 0),
    "SIGKILL": (["model.does=sigkill", "model.rank=1"], 1, "killed", "rank 1 was killed by signal 9", 0),
    "sys.exit(0)": (["model.does=exit", "model.rank=1"], 1, "failed", "rank 1: sys.exit(0) was called in", 0),
    "os._exit(7)": (["model.does=os_exit", "model.rank=1"], 1, "failed", "rank 1 ended with exit code 7", 0),
    "a bug in validation": (
        ["model.does=raise_in_validation", "model.rank=1", "trainer.val_check_interval=2"],
        1, "failed", "rank 1: RuntimeError: a bug in validation", 1),
    "a bug in a data loader's process": (
        ["data.broken_row=17"], 1, "failed", "RuntimeError: Caught RuntimeError in DataLoader worker", 2),
    "SIGKILL of torchrun": (
        ["model.does=kill_torchrun", "model.rank=1"], 1, "killed", "torchrun was ended by signal 9", 0),
    "SIGTERM to one rank": (
        ["model.does=sigterm", "model.rank=1"], 143, "terminated", "ended by SIGTERM after a batch, with", 0),
    "rank 1 does not come": (
        ["model.does=hang", "model.rank=1", "launch.timeout=5"], 1, "failed", "rank 1 at step 2 in ", 0),
    "a branch of rank 1 only": (
        ["model.does=barrier", "model.rank=1", "launch.timeout=5"], 1, "failed", "for 5 s (launch.timeout): rank 0", 0),
    "rank 1 leaves the loop": (
        ["model.does=leave", "model.rank=1", "launch.timeout=5"], 1, "failed", "rank 1 at step 2 in ", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_first_cause_is_the_runs_end(cli, case: str) -> None:
    """Bugs: torchrun's SIGTERM makes a bug "terminated" (143), which a scheduler requeues for ever; a hang of the
    other rank, for ever or for half an hour; a traceback for each rank, or torchrun's own report."""
    words, code, end, message, tracebacks = CASES[case]
    begun = time.monotonic()
    done = cli.tiny("launch.processes=2", "launch.threads=1", "model.at=2", *words)
    assert time.monotonic() - begun < 120
    assert done.returncode == code, done.stderr
    (result,) = cli.results()
    assert result["end"] == end
    assert message in result["message"]
    assert done.stderr.count("Traceback (most recent call last)") == tracebacks, done.stderr
    assert "ChildFailedError" not in done.stderr
    assert ("interrupted.ckpt" in str(result["checkpoint"])) == (end == "terminated" or case == "SIGKILL of torchrun")
