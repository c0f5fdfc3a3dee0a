"""Each fault has its effect at its step, before plugins measure, and leaves nothing behind."""

import itertools
import math

import pytest
import torch
from fits import Recorder, assert_same
from lightning.pytorch import Callback

from stabletrain import Guard, ScheduleLR, SkipNonFinite
from stabletrain.chaos import (
    BadBatch,
    BadGradient,
    FlipWeightBit,
    LearningRateSurge,
    ScaledGradient,
    ScaledLoss,
    SlowRank,
)
from stabletrain.errors import UserError
from stabletrain.testing.checks.equality import same


def clean(module):
    """No hook, wrapper or attribute of a fault is left."""
    hooks = [p for p in module.parameters() if p._backward_hooks]
    return not hooks and "training_step" not in module.__dict__


# ---- gradients and losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_of_one_gradient(train, value):
    """Bug: more elements, other steps, or a hook that stays on the parameter."""
    run = train(BadGradient(at_step=3, value=value), batches=5)
    bad = [[int((~g.isfinite()).sum()) for g in grads] for grads in run.record.grads[:4]]
    assert bad == [[0, 0, 0, 0]] * 3 + [[1, 0, 0, 0]]
    faulty, plain = run.record.grads[3], train(batches=5).record.grads[3]
    others = faulty[0].isfinite()
    assert_same([faulty[0][others], *faulty[1:]], [plain[0][others], *plain[1:]])
    assert clean(run.module)


def test_the_parameter_and_the_element_can_be_chosen(train):
    """Bug: ``parameter`` or ``seed`` has no effect, or the same seed gives another element."""
    first, second, other = (
        train(BadGradient(at_step=0, parameter="net.4.weight", seed=seed), batches=1) for seed in (0, 0, 5)
    )
    where = [run.record.grads[0][2].isnan().nonzero().tolist() for run in (first, second, other)]
    assert where[0] == where[1] != where[2]


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_the_guard_sees_the_bad_gradient_and_drops_the_step(train, mode):
    """Bug: the fault comes after the guard has measured, when it is last in the list."""
    outcomes = Recorder()
    # the fault is last in the list, and still acts first
    run = train(Guard(mode=mode), SkipNonFinite(), outcomes, BadGradient(at_step=3), fused=True)
    assert [each.step for each in outcomes.state if each.skipped] == [3]
    assert all(w.isfinite().all() for w in run.weights)


def test_a_scaled_gradient(train):
    """Bug: another factor, or gradients of other steps that are scaled too."""
    plain, run = train(), train(ScaledGradient(at_step=2, factor=100.0, steps=2))
    assert_same(run.record.grads[2], [g * 100.0 for g in plain.record.grads[2]])
    assert [t for t in plain.grads_differ(run) if t < 3] == [2]
    assert float(run.record.grads[3][0].norm()) > 20 * float(run.record.grads[4][0].norm())
    assert clean(run.module)


def test_with_accumulation_every_micro_batch_of_the_step_has_the_fault(train):
    """Bug: steps counted in micro-batches, or only one micro-batch of the step scaled."""
    plain = train(accumulate_grad_batches=4)
    run = train(ScaledGradient(at_step=1, factor=4.0), accumulate_grad_batches=4)
    assert len(run.record.grads) == 2
    assert_same(run.record.grads[0], plain.record.grads[0])
    assert_same(run.record.grads[1], [g * 4.0 for g in plain.record.grads[1]])


def test_a_nan_loss(train):
    """Bug: the loss that rules see is not the one with the fault; a wrapper that stays on the module."""
    outcomes = Recorder()
    run = train(SkipNonFinite(), outcomes, ScaledLoss(at_step=2))
    assert [math.isnan(each.loss) for each in outcomes.state] == [False, False, True] + [False] * 5
    assert clean(run.module)


def test_a_large_loss_overflows_in_half_precision(train):
    """Bug: the factor is applied after the loss scale; or the reported loss is infinite as well."""
    outcomes = Recorder()
    train(outcomes, ScaledLoss(at_step=4, factor=1e7), fp16=True)
    assert [each.step for each in outcomes.state if each.overflow] == [4]
    assert math.isfinite(outcomes.state[4].loss)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "shuffled_labels", "constant", "rare"])
