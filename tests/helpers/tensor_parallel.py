"""Trainings of a small GPT on one process and on several that share its layers, for tests that compare them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchmetrics
from fits import Recorder, everything, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from stabletrain import (
    ClipNorm,
    FSDP2TensorParallelStrategy,
    Rollback,
    SkipNonFinite,
    TensorParallelStrategy,
    UserError,
    default_callbacks,
)
from stabletrain.workloads import CharGPT

SMALL = {"layers": 2, "heads": 4, "width": 32, "context": 16, "vocab_size": 40, "lr": 3e-3, "sample_length": 0}
BATCHES, ROWS = 20, 4


class Recorded(CharGPT):
    """Keeps the loss of each micro-batch; ``nan_at``: (batch, rank) at which the loss is NaN."""

    def __init__(self, nan_at: tuple[int, int] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(**{**SMALL, **options})
        self.losses: list[float] = []
        self.nan_at = nan_at

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = super().configure_optimizers().param_groups
        return torch.optim.AdamW(
            [{k: g[k] for k in ("params", "weight_decay")} for g in groups], lr=self.lr, fused=True
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.device_mesh is not None:  # each group of ranks sees its rows of a batch
            groups = self.device_mesh["data_parallel"]
            batch = batch[groups.get_local_rank() :: groups.size()]
        loss = super().training_step(batch, batch_idx)
        if (batch_idx, self.global_rank) == self.nan_at:
            loss = loss * torch.nan
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.losses.append(float(outputs["loss"]))


def batches(count: int = BATCHES, rows: int = ROWS) -> Tensor:
    return torch.randint(0, 40, (count * rows, 17), generator=torch.Generator().manual_seed(1))


def strategy(kind: str, **options: Any) -> Strategy:
    made = FSDP2TensorParallelStrategy if kind == "fsdp2_tp" else TensorParallelStrategy
    return made(process_group_backend="gloo", **options)


def fit(
    folder: Path,
    module: LightningModule,
    *callbacks: Callback,
    kind: Strategy | None = None,
    devices: int = 1,
    data: Tensor | None = None,
    rows: int = ROWS,
    ckpt_path: str | None = None,
    **options: Any,
) -> Trainer:
    if kind is not None:
        options |= {"strategy": kind, "devices": devices, "use_distributed_sampler": False}
    mine = trainer(*callbacks, default_root_dir=folder, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        mine.fit(module, DataLoader(batches() if data is None else data, rows), ckpt_path=ckpt_path)
    return mine


def whole_weights(module: LightningModule) -> dict[str, Tensor]:
    whole = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in module.named_parameters()}
    return {key: weight.detach().clone() for key, weight in whole.items()}


def stack(max_norm: float = 0.4) -> list[Callback]:
    """The default stack, with a fixed clip norm that most steps exceed."""
    return default_callbacks(clip=ClipNorm(max_norm))


def results(module: Recorded, recorder: Any, mine: Trainer) -> dict[str, Any]:
    return {
        "losses": module.losses,
        "outcomes": [tuple(each) for each in recorder.state],
        "weights": whole_weights(module),
        "global_step": mine.global_step,
    }


def train(
    folder: Path, kind: str | None, devices: int, options: dict[str, Any], *more: Callback, **others: Any
) -> dict[str, Any]:
    """Train a `Recorded` with the default stack; on one process for no kind."""
    recorder, module = Recorder(), Recorded(**options)
    chosen = None if kind is None else strategy(kind, **others.pop("strategy_options", {}))
    mine = fit(folder, module, *stack(), recorder, *more, kind=chosen, devices=devices, **others)
    found = results(module, recorder, mine)
    return found if kind else {**found, "trainer": mine}


# ---- called on each rank --------------------------------------------------------------------------------------------


def train_on_ranks(folder: Path, kind: str, devices: int, options: dict[str, Any]) -> dict[str, Any]:
    return train(folder, kind, devices, options)


class Damage(Callback):
    """Sets a row of a cut weight of rank 1 to NaN before one batch, once."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.at -= 1
        if self.at == 0 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net.blocks[0].mlp[0].weight.to_local()[0] = torch.nan


def roll_back(folder: Path, kind: str, devices: int) -> dict[str, Any]:
    """Damaged weights on one rank; returns the results and the number of rollbacks."""
    recorder, module = Recorder(), Recorded(qk_norm=True)
    spike = Rollback(every=4, trust_after=2)
    callbacks = default_callbacks(clip=ClipNorm(0.4), nonfinite=SkipNonFinite(max_in_a_row=2), spike=spike)
    mine = fit(folder, module, *callbacks, recorder, Damage(11), kind=strategy(kind), devices=devices)
    return {**results(module, recorder, mine), "rollbacks": spike.rollbacks}


