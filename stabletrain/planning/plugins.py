"""What each plugin will do in the planned run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer

from stabletrain.core.lengths import RunLength
from stabletrain.core.planned import Planned, Sizes, total
from stabletrain.errors import UserError
from stabletrain.planning.plan import PerRank, PluginPlan


def plans_of(
    plugins: Sequence[tuple[str, Callback]], trainer: Trainer, rank: PerRank, micro_batches: int, length: RunLength
) -> list[PluginPlan]:
    """The plan of each plugin: what its method ``planned`` says, else the first sentence about its class.

    Args:
        plugins: by their config keys, in the run's order.
        trainer: of the traced fit.
        rank: memory of a rank.
        micro_batches: in an optimizer step.
        length: of the run.
    """
    state = total(rank.parameters, rank.buffers, rank.optimizer_state)
    sizes = Sizes(state=state, batch=rank.batch, micro_batches=micro_batches, length=length)
    found = []
    for key, plugin in plugins:
        said = _said(plugin, trainer, sizes)
        found.append(
            PluginPlan(
                key=key,
                name=type(plugin).__name__,
                text=said.text,
                host_bytes=said.host_bytes,
                device_bytes=said.device_bytes,
                curve=said.curve,
            )
        )
    return found


def _said(plugin: Any, trainer: Trainer, sizes: Sizes) -> Planned:
    method = getattr(plugin, "planned", None)
    if method is None:
        return Planned(text=_first_sentence(type(plugin)))
    try:
        said: Planned = method(trainer, sizes)
    except UserError as error:  # a length that needs the length of a run that is not known
        return Planned(text=str(error))
    return said


def _first_sentence(kind: type) -> str:
    text = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()).replace("``", "")
    return text.partition(". ")[0].rstrip(".:") or kind.__name__