def test_a_bad_batch_changes_what_the_module_gets_and_nothing_else(train, kind):
    """Bug: the data set itself is changed, or batches of other steps, or inputs where only labels should be."""
    plain = train()
    x, y = (each.clone() for each in plain.data)
    run = train(BadBatch(at_step=2, steps=2, kind=kind))
    assert_same(run.data, (x, y))
    changed = [
        [not torch.equal(a, b) for a, b in zip(new, old, strict=True)]
        for new, old in zip(run.module.batches, plain.module.batches, strict=True)
    ]
    assert [t for t, each in enumerate(changed) if any(each) and t not in (2, 3)] == []
    # labels of one batch may be shuffled into themselves: in both it would be no chance
    assert [any(c[0] for c in changed), any(c[1] for c in changed)] == [kind in ("random", "constant"), True]
    assert clean(run.module)


def test_bad_batches_are_the_same_for_the_same_seed_and_do_not_use_the_global_random_generators(train):
    """Bug: a fault that cannot be repeated, or that changes dropout and data of later steps."""
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        runs.append((train(BadBatch(at_step=2, seed=seed)).module.batches[2], torch.rand(())))
    assert_same(runs[0][0], runs[1][0])
    assert not same(runs[0][0], runs[2][0])
    assert runs[0][1] == runs[1][1] == runs[2][1]


TOKENS = torch.tensor([[1, 2, 2, 3], [2, 5, 2, 9]])


def content(kind, batch, **arguments):
    fault = BadBatch(at_step=0, kind=kind, **arguments)
    fault._generator = torch.Generator().manual_seed(0)
    return fault.replacement(batch)


def test_nested_batches_keep_their_structure_masks_and_scalars():
    """Bug: masks or scalars replaced, other dtypes, or a batch in a dictionary unchanged."""
    batch = {"ids": TOKENS, "mask": TOKENS > 1, "pair": (torch.ones(3), [torch.tensor(4)]), "name": "text"}
    bad = content("constant", batch)
    assert bad["ids"].tolist() == [[2] * 4] * 2
    assert torch.equal(bad["mask"], batch["mask"])
    assert bad["name"] == "text"
    assert bad["pair"][1][0] == 4
    assert bad["ids"].dtype == TOKENS.dtype


def test_the_kinds_of_bad_tokens():
    """Bug: tokens outside of the vocabulary, or a kind that does not what it is named for."""
    assert content("constant", TOKENS, token=7).unique().tolist() == [7]
    assert content("rare", TOKENS).unique().tolist() == [1]
    noise = content("random", torch.full((64, 64), 3).clamp(max=3), vocabulary=8)
    assert noise.unique().tolist() == list(range(8))
    own = content("random", TOKENS.repeat(64, 1))
    assert (own.min(), own.max()) == (1, 9)
    shuffled = content("shuffled_labels", TOKENS)
    assert sorted(shuffled.flatten().tolist()) == sorted(TOKENS.flatten().tolist())


def test_labels_are_found_by_name_or_index():
    """Bug: inputs shuffled instead of labels; or no error where there are none."""
    x, y = torch.arange(50.0), torch.arange(50)
    for batch, arguments in (
        ({"x": x, "labels": y}, {}),
        ({"x": x, "mine": y}, {"labels": "mine"}),
        ((x, y), {}),
        ([y, x], {"labels": 0}),
    ):
        bad = content("shuffled_labels", batch, **arguments)
        values, labels = bad.values() if isinstance(bad, dict) else (bad if arguments != {"labels": 0} else bad[::-1])
        assert torch.equal(values, x)
        assert not torch.equal(labels, y)
        assert torch.equal(labels.sort().values, y)
    with pytest.raises(UserError, match=r"cannot find the labels of the batch.*chaos\.labels"):
        content("shuffled_labels", {"x": x, "z": y})


# ---- learning rate, weights, time -----------------------------------------------------------------------------------


def step_lengths(run):
    weights = [*run.record.weights, run.weights]
    return [max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(weights)]


