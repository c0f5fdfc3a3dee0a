"""Attention calls are all seen, with the right queries, keys and masks, and nothing of the forward pass changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from stabletrain.runtime.observing.attention import AttentionCall, AttentionCalls, entropy, largest_logit, logit_bound

HEADS, WIDTH, TIME, BATCH = 2, 4, 5, 3


class Direct(nn.Module):
    """Causal attention as GPTs write it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).movedim(-3, 0).transpose(-2, -3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return x + y.transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    def __init__(self, needs: bool, dropout: float = 0.0, padded: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True, dropout=dropout)
        self.needs, self.padded = needs, padded

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(TIME)
        padding = torch.zeros(BATCH, TIME)
        padding[0, 3:] = -math.inf
        kwargs: dict[str, Any] = {"key_padding_mask": padding if self.padded else None, "attn_mask": causal}
        return x + self.attention(x, x, x, need_weights=self.needs, **kwargs)[0]


def encoder(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(HEADS * WIDTH, HEADS, 8, dropout, batch_first=True)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def seen_in(module: nn.Module, x: Tensor) -> tuple[list[AttentionCall], Tensor]:
    calls: list[AttentionCall] = []
    with AttentionCalls(module, calls.append):
        out = module(x)
    return calls, out


CASES: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("direct", Direct, ""),
    ("with dropout", lambda: nn.Sequential(Direct(0.3)), "0"),
    ("checkpointed", lambda: Checkpointed(Direct()), "inner"),
    ("multi-head", lambda: Multihead(False), "attention"),
    ("multi-head, dropout", lambda: Multihead(False, 0.3), "attention"),
    ("multi-head, weights", lambda: Multihead(True), "attention"),
    ("multi-head, weights, dropout, padding", lambda: Multihead(True, 0.3, True), "attention"),
    ("encoder layer", lambda: encoder(0.0), "self_attn"),
    ("encoder layer, dropout", lambda: encoder(0.3), "self_attn"),
]


@pytest.mark.parametrize(("make", "name"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_call_is_seen_by_name_and_changes_no_bit(make: Callable[[], nn.Module], name: str) -> None:
    """Bugs: attention of a kind that is not seen, or twice; another random number, output or gradient; hooks left."""
    torch.manual_seed(0)
    module, x = make(), torch.randn(BATCH, TIME, HEADS * WIDTH, requires_grad=True)
    results = []
    for look in (False, True):
        torch.manual_seed(1)
        calls, out = seen_in(module, x) if look else ([], module(x))
        grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        results.append([out, *grads, torch.rand(1)])
    assert [call.name for call in calls] == [name]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert calls[0].query.shape == calls[0].key.shape == (BATCH, HEADS, TIME, WIDTH)
    assert seen_in(nn.Identity(), x)[0] == []


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("math_kernel", [False, True])
def test_readings_inside_multi_head_attention_are_those_of_its_weights(needs: bool, math_kernel: bool) -> None:
    """Bugs: the scale is counted twice or lost; masked keys count; heads and batch are exchanged."""
    torch.manual_seed(0)
    module, x = Multihead(needs, padded=True), torch.randn(BATCH, TIME, HEADS * WIDTH)
    with sdpa_kernel(SDPBackend.MATH if math_kernel else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        calls, _ = seen_in(module, x)
    (call,) = calls
    attention = module.attention
    q, k, _ = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH)
    logits = logits.masked_fill(torch.ones(TIME, TIME, dtype=torch.bool).triu(1), -math.inf)
    logits[0, :, :, 3:] = -math.inf
    torch.testing.assert_close(largest_logit(call), logits.amax((0, 2, 3)))
    expected = torch.special.entr(logits.softmax(-1)).sum(-1).mean((0, 2))
    torch.testing.assert_close(entropy(call), expected)
    assert (logit_bound(call) >= largest_logit(call)).all()


def call_of(**changes: Any) -> AttentionCall:
    torch.manual_seed(0)
    query, key = torch.randn(BATCH, 4, 7, WIDTH), torch.randn(BATCH, 4, 9, WIDTH)
    return AttentionCall("", query, key, 0.5, None, False)._replace(**changes)


MASK = torch.arange(7)[:, None] + 1 >= torch.arange(9)
BIAS = torch.linspace(0, 2, 9).expand(7, 9)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"mask": MASK},
    {"mask": torch.where(MASK, BIAS, torch.finfo(torch.float32).min)},
    {"mask": MASK.expand(BATCH, 1, 7, 9)},
    {"mask": (torch.arange(9) < 4)[None]},
    {"scale": -0.5},
    {"key": torch.randn(BATCH, 2, 9, WIDTH)},
]


@pytest.mark.parametrize("elements", [1, 300, 1 << 24])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda each: ",".join(each) or "plain")
def test_readings_are_those_of_the_whole_product(changes: dict[str, Any], elements: int) -> None:
    """Bugs: a block is lost at its border; the causal triangle is moved; a bias counts as logit; groups are mixed."""
    call = call_of(**changes)
    key = call.key.repeat_interleave(4 // call.key.shape[1], 1)
    logits = call.query @ key.mT * call.scale
    left_out = torch.zeros(7, 9, dtype=torch.bool)
    biased = logits
    if call.causal:
        left_out = torch.ones(7, 9, dtype=torch.bool).triu(1)
    elif call.mask is not None:
        left_out = ~call.mask if call.mask.dtype == torch.bool else call.mask < -1e4
        biased = logits if call.mask.dtype == torch.bool else logits + call.mask
    expected = logits.masked_fill(left_out, -math.inf)
    torch.testing.assert_close(largest_logit(call, elements), expected.amax((0, 2, 3)))
    weights = biased.masked_fill(left_out, -math.inf).softmax(-1)
    torch.testing.assert_close(entropy(call, elements), torch.special.entr(weights).sum(-1).mean((0, 2)))
    assert (logit_bound(call) >= largest_logit(call) - 1e-5).all()


def test_what_cannot_be_read() -> None:
    """Bugs: a query without keys makes all NaN; a large float16 product is infinite; a NaN is hidden."""
    blind = call_of(mask=torch.zeros(7, 9, dtype=torch.bool))
    assert largest_logit(blind).tolist() == [-math.inf] * 4
    row = torch.ones(7, 9, dtype=torch.bool)
    row[3] = False
    assert entropy(call_of(mask=row)).isfinite().all()
    large = call_of(query=torch.full((1, 1, 2, WIDTH), 300.0).half(), key=torch.full((1, 1, 2, WIDTH), 300.0).half())
    assert largest_logit(large).item() == 180_000
    query = call_of().query.clone()
    query[1, 2, 3] = math.nan
    assert largest_logit(call_of(query=query)).isnan().tolist() == [False, False, True, False]


def test_nothing_is_left_open_after_an_exception() -> None:
    """Bug: an exception in forward leaves the mode open, and later calls are still seen, or named after old modules."""
    module = nn.Sequential(Direct(), nn.Linear(1, 1))
    calls: list[AttentionCall] = []
    watch = AttentionCalls(module, calls.append)
    x = torch.randn(BATCH, TIME, HEADS * WIDTH)
    for _ in range(2):
        with pytest.raises(RuntimeError), watch:
            module(x)
        module[0](x)
    assert [call.name for call in calls] == ["0", "0"]


def test_a_compiled_module_is_seen_without_new_graphs() -> None:
    """Bug: a look is a recompilation, or nothing is seen in compiled code."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module = Direct()
    compiled, x = torch.compile(module, backend=backend), torch.randn(BATCH, TIME, HEADS * WIDTH)
    plain = compiled(x)
    calls, looked = seen_in(compiled, x)  # type: ignore[arg-type]
    assert [call.name for call in calls] == [""]
    assert torch.equal(plain, looked)
    assert torch.equal(compiled(x), plain)
    assert len(graphs) == 1


def test_three_dimensions_are_a_batch_with_one_head() -> None:
    """Bug: the batch is taken for heads, so that there are as many readings as samples."""
    x = torch.randn(BATCH, TIME, WIDTH)
    mask = torch.ones(BATCH, TIME, TIME, dtype=torch.bool).tril()
    found: list[AttentionCall] = []
    with AttentionCalls(nn.Identity(), found.append):
        F.scaled_dot_product_attention(x, x, x, mask)
    logits = (x @ x.mT / math.sqrt(WIDTH)).masked_fill(~mask, -math.inf)
    (call,) = found
    assert call.heads == 1
    torch.testing.assert_close(largest_logit(call), logits.amax().view(1))
    assert logit_bound(call).shape == entropy(call).shape == (1,)
    with pytest.raises(TypeError, match="scaled_dot_product_attention"), AttentionCalls(nn.Identity(), found.append):
        F.scaled_dot_product_attention(x, x, x, unknown=1)  # type: ignore[call-arg]
