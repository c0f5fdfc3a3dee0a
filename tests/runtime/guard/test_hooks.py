"""Hooks found by name: what cannot work is found before training, and what is not meant for stabletrain is let be."""

import logging
from typing import Any

import pytest
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import Callback

from stabletrain import SkipNonFinite, UserError
from stabletrain.core.events import Request, RequestKind
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.hooks import check_hooks, has_own_state

ITEMS = batches(HEALTHY, HEALTHY)


class Plugin(GuardMember):
    plugin = "mine"


class Misspelt(Plugin):
    def handle_requests(self, trainer: Any, module: Any, request: Request) -> None: ...


class OtherArguments(Callback):
    def on_stability_event(self, trainer: Any, event: Any) -> None: ...


class NoKinds(Plugin):
    def handle_request(self, trainer: Any, module: Any, request: Request) -> None: ...


class HalfAPair(Plugin):
    def snapshot_state(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Misspelt, ["Misspelt has 'handle_requests'", "did you mean 'handle_request'?"]),
        (OtherArguments, ["OtherArguments.on_stability_event", "(trainer, event)", "(trainer, module, event)"]),
        (NoKinds, ["NoKinds has handle_request but no attribute handles"]),
        (HalfAPair, ["HalfAPair has snapshot_state but no restore_state"]),
    ],
)
def test_a_hook_that_would_fail_or_never_be_called_is_refused(made: Any, words: list[str]) -> None:
    """Bugs: a rollback that nobody makes, for a letter; a TypeError in the middle of the run, at its first event."""
    with pytest.raises(UserError) as refused:
        fit(Net(), ITEMS, SkipNonFinite(), made())
    for word in words:
        assert word in str(refused.value)


class Stranger(Callback):
    """Somebody else's callback, whose names mean something else: torch's hook handles, a file to restore from."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def handle_requests(self) -> None: ...

    def snapshot_state(self, path: str) -> None: ...

    def restore_state(self, path: str, strict: bool) -> None: ...


def test_a_strangers_names_are_let_be(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: somebody's script that is refused, or whose methods are called with other arguments."""
    with caplog.at_level(logging.WARNING, "stabletrain"):
        assert fit(Net(), ITEMS, SkipNonFinite(), Stranger()).global_step == 2
    assert "Stranger.snapshot_state takes (path); expected ()" in caplog.text
    assert "handle" not in caplog.text
    assert not has_own_state(Stranger())


class Complete(Callback):
    handles = frozenset({RequestKind.REWARM})

    def on_stability_event(self, trainer: Any, module: Any, event: Any, **further: Any) -> None: ...

    def handle_request(self, *arguments: Any) -> None: ...

    def snapshot_state(self) -> int:
        return 1

    def restore_state(self, state: int) -> None: ...


def test_complete_hooks_pass(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a signature with *args or more than is needed is refused."""
    check_hooks([Complete(), None])
    assert has_own_state(Complete())
    assert not caplog.records