@pytest.mark.parametrize("mode", [None, "exact", "device"])
@pytest.mark.parametrize("last", [False, True])
def test_a_surge_of_the_learning_rate_wins_over_the_schedule_and_leaves_no_trace(train, mode, last):
    """Bugs: the schedule sets its rate after the surge; the high rate stays; hooks stay on the optimizer."""

    def stack(*faults):
        schedule = ScheduleLR("constant")
        plugins = [schedule] if mode is None else [Guard(mode=mode), SkipNonFinite(), schedule]
        return [*plugins, *faults] if last else [*faults, *plugins]

    plain = train(*stack(), fused=True)
    run = train(*stack(LearningRateSurge(at_step=3, factor=30.0, steps=2)), fused=True)
    ratios = [a / b for a, b in zip(step_lengths(run), step_lengths(plain), strict=True)]
    assert ratios[:3] == [1.0] * 3
    assert ratios[3] == pytest.approx(30.0, rel=0.05)
    assert ratios[4] > 10
    assert max(ratios[5:]) < 3
    assert run.record.rates == plain.record.rates
    optimizer = run.trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_surge_under_a_loss_scaler(train):
    """Bug: with a loss scaler, whose step wraps the optimizer's, the surge has no effect."""
    plain = train(SkipNonFinite(), fp16=True)
    run = train(SkipNonFinite(), LearningRateSurge(at_step=3, steps=1), fp16=True)
    assert step_lengths(run)[3] / step_lengths(plain)[3] == pytest.approx(30.0, rel=0.05)
    assert run.record.rates == plain.record.rates


def test_one_bit_of_one_weight(train):
    """Bug: another element or bit, a flip at another step, or after the optimizer has used the weight."""
    plain = train()
    run = train(FlipWeightBit(at_step=4, parameter="net.0.bias", element=2, bit=31), Probe(probe := []))
    assert_same(run.record.weights[3], plain.record.weights[3])
    before, after = plain.record.weights[4][1], probe[4][1]
    assert after[2] == -before[2]
    assert torch.equal(after[:2], before[:2])


