"""Exactness with an optimizer: skip equals never seen, rollback equals none, resume equals uninterrupted, bit for bit.

Everything is compared: weights, the optimizer's state by parameter and by string key, groups, its own attributes and
those of the objects and optimizers that it holds, and the parts of tensor subclasses. The comparison follows attributes
by itself, and not with the code that it tests.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from going_back import GoBack
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from stabletrain import Guard, ResumeExactly, SaveCheckpoints, SkipNonFinite
from stabletrain.testing.checks.equality import differences, nonfinite_numbers
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads.gpt import GPT

MakeOptimizer = Callable[[Any], Optimizer]
Batch = tuple[Tensor, bool]

_FAULTS = (0, 5, 12, 13)
"""Positions of the batches with a NaN loss: the first, one alone, and two in a row, after the checkpoint too."""
_SAVED_AT = 9
_PROCESS = frozenset(
    {
        "step",
        "zero_grad",
        "defaults",
        "initialized",  # bitsandbytes: moved to the device in this process
        "mng",  # bitsandbytes: singletons
        "page_mng",
        "_cpu_paged_warned",
        "_opt_called",
        "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured",
        "_need_device_dtype_check_for_fused",
    }
)
"""Attributes that say something about the process, and not about the run."""


class TinyGPT(LightningModule):
    """A language model of one block with dropout; a batch is (tokens, whether its loss is NaN)."""

    def __init__(self, make: MakeOptimizer, of_module: bool = False, precision: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = GPT(1, 4, 32, 8, 24, 0.1, False, False).to(precision)
        self.make, self.of_module = make, of_module

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, is_bad = batch
        loss = nn.functional.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss * float("nan") if is_bad else loss

    def configure_optimizers(self) -> Any:
        return self.make(self.net if self.of_module else list(self.net.parameters()))


class _Items(Dataset[Batch]):
    def __init__(self, items: list[Batch]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        return self.items[index]


class _Reseed(Callback):
    """Dropout depends on the batch alone: a run without the faulty batches draws the same masks."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(int(batch[0].sum()))


class _Save(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == _SAVED_AT and not self.path.exists():
            trainer.save_checkpoint(self.path)


class _End(Callback):
    """Keeps what there is at the end of training, before Lightning moves anything."""

    state: dict[str, Any]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = everything(trainer)


class Exactness:
    """The runs of one optimizer, each compared with a run of bare Lightning over the good batches.

    Args:
        make: builds the optimizer from a list of parameters.
        folder: for the checkpoints.
        of_module: ``make`` gets the module instead.
        steps: good batches.
        precision: of the parameters; None: float32.
        callbacks: more of them for each run, as a function.
        options: of the Trainer.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        folder: Path,
        of_module: bool = False,
        steps: int = 20,
        precision: torch.dtype | None = None,
        callbacks: Callable[[], list[Callback]] = list,
        **options: Any,
    ) -> None:
        self._make, self._folder, self._of_module, self._precision = make, folder, of_module, precision
        self._callbacks, self._options = callbacks, options
        total = steps + len(_FAULTS)
        self._items = [
            (torch.randint(0, 24, (4, 9), generator=torch.Generator().manual_seed(i)), i in _FAULTS)
            for i in range(total)
        ]
        self._good = [item for item in self._items if not item[1]]
        self.reference = self._fit(self._good)

    def skip(self) -> list[str]:
        """What differs after dropped steps. Saves the checkpoints of `resume`."""
        saving = SaveCheckpoints(self._folder / "saved", _SAVED_AT, keep_last=None, background=False, on_sigterm=False)
        own = [SkipNonFinite(), Guard(mode="exact"), ResumeExactly(), _Save(self._folder / "one.ckpt"), saving]
        return self._compare(self._fit(self._items, *own))

    def rollback(self) -> list[str]:
        """What differs after going back three times."""
        going = GoBack(4, (7, 15, 16))
        state = self._fit(self._good, going, SkipNonFinite(), Guard(mode="exact"))
        assert going.went_back == 3
        return self._compare(state)

    def resume(self, own_format: bool = False) -> list[str]:
        """What differs after resuming in a new Trainer; call `skip` first.

        Args:
            own_format: from a checkpoint of `SaveCheckpoints`; False: from Lightning's file.
        """
        path = self._folder / (f"saved/step-{_SAVED_AT:08d}" if own_format else "one.ckpt")
        assert path.exists()
        saving = [SaveCheckpoints(self._folder / "other", None, on_sigterm=False)] if own_format else []
        own = [SkipNonFinite(), Guard(mode="exact"), ResumeExactly(), *saving]
        return self._compare(self._fit(self._items, *own, ckpt_path=path))

    def all_problems(self) -> dict[str, list[str]]:
        """What differs, by kind of run; empty if nothing does."""
        runs: dict[str, Callable[[], list[str]]] = {
            "skip": self.skip,
            "rollback": self.rollback,
            "resume": self.resume,
            "resume from a folder": lambda: self.resume(own_format=True),
        }
        return {name: found for name, run in runs.items() if (found := run())}

    def _compare(self, state: dict[str, Any]) -> list[str]:
        found = list(differences(self.reference, state, "end"))
        return found + list(nonfinite_numbers({k: v for k, v in state.items() if k.startswith("weights")}, "end"))

    def _fit(self, items: list[Batch], *callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        seed_everything(0, verbose=False)
        model, end = TinyGPT(self._make, self._of_module, self._precision), _End()
        mine = quiet_trainer(
            *callbacks,
            *self._callbacks(),
            _Reseed(),
            end,
            **{"max_epochs": 1, "limit_val_batches": 0, "default_root_dir": self._folder, **self._options},
        )
        with warnings.catch_warnings():
            for text in ("does not have many workers", "callbacks used to create the checkpoint", "yielded None"):
                warnings.filterwarnings("ignore", f".*{text}")
            warnings.filterwarnings("ignore", module="(torchao|bitsandbytes)")
            options = {} if ckpt_path is None else {"ckpt_path": ckpt_path, "weights_only": True}
            mine.fit(model, DataLoader(_Items(items), batch_size=None), **options)
        return end.state


def everything(mine: Trainer) -> dict[str, Any]:
    """Copies of all that a step may change, by name."""
    found = {f"weights.{name}": value for name, value in mine.lightning_module.state_dict().items()}
    seen = {id(each) for each in mine.lightning_module.modules()}
    for i, each in enumerate(mine.optimizers):
        found |= dict(_flat(each, f"optimizer{i}", seen, {p: n for n, p in mine.lightning_module.named_parameters()}))
    found["global_step"] = mine.global_step
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def _flat(value: Any, path: str, seen: set[int], names: dict[Any, str]) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values in a value, each with its path."""
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) and value in names:
            yield path, f"the parameter {names[value]}"
        elif hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _flat(getattr(value, name), f"{path}.{name}", seen, names)
        else:
            yield path, value
    elif isinstance(value, (bool, int, float, str, type(None))):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            name = names.get(key, "a tensor") if isinstance(key, Tensor) else key
            yield from _flat(each, f"{path}[{name}]", seen, names)
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _flat(each, f"{path}[{i}]", seen, names)
    elif isinstance(value, torch.Generator):
        yield path, value.get_state()
    elif id(value) not in seen and not isinstance(value, (type, types.FunctionType, types.MethodType)):
        seen.add(id(value))
        for key, each in getattr(value, "__dict__", {}).items():
            if not (key.startswith("_optimizer_") or key in _PROCESS):
                yield from _flat(each, f"{path}.{key}", seen, names)
