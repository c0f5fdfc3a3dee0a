"""Counted operations against counts by hand, and what cannot be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from planned_runs import BATCH, CONTEXT, Again, Data, ReadsValues, StepsItself, arguments, planned, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabletrain.planning.flops import count_flops
from stabletrain.planning.parts import Parts
from stabletrain.planning.plan import Flops
from stabletrain.runtime.internals.fake_world import needs_values
from stabletrain.workloads import CharGPT


class Vectors(LightningDataModule):
    """Sequences of vectors."""

    def train_dataloader(self) -> Again:
        return Again(torch.randn(3, 5, 8))


class OneLayer(LightningModule):
    """A layer, and the sum of its outputs as the loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out = self.layer(batch)
        return self.head(out[0] if isinstance(out, tuple) else out).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SharesTheEmbedding(OneLayer):
    """A hand-written output layer: a product with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(84, 8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.head.weight[0] * self.layer(batch[:, :-1])
        weight: Any = self.layer.weight
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), batch[:, 1:].flatten())


def counted(make: Callable[[], LightningModule], data: LightningDataModule | None = None) -> Flops:
    return count_flops(lambda mode: Parts(make(), data or Vectors(), arguments("single", 1, {}), []))


def gpt(**options: Any) -> CharGPT:
    return CharGPT(layers=2, heads=4, width=32, context=CONTEXT, sample_length=0, **options)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def by_hand(layers: int, width: int, vocabulary: int, context: int, rows: int) -> tuple[int, int]:
    """Operations of a GPT's step: each weight of a matrix six for each token, attention twelve for each pair."""
    tokens = rows * context
    attention = 12 * layers * width * context * tokens
    return 6 * tokens * (12 * layers * width**2 + vocabulary * width) + attention, attention


def test_operations_of_a_gpt_are_those_by_hand() -> None:
    """Bugs: attention by a fused kernel is counted as nothing, so that the context does not matter; the targets count
    as tokens; a lookup counts as a product."""
    found = counted(gpt, Data())
    whole, attention = by_hand(2, 32, 84, CONTEXT, BATCH)
    assert found.micro_batch == pytest.approx(whole, rel=0.01)
    assert found.attention == attention
    assert (found.samples, found.tokens) == (BATCH, BATCH * CONTEXT)
    assert found.embeddings == 32 * (84 + CONTEXT)
    assert (found.uncounted, found.recomputes) == ([], False)


def test_an_embedding_that_the_output_layer_shares_is_none() -> None:
    """Bug: its weights, which are multiplied with every token, are left out of 6 N D."""
    assert counted(lambda: gpt(tie_embeddings=True), Data()).embeddings == 32 * CONTEXT
    assert counted(SharesTheEmbedding, Data()).embeddings == 0


def test_attention_within_a_module_of_torch_is_seen() -> None:
    """Bug: nn.MultiheadAttention, which calls its attention where no mode for functions sees it."""
    found = counted(lambda: OneLayer(encoder()))
    products = 3 * 2 * 15 * (8 * 24 + 8 * 8 + 2 * 8 * 16 + 8 * 2)
    first = 2 * 15 * 8 * 24  # the inputs need no gradient
    attention = 3 * 2 * 3 * 5 * 5 * 8 * 2
    assert found.attention == attention
    assert found.micro_batch == products + attention - first
    assert found.uncounted == []
    assert found.tokens is None


def test_layers_that_the_module_computes_again_are_counted_and_said() -> None:
    """Bug: a count with checkpointed layers is taken for that of the model."""

    class Checkpoints(OneLayer):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(checkpoint(self.layer, batch, use_reentrant=False)).sum()

    plain, found = counted(lambda: OneLayer(encoder())), counted(lambda: Checkpoints(encoder()))
    assert (plain.recomputes, found.recomputes) == (False, True)
    assert found.attention == plain.attention
    assert found.micro_batch == plain.micro_batch + 2 * 15 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + plain.attention / 3


def test_what_is_not_counted_is_named() -> None:
    """Bug: a network of nn.LSTM seems to cost next to nothing, and nobody says so."""
    found = counted(lambda: OneLayer(nn.LSTM(8, 8, batch_first=True)))
    head = 3 * 2 * 15 * 8 * 2
    if found.micro_batch == head:
        assert found.uncounted == ["LSTM"]
    else:  # a version of torch that counts it
        assert found.uncounted == []


def test_what_is_frozen_has_no_backward() -> None:
    """Bug: attention whose inputs need no gradient counts three times."""
    found = counted(lambda: OneLayer(encoder().requires_grad_(False)))
    assert found.attention == 2 * 3 * 5 * 5 * 8 * 2


def test_a_step_that_steps_itself_is_counted_and_one_that_reads_values_is_not() -> None:
    """Bugs: manual optimization is not counted; a count that ended early is taken for a whole one."""
    assert counted(small(StepsItself), Data()).samples == BATCH
    with pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense") as raised:
        counted(small(ReadsValues), Data())
    assert needs_values(raised.value)


CASES = [
    pytest.param("ddp", 2, 2, marks=pytest.mark.slow),
    ("tensor_parallel", 2, 1),
    pytest.param("fsdp2_tp", 4, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "size", "readers"), CASES)
def test_ranks_that_share_a_batch_count_once(kind: str, size: int, readers: int) -> None:
    """Bug: with tensor parallelism, the run reads as many times more tokens as there are ranks."""
    plan = planned(kind, size, {"accumulate_grad_batches": 3})
    assert plan.readers == readers
    assert plan.samples_per_step == BATCH * 3 * readers
