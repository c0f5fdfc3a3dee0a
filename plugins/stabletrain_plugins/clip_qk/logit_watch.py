"""The largest attention logit of each head in the forward passes of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from stabletrain.errors import UserError
from stabletrain.runtime.observing.attention import AttentionCall, AttentionCalls, largest_logit
from stabletrain_plugins.clip_qk.projections import Projection
from stabletrain_plugins.clip_qk.row_check import mismatch


class LogitWatch:
    """Sees the attention of the projections while it is open, and checks once for each that its rows are scalable.

    Args:
        module: that is trained.
        projections: of it.
        steps: number of optimizers, each of which takes the logits since its own last step.
        setting: the config key of an argument, or the argument of a script.
    """

    def __init__(
        self, module: nn.Module, projections: Sequence[Projection], steps: int, setting: Callable[[str], str]
    ) -> None:
        self._projections = projections
        self._setting = setting
        self._device = projections[0].rows[0].parameter.device
        self._starts = [sum(each.heads for each in projections[:i]) for i in range(len(projections) + 1)]
        self._of_name: dict[str, int | None] = {}
        self._seen = [self._nothing() for _ in range(steps)]
        self._unchecked = dict.fromkeys(range(len(projections)))
        self._has_begun: set[int] = set()
        self._is_first, self._has_warned = True, False
        self._outputs: dict[int, Tensor] = {}
        self._handles: dict[int, list[Any]] = {i: self._keep_outputs(each) for i, each in enumerate(projections)}
        self._calls = AttentionCalls(module, self._see)
        self.open, self.close = self._calls.open, self._calls.close

    def take(self, step: int) -> Tensor:
        """The largest logits since the last call, (heads,), -inf where none was seen; the heads of all projections.

        Args:
            step: which optimizer's.
        """
        taken, self._seen[step] = self._seen[step], self._nothing()
        return taken

    def forget(self) -> None:
        """Forget the logits of a step that is not made."""
        self._seen = [self._nothing() for _ in self._seen]

    def end_first_step(self) -> None:
        """The forward passes of the first step that uses a projection are over.

        Raises:
            UserError: if a projection was used without an attention call that can be seen.
        """
        if not self._is_first:
            return
        unseen = [each for i, each in enumerate(self._projections) if i not in self._has_begun]
        for each in unseen:
            if id((each.modules or (None,))[0]) in self._outputs:
                self._wrong(
                    f"no attention call was seen in {each.home or 'the module'}, to which {each.name} belongs. Logits "
                    "are seen in F.scaled_dot_product_attention and nn.MultiheadAttention, not in attention that is "
                    "computed otherwise. Use the former, or match other modules"
                )
        self._is_first = not self._has_begun
        if unseen and not self._has_warned:
            self._has_warned = True
            names = ", ".join(each.name for each in unseen)
            rank_zero_warn(f"clip_qk: not used in the first step, and not scaled while it is not: {names}")

    def stop(self) -> None:
        """Close it, and remove all hooks; a second call does nothing."""
        self.close()
        for handles in self._handles.values():
            for each in handles:
                each.remove()
        self._outputs.clear()

    def _nothing(self) -> Tensor:
        return torch.full((self._starts[-1],), -math.inf, device=self._device)

    def _keep_outputs(self, projection: Projection) -> list[Any]:
        """Keep the last outputs of its modules until they are compared with the queries and keys of a call."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[id(module)] = output.detach()

        return [each.register_forward_hook(keep) for each in dict.fromkeys(projection.modules or ())]

    def _see(self, call: AttentionCall) -> None:
        if call.name not in self._of_name:
            self._of_name[call.name] = _nearest(call.name, [each.home for each in self._projections])
        at = self._of_name[call.name]
        if at is None:
            return
        self._has_begun.add(at)
        projection = self._projections[at]
        if call.heads != projection.heads:
            self._wrong(
                f"the attention in {projection.home} has {call.heads} heads of queries, and {projection.name} "
                f"{projection.heads}. Set heads to their number; heads that are divided between ranks (tensor "
                "parallelism) are not supported",
                "heads",
            )
        if at in self._unchecked:
            self._check(at, call)
        largest = largest_logit(call)
        # what is not finite is unknown: other micro-batches and ranks still count
        largest = torch.where(torch.isfinite(largest), largest, -math.inf)
        for seen in self._seen:
            mine = seen[self._starts[at] : self._starts[at + 1]]
            torch.maximum(mine, largest, out=mine)

    def _check(self, at: int, call: AttentionCall) -> None:
        projection = self._projections[at]
        if projection.modules is not None:
            outputs = [self._outputs.get(id(each)) for each in projection.modules]
            if outputs[0] is None or outputs[1] is None:
                self._wrong(f"{projection.home} has an attention call, but does not call {projection.name} before it")
            problem = mismatch(call, projection, outputs[0], outputs[1])
            if problem is None:
                return
            if problem:
                self._wrong(
                    f"scaling {projection.name} would not scale the logits of {projection.home}: {problem}. The rule "
                    "does not apply to queries and keys that are normalised (qk-norm, which bounds the logits itself) "
                    "or compressed (MLA); a fused projection must have the rows of all queries, of all keys, then of "
                    "all values. Match other modules, or remove the plugin (config key plugins/qk=none)"
                )
        del self._unchecked[at]
        for each in self._handles.pop(at):
            each.remove()
        for module in projection.modules or ():
            self._outputs.pop(id(module), None)

    def _wrong(self, reason: str, argument: str | None = None) -> NoReturn:
        separate = len(set(map(id, self._projections[0].modules or ()))) == 2
        raise UserError(f"clip_qk: {self._setting(argument or ('query' if separate else 'qkv'))}: {reason}")


def _nearest(name: str, homes: Sequence[str]) -> int | None:
    """The home of an attention call: the module that calls it, the nearest one around it, or the only one within it.

    >>> _nearest("blocks.1.attention.core", ["blocks.0.attention", "blocks.1.attention"])
    1
    >>> _nearest("blocks.1", ["blocks.0.attention", "blocks.1.attention"])
    1
    >>> _nearest("blocks", ["blocks.0.attention", "blocks.1.attention"]) is None
    True
    """
    around = [i for i, home in enumerate(homes) if _contains(home, name)]
    if around:
        return max(around, key=lambda i: len(homes[i]))
    within = [i for i, home in enumerate(homes) if _contains(name, home)]
    return within[0] if len(within) == 1 else None


def _contains(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")
