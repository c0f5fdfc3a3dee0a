"""What each parameter of a module is: a weight, an embedding, part of a norm, a bias, or something else.

The module that owns a parameter decides, not the parameter's shape: an embedding is a matrix, and so are the biases of
some attention layers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from stabletrain.errors import UserError

Kind: TypeAlias = Literal["weight", "embedding", "norm", "bias", "other"]
KINDS: tuple[Kind, ...] = ("weight", "embedding", "norm", "bias", "other")

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WEIGHTS = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip
_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_NORM_AT_END = re.compile(r"norm(?:alization)?(?:layer)?(?:\d+d?)?$")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)(?=\.|$)")
"""Parts of names that torch.compile, activation checkpointing and FSDP add."""
_NOT_DECAYED = ("position", "token", "scale", "gamma", "embed", "temperature", "lambda")
"""In the name of a parameter of kind ``other``: it does not decay, whatever its shape."""
_NOT_DECAYED_WORDS = frozenset({"pos", "cls", "reg", "register", "registers", "gain", "mask", "log"})
"""Words of such a name, between underscores, that say the same."""
_PRECEDENCE: tuple[Kind, ...] = ("embedding", "bias", "norm", "weight", "other")
"""Of a tensor with several owners."""


@dataclass(frozen=True)
class NamedTensor:
    """A parameter of a module; one that is used in several places (tied weights) is one of these.

    Args:
        parameter: the tensor.
        names: its names, the first one first, without the parts that wrappers such as torch.compile add.
        kind: what it is.
        decays: whether weight decay applies to it by default. Embeddings, norms and biases do not decay, and neither
            does what the module exempts (``no_weight_decay()``, ``p._no_weight_decay``).
        exempt: whether the module itself exempts it from weight decay.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    kind: Kind
    decays: bool
    exempt: bool

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def named_tensors(module: nn.Module) -> list[NamedTensor]:
    """Return all parameters of a module, also frozen ones, each once, in the module's order.

    The kind follows from the module that owns the parameter, and from the parameter's own name, in this order:

    1. the owner is an embedding: by its type, or "embedding" is in the name of its class;
    2. "bias" is in the parameter's name, whatever its rank;
    3. the owner is a norm: by its type, or "norm" is in the name of its class, which then may not have matrices;
    4. the owner is a linear, convolutional, attention or recurrent layer;
    5. other: decays if it has two dimensions or more and no name that says otherwise, such as ``pos_embed``.

    A tensor with several names has the kind of its embedding, if one of its owners is one.

    Args:
        module: any module.

    Raises:
        UserError: for parameters without a shape (lazy modules), and parameters that FSDP has flattened into one.

    >>> [(each.name, each.kind) for each in named_tensors(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))]
    [('0.weight', 'embedding'), ('1.weight', 'weight'), ('1.bias', 'bias')]
    """
    names: dict[int, list[str]] = {}
    kinds: dict[int, list[tuple[Kind, bool]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for owner, given, below, parameter in _owned(module):
        full = plain_name(given)
        _check(parameter, full)
        key = id(parameter)
        parameters[key] = parameter
        if full not in names.setdefault(key, []):
            names[key].append(full)
        kinds.setdefault(key, []).append(_kind(owner, below, parameter))
    exempt = _exempt_names(module)
    found = []
    for key, parameter in parameters.items():
        kind, decays = min(kinds[key], key=lambda each: _PRECEDENCE.index(each[0]))
        marked = bool(getattr(parameter, "_no_weight_decay", False))
        is_exempt = marked or not exempt.isdisjoint(names[key])
        found.append(NamedTensor(parameter, tuple(names[key]), kind, decays and not is_exempt, is_exempt))
    return found


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that wrappers add to it.

    >>> plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.weight")
    'blocks.0.weight'
    """
    return _WRAPPERS.sub("", name).lstrip(".")


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Every parameter with its owner, its name, and its name below the owner.

    The owner of what is in a list or dictionary of parameters, or behind a parametrization such as weight norm, is the
    module that has these.
    """
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        parent = path.rpartition(".")[0]
        if isinstance(each, _CONTAINERS) and path:
            owners[path] = owners[parent]
        elif isinstance(each, parametrize.ParametrizationList) and path:  # linear.parametrizations.weight
            owners[path] = owners[parent.rpartition(".")[0]]
        else:
            owners[path] = each, path
        owner, start = owners[path]
        for own, parameter in each.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{own}".lstrip(".")
            yield owner, name, name.removeprefix(f"{start}.") if start else name, parameter


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> tuple[Kind, bool]:
    """The kind of a parameter, and whether it decays.

    Args:
        owner: the module that has it.
        name: below the owner.
        parameter: the tensor.
    """
    text, of_class = name.lower(), type(owner).__name__.lower()
    # transformers has a Conv1D that is no convolution of torch; FSDP2 derives classes of its own from all
    is_weight = isinstance(owner, _WEIGHTS) or any(each.__name__ == "Conv1D" for each in type(owner).__mro__)
    if isinstance(owner, _EMBEDDINGS) or "embedding" in of_class:
        return "embedding", False
    if "bias" in text:
        return "bias", False
    if isinstance(owner, _NORMS) or ("norm" in of_class and not is_weight and _is_of_norm(of_class, parameter)):
        return "norm", False
    if is_weight and "weight" in text:  # not what a subclass adds, such as a scale
        return "weight", True
    return "other", parameter.ndim >= 2 and not _says_otherwise(text)


def _is_of_norm(of_class: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a class with "norm" in its name is part of a norm, and no matrix of a PreNormAttention."""
    return bool(_NORM_AT_END.search(of_class)) or sum(size > 1 for size in parameter.shape) <= 1


def _says_otherwise(name: str) -> bool:
    words = re.split(r"[._\d]+", name)
    return any(part in name for part in _NOT_DECAYED) or not _NOT_DECAYED_WORDS.isdisjoint(words)


def _exempt_names(module: nn.Module) -> set[str]:
    """The parameters that a module's ``no_weight_decay()`` lists: names below the module, or patterns with ``*``."""
    found: set[str] = set()
    for path, each in module.named_modules(remove_duplicate=False):
        listed = getattr(each, "no_weight_decay", None)
        listed = listed() if callable(listed) else listed
        if listed is None:
            continue
        if isinstance(listed, str) or not isinstance(listed, Collection):
            raise UserError(
                f"{type(each).__name__}.no_weight_decay: expected a set of names of parameters, got {listed!r:.100}; "
                "return a set"
            )
        own = [plain_name(name) for name, _ in each.named_parameters(remove_duplicate=False)]
        prefix = plain_name(path)
        for pattern in map(str, listed):
            found |= {f"{prefix}.{name}".lstrip(".") for name in own if fnmatch.fnmatchcase(name, pattern)}
    return found


def _check(parameter: nn.Parameter, name: str) -> None:
    if is_lazy(parameter):
        raise UserError(
            f"parameter groups: expected parameters with a shape, got {name!r} of a lazy module; run one batch through "
            "the model before training"
        )
    if isinstance(parameter, FlatParameter):
        raise UserError(
            f"parameter groups: expected separate parameters, got {name!r}, into which FSDP has flattened several; use "
            "FSDPStrategy(use_orig_params=True)"
        )
