"""Draw docs/spike.png: the same run with the same faults, without protection and with the default callbacks.

    python benchmarks/picture.py       (about two minutes on 2 cores)

Both runs have the same seed, data and learning rate, with a warm-up of 100 steps. Up to the first fault their losses
are equal bit for bit, or the script ends with an error.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import stabletrain as st
from stabletrain.workloads import CharGPT, ShakespeareData

STEPS, BURST, NAN = 600, range(250, 260), 400
SEED, RATE, LR_WARMUP = 0, 3e-3, 100


class Faulty(CharGPT):
    """The recipe's model, with ten batches of random characters, and later one batch whose loss is NaN."""

    def on_train_start(self) -> None:
        self.losses: list[float] = []
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        attempt = len(self.losses)
        if attempt in BURST:
            batch = torch.randint(0, 84, batch.shape, generator=self.generator)
        loss: Tensor = super().training_step(batch, batch_idx)
        if attempt == NAN:
            loss = loss * float("nan")
        self.losses.append(loss.item())
        return loss


def run(callbacks: list[L.Callback]) -> list[float]:
    L.seed_everything(SEED, verbose=False)
    module = Faulty(sample_length=0, lr=RATE)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [st.ScheduleLR(kind="constant", lr_warmup=LR_WARMUP), *callbacks]
    L.Trainer(max_steps=STEPS, callbacks=callbacks, logger=False, limit_val_batches=0, **quiet).fit(
        module, ShakespeareData()
    )
    return module.losses


def check_equal(unprotected: list[float], protected: list[float]) -> None:
    """Raise an error unless the losses before the first fault are equal.

    Raises:
        SystemExit: with the first step at which they differ.
    """
    differ = [step for step, pair in enumerate(zip(unprotected, protected, strict=True)) if pair[0] != pair[1]]
    if differ:
        raise SystemExit(
            f"expected equal losses before the first fault at step {BURST.start}, got {unprotected[differ[0]]!r} "
            f"without and {protected[differ[0]]!r} with protection at step {differ[0]}: a healthy step before it was "
            "clipped or dropped; choose another SEED"
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("stabletrain").setLevel(logging.ERROR)
    unprotected, protected = run([]), run(st.default_callbacks())
    check_equal(unprotected[: BURST.start], protected[: BURST.start])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, losses, title in (
        (axes[0], unprotected, "AdamW alone"),
        (axes[1], protected, "the same, with default_callbacks()"),
    ):
        ax.plot(losses, lw=0.8, color="tab:red" if ax is axes[0] else "tab:green")
        ax.axvspan(BURST.start, BURST.stop, color="0.85", zorder=0)
        ax.axvline(NAN, color="0.6", lw=0.8, ls="--")
        ax.set(title=title, xlabel="attempted step", ylim=(1.5, 6), xlim=(0, STEPS))
    axes[0].set_ylabel("training loss (nats per character)")
    for ax, at, text in (
        (axes[0], (BURST.stop, 5.3), "10 corrupted\nbatches"),
        (axes[1], (BURST.stop, 5.3), "10 corrupted\nbatches"),
        (axes[0], (NAN, 4.2), "one NaN loss:\nevery weight is lost"),
        (axes[1], (NAN, 4.2), "one NaN loss:\nstep skipped"),
    ):
        ax.annotate(text, at, xytext=(6, 0), textcoords="offset points", fontsize=8, va="center")
    target = Path(__file__).parents[1] / "docs" / "spike.png"
    figure.savefig(target, dpi=120)
    print(f"{target}: last loss {unprotected[-1]:.3f} without, {protected[-1]:.3f} with the default callbacks")


if __name__ == "__main__":
    main()
