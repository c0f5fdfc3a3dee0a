"""A plugin does the same under ``pytorch_lightning`` as under ``lightning.pytorch``."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from stabletrain.testing.checks.equality import difference
from stabletrain.testing.checks.training import SPIKES, has_repeatable_state, parts, train
from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject, choice


def both_packages_agree(subject: Subject) -> None:
    """With faults, a run with the Trainer of ``pytorch_lightning`` equals one with that of ``lightning.pytorch``."""
    from stabletrain.testing.trainer import trained_with

    faults = {**SPIKES, 20: math.nan}
    with TemporaryDirectory() as folder:
        for option in subject.representatives():
            one = train(Path(folder), parts(subject, option), faults=faults)
            with trained_with("pytorch_lightning"):
                other = train(Path(folder), parts(subject, option), faults=faults)
            for what, mine, theirs in (
                ("weights", one.weights, other.weights),
                ("optimizer state", one.optimizer, other.optimizer),
                ("plugin state", one.states, other.states) if has_repeatable_state(subject) else ("", None, None),
                ("outcomes", one.outcomes, other.outcomes),
                ("learning rates", one.rates, other.rates),
                ("end", one.stopped, other.stopped),
            ):
                if found := difference(mine, theirs):
                    wrong(f"{choice(option)} to do the same under pytorch_lightning", f"different {what}: {found}")
