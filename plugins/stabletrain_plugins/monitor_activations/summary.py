"""The readings of some steps by layer, from the numbers that were read in them; plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from stabletrain.core.layer_names import ModuleLayers
from stabletrain_plugins.monitor_activations.look import Key

STEP = "training_step"
"""The layer of what is called in no module."""


class Readings:
    """Sums, with their weights, and maxima of the readings; all finite.

    Args:
        layers: names the layers.
    """

    def __init__(self, layers: ModuleLayers) -> None:
        self._layers = layers
        self.sums: dict[str, tuple[float, float]] = {}
        """By ``reading/layer``: of activation_rms the squares."""
        self.maxima: dict[str, float] = {}
        """By ``reading/layer``, and ``nonfinite_outputs``."""

    def add(self, numbers: Sequence[tuple[Key, float]]) -> None:
        """Add the numbers of one step."""
        numbers = [(key, value) for key, value in numbers if not (key.again and self._layers.is_above(key.module))]
        outermost: dict[str, tuple[int, bool]] = {}
        for key, _ in numbers:
            if key.what == "norm":
                layer = self._layer(key)
                outermost[layer] = min(outermost.get(layer, _level(key)), _level(key))
        # not by their norms: the squares of large finite numbers overflow, such as those of a mask
        bad = {key.module for key, value in numbers if key.what == "largest" and not math.isfinite(value)}
        self._raise("nonfinite_outputs", len(bad))
        for key, value in numbers:
            if not math.isfinite(value):
                continue
            layer, elements = self._layer(key), key.elements
            if key.what == "norm" and _level(key) == outermost[layer]:
                self._sum(f"activation_rms/{layer}", value * value, elements)
            elif key.what == "largest":
                self._raise(f"activation_max/{layer}", value)
            elif key.what == "zeros" and not key.again:
                self._sum(f"zeros/{layer}", elements - value, elements)
            elif key.what == "saturated" and not key.again:
                self._sum(f"saturated/{layer}", value, elements)
            elif key.what == "bound":
                self._raise(f"attention_bound/{layer}", value)
            elif key.what == "logit":
                self._raise(f"attention_logit/{layer}/{key.head}", value)
            elif key.what == "entropy":
                self._sum(f"attention_entropy/{layer}/{key.head}", value, 1)
            elif key.what == "output_logit":
                self._raise("output_logit", value)
            elif key.what == "output_logz":
                self._sum("output_logz", value, elements)

    def _layer(self, key: Key) -> str:
        return self._layers.of(key.module) if key.module else STEP

    def _sum(self, name: str, value: float, weight: float) -> None:
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = total + value, weights + weight

    def _raise(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, value), float(value))


def values(sums: Mapping[str, tuple[float, float]], maxima: Mapping[str, float]) -> dict[str, float]:
    """The readings by ``reading/layer``: means of what was added up, of activation_rms the root."""
    means = {name: total / weight for name, (total, weight) in sums.items()}
    return {name: math.sqrt(mean) if name.startswith("activation_rms/") else mean for name, mean in means.items()} | {
        **maxima
    }


def by_reading(found: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """The readings by their name, then by layer; a head is part of the layer."""
    table: dict[str, dict[str, float]] = {}
    for name, value in found:
        reading, _, layer = name.partition("/")
        table.setdefault(reading, {})[layer] = value
    return table


def _level(key: Key) -> tuple[int, bool]:
    """How far within the model it is; a function is within the module that calls it."""
    return key.module.count("."), key.of_function
