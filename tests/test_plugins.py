"""Every installed plugin keeps the contract; a failure names the check, the plugin, what was expected and found."""

import pytest

from stabletrain.config.discovery import plugins
from stabletrain.testing.checks import cleanup, resuming, training
from stabletrain.testing.conformance import Check, checks_for, run_check
from stabletrain.testing.subject import Subject
from stabletrain.testing.trainer import trained_with

SUBJECTS = {name: Subject(plugin) for name, plugin in plugins().items()}
CASES = [
    pytest.param(name, check, id=f"{name}-{check.__name__}")
    for name, subject in SUBJECTS.items()
    for check in checks_for(subject.plugin.kind)
]
WITH_A_TRAINER = {module.__name__ for module in (cleanup, resuming, training)}


@pytest.mark.parametrize(("name", "check"), CASES)
def test_plugin(name: str, check: Check) -> None:
    """Bug: an installed plugin that breaks a part of the contract; each check names its own."""
    run_check(check, SUBJECTS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), [case for case in CASES if case.values[1].__module__ in WITH_A_TRAINER])
def test_plugin_with_pytorch_lightning(name: str, check: Check) -> None:
    """Bug: a plugin that keeps the contract with Lightning under one of its two names only."""
    with trained_with("pytorch_lightning"):
        run_check(check, SUBJECTS[name])
