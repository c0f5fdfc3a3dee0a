"""Every installed plugin keeps the contract; a failure names the check, the plugin, what was expected and found."""

import pytest

from stabletrain.config.discovery import plugins
from stabletrain.testing.conformance import Check, checks_for, run_check
from stabletrain.testing.subject import Subject

SUBJECTS = {name: Subject(plugin) for name, plugin in plugins().items()}
CASES = [
    pytest.param(name, check, id=f"{name}-{check.__name__}")
    for name, subject in SUBJECTS.items()
    for check in checks_for(subject.plugin.kind)
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_plugin(name: str, check: Check) -> None:
    """Bug: an installed plugin that breaks a part of the contract; each check names its own."""
    run_check(check, SUBJECTS[name])
