"""The values that a module logs in an epoch, as data: Lightning's collection of results, and torchmetrics metrics.

Lightning saves neither, so a resumed epoch's means and metrics would be those of the batches after the checkpoint.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric, MetricCollection

_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_OPTIONAL_META = ("dataloader_idx", "metric_attribute")
_REDUCTIONS = ("mean", "sum", "min", "max")
_STATE = ("value", "cumulated_batch_size", "_update_count", "_forward_cache", "has_reset")
_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")

LARGEST_METRIC = 64 << 20
"""Metrics with more bytes than this in their states (such as all predictions of an epoch) are not saved."""


# ---- the values that were shown last --------------------------------------------------------------------------------


def shown(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The latest values for callbacks, loggers and the progress bar, on the CPU."""
    connector = trainer._logger_connector
    return {name: {k: _host(v) for k, v in getattr(connector, name).items() if _is_number(v)} for name in _SHOWN}


def set_shown(trainer: Trainer, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore the values of `shown`."""
    device = trainer.strategy.root_device
    for name in _SHOWN:
        values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved[name].items()}
        getattr(trainer._logger_connector, name).update(values)


# ---- the means of the epoch -----------------------------------------------------------------------------------------


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    """What ``self.log`` has gathered in the training epoch so far on this rank, on the CPU."""
    return [_result_to_plain(key, result) for key, result in trainer.fit_loop.epoch_loop._results.items()]


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


def _result_to_plain(key: str, result: Any) -> dict[str, Any]:
    meta = result.meta
    state = {name: _host(getattr(result, name)) for name in _STATE if hasattr(result, name)}
    return {
        "key": key,
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
    module = trainer.lightning_module
    for each in module.modules():
        if isinstance(each, MetricCollection):
            each.items(copy_state=False)  # metrics of one group share their state from here on
    validated = {
        id(inner)
        for result in trainer.fit_loop.epoch_loop.val_loop._results.values()
        if isinstance(result.value, Metric)
        for inner in result.value.modules()
    }
    found, too_large = {}, []
    for name, metric in module.named_modules():
        if not isinstance(metric, Metric) or not metric._update_count or id(metric) in validated:
            continue
        states = {each: getattr(metric, each) for each in metric._defaults}
        tensors = [each for value in states.values() for each in (value if isinstance(value, list) else [value])]
        if not all(isinstance(each, Tensor) for each in tensors):
            continue
        if sum(each.numel() * each.element_size() for each in tensors) > LARGEST_METRIC:
            too_large.append(name)
            continue
        host = {k: [_host(each) for each in v] if isinstance(v, list) else _host(v) for k, v in states.items()}
        found[name] = {"updates": metric._update_count, "states": host}
    return found, too_large


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
