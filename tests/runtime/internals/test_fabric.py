"""Fabric refuses the plugins, which it would accept without calling them."""

from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.pytorch import Callback

from stabletrain import ClipNorm, ResumeExactly, SaveCheckpoints, ScheduleLR, UserError, default_callbacks


@pytest.mark.parametrize(
    "callbacks", [default_callbacks(), ClipNorm(1.0), [Callback(), ResumeExactly()], [SaveCheckpoints()], ScheduleLR()]
)
def test_fabric_refuses_plugins(callbacks: Any) -> None:
    """Bug: ``Fabric(callbacks=default_callbacks())`` is accepted and protects nothing."""
    with pytest.raises(UserError, match=r"Fabric\(callbacks=\.\.\.\).*Trainer\(callbacks="):
        Fabric(accelerator="cpu", devices=1, callbacks=callbacks)


def test_fabric_takes_other_callbacks() -> None:
    """Bug: the check changes what Fabric does with callbacks that are not ours."""
    mine: list[Any] = [Callback()]
    assert Fabric(accelerator="cpu", devices=1, callbacks=mine)._callbacks is mine
    assert Fabric(accelerator="cpu", devices=1)._callbacks == []
    assert Fabric(accelerator="cpu", devices=1, callbacks=mine[0])._callbacks == mine
