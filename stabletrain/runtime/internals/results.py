"""The values that a module logs in an epoch, as data: Lightning's collection of results, and torchmetrics metrics.

Lightning saves neither, so a resumed epoch's means and metrics would be those of the batches after the checkpoint.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric, MetricCollection

_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_OPTIONAL_META = ("dataloader_idx", "metric_attribute")
_REDUCTIONS = ("mean", "sum", "min", "max")
_STATE = ("value", "cumulated_batch_size", "_update_count", "_forward_cache", "has_reset")
SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")

LARGEST_METRIC = 64 << 20
"""Metrics with more bytes than this in their states (such as all predictions of an epoch) are not saved."""
LARGEST_COPY = 1 << 20
"""Metrics with more bytes are not copied at every step."""


# ---- the values that were shown last --------------------------------------------------------------------------------


def shown_now(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The latest values for callbacks, loggers and the progress bar; they are replaced, not changed."""
    connector = trainer._logger_connector
    return {name: dict(getattr(connector, name)) for name in SHOWN}


def shown(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The numbers in `shown_now`, on the CPU; for a value that has several names, the first name instead of others."""
    found: dict[str, dict[str, Any]] = {}
    for group, each in values.items():
        first: dict[int, str] = {}
        found[group] = {}
        for name, value in each.items():
            if _is_number(value):
                known = first.setdefault(id(value), name) if isinstance(value, Tensor) else name
                found[group][name] = _host(value) if known == name else known
    return found


def checked_shown(values: Any) -> dict[str, Any]:
    """Values of `shown`. Raises TypeError for anything else."""
    found = dict(values)
    for name, value in found.items():
        if not isinstance(name, str) or not _is_number(found.get(value) if isinstance(value, str) else value):
            raise TypeError("the latest logged values must be numbers")
    return found


def set_shown(trainer: Trainer, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the values of `shown`."""
    device = trainer.strategy.root_device
    for name in SHOWN:
        values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved[name].items()}
        values = {k: values[v] if isinstance(v, str) else v for k, v in values.items()}
        getattr(trainer._logger_connector, name).update(values)


# ---- the means of the epoch -----------------------------------------------------------------------------------------


class Logged(NamedTuple):
    """One value that was logged, and what was gathered of it; Lightning replaces these tensors at each update."""

    key: str
    meta: Any
    state: dict[str, Any]


def logged_now(trainer: Trainer) -> list[Logged]:
    """What ``self.log`` has gathered in the training epoch so far on this rank."""
    return [
        Logged(key, result.meta, {name: getattr(result, name) for name in _STATE if hasattr(result, name)})
        for key, result in trainer.fit_loop.epoch_loop._results.items()
    ]


def logged(values: list[Logged]) -> list[dict[str, Any]]:
    """The values of `logged_now` as plain Python types and tensors on the CPU."""
    return [_to_plain(each) for each in values]


def set_logged(trainer: Trainer, saved: list[dict[str, Any]]) -> None:
    """Restore the results of `logged`; values that were logged since then, in ``on_train_start``, are replaced.

    The arguments of ``self.log`` are those of the next call, so the code may have changed since the checkpoint.
    """
    results: Any = trainer.fit_loop.epoch_loop._results
    classes = sys.modules[type(results).__module__]  # of the package that the trainer is from
    module, device = trainer.lightning_module, trainer.strategy.root_device
    metrics = {name: each for name, each in module.named_modules() if isinstance(each, Metric)}
    for plain in saved:
        attribute = plain["metric_attribute"]
        if attribute is not None and attribute not in metrics:
            continue
        values = {name: plain[name] for name in (*_META, *_OPTIONAL_META)}
        meta = _restored_class(classes)(**values, reduce_fx=getattr(torch, plain["reduce"]))
        sync = {"_should": plain["sync"], "rank_zero_only": plain["rank_zero_only"], "_op": plain["op"]}
        meta.sync = classes._Sync(fn=trainer.strategy.reduce, **sync)
        result = classes._ResultMetric(meta, attribute is None)
        meta.owner = weakref.ref(result)
        state = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in plain["state"].items()}
        result.__dict__.update(state if attribute is None else {**state, "value": metrics[attribute]})
        results[plain["key"]] = result


def check_logged(plain: Any) -> None:
    """Raise TypeError, KeyError or ValueError unless it can be a result of `logged`: a checkpoint may hold anything."""
    for name in ("key", *_META, *_OPTIONAL_META, "reduce", "sync", "rank_zero_only", "op"):
        kinds: tuple[type, ...] = (str,) if name in ("key", "fx", "name", "reduce") else (bool,)
        if name in (*_OPTIONAL_META, "op"):
            kinds = (int, type(None)) if name == "dataloader_idx" else (str, type(None))
        if not isinstance(plain[name], kinds):
            raise TypeError(f"{name} of a logged value cannot be {plain[name]!r}")
    if plain["reduce"] not in _REDUCTIONS or not (plain["on_step"] or plain["on_epoch"]):
        raise ValueError(f"the logged value {plain['name']!r} has the reduction {plain['reduce']!r}")
    needed = {"_update_count", "_forward_cache", "has_reset"}
    if plain["metric_attribute"] is None:
        needed |= {"value", *(["cumulated_batch_size"] if plain["reduce"] == "mean" else [])}
    state = plain["state"]
    if not needed <= set(state) <= set(_STATE) or not all(_is_number(v) or v is None for v in state.values()):
        raise ValueError(f"the logged value {plain['name']!r} has another state")


