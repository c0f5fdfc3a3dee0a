"""A run that was resumed from a checkpoint equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from stabletrain.errors import UserError
from stabletrain.testing.checks.equality import difference
from stabletrain.testing.checks.training import SPIKES, parts, train, trainable
from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject, choice

if TYPE_CHECKING:
    from stabletrain.testing.toy import Fitted

CUTS = (4, 72, 88)
"""Batches done at the checkpoints: in the warm-up of a rule, just after a fault, late."""


def resumed_equals_uninterrupted(subject: Subject) -> None:
    """After a resume, weights, optimizer state, plugin state and learning rates are bit-identical to those without."""
    import torch

    with TemporaryDirectory() as name:
        folder = Path(name)
        for option in trainable(subject):
            files = {cut: folder / f"{option.name}-{cut}.ckpt" for cut in CUTS}
            whole = train(folder, parts(subject, option), faults=SPIKES, save=files)
            for cut, file in files.items():
                if not file.is_file():
                    wrong(f"{choice(option)} to let the run reach batch {cut}", f"it was stopped: {whole.stopped}")
                try:
                    torch.load(file, weights_only=True)
                except Exception as error:
                    wrong(
                        f"a checkpoint with {choice(option)} to load with weights_only=True (state: tensors and plain "
                        f"Python types)",
                        str(error).strip().splitlines()[0],
                    )
                # the data start at the checkpoint's batch; a callback may also restore the position in all data itself
                starts = (cut, 0) if subject.plugin.kind == "callback" else (cut,)
                found = []
                for start in starts:
                    try:
                        rest = train(folder, parts(subject, option), faults=SPIKES, start=start, resume=file)
                        found.append(_difference(whole, rest, cut))
                    except UserError as error:
                        found.append(f"UserError: {error}")
                    if found[-1] is None:
                        break
                if found[-1] is not None:
                    wrong(
                        f"{choice(option)}, resumed after batch {cut}, to end as the uninterrupted run", str(found[0])
                    )


def _difference(whole: Fitted, rest: Fitted, cut: int) -> str | None:
    for what, one, other in (
        ("weights", whole.weights, rest.weights),
        ("optimizer state", whole.optimizer, rest.optimizer),
        ("plugin state", whole.states, rest.states),
        ("outcomes", whole.outcomes[cut:], rest.outcomes),
        ("learning rates", whole.rates[cut:], rest.rates),
    ):
        if found := difference(one, other):
            return f"different {what}: {found}"
    return None
