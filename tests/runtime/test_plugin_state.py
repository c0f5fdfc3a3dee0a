"""A plugin's state in a checkpoint may be anything that somebody wrote: it is restored, or refused in one message."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import stabletrain
from stabletrain import UserError
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer

WRONG: tuple[Any, ...] = (None, 3, "x", [], {}, [3], {"x": 1}, torch.ones(2), -1, True)
ARGUMENTS: dict[str, dict[str, Any]] = {"ScheduleLR": {"kind": "constant"}, "ClipNorm": {"max_norm": 1.0}}


def plugin(name: str) -> Callback:
    made: Callback = getattr(stabletrain, name)(**ARGUMENTS.get(name, {}))
    return made


class Save(Callback):
    """Collects the state of a plugin, and offers it states to load within the next fit."""

    def __init__(self, plugin: Callback) -> None:
        self.plugin = plugin
        self.state: dict[str, Any] = {}
        self.offered: list[Any] = []
        self.failures: list[str] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.state = self.plugin.state_dict()

    def setup(self, *_: Any, **__: Any) -> None:
        for state in self.offered:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.plugin.load_state_dict(copy.deepcopy(state))
            except UserError as error:
                if "\n" in str(error) or self.plugin.state_key not in str(error):
                    self.failures.append(str(error))
            except Exception as error:
                self.failures.append(f"{state}: {error!r}")


def changed(state: Any) -> Iterator[Any]:
    """The state with each of its entries, at any depth, replaced by each wrong value, or removed."""
    yield from WRONG
    if isinstance(state, dict):
        for key, value in state.items():
            yield {other: each for other, each in state.items() if other != key}
            yield from ({**state, key: each} for each in changed(value))
    elif isinstance(state, list | tuple) and len(state):
        yield from (type(state)([*state[:-1], each]) for each in changed(state[-1]))


WITHOUT_STATE = ("SaveCheckpoints", "CheckpointActivations", "ClipQK")
CALLBACKS = [each for each in stabletrain._PLUGINS if issubclass(getattr(stabletrain, each), Callback)]


@pytest.mark.parametrize("name", [each for each in CALLBACKS if each not in WITHOUT_STATE])
def test_a_foreign_state_is_one_message_that_names_the_plugin(name: str) -> None:
    """Bug: KeyError, TypeError or AttributeError, of which nobody can tell the cause."""
    watcher = Save(plugin(name))
    accumulate = {"accumulate_grad_batches": getattr(watcher.plugin, "least_micro_batches", 1)}
    data = DataLoader(ToyBatches(), batch_size=None)
    quiet_trainer(watcher.plugin, watcher, max_steps=3, **accumulate).fit(ToyModule(), data)
    watcher.offered = list(changed(watcher.state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(watcher.plugin, watcher, max_steps=0, **accumulate).fit(ToyModule(), data)
    assert len(watcher.offered) > len(WRONG)
    assert watcher.failures == []
