"""The command ``stabletrain doctor``."""

import json
from pathlib import Path

import pytest


def test_wrong_options_are_one_message(cli) -> None:
    """Bug: a traceback, or a minute of checks whose result cannot be written."""
    for words, text in (
        (("--seconds", "0"), "doctor: --seconds: expected more than 0, got 0"),
        (("--json", "/dev/null/report.json"), "doctor: --json:"),
    ):
        done = cli("doctor", "digits_cnn", *words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {text}")


@pytest.mark.slow
def test_a_recipe_is_examined(cli, tmp_path: Path) -> None:
    """Bugs: a finding in a shipped recipe; files or runs that are left behind; a report that is no JSON."""
    done = cli("doctor", "digits_cnn", "--seconds", "300", "--json", "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert content["findings"] == 0
    assert content["name"] == "digits_cnn"
    assert done.stdout.startswith("digits_cnn: no findings")
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_findings_end_with_4(cli) -> None:
    """Bug: a script cannot tell findings from a failure."""
    done = cli("doctor", "digits_cnn", "optimizer.lr=1e-6", "--seconds", "300", "--skip", "one batch")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no better than guessing" in done.stdout.split("not applicable  ")[0]