def resume(folder: Path, kind: str, devices: int) -> dict[str, Any]:
    """Interrupt at step 8 and resume: names of the state that differs, and the weights at step 8."""
    options = {"devices": devices, "enable_checkpointing": True, "max_steps": 12}
    saver = ModelCheckpoint(folder, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    exact = default_callbacks(clip=ClipNorm(0.4), resume="exactly")
    module = Recorded(qk_norm=True, dropout=0.2)
    before = fit(folder, module, *exact, saver, KeepAt(8), kind=strategy(kind), **options)
    exact = default_callbacks(clip=ClipNorm(0.4), resume="exactly")
    path = str(folder / "step=8.ckpt")
    after = fit(folder, Recorded(qk_norm=True, dropout=0.2), *exact, kind=strategy(kind), ckpt_path=path, **options)
    whole, resumed = everything(before), everything(after)
    return {
        "differ": [name for name, value in whole.items() if not torch.equal(value, resumed[name])],
        "count": len(whole),
        "kept": KeepAt.weights,
    }


class KeepAt(Callback):
    """Keeps the whole weights after a step, for `resume`."""

    weights: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            KeepAt.weights = whole_weights(pl_module)


def load_single_file(folder: Path, kind: str, devices: int, path: str) -> dict[str, Any]:
    """Resume from a checkpoint of one process, and train on."""
    return train(folder, kind, devices, {"qk_norm": True}, ckpt_path=path, max_epochs=2, data=batches(6))


def message_of(folder: Path, module: LightningModule, **options: Any) -> str:
    """The message of the `UserError` that a fit ends with; all ranks must get one."""
    try:
        chosen = strategy("tensor_parallel", **options)
        fit(folder, module, SkipNonFinite(), kind=chosen, devices=2, limit_train_batches=2)
    except UserError as error:
        return str(error)
    return "no error"


def wrong_plans(folder: Path) -> dict[str, str]:
    """By case, the message."""
    plan = CharGPT.tensor_parallel_plan
    qkv, norms = "net.blocks.*.attention.qkv", "net.blocks.*.attention.*_norm"
    cases = {
        "equal parts": {**plan, qkv: "colwise"},
        "heads not divided": {k: v for k, v in plan.items() if v != "divide"},
        "no partial": {k: v for k, v in plan.items() if k != norms},
        "partial outside": {**plan, "net.norm": "partial"},
        "no rowwise": {k: v for k, v in plan.items() if k != "net.blocks.*.mlp.2"},
    }
    found = {name: message_of(folder, Recorded(qk_norm=True), plan=each) for name, each in cases.items()}
    found["right"] = message_of(folder, Recorded(qk_norm=True))
    found["unchecked"] = message_of(folder, Recorded(qk_norm=True), plan=cases["no partial"], check=False)
    found["nan at first"] = message_of(folder, Recorded(qk_norm=True, nan_at=(0, 1)), plan=cases["no partial"])
    found["early optimizer"] = message_of(folder, EarlyOptimizer())
    validated, chosen = Recorded(qk_norm=True), {"plan": cases["no partial"]}
    options = {"devices": 2, "default_root_dir": folder, "use_distributed_sampler": False}
    trainer(strategy=strategy("tensor_parallel", **chosen), **options).validate(validated, DataLoader(batches(1), 4))
    found["after a validation"] = message_of(folder, validated, **chosen)
    found["other batches"] = message_of(folder, OtherBatches())
    return found


class EarlyOptimizer(Recorded):
    """Makes its optimizer before it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.made


class OtherBatches(Recorded):
    """Its ranks get different batches."""

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch.roll(self.global_rank)


def check_leaves_no_trace(folder: Path) -> list[str]:
    """Train with and without the check, with dropout, a metric and a buffer; what differs."""
    found = []
    for check in (True, False):
        module = Traces(qk_norm=True, dropout=0.3)
        mine = fit(folder, module, kind=strategy("tensor_parallel", check=check), devices=2, max_steps=3)
        found.append({**everything(mine), "random": torch.get_rng_state(), "calls": torch.tensor(module.seen)})
        found[-1]["logged"] = torch.tensor(float(mine.callback_metrics["loss"]))
        found[-1]["hidden"] = module.hidden
        found[-1]["metric"] = module.metric.compute()
    return [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]


class Traces(Recorded):
    """Everything that a call of training_step may leave."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("calls", torch.zeros(()))
        self.hidden = torch.zeros(())
        self.metric = torchmetrics.MeanMetric()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.calls += 1
        self.hidden = self.hidden + loss.detach()
        self.metric.update(loss.detach())
        self.seen.append(float(loss.detach()))
        self.log("loss", loss)
        return loss


def dropout(folder: Path, share: float) -> dict[str, Any]:
    """Train with dropout in the residual stream only, or everywhere; and masks within cut regions."""
    masks: list[Tensor] = []
    module = Recorded(dropout=share)
    inside = nn.Sequential(*module.net.blocks[0].mlp[:2], nn.Dropout(share), *module.net.blocks[0].mlp[2:])
    module.net.blocks[0].mlp = inside
    inside[2].register_forward_hook(lambda each, _, output: masks.append(output == 0) if each.training else None)
    plan = {**CharGPT.tensor_parallel_plan, "net.blocks.0.mlp.3": "rowwise"}
    plan = {key: style for key, style in plan.items() if key != "net.blocks.*.mlp.2"} | {
        "net.blocks.1.mlp.2": "rowwise"
    }
    recorder = Recorder()
    mine = fit(folder, module, recorder, kind=strategy("tensor_parallel", plan=plan), devices=2, max_steps=4)
    return {**results(module, recorder, mine), "masks": masks, "random": torch.get_rng_state()}
