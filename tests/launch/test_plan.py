"""``stabletrain plan`` through the command line."""

import json

import pytest
from processes import LAUNCH

TINY = str(LAUNCH / "tiny.yaml")


@pytest.mark.slow
def test_a_measured_plan_is_json_alone_and_leaves_nothing(cli) -> None:
    """Bugs: what the measured run prints is among the JSON; its folder stays; the cost forgets the processes."""
    words = ("plan", TINY, "--trust", "tiny_workload", "trainer.max_steps=40", "launch.processes=2", "launch.threads=1")
    done = cli(*words, "--measure", "5", "--price", "3.5", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["jobs"][0]["plan"]
    measured = plan["measured"]
    assert measured["steps"] == 5
    assert measured["low"] <= measured["seconds"] <= measured["high"]
    assert measured["hours"] == pytest.approx(40 * measured["seconds"] / 3600)
    assert measured["cost"] == pytest.approx(measured["hours"] * 2 * 3.5)
    assert plan["samples_per_step"] == 16
    assert list(cli.folder.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_fails_while_it_is_measured_has_its_traceback(cli) -> None:
    """Bug: an exception in the user's module is taken for a mistake in the command."""
    words = ("plan", TINY, "--trust", "tiny_workload", "model.does=raise", "model.at=2", "trainer.max_steps=40")
    done = cli(*words, "--measure", "5")
    assert done.returncode == 1
    assert "a bug in the user's module" in done.stderr
    assert "Traceback" in done.stderr
    assert list(cli.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--price", "0", "--measure", "5"), "plan: --price: expected a price of a device for an hour, above 0, got 0"),
        (("dry_run=false",), "plan: it trains nothing; remove dry_run=false"),
        (("-m", "seed=1,2", "--measure", "5"), "plan: --measure is for one run at a time, got 2 jobs"),
        (("launch=slurm", "--measure", "5"), "plan: --measure trains on this machine alone"),
    ],
)
def test_mistakes_are_one_message(words: tuple[str, ...], message: str) -> None:
    """Bugs: a traceback; a run that is elsewhere, or several, are planned at length before they are refused."""
    from typer.testing import CliRunner

    from stabletrain.cli.main import app

    done = CliRunner().invoke(app, ["plan", "char_gpt", "logger=none", *words])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
