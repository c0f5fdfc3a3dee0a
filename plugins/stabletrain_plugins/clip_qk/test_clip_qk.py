"""Heads above the limit are at it after the step, all others keep their bits; a dropped step scales nothing."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import SaveAfter, assert_same, everything, fit, loader
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stabletrain import ClipQK, Guard, MonitorActivations, Rollback, SkipNonFinite, UserError
from stabletrain.core.events import Request, RequestKind
from stabletrain.core.rule import Observation
from stabletrain.runtime.observing.attention import AttentionCall, AttentionCalls, largest_logit
from stabletrain_plugins.clip_qk.scaling import factors

HEADS, HEAD, TIME, BATCH = 4, 6, 7, 3
SIZE = HEADS * HEAD
TAU = 5.0
GAINS = torch.tensor([4.0, 0.1, 3.0, 0.1])
"""Factors on the query and key rows of each head: the first and third have logits above `TAU`."""


class Attention(nn.Module):
    """Attention of one layer, in one of the forms that users write.

    Args:
        form: ``fused``, ``separate``, ``grouped`` (two heads share keys), ``rotary``, ``multihead``, or refused:
            ``norm``, ``interleaved``, ``softmax``.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        kv = HEADS // 2 if form == "grouped" else HEADS
        weight, bias = torch.randn(3, SIZE, SIZE) / SIZE**0.5, torch.randn(3, SIZE)
        weight[:2] *= GAINS.repeat_interleave(HEAD)[:, None]
        bias[:2] *= GAINS.repeat_interleave(HEAD)
        if form == "multihead":
            self.inner = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
            state = {"in_proj_weight": weight.flatten(0, 1), "in_proj_bias": bias.flatten()}
            self.inner.load_state_dict(state, strict=False)
            return
        if form in ("separate", "grouped"):
            self.q, self.k, self.v = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, kv * HEAD), nn.Linear(SIZE, kv * HEAD)
            parts = zip((self.q, self.k, self.v), weight, bias, strict=True)
        else:
            self.qkv = nn.Linear(SIZE, 3 * SIZE)
            parts = zip((self.qkv,), (weight.flatten(0, 1),), (bias.flatten(),), strict=True)
        for linear, values, offsets in parts:
            linear.weight.data.copy_(values[: linear.out_features])
            linear.bias.data.copy_(offsets[: linear.out_features])

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "multihead":
            out: Tensor = self.inner(x, x, x, need_weights=False)[0]
            return out
        if self.form in ("separate", "grouped"):
            q, k, v = (each(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.form == "grouped")
            return y.transpose(1, 2).flatten(2)
        order = (HEADS, 3) if self.form == "interleaved" else (3, HEADS)
        q, k, v = self.qkv(x).unflatten(-1, (*order, HEAD)).movedim(-2 if order[1] == 3 else -3, 0).transpose(-2, -3)
        if self.form == "norm":
            q, k = F.layer_norm(q, (HEAD,)), F.layer_norm(k, (HEAD,))
        if self.form == "rotary":
            angle = torch.arange(TIME)[:, None] / 10.0 ** torch.arange(HEAD // 2)
            q, k = (_rotated(each, angle) for each in (q, k))
        if self.form == "softmax":
            return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Net(LightningModule):
    """Attention and a readout; batch i is a function of its number, larger where it is in ``large``.

    Args:
        form: of `Attention`.
        lr: 0: only the plugin changes weights.
        large: factors on the input of batches; NaN is a factor too.
    """

    def __init__(
        self, form: str = "fused", lr: float = 0.0, large: dict[int, float] | None = None, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(form)
        self.readout = nn.Linear(SIZE, 1)
        self.lr, self.large, self.options = lr, large or {}, options

    def batch(self, number: int) -> Tensor:
        x = torch.randn(BATCH, TIME, SIZE, generator=torch.Generator().manual_seed(number))
        return x * self.large.get(number, 1.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.readout(self.attention(self.batch(int(batch)))) - 1).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), self.lr, weight_decay=0.0, **self.options)

    @torch.no_grad()
    def logits(self, number: int) -> Tensor:
        """The largest logit of each head on a batch."""
        found: list[AttentionCall] = []
        with AttentionCalls(self, found.append):
            self.attention(self.batch(number))
        return largest_logit(found[0])


PATTERNS: dict[str, dict[str, Any]] = {
    "fused": {"qkv": r".*\.qkv", "heads": HEADS},
    "rotary": {"qkv": r".*\.qkv", "heads": HEADS},
    "separate": {"query": r".*\.q", "key": r".*\.k", "heads": HEADS},
    "grouped": {"query": r".*\.q", "key": r".*\.k", "heads": HEADS},
    "multihead": {},
}


def clip(form: str = "fused", **arguments: Any) -> ClipQK:
    return ClipQK(**{"tau": TAU, **PATTERNS[form], **arguments})


def items(count: int) -> Any:
    return loader([torch.tensor(i) for i in range(count)])


def rows(module: Net) -> Tensor:
    """The query, key and value rows (3, heads, row, input and bias) of any form."""
    attention = module.attention
    if attention.form == "multihead":
        parts = [torch.cat([attention.inner.in_proj_weight, attention.inner.in_proj_bias[:, None]], 1)]
    else:
        linears = [attention.qkv] if hasattr(attention, "qkv") else [attention.q, attention.k, attention.v]
        parts = [torch.cat([each.weight, each.bias[:, None]], 1) for each in linears]
    return torch.cat(parts).detach().clone()


@pytest.mark.parametrize("form", ["fused", "rotary", "separate", "multihead"])
def test_heads_above_the_limit_are_at_it_and_others_keep_their_bits(form: str) -> None:
    """Bugs: the bias is not scaled; sqrt is forgotten or taken twice; value rows or other heads are scaled, too."""
    module = Net(form)
    before, logits = rows(module).view(3, HEADS, HEAD, -1), module.logits(0)
    assert (logits > TAU).tolist() == [True, False, True, False]
    fit(module, items(1), clip(form))
    after, now = rows(module).view(3, HEADS, HEAD, -1), module.logits(0)
    assert (now[[0, 2]] / TAU - 1).abs().max() < 1e-5
    assert torch.equal(now[[1, 3]], logits[[1, 3]])
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[:2, [1, 3]], before[:2, [1, 3]])
    assert not torch.equal(after[0, 0], before[0, 0])
    assert not torch.equal(after[1, 0], before[1, 0])