def _to_plain(result: Logged) -> dict[str, Any]:
    meta = result.meta
    state = {name: _host(value) for name, value in result.state.items()}
    return {
        "key": result.key,
        **{name: getattr(meta, name) for name in (*_META, *_OPTIONAL_META)},
        "reduce": meta.reduce_fx.__name__,
        "sync": meta.sync.should and meta.sync.group is None,
        "rank_zero_only": meta.sync.rank_zero_only,
        "op": meta.sync.op if isinstance(meta.sync.op, str) else None,
        "state": {name: value for name, value in state.items() if value is None or _is_number(value)},
    }


@functools.cache
def _restored_class(classes: Any) -> Any:
    """The class of the arguments of a restored result; its comparison takes over those of the next ``self.log``."""

    class Restored(classes._Metadata):  # type: ignore[misc]
        owner: Any = None

        def __ne__(self, called: Any) -> bool:
            result = self.owner()
            same = all(
                getattr(self, name) == getattr(called, name)
                for name in ("reduce_fx", "on_step", "on_epoch", "metric_attribute")
            )
            if same:
                result.meta = called
            else:
                result.__init__(called, called.metric_attribute is None)
            return False

    return Restored


# ---- metrics of torchmetrics ----------------------------------------------------------------------------------------


def metric_states(trainer: Trainer) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The states of the module's torchmetrics metrics that were updated, and the names of those that are too large.

    Without the metrics that the validation has just logged: they are reset after it.
    """
    validated = {
        id(inner)
        for result in trainer.fit_loop.epoch_loop.val_loop._results.values()
        if isinstance(result.value, Metric)
        for inner in result.value.modules()
    }
    metrics = {name: each for name, each in metrics_of(trainer).items() if id(each) not in validated}
    found, too_large = {}, []
    for name, metric in metrics.items():
        states = _states_of(metric)
        if states is None:
            continue
        tensors = [each for value in states.values() for each in (value if isinstance(value, list) else [value])]
        if sum(each.numel() * each.element_size() for each in tensors) > LARGEST_METRIC:
            too_large.append(name)
        else:
            found[name] = {"updates": metric._update_count, "states": states}
    return on_host(found), too_large


def metrics_of(trainer: Trainer) -> dict[str, Metric]:
    """The module's torchmetrics metrics, by name."""
    module = trainer.lightning_module
    for each in module.modules():
        if isinstance(each, MetricCollection):
            each.items(copy_state=False)  # metrics of one group share their state from here on
    return {name: each for name, each in module.named_modules() if isinstance(each, Metric)}


def copied(metrics: Mapping[str, Metric]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """As `metric_states`, on the metrics' device, with a smaller limit: it is done at every step.

    Tensors in lists are not copied: updates only append to these.

    Args:
        metrics: from `metrics_of`.
    """
    found, too_large = {}, []
    for name, metric in metrics.items():
        states = _states_of(metric)
        if states is None:
            continue
        if sum(v.numel() * v.element_size() for v in states.values() if isinstance(v, Tensor)) > LARGEST_COPY:
            too_large.append(name)
            continue
        copies = {k: list(v) if isinstance(v, list) else v.detach().clone() for k, v in states.items()}
        found[name] = {"updates": metric._update_count, "states": copies}
    return found, too_large


def on_host(states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same states, on the CPU."""
    return {
        name: {
            "updates": each["updates"],
            "states": {
                k: [_host(i) for i in v] if isinstance(v, list) else _host(v) for k, v in each["states"].items()
            },
        }
        for name, each in states.items()
    }


def _states_of(metric: Metric) -> dict[str, Any] | None:
    """The states of a metric; None if it was not updated, or has states that are no tensors."""
    if not metric._update_count:
        return None
    states = {name: getattr(metric, name) for name in metric._defaults}
    ends = [each for v in states.values() for each in ((v[:1] + v[-1:]) if isinstance(v, list) else [v])]
    return states if all(isinstance(each, Tensor) for each in ends) else None


def set_metric_states(trainer: Trainer, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore the states of `metric_states`; those that the module's metrics no longer have are left out."""
    for name, metric in trainer.lightning_module.named_modules():
        states = saved[name]["states"] if isinstance(metric, Metric) and name in saved else None
        if states is None or states.keys() != metric._defaults.keys():
            continue
        for key, value in states.items():
            if isinstance(value, list) == isinstance(metric._defaults[key], list):
                device = metric.device
                setattr(metric, key, [v.to(device) for v in value] if isinstance(value, list) else value.to(device))
        metric._update_count, metric._computed = saved[name]["updates"], None


def check_metric_state(plain: Any) -> None:
    """Raise TypeError or KeyError unless it can be a value of `metric_states`."""
    flat = [each for v in plain["states"].values() for each in (v if isinstance(v, list) else [v])]
    if type(plain["updates"]) is not int or not all(isinstance(each, Tensor) for each in flat):
        raise TypeError("the state of a metric must be tensors")


def _host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor | int | float)
