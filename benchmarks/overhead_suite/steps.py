"""What the stack costs the host at each step of a fit, in cases that take turns; see `baton`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from baton import Case, Pace, StepTimes, compare
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger

import stabletrain as st
from overhead_suite.peers import ItemNaNCheck, ZClipRestated, accelerate_loop, plain_loop, stability_guard
from overhead_suite.tables import Row
from overhead_suite.training import ManyTensors, SixtyMillion, TinyMLP, case, fit
from stabletrain.runtime.data.train_loader import TrainLoader

PERIOD = 50
"""Steps after which all recurs that is not done at every step: a look at the weights, a snapshot, metrics."""
BARE = "bare Lightning"


def without_rollback() -> list[L.Callback]:
    return st.default_callbacks(spike="none")


def tiny_mlp(steps: int = 2400) -> list[Row]:
    """The stack, its parts, and what people have without it."""
    cases: dict[str, Case] = {
        BARE: case(list, steps),
        "default stack": case(st.default_callbacks, steps),
        "default stack without rollback": case(without_rollback, steps),
        "the guard alone": case(lambda: [st.Guard()], steps),
        "one rule alone (clip_norm)": case(lambda: [st.ClipNorm()], steps),
        "peer: one self.log": case(list, steps, lambda pace: TinyMLP(pace, log=True)),
        "peer: gradient_clip_val": case(list, steps, gradient_clip_val=1e9),
        "peer: LearningRateMonitor": case(lambda: [LearningRateMonitor("step")], steps, logger=DummyLogger()),
        "peer: EMA callback (EMAWeightAveraging)": case(_ema, steps),
        "peer: NaN check with .item()": case(lambda: [ItemNaNCheck()], steps),
        "peer: ZClip, restated": case(lambda: [ZClipRestated()], steps),
        "a plain loop": plain_loop(steps),
    }
    if (accelerate := accelerate_loop(steps)) is not None:
        cases["peer: accelerate's loop"] = accelerate
    if stability_guard():
        cases["peer: stabilityguard's step"] = case(list, steps, _Guarded)
    times = compare(cases)
    reaches = {
        "default stack": "at most +230 µs; less than one self.log",
        "default stack without rollback": "at most +125 µs",
        "the guard alone": "at most +55 µs",
    }
    bare = times.pop(BARE)
    rows = [Row(f"tiny MLP, {BARE}", f"{bare.usual:.0f} µs per step", spread=f"± {bare.error:.1f}")]
    for name, own in times.items():
        extra, error = own.usual - bare.usual, (own.error**2 + bare.error**2) ** 0.5
        measured, told = f"{extra:+.0f} µs", ""
        if name == "peer: accelerate's loop":
            told = f"; {own.usual - times['a plain loop'].usual:+.0f} over the plain loop"
        if name.startswith(("default", "the guard", "one rule")):
            rare = own.mean_over(PERIOD) - bare.mean_over(PERIOD) - extra
            told = f"; {rare:+.0f} for what is not done at every step"
        rows.append(Row(f"tiny MLP, {name}", measured + told, reaches.get(name, ""), f"± {error:.1f}"))
    return rows


def accumulation(windows: int = 90, batches: int = 16) -> list[Row]:
    """Gradient accumulation: the cost of a micro-batch."""
    options: dict[str, Any] = {"accumulate_grad_batches": batches}
    steps = windows * batches
    cases = {
        BARE: case(list, steps, **options),
        "default stack": case(st.default_callbacks, steps, **options),
        "default stack without rollback": case(without_rollback, steps, **options),
    }
    times = {name: _windows(own, batches) for name, own in compare(cases, 2 * batches, 10 * batches).items()}
    return _over_bare(
        times, f"accumulation of {batches}, each micro-batch", {"default stack": "at most +40 µs"}, 1 / batches
    )


def tape_with_workers(steps: int = 1600) -> list[Row]:
    """The tape of batches with two worker processes and an IterableDataset."""
    cases = {BARE: case(list, steps, workers=2), "the tape alone": case(lambda: [_Tape()], steps, workers=2)}
    times = compare(cases)
    return _over_bare(times, "IterableDataset, 2 workers, each batch", {"the tape alone": "at most +25 µs"})


def many_tensors() -> list[Row]:
    """The stack over torch's clipping, with more and more small parameters."""
    rows = []
    for tensors in (10, 100, 1000, 3000):
        steps = {10: 1600, 100: 1200, 1000: 500, 3000: 250}[tensors]

        def module(pace: Any, tensors: int = tensors) -> ManyTensors:
            return ManyTensors(pace, tensors)

        cases = {
            "clip": case(list, steps, module, gradient_clip_val=1e9),
            "stack": case(st.default_callbacks, steps, module),
            "without": case(without_rollback, steps, module),
        }
        times = compare(cases, 25 if steps > 500 else 10, 100 if steps > 300 else 50)
        clip = times["clip"]
        for name, what in (("stack", "default stack"), ("without", "default stack without rollback")):
            ratio = times[name].usual / clip.usual
            rare = times[name].mean_over(PERIOD) / clip.mean_over(PERIOD)
            error = ratio * ((times[name].error / times[name].usual) ** 2 + (clip.error / clip.usual) ** 2) ** 0.5
            label = f"{tensors} small tensors ({clip.usual / 1e3:.2f} ms per step), {what} over gradient_clip_val"
            told = f"{ratio:.3f}x; {rare:.3f}x with what is not done at every step"
            rows.append(Row(label, told, "at most 1.05x" if name == "stack" else "", f"± {error:.3f}"))
    return rows


