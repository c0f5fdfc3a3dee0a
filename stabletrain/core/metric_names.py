"""The names of metrics: what the plugins write is ``stability/...``, and what the names were before version 0.1.

New names alone are written. Whatever reads metrics (comparisons, replays, ``monitor=``) asks `find`, `new_name` or
`renamed`, so that runs and configs from before stay readable.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple, TypeVar

V = TypeVar("V")

OWN = "stability/"
"""Prefix of the metrics of all plugins."""
LAYERS = "stability_layers/"
"""Prefix of metrics of single layers, which are many: a group of their own, sorted after `OWN`."""
THROUGHPUT = "throughput/"
"""Prefix of the metrics of the speed of a run, which are not the plugins'."""
NONFINITE = "stability_nonfinite/"
"""Prefix of the counts of non-finite values that a logger has stored, by metric."""


class MetricInfo(NamedTuple):
    """A metric that is written, for docs/metrics.md.

    Args:
        name: as it is logged; ``<layer>`` and ``<metric>`` stand for any name.
        unit: of its values.
        meaning: what it is, as a part of a sentence.
    """

    name: str
    unit: str
    meaning: str


_PLUGINS: tuple[tuple[str, str], ...] = (
    ("loss", "stability/loss"),
    ("grad_norm", "stability/grad_norm"),
    ("grad_norm_max", "stability/grad_norm_max"),
    ("lr", "stability/lr"),
    ("clipped", "stability/clipped_share"),
    ("skipped", "stability/skipped"),
    ("overflows", "stability/overflows"),
    ("rollbacks", "stability/rollbacks"),
    ("batches_excluded", "stability/batches_excluded"),
    ("batches_left_out", "stability/batches_excluded"),
    ("spike_score", "stability/spike_score"),
    ("nonfinite_layers", "stability/nonfinite_layers"),
    ("*/rollbacks", "stability/*/rollbacks"),
    ("*/batches_excluded", "stability/*/batches_excluded"),
    ("*/batches_left_out", "stability/*/batches_excluded"),
    ("*/spike_score", "stability/*/spike_score"),
    ("grad_norm/*", "stability_layers/grad_norm/*"),
    ("weight_norm/*", "stability_layers/weight_norm/*"),
)
_RECIPES: tuple[tuple[str, str], ...] = (
    ("train_loss", "train/loss"),
    ("val_loss", "val/loss"),
    ("val_accuracy", "val/accuracy"),
    ("val_perplexity", "val/perplexity"),
)
ALIASES: tuple[tuple[str, str], ...] = (*_PLUGINS, *_RECIPES)
"""Pairs of an old name and the present one, of the plugins' metrics and of those of the recipes' modules; ``*`` stands
for any text. ``nonfinite/<metric>`` follows from them (`new_name`)."""
_PRESENT = frozenset(new for _, new in _PLUGINS)
_IN_EVERY_OLD_RUN = frozenset(("clipped", "skipped"))


def full_name(name: str) -> str:
    """The name under which a plugin's metric is logged.

    >>> full_name("spike_score"), full_name("stability_layers/grad_norm/net")
    ('stability/spike_score', 'stability_layers/grad_norm/net')
    """
    return name if is_own(name) or name.startswith(THROUGHPUT) else OWN + name


def is_own(name: str) -> bool:
    """Whether a name is one that plugins write."""
    return name.startswith((OWN, LAYERS, NONFINITE))


def new_name(name: str, aliases: tuple[tuple[str, str], ...] = ALIASES) -> str:
    """The present name of a metric that had another one; any other name as it is.

    >>> new_name("clipped"), new_name("second/spike_score"), new_name("nonfinite/loss"), new_name("acc")
    ('stability/clipped_share', 'stability/second/spike_score', 'stability_nonfinite/stability/loss', 'acc')
    """
    if is_own(name):
        return name
    if name.startswith("nonfinite/") and aliases:
        return NONFINITE + new_name(name.removeprefix("nonfinite/"), aliases)
    return next((new for old, pattern in aliases if (new := _translated(name, old, pattern)) is not None), name)


