"""Every option of ``optimizer`` and ``precision``: loss, state, time of a step; are skip, rollback and resume exact?

    python benchmarks/optimizers.py                    print the tables (about 4 minutes on 2 cores)
    python benchmarks/optimizers.py adamw lion         only these options
    python benchmarks/optimizers.py --write            also write benchmarks/results/optimizers.md

A GPT of 0.11 M parameters learns Shakespeare for 300 steps, without a schedule, at the option's own learning rate: the
loss is no comparison of algorithms, which would need a search for each rate. Embeddings and tensors of fewer than 4096
elements have 32-bit state, which in a model this small is a large part of the 8-bit options' bytes. Options of torchao
need TORCHDYNAMO_DISABLE=1 on a CPU. Exactness: a tiny GPT with dropped steps, with rollbacks, and resumed, compared
with a run without them; weights, optimizer state, groups and counts are compared bit by bit.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from machine import measured
from torch import Tensor
from torch.utils.data import DataLoader

from stabletrain import ResumeExactly, SkipNonFinite
from stabletrain.config import discovery
from stabletrain.config.construct import instantiate, instantiate_arguments
from stabletrain.launch.assemble import switching
from stabletrain.optim.build import Arguments
from stabletrain.optim.groups import parameter_groups
from stabletrain.testing.checks.equality import difference
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import ShakespeareData
from stabletrain.workloads.gpt import GPT

STEPS, CONTEXT, BATCH, VOCABULARY = 300, 32, 16, 84
BAD = (0, 5, 6, 17)
GOOD = 24
MAKE_ADAMW = "adamw"
Make = Callable[[Any], torch.optim.Optimizer]


class Row(NamedTuple):
    """The measurements of one option."""

    option: str
    loss: float
    state: float
    step_ms: float
    exact: tuple[str, str, str]


class Model(L.LightningModule):
    """A GPT; a batch is tokens, and whether its loss is NaN."""

    def __init__(self, make: Make, network: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.make = GPT(*network, 0.0, False, False), make
        self.losses: list[float] = []
        self.ends: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, bad = batch if isinstance(batch, list | tuple) else (batch, False)
        loss = F.cross_entropy(self.net(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
        return loss * math.nan if bad else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.ends.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decay = Arguments(self.make).value("weight_decay")
        return self.make(parameter_groups(self.net, weight_decay=decay or 0.0))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The plain tensors in optimizer state; tensor subclasses are taken apart."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from tensors_of([getattr(value, name) for name in value.__tensor_flatten__()[0]])  # type: ignore[attr-defined]
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state per parameter; a table of codes that all tensors share counts once."""
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_of(optimizer.state)
    }
    return sum(storages.values()) / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def plain(value: Any) -> Any:
    """A copy in which tensor subclasses are taken apart."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        return {name: plain(getattr(value, name)) for name in value.__tensor_flatten__()[0]}  # type: ignore[attr-defined]
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


class End(L.Callback):
    """Keeps everything at the end of the training, before anything is evaluated."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.bytes = state_bytes(optimizer)
        self.found = plain([pl_module.state_dict(), optimizer.state_dict(), trainer.global_step])