class Probe(Callback):
    """Copies the weights after backward: after the flip, before the step."""

    def __init__(self, probe):
        self.probe = probe

    def on_after_backward(self, trainer, pl_module):
        self.probe.append([p.detach().clone() for p in pl_module.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_default_bit_is_the_highest_of_the_exponent(dtype, caplog):
    """Bug: a bit that hardly changes the weight, in some dtype; a log without the values."""
    module = torch.nn.Linear(3, 3).to(dtype)
    with torch.no_grad():
        module.weight.fill_(0.75)

    class Someone:
        global_rank = 0

    FlipWeightBit(at_step=0).apply(Someone(), module, 0)
    wrong = module.weight.detach().double()[module.weight != 0.75]
    assert len(wrong) == 1
    assert wrong.abs() > 1e4
    assert "0.75 -> " in caplog.text


def test_a_flipped_bit_must_exist(train):
    """Bug: an IndexError from within torch in the middle of a run."""
    with pytest.raises(UserError, match=r"element must be < 16.*chaos\.element"):
        train(FlipWeightBit(at_step=0, parameter="net.0.bias", element=16))
    with pytest.raises(UserError, match="bit must be < 32"):
        train(FlipWeightBit(at_step=0, bit=32))
    with pytest.raises(UserError, match="there is no trained parameter 'head'"):
        train(FlipWeightBit(at_step=0, parameter="head"))


def test_a_slow_rank_sleeps_at_its_steps_only(train, monkeypatch):
    """Bug: all ranks sleep, or at all steps."""
    slept = []
    monkeypatch.setattr("stabletrain.chaos.processes.time.sleep", slept.append)
    train(SlowRank(at_step=2, seconds=0.25, steps=3))
    train(SlowRank(at_step=2, seconds=0.25, rank=1))
    assert slept == [0.25] * 3


# ---- when, and how often --------------------------------------------------------------------------------------------


def test_a_fault_that_never_comes_changes_nothing(train):
    """Bug: a hook or a random number of a fault that is not due changes training."""
    plain = train()
    faults = [
        each(at_step=100)
        for each in (BadGradient, ScaledGradient, ScaledLoss, BadBatch, LearningRateSurge, FlipWeightBit)
    ]
    assert_same(plain.weights, train(*faults).weights)


def test_a_step_that_is_repeated_has_the_fault_once(train, monkeypatch):
    # as after a rollback in memory: the counter of attempted steps goes back
    attempted = iter([0, 1, 2, 3, 1, 2, 3, 4])
    monkeypatch.setattr("stabletrain.runtime.internals.trainer.logger_step", lambda trainer: now[0])
    now = [0]

    class Rewind(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            now[0] = next(attempted)

    def faulty_steps(fault):
        nonlocal attempted
        attempted = iter([0, 1, 2, 3, 1, 2, 3, 4])
        norms = [float(g[0].norm()) for g in train(Rewind(), fault).record.grads]
        return [t for t, norm in enumerate(norms) if norm > 1e3]

    assert faulty_steps(ScaledGradient(at_step=2, factor=1e6)) == [2]
    assert faulty_steps(ScaledGradient(at_step=2, factor=1e6, once=False)) == [2, 5]
    # a step at which the run was rolled back at once
    attempted_again = [0, 1, 2, 2, 3, 4, 5, 6]
    attempted = iter(attempted_again)

    class Again(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            now[0] = next(attempted)

    norms = [float(g[0].norm()) for g in train(Again(), ScaledGradient(at_step=2, factor=1e6)).record.grads]
    assert [t for t, norm in enumerate(norms) if norm > 1e3] == [2]


def test_a_second_run_in_the_same_folder_has_the_fault_again(train):
    """Bug: the fault takes a new run in a used folder for a repetition, and never comes."""
    plain = train()
    for _ in range(2):
        assert plain.grads_differ(train(ScaledLoss(at_step=7, factor=2.0))) == [7]


def test_a_resumed_run_does_not_repeat_the_fault(train, tmp_path):
    """Bug: a run that the fault has ended meets it again at every resume; or ``once=False`` has no effect."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "first" / "checkpoints" / "early.ckpt")

    train(Save(), BadGradient(at_step=4), folder=tmp_path / "first")
    early = tmp_path / "first" / "checkpoints" / "early.ckpt"
    resumed = train(BadGradient(at_step=4), folder=tmp_path / "second", ckpt_path=early, max_epochs=2)
    assert resumed.trainer.global_step > 5
    assert all(w.isfinite().all() for w in resumed.weights)
    again = train(BadGradient(at_step=4, once=False), folder=tmp_path / "third", ckpt_path=early, max_epochs=2)
    assert not all(w.isfinite().all() for w in again.weights)


def test_an_exception_leaves_nothing_behind(train):
    """Bug: hooks and wrappers stay on the module when the step fails."""

    class Error(Callback):
        def on_after_backward(self, trainer, pl_module):
            self.module = pl_module
            raise RuntimeError("from the test")

    error = Error()
    with pytest.raises(RuntimeError, match="from the test"):
        train(error, ScaledLoss(at_step=0), BadBatch(at_step=0), ScaledGradient(at_step=0))
    assert clean(error.module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadGradient(at_step=-1), r"at_step must be >= 0, got -1 \(config key chaos\.at_step\)"),
        (lambda: BadBatch(at_step=0, steps=0), "steps must be >= 1"),
        (lambda: BadBatch(at_step=0, kind="noise"), "kind must be one of random"),
        (lambda: BadBatch(at_step=0, vocabulary=0), "vocabulary must be >= 1"),
        (lambda: BadBatch(at_step=0, token=3), "token must be None unless"),
        (lambda: ScaledGradient(at_step=0, factor=math.nan), "factor must be finite"),
        (lambda: LearningRateSurge(at_step=0, factor=0.0), "factor must be > 0"),
        (lambda: SlowRank(at_step=0, seconds=-1.0), "seconds must be > 0"),
        (lambda: SlowRank(at_step=0, rank=-1), "rank must be >= 0"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    """Bug: accepted arguments of a fault that never comes, or does nothing."""
    with pytest.raises(UserError, match=message):
        make()
