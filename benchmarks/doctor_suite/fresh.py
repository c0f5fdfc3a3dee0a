"""Bugs and healthy modules that were written after the thresholds were frozen, by the same hand."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from doctor_suite.modules import Loaders, Lstm, Mlp, Regression, digit_loaders, table_loaders, text_loaders
from doctor_suite.planted import Planted

# ---- bugs ------------------------------------------------------------------------------------------------------------


class WrongSign(Mlp):
    """Maximises the cross-entropy."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -super().training_step(batch, batch_idx)


class KeptState(Lstm):
    """Goes on from the hidden state of the last batch, without detaching it."""

    state: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output, self.state = self.lstm(self.embed(batch[:, :-1]), self.state)
        return F.cross_entropy(self.head(output).flatten(0, 1), batch[:, 1:].flatten())


class PlainList(Mlp):
    """Has its hidden layers in a list that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.hidden = [nn.Linear(64, 64) for _ in range(2)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        for each in self.hidden:
            x = each(x).relu()
        return F.cross_entropy(self.net(x), batch[1])


class SigmoidTwice(Mlp):
    """Gives probabilities to binary_cross_entropy_with_logits."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        odd = self.net(batch[0])[:, 0].sigmoid()
        return F.binary_cross_entropy_with_logits(odd, (batch[1] % 2).float())


class OverTheBatch(Mlp):
    """Takes the softmax over the samples of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.net(batch[0]).log_softmax(0), batch[1])


class CutOff(Mlp):
    """Detaches the features from the head, as for a frozen encoder."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.net[:-1](batch[0]).detach()
        return F.cross_entropy(self.net[-1](features), batch[1])


class EachStep(Mlp):
    """Steps a schedule that was meant for epochs after each batch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class NotShifted(Lstm):
    """Predicts the character that it has just read."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.head(self.lstm(self.embed(batch[:, :-1]))[0])
        return F.cross_entropy(z.flatten(0, 1), batch[:, :-1].flatten())


class DeepSigmoid(Mlp):
    """Twelve sigmoid layers without normalisation or residual connections."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
        self.net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


def _raw_targets() -> Loaders:
    """The table with targets in another unit, around 20,000."""
    x, y = next(iter(DataLoader(table_loaders()[0].dataset, 1200)))
    return DataLoader(TensorDataset(x, 20_000 + 5_000 * y), 32, shuffle=True, drop_last=True), None


_LEARNS_NOTHING = frozenset({"no better than guessing", "one batch", "rate too low", "loss rises"})

BUGS: tuple[Planted, ...] = (
    Planted("loss with the wrong sign", WrongSign, digit_loaders, _LEARNS_NOTHING),
    Planted("hidden state not detached", KeptState, text_loaders, frozenset({"raises"})),
    Planted("layers in a plain list", PlainList, digit_loaders, frozenset({"not in optimizer", "unused"})),
    Planted("sigmoid twice", SigmoidTwice, digit_loaders, frozenset({"probabilities"})),
    Planted("log_softmax over the batch", OverTheBatch, digit_loaders, frozenset({"probabilities"})),
    Planted("features detached", CutOff, digit_loaders, frozenset({"unused"})),
    Planted("schedule of epochs by the step", EachStep, digit_loaders, _LEARNS_NOTHING),
    Planted("target not shifted", NotShifted, text_loaders, frozenset({"leak", "loss at the start"})),
    Planted("targets in raw units", Regression, _raw_targets, _LEARNS_NOTHING),
    Planted("twelve sigmoid layers", DeepSigmoid, digit_loaders, _LEARNS_NOTHING),
)
"""The ten new bugs."""

# ---- healthy modules -------------------------------------------------------------------------------------------------


class Autoencoder(L.LightningModule):
    """Convolutions down and up again, on the images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, 2), nn.Sigmoid()
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.up(self.down(batch[0])), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


class Variational(L.LightningModule):
    """A variational autoencoder: sums over pixels, divided by the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        mean, log_variance = self.encode(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        pixels = F.binary_cross_entropy_with_logits(self.decode(z), x, reduction="sum")
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return (pixels + divergence) / len(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


class Residual(L.LightningModule):
    """Residual blocks with BatchNorm, AdamW, and a one-cycle schedule over the Trainer's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1, bias=False),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.stem(batch[0])
        for block in self.blocks:
            x = x + block(x)
        loss = F.cross_entropy(self.head(x.mean((2, 3))), batch[1], label_smoothing=0.1)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Gan(L.LightningModule):
    """A generator and a discriminator, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        real = batch[0].flatten(1)
        fake = self.generator(torch.randn(len(real), 8))
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        loss = loss + F.binary_cross_entropy_with_logits(self.discriminator(fake.detach()), zeros)
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        loss = F.binary_cross_entropy_with_logits(self.discriminator(fake), ones)
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(each.parameters(), 2e-4, (0.5, 0.999)) for each in (self.generator, self.discriminator)
        ]


class TwoTasks(L.LightningModule):
    """A GRU over the rows of an image, with a digit and its parity as targets, and class weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 48, batch_first=True)
        self.digit, self.parity = nn.Linear(48, 10), nn.Linear(48, 1)
        self.register_buffer("weights", torch.linspace(0.5, 1.5, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.gru(x.squeeze(1))[0][:, -1]
        loss = F.cross_entropy(self.digit(h), y, weight=self.weights)
        return loss + 0.5 * F.binary_cross_entropy_with_logits(self.parity(h).squeeze(1), (y % 2).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 5e-3)


class Bert(L.LightningModule):
    """A small BERT of the package transformers that classifies short sentences of characters."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=20, num_labels=3,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class _Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens; the label says which of three tokens occurs most."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.ids = torch.randint(3, 32, (count, 16), generator=generator)
        places = torch.rand(count, 16, generator=generator).argsort(1)[:, :6]
        self.ids.scatter_(1, places, self.labels[:, None].expand(-1, 6))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def _sentence_loaders() -> Loaders:
    return DataLoader(_Sentences(2000, 1), 32, shuffle=True), DataLoader(_Sentences(200, 2), 32)


_WITH_TRANSFORMERS = (Planted("BERT of transformers", Bert, _sentence_loaders),) if find_spec("transformers") else ()

HEALTHY: tuple[Planted, ...] = (
    Planted("convolutional autoencoder", Autoencoder, digit_loaders),
    Planted("variational autoencoder", Variational, digit_loaders),
    Planted("residual network, one-cycle", Residual, digit_loaders),
    Planted("GAN by hand", Gan, digit_loaders),
    Planted("GRU with two tasks", TwoTasks, digit_loaders),
    *_WITH_TRANSFORMERS,
)
"""The new healthy modules; the last one only where the package transformers is installed."""
