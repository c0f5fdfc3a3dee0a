"""Train a module with another optimizer than the one that its ``configure_optimizers`` returns."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from stabletrain import settings
from stabletrain.errors import UserError, did_you_mean
from stabletrain.optim.build import Arguments, own_configure_optimizers, replace_configure_optimizers
from stabletrain.optim.options import KEY, GroupOptions, group_options
from stabletrain.runtime.guard.given_twice import attach, given_once
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.fabric import refuse_in_fabric
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.plugin_state import names_its_plugin
from stabletrain_plugins.swap_optimizer.swap import swap

logger = logging.getLogger("stabletrain")

_NAME, _SLOT = "swap_optimizer", "optimizer"
_KEY = f"plugins.{_SLOT}"


@refuse_in_fabric
class SwapOptimizer(Callback):
    """Train an unmodified module with another optimizer, and keep its parameter groups, rates and schedulers.

    Each of the module's groups is divided by what decays: weights do, embeddings, norms and biases do not. Learning
    rates are the module's; an ``lr`` among the optimizer's arguments multiplies all of them by ``lr`` over the rate of
    the module's optimizer. A ``weight_decay`` among them is that of the groups that decay; else it is the module's.

    Args:
        optimizer: class of the optimizer, or a ``functools.partial`` of it with arguments; None: the module's own is
            kept as it is.
        decay_embeddings: whether weight decay applies to embeddings.
        layer_decay: factor on the learning rate per layer from the output towards the input, 0 < layer_decay <= 1; 1:
            off.
        layers: name of the list of blocks for ``layer_decay``, such as ``"net.blocks"``; None: the largest one.
        overrides: mappings with ``pattern``, a regular expression that is searched for in the parameters' names, and
            ``decay`` (true or false), ``weight_decay`` (>= 0) or ``lr_scale`` (> 0). The first that matches wins.

    Raises:
        UserError: if an argument is out of range; when training starts, if the module has several optimizers, a
            scheduler cannot be moved to another optimizer, or an override matches nothing.

    >>> from functools import partial
    >>> from torch.optim import AdamW
    >>> from lightning.pytorch import Trainer
    >>> swap = SwapOptimizer(partial(AdamW, betas=(0.9, 0.95)), overrides=[{"pattern": "head", "lr_scale": 0.1}])
    >>> trainer = Trainer(callbacks=[swap], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    plugin: ClassVar[str] = _NAME
    slot: ClassVar[str] = _SLOT
    chosen_by_default: bool = False

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] | None = None,
        decay_embeddings: bool = False,
        layer_decay: float = 1.0,
        layers: str | None = None,
        overrides: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if optimizer is not None:
            _check(optimizer)
        try:
            self._options = group_options(
                _KEY, decay_embeddings=decay_embeddings, layer_decay=layer_decay, layers=layers, overrides=overrides
            )
        except UserError as error:
            raise _worded(error) from None
        self.optimizer = optimizer
        self.decay_embeddings, self.layer_decay = decay_embeddings, layer_decay
        self.layers, self.overrides = layers, overrides
        self._undo: Callable[[], None] | None = None
        self._saved: list[int] | None = None
        self._sizes: list[int] = []

    @given_once
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return _NAME

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the module's ``configure_optimizers``, which is called later."""
        attach(self)
        if stage != "fit":
            return
        self._restore()
        self._sizes, self._saved = [], None
        if self.optimizer is None:
            logger.warning("SwapOptimizer: no optimizer is given: the module's own is used (%s.optimizer)", _KEY)
            return
        module = trainer_internals.unwrapped(pl_module)
        configure, selected = own_configure_optimizers(module)
        options, key = self._choose(selected)
        self._undo = replace_configure_optimizers(module, lambda each: self._swapped(each, configure(), options, key))

    def plan_setup(self, trainer: Trainer, module: LightningModule) -> None:
        """In a dry run: as `setup`.

        Args:
            trainer: of the traced steps.
            module: whose ``configure_optimizers`` is wrapped.
        """
        self.setup(trainer, module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the optimizer's state is loaded from a checkpoint: check that its groups are those of this run."""
        if self._undo is None:
            return
        self._sizes = [len(group["params"]) for group in trainer.optimizers[0].param_groups]
        if self._saved is not None and self._saved != self._sizes:
            raise UserError(
                f"SwapOptimizer: the checkpoint's optimizer has groups of {self._saved} tensors, this run's of "
                f"{self._sizes}: the module, the optimizer or the options have changed; resume with those of the "
                "checkpoint"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module: after an exception Lightning calls no teardown."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's ``configure_optimizers``."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """The number of tensors in each group, to detect at a resume that they are others."""
        attach(self)  # a checkpoint may be saved before the first setup
        return {"groups": list(self._sizes)}

    @names_its_plugin
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        sizes = state_dict["groups"]
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise TypeError("groups must be a list of whole numbers")
        self._saved = sizes or None

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        return {**self.__dict__, "_undo": None}

    def _choose(self, selected: GroupOptions | None) -> tuple[GroupOptions, str]:
        """The options of the groups with their config key: the plugin's, or those of the command line's optimizer."""
        if selected is None or selected == GroupOptions():
            return self._options, _KEY
        if self._options not in (GroupOptions(), selected):
            raise UserError(f"{_KEY}: the options of the groups are set here and in {KEY}, and differ; set them in one")
        return selected, KEY

    def _swapped(self, module: LightningModule, output: Any, options: GroupOptions, key: str) -> Any:
        assert self.optimizer is not None
        try:
            return swap(module, output, self.optimizer, options, key)
        except UserError as error:
            raise _worded(error) from None

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def _check(optimizer: Any) -> None:
    """Refuse what is no class of an optimizer, nor a partial of one."""
    made = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        got = f"an optimizer that exists already ({type(optimizer).__name__})"
        got = got if isinstance(optimizer, Optimizer) else repr(optimizer)
        raise UserError(
            f"SwapOptimizer: optimizer: expected a class such as torch.optim.AdamW, or a functools.partial of one, got "
            f"{got}; its parameters are passed later"
        )
    if isinstance(made, type) and not issubclass(made, Optimizer):
        raise UserError(
            f"SwapOptimizer: optimizer: expected a class of an optimizer such as torch.optim.AdamW, or a "
            f"functools.partial of one, got {made.__module__}.{made.__qualname__}, which is none"
        )
    if not isinstance(made, type) and "lr" not in inspect.signature(made).parameters:
        raise UserError(
            "SwapOptimizer: optimizer: expected a class, or a functools.partial of one, got the function "
            f"{getattr(made, '__name__', made)!r}, of which the arguments are not known; write "
            "functools.partial(torch.optim.AdamW, betas=(0.9, 0.95))"
        )
    given = optimizer.keywords if isinstance(optimizer, functools.partial) else {}
    for name, known in Arguments(made).unknown(given).items():
        raise UserError(
            f"SwapOptimizer: optimizer: {made.__name__} has no argument {name!r}{did_you_mean(name, known)}; it has "
            f"{', '.join(known)}"
        )


def _worded(error: UserError) -> UserError:
    return UserError(settings.worded(str(error), _SLOT, SwapOptimizer.__name__))
