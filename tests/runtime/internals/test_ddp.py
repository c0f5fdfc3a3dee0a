"""What torch and Lightning keep in private attributes of DistributedDataParallel and its strategy."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from fits import Net
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.nn.parallel import DistributedDataParallel

from stabletrain.runtime.internals import ddp


def test_parameters_that_ddp_sends(tmp_path: Path) -> None:
    """Bug: an ignored parameter, or one outside of the wrapped module, taken for one that DDP keeps equal."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        module = Net(norm=False)
        module._ddp_params_and_buffers_to_ignore = ["net.0.weight"]
        whole = torch.nn.ModuleList([DistributedDataParallel(module), torch.nn.Linear(2, 2)])
        names = {name for name, p in module.named_parameters() if p in ddp.ddp_parameters(whole)}
        assert names == {"net.0.bias", "net.4.weight", "net.4.bias"}
        assert len(ddp.ddp_parameters(whole)) == 3
        assert ddp.ddp_parameters(module) == ddp.ddp_parameters(None) == set()
    finally:
        dist.destroy_process_group()


def test_settings_of_the_strategy() -> None:
    """Bug: a setting that is not found, and so ignored."""

    def of(strategy: Any) -> Any:
        return SimpleNamespace(strategy=strategy)

    local = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=8)
    assert ddp.averages_weights_only(of(DDPStrategy(ddp_comm_state=local)))
    assert ddp.communication_hook(of(DDPStrategy(ddp_comm_hook=fp16_compress_hook))) == "fp16_compress_hook"
    assert ddp.has_static_graph(of(DDPStrategy(static_graph=True)))
    for plain in (DDPStrategy(), SingleDeviceStrategy()):
        assert not ddp.averages_weights_only(of(plain))
        assert ddp.communication_hook(of(plain)) is None
        assert not ddp.has_static_graph(of(plain))
    synchronised = pl.Trainer(devices=2, accelerator="cpu", strategy="ddp", sync_batchnorm=True, logger=False)
    assert ddp.converts_batch_norm(synchronised)
    assert not ddp.converts_batch_norm(pl.Trainer(devices=1, accelerator="cpu", logger=False))