class Case:
    """One option, with what it needs."""

    def __init__(self, optimizer: str, precision: str | None = None) -> None:
        option = discovery.groups()["optimizer"][optimizer]
        self.node = discovery.content(option)
        self.precision = None if precision is None else discovery.content(discovery.groups()["precision"][precision])
        if precision == "fp8" and not torch.cuda.is_available():
            self.precision = {**(self.precision or {}), "emulate": True}

    def fit(self, network: tuple[int, ...], data: Any, *callbacks: L.Callback, ckpt: Any = None) -> tuple[Model, End]:
        L.seed_everything(0, verbose=False)
        model, end = Model(instantiate(self.node, key="optimizer"), network), End()
        needed = [instantiate(each, key="plugins.averaging") for each in switching({"optimizer": self.node}).values()]
        options: dict[str, Any] = {}
        if self.precision and "_target_" in self.precision:
            needed.append(instantiate(self.precision, key="precision"))
        elif self.precision:
            options = instantiate_arguments(L.Trainer, self.precision, key="precision")
        trainer = quiet_trainer(end, *callbacks, *needed, max_epochs=1, **options)
        trainer.fit(model, data, ckpt_path=ckpt, **({"weights_only": True} if ckpt else {}))
        return model, end

    def learn(self) -> tuple[float, float, float]:
        """Mean loss of the last 20 steps, bytes of state per parameter, median ms of a step."""
        L.seed_everything(0, verbose=False)  # the same batches for every option
        data = ShakespeareData(context=CONTEXT, batch_size=BATCH)
        data.setup("fit")
        loader = data.train_dataloader()
        batches = [batch for batch, _ in zip(loader, range(STEPS), strict=False)]
        model, end = self.fit((2, 4, 64, CONTEXT, VOCABULARY), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        steps = [b - a for a, b in zip(model.ends[20:], model.ends[21:], strict=False)]
        return statistics.fmean(model.losses[-20:]), end.bytes, 1000 * statistics.median(steps)

    def exact(self, folder: Path) -> tuple[str, str, str]:
        """Whether skip, rollback and resume are exact, each "yes" or what differs."""
        going_back, fits = importlib.import_module("going_back"), importlib.import_module("fits")
        good = [(torch.randint(0, 24, (4, 9), generator=torch.Generator().manual_seed(i)), False) for i in range(GOOD)]
        items = list(good)
        for at in BAD:
            items.insert(at, (good[0][0], True))
        network, path = (1, 4, 32, 8, 24), folder / "cut.ckpt"

        def run(items: Any, *callbacks: L.Callback, ckpt: Any = None) -> Any:
            data = DataLoader(items, batch_size=None)
            return self.fit(network, data, SkipNonFinite(), ResumeExactly(), *callbacks, ckpt=ckpt)[1].found

        def outcome(make: Callable[[], Any]) -> str:
            try:
                return "yes" if (found := difference(reference, make())) is None else f"no: {found}"[:60]
            except Exception as error:
                return f"{type(error).__name__}: {error}".splitlines()[0][:60]

        reference = run(good)
        return (
            outcome(lambda: run(items, fits.SaveAfter(13, path))),
            outcome(lambda: run(good, going_back.GoBack(3, (8, 17)))),
            outcome(lambda: run(items, ckpt=path)),
        )


def measure(name: str, case: Case) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return Row(name, *case.learn(), case.exact(Path(folder)))


def table(rows: Iterable[Row], reference: Row) -> list[str]:
    lines = [
        "| option | loss after 300 steps | state, bytes per parameter | step, ratio | skip | rollback | resume |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.step_ms / reference.step_ms
        lines.append(f"| `{row.option}` | {row.loss:.3f} | {row.state:.2f} | {ratio:.2f} | {' | '.join(row.exact)} |")
    return lines


def main() -> None:
    """Measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", help="of the group optimizer; default: all, and those of precision")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/optimizers.md")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names = arguments.options or [name for name in discovery.groups()["optimizer"] if name != "none"]
    precisions = (
        []
        if arguments.options and not arguments.write
        else [name for name in discovery.groups()["precision"] if name != "none"]
    )
    Case(MAKE_ADAMW).learn()  # the first training of a process is slower
    reference = measure(MAKE_ADAMW, Case(MAKE_ADAMW))
    failed: list[str] = []

    def rows(cases: Iterable[tuple[str, str, str | None]]) -> Iterator[Row]:
        for name, optimizer, precision in cases:
            try:
                row = measure(name, Case(optimizer, precision))
            except Exception as error:  # a package, or a device, that is not there
                failed.append(f"- `{name}`: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            print(row, file=sys.stderr, flush=True)
            yield row

    lines = table(rows((name, name, None) for name in names), reference)
    if precisions:
        lines += ["", "`adamw` with each option of `precision` (`bf16_true`: `adamw_kahan`; `fp8`: emulated on a CPU):"]
        lines += [""]
        of_bf16 = {"bf16_true": "adamw_kahan"}  # adamw stops moving there, and is refused
        lines += table(rows((name, of_bf16.get(name, MAKE_ADAMW), name) for name in precisions), reference)
    if failed:
        lines += ["", "Not measured:", "", *failed]
    print("\n".join(lines))
    if arguments.write:
        text = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
        page = f"# Optimizers\n\n{measured()}. `python benchmarks/optimizers.py --write`\n\n{text}\n\n"
        page += (
            f"Ratio of a step's time to `{MAKE_ADAMW}` in fp32, {reference.step_ms:.1f} ms, in the same process.\n\n"
        )
        (Path(__file__).parent / "results" / "optimizers.md").write_text(
            page + "\n".join(lines) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
