"""Muon for the hidden matrices and AdamW for all else: one optimizer, with one state and one list of groups."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from stabletrain.errors import UserError, is_number, is_whole, require
from stabletrain_plugins.combine_muon.sharded_muon import ShardedMuon

logger = logging.getLogger("stabletrain")


class _Parts(NamedTuple):
    muon: Optimizer
    adamw: Optimizer


class MuonAdamW(Optimizer):
    """Train the hidden matrices of a network with Muon, and all other parameters with AdamW.

    A parameter is Muon's if it has two dimensions and is in a group whose ``kind`` is ``"weight"``, unless it is the
    output layer: a group of the kind ``"output"``; a matrix of the shape of an embedding, if there are not more of them
    than such embeddings and it is not square, or it is the last one; or, in a network without embeddings, the last
    matrix. Muon's rate is scaled so that its update has the RMS of AdamW's
    (``adjust_lr_fn="match_rms_adamw"``), so that one rate and one schedule serve both.

    Args:
        params: parameter groups with a ``kind``: ``"weight"``, ``"embedding"``, ``"output"``, or any other text for
            what is AdamW's. A group that holds parameters of both becomes two.
        lr: learning rate of both.
        weight_decay: decoupled, of both, >= 0; a group's own wins.
        momentum: decay of Muon's average of gradients, 0 to 1.
        nesterov: whether Muon looks ahead.
        ns_steps: iterations of Newton and Schulz that orthogonalize an update, 1 to 99.
        betas: of AdamW, each 0 to 1.
        eps: of AdamW, > 0.

    Raises:
        UserError: for groups without a ``kind``, a value that is out of range, or a torch older than 2.9.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        name = type(self).__name__
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"{name} needs torch 2.9, got {torch.__version__}: update torch (config key optimizer)")
        _check(name, lr, weight_decay, momentum, ns_steps, betas, eps)
        groups = [dict(group) if isinstance(group, dict) else group for group in params]
        self._output = _output_layer(groups, lr)
        nothing = [torch.nn.Parameter(torch.zeros(1, 1))]  # the parts get their groups from this optimizer
        self._parts = _Parts(
            ShardedMuon(
                nothing,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(nothing, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), eps=eps),
        )
        super().__init__(groups, {})
        counts = [
            sum(len(g["params"]) for g in self.param_groups if g["use_muon"] is use_muon) for use_muon in (True, False)
        ]
        logger.info("MuonAdamW: %d matrices are trained by Muon, %d other parameters by AdamW", *counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or two if it holds parameters for both; ``use_muon`` in a group says whose it is."""
        for use_muon, parameters in self._divided(param_group):
            defaults = (self._parts.muon if use_muon else self._parts.adamw).defaults
            super().add_param_group({**defaults, **param_group, "params": parameters, "use_muon": use_muon})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with both.

        Args:
            closure: computes the loss and the gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._link()
        for part in self._parts:
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts, "_output": self._output}

    def _link(self) -> None:
        """Give the parts this state and these groups: loading a checkpoint replaces both."""
        for part, use_muon in ((self._parts.muon, True), (self._parts.adamw, False)):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is use_muon]

    def _divided(self, group: dict[str, Any]) -> Iterator[tuple[bool, list[Tensor]]]:
        given = group["params"]
        parameters = [given] if isinstance(given, Tensor) else list(given)
        if "use_muon" in group:
            mine = [bool(group["use_muon"])] * len(parameters)
        else:
            mine = [group["kind"] == "weight" and p.ndim == 2 and p not in self._output for p in parameters]
        for use_muon in (True, False):
            found = [p for p, each in zip(parameters, mine, strict=True) if each is use_muon]
            if found:
                yield use_muon, found


def _output_layer(groups: Sequence[Any], lr: float) -> set[Tensor]:
    """The matrices of the output layer, among groups of the kind ``"weight"``."""
    of_kind: dict[str, list[tuple[float, Tensor]]] = {}
    for group in groups:
        if not isinstance(group, dict) or not ("kind" in group or "use_muon" in group):
            raise UserError(
                "MuonAdamW: expected parameter groups with a kind (weight, embedding, norm, bias, other), since Muon "
                f"is for hidden matrices only; got {'a group without one' if isinstance(group, dict) else 'parameters'}"
                '. Pass [{"params": hidden_matrices, "kind": "weight"}, {"params": others, "kind": "other"}]'
            )
        given = group["params"]
        found = group["params"] = [given] if isinstance(given, Tensor) else list(given)
        of_kind.setdefault(group.get("kind", ""), []).extend((float(group.get("lr", lr)), p) for p in found)
    matrices = [(rate, p) for rate, p in of_kind.get("weight", ()) if p.ndim == 2]
    if not matrices:
        return set()
    highest = max(rate for rate, _ in matrices)  # layer-wise rates fall from the output to the input
    last = [p for rate, p in matrices if rate == highest][-1]
    embeddings = Counter(p.shape for _, p in of_kind.get("embedding", ()))
    if not embeddings:
        return set() if "output" in of_kind else {last}
    output: set[Tensor] = set()
    for shape, count in embeddings.items():
        output |= _of_shape([p for _, p in matrices if p.shape == shape], count, last)
    return output


def _of_shape(matrices: Sequence[Tensor], embeddings: int, last: Tensor) -> set[Tensor]:
    """The matrices of the output layer among those that have the shape of some embeddings.

    A hidden matrix may have that shape by chance: a square one where as many positions are embedded as the network is
    wide, or one of each block. So a square one, or one of more than there are embeddings, has to be the last matrix.
    """
    is_square = any(p.shape[0] == p.shape[1] for p in matrices)
    if not is_square and len(matrices) <= embeddings:
        return set(matrices)
    return {p for p in matrices if p is last}


def _check(name: str, lr: Any, weight_decay: Any, momentum: Any, ns_steps: Any, betas: Any, eps: Any) -> None:
    def check(ok: bool, argument: str, expected: str, value: Any) -> None:
        require(ok, name, argument, expected, value, "optimizer")

    check(isinstance(lr, Tensor) or (is_number(lr) and 0 <= lr < math.inf), "lr", "a number >= 0", lr)
    check(is_number(weight_decay) and 0 <= weight_decay < math.inf, "weight_decay", "a number >= 0", weight_decay)
    check(is_number(momentum) and 0 <= momentum < 1, "momentum", ">= 0 and < 1", momentum)
    check(is_whole(ns_steps) and 1 <= ns_steps < 100, "ns_steps", "1 to 99", ns_steps)
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(is_number(each) and 0 <= each < 1 for each in betas)
    check(pair, "betas", "two numbers >= 0 and < 1", betas)
    check(is_number(eps) and 0 < eps < math.inf, "eps", "a number > 0", eps)