def sixty_million(steps: int = 200, rounds: int = 3) -> list[Row]:
    """The stack over torch's clipping, with a network whose norm takes time.

    Where a process has its memory changes the time of these steps by several percent, so there are several rounds, with
    new processes, of which the median counts.
    """
    cases = {
        "bare": case(list, steps, SixtyMillion),
        "clip": case(list, steps, SixtyMillion, gradient_clip_val=1e9),
        "stack": case(st.default_callbacks, steps, SixtyMillion),
        "without": case(without_rollback, steps, SixtyMillion),
    }
    found = [compare(cases, 5, 50) for _ in range(rounds)]

    def median(of: Callable[[dict[str, StepTimes]], float]) -> float:
        return statistics.median(of(each) for each in found)

    clip = median(lambda times: times["clip"].usual) / 1e3
    bare = median(lambda times: times["bare"].usual) / 1e3
    rows = [Row("60 M parameters, hardly any forward pass: bare Lightning", f"{bare:.1f} ms per step")]
    for name, what in (("stack", "default stack"), ("without", "default stack without rollback")):
        ratios = [times[name].usual / times["clip"].usual for times in found]
        whole = median(lambda times, name=name: times[name].mean_over(PERIOD) / times["clip"].mean_over(PERIOD))
        told = f"{statistics.median(ratios):.3f}x; {whole:.3f}x with what is not done at every step"
        label = f"60 M parameters ({clip:.1f} ms per step), {what} over gradient_clip_val"
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append(Row(label, told, "at most 1.03x" if name == "stack" else "", spread))

    def rare(times: dict[str, StepTimes]) -> float:
        stack, without = times["stack"], times["without"]
        more = (stack.mean_over(PERIOD) - stack.usual) - (without.mean_over(PERIOD) - without.usual)
        return more / stack.usual

    label = "60 M parameters, snapshots and looks at the weights, share of such a step"
    return [*rows, Row(label, f"{100 * median(rare):.1f} %", "at most 2 %")]


def char_gpt(steps: int = 120, rounds: int = 3) -> list[Row]:
    """The default recipe's network; rounds as in `sixty_million`."""
    from stabletrain.workloads import CharGPT, ShakespeareData

    def fitted(callbacks: Callable[[], list[L.Callback]]) -> Case:
        def train(pace: Pace) -> None:
            class Paced(CharGPT):
                def training_step(self, *arguments: Any) -> Any:
                    pace()
                    return super().training_step(*arguments)

            torch.manual_seed(0)
            fit(Paced(sample_length=0), ShakespeareData(), callbacks(), max_epochs=-1, max_steps=steps)

        return train

    pairs = []
    for _ in range(rounds):
        times = compare({BARE: fitted(list), "default stack": fitted(st.default_callbacks)}, 5, 20)
        pairs.append((times[BARE], times["default stack"]))
    ratios = [own.usual / bare.usual for bare, own in pairs]
    whole = statistics.median(own.mean_over(PERIOD) / bare.mean_over(PERIOD) for bare, own in pairs)
    usual = statistics.median(bare.usual for bare, _ in pairs) / 1e3
    what = f"char_gpt ({usual:.1f} ms per step), default stack over bare Lightning"
    told = f"{statistics.median(ratios):.4f}x; {whole:.4f}x with what is not done at every step"
    return [Row(what, told, "at most 1.01x", f"{min(ratios):.4f} to {max(ratios):.4f}")]


class _Tape(L.Callback):
    """Only what `Rollback` asks of the train loader: a tape of the last 150 batches, and a mark after each."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._loader = TrainLoader.of(trainer)
        self._loader.keep_tape()
        self._loader.limit_tape(150, float("inf"))

    def on_train_batch_end(self, *_: Any) -> None:
        self._mark = self._loader.mark()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._loader.close()


class _Guarded(TinyMLP):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        from fault_suite.peers import GuardedAdamW

        return GuardedAdamW(self, [{"params": list(self.parameters())}], {"lr": 1e-3})


def _ema() -> list[L.Callback]:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return [EMAWeightAveraging()]


def _windows(own: StepTimes, batches: int) -> StepTimes:
    """The times of whole windows: the last micro-batch of each takes longer than the others."""
    sums = [sum(own.microseconds[i : i + batches]) for i in range(0, len(own.microseconds) - batches + 1, batches)]
    return StepTimes(sums)


def _over_bare(times: dict[str, StepTimes], what: str, reaches: dict[str, str], share: float = 1.0) -> list[Row]:
    bare = times.pop(BARE)
    rows = [Row(f"{what}: {BARE}", f"{bare.usual * share:.0f} µs", spread=f"± {_error(bare, bare) * share:.1f}")]
    for name, own in times.items():
        measured = f"{(own.usual - bare.usual) * share:+.1f} µs"
        rows.append(Row(f"{what}: {name}", measured, reaches.get(name, ""), f"± {_error(own, bare) * share:.1f}"))
    return rows


def _error(one: StepTimes, other: StepTimes) -> float:
    values = [each.error if len(each.microseconds) >= 100 else _of_few(each) for each in (one, other)]
    return float((values[0] ** 2 + values[1] ** 2) ** 0.5)


def _of_few(own: StepTimes) -> float:
    quarters = statistics.quantiles(own.microseconds, n=4)
    return float(quarters[1] - quarters[0]) / len(own.microseconds) ** 0.5


PARTS: tuple[Callable[[], list[Row]], ...] = (tiny_mlp, accumulation, tape_with_workers, many_tensors)
PARTS += (sixty_million, char_gpt)