def test_fused_equals_separate_and_multi_head_attention() -> None:
    """Bug: another place of the rows."""
    ends = []
    for form in ("fused", "separate", "multihead"):
        module = Net(form)
        fit(module, items(1), clip(form))
        ends.append(rows(module))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_shared_keys_take_the_smallest_factor_of_their_group() -> None:
    """Bugs: the factor of the group's first head, or of a neighbouring group; keys are scaled once for each head."""
    module = Net("grouped")
    before, logits = rows(module), module.logits(0)
    fit(module, items(1), clip("grouped", tau=1.0))
    eta = factors(logits, 1.0)
    assert (eta < 1).sum() >= 2
    keys = eta.view(2, 2).amin(1)
    expected = torch.cat([eta, keys, torch.ones(2)]).sqrt().repeat_interleave(HEAD)[:, None]
    assert torch.equal(rows(module), before * expected)
    assert module.logits(0).max() <= 1 + 1e-5


def test_while_no_logit_is_above_the_limit_no_bit_changes() -> None:
    """Bug: looking changes random numbers, gradients or weights of a healthy run."""
    torch.manual_seed(1)
    with_it = everything(fit(Net(lr=0.01), items(4), clip(tau=1e4)))
    assert_same(with_it, everything(fit(Net(lr=0.01), items(4), SkipNonFinite())))


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_dropped_step_scales_nothing_and_leaves_no_logits(mode: Any) -> None:
    """Bugs: weights are scaled although the step is dropped, or by its logits at the next step."""
    options: dict[str, Any] = {"lr": 0.01, "fused": True}
    plugins = [Guard(mode=mode), SkipNonFinite(), clip()]
    with_bad = everything(fit(Net(large={1: math.nan}, **options), items(3), *copy.deepcopy(plugins)))
    one = loader([torch.tensor(i) for i in (0, 2)])
    assert_same(with_bad, everything(fit(Net(**options), one, *copy.deepcopy(plugins))))
    unclipped = everything(fit(Net(**options), one, Guard(mode=mode), SkipNonFinite()))
    assert not torch.equal(with_bad["module.attention.qkv.weight"], unclipped["module.attention.qkv.weight"])


