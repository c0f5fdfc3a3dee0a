"""Run by two processes: one rank has no loss for a batch; the result is compared with a fit that never saw its step."""

import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import fits
import torch
import torch.distributed as dist
import two_ranks
from fits import EventRecorder, Recorder, everything
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from stabletrain import AccumulateMean, ClipNorm, Guard, SkipNonFinite, default_callbacks

STEPS = 6


class Case(NamedTuple):
    """A fit in which a rank has no loss for some batches.

    Args:
        missing: batches for which it has none, of `STEPS` windows.
        how: ``none``; ``none after forward``; ``leaf``: a zero that is not connected to the model; ``scaled leaf``: one
            with a graph; ``dict``: the leaf in a dictionary; ``batch``: the loader gives None.
        ranks: that have none.
        accumulate: micro-batches in a window.
        mode: of the guard.
        fp16: with a loss scaler.
        ddp: arguments of DistributedDataParallel.
        net: ``plain``, ``sparse``, ``unused`` (each rank leaves out another layer), ``checkpoint`` (reentrant) or
            ``decorated`` (its ``training_step``).
    """

    missing: tuple[int, ...] = (2,)
    how: str = "none"
    ranks: tuple[int, ...] = (1,)
    accumulate: int = 1
    mode: Any = "exact"
    fp16: bool = False
    ddp: tuple[str, ...] = ()
    net: str = "plain"


CASES = {
    "none": Case(),
    "none on rank 0": Case(ranks=(0,)),
    "none at first and last": Case(missing=(0, 5)),
    "after forward": Case(how="none after forward"),
    "leaf": Case(how="leaf"),
    "leaf at the end of a window": Case(how="leaf", missing=(7, 8), accumulate=3),
    "scaled leaf": Case(how="scaled leaf"),
    "dict": Case(how="dict"),
    "batch": Case(how="batch"),
    "batch, in a window": Case(how="batch", missing=(6, 11), accumulate=3),
    "decorated": Case(net="decorated"),
    "inside a window": Case(missing=(7,), accumulate=3),
    "first of a window": Case(missing=(6,), accumulate=3, how="none after forward"),
    "last of a window": Case(missing=(8,), accumulate=3),
    "a whole window": Case(missing=(6, 7, 8), accumulate=3, how="none after forward"),
    "device": Case(missing=(2, 3), mode="device"),
    "device, in a window": Case(missing=(4,), accumulate=2, mode="device", how="none after forward"),
    "fp16": Case(fp16=True),
    "fp16, in a window": Case(fp16=True, missing=(4, 7), accumulate=2),
    "find_unused": Case(ddp=("find_unused_parameters",), net="unused"),
    "find_unused, leaf": Case(ddp=("find_unused_parameters",), net="unused", how="leaf"),
    "static_graph": Case(ddp=("static_graph",)),
    "static_graph, at first": Case(ddp=("static_graph",), missing=(0,), ranks=(0,)),
    "bucket_view": Case(ddp=("gradient_as_bucket_view",), missing=(4,), accumulate=2),
    "sparse": Case(net="sparse"),
    "checkpoint": Case(net="checkpoint"),
}
NOBODY = {
    "none": Case(ranks=(0, 1)),
    "none at first and last": Case(missing=(0, 5), ranks=(0, 1)),
    "after forward": Case(ranks=(0, 1), how="none after forward"),
    "leaf": Case(ranks=(0, 1), how="leaf"),
    "device": Case(ranks=(0, 1), mode="device"),
    "fp16": Case(ranks=(0, 1), fp16=True),
    "window": Case(ranks=(0, 1), missing=(4, 5), accumulate=2),
    "batch": Case(ranks=(0, 1), missing=(4, 5), accumulate=2, how="batch"),
    "unused": Case(ranks=(0, 1), net="unused", ddp=("find_unused_parameters",)),
}
"""No rank has a loss in some windows."""
IN_WINDOW = Case(how="leaf", missing=(6, 10), accumulate=3)
"""A zero without a graph where no rank waits for it."""


class Net(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
        self.other = nn.ModuleList([nn.Linear(6, 1) for _ in range(2)]) if case.net == "unused" else None
        self.table = nn.Embedding(4, 6, sparse=True) if case.net == "sparse" else None
        self.frozen = nn.Linear(6, 1).requires_grad_(False)
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        if self.table is not None:
            x = x + self.table(torch.arange(len(x)) % 4)
        y = self.net(x)
        if self.other is not None:
            y = y + self.other[self.global_rank](x)
        return y + self.frozen(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        number = int(batch)
        mine = number in self.case.missing and self.global_rank in self.case.ranks
        how = self.case.how
        if mine and how == "none":
            return None
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * number + self.global_rank))
        if self.case.net == "checkpoint":
            # its graph ends at the input: the loss reaches the parameters in a backward pass of their own
            y = checkpoint(self, x.requires_grad_(), use_reentrant=True)
        else:
            y = self(x)
        loss = (y - x.detach().sum(1, keepdim=True)).square().mean()
        if not mine:
            return loss
        leaf = torch.zeros((), requires_grad=True)
        return {"none after forward": None, "leaf": leaf, "scaled leaf": 2 * leaf, "dict": {"loss": leaf, "n": 1}}[how]

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.table is not None:
            optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, 0.01)
        else:
            optimizer = torch.optim.AdamW(parameters, 0.01, fused=self.case.mode == "device")
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        epoch = self.case.mode == "device"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "epoch" if epoch else "step"}}


