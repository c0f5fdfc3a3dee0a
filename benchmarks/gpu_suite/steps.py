"""What the stack adds to a step: of the GPT, of a network that is bound by the host, and of the update alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from baton import Case, Pace, compare
from overhead_suite.tables import Row
from overhead_suite.training import Batches, TinyMLP
from torch import nn
from torch.utils.data import DataLoader

import stabletrain as st
from gpu_suite.place import Place
from gpu_suite.training import Language, train, trainer
from gpu_suite.turns import Turn, seconds_per_step
from stabletrain.core.limits import Bound, Limits, SkipNonFinite
from stabletrain.runtime import gradients
from stabletrain.runtime.guard import device_limits
from stabletrain.runtime.guard.signals import Signals

STACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "default stack": st.default_callbacks,
    "default stack without rollback": lambda: st.default_callbacks(spike="none"),
}


def guard(place: Place) -> list[L.Callback]:
    """Device mode where it is not the default."""
    return [] if place.on_cuda else [st.Guard(mode="device")]


def whole_steps(place: Place, batch: int) -> list[Row]:
    """The stack over bare Lightning, with all that is not done at every step."""

    def case(make: Callable[[], list[L.Callback]]) -> Callable[[Turn], None]:
        return lambda turn: train(place, [*make(), *guard(place), turn], batch)

    bare = "bare Lightning"
    cases: dict[str, Callable[[Turn], None]] = {bare: lambda turn: train(place, [turn], batch)}
    cases |= {name: case(make) for name, make in STACKS.items()}
    half = max(1, place.block // 2)
    first = [8, place.warm_up, 8] if place.on_cuda else [2, place.warm_up, 2]
    found = seconds_per_step(place, cases, first, [half, place.block, half])
    usual = statistics.median(found[bare])
    parameters = sum(p.numel() for p in Language(place).parameters()) / 1e6
    what = f"GPT of {parameters:.0f} M parameters, bf16-mixed, fused AdamW, {batch} sequences of {place.sequence}"
    rows = [Row(f"{what}: bare Lightning", f"{usual * 1e3:.1f} ms per step", spread=spread(found[bare], "{:.1f}", 1e3))]
    reaches = ("at most 1.005x", "at most 1.003x")
    for (name, times), reach in zip(list(found.items())[1:], reaches, strict=True):
        ratios = [mine / theirs for mine, theirs in zip(times, found[bare], strict=True)]
        rows.append(Row(f"{name} over bare, per step", f"{statistics.median(ratios):.4f}x", reach, spread(ratios)))
    return rows


def memory(place: Place, batch: int) -> list[Row]:
    """Device memory at the peak, which snapshots must not raise."""
    if not place.on_cuda:
        return [Row("device memory of the default stack beyond bare, at the peak", "not on a CPU", "at most 16 MB")]
    peaks = []
    for callbacks in ([], st.default_callbacks()):
        place.peak()
        train(place, callbacks, batch, 9)  # snapshots after 1, 2, 4 and 8 steps; the last one beside a forward pass
        peaks.append(place.peak())
    more = (peaks[1] - peaks[0]) / 1e6
    what = f"device memory of the default stack beyond bare ({peaks[0] / 2**30:.1f} GiB), at the peak"
    return [Row(what, f"{more:+.1f} MB", "at most 16 MB")]


def update(place: Place) -> list[Row]:
    """Norm, clipping and fused AdamW, over ``clip_grad_norm_`` and the same."""
    parameters = [nn.Parameter(p.detach().clone()) for p in Language(place).parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    loss = torch.ones((), device=place.device)
    loose = Limits.of(Bound(1e9, 1e9), SkipNonFinite())

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()

    def ours() -> None:
        norm = gradients.global_norm(gradients.of(parameters))
        optimizer.grad_scale, optimizer.found_inf = device_limits.decide(loose, loss, norm, norm)  # type: ignore[attr-defined]
        copy = Signals(loss, norm, norm).start_copy()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        copy.read()

    ratios = []
    for round_ in range(place.repeats + 1):
        mine, other = timed(place, ours), timed(place, theirs)
        if round_:
            ratios.append(mine / other)
    what = "norm, clip and fused AdamW in device mode, over clip_grad_norm_ and fused AdamW"
    return [Row(what, f"{statistics.median(ratios):.3f}x", "at most 0.9x", spread(ratios))]


def bound_by_host(place: Place) -> list[Row]:
    """Microseconds that the host needs more for a step. Each case is a process, forked before this one uses CUDA."""

    def case(make: Callable[[], list[L.Callback]], log: bool = False, **options: Any) -> Case:
        def fit(pace: Pace) -> None:
            torch.manual_seed(0)
            data = DataLoader(Batches(place.host_steps), batch_size=None)
            callbacks = [*make(), *(guard(place) if make is not list else [])]
            trainer(place, callbacks, "32-true", max_epochs=1, **options).fit(TinyMLP(pace, log, fused=True), data)

        return fit

    cases: dict[str, Case] = {
        "bare Lightning": case(list),
        "default stack": case(STACKS["default stack"]),
        "default stack without rollback": case(STACKS["default stack without rollback"]),
        "peer: one self.log": case(list, log=True),
        "peer: gradient_clip_val": case(list, gradient_clip_val=1e9),
    }
    times = compare(cases, skip=place.host_steps // 4)
    bare = times.pop("bare Lightning")
    rows = [Row("tiny MLP, bare Lightning", f"{bare.usual:.0f} µs per step", spread=f"± {bare.error:.1f}")]
    reaches = {"default stack": "at most +220 µs", "default stack without rollback": "at most +150 µs"}
    for name, own in times.items():
        error = (own.error**2 + bare.error**2) ** 0.5
        told = f"{own.usual - bare.usual:+.0f} µs"
        rows.append(Row(f"tiny MLP, {name}", told, reaches.get(name, ""), f"± {error:.1f}"))
    return rows


def timed(place: Place, work: Callable[[], Any]) -> float:
    """Seconds from an idle device to an idle device."""
    place.synchronize()
    began = time.perf_counter()
    work()
    place.synchronize()
    return time.perf_counter() - began


def spread(values: list[float], form: str = "{:.4f}", factor: float = 1.0) -> str:
    """From the smallest to the largest."""
    return " to ".join(form.format(factor * each) for each in (min(values), max(values)))
