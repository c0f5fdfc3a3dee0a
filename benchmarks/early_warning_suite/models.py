"""Small networks of five kinds, from inputs to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from early_warning_suite.data import CONTEXT, VOCABULARY
from stabletrain.workloads.gpt import GPT

HEADS, WIDTH, HIDDEN = 4, 48, 64


class PostNormTransformer(nn.Module):
    """A causal transformer of four `torch.nn.TransformerEncoderLayer`, with layer norm after each residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, VOCABULARY) of tokens (batch, time)."""
        time = tokens.shape[1]
        x = self.token(tokens) + self.position(torch.arange(time))
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


class Recurrent(nn.Module):
    """An embedding, one recurrent module, and an output layer.

    Args:
        core: maps (batch, time, WIDTH) to (batch, time, HIDDEN) and a state.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.core: nn.RNNBase
        if kind == "lstm":
            self.core = nn.LSTM(WIDTH, HIDDEN, 1, batch_first=True)
        else:
            self.core = nn.RNN(WIDTH, HIDDEN, 2, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        if kind == "rnn":  # without it, a ReLU network forgets within a few steps (Le et al. 2015, arXiv 1504.00941)
            for name, parameter in self.core.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, VOCABULARY) of tokens (batch, time)."""
        logits: Tensor = self.head(self.core(self.token(tokens))[0])
        return logits


class ConvNet(nn.Module):
    """Three convolutions with batch norm, whose scale the weights before them do not change."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *self._block(1, width),
            *self._block(width, width),
            nn.MaxPool2d(2),
            *self._block(width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width, 10)

    @staticmethod
    def _block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 1, 8, 8)."""
        logits: Tensor = self.head(self.net(images))
        return logits


def build(kind: str, layers: int = 2, width: int = WIDTH, qk_norm: bool = False) -> nn.Module:
    """A new network, its weights drawn from the global generator.

    Args:
        kind: ``gpt``, ``post-LN``, ``lstm``, ``rnn`` or ``cnn``.
        layers: of a ``gpt``.
        width: of a ``gpt``; divisible by HEADS.
        qk_norm: layer norm of the queries and keys of a ``gpt``.
    """
    if kind == "gpt":
        return GPT(layers, HEADS, width, CONTEXT, VOCABULARY, 0.0, qk_norm, tie_embeddings=False)
    if kind == "post-LN":
        return PostNormTransformer()
    return ConvNet() if kind == "cnn" else Recurrent(kind)
