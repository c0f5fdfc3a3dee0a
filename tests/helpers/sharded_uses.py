"""Run by several ranks: uses of FSDP2Strategy other than one fit, with the assertions about them."""

import os
import warnings
from pathlib import Path
from typing import Any

import sharded_modules
import torch
from fits import trainer
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from sharded_modules import Module, copied
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from stabletrain import FSDP2Strategy


def loader(count: int = 24) -> Any:
    return DataLoader(torch.zeros(count, 1))


def fit(
    folder: Path, module: Any, strategy: Any, *callbacks: Any, count: int = 24, ckpt_path: Any = None, **options: Any
) -> Trainer:
    warnings.simplefilter("ignore")
    defaults = {"devices": int(os.environ["WORLD_SIZE"]), "max_steps": 8, "max_epochs": -1, "limit_val_batches": 0}
    defaults |= {"default_root_dir": folder, "use_distributed_sampler": False}
    mine = trainer(*callbacks, strategy=strategy, **{**defaults, **options})
    mine.fit(module, loader(count), ckpt_path=ckpt_path)
    return mine


def ddp(**options: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **options)


def _assert_alike(*modules: Module) -> None:
    first = copied(modules[0])
    for module in modules[1:]:
        assert module.losses == modules[0].losses
        assert all(torch.equal(first[key], value) for key, value in copied(module).items())


def meta(folder: Path) -> None:
    """Bugs: shards that each rank draws by itself, with the same numbers in each; weights without values."""
    torch.manual_seed(5)
    module = sharded_modules.OnMeta()
    fit(folder, module, FSDP2Strategy(), max_steps=1)
    whole = copied(module)
    for name, value in whole.items():
        assert value.isfinite().all(), name
        if value.ndim > 1:
            assert 0.01 < float(value.std()) < 1.1, name
            assert not torch.equal(value[: len(value) // 2], value[len(value) // 2 :]), name
    assert len({float(value.sum()) for name, value in whole.items() if name.endswith("linear1.weight")}) == 3


def phases(folder: Path) -> None:
    """Bugs: an evaluation without a fit sees shards; whole weights are left behind by one; a method named in ``also``
    sees shards; the module keeps the strategy's configure_model."""
    module = sharded_modules.Convolutions()
    limits = dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), 2)
    mine = fit(folder, module, FSDP2Strategy(), **limits)
    mine.validate(module, loader(), verbose=False)
    mine.test(module, loader(), verbose=False)
    assert len(module.validated) == 4
    assert len(mine.predict(module, loader()) or []) == 2
    assert all(isinstance(p, DTensor) for p in module.parameters())
    assert "configure_model" not in vars(module)
    plain, sharded = sharded_modules.Blocks(), sharded_modules.Blocks()
    other = trainer(strategy=FSDP2Strategy(also=["generate"]), devices=2, **limits)
    assert len(other.predict(sharded, loader()) or []) == 2
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(sharded.generate(tokens), plain.generate(tokens))


def second_fit(folder: Path) -> None:
    """Bugs: a module is sharded twice; a sharded module can be trained on by no other Trainer."""
    module, reference = sharded_modules.Scalar(), sharded_modules.Scalar()
    for each, make in ((module, FSDP2Strategy), (reference, ddp)):
        mine = fit(folder, each, make(), max_steps=3)
        mine.fit_loop.epoch_loop.max_steps = 5
        mine.fit(each, loader())
        fit(folder, each, make(), max_steps=2)
        assert len(each.losses) == 7
    _assert_alike(reference, module)


def manual(folder: Path) -> None:
    """Bug: a step by hand within training_step, after which the root's parameters have their old values."""

    class Manual(sharded_modules.Scalar):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            for part in range(2):
                loss = super().training_step(batch, batch_idx + 100 * part)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    from stabletrain import SkipNonFinite

    modules = [Manual(), Manual()]
    for module, strategy in zip(modules, (ddp(), FSDP2Strategy()), strict=True):
        fit(folder, module, strategy, SkipNonFinite())
    _assert_alike(*modules)


