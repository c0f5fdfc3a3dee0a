"""FSDP2 for an unmodified LightningModule."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from stabletrain.errors import UserError
from stabletrain.runtime.internals import sharding as internals
from stabletrain.runtime.internals.packages import ModelParallelMethods, both
from stabletrain.runtime.internals.trainer import has_all_modules
from stabletrain.strategies import messages, record, refusals
from stabletrain.strategies.sharding import Options, Sharded, plan, shard
from stabletrain.strategies.units import Units
from stabletrain.strategies.waiting import waiting_limit
from stabletrain.strategies.whole import WholeParameters

Gather = Literal["bf16"]
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16}
_METHOD = "configure_model"
_sharded: weakref.WeakKeyDictionary[nn.Module, Sharded] = weakref.WeakKeyDictionary()
"""Modules that were sharded in this process, by any of its strategies."""


class _FSDP2(ModelParallelMethods):
    """What the classes of both packages of Lightning share; see `FSDP2Strategy`."""

    averages_plain_gradients = True
    """Gradients of parameters that stay whole are averaged over the ranks here."""
    converts_before_sharding = True
    """The precision plugin's ``convert_module`` sees the parameters while they are whole."""

    def __init__(
        self,
        units: Units = None,
        also: Sequence[str] = (),
        reshard_after_forward: bool = True,
        replicate: int = 1,
        offload: bool = False,
        checkpoint_units: bool = False,
        compile_units: bool | str = False,
        defer: bool = True,
        gather: Gather | None = None,
        sync_buffers: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
    ) -> None:
        limit = waiting_limit(timeout, messages.OWNER)
        names = isinstance(also, Sequence) and not isinstance(also, str) and all(isinstance(each, str) for each in also)
        messages.check(names, "also", "a list of names of methods", also)
        whole = isinstance(replicate, int) and not isinstance(replicate, bool) and replicate >= 1
        messages.check(whole, "replicate", "a whole number >= 1", replicate)
        messages.check(gather in (None, *get_args(Gather)), "gather", "bf16 or None", gather)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=limit,
        )
        self.timeout_was_given = timeout is not None
        self.replicate, self.defer, self.gather, self.sync_buffers = replicate, defer, gather, sync_buffers
        self.options = Options(
            units=units,
            also=tuple(also),
            reshard_after_forward=reshard_after_forward,
            offload=offload,
            checkpoint_units=checkpoint_units,
            compile_units=compile_units,
            gather=None if gather is None else _DTYPES[gather],
        )
        self.sharded: Sharded | None = None
        """What was sharded; None before the module is set up."""
        self._whole = WholeParameters(())
        self._owner: weakref.ref[Any] | None = None
        self._undo: list[Callable[[], None]] = []
        self._window_is_open = False
        self._buffers_may_differ = True

    # ---- before the module is sharded -------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Any:
        """Lightning's accelerator, of the package whose Trainer this strategy belongs to.

        Not in Lightning's attribute, by which a second Trainer would refuse the strategy with a message about two
        accelerators, before `setup_environment` can say what is wrong.
        """
        return self._lightnings_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        if accelerator is not None and type(accelerator).__module__.startswith("pytorch_lightning."):
            self.__class__ = _OfPytorchLightning
        self._lightnings_accelerator = accelerator

    def check_module(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise an error for what is known to fail before any process group is made.

        Args:
            trainer: that has this strategy, and the precision of the run.
            module: to be trained.

        Raises:
            UserError: names the argument or the parameter.
        """
        self._check_gather(trainer)
        self._check_before(trainer, module)

    def _check_gather(self, trainer: Trainer) -> None:
        if self.gather is not None and getattr(trainer.precision_plugin, "precision", None) != "bf16-mixed":
            raise UserError(
                messages.worded(
                    f"fsdp2: gather={self.gather!r} needs autocast to bf16, without which the first layer after a unit "
                    f"gets another dtype than its weights; got {trainer.precision_plugin.precision}. Use precision="
                    "bf16_mixed, or remove it (config key strategy.gather)"
                )
            )

    def _check_before(self, trainer: Trainer, module: LightningModule) -> None:
        size = self.num_processes * self.num_nodes
        if size % self.replicate:
            raise UserError(
                messages.worded(
                    f"fsdp2: replicate must divide the number of processes, got {self.replicate} for {size} (config "
                    "key strategy.replicate)"
                )
            )
        refusals.check_compiler(self.root_device, self.options.compile_units)
        refusals.check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        if has_all_modules(module) and module not in _sharded:
            plan(module, self.options)

    def setup_environment(self) -> None:
        """Make the process group and the mesh, and prepare ``configure_model`` to shard the module."""
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        if self._owner is not None and self._owner() is not trainer:
            raise UserError(
                f"fsdp2: this {messages.OWNER} belongs to another Trainer already, whose device mesh it has. Make one "
                "for each Trainer"
            )
        self._owner = weakref.ref(trainer)
        self._check_before(trainer, module)
        internals.set_data_parallel_size(self, self.num_processes * self.num_nodes)
        super().setup_environment()
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False  # hooks may call the module, too: see _no_inference_tensors
        module.__dict__.pop(_METHOD, None)
        users = module.configure_model

        def configure_model() -> None:
            if module not in _sharded:
                users()
                _sharded[module] = self._shard(trainer, module)
            self._take(_sharded[module], module)

        module.__dict__[_METHOD] = configure_model

    def _shard(self, trainer: Trainer, module: LightningModule) -> Sharded:
        self._check_gather(trainer)
        refusals.check_parameters(module)
        precision = self.precision_plugin
        converted = precision.convert_module(module)
        assert converted is module
        mesh: DeviceMesh = self.device_mesh["data_parallel"]
        if self.replicate > 1:
            shape = (self.replicate, mesh.size() // self.replicate)
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        kept = getattr(precision, "kept_modules", ())
        sharded = shard(module, self.options, mesh, self.root_device, kept)
        self._tell(trainer, sharded)
        return sharded

    def _tell(self, trainer: Trainer, sharded: Sharded) -> None:
        text = f"fsdp2: {sharded.choice}"
        if sharded.whole:
            text += f"; {len(sharded.whole)} parameters without a dimension stay whole"
        if self.defer and trainer.accumulate_grad_batches > 1:
            size = sharded.window_bytes / 2**20
            text += f"; between micro-batches, {size:.1f} MiB of whole gradients are kept (defer: false keeps shards)"
        rank_zero_info(text)
        if not sharded.choice.units:
            rank_zero_warn(
                messages.worded(
                    f"fsdp2: {sharded.choice.reason}, so all parameters are gathered together: memory is saved between "
                    "steps only. Name its blocks (config key strategy.units)"
                )
            )
        if trainer.is_global_zero:
            record.write(trainer, self, sharded)

    def _take(self, sharded: Sharded, module: LightningModule) -> None:
        self.sharded = sharded
        self._whole = WholeParameters(sharded.whole)
        self._buffers_may_differ = True

    def setup(self, trainer: Trainer) -> None:
        """Set up optimizers; the module is sharded, and converted to the precision, already."""
        precision = self.precision_plugin
        before = precision.__dict__.get("convert_module")
        precision.__dict__["convert_module"] = lambda module: module
        try:
            super().setup(trainer)
        finally:
            del precision.__dict__["convert_module"]
            if before is not None:
                precision.__dict__["convert_module"] = before

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers, and refuse one that was made before the module was sharded."""
        super().setup_optimizers(trainer)
        assert self.sharded is not None
        assert self.lightning_module is not None
        self.sharded.replaced.check(self.optimizers)
        refusals.check_manual(self.lightning_module, self.optimizers)
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None and self.sharded.whole:
            self._undo.append(internals.unscale_apart(scaler))

    def model_to_device(self) -> None:
        """Move what is not sharded to the device; with offloading, parameters stay on the CPU."""
        if not self.options.offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.root_device)

    def teardown(self) -> None:
        """Leave the module its own ``configure_model``."""
        super().teardown()
        while self._undo:
            self._undo.pop()()
        if self.lightning_module is not None:
            self.lightning_module.__dict__.pop(_METHOD, None)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``training_step`` through the root, so that its parameters are whole."""
        return self._through_root("training_step", self.precision_plugin.train_step_context(), *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``validation_step`` through the root."""
        return self._through_root("validation_step", self.precision_plugin.val_step_context(), *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``test_step`` through the root."""
        return self._through_root("test_step", self.precision_plugin.test_step_context(), *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``predict_step`` through the root."""
        return self._through_root("predict_step", self.precision_plugin.predict_step_context(), *args, **kwargs)

    def _through_root(
        self, method: str, context: contextlib.AbstractContextManager[Any], *args: Any, **kwargs: Any
    ) -> Any:
        with context:
            if self._buffers_may_differ:
                self._synchronize_buffers()
            # as in DistributedDataParallel: once before the first forward after one whose gradients were reduced
            self._buffers_may_differ = torch.is_grad_enabled() and not self._window_is_open
            with self._translated(), _no_inference_tensors():
                return internals.call_through_root(self, method, *args, **kwargs)

    def _synchronize_buffers(self) -> None:
        """Give all ranks the buffers of rank 0. A collective."""
        if self.sync_buffers and dist.get_world_size() > 1:
            assert self.model is not None
            internals.broadcast_coalesced([b for b in self.model.buffers() if b.numel() and not isinstance(b, DTensor)])

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            assert self.model is not None
            assert self.sharded is not None
            found = messages.translated(error, self.model, self.sharded.choice.units)
            if found is None:
                raise
            raise found from error

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it gradients are accumulated without being reduced, with ``defer``."""
        root: Any = self.model
        self._window_is_open = True
        if self.defer:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            if self.defer:
                root.set_requires_gradient_sync(True)
            self._window_is_open = False

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients."""
        with self._translated():
            return super().backward(closure_loss, *args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of parameters that stay whole, at the end of a window."""
        super().post_backward(closure_loss)
        if not self._window_is_open:
            self._whole.average_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and drop gradients that a window left without reducing them."""
        output = super().optimizer_step(*args, **kwargs)
        root: Any = self.model
        if self.defer:
            internals.forget_unreduced_gradients(root)
        if not root.automatic_optimization:  # it steps within the root's forward, which may go on with the new weights
            root.reshard()
            root.unshard()
        return output

    def on_validation_end(self) -> None:
        """Free the root's parameters, which stay whole after a forward without a backward."""
        self._reshard()

    def on_test_end(self) -> None:
        """Free the root's parameters."""
        self._reshard()

    def on_predict_end(self) -> None:
        """Free the root's parameters."""
        self._reshard()

    def _reshard(self) -> None:
        root: Any = self.model
        root.reshard()


@contextlib.contextmanager
def _no_inference_tensors() -> Iterator[None]:
    """In place of torch's inference mode, in which whole weights would be made that no later backward may use."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


if TYPE_CHECKING:

    class FSDP2Strategy(_FSDP2):
        """For type checkers."""

    _OfPytorchLightning = FSDP2Strategy
else:
    _bases = both(ModelParallelStrategy)

    class FSDP2Strategy(_FSDP2, *_bases):
        """Fully sharded data parallelism (torch's FSDP2) for a LightningModule as it is.

        A `ModelParallelStrategy` of Lightning: parameters, gradients and optimizer state are sharded over all
        processes. The blocks of the module become units, of which few are whole at a time. All of the module's steps
        run through the module's own call; parameter names, groups and ``configure_optimizers`` stay. In fp32, losses
        and weights are bit for bit those of DDP while nothing is clipped. The module stays sharded after the fit.

        Args:
            units: what is gathered as a whole: class names, classes, patterns of module names, or a function of name
                and module; None: what the module names in ``_no_split_modules``, or its repeated blocks.
            also: names of methods, besides the steps, that use the module, such as ``generate``.
            reshard_after_forward: whether units are freed after forward and gathered again in backward; False: gathered
                once per step (ZeRO-2).
            replicate: number of groups that each hold all shards (HSDP), >= 1; divides the number of processes.
            offload: keep parameters, gradients and optimizer state on the CPU.
            checkpoint_units: compute the activations of units again in backward.
            compile_units: compile each unit; a text is the name of torch.compile's backend.
            defer: reduce gradients once per accumulation window, as DDP does; keeps whole gradients in it. False:
                reduce them in every micro-batch, and keep shards.
            gather: ``bf16``: units are gathered in bfloat16 and reduced in fp32, under ``bf16-mixed``; None: in the
                dtype that they have.
            sync_buffers: give all ranks rank 0's buffers (BatchNorm statistics) before a step's forward, as DDP does.
            save_distributed_checkpoint: Lightning's checkpoints are folders with a file per rank; False: one file.
            process_group_backend: ``nccl`` or ``gloo``; None: by device.
            timeout: seconds, or a timedelta, that a process waits for the others, > 0; None: 5 minutes, or what the
                command line has in ``launch.timeout``.

        Raises:
            UserError: if an argument is wrong; before the first step, if FSDP2 cannot train the module.

        >>> FSDP2Strategy(units=["Block"], replicate=2).replicate
        2
        """

    _OfPytorchLightning = type(
        "FSDP2Strategy", (_FSDP2, *reversed(_bases)), {"__doc__": FSDP2Strategy.__doc__, "__module__": __name__}
    )
