"""What all transforms have in common, tried on those that the project ships, in real fits."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from stabletrain import ClipNorm, ClipTensorwise, ClipUnitwise, ClipValue, Guard, SkipNonFinite
from stabletrain.runtime.guard.transform import TransformCallback
from stabletrain.testing.trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning"),  # its rows mean nothing
]

Make = Callable[[], TransformCallback]
TRANSFORMS: dict[str, Make] = {
    "value": lambda: ClipValue(0.05),
    "unitwise": lambda: ClipUnitwise(0.05, exclude=["head.bias"]),
    "tensorwise": lambda: ClipTensorwise(warmup_steps=4, max_norm=0.5),
}
all_transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
BATCHES = 12


class Net(LightningModule):
    """Batches are a function of their number alone, so that a resumed run sees what the uninterrupted one saw."""

    def __init__(self, nan_at: frozenset[int] = frozenset(), until: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)
        self.nan_at, self.until = nan_at, until

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.until:
            raise RuntimeError("stopped by the test")
        generator = torch.Generator().manual_seed(batch_idx)
        x = torch.randn(8, 6, generator=generator) * (10.0 if batch_idx % 4 == 3 else 1.0)
        if batch_idx in self.nan_at:
            x[0, 0] = math.nan
        return (self.head(torch.tanh(self.norm(self.body(x)))) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, fused=True)


def fit(module: Net, *callbacks: Callback, folder: Path | None = None, **options: Any) -> list[Tensor]:
    """Train over all batches; the weights afterwards."""
    trainer = quiet_trainer(*callbacks, max_epochs=1, default_root_dir=folder)
    trainer.fit(module, DataLoader(torch.zeros(BATCHES, 1)), **options)
    return [p.detach().clone() for p in module.parameters()]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@all_transforms
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_clips_in_both_modes(make: Make, mode: Any, tmp_path: Path) -> None:
    free = fit(Net(), Guard(mode=mode), SkipNonFinite(), folder=tmp_path)
    held = fit(Net(), Guard(mode=mode), SkipNonFinite(), make(), folder=tmp_path)
    assert not same(free, held)


@all_transforms
def test_both_modes_train_the_same_model(make: Make, tmp_path: Path) -> None:
    runs = []
    for mode in ("exact", "device"):
        clip = make()
        runs.append(
            fit(Net(frozenset({2, 7})), Guard(mode=mode), SkipNonFinite(), ClipNorm(1.0), clip, folder=tmp_path)
        )
        assert all(p.isfinite().all() for p in runs[-1])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-6)


@all_transforms
@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("at", [0, 3, 4, BATCHES - 1])
def test_a_skipped_step_leaves_nothing_in_the_history(make: Make, mode: Any, at: int, tmp_path: Path) -> None:
    """Bugs: a history that counts a dropped step, or learns its NaN (AdaGC's reference never recovers)."""

    class Watch(Callback):
        histories: list[Any]

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.histories.append(copy.deepcopy(clip.state_dict().get("state")))

    clip, watch = make(), Watch()
    watch.histories = []
    fit(Net(frozenset({at})), Guard(mode=mode), SkipNonFinite(), clip, watch, folder=tmp_path)
    if not isinstance(clip, ClipTensorwise):
        assert not any(watch.histories)
        return
    applied = [history["applied"] for history in watch.histories]
    assert applied == [t + 1 - (t >= at) for t in range(BATCHES)]
    if at > 0:
        assert torch.equal(watch.histories[at]["gammas"], watch.histories[at - 1]["gammas"])
    assert watch.histories[-1]["gammas"].isfinite().all()


@all_transforms
def test_a_resumed_run_equals_the_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    nan_at = frozenset({2})
    whole, watched = make(), make()
    expected = fit(Net(nan_at), SkipNonFinite(), whole, folder=tmp_path)
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(Net(nan_at, until=7), SkipNonFinite(), watched, save, folder=tmp_path)
    resumed = make()
    cut = tmp_path / "saved" / "step=6.ckpt"
    torch.load(cut, weights_only=True)
    assert same(fit(Net(nan_at), SkipNonFinite(), resumed, folder=tmp_path, ckpt_path=cut, weights_only=True), expected)
    if isinstance(whole, ClipTensorwise):
        assert torch.equal(resumed.state_dict()["state"]["gammas"], whole.state_dict()["state"]["gammas"])


@pytest.mark.parametrize("pair", list(itertools.combinations(TRANSFORMS, 2)), ids="-".join)
def test_the_order_of_the_list_does_not_matter(pair: tuple[str, str], tmp_path: Path) -> None:
    one, other = (TRANSFORMS[name] for name in pair)
    assert same(fit(Net(), one(), other(), folder=tmp_path), fit(Net(), other(), one(), folder=tmp_path))


@pytest.mark.parametrize(
    "lenient",
    [ClipValue(1e6), ClipUnitwise(1e6), ClipTensorwise(1e6, warmup_steps=4, max_norm=1e6)],
    ids=lambda clip: clip.plugin,
)
def test_a_transform_that_never_triggers_leaves_every_bit(lenient: TransformCallback, tmp_path: Path) -> None:
    assert same(fit(Net(), SkipNonFinite(), lenient, folder=tmp_path), fit(Net(), SkipNonFinite(), folder=tmp_path))


def test_two_of_a_kind_need_a_name_and_get_along_with_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unique"):
        fit(Net(), ClipValue(0.1), ClipValue(0.2), folder=tmp_path)
    fit(Net(), ClipValue(0.1), ClipValue(0.2, name="looser"), folder=tmp_path)


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
    clip, parameter, gradient = make(), torch.ones(4, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    for _ in range(6):
        clip.transform(["w"], [parameter], [gradient])
        clip.commit(True)
    assert gradient.dtype is dtype
    assert gradient.isfinite().all()
    assert gradient.max() < 1
