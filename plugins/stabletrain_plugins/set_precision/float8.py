"""Linear layers that multiply in float8, by torchao: chosen, converted in place for a fit, and put back."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.errors import UserError
from stabletrain.extras import require
from stabletrain.settings import worded

_CAPABILITY = (8, 9)
_MULTIPLE = 16


def check_device(device: torch.device, *, emulate: bool) -> None:
    """Raise an error where the device has no float8 matrix product; torchao runs on others without a complaint.

    Args:
        device: of the training.
        emulate: whether the products are emulated, which works everywhere and is slow.

    Raises:
        UserError: on a CPU, and on a GPU below compute capability 8.9.
    """
    require("torchao", "precision=fp8")
    if emulate:
        return
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if has is None or has < _CAPABILITY:
        found = "a CPU" if device.type == "cpu" else device.type if has is None else f"a GPU of {has[0]}.{has[1]}"
        raise UserError(
            worded(
                f"precision fp8: expected a GPU of compute capability 8.9 or higher (Ada, Hopper or later), got "
                f"{found}. Use precision=bf16_mixed, or emulate float8 for tests: config key precision.emulate=true"
            )
        )


def choose(root: nn.Module, skip: Sequence[str] | None, kept: Collection[int]) -> dict[str, nn.Linear]:
    """The layers to convert, by name: plain ``nn.Linear`` whose dimensions are multiples of 16.

    Args:
        root: the LightningModule.
        skip: names, or patterns of names, of layers that stay as they are; None: the output layer, which is the last
            linear layer of the module, and layers that share their weight, as tied embeddings do.
        kept: ids of modules that are kept in fp32.

    Raises:
        UserError: if an entry of ``skip`` matches no linear layer, or no layer is left.
    """
    layers = {name: each for name, each in root.named_modules() if type(each) is nn.Linear}
    if skip is None:
        owners: dict[int, int] = {}
        for module in root.modules():
            for p in module.parameters(recurse=False):
                owners[id(p)] = owners.get(id(p), 0) + 1
        shared = [name for name, each in layers.items() if owners[id(each.weight)] > 1]
        skipped = {*shared, *([] if shared else list(layers)[-1:])}
    else:
        skipped = set()
        for entry in skip:
            found = [name for name in layers if fnmatch.fnmatchcase(name, entry)]
            if not found:
                text = f"SetPrecision: fp8_skip: {entry!r} matches no linear layer; there are {', '.join(layers)}"
                raise UserError(worded(f"{text} (config key precision.fp8_skip)"))
            skipped |= set(found)
    fit = {
        name: each
        for name, each in layers.items()
        if name not in skipped
        and id(each) not in kept
        and each.in_features % _MULTIPLE == each.out_features % _MULTIPLE == 0
    }
    if not fit:
        raise UserError(
            worded(
                f"precision fp8: no linear layer can be converted, of {len(layers)}: expected plain nn.Linear layers "
                f"with both dimensions divisible by {_MULTIPLE}, besides the output layer. Use precision=bf16_mixed, "
                "or choose the layers that are left out (config key precision.fp8_skip)"
            )
        )
    return fit


def convert(root: nn.Module, layers: dict[str, nn.Linear], recipe: str, *, emulate: bool) -> Callable[[], None]:
    """Convert the layers in place; parameters and the keys of the state dict stay.

    Args:
        root: the LightningModule.
        layers: from `choose`.
        recipe: of torchao: how values are scaled.
        emulate: compute in a higher precision on values that are rounded to float8.

    Returns:
        The function that puts the layers back.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config: Any = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(root, config=config, module_filter_fn=lambda _, name: name in layers)
    originals = {}
    for name, layer in layers.items():
        converted = root.get_submodule(name)
        converted.train(layer.training)
        originals[id(converted)] = layer

    def undo() -> None:
        for parent in list(root.modules()):
            for key, child in list(parent.named_children()):
                layer = originals.get(id(child))
                if layer is not None:
                    layer.weight, layer.bias = child.weight, child.bias  # type: ignore[assignment]
                    setattr(parent, key, layer.train(child.training))

    return undo