def test_the_largest_logit_is_that_of_all_micro_batches_of_this_step() -> None:
    """Bugs: only the last micro-batch counts; the logits of an earlier step are not forgotten."""
    module = Net(large={0: 3.0})
    logits, before = module.logits(0), rows(module)
    assert all((logits > module.logits(i)).all() for i in (1, 2, 3))
    fit(module, items(4), clip(tau=20.0), accumulate_grad_batches=2)
    assert torch.equal(rows(module)[:HEAD], before[:HEAD] * factors(logits, 20.0)[0].sqrt())


class TwoPasses(Net):
    """Steps by hand, with a second forward pass after the first backward pass, whose logits are larger."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for number in (0, 1):
            self.manual_backward(super().training_step(torch.tensor(number), 0))
        optimizer.step()
        optimizer.zero_grad()


def test_all_forward_passes_of_a_step_by_hand_count() -> None:
    """Bug: with manual optimization only what comes before the first backward pass is seen."""
    module = TwoPasses(large={1: 3.0})
    logits, before = module.logits(1), rows(module)
    fit(module, items(1), clip())
    assert torch.equal(rows(module)[:HEAD], before[:HEAD] * factors(logits, TAU)[0].sqrt())


class ByIndex(Net):
    """A resumed fit starts the loader anew, but goes on counting batches."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(torch.tensor(batch_idx), batch_idx)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Bug: the first step after a resume is not clipped, or is by another logit."""
    saved = tmp_path / "a.ckpt"
    whole = everything(fit(ByIndex(lr=0.01), items(6), SkipNonFinite(), clip(tau=0.5), SaveAfter(2, saved)))
    again = fit(ByIndex(lr=0.01), items(6), SkipNonFinite(), clip(tau=0.5), ckpt_path=saved)
    assert_same(everything(again), whole)


class GoBack(SkipNonFinite):  # type: ignore[name-defined,misc]
    """Requests a rollback after the fifth attempted step."""

    plugin = "go_back"

    def observe(self, state: Any, outcome: Any) -> Any:
        request = Request(RequestKind.ROLLBACK, self.label, "requested")
        return Observation(state, (), (request,) if outcome.step == 4 else ())


def test_weights_after_a_rollback_are_those_of_a_run_without_one(tmp_path: Path) -> None:
    """Bugs: the snapshot has the weights before the clip, so that a step is clipped twice or not at all; a logit of the
    undone steps clips the first one after them."""
    quick = {"window": 16, "delay": 2, "min_samples": 8, "patience": 4, "regime_after": 4, "cool_down": 8}
    back = Rollback(every=2, drop="none", trust_after=1, rewarm=0, **quick)
    whole = everything(fit(Net(lr=0.01), items(8), SkipNonFinite(), clip(tau=0.5)))
    undone = everything(fit(Net(lr=0.01), items(8), GoBack(), back, clip(tau=0.5), default_root_dir=tmp_path))
    assert back.rollbacks == 1
    assert_same(undone, whole)


def test_metrics_and_what_is_left_after_a_fit() -> None:
    """Bugs: metrics of the step before; hooks or modes that stay on the module."""
    module, plugin = Net(), clip(name="second")
    logits = module.logits(0)
    mine = fit(module, items(1), plugin)
    logged = mine.callback_metrics
    assert logged["stability/second/qk_logit"].item() == pytest.approx(logits.max().item())
    assert logged["stability/second/qk_clipped_heads"].item() == 2
    assert not module.attention.qkv._forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    with pytest.raises(RuntimeError, match="own bug"):
        fit(Failing(), items(2), clip())
    assert not nn.modules.module._global_forward_pre_hooks
    assert not torch.overrides._get_current_function_mode_stack()


