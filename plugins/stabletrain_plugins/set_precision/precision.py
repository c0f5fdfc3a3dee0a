"""The precision of a training: number formats, modules kept in fp32, and for fp16 a watched loss scale."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.core.events import Event
from stabletrain.core.outcome import Outcome
from stabletrain.core.planned import Planned, Sizes
from stabletrain.errors import UserError, is_number, is_whole, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.metrics import Counters
from stabletrain.runtime.internals.trainer import has_all_modules
from stabletrain.settings import worded
from stabletrain_plugins.set_precision import float8, kept_modules, lightning_precision, report
from stabletrain_plugins.set_precision.kept_modules import KeptModules
from stabletrain_plugins.set_precision.loss_scale import LARGEST, FallBack, LossScale
from stabletrain_plugins.set_precision.report import SavedMemory, Underflow, UnderflowSamples
from stabletrain_plugins.set_precision.stalling import refuse_stalling
from stabletrain_plugins.set_precision.tf32 import allow_tf32

logger = logging.getLogger("stabletrain")

Kind = Literal["bf16_mixed", "fp16_mixed", "bf16_true", "tf32", "fp8"]
Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]

_LIGHTNINGS: dict[Kind, str] = {
    "bf16_mixed": "bf16-mixed",
    "fp16_mixed": "16-mixed",
    "bf16_true": "bf16-true",
    "tf32": "32-true",
    "fp8": "bf16-mixed",
}
USED_BY: dict[str, tuple[Kind, ...]] = {
    "keep_fp32": ("bf16_mixed", "fp16_mixed", "bf16_true", "fp8"),
    "init_scale": ("fp16_mixed",),
    "growth_interval": ("fp16_mixed",),
    "min_scale": ("fp16_mixed",),
    "fall_back": ("fp16_mixed",),
    "cool_down": ("fp16_mixed",),
    "allow_stalling": ("bf16_true",),
    "fp8_recipe": ("fp8",),
    "fp8_skip": ("fp8",),
    "emulate": ("fp8",),
}
"""The kinds that use an argument; arguments that are not listed are used by all kinds."""
_FUNCTIONAL = (
    "what a module computes by functions (F.softmax, scaled_dot_product_attention, additions) belongs to the module "
    "whose forward calls them, and cannot be kept by the name of a class"
)


class PrecisionReport(NamedTuple):
    """What the precision did to a run.

    Args:
        skipped_share: share of the attempted steps that plugins dropped, since the start of the run.
        overflow_share: share of those that the loss scaler dropped.
        underflow: of sampled gradients, by module.
        of_activations: bytes that the outputs of modules saved in one micro-batch, against fp32; None: not measured.
        of_parameters: bytes that parameters and gradients saved, against fp32.
    """

    skipped_share: float
    overflow_share: float
    underflow: dict[str, Underflow]
    of_activations: int | None
    of_parameters: int


class SetPrecision(GuardMember):
    """Train in a lower precision, with chosen modules kept in fp32, and report what that did.

    The callback gives the Trainer Lightning's precision plugin of that name; ``Trainer(precision=...)`` must not be set
    too. Modules that are kept compute in fp32 on inputs that are cast to fp32. Nothing of the module is changed after
    the fit, except that with ``bf16_true`` its parameters are bfloat16.

    Args:
        kind: ``bf16_mixed``, ``fp16_mixed`` (with a loss scaler of the Trainer's device), ``bf16_true`` (parameters in
            bfloat16; needs an optimizer that keeps what rounding loses), ``tf32`` (fp32 with products in TF32 on a GPU)
            or ``fp8`` (linear layers in float8 by torchao, the rest as ``bf16_mixed``).
        keep_fp32: modules that compute in fp32: names, patterns of names (``net.blocks.*.norm``), or names of classes
            (``LayerNorm``).
        init_scale: fp16: first loss scale, > 0.
        growth_interval: fp16: steps without an overflow after which the loss scale is doubled, >= 1.
        min_scale: fp16: floor of the loss scale, > 0.
        fall_back: fp16: format of the forward pass for a while after the scale fell below ``min_scale``; None: none.
        cool_down: fp16: length of that time in applied steps, >= 1.
        allow_stalling: bf16_true: train with an optimizer that loses small updates.
        fp8_recipe: torchao's way to scale values.
        fp8_skip: fp8: linear layers that are not converted: names or patterns; None: the output layer.
        emulate: fp8: compute on values rounded to float8, for tests on any device.
        report_every: attempted steps between two samples of the gradients, >= 1.

    Raises:
        UserError: if an argument is out of range, or has no effect with the kind.

    >>> SetPrecision("fp16_mixed", keep_fp32=["LayerNorm"], fall_back="bf16").kind
    'fp16_mixed'
    """

    plugin: ClassVar[str] = "set_precision"
    slot: ClassVar[str] = "precision"

    def __init__(
        self,
        kind: Kind = "bf16_mixed",
        keep_fp32: Sequence[str] = (),
        init_scale: float = LARGEST,
        growth_interval: int = 2000,
        min_scale: float = 1.0,
        fall_back: FallBack | None = None,
        cool_down: int = 500,
        allow_stalling: bool = False,
        fp8_recipe: Recipe = "tensorwise",
        fp8_skip: Sequence[str] | None = None,
        emulate: bool = False,
        report_every: int = 50,
    ) -> None:
        self.kind: Kind = kind
        self.keep_fp32 = keep_fp32
        self.init_scale, self.growth_interval, self.min_scale = init_scale, growth_interval, min_scale
        self.fall_back: FallBack | None = fall_back
        self.cool_down = cool_down
        self.allow_stalling = allow_stalling
        self.fp8_recipe, self.fp8_skip, self.emulate = fp8_recipe, fp8_skip, emulate
        self.report_every = report_every
        self._check()
        self._lightnings: Any = None
        self._scale: LossScale | None = None
        self._undo: list[Callable[[], None]] = []
        self.reset()

    def _check(self) -> None:
        kinds = get_args(Kind)
        self._require(self.kind in kinds, "kind", f"one of {', '.join(kinds)}")
        recipes = [name for name in get_args(Recipe) if not (self.emulate and name == "rowwise_with_gw_hp")]
        self._require(self.fp8_recipe in recipes, "fp8_recipe", f"one of {', '.join(recipes)}")
        for argument, optional in (("keep_fp32", False), ("fp8_skip", True)):
            value = getattr(self, argument)
            texts = isinstance(value, Sequence) and not isinstance(value, str)
            valid = (texts and all(isinstance(each, str) and each for each in value)) or (optional and value is None)
            self._require(valid, argument, "a list of names, as texts")
        self._require(self.fall_back in (None, *get_args(FallBack)), "fall_back", "bf16, fp32 or None")
        for argument in ("init_scale", "min_scale"):
            value = getattr(self, argument)
            self._require(is_number(value) and 0 < value < math.inf, argument, "finite and > 0")
        self._require(self.min_scale <= self.init_scale, "min_scale", f"at most init_scale={self.init_scale:g}")
        for argument in ("growth_interval", "cool_down", "report_every"):
            value = getattr(self, argument)
            self._require(is_whole(value) and value >= 1, argument, "a whole number >= 1")
        for argument, used in USED_BY.items():
            value, default = getattr(self, argument), _DEFAULTS[argument]
            unused = self.kind not in used and (list(value) if isinstance(value, list) else value) != default
            if unused and not (argument == "keep_fp32" and not value):
                raise UserError(
                    worded(
                        f"set_precision: {argument}={value!r} has no effect with {self.kind}; expected one of "
                        f"{', '.join(used)}. Remove it (config key precision.{argument})"
                    )
                )
        if self.fall_back is None and self.cool_down != _DEFAULTS["cool_down"]:
            raise UserError(
                worded(
                    f"set_precision: cool_down={self.cool_down} has no effect without fall_back; set that to bf16 or "
                    "fp32 (config key precision.fall_back)"
                )
            )

    def _require(self, ok: bool, argument: str, expected: str) -> None:
        require(ok, self.plugin, argument, expected, getattr(self, argument), "precision", type(self).__name__)

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    # ---- the fit ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the samples and the fall-back of an earlier run."""
        self._samples = UnderflowSamples(torch.finfo(_COMPUTED_IN[self.kind]).tiny)
        self._memory: SavedMemory | None = None
        self._kept: KeptModules | None = None
        self._told_of_uncalled = False
        self._left = 0
        self._names: dict[int, str] = {}

    def prepare_trainer(self, trainer: Trainer, module: LightningModule) -> None:
        """Give the Trainer its precision plugin before a fit, and check what can be checked by now.

        Args:
            trainer: that this callback is in.
            module: to be trained.

        Raises:
            UserError: as the fit would raise it.
        """
        self._install(trainer)
        if has_all_modules(module):
            kept_modules.find(module, self.keep_fp32)

    def check_optimizer(self, optimizer: Optimizer, module: LightningModule) -> None:
        """Refuse an optimizer that loses small updates, while the parameters are not converted yet.

        Args:
            optimizer: of the module.
            module: to be trained.
        """
        if self.kind == "bf16_true" and not self.allow_stalling:
            kept = {id(p) for each in kept_modules.find(module, self.keep_fp32) for p in each.module.parameters()}
            refuse_stalling([optimizer], module, lambda p: p.is_floating_point() and id(p) not in kept)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer its precision plugin; also to validate, test and predict."""
        if self._lightnings is None or trainer.precision_plugin is not self._lightnings:
            self._install(trainer)
        self._extend(trainer)
        if self.kind == "tf32":
            self._undo.append(allow_tf32(trainer.strategy.root_device))
        if self.kind == "fp8":
            self._undo.append(lightning_precision.evaluate_without_inference_mode(trainer))
        super().setup(trainer, pl_module, stage)

    def plan_setup(self, trainer: Trainer, module: LightningModule) -> None:
        """In a dry run: convert the module as in a fit.

        Args:
            trainer: of the traced steps, to which `prepare_trainer` has given the precision plugin.
            module: to be trained.
        """
        self._extend(trainer)

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        kept = f", with {', '.join(self.keep_fp32)} in fp32" if self.keep_fp32 else ""
        return Planned(text=f"trains in {self.kind}{kept}")

    def _install(self, trainer: Trainer) -> None:
        lightning_precision.check_free(trainer, self.kind)
        device = trainer.strategy.root_device
        if self.kind == "fp8":
            float8.check_device(device, emulate=self.emulate)
        if self.kind == "fp16_mixed" and lightning_precision.shards(trainer):
            raise UserError(
                worded(
                    "SetPrecision('fp16_mixed'): Lightning has no loss scaling for modules that are sharded in "
                    "configure_model (FSDP2). Use precision=bf16_mixed (config key precision.kind=bf16_mixed)"
                )
            )
        converts = self.kind == "fp8" or (self.kind == "bf16_true" and self.keep_fp32)
        if converts and lightning_precision.shards(trainer):
            raise UserError(
                worded(
                    f"SetPrecision({self.kind!r}): the module is sharded in configure_model, before it could be "
                    "converted. Convert it there before fully_shard, and keep modules in fp32 by a "
                    "MixedPrecisionPolicy for each (config key precision.keep_fp32)"
                )
            )
        scaler = None
        if self.kind == "fp16_mixed":
            scaler = torch.amp.GradScaler(device.type, init_scale=self.init_scale, growth_interval=self.growth_interval)
        self._lightnings = lightning_precision.install(trainer, _LIGHTNINGS[self.kind], scaler)
        self._scale = None
        if scaler is not None:
            self._scale = LossScale(scaler, self.min_scale, self.fall_back, self.cool_down, self.init_scale)

    def _extend(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device.type
        says = trainer.is_global_zero

        def convert(module: nn.Module, lightnings: Callable[[nn.Module], nn.Module]) -> nn.Module:
            kept = kept_modules.find(module, self.keep_fp32)
            self._lightnings.kept_modules = [each.module for each in kept]  # a strategy shards them by themselves
            outside = torch.bfloat16 if self.kind == "bf16_true" else None
            with kept_modules.unconverted(module, kept) if outside else contextlib.nullcontext():
                module = lightnings(module)
            if self.kind == "fp8":
                inside = {id(each) for one in kept for each in one.module.modules()}
                layers = float8.choose(module, self.fp8_skip, inside)
                self._undo.append(float8.convert(module, layers, self.fp8_recipe, emulate=self.emulate))
                if says:
                    logger.info("precision fp8: %d linear layers: %s", len(layers), ", ".join(layers))
            self._kept = KeptModules(kept, device, outside)
            self._undo.append(self._kept.remove)
            if kept and says:
                logger.info("kept in fp32:\n  %s\n%s", "\n  ".join(self._kept.table()), _FUNCTIONAL)
            return module

        def autocast() -> torch.autocast | None:
            return None if self._scale is None else self._scale.autocast(device)

        lightning_precision.extend(self._lightnings, convert, self._around_step, autocast)
        self._undo.append(lambda: lightning_precision.restore(self._lightnings))

    @property
    def table(self) -> list[str]:
        """The modules that are kept in fp32, in the current or last fit: one line for each, after a head."""
        return [] if self._kept is None else self._kept.table()

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Refuse optimizers that lose small updates of bf16 parameters, and a fall-back of several optimizers."""
        if self.fall_back is not None and len(trainer.optimizers) > 1:
            raise UserError(
                worded(
                    f"SetPrecision(fall_back={self.fall_back!r}): the module has {len(trainer.optimizers)} optimizers; "
                    "when one of them falls back, the gradients of another may be scaled already. Use precision="
                    "bf16_mixed, or no fall-back (config key precision.fall_back=null)"
                )
            )
        if self.kind == "bf16_true" and not self.allow_stalling:
            refuse_stalling(list(trainer.optimizers), trainer.lightning_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint is loaded: continue a fall-back."""
        super().on_train_start(trainer, pl_module)
        if self._scale is not None:
            self._scale.left = self._left

    def _around_step(self) -> contextlib.AbstractContextManager[None]:
        """Measure the memory of the first micro-batch."""
        if self._memory is not None or self._guard is None or self.kind == "tf32":
            return contextlib.nullcontext()
        self._memory = SavedMemory(self._guard.module)
        is_compiled = any(hasattr(each, "_orig_mod") for each in self._guard.module.modules())
        return contextlib.nullcontext() if is_compiled else self._memory.measured()

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Sample the gradients; after the first step, name modules whose forward was never called."""
        guard = self._guard
        if guard is None:
            return
        if not self._told_of_uncalled and self._kept is not None:
            self._told_of_uncalled = True
            if guard.trainer.is_global_zero and (names := self._kept.uncalled):
                logger.warning(
                    "keep_fp32: the forward of %s was not called in the first step: its parameters are used by another "
                    "module, which computes in %s. Keep that module",
                    ", ".join(names),
                    self.kind,
                )
        if step % self.report_every or self.kind == "tf32" or (self._scale is not None and self._scale.left):
            return
        if any(id(p) not in self._names for p in parameters):
            self._names = {id(p): name for name, p in guard.module.named_parameters()}
        named = [(self._names.get(id(p), "?"), p.grad) for p in parameters if p.grad is not None]
        self._samples.add(named, 1.0 if self._scale is None else self._scale.scale)

    def on_outcome(self, outcome: Outcome) -> None:
        """Hold the loss scale, and fall back, or end it."""
        if self._scale is None or self._guard is None:
            return
        said = self._scale.after_step(applied=outcome.applied, overflow=outcome.overflow)
        self._left = self._scale.left
        if said is not None:
            event = Event(outcome.step, self.plugin, "overflow", outcome.loss_scale, self.min_scale, said)
            self._guard.report(event)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the report."""
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.kind != "tf32":
            logger.info("%s", "\n  ".join(self._lines()))

    def report(self) -> PrecisionReport:
        """What the precision did so far in the current or last fit."""
        counters = Counters() if self._guard is None else self._guard.counters
        return PrecisionReport(
            counters.skipped / max(counters.attempted, 1),
            counters.overflows / max(counters.attempted, 1),
            self._samples.shares(),
            None if self._memory is None else self._memory.of_activations,
            0 if self._memory is None else self._memory.of_parameters,
        )

    def _lines(self) -> list[str]:
        found = self.report()
        saved = found.of_parameters + (found.of_activations or 0)
        scaler = "" if self._scale is None else f"{found.overflow_share:.2%} by the loss scaler, "
        dropped = f"steps dropped: {found.skipped_share:.2%} by plugins, {scaler}"
        memory = f"about {saved / 2**20:.1f} MiB saved in one micro-batch against fp32"
        head = f"precision {self.kind}: {dropped}{memory}"
        return [head, *report.table(found.underflow)]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module."""
        super().teardown(trainer, pl_module, stage)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module: Lightning calls no teardown after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The kind, the rest of a fall-back, and the samples."""
        return {
            **super().state_dict(),
            "kind": self.kind,
            "fall_back_left": self._left,
            "underflow": self._samples.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint or a snapshot; warns if it was made in another precision."""
        super().load_state_dict(state_dict)
        if state_dict["kind"] != self.kind:
            rank_zero_warn(f"set_precision: the checkpoint was made in {state_dict['kind']}, this run uses {self.kind}")
        self._left = int(state_dict["fall_back_left"]) if self.fall_back is not None else 0
        if self._scale is not None:
            self._scale.left = self._left
        self._samples.load(state_dict["underflow"])

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit from pickles and copies."""
        return {**super().__getstate__(), "_lightnings": None, "_scale": None, "_undo": [], "_kept": None}


_COMPUTED_IN: dict[Kind, torch.dtype] = {
    "bf16_mixed": torch.bfloat16,
    "fp16_mixed": torch.float16,
    "bf16_true": torch.bfloat16,
    "tf32": torch.float32,
    "fp8": torch.bfloat16,
}
_DEFAULTS: dict[str, Any] = {
    "keep_fp32": (),
    "init_scale": LARGEST,
    "growth_interval": 2000,
    "min_scale": 1.0,
    "fall_back": None,
    "cool_down": 500,
    "allow_stalling": False,
    "fp8_recipe": "tensorwise",
    "fp8_skip": None,
    "emulate": False,
}
