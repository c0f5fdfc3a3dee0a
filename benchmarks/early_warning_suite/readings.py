"""All readings of one step of training, computed as the monitors compute them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from stabletrain.runtime.observing.attention import AttentionCall, AttentionCalls, entropy, largest_logit, logit_bound
from stabletrain.runtime.observing.losses import LossCall, LossCalls
from stabletrain.runtime.observing.outputs import Output, Outputs
from torch import Tensor, nn

from early_warning_suite.models import after_last_hidden_state
from stabletrain.runtime import gradients


class Reading(NamedTuple):
    """A number that may rise before the loss does.

    Args:
        key: in the record.
        name: in the tables.
        source: where a user gets it; empty: nowhere.
        published: a limit from the literature; None: there is none.
    """

    key: str
    name: str
    source: str = "monitor_activations"
    published: float | None = None


READINGS = (
    Reading("update", "update over weight, whole model", ""),
    Reading("update_most", "update over weight, largest of a matrix", "monitor_gradients"),
    Reading("bound", "attention bound", published=100.0),
    Reading("logit", "largest attention logit", published=100.0),
    Reading("entropy", "1 / smallest attention entropy"),
    Reading("output", "largest output logit"),
    Reading("log_z", "output logsumexp"),
    Reading("hidden", "RMS of the last hidden state", ""),
    Reading("rms", "RMS, largest of a module"),
    Reading("largest", "largest activation"),
    Reading("zeros", "share of zeros, largest of a module"),
    Reading("rms_t", "RMS_t, largest of a tensor", published=2.3),
    Reading("spectral", "spectral norm, largest of a matrix"),
    Reading("weight_norm", "weight norm", "monitor_gradients"),
    Reading("grad_norm", "gradient norm", "guard"),
    Reading("norm_slope", "slope of the gradient norm", ""),
    Reading("loss_change", "deviation of the loss's changes", ""),
    Reading("sharpness", "sharpness", "", published=1.0),
    Reading("loss_rise", "rise of the 10-step loss", ""),
)
"""All readings; a larger one is worse."""
FEW = frozenset({"sharpness"})
"""Readings of every 50th step."""
LINEAR = frozenset({"norm_slope"})
"""Readings that may be negative."""

_NO_ENTROPY, _LEAST_NORM = 1e-3, 1e-3
"""Added to an entropy, which may be 0; norm of a matrix below which its update is not divided by it."""


class Reader:
    """Reads steps of training, each in the order `forward`, `before_step`, `after_step`; with one transfer to the host.

    Args:
        net: the network.
        optimizer: of all its parameters.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net, self.optimizer = net, optimizer
        self._parameters = list(net.parameters())
        self._matrices = [i for i, p in enumerate(self._parameters) if p.ndim > 1]
        self._values: dict[str, Tensor] = {}
        self._of_modules: list[Tensor] = []
        self._of_attention: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._directions: dict[int, Tensor] = {}
        after_last_hidden_state(net).register_forward_pre_hook(self._hidden)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass and the loss: outputs of modules, attention, logits."""
        self._values, self._of_modules, self._of_attention = {}, [], []
        with Outputs(self.net, self._output), AttentionCalls(self.net, self._attends), LossCalls(self._loss):
            yield

    @torch.no_grad()
    def before_step(self) -> None:
        """After the backward pass: gradients and weights."""
        self._weights = [p.detach().clone() for p in self._parameters]
        self._values |= {
            "grad_norm": gradients.global_norm(gradients.of(self._parameters)),
            "weight_norm": gradients.global_norm(self._weights),
            "spectral": torch.stack([self._spectral_norm(i) for i in self._matrices]).max(),
        }
        rms, largest, zeros = torch.stack(self._of_modules).amax(0).unbind()
        self._values |= {"rms": rms, "largest": largest, "zeros": zeros}
        if self._of_attention:
            bound, logit, calm = torch.stack(self._of_attention).amax(0).unbind()
            self._values |= {"bound": bound, "logit": logit, "entropy": calm}

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        """After the optimizer step: all readings of the step by name, and ``loss``."""
        changes = torch._foreach_sub([p.detach() for p in self._parameters], self._weights)
        moved, norms = gradients.tensor_norms(changes), gradients.tensor_norms(self._weights)
        self._values |= {
            "update": moved.norm() / norms.norm(),
            "update_most": (moved / norms.clamp_min(_LEAST_NORM))[self._matrices].max(),
        }
        if ratios := [ratio for p in self._parameters if (ratio := self._rms_t(p)) is not None]:
            self._values["rms_t"] = torch.stack(ratios).max()
        return dict(zip(self._values, torch.stack([*self._values.values()]).tolist(), strict=True))

    def _hidden(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._values["hidden"] = _rms(inputs[0].detach())

    def _output(self, output: Output) -> None:
        if not output.again:
            x = output.tensor.float()
            zeros = (x == 0).float().mean() if output.kind == "relu" else x.new_zeros(())
            self._of_modules.append(torch.stack([_rms(x), x.abs().max(), zeros]))

    @torch.no_grad()
    def _loss(self, call: LossCall) -> None:
        assert call.value is not None, "the loss was computed"
        logits = call.input.float()
        self._values |= {
            "loss": call.value.float(),
            "output": logits.abs().max(),
            "log_z": logits.logsumexp(-1).mean(),
        }

    def _attends(self, call: AttentionCall) -> None:
        calm = 1 / (entropy(call).min() + _NO_ENTROPY)
        self._of_attention.append(torch.stack([logit_bound(call).max(), largest_logit(call).max(), calm]))

    def _spectral_norm(self, index: int) -> Tensor:
        """One power iteration a step, from the direction of the step before."""
        matrix = self._weights[index].flatten(1)
        direction = self._directions.get(index)
        if direction is None:
            direction = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(index))
        left = matrix @ (direction / direction.norm().clamp_min(1e-30))
        self._directions[index] = matrix.T @ (left / left.norm().clamp_min(1e-30))
        return left.norm()

    def _rms_t(self, parameter: Tensor) -> Tensor | None:
        """Root of the mean of g^2 over the second moment after the step, without rows whose moment is 0."""
        state = self.optimizer.state.get(parameter, {})
        if parameter.grad is None or "exp_avg_sq" not in state:
            return None
        moment = state["exp_avg_sq"] / (1 - self.optimizer.param_groups[0]["betas"][1] ** float(state["step"]))
        used = (moment > 0).flatten(1).any(1) if moment.ndim > 1 else moment > 0
        ratios = parameter.grad[used].square() / moment[used].clamp_min(1e-30)
        return ratios.mean().sqrt() if ratios.numel() else None


def _rms(x: Tensor) -> Tensor:
    return x.float().norm() / math.sqrt(x.numel())
