"""The comparison of all copies, without the optimizer state that each rank has for itself by design."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.guard.replica_parts import Part, parameter_parts, state_parts
from stabletrain.runtime.guard.replicas import Difference, compare
from stabletrain.runtime.internals import shards
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records.event_log import logger


class ReplicaComparison:
    """Compares parameters and optimizer state of one fit.

    Args:
        ranks: of the fit, more than one.
        module: that is trained.
        optimizers: of the module.
        left_out: keys of optimizer state that are not compared; None: the first comparison finds them.
    """

    def __init__(
        self, ranks: Ranks, module: nn.Module, optimizers: Sequence[Optimizer], left_out: Iterable[str] | None
    ) -> None:
        self._ranks, self._module, self._optimizers = ranks, module, optimizers
        self.left_out = None if left_out is None else frozenset(left_out)
        """Keys of optimizer state that each rank has for itself."""
        self.is_empty = False
        """Whether no rank holds anything of which another has a copy; known after the first comparison."""

    def differences(self) -> list[Difference]:
        """What differs; the same answer on all ranks. A collective."""
        held = self._held()
        if self.left_out is not None:
            return compare(self._ranks, held.items())
        self.is_empty = self._ranks.max(len(held)) == 0
        found = [] if self.is_empty else compare(self._ranks, held.items())
        self.left_out = self._by_design(held, found) if found else frozenset()
        return [each for each in found if each.part.state not in self.left_out]

    @torch.no_grad()
    def repair(self, found: Sequence[Difference]) -> None:
        """Copy the tensors of the majority to the ranks that deviate, in place. A collective.

        Args:
            found: differences, each with a source.
        """
        held = self._held()
        for each in found:
            assert each.source is not None
            mine = held.get(each.part)
            sent = mine.cpu() if mine is not None and self._ranks.number == each.source else None
            value = self._ranks.broadcast(sent, each.source)
            if mine is not None and value is not None and self._ranks.number in each.ranks:
                mine.copy_(value)

    def _held(self) -> dict[Part, Tensor]:
        shards.reshard(self._module)  # after a validation
        held = dict(parameter_parts(self._ranks, self._module))
        for part, tensor in state_parts(self._ranks, self._module, self._optimizers):
            if self.left_out is None or part.state not in self.left_out:
                held[part] = tensor
        return held

    def _by_design(self, held: Iterable[Part], found: Sequence[Difference]) -> frozenset[str]:
        """Keys whose state differs for most parameters after the first step, while all parameters are equal.

        That is no damage: an optimizer keeps there what is its rank's alone, such as the error of a compression.
        """
        if any(not each.part.state for each in found):
            return frozenset()
        everyone = {part for rank in self._ranks.gather(list(held)) for part in rank}
        all_of, differing = (Counter(part.state for part in some) for some in (everyone, {each.part for each in found}))
        keys = frozenset(key for key, count in differing.items() if 2 * count > all_of[key])
        if keys and self._ranks.is_first:
            logger.warning(
                "check_replicas: the optimizer's %s differs between ranks for most parameters from the first step on, "
                "while the parameters are equal: it is taken for state that each rank has for itself, and not compared",
                ", ".join(sorted(keys)),
            )
        return keys
