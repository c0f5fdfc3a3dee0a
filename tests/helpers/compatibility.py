"""The table of docs/compatibility.md: what the default callbacks do to trainings that use one feature each.

`python tests/helpers/compatibility.py` prints the page; with ``--write`` it writes it.
"""

import functools
import importlib
import itertools
import logging
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import FEATURES, Feature
from torch import Tensor

from stabletrain import SaveCheckpoints, UserError, default_callbacks
from stabletrain.runtime.records.event_log import END
from stabletrain.testing.checks.equality import difference

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
INTRODUCTION = """# Compatibility

What `default_callbacks()` does to trainings that use one feature of Lightning or torch each. This page is written by
`python tests/helpers/compatibility.py --write`, and a test holds it equal to what happens.

- **nothing triggers**: against the same run without plugins (`clip="none"`): weights, buffers, optimizer state,
  learning rates, random generators at the end, what the module logged, and the order of the data. *identical* means
  equal bit for bit, without a word from stabletrain before the line at the end.
- **a NaN batch**: one batch in the middle is NaN. *skipped* means that one step was dropped and all weights and buffers
  are finite at the end. Steps without a loss (`training_step` returns None) are counted as skipped besides.
- **resumed**: stopped at a checkpoint in the middle and resumed in a new Trainer with another seed, with
  `resume="exactly", checkpoints="save"`. *exact* means equal, as in the first column, to the run that was not stopped.

| feature | nothing triggers | a NaN batch | resumed |
|---|---|---|---|
"""


@dataclass
class End:
    """The state of a run at its end, and what was said."""

    state: dict[str, Any]
    steps: int
    skipped: int
    said: list[str]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != END.name:
            self.texts.append(record.getMessage())


@contextmanager
def messages() -> Iterator[list[str]]:
    """What stabletrain logs, without the line at the end of every fit."""
    handler, logger = _Messages(), logging.getLogger("stabletrain")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)


