"""Draw docs/spike.png: the same run with the same faults, without protection and with the default callbacks.

python benchmarks/picture.py       (about two minutes on 2 cores)
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
    L.seed_everything(0, verbose=False)
    module = Faulty(sample_length=0, lr=3e-3)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_steps=STEPS, callbacks=callbacks, logger=False, limit_val_batches=0, **quiet).fit(
        module, ShakespeareData()
    )
    return module.losses


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    unprotected, protected = run([]), run(st.default_callbacks())
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
    axes[0].annotate("10 corrupted\nbatches", (BURST.stop, 5.2), xytext=(8, 0), textcoords="offset points", fontsize=8)
    axes[0].annotate("NaN: every weight is lost", (NAN, 4.2), xytext=(6, 0), textcoords="offset points", fontsize=8)
    axes[1].annotate("NaN: step skipped", (NAN, 4.2), xytext=(6, 0), textcoords="offset points", fontsize=8)
    target = Path(__file__).parents[1] / "docs" / "spike.png"
    figure.savefig(target, dpi=120)
    print(f"{target}: last loss {unprotected[-1]:.3f} without, {protected[-1]:.3f} with the default callbacks")


if __name__ == "__main__":
    main()
