"""Properties that every transform must have, checked on those that the project ships, in real fits."""

import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, LARGE_GRAD, NAN_LOSS, Batch, Net, assert_same, batches, everything, fit, loader
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stabletrain import ClipNorm, ClipTensorwise, ClipUnitwise, ClipValue, Guard, SkipNonFinite
from stabletrain.runtime.guard.transform import TransformCallback
from stabletrain.testing.checks.equality import same

Make = Callable[[], TransformCallback]
TRANSFORMS: dict[str, Make] = {
    "value": lambda: ClipValue(0.05),
    "unitwise": lambda: ClipUnitwise(0.05, exclude=["net.4.bias"]),
    "tensorwise": lambda: ClipTensorwise(warmup_steps=4, max_norm=0.5),
}
all_transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
BATCHES = 12


def items(nan_at: Iterable[int] = ()) -> list[Batch]:
    """Every fourth batch has a large gradient, and those at ``nan_at`` a NaN in their inputs."""
    faults = [LARGE_GRAD if i % 4 == 3 else HEALTHY for i in range(BATCHES)]
    for i in nan_at:
        faults[i] = NAN_LOSS
    return batches(*faults)


def module() -> Net:
    """Without batch normalisation: a bias before it has a gradient of rounding errors, which Adam amplifies."""
    return Net("adamw-fused", norm=False)


def end(*callbacks: Callback, nan_at: Iterable[int] = ()) -> dict[str, Tensor]:
    """Everything that a step may change, after a fit with these callbacks."""
    return everything(fit(module(), items(nan_at), *callbacks))


@all_transforms
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_clips_in_both_modes(make: Make, mode: Any) -> None:
    """Bug: a mode in which transforms are not called, or their gradients not used."""
    assert not same(end(Guard(mode=mode), SkipNonFinite()), end(Guard(mode=mode), SkipNonFinite(), make()))


@all_transforms
def test_both_modes_train_the_same_model(make: Make) -> None:
    """Bug: a mode in which transforms come after the bounds, or see gradients that are already clipped."""
    runs = [
        end(Guard(mode=mode), SkipNonFinite(), ClipNorm(1.0), make(), nan_at=[2, 7]) for mode in ("exact", "device")
    ]
    assert all(value.isfinite().all() for run in runs for value in run.values())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-6)


@all_transforms
@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("at", [0, 3, 4, BATCHES - 1])
def test_a_skipped_step_leaves_nothing_in_the_history(make: Make, mode: Any, at: int) -> None:
    """Bugs: a history that counts a dropped step, or learns its NaN (AdaGC's reference never recovers)."""
    clip = make()
    histories: list[Any] = []

    class CopyHistory(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            histories.append(copy.deepcopy(clip.state_dict().get("state")))

    end(Guard(mode=mode), SkipNonFinite(), clip, CopyHistory(), nan_at=[at])
    if not isinstance(clip, ClipTensorwise):
        assert not any(histories)
        return
    assert [history["applied"] for history in histories] == [t + 1 - (t >= at) for t in range(BATCHES)]
    if at > 0:
        assert torch.equal(histories[at]["gammas"], histories[at - 1]["gammas"])
    assert histories[-1]["gammas"].isfinite().all()


@all_transforms
def test_a_resumed_run_equals_the_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    """Bugs: a history that is not saved, or starts from the first step again; state that only pickle can load."""
    whole, resumed, data = make(), make(), items([2])
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    expected = everything(fit(module(), data, SkipNonFinite(), whole, save))
    cut = tmp_path / "step=6.ckpt"
    torch.load(cut, weights_only=True)
    # the position in the data is the checkpoint's, so the loader begins at the first batch that is left
    rest = loader(data[7:], sized=False)
    assert_same(everything(fit(module(), rest, SkipNonFinite(), resumed, ckpt_path=cut)), expected)
    if isinstance(whole, ClipTensorwise):
        assert torch.equal(resumed.state_dict()["state"]["gammas"], whole.state_dict()["state"]["gammas"])


@pytest.mark.parametrize("pair", list(itertools.combinations(TRANSFORMS, 2)), ids="-".join)
def test_the_order_of_the_list_does_not_matter(pair: tuple[str, str]) -> None:
    """Bug: transforms, which do not commute, act in the order of the Trainer's list."""
    one, other = (TRANSFORMS[name] for name in pair)
    assert_same(end(one(), other()), end(other(), one()))


@pytest.mark.parametrize(
    "lenient",
    [ClipValue(1e6), ClipUnitwise(1e6), ClipTensorwise(1e6, warmup_steps=4, max_norm=1e6)],
    ids=lambda clip: clip.plugin,
)
def test_a_transform_that_never_triggers_leaves_every_bit(lenient: TransformCallback) -> None:
    """Bug: a gradient within its limit is multiplied by 1 - epsilon, or goes through another dtype."""
    assert_same(end(SkipNonFinite(), lenient), end(SkipNonFinite()))


def test_two_of_a_kind_need_a_name() -> None:
    """Bug: two instances share one state in the checkpoint, or a second one cannot be used even with a name."""
    with pytest.raises(RuntimeError, match="unique"):
        end(ClipValue(0.1), ClipValue(0.2))
    end(ClipValue(0.1), ClipValue(0.2, name="looser"))


@all_transforms
def test_no_transform_waits_for_the_device(make: Make) -> None:
    """A fake tensor has no values: reading one on the host (``.item()``, ``bool``, ``nonzero``) raises."""
    with FakeTensorMode():
        clip = make()
        parameters = [torch.ones(4, 3), torch.ones(4), torch.ones(2, 3, 1, 1)]
        grads = [torch.ones_like(p) for p in parameters]
        for _ in range(6):
            clip.transform(["body.weight", "body.bias", "kernel"], parameters, grads)
            clip.commit(True)


@all_transforms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_keep_their_precision(make: Make, dtype: torch.dtype) -> None:
    """Bug: a gradient replaced by a float32 one, an overflow in half precision, or a dtype that is not clipped."""
    clip, parameter, gradient = make(), torch.ones(4, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    for _ in range(6):
        clip.transform(["w"], [parameter], [gradient])
        clip.commit(True)
    assert gradient.dtype is dtype
    assert gradient.isfinite().all()
    assert gradient.max() < 1
