"""Each option of ``optimizer`` on FSDP2 parameters, two gloo ranks against one process; prints one JSON line each.

``TORCHDYNAMO_DISABLE=1 torchrun --nproc-per-node 2 tests/helpers/sharded_optimizers_on_two_ranks.py FILE --unchecked``
makes the table of docs/optimizers.md; without ``--unchecked`` the options that fail are refused.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stabletrain.config import discovery
from stabletrain.config.construct import instantiate
from stabletrain.errors import UserError
from stabletrain.runtime.guard.sharded_optimizers import check_sharded

STEPS = 6
UNFUSED = ("momentum", "nesterov")
"""Tried with ``fused: false``, the advice of the message that ``sgd`` and ``adagrad`` get."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 64))


def trained(make: Any, mesh: Any) -> tuple[list[float], list[torch.Tensor]]:
    module = net()
    if mesh is not None:
        fully_shard(module, mesh=mesh)
    weights = [p for p in module.parameters() if p.ndim == 2]
    optimizer = make([
        {"params": weights, "kind": "weight"},
        {"params": [p for p in module.parameters() if p.ndim < 2], "kind": "bias"},
    ])  # fmt: skip
    check_sharded([optimizer]) if "--unchecked" not in sys.argv else None
    if hasattr(optimizer, "train"):
        optimizer.train()
    losses = []
    for i in range(STEPS):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(i))
        loss = (module(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return losses, [p.detach() for p in found]


def outcome(name: str, option: discovery.Option, mesh: Any) -> dict[str, Any]:
    """The largest differences to one process, or why there are none."""
    try:
        config = discovery.content(option)
        if name in UNFUSED:
            config["fused"] = False
        make = instantiate(config, key="optimizer")
        alone, sharded = trained(make, None), trained(make, mesh)
    except UserError as error:
        return {"option": name, "refused": str(error)}
    except Exception as error:
        return {"option": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
    return {
        "option": name,
        "loss": max(abs(a - b) for a, b in zip(alone[0], sharded[0], strict=True)),
        "weight": max(float((a - b).abs().max()) for a, b in zip(alone[1], sharded[1], strict=True)),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for name, option in discovery.groups()["optimizer"].items():
        if name != "none":
            found.append(outcome(name, option, mesh))
            dist.barrier()
    if dist.get_rank() == 0:
        Path(sys.argv[1], "sharded.json").write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
