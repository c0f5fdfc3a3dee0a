"""Features of Lightning and torch as small trainings, each to be run bare, protected, with a bad batch, and resumed."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

INPUTS = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS.sum(1, keepdim=True)


@dataclass(frozen=True)
class Parts:
    """What one training needs: a module, its data (if None, the Trainer's own), and another class of Trainer."""

    module: Any
    train: Any
    validation: Any = None
    trainer: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Feature:
    """A training that uses one feature.

    Args:
        name: as on the page.
        make: from the package, `lightning.pytorch` or `pytorch_lightning`, to module and data.
        options: arguments of the Trainer.
        callbacks: from the package to further callbacks.
        steps: optimizer steps of the run.
        per_batch: optimizer steps for each batch, if the module makes several.
        without_loss: batches for which `training_step` returns None: none of them is the bad one.
        packages: of Lightning, with which it runs.
        spoil: what is NaN in a bad batch: its ``inputs`` and targets, its ``targets``, or only the ``loss``.
    """

    name: str
    make: Callable[[Any], Parts]
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Any], list[Any]] = lambda pl: []
    steps: int = 40
    per_batch: int = 1
    without_loss: int = 0
    packages: tuple[str, ...] = ("lightning.pytorch", "pytorch_lightning")
    spoil: Literal["inputs", "targets", "loss"] = "inputs"


def loader(count: int = 400, size: int = 4, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS[:count], TARGETS[:count]), batch_size=size, shuffle=shuffle, **options)


