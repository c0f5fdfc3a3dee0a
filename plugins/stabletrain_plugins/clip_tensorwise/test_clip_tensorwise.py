import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from announced import AT, Model, Record, train
from torch import Tensor

from stabletrain import ClipTensorwise, UserError

VECTORS = json.loads((Path(__file__).parents[3] / "tests" / "vectors" / "adagc_pytorch_optimizer.json").read_text())
BROKEN = ("nan_once_at_60", "inf_first_3_fp16_start")
SOUND = [case for case in VECTORS["cases"] if case["sequence"] not in BROKEN]
NAMES = ("A", "B")


def case_of(sequence: str) -> dict[str, Any]:
    case: dict[str, Any] = next(case for case in VECTORS["cases"] if case["sequence"] == sequence)
    return case


def made_for(case: dict[str, Any]) -> ClipTensorwise:
    theirs = {"lambda_rel": "max_ratio", "beta": "decay", "warmup_steps": "warmup_steps"}
    return ClipTensorwise(**{theirs[key]: value for key, value in case["params"].items()})


def gradient_of(norm: float) -> Tensor:
    return torch.full((4,), norm / 2, dtype=torch.float64)


def step(clip: ClipTensorwise, norms: Sequence[float], applied: bool = True) -> list[float]:
    """Clipped norms of parameters A, B, ... with gradients of the given norms."""
    grads = [gradient_of(norm) for norm in norms]
    clip.transform([chr(ord("A") + i) for i in range(len(norms))], grads, grads)
    clip.commit(applied)
    return [g.norm().item() for g in grads]


@pytest.mark.parametrize("case", SOUND, ids=lambda case: f"{case['sequence']}-{case['params']}")
def test_matches_the_reference_where_it_is_right(case: dict[str, Any]) -> None:
    """Bug: another decay, warm-up or ratio than in AdaGC's reference."""
    clip, output = made_for(case), case["output"]
    # where the global norm is clipped, the reference divides by norm + 1e-6
    tolerance = 3e-7 if case["sequence"].startswith("exp_decay") else 1e-11
    for t, norm in enumerate(case["input_norms"]):
        clipped = step(clip, [norm, 0.3])
        mine = [*clipped, clip.gamma("A"), clip.gamma("B")]
        theirs = [output[key][t] for key in ("clipped_norm_A", "clipped_norm_B", "gamma_A", "gamma_B")]
        assert mine == pytest.approx(theirs, rel=tolerance), t


def test_one_nan_does_not_end_the_reference_norm() -> None:
    """Bug: a NaN enters the reference norm, as in AdaGC's code, and the tensor is never clipped again."""
    case = case_of("nan_once_at_60")
    assert case["output"]["gamma_A"][-1] == "nan"
    clip = made_for(case)
    for norm in case["input_norms"]:
        before = clip.gamma("A")
        clipped = step(clip, [float(norm), 0.3])[0]
        assert math.isfinite(clip.gamma("A"))
        assert norm != "nan" or (math.isnan(clipped) and clip.gamma("A") == before)
    assert 0.7 < clip.gamma("A") < 0.9


def test_of_an_fp16_start_only_finite_steps_are_learned() -> None:
    """Bug: overflows at the start of an fp16 run make reference norms of 0 or infinity."""
    case = case_of("inf_first_3_fp16_start")
    assert case["output"]["gamma_B"][0] == 0.0
    clip, alone = made_for(case), made_for(case)
    for norm in case["input_norms"]:
        step(clip, [float(norm), 0.3], applied=norm != "inf")
        if norm != "inf":
            step(alone, [norm, 0.3])
    assert clip.gamma("A") == alone.gamma("A")
    assert clip.gamma("B") == alone.gamma("B") == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", range(8))
def test_a_bad_gradient_at_any_step_leaves_the_state_finite(at: int, bad: float) -> None:
    """Bug: a non-finite gradient changes the reference norm, or is itself changed."""
    clip = ClipTensorwise(warmup_steps=4)
    for t in range(8):
        before = clip.gamma("A")
        grads = [gradient_of(0.5), gradient_of(0.25)]
        if t == at:
            grads[0][t % 4] = bad
        given = grads[0].clone()
        clip.transform(NAMES, grads, grads)
        clip.commit(True)
        if t == at:
            assert torch.equal(grads[0].nan_to_num(9.0), given.nan_to_num(9.0))
            assert clip.gamma("A") == before
    assert clip.gamma("A") == 0.5
    assert clip.gamma("B") == pytest.approx(0.25)


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_a_tensor_whose_gradient_begins_at_zero_is_not_frozen(warmup_steps: int) -> None:
    # the first gradient of a low-rank adapter's A is exactly zero; a minimum of zero could never grow again
    clip = ClipTensorwise(warmup_steps=warmup_steps)
    for norm in (0.0, 0.1, 0.1, 0.0, 0.1, 0.1, 0.0, 0.1):
        assert step(clip, [norm, 0.3])[0] == pytest.approx(norm)
    assert clip.gamma("A") == pytest.approx(0.1)


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    """Bug: a skipped step changes the reference norms or the count of steps."""
    clip = ClipTensorwise(warmup_steps=3)
    for t in range(6):
        step(clip, [0.5, 0.2])
        before = clip.state_dict()["state"]
        step(clip, [0.1 * t, 7.0], applied=False)
        after = clip.state_dict()["state"]
        assert torch.equal(before["gammas"], after["gammas"])
        assert before["applied"] == after["applied"] == t + 1


