"""The report that is written when a plugin stops a run: layer norms, first non-finite module, last outcomes."""

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
"""Number of layers in the report."""


def of_model(module: LightningModule, batch: Any, batch_idx: int) -> dict[str, Any]:
    """Return the first non-finite weight and output, and the layers with the largest norms. A collective."""
    return {
        "first_nonfinite_weight": first_nonfinite_weight(module),
        "first_nonfinite_output": first_nonfinite_output(module, batch, batch_idx),
        "largest_layers": layer_norms(module),
    }


def first_nonfinite_output(module: LightningModule, batch: Any, batch_idx: int) -> str | None:
    """Return the first module, in the order of execution, with a non-finite output; None if none is found.

    Runs ``training_step`` once more without gradients; buffers and random generators are restored. A collective.

    Args:
        module: the trained module.
        batch: the last batch.
        batch_idx: its index.
    """
    names = {each: name or type(module).__name__ for name, each in module.named_modules()}
    found: list[str] = []

    def check_output(each: nn.Module, _: Any, output: Any) -> None:
        if not found and any(not bool(t.isfinite().all()) for t in tree_leaves(output) if _is_float(t)):
            found.append(names[each])

    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with ExitStack() as stack:
        stack.enter_context(rng.preserved())
        stack.enter_context(torch.no_grad())
        logs, module.__dict__["log"] = module.__dict__.get("log"), lambda *_, **__: None
        stack.callback(_restore, module, "log", logs)
        for each in module.modules():
            stack.callback(each.register_forward_hook(check_output).remove)
        try:
            with module.trainer.precision_plugin.train_step_context():
                # Lightning allows a training_step without batch_idx
                takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
                module.training_step(batch, *((batch_idx,) if takes_index else ()))
        except Exception:  # a broken model may raise; the modules before that were checked
            pass
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else None


def first_nonfinite_weight(module: nn.Module) -> str | None:
    """Return the first parameter that is not finite; of sharded parameters, only this rank's shard is checked."""
    for name, p in module.named_parameters():
        local = gradients.local(p.detach())
        if _is_float(local) and local.numel() and not bool(local.isfinite().all()):
            return name
    return None


def layer_norms(module: nn.Module) -> list[dict[str, Any]]:
    """Return the norms of weights and gradients, non-finite ones first, then by gradient norm. A collective."""
    named = [(name, p) for name, p in module.named_parameters() if p.is_floating_point() or p.is_complex()]
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
    return sorted(rows, key=_sort_key, reverse=True)[:LARGEST]


def write_bundle(folder: Path, report: Mapping[str, Any], outcomes: Sequence[Outcome], marks: Sequence[int]) -> None:
    """Write ``report.json``, ``outcomes.csv`` and, where matplotlib is installed, ``plot.png``.

    If the files cannot be written, a warning is logged and nothing is raised.

    Args:
        folder: made if missing.
        report: plain values, which may be non-finite.
        outcomes: the last steps, oldest first.
        marks: attempted steps of rollbacks, marked in the plot.
    """
    try:
        _write(folder, report, outcomes, marks)
    except OSError as error:
        logger.warning("the diagnosis could not be written to %s: %s", folder, error)


def _write(folder: Path, report: Mapping[str, Any], outcomes: Sequence[Outcome], marks: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(_to_json(dict(report)), indent=1) + "\n", encoding="utf-8")
    with (folder / "outcomes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Outcome._fields)
        writer.writerows(outcomes)
    plot(folder / "plot.png", outcomes, marks)


def plot(path: Path, outcomes: Sequence[Outcome], marks: Sequence[int]) -> bool:
    """Plot loss and gradient norm of the last steps; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    signals: tuple[tuple[str, Callable[[Outcome], float]], ...] = (
        ("loss", lambda each: each.loss),
        ("grad_norm", lambda each: each.grad_norm),
    )
    for row, (name, value) in enumerate(signals, 1):
        axes = figure.add_subplot(2, 1, row, ylabel=name)
        finite = [(each.step, value(each)) for each in outcomes if math.isfinite(value(each))]
        if finite:
            axes.plot(*zip(*finite, strict=True), linewidth=0.8)
            top = max(y for _, y in finite)
            nonfinite = [each.step for each in outcomes if not math.isfinite(value(each))]
            axes.plot(nonfinite, [top] * len(nonfinite), "rx", label="non-finite")
            skipped = [(each.step, value(each)) for each in outcomes if each.skipped and math.isfinite(value(each))]
            if skipped:
                axes.plot(*zip(*skipped, strict=True), "k.", label="skipped")
            if min(y for _, y in finite) > 0 and name == "grad_norm":
                axes.set_yscale("log")
            if nonfinite or skipped:
                axes.legend()
        for step in marks:
            if outcomes and outcomes[0].step <= step <= outcomes[-1].step + 1:
                axes.axvline(step, color="tab:orange", linestyle=":")
        axes.grid(alpha=0.3)
    axes.set_xlabel("attempted step (dotted: rollback)")
    figure.savefig(path, dpi=100)
    return True


def _sort_key(row: Mapping[str, Any]) -> tuple[bool, float]:
    norms = [each for each in (row["grad_norm"], row["weight_norm"]) if each is not None]
    return any(not math.isfinite(each) for each in norms), next((each for each in norms if math.isfinite(each)), 0.0)


def _to_json(value: Any) -> Any:
    """Replace non-finite numbers by strings, since strict JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    return value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = before