def unfrozen(folder: Path) -> None:
    """Bug: parameters that are frozen when the module is sharded get no gradient, or no average, once they are not.

    DDP averages only what was trained from the start, so the reference is one process with both ranks' batches.
    """
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.encoder)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=1e-2, initial_denom_lr=1.0)

    class OfAllRanks(sharded_modules.Encoder):
        def _batch(self, index: int) -> Any:
            return torch.cat([_tokens(index, rank) for rank in range(2)]), None

    def _tokens(index: int, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(97 * index + rank)
        return torch.randint(0, sharded_modules.WORDS, (4, 9), generator=generator)

    module = sharded_modules.Encoder()
    mine = fit(folder, module, FSDP2Strategy(), Unfreeze(), max_epochs=3, max_steps=12, count=4)
    means = [float(mine.strategy.reduce(torch.tensor(loss))) for loss in module.losses]
    reference = OfAllRanks()
    alone = trainer(Unfreeze(), max_epochs=3, max_steps=12, devices=1, strategy=_alone())
    alone.fit(reference, loader(4))
    assert len(means) == 12
    assert all(abs(a - b) < 1e-5 for a, b in zip(means, reference.losses, strict=True)), (means, reference.losses)


def _alone() -> Any:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    return SingleDeviceStrategy("cpu")


def other_package(folder: Path) -> None:
    """Bug: Trainers of pytorch_lightning refuse the strategy, or it asks for the other package's classes."""
    import pytorch_lightning

    from stabletrain import default_callbacks
    from stabletrain.testing.trainer import trained_with

    class Blocks(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.losses: list[float] = []
            self.net = torch.nn.Sequential(*[sharded_modules.Block() for _ in range(3)])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            generator = torch.Generator().manual_seed(2 * batch_idx + self.global_rank)
            loss = self.net(torch.randn(4, 16, generator=generator)).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    modules: list[Any] = [Blocks(), Blocks()]
    with trained_with("pytorch_lightning"):
        theirs = pytorch_lightning.strategies.DDPStrategy(process_group_backend="gloo")
        for module, strategy in zip(modules, (theirs, FSDP2Strategy()), strict=True):
            fit(folder, module, strategy, *default_callbacks(), accumulate_grad_batches=2)
    assert isinstance(next(modules[1].parameters()), DTensor)
    _assert_alike(*modules)


def lightnings_checkpoints(folder: Path) -> None:
    """Bug: a resumed run is not the uninterrupted one: whole, or sharded, parameters are not loaded."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    for sharded in (True, False):
        place = folder / str(sharded)
        saver = ModelCheckpoint(dirpath=place, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        whole, resumed = sharded_modules.Scalar(), sharded_modules.Scalar(seed=3)
        fit(folder, whole, FSDP2Strategy(save_distributed_checkpoint=sharded), saver)
        mine = trainer(
            strategy=FSDP2Strategy(save_distributed_checkpoint=sharded),
            devices=2,
            max_steps=8,
            max_epochs=-1,
            limit_val_batches=0,
        )
        mine.fit(resumed, loader(), ckpt_path=place / "step=4.ckpt")
        assert resumed.losses == whole.losses[4:]
        first = copied(whole)
        assert all(torch.equal(first[key], value) for key, value in copied(resumed).items())


def inference_mode(folder: Path) -> None:
    """Bug: an evaluation in torch's inference mode, which Lightning uses with nccl, gathers weights that the next
    backward cannot use."""
    from fits import Callback

    class Evaluate(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (0, 2):
                with torch.inference_mode():
                    trainer.strategy.validation_step(batch, batch_idx)

    modules = [sharded_modules.Scalar(), sharded_modules.Scalar()]
    for module, strategy in zip(modules, (ddp(), FSDP2Strategy()), strict=True):
        fit(folder, module, strategy, Evaluate())
    assert len(modules[1].validated) == 2
    _assert_alike(*modules)