def test_a_parameter_without_a_gradient_keeps_its_reference_norm() -> None:
    """Bug: the norms of the others are assigned to the wrong parameters, or decay."""
    clip = ClipTensorwise(warmup_steps=0)
    step(clip, [0.5, 0.2])
    gradient = gradient_of(0.2)
    clip.transform(["B"], [gradient], [gradient])
    clip.commit(True)
    assert (clip.gamma("A"), clip.gamma("B"), clip.gamma("C")) == (0.5, pytest.approx(0.2), math.inf)


def test_a_parameter_that_joins_late_is_clipped_from_its_second_step_on() -> None:
    """Bug: a parameter that was unfrozen later is never clipped, or already at its first gradient."""
    clip = ClipTensorwise(max_ratio=1.5, warmup_steps=2)
    for _ in range(4):
        step(clip, [0.5])
    assert step(clip, [0.5, 8.0])[1] == 8.0
    assert step(clip, [0.5, 80.0])[1] == pytest.approx(12.0)


def test_after_an_announced_change_the_reference_norms_are_learned_anew() -> None:
    """Bug: gradients that are larger by design are clipped to the norms of before, for hundreds of steps."""
    clip, fresh = (ClipTensorwise(warmup_steps=4, max_norm=100.0) for _ in range(2))
    for _ in range(8):
        step(clip, [0.5, 0.2])
    assert step(clip, [8.0, 3.0], applied=False) == pytest.approx([1.05 * 0.5, 1.05 * 0.2])
    clip.on_change()
    for norms in ([8.0, 3.0], [9.0, 2.0], [8.5, 2.5], [90.0, 2.5], [9.0, 25.0]):
        assert step(clip, norms) == step(fresh, norms)
    assert (clip.gamma("A"), clip.gamma("B")) == (fresh.gamma("A"), fresh.gamma("B"))


def test_an_announced_change_reaches_it() -> None:
    """Bug: the announcement resets the rules alone, and the clipping goes on with the norms of before."""

    class Gammas(Record):
        found: ClassVar[list[float]] = []

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            self.found.append(clip.gamma("net.weight"))

    clip, gammas = ClipTensorwise(warmup_steps=2, max_norm=1e6), Gammas()
    train(Model("training_step", factor=50.0), clip, gammas, steps=AT + 2)
    before, after = gammas.found[AT - 1 : AT + 1]
    assert gammas.outcomes[AT].applied_norm == gammas.outcomes[AT].grad_norm
    assert after > 10 * before


def test_warmup_clips_to_the_global_norm() -> None:
    """Bug: gradients are not clipped in the warm-up, or also below max_norm."""
    clip = ClipTensorwise(max_norm=1.0)
    assert step(clip, [3.0, 4.0]) == pytest.approx([0.6, 0.8])
    assert step(clip, [0.3, 0.4]) == pytest.approx([0.3, 0.4])


def test_state_goes_by_name_and_loads_as_weights_only(tmp_path: Path) -> None:
    """Bug: after a resume with another order of parameters, reference norms are exchanged."""
    clip = ClipTensorwise(warmup_steps=2)
    for _ in range(4):
        step(clip, [0.5, 0.2])
    torch.save(clip.state_dict(), tmp_path / "state.pt")
    loaded = ClipTensorwise(warmup_steps=2)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    grads = [gradient_of(9.0), gradient_of(9.0)]
    loaded.transform(["B", "A"], grads, grads)
    assert [g.norm().item() for g in grads] == pytest.approx([1.05 * 0.2, 1.05 * 0.5])


def test_other_arguments_than_those_of_the_checkpoint_are_logged() -> None:
    """Bug: a changed argument is not noticed."""
    saved = ClipTensorwise().state_dict()
    with pytest.warns(
        UserWarning, match=r"clip_tensorwise: the checkpoint was made with other arguments: max_ratio=1.5 \(was 1.05\)"
    ):
        ClipTensorwise(max_ratio=1.5).load_state_dict(saved)


def test_how_often_it_clips_a_healthy_steady_sequence() -> None:
    """The numbers of the card: of the steps after the warm-up, the share that is clipped."""
    norms = case_of("steady")["input_norms"]
    shares = {}
    for max_ratio, decay in ((1.05, 0.98), (1.05, 0.9), (1.5, 0.98)):
        clip = ClipTensorwise(max_ratio, decay, warmup_steps=25)
        clipped = [step(clip, [norm, 0.3])[0] < norm * (1 - 1e-9) for norm in norms][24:]
        shares[max_ratio, decay] = sum(clipped) / len(clipped)
    assert shares == pytest.approx({(1.05, 0.98): 0.70, (1.05, 0.9): 0.40, (1.5, 0.98): 0.0}, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_ratio": 0.0}, r"max_ratio must be > 0, got 0.0 \(ClipTensorwise\(max_ratio=...\)\)"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"warmup_steps": -1}, r"warmup_steps must be >= 0"),
        ({"max_norm": 0.0}, r"max_norm must be > 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Bug: an argument that clips everything or nothing is accepted; a message without the config key."""
    with pytest.raises(UserError, match=message):
        ClipTensorwise(**arguments)
