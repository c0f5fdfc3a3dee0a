"""After a fit, optimizer and module are as after a fit with Lightning alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stabletrain.testing.checks.equality import difference
from stabletrain.testing.checks.pickling import make_copies
from stabletrain.testing.checks.training import SPIKES, parts
from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject, choice


def fit_leaves_no_changes(subject: Subject) -> None:
    """No attribute, hook or wrapper remains on optimizer and module; the plugin itself can still be copied."""
    for option in subject.representatives():
        for raise_at in (None, 5):
            end = "a fit" if raise_at is None else "an exception in the module"
            bare = _attributes_after_fit(subject, option, [], raise_at)
            made = parts(subject, option).callbacks
            found = difference(bare, _attributes_after_fit(subject, option, made, raise_at))
            if found:
                wrong(f"{choice(option)} to restore module and optimizer after {end}", f"changed: {found}")
            for callback in made:
                make_copies(callback, f"{choice(option)} after {end}")


def _attributes_after_fit(subject: Subject, option: Any, callbacks: list[Any], raise_at: int | None) -> dict[str, Any]:
    """The names of instance attributes and the numbers of hooks of module and optimizer after a fit."""
    from stabletrain.testing.toy import ToyError, fit

    factory = _Factory()
    with TemporaryDirectory() as folder:
        try:
            module: Any = fit(
                Path(folder), callbacks, faults=SPIKES, watch=False, raise_at=raise_at, make_optimizer=factory
            ).module
        except ToyError:
            module = None
    return {
        "optimizer": _attributes(factory.optimizer),
        "param_groups": [sorted(map(str, group)) for group in factory.optimizer.param_groups],
        "parameters": [_attributes(each) for group in factory.optimizer.param_groups for each in group["params"]],
        "module": {} if module is None else {name: _attributes(each) for name, each in module.named_modules()},
    }


class _Factory:
    """Makes the optimizer and stores it; a top-level class, so that the module that refers to it can be pickled."""

    optimizer: Any = None

    def __call__(self, parameters: list[Any]) -> Any:
        from torch.optim import AdamW

        self.optimizer = AdamW(parameters, lr=1e-3)
        return self.optimizer


def _attributes(thing: Any) -> dict[str, int]:
    """Names of the instance attributes; for dictionaries of hooks, with the number of hooks."""
    hooks = {
        name: len(value) for name, value in vars(thing).items() if "hook" in name and isinstance(value, dict) and value
    }
    return {**dict.fromkeys(vars(thing), 0), **hooks}
