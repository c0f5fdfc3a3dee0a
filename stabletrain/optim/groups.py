"""Parameter groups: which parameters decay, and at which rate, decided in one place for every optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stabletrain.errors import UserError
from stabletrain.optim.kinds import KINDS, NamedTensor, named_tensors, plain_name
from stabletrain.optim.layers import find_layers
from stabletrain.optim.options import KEY, GroupOptions, group_options

_MOST_NAMES = 3


@dataclass(frozen=True)
class Decision:
    """What is decided about one parameter.

    Args:
        tensor: the parameter.
        decays: whether the optimizer's weight decay applies to it.
        weight_decay: its weight decay, if the user has set one; None: the optimizer's, or 0.
        lr_scale: factor on its learning rate.
    """

    tensor: NamedTensor
    decays: bool
    weight_decay: float | None
    lr_scale: float

    def decay(self, weight_decay: float) -> float:
        """Its weight decay.

        Args:
            weight_decay: the optimizer's.
        """
        if self.weight_decay is not None:
            return self.weight_decay
        return weight_decay if self.decays else 0.0


def decide(module: nn.Module, options: GroupOptions, key: str = KEY) -> list[Decision]:
    """Decide about every parameter of a module, also the frozen ones, each once, in the module's order.

    Args:
        module: the module.
        options: the user's.
        key: config key of the options, for messages.

    Raises:
        UserError: if an override matches no parameter, or ``layer_decay`` finds no list of blocks.
    """
    tensors = named_tensors(module)
    overrides = options.parsed(key)
    for each in overrides:
        if not any(each.matches(tensor.names) for tensor in tensors):
            raise UserError(
                f"{key}.overrides[{each.index}].pattern: {each.pattern!r} matches no parameter; their names are "
                f"{_some(tensor.name for tensor in tensors)}"
            )
    layers = find_layers(module, tensors, options.layers, f"{key}.layers") if options.layer_decay != 1 else None
    found = []
    for tensor in tensors:
        override = next((each for each in overrides if each.matches(tensor.names)), None)
        decays = tensor.decays or (tensor.kind == "embedding" and options.decay_embeddings and not tensor.exempt)
        scale = 1.0 if layers is None else layers.scale(tensor.name, options.layer_decay)
        weight_decay = None
        if override is not None:
            decays = decays if override.decay is None else override.decay
            weight_decay, scale = override.weight_decay, scale * override.lr_scale
        found.append(Decision(tensor, decays, weight_decay, scale))
    return found


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    lr: float | Tensor | None = None,
    decay_embeddings: bool = False,
    layer_decay: float = 1.0,
    layers: str | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    embedding_bits: int | None = None,
    key: str = KEY,
) -> list[dict[str, Any]]:
    """Return the parameter groups of a module's trained parameters, for the constructor of an optimizer.

    Embeddings, norms and biases do not decay, hidden matrices do; the module that owns a parameter decides
    (`stabletrain.optim.kinds.named_tensors`). Tied weights appear once.

    Args:
        module: the module; its frozen parameters are in no group.
        weight_decay: of the parameters that decay, >= 0.
        lr: the optimizer's learning rate; needed only if ``layer_decay`` or an override scales it.
        decay_embeddings: see `GroupOptions`.
        layer_decay: see `GroupOptions`.
        layers: see `GroupOptions`.
        overrides: see `GroupOptions`.
        embedding_bits: value of the key ``optim_bits`` of groups of embeddings, for optimizers with low-bit state;
            None: no such key.
        key: config key of these options, for messages.

    Returns:
        Groups with the keys ``params``, ``weight_decay`` and ``kind`` ("weight", "embedding", "norm", "bias" or
        "other"), ``lr`` where it differs from the optimizer's, and ``optim_bits`` if asked for.

    Raises:
        UserError: if nothing is trained, an override matches nothing, or an option is out of range.

    >>> groups = parameter_groups(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), weight_decay=0.1)
    >>> [(group["kind"], len(group["params"]), group["weight_decay"]) for group in groups]
    [('weight', 1, 0.1), ('embedding', 1, 0.0), ('bias', 1, 0.0)]
    """
    options = group_options(
        key, decay_embeddings=decay_embeddings, layer_decay=layer_decay, layers=layers, overrides=overrides
    )
    found: dict[tuple[int, float, float], dict[str, Any]] = {}
    for each in decide(module, options, key):
        if not each.tensor.parameter.requires_grad:
            continue
        kind = each.tensor.kind
        decay = each.decay(weight_decay)
        group = found.setdefault(
            (KINDS.index(kind), -decay, -each.lr_scale), {"params": [], "weight_decay": decay, "kind": kind}
        )
        group["params"].append(each.tensor.parameter)
        if each.lr_scale != 1:
            if lr is None:
                raise UserError(f"{key}: layer_decay and lr_scale need the optimizer's learning rate; set optimizer.lr")
            group["lr"] = lr * each.lr_scale
        if embedding_bits is not None and kind == "embedding":
            group["optim_bits"] = embedding_bits
    if not found:
        raise UserError(
            f"{type(module).__name__}: no parameter is trained: it has none, or all are frozen (requires_grad is False)"
        )
    groups = [found[order] for order in sorted(found)]
    check_groups(module, groups)
    return groups


def check_groups(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that each trained parameter of a module is in exactly one group.

    Args:
        module: the module.
        groups: of its optimizer.

    Raises:
        UserError: with the names of those that are in none, or in two.
    """
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    trained = {plain_name(name): each for name, each in module.named_parameters() if each.requires_grad}
    missing = [name for name, each in trained.items() if id(each) not in counts]
    twice = [name for name, each in module.named_parameters() if counts.get(id(each), 0) > 1]
    for names, where in ((missing, "in no group"), (twice, "in two groups")):
        if names:
            raise UserError(
                f"parameter groups: expected each trained parameter in one group of the optimizer, but {len(names)} "
                f"{'is' if len(names) == 1 else 'are'} {where}: {_some(names)}"
            )


def _some(names: Iterable[str]) -> str:
    """A few names, for a message."""
    listed = list(names)
    rest = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return f"{', '.join(listed[:_MOST_NAMES])}{rest}"