def spoiler(pl: Any, at: int, spoil: str) -> Any:
    """A callback that makes the batch with number `at` of the run NaN, or its loss."""

    class Spoiler(pl.Callback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.count = 0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if self.count == at and spoil != "loss":
                parts = list(batch.values()) if isinstance(batch, dict) else batch
                for part in [batch] if isinstance(parts[0], Tensor) else parts:
                    for tensor in (part or ()) if spoil == "inputs" else part[1:]:
                        tensor.fill_(float("nan"))
            self.count += 1

    return Spoiler()


def spoil_loss(module: Any, at: int) -> None:
    """Multiply the loss of the micro-batch with number `at` by NaN."""
    step, count = module.training_step, itertools.count()

    @functools.wraps(step)
    def training_step(*arguments: Any, **named: Any) -> Any:
        output = step(*arguments, **named)
        if next(count) != at:
            return output
        return {**output, "loss": output["loss"] * math.nan} if isinstance(output, dict) else output * math.nan

    module.training_step = training_step


def watcher(pl: Any) -> Any:
    class Watcher(pl.Callback):  # type: ignore[misc, name-defined]
        """Notes the first number of every batch and the learning rates, from the first step of this process on."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self.seen.append((trainer.current_epoch, batch_idx, first_numbers(batch), rates))

    return Watcher()


def first_numbers(batch: Any) -> list[float]:
    if isinstance(batch, Tensor):
        return batch.flatten()[:1].tolist() if batch.is_floating_point() else []
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return [number for part in parts for number in first_numbers(part)]


def run(
    feature: Feature,
    pl: Any,
    protection: Sequence[Any],
    folder: Path,
    *,
    nan_at: int | None = None,
    resume: Path | None = None,
    seed: int = 1,
    steps: int | None = None,
) -> End:
    """Train; the module and the order of the data depend on the seed, unless a checkpoint is resumed."""
    pl.seed_everything(7, verbose=False)
    parts = feature.make(pl)
    spoil = [] if nan_at is None else [spoiler(pl, nan_at, feature.spoil)]
    if nan_at is not None and feature.spoil == "loss":
        spoil_loss(parts.module, nan_at)
    options: dict[str, Any] = {
        "max_steps": feature.steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, SaveCheckpoints) for each in protection),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "default_root_dir": folder,
        **{name: value(pl) if callable(value) else value for name, value in feature.options.items()},
    }
    watch = watcher(pl)
    callbacks = [*protection, *feature.callbacks(pl), *spoil, watch]
    with messages() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = (parts.trainer or pl.Trainer)(callbacks=callbacks, **options)
        data = getattr(trainer, "data_module", None) if parts.train is None else parts.train
        pl.seed_everything(seed, verbose=False)
        trainer.fit(parts.module, data, parts.validation, ckpt_path=resume and str(resume), weights_only=False)
        module = trainer.lightning_module
        own = {name: float(value) for name, value in trainer.callback_metrics.items() if name in ("tl", "vl")}
        state = {
            "module": {name: value.clone() for name, value in module.state_dict().items()},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metrics": own,
            "batches": watch.seen,
            "generators": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]],
        }
    skipped = trainer.callback_metrics.get("stability/skipped", torch.zeros(()))
    return End(state, trainer.global_step, int(skipped), [text for text in said if text])


def unchanged(feature: Feature, pl: Any, bare: End, folder: Path) -> str:
    found = run(feature, pl, default_callbacks(clip="none"), folder)
    differs = difference(bare.state, found.state)
    said = f", and says: {found.said[0]}" if found.said else ""
    return f"DIFFERENT: {differs}" if differs else f"identical{said}"


def nan_skipped(feature: Feature, pl: Any, folder: Path) -> str:
    per_step = feature.options.get("accumulate_grad_batches", 1)
    at = (feature.steps // 2 + 4) * per_step // feature.per_batch
    found = run(feature, pl, default_callbacks(clip="none"), folder, nan_at=at)
    tensors = found.state["module"]
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        return f"NOT FINITE: {broken[0]}"
    others = feature.without_loss
    return "skipped" if found.skipped == 1 + others else f"SKIPPED {found.skipped}, not {1 + others}"


def resumed(feature: Feature, pl: Any, folder: Path) -> str:
    half = feature.steps // 2 + 1
    first = SaveCheckpoints(folder / "first", every=half, keep_last=None)
    whole = run(feature, pl, [*default_callbacks(clip="none", resume="exactly"), first], folder)
    saved = sorted((folder / "first").glob("step-*"))[0]
    second = SaveCheckpoints(folder / "second", every=None)
    again = run(feature, pl, [*default_callbacks(clip="none", resume="exactly"), second], folder, resume=saved, seed=99)
    done = len(whole.state["batches"]) - len(again.state["batches"])
    whole.state["batches"] = whole.state["batches"][done:]
    if not done > 0:
        return "DIFFERENT: nothing was left out"
    differs = difference(whole.state, again.state)
    return f"DIFFERENT: {differs}" if differs else "exact"


def attempt(feature: Feature, judge: Callable[[], str]) -> str:
    """A judgement, or the first sentence of why it is refused."""
    try:
        return judge()
    except UserError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Exception as error:
        if feature.options.get("detect_anomaly") and "returned nan" in str(error):
            return "torch's own error, as asked for"
        return f"ERROR {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def row(feature: Feature, package: str = "lightning.pytorch") -> tuple[str, str, str]:
    """The three cells of a feature."""
    pl = importlib.import_module(package)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bare = run(feature, pl, [], folder)
        return (
            attempt(feature, lambda: unchanged(feature, pl, bare, folder)),
            attempt(feature, lambda: nan_skipped(feature, pl, folder)),
            attempt(feature, lambda: resumed(feature, pl, folder)),
        )


def line(feature: Feature, cells: Sequence[str]) -> str:
    merged = [cells[0], "", ""] if len(set(cells)) == 1 and cells[0].startswith("refused") else cells
    return "| " + " | ".join([feature.name, *merged]) + " |\n"


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = [word for word in sys.argv[1:] if not word.startswith("--")]
    lines = []
    for feature in FEATURES:
        if not chosen or any(word in feature.name for word in chosen):
            lines.append(line(feature, row(feature)))
            print(lines[-1], end="", flush=True)
    if "--write" in sys.argv:
        PAGE.write_text(INTRODUCTION + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
