"""The network of `CharGPT`: a pre-LN decoder."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INIT_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention.

    Under tensor parallelism each rank has some of the heads: ``heads`` is divided, and `qkv` returns theirs only.

    Args:
        width: size of a token's vector; divisible by heads.
        heads: number of heads, at least 1.
        dropout: probability, in attention and after it.
        qk_norm: apply layer norm to queries and keys per head, which bounds attention logits (arXiv 2302.05442).
    """

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(
            self.query_norm(q),
            self.key_norm(k),
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        y = self.out(y.transpose(1, 2).reshape(batch, time, -1))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each with a layer norm before it and a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, qk_norm)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class GPT(nn.Module):
    """Decoder-only transformer with learned positions (GPT-2: Radford et al. 2019).

    Weights are initialised from a normal distribution with standard deviation 0.02, divided by `sqrt(2 * layers)` for
    those that write to the residual stream, so that the stream's variance does not grow with depth.

    Args:
        layers: number of blocks, at least 1.
        heads: attention heads per block, at least 1.
        width: size of a token's vector; divisible by heads.
        context: maximum number of tokens of an input.
        vocab_size: number of different tokens.
        dropout: probability in 0 <= p < 1.
        qk_norm: see `Attention`.
        tie_embeddings: use the input embedding's weight in the output layer.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        context: int,
        vocab_size: int,
        dropout: float,
        qk_norm: bool,
        tie_embeddings: bool,
    ) -> None:
        super().__init__()
        self.context, self.dropout = context, dropout
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, qk_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.token.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                writes_residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=_INIT_STD / sqrt(2 * layers) if writes_residual else _INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, time, vocab_size) of the next token for tokens (batch, time)."""
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(
                f"model.context: expected at least the {time} tokens of a batch, got {self.context}; "
                f"set model.context and data.context to the same number"
            )
        x = self.token(tokens) + self.position(torch.arange(time, device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