def regression(pl: Any, **methods: Any) -> Any:
    """A small network with dropout and batch norm; ``methods`` replace its own.

    Args:
        pl: the package of Lightning.
        methods: `optimizer` (parameters -> optimizer), `configure` (optimizer, module -> what `configure_optimizers`
            returns), or methods of the LightningModule.
    """
    optimizer = methods.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    configure = methods.pop("configure", lambda optimizer, module: optimizer)

    class Regression(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("tl", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("vl", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return configure(optimizer(self.parameters()), self)

    return type("Feature", (Regression,), methods)()


def with_validation(**methods: Any) -> Callable[[Any], Parts]:
    return lambda pl: Parts(regression(pl, **methods), loader(40), loader(20, shuffle=False))


def alone(**methods: Any) -> Callable[[Any], Parts]:
    return lambda pl: Parts(regression(pl, **methods), loader())


def scheduled(make: Callable[[Any, Any], Any], **config: Any) -> Any:
    """A `configure` that adds a scheduler."""
    return lambda optimizer, module: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": make(optimizer, module), **config},
    }


def several() -> Callable[[Any, list[Any]], Tensor]:
    """A `training_step` that adds the losses of several loaders' batches."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else batch
        return torch.stack([self.loss(part) for part in parts if part is not None]).sum()

    return training_step


def combined(mode: str) -> Callable[[Any], Parts]:
    def make(pl: Any) -> Parts:
        utilities = importlib.import_module(f"{pl.__name__}.utilities")
        loaders = {"a": loader(40), "b": loader(100)}
        return Parts(regression(pl, training_step=several()), utilities.CombinedLoader(loaders, mode))

    return make


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(INPUTS, TARGETS, strict=True)


def compiled(pl: Any) -> Parts:
    class Compiled(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Parts(torch.compile(Compiled(), backend="eager"), loader())


def frozen(pl: Any) -> Parts:
    module = regression(pl)
    module.net[0].requires_grad_(False)
    return Parts(module, loader())


def sparse(pl: Any, make_optimizer: Callable[[Any], Any]) -> Parts:
    class Embedded(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found = self.table((batch[0].abs() * 10).long().clamp(max=49))
            return nn.functional.mse_loss(found.mean((1, 2))[:, None], batch[1])

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.parameters())

    return Parts(Embedded(), loader())


def complex_weights(pl: Any) -> Parts:
    class Complex(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5, dtype=torch.cfloat))
            self.last = nn.Linear(5, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.last((batch[0].to(torch.cfloat) @ self.weight).abs()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

    return Parts(Complex(), loader())


def recurrent(pl: Any) -> Parts:
    """Keeps its hidden state from batch to batch in an attribute, as Lightning's own LSTM demo does."""

    class Recurrent(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(8, 6, batch_first=True)
            self.last = nn.Linear(6, 1)
            self.hidden: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.hidden is not None:
                self.hidden = tuple(each.detach() for each in self.hidden)
            found, self.hidden = self.cell(batch[0][None], self.hidden)
            return nn.functional.mse_loss(self.last(found[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

    return Parts(Recurrent(), loader())


def two_optimizers(pl: Any) -> Parts:
    """A GAN's structure: two optimizers under manual optimization."""

    class Adversarial(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.maker, self.judge = nn.Linear(8, 8), nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            made = self.maker(torch.randn_like(batch[0]))
            real_loss = nn.functional.softplus(-self.judge(batch[0] + 0 * batch[1])).mean()
            judged = real_loss + nn.functional.softplus(self.judge(made.detach())).mean()
            second.zero_grad()
            self.manual_backward(judged)
            second.step()
            fooled = nn.functional.softplus(-self.judge(made)).mean()
            first.zero_grad()
            self.manual_backward(fooled)
            first.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(each.parameters(), 0.01) for each in (self.maker, self.judge)]

    return Parts(Adversarial(), loader())


def backbone(pl: Any) -> Parts:
    def loss(self: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    module = regression(
        pl, loss=loss, optimizer=lambda parameters: torch.optim.AdamW([p for p in parameters if p.requires_grad], 1e-2)
    )
    module.backbone, module.head = module.net[:3], module.net[3:]
    del module.net
    return Parts(module, loader(40))


def unused(self: Any, batch: Any, batch_idx: int) -> Tensor:
    output = self.net[4](self.net[0](batch[0])) if batch_idx % 3 == 0 else self.net(batch[0])
    return nn.functional.mse_loss(output, batch[1])


def recomputed(self: Any, batch: Any, batch_idx: int) -> Tensor:
    hidden = checkpoint(self.net[:3], batch[0], use_reentrant=False)
    return nn.functional.mse_loss(self.net[3:](hidden), batch[1])


def warmed_up(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
    if self.trainer.global_step < 10:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.trainer.global_step + 1) / 10
    optimizer.step(closure=optimizer_closure)


def every_second(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
    if batch_idx % 2 == 0:
        optimizer.step(closure=optimizer_closure)
    else:
        optimizer_closure()


def own_clipping(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
    self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


def sometimes_none(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx % 5 == 3 else self.loss(batch)


def as_dictionary(self: Any, batch: Any, batch_idx: int) -> Any:
    return {"loss": self.loss(batch), "more": 1}


def leave_epoch(self: Any, batch: Any, batch_idx: int) -> int | None:
    return -1 if batch_idx == 15 else None


def tuned(pl: Any) -> Parts:
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    return Parts(regression(pl, lr=1e-3, configure_optimizers=configure_optimizers), loader())


def scaled_to_memory(pl: Any) -> Parts:
    def train_dataloader(self: Any) -> Any:
        return loader(size=self.batch_size)

    return Parts(regression(pl, batch_size=2, train_dataloader=train_dataloader, validation_step=None), None)


def half_precision(pl: Any) -> list[Any]:
    precision = importlib.import_module(f"{pl.__name__}.plugins").MixedPrecision
    return [precision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]  # type: ignore[attr-defined]


S = lr_scheduler
FEATURES = [
    Feature("StepLR by epochs", with_validation(configure=scheduled(lambda o, m: S.StepLR(o, 1, 0.5)))),
    Feature(
        "ReduceLROnPlateau by epochs, on a validation loss",
        with_validation(configure=scheduled(lambda o, m: S.ReduceLROnPlateau(o, patience=0, factor=0.5), monitor="vl")),
    ),
    Feature(
        "ReduceLROnPlateau by steps, on the training loss",
        with_validation(
            configure=scheduled(
                lambda o, m: S.ReduceLROnPlateau(o, patience=0, factor=0.5),
                monitor="tl",
                interval="step",
                frequency=10,
                strict=False,
            )
        ),
    ),
    Feature(
        "OneCycleLR by steps",
        alone(configure=scheduled(lambda o, m: S.OneCycleLR(o, 0.02, total_steps=40), interval="step")),
    ),
    Feature(
        "OneCycleLR, estimated_stepping_batches",
        alone(
            configure=scheduled(
                lambda o, m: S.OneCycleLR(o, 0.02, total_steps=m.trainer.estimated_stepping_batches), interval="step"
            )
        ),
    ),
    Feature(
        "SequentialLR every third step",
        alone(
            configure=scheduled(
                lambda o, m: S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=5), S.CosineAnnealingLR(o, 30)], [5]),
                interval="step",
                frequency=3,
            )
        ),
    ),
    Feature("optimizer_step overridden, own warm-up", alone(optimizer_step=warmed_up)),
    Feature("optimizer_step overridden, every second batch", alone(optimizer_step=every_second)),
    Feature("configure_gradient_clipping overridden", alone(configure_gradient_clipping=own_clipping)),
    Feature("Trainer(gradient_clip_val=1.0)", alone(), {"gradient_clip_val": 1.0}),
    Feature("accumulate_grad_batches=4", alone(), {"accumulate_grad_batches": 4}, steps=20),
    Feature("precision=bf16-mixed", alone(), {"precision": "bf16-mixed"}),
    Feature("precision=bf16-true", alone(), {"precision": "bf16-true"}),
    Feature("precision=64-true", alone(), {"precision": "64-true"}),
    Feature("16-mixed with a GradScaler", alone(), {"plugins": half_precision}),
    Feature("fused AdamW", alone(optimizer=lambda p: torch.optim.AdamW(p, 0.01, fused=True))),
    Feature("complex parameters", complex_weights),
    Feature("sparse embedding, SGD", lambda pl: sparse(pl, lambda p: torch.optim.SGD(p, 0.05)), spoil="targets"),
    Feature(
        "sparse embedding, SparseAdam",
        lambda pl: sparse(pl, lambda p: torch.optim.SparseAdam(list(p), 0.05)),
        spoil="targets",
    ),
    Feature("frozen layers", frozen),
    Feature("parameters unused in some steps", alone(training_step=unused)),
    Feature("activation checkpointing", alone(training_step=recomputed)),
    Feature("hidden state in an attribute (LSTM)", recurrent),
    Feature("torch.compile, eager backend", compiled),
    Feature("training_step returns None at times", alone(training_step=sometimes_none), without_loss=8),
    Feature("training_step returns a dictionary", alone(training_step=as_dictionary)),
    Feature("on_train_batch_start returns -1", alone(on_train_batch_start=leave_epoch)),
    Feature("LBFGS", alone(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1)), steps=10),
    Feature("manual optimization, two optimizers (GAN)", two_optimizers, per_batch=2),
    Feature("overfit_batches=3", alone(), {"overfit_batches": 3}),
    Feature(
        "limit_train_batches=7, limit_val_batches=2, sanity check",
        with_validation(),
        {"limit_train_batches": 7, "limit_val_batches": 2, "num_sanity_val_steps": 1},
    ),
    Feature("val_check_interval=5", with_validation(), {"val_check_interval": 5}),
    Feature("check_val_every_n_epoch=2", with_validation(), {"check_val_every_n_epoch": 2}),
    Feature("reload_dataloaders_every_n_epochs=2", with_validation(), {"reload_dataloaders_every_n_epochs": 2}),
    Feature("DataLoader with two workers", lambda pl: Parts(regression(pl), loader(40, num_workers=2))),
    Feature("IterableDataset", lambda pl: Parts(regression(pl), DataLoader(Stream(), batch_size=4))),
    Feature(
        "list of two loaders",
        lambda pl: Parts(regression(pl, training_step=several()), [loader(40), loader(100)]),
    ),
    Feature(
        "dictionary of two loaders",
        lambda pl: Parts(regression(pl, training_step=several()), {"a": loader(40), "b": loader(100)}),
    ),
    Feature("CombinedLoader max_size_cycle", combined("max_size_cycle")),
    Feature("CombinedLoader min_size", combined("min_size")),
    Feature("CombinedLoader max_size", combined("max_size")),
    Feature("EarlyStopping", with_validation(), callbacks=lambda pl: [pl.callbacks.EarlyStopping("vl", patience=2)]),
    Feature(
        "StochasticWeightAveraging",
        with_validation(),
        callbacks=lambda pl: [pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)],
        options={"max_epochs": 4, "max_steps": -1},
    ),
    Feature("EMAWeightAveraging", with_validation(), callbacks=lambda pl: [pl.callbacks.EMAWeightAveraging(decay=0.9)]),
    Feature("BackboneFinetuning", backbone, callbacks=lambda pl: [pl.callbacks.BackboneFinetuning(1, verbose=False)]),
    Feature("LearningRateFinder", tuned, callbacks=lambda pl: [pl.callbacks.LearningRateFinder(num_training_steps=20)]),
    Feature(
        "BatchSizeFinder",
        scaled_to_memory,
        callbacks=lambda pl: [pl.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=3, init_val=2)],
    ),
    Feature("detect_anomaly", alone(), {"detect_anomaly": True}),
]
