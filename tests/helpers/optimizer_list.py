"""About eighty optimizers of torch and of packages that may be missing, each built for a `GPT`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

Make = Callable[[nn.Module], Optimizer]
_NAMES = {"bnb": "bitsandbytes.optim", "ao": "torchao.optim", "po": "pytorch_optimizer", "sf": "schedulefree"}


def matrices_and_others(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """The hidden matrices of a GPT, and its other parameters."""
    named = dict(module.named_parameters())
    hidden = {
        n for n, p in named.items() if p.ndim == 2 and not any(each in n for each in ("token", "position", "head"))
    }
    return [p for n, p in named.items() if n in hidden], [p for n, p in named.items() if n not in hidden]


class Together(Optimizer):
    """Optimizers as one, with one state and one list of groups, linked again after loading."""

    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)
        super().__init__([group for each in parts for group in each.param_groups], {})
        self._link()

    def _link(self) -> None:
        start = 0
        for each in self.parts:
            end = start + len(each.param_groups)
            each.state, each.param_groups = self.state, self.param_groups[start:end]
            start = end

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for each in self.parts:
            each.step()
        return loss


def of(name: str, lr: float | None = 1e-3, **options: Any) -> Make:
    """An optimizer by its package and class, over all parameters.

    Args:
        name: as ``po.Lion``.
        lr: None: the class's own.
        options: further arguments.
    """

    def make(module: nn.Module) -> Optimizer:
        package, _, kind = name.partition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(_NAMES.get(package, package)), kind.partition("-")[0])
            made: Optimizer = found(module.parameters(), **({} if lr is None else {"lr": lr}), **options)
        if package == "sf":
            made.train()  # type: ignore[attr-defined]
        return made

    return make


def _muon(kind: str) -> Make:
    def make(module: nn.Module) -> Optimizer:
        hidden, others = matrices_and_others(module)
        groups = [{"params": hidden, "use_muon": True, "lr": 1e-2}, {"params": others, "use_muon": False, "lr": 1e-3}]
        made: Optimizer = getattr(importlib.import_module("pytorch_optimizer"), kind)(groups)
        return made

    return make


def _together(module: nn.Module) -> Optimizer:
    hidden, others = matrices_and_others(module)
    return Together(optim.Muon(hidden, lr=1e-2, adjust_lr_fn="match_rms_adamw"), optim.AdamW(others, lr=1e-3))


def _adam_mini(module: nn.Module) -> Optimizer:
    made: Optimizer = importlib.import_module("pytorch_optimizer").AdamMini(
        module, lr=1e-3, model_embedding=32, num_heads=4, num_query_groups=4
    )
    return made


def _lookahead(module: nn.Module) -> Optimizer:
    inner = optim.AdamW(module.parameters(), 1e-3)
    made: Optimizer = importlib.import_module("pytorch_optimizer").Lookahead(inner)
    return made


_TORCH: dict[str, Any] = {
    "SGD": {"lr": 0.05},
    "SGD-momentum": {"lr": 0.05, "momentum": 0.9},
    "SGD-nesterov-fused": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "fused": True},
    "Adagrad": {"lr": 0.01},
    "Adagrad-fused": {"lr": 0.01, "fused": True},
    "RMSprop": {},
    "Adam": {},
    "AdamW": {},
    "AdamW-fused": {"fused": True},
    "AdamW-amsgrad": {"amsgrad": True},
    "AdamW-tensor-lr": {"lr": torch.tensor(1e-3), "foreach": False},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adadelta": {"lr": 1.0},
    "ASGD": {"lr": 0.05},
    "Rprop": {"lr": 1e-4},
    "Adafactor": {"lr": 1e-2},
}
_BNB = (
    "AdamW8bit",
    "Lion8bit",
    "LAMB8bit",
    "RMSprop8bit",
    "Adagrad8bit",
    "AdEMAMix8bit",
    "PagedAdamW8bit",
    "LAMB32bit",
)
_PO = (
    *("Lion", "Lamb", "StableAdamW", "SPAM", "StableSPAM", "AdaGC", "SOAP", "ScheduleFreeAdamW", "ScheduleFreeSGD"),
    *("Prodigy", "AdEMAMix", "MARS", "ADOPT", "CAME", "APOLLO", "GaLore", "FlashAdamW", "Fira"),
    *("RACS", "Alice", "Shampoo", "Adan"),
)
OPTIMIZERS: dict[str, Make] = {
    **{
        f"torch.{name}": (
            lambda module, name=name, options=options: getattr(optim, name.partition("-")[0])(
                module.parameters(), **{"lr": 1e-3, **options}
            )
        )
        for name, options in _TORCH.items()
    },
    "torch.Muon": lambda module: optim.Muon(matrices_and_others(module)[0], lr=1e-2),
    "Together": _together,
    **{f"bnb.{name}": of(f"bnb.{name}", min_8bit_size=256) for name in _BNB},
    "bnb.AdEMAMix8bit-scheduled": of("bnb.AdEMAMix8bit", min_8bit_size=256, t_alpha=40, t_beta3=40),
    "bnb.SGD8bit": of("bnb.SGD8bit", min_8bit_size=256, momentum=0.9),
    "bnb.LARS8bit": of("bnb.LARS8bit", min_8bit_size=256, momentum=0.9),
    **{f"ao.{name}": of(f"ao.{name}") for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit")},
    "ao._AdamW-rounding": of("ao._AdamW", bf16_stochastic_round=True),
    **{f"po.{name}": of(f"po.{name}") for name in _PO},
    "po.StableAdamW-kahan": of("po.StableAdamW", kahan_sum=True),
    "po.SPAM-often": of("po.SPAM", update_proj_gap=5, warmup_epoch=3, density=0.5),
    "po.StableSPAM-often": of("po.StableSPAM", update_proj_gap=5, t_max=15),
    "po.Ranger21": of("po.Ranger21", num_iterations=40),
    **{f"po.{name}": _muon(name) for name in ("Muon", "AdaMuon", "NorMuon")},
    "po.AdamMini": _adam_mini,
    "po.Lookahead": _lookahead,
    **{f"sf.{name}": of(f"sf.{name}", 1e-2) for name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")},
    "sf.AdamWScheduleFree-warm": of("sf.AdamWScheduleFree", 1e-2, warmup_steps=10),
    **{f"optimi.{name}": of(f"optimi.{name}") for name in ("AdamW", "Lion", "Adan", "RAdam", "Ranger", "SGD")},
    "optimi.StableAdamW-kahan": of("optimi.StableAdamW", kahan_sum=True),
    "prodigyopt.Prodigy": of("prodigyopt.Prodigy", None),
    "lion_pytorch.Lion": of("lion_pytorch.Lion"),
}