class Adversarial(Net):
    """The optimizer of another part steps first, without attention."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        mine, other = self.optimizers()  # type: ignore[misc]
        other.zero_grad()
        self.manual_backward(self.readout(self.batch(int(batch))).square().mean())
        other.step()
        mine.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        mine.step()

    def configure_optimizers(self) -> Any:
        return [SGD(each.parameters(), 0.0) for each in (self.attention, self.readout)]


class Late(Net):
    """The first batch needs no attention."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            return self.readout(self.batch(0)).square().mean()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [Adversarial, Late])
def test_attention_may_begin_after_the_first_step(make: Any) -> None:
    """Bug: a step that needs no attention is taken for one whose attention cannot be seen, and ends the run."""
    module = make()
    logits = module.logits(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "clip_qk: not used in the first step")
        fit(module, items(2), clip(tau=1.0))
    assert (logits > 1.0).any()
    assert module.logits(1).max() < 1.001


@pytest.mark.parametrize("exact", ["bound", "exact"])
def test_two_plugins_that_read_attention_do_not_read_each_other(exact: Any) -> None:
    """Bug: inside nn.MultiheadAttention one reads the products that the other computes, and raises or clips by them."""
    ends = []
    for others in ([], [MonitorActivations(every=1, attention=exact)]):
        module = Net("multihead")
        module.attention.inner.dropout = 1e-9  # then torch uses no fused kernel
        ends.append(everything(fit(module, items(2), *others, clip("multihead"))))
    assert_same(*ends)


class Failing(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if int(batch) == 1:
            raise RuntimeError("the module's own bug")
        return super().training_step(batch, batch_idx)


class Averaged(SGD):
    """Keeps a copy of the weights, from which the next ones are computed."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("z", p.detach().clone())
        return super().step(closure)


class WithAveraged(Net):
    def configure_optimizers(self) -> Optimizer:
        return Averaged(self.parameters(), 1e-3)


class Frozen(Net):
    def configure_optimizers(self) -> Optimizer:
        return SGD(self.readout.parameters(), 1e-3)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention.compile(backend="eager")


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("no match", Net, {"qkv": "qkv"}, r"qkv.*'qkv' matches the whole name of no module.*attention\.qkv"),
    ("nothing given", Net, {"qkv": None}, "no pattern is given, and Net has no nn.MultiheadAttention"),
    ("no heads", Net, {"heads": None}, "expected the number of heads"),
    ("heads that do not divide", Net, {"heads": 5}, "72 rows of attention.qkv cannot be divided into 5 heads"),
    ("other heads", Net, {"heads": 3}, "attention has 4 heads of queries, and attention.qkv 3"),
    ("kv_heads", Net, {"kv_heads": 3}, "expected a divisor of heads=4, got 3"),
    ("not linear", Net, {"qkv": "attention"}, "attention is a Attention; expected nn.Linear"),
    ("qk-norm", lambda: Net("norm"), {}, r"the queries of the attention are not .* \(qk-norm"),
    ("another layout", lambda: Net("interleaved"), {}, "then of all values"),
    ("unseen attention", lambda: Net("softmax"), {}, "no attention call was seen in attention, to which attention.qkv"),
    ("not trained", Frozen, {}, "attention.qkv is not trained by any optimizer"),
    ("compiled", Compiled, {}, "Compiled is compiled"),
    ("a copy of the weights", WithAveraged, {}, r"Averaged keeps another copy of the weights \(state 'z'\)"),
]


@pytest.mark.parametrize(("make", "changes", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_mistake_is_one_message(make: Any, changes: dict[str, Any], message: str) -> None:
    """Bug: a pattern, number or module with which nothing, or something wrong, would be scaled is accepted."""
    with pytest.raises(UserError, match=message):
        fit(make(), items(2), clip(**changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.0}, "tau must be a number > 0"),
        ({"tau": math.nan}, "tau must be"),
        ({"qkv": "("}, "qkv must be a regular expression"),
        ({"heads": 0}, "heads must be"),
        ({"query": "q"}, "query must be given with"),
        ({"qkv": "a", "query": "q", "key": "k"}, "qkv must be null"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Bug: a limit of 0 makes all queries 0."""
    with pytest.raises(UserError, match=message):
        ClipQK(**arguments)
