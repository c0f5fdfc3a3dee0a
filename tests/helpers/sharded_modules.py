"""Modules as others write them, which FSDP2 has to train as they are; the data is a function of batch and rank."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WORDS = 32


class Module(LightningModule):
    """Records its losses; a subclass builds itself and computes the loss of tokens or images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(97 * index + self.global_rank)
        return torch.randint(0, WORDS, (4, 9), generator=generator), torch.randn(4, 3, 6, 6, generator=generator)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*self._batch(batch_idx))
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(float(self.loss(*self._batch(1000 + batch_idx))))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*self._batch(batch_idx)).detach()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Encoder(Module):
    """nn.TransformerEncoder between an embedding and a head."""

    layers = 3

    def build(self) -> None:
        self.embedding = nn.Embedding(WORDS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        self.head = nn.Linear(16, WORDS)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.embedding(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        logits = self.logits(self.hidden(tokens[:, :-1]))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class Tied(Encoder):
    def build(self) -> None:
        super().build()
        self.head.weight = self.embedding.weight


class TiedFunction(Encoder):
    """The head is a function of the embedding's weight."""

    def build(self) -> None:
        super().build()
        del self.head

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)


class SharedWeight(Encoder):
    """Two blocks share a weight: neither can be a unit."""

    def build(self) -> None:
        super().build()
        self.encoder.layers[2].linear1.weight = self.encoder.layers[0].linear1.weight


class SharedLayer(Encoder):
    """The same block is used twice."""

    def build(self) -> None:
        super().build()
        self.encoder.layers[2] = self.encoder.layers[0]


class SharedNorm(Encoder):
    """A module within a block is also used outside of it."""

    def build(self) -> None:
        super().build()
        self.norm = self.encoder.layers[2].norm2

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden))


class PartlyFrozen(Encoder):
    def build(self) -> None:
        super().build()
        self.embedding.requires_grad_(False)
        self.encoder.layers[0].requires_grad_(False)


class Scalar(Encoder):
    """A parameter without a dimension."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden * self.scale)


class TwoForwards(Encoder):
    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        return super().loss(tokens, images) + super().loss(tokens.flip(1), images)


class DictOutput(Encoder):
    """Also calls itself, within its own step."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "other": 1}


class Adapter(nn.Module):
    """LoRA: a frozen bf16 layer and two trained fp32 matrices."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = layer.to(torch.bfloat16).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, layer.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.bfloat16()).float() + x @ self.down.t() @ self.up.t()


class AdaptedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(Adapter(nn.Linear(16, 32)), nn.GELU())
        self.out = Adapter(nn.Linear(32, 16))
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mlp(self.norm(x)))


class LoRA(Encoder):
    def build(self) -> None:
        self.embedding = nn.Embedding(WORDS, 16).requires_grad_(False)
        self.blocks = nn.ModuleList(AdaptedBlock() for _ in range(3))
        self.head = nn.Linear(16, WORDS).requires_grad_(False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class Convolutions(Module):
    """With BatchNorm: running statistics are buffers."""

    def build(self) -> None:
        def block(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

        self.net = nn.Sequential(block(3), block(8), block(8), nn.Flatten(), nn.Linear(288, 4))

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images), tokens[:, 0] % 4)


class Normed(Module):
    """Weight norm and spectral norm, as parametrizations."""

    def build(self) -> None:
        first = parametrizations.weight_norm(nn.Linear(108, 16))
        second = parametrizations.spectral_norm(nn.Linear(16, 4))
        self.net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images), tokens[:, 0] % 4)


class Recurrent(Encoder):
    def build(self) -> None:
        self.embedding, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.lstm(self.embedding(tokens))[0]


class Demo(Encoder):
    """Lightning's demo Transformer, an encoder and a decoder."""

    def build(self) -> None:
        from lightning.pytorch.demos import Transformer

        self.net = Transformer(vocab_size=WORDS, ninp=16, nhead=2, nhid=32, nlayers=2, dropout=0.0)

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        logits = self.net(tokens[:, :-1], tokens[:, 1:])
        return F.nll_loss(logits, tokens[:, 1:].reshape(-1))


class HuggingFace(Module):
    """A small Llama of transformers; `tied` and `recomputed` are set by subclasses."""

    tied = False
    recomputed: bool | None = None

    def build(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=self.tied,
        )
        self.model = LlamaForCausalLM(config)
        if self.recomputed is not None:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": self.recomputed})
            self.model.train()

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss


class HuggingFaceTied(HuggingFace):
    tied = True


class HuggingFaceRecomputed(HuggingFace):
    recomputed = False


class HuggingFaceReentrant(HuggingFace):
    recomputed = True


class Penalty(Encoder):
    """Uses the weights of blocks outside of their forward."""

    def loss(self, tokens: Tensor, images: Tensor) -> Tensor:
        return super().loss(tokens, images) + 1e-3 * sum(p.square().sum() for p in self.encoder.parameters())


class OtherMethod(Encoder):
    """Calls another method of a block than its forward."""

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.encoder.layers:
            x = x + layer._ff_block(x)
        return x


class Listed(Encoder):
    """Keeps a parameter in a list."""

    def build(self) -> None:
        super().build()
        self.mine = {"trained": [self.head.weight]}


class EarlyOptimizer(Encoder):
    """Makes its optimizer in its constructor."""

    def build(self) -> None:
        super().build()
        self.early = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_optimizers(self) -> Any:
        return self.early


class MixedTypes(Encoder):
    def build(self) -> None:
        super().build()
        self.head.to(torch.bfloat16)


class Lazy(Module):
    def build(self) -> None:
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


class Complex(Encoder):
    def build(self) -> None:
        super().build()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class OwnParameter(nn.Parameter):
    """A parameter of a class of its own, as quantised ones are."""


class Subclassed(Encoder):
    def build(self) -> None:
        super().build()
        self.own = OwnParameter(torch.ones(3))


class ShardsItself(Encoder):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.encoder)


class OnMeta(Encoder):
    """Made in `configure_model`, on the meta device."""

    def build(self) -> None:
        self.head: Any = None

    def configure_model(self) -> None:
        if self.head is None:
            with torch.device("meta"):
                super().build()


class Block(nn.Module):
    """With normalisation and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).tanh()


class Blocks(Encoder):
    """Blocks of our own, with a method that calls them outside of a step."""

    def build(self) -> None:
        self.embedding, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.encoder = nn.Sequential(*[Block() for _ in range(4)])  # type: ignore[assignment]

    def generate(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens)).argmax(-1)


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The whole parameters and buffers of a module, by name. A collective."""
    from torch.distributed.tensor import DTensor

    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: copy.deepcopy((t.full_tensor() if isinstance(t, DTensor) else t).detach()) for name, t in named.items()
    }
