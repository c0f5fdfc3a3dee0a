"""The private functions behind Muon's update and the weights of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from fits import HEALTHY, Net, batches, fit
from torch import nn

from stabletrain.runtime.internals.module_state import change_saved_weights
from stabletrain.runtime.internals.muon import adjusted_rate, orthogonalized


def test_the_update_of_torchs_muon() -> None:
    """Bug: a release of torch changes the iteration or the rate, and sharded matrices are trained differently."""
    for shape in ((6, 4), (4, 6)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        options: Any = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
        optimizer = torch.optim.Muon([p], 0.1, **options)
        optimizer.step()  # type: ignore[no-untyped-call]
        group = optimizer.param_groups[0]
        expected = torch.zeros(shape).add_(orthogonalized(p.grad, group), alpha=-adjusted_rate(0.1, group, p.shape))
        assert torch.equal(p, expected)
        assert float(p.detach().norm()) > 0


def test_the_weights_of_every_checkpoint_are_changed_and_afterwards_none(tmp_path: Path) -> None:
    """Bugs: Lightning collects the weights elsewhere; those of a checkpoint of weights only are not changed."""
    module = Net(norm=False)
    done = fit(module, batches(HEALTHY))

    def zeros(collect: Any) -> Any:
        return {name: torch.zeros_like(each) for name, each in collect().items()}

    undo = change_saved_weights(done, zeros)
    for weights_only in (False, True):
        done.save_checkpoint(tmp_path / "changed.ckpt", weights_only=weights_only)
        saved = torch.load(tmp_path / "changed.ckpt", weights_only=True)["state_dict"]
        assert saved.keys() == module.state_dict().keys()
        assert not any(each.any() for each in saved.values())
    undo()
    done.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], each) for name, each in module.state_dict().items())
