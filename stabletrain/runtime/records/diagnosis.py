"""What is left behind when a run is given up: who was there, what the layers looked like, and how it came about."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabletrain.core.outcome import Outcome
from stabletrain.runtime import gradients, rng
from stabletrain.runtime.records.event_log import logger

LARGEST = 20
"""So many layers are named."""


def of_model(module: LightningModule, batch: Any, batch_idx: int) -> dict[str, Any]:
    """What the model looks like: where it is not finite first, and its largest layers. A collective."""
    return {
        "first_nonfinite_weight": first_nonfinite_weight(module),
        "first_nonfinite_output": first_nonfinite_output(module, batch, batch_idx),
        "largest_layers": layer_norms(module),
    }


def first_nonfinite_output(module: LightningModule, batch: Any, batch_idx: int) -> str | None:
    """The first module, in the order of execution, whose output is not finite; None if there is none, or no telling.

    Runs ``training_step`` once more without gradients; the model's buffers and the random numbers stay as they are. All
    ranks must call it.

    Args:
        module: the module that is trained.
        batch: the last batch.
        batch_idx: its number.
    """
    names = {each: name or type(module).__name__ for name, each in module.named_modules()}
    found: list[str] = []

    def look(each: nn.Module, _: Any, output: Any) -> None:
        if not found and any(not bool(t.isfinite().all()) for t in tree_leaves(output) if _is_float(t)):
            found.append(names[each])

    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with ExitStack() as stack:
        stack.enter_context(rng.preserved())
        stack.enter_context(torch.no_grad())
        logs, module.__dict__["log"] = module.__dict__.get("log"), lambda *_, **__: None
        stack.callback(_put_back, module, "log", logs)
        for each in module.modules():
            stack.callback(each.register_forward_hook(look).remove)
        try:
            with module.trainer.precision_plugin.train_step_context():
                # Lightning lets a module do without the number
                numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
                module.training_step(batch, *((batch_idx,) if numbered else ()))
        except Exception:  # a model in this state may well fail: what was seen until then counts
            pass
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else None


def first_nonfinite_weight(module: nn.Module) -> str | None:
    """The first parameter, in the order of the model, that is not finite; of sharded ones, this rank's part."""
    for name, p in module.named_parameters():
        local = gradients.local(p.detach())
        if _is_float(local) and local.numel() and not bool(local.isfinite().all()):
            return name
    return None


def layer_norms(module: nn.Module) -> list[dict[str, Any]]:
    """Norms of weights and gradients, the largest gradients first, non-finite ones before all. A collective."""
    named = [(name, p) for name, p in module.named_parameters() if p.is_floating_point()]
    if not named:
        return []
    weights = gradients.tensor_norms([p.detach() for _, p in named]).tolist()
    with_grad = [(i, p.grad) for i, (_, p) in enumerate(named) if p.grad is not None]
    grads: dict[int, float] = {}
    if with_grad:
        norms = gradients.tensor_norms([grad for _, grad in with_grad]).tolist()
        grads = dict(zip((i for i, _ in with_grad), norms, strict=True))
    rows = [
        {"parameter": name, "weight_norm": weights[i], "grad_norm": grads.get(i)} for i, (name, _) in enumerate(named)
    ]
    return sorted(rows, key=_size, reverse=True)[:LARGEST]


def write_bundle(folder: Path, report: Mapping[str, Any], outcomes: Sequence[Outcome], marks: Sequence[int]) -> None:
    """Write ``report.json``, ``outcomes.csv`` and, where matplotlib is installed, ``plot.png``.

    A disk that refuses is reported, and changes nothing about how the run ends.

    Args:
        folder: made if missing.
        report: plain values; non-finite numbers are allowed.
        outcomes: the last steps, oldest first.
        marks: attempted steps to mark in the plot: those of the rollbacks.
    """
    try:
        _write(folder, report, outcomes, marks)
    except OSError as error:
        logger.warning("the diagnosis could not be written to %s: %s", folder, error)


def _write(folder: Path, report: Mapping[str, Any], outcomes: Sequence[Outcome], marks: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(_strict(dict(report)), indent=1) + "\n", encoding="utf-8")
    with (folder / "outcomes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Outcome._fields)
        writer.writerows(outcomes)
    plot(folder / "plot.png", outcomes, marks)


def plot(path: Path, outcomes: Sequence[Outcome], marks: Sequence[int]) -> bool:
    """Draw loss and gradient norm of the last steps; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    signals: tuple[tuple[str, Callable[[Outcome], float]], ...] = (
        ("loss", lambda each: each.loss),
        ("grad_norm", lambda each: each.grad_norm),
    )
    for place, (name, value) in enumerate(signals, 1):
        axes = figure.add_subplot(2, 1, place, ylabel=name)
        finite = [(each.step, value(each)) for each in outcomes if math.isfinite(value(each))]
        if finite:
            axes.plot(*zip(*finite, strict=True), linewidth=0.8)
            top = max(y for _, y in finite)
            lost = [each.step for each in outcomes if not math.isfinite(value(each))]
            axes.plot(lost, [top] * len(lost), "rx", label="non-finite")
            skipped = [(each.step, value(each)) for each in outcomes if each.skipped and math.isfinite(value(each))]
            if skipped:
                axes.plot(*zip(*skipped, strict=True), "k.", label="skipped")
            if min(y for _, y in finite) > 0 and name == "grad_norm":
                axes.set_yscale("log")
            if lost or skipped:
                axes.legend()
        for step in marks:
            if outcomes and outcomes[0].step <= step <= outcomes[-1].step + 1:
                axes.axvline(step, color="tab:orange", linestyle=":")
        axes.grid(alpha=0.3)
    axes.set_xlabel("attempted step (dotted: rollback)")
    figure.savefig(path, dpi=100)
    return True


def _size(row: Mapping[str, Any]) -> tuple[bool, float]:
    norms = [each for each in (row["grad_norm"], row["weight_norm"]) if each is not None]
    return any(not math.isfinite(each) for each in norms), next((each for each in norms if math.isfinite(each)), 0.0)


def _strict(value: Any) -> Any:
    """Non-finite numbers as strings: strict JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _put_back(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = before