def old_names(name: str) -> list[str]:
    """The names that a metric had before, the newest first; of a plugin of another project, the name without prefix.

    >>> old_names("stability/clipped_share"), old_names("stability_layers/grad_norm/net"), old_names("val/loss")
    (['clipped'], ['grad_norm/net'], ['val_loss'])
    >>> old_names("stability/batches_excluded"), old_names("stability/coolness"), old_names("acc")
    (['batches_excluded', 'batches_left_out'], ['coolness'], [])
    >>> old_names("stability/grad_norm/generator")  # of one of several optimizers, which is newer than the prefix
    []
    """
    found = [old for pattern, new in ALIASES if (old := _translated(name, new, pattern)) is not None]
    if name.startswith(NONFINITE):
        metric = name.removeprefix(NONFINITE)
        return [f"nonfinite/{each}" for each in (*old_names(metric), metric)]
    metric, _, optimizer = name.removeprefix(OWN).partition("/")
    if not name.startswith(OWN) or (optimizer and OWN + metric in _PRESENT):
        return found
    return found or [name.removeprefix(OWN)]


def find(name: str, names: Container[str]) -> str | None:
    """The one of some names that is meant by a present or an old name; None if there is none.

    A metric that has the name itself comes first, so a module's own ``loss`` is found, if it logs one.

    >>> find("loss", {"stability/loss"}), find("stability/loss", {"loss"}), find("loss", {"loss", "stability/loss"})
    ('stability/loss', 'loss', 'loss')
    """
    return next((each for each in (name, new_name(name), full_name(name), *old_names(name)) if each in names), None)


def renamed(metrics: Mapping[str, V], of_recipe: bool = False) -> dict[str, V]:
    """The metrics of a run by their present names.

    Only runs that the plugins have logged under old names are renamed: another run's ``loss`` is its own.

    Args:
        metrics: of one run, by the names under which they were logged.
        of_recipe: whether the module is one of the recipes'; another module's ``val_loss`` is its own.

    >>> renamed({"loss": 2.0, "clipped": 0.0, "skipped": 0.0, "val_loss": 3.0})
    {'stability/loss': 2.0, 'stability/clipped_share': 0.0, 'stability/skipped': 0.0, 'val_loss': 3.0}
    >>> renamed({"loss": 2.0, "stability/loss": 1.0})
    {'loss': 2.0, 'stability/loss': 1.0}
    """
    is_old = metrics.keys() >= _IN_EVERY_OLD_RUN and not any(map(is_own, metrics))
    aliases = (_PLUGINS if is_old else ()) + (_RECIPES if of_recipe else ())
    present = {new_name(name, aliases): value for name, value in metrics.items()}
    return present | {name: value for name, value in metrics.items() if name in present}


def without_old_names(metrics: Mapping[str, V]) -> dict[str, V]:
    """Metrics of a Trainer without the copies under old names: the same objects as those under the new ones."""
    own = {id(value) for name, value in metrics.items() if is_own(name)}
    return {name: value for name, value in metrics.items() if is_own(name) or id(value) not in own}


def in_use_by_old_name(name: str, metrics: Mapping[str, object]) -> str | None:
    """The present name of a metric that is read by its old one; None if the name is not old, or a module logs it."""
    own: Iterator[str] = (each for each in (new_name(name), full_name(name)) if each != name and is_own(each))
    return next((each for each in own if each in metrics and metrics.get(name) is metrics[each]), None)


def _translated(name: str, pattern: str, other: str) -> str | None:
    """The name with the text of ``*`` moved from one pattern to another; None if it does not match."""
    before, star, after = pattern.partition("*")
    if not star:
        return other if name == pattern else None
    matches = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return other.replace("*", name[len(before) : len(name) - len(after)]) if matches else None