def collate(case: Case, numbers: list[int]) -> Tensor | None:
    lost = case.how == "batch" and numbers[0] in case.missing and dist.get_rank() in case.ranks
    return None if lost else torch.tensor(numbers)


def passed_on(method: Any) -> Any:
    @functools.wraps(method)
    def same(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return same


class Decorated(Net):
    """Its ``training_step`` takes no ``batch_idx``, which Lightning sees behind the decorator."""

    @passed_on
    def training_step(self, batch: Tensor) -> Any:
        return super().training_step(batch, 0)


class Outputs(Callback):
    """Records which batches had an output."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(sorted(outputs))


def train(folder: Path, case: Case, numbers: list[int], *plugins: Callback, clip: float = 1.0) -> dict[str, Any]:
    recorder, events, outputs = Recorder(), EventRecorder(), Outputs()
    strategy = DDPStrategy(process_group_backend="gloo", **dict.fromkeys(case.ddp, True))
    module = Decorated(case) if case.net == "decorated" else Net(case)
    clips = [] if case.net == "sparse" else [ClipNorm(max_norm=clip)]
    mine = fits.fit(
        module,
        DataLoader(numbers, batch_size=1, collate_fn=functools.partial(collate, case)),  # type: ignore[arg-type]
        *[recorder, *clips, SkipNonFinite(max_in_a_row=1), Guard(mode=case.mode), events, outputs, *plugins],
        default_root_dir=folder,
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=case.accumulate,
        fp16=case.fp16,
    )
    assert "training_step" not in vars(module)
    return {
        "end": everything(mine),
        "outcomes": [tuple(o)[1:] for o in recorder.state],
        "skipped": mine.callback_metrics["skipped"].item(),
        "loss": mine.callback_metrics["loss"].item() if "loss" in mine.callback_metrics else None,
        "attempted": recorder._guard.counters.attempted,  # type: ignore[union-attr]
        "events": [(e.step, e.plugin, e.kind) for e in events.events if e.plugin != "recorder"],
        "outputs": outputs.seen,
    }


def bare_end(folder: Path, case: Case, numbers: list[int]) -> Any:
    """What Lightning alone does, with a zero without a graph in place of no loss; None if it raises an error."""
    if case.fp16:
        return None
    mine = fits.fit(
        Net(case),
        DataLoader(numbers, batch_size=1),  # type: ignore[arg-type]
        default_root_dir=folder,
        strategy=DDPStrategy(process_group_backend="gloo", **dict.fromkeys(case.ddp, True)),
        devices=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=case.accumulate,
    )
    return everything(mine)


def train_resumed(folder: Path) -> dict[str, Any]:
    """The default stack over two epochs, uninterrupted, and resumed from a checkpoint of the dropped step."""
    case = Case(missing=(3, 10), accumulate=2, how="none after forward")
    path = folder / "resumed.ckpt"
    results = {}
    for name, ckpt_path in (("whole", None), ("resumed", path)):
        stack = default_callbacks(resume="exactly", gradients="none")
        save = [fits.SaveAfter(7, path)] if ckpt_path is None else []
        options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "accumulate_grad_batches": 2}
        loader = DataLoader(list(range(12)), batch_size=1, shuffle=True)  # type: ignore[arg-type]
        torch.manual_seed(1)
        mine = fits.fit(
            Net(case),
            loader,
            *[*stack, *save],
            default_root_dir=folder,
            max_epochs=2,
            use_distributed_sampler=False,
            ckpt_path=ckpt_path,
            **options,
        )
        states = {each.state_key: each.state_dict() for each in stack}
        results[name] = {"end": everything(mine), "skipped": mine.callback_metrics["skipped"], "states": repr(states)}
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, case in {**NOBODY, "in window": IN_WINDOW}.items():
        every = list(range(STEPS * case.accumulate))
        how = "leaf" if name != "in window" and not case.fp16 else case.how
        bare = bare_end(folder, case._replace(how=how), every)
        result = {**train(folder, case, every, clip=1e6), "bare": bare}
        torch.save(result, folder / f"nobody-{name}-{os.environ['RANK']}.pt")
    torch.save(train_resumed(folder), folder / f"resumed-{os.environ['RANK']}.pt")
    for mode in ("exact", "device"):
        case = Case((), accumulate=4, mode=mode)
        rest = [train(folder, case, list(range(6)), *plugins)["outcomes"] for plugins in ([], [AccumulateMean()])]
        torch.save(rest, folder / f"rest-{mode}-{dist.get_rank()}.pt")
    for name in sys.argv[2:] or CASES:
        case = CASES[name]
        every = list(range(STEPS * case.accumulate))
        lost = {number // case.accumulate for number in case.missing}
        results = {
            "dropped": train(folder, case, every),
            "never seen": train(folder, case, [n for n in every if n // case.accumulate not in lost]),
        }
        torch.save(results, folder / f"{name}-{dist.get_rank()}.pt")
    two_ranks.leave()
