"""The weights of ``tiny_workload`` after training on two processes without a disturbance, computed in this one."""

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DistributedSampler


def tiny_weights(steps: int, *, seed: int = 0) -> dict[str, Tensor]:
    """What DDP does: each rank's gradient, divided by two and added, from its share of Lightning's shuffled batches."""
    from tiny_workload import TinyData, TinyModel  # of tests/launch, which the test has put on the path

    seed_everything(seed, workers=True, verbose=False)
    model = TinyModel()
    optimizer = model.configure_optimizers()
    loader = TinyData().train_dataloader()
    samplers = [DistributedSampler(loader.dataset, 2, rank, shuffle=True, seed=seed) for rank in (0, 1)]  # type: ignore[arg-type]
    (rows,) = loader.dataset.tensors  # type: ignore[attr-defined]
    per_epoch = len(rows) // 16
    for step in range(steps):
        gradients = []
        for sampler in samplers:
            sampler.set_epoch(step // per_epoch)
            chosen = torch.tensor(list(sampler)).split(8)[step % per_epoch]
            optimizer.zero_grad()
            (model.layer(rows[chosen]) - 1.0).square().mean().backward()
            gradients.append([parameter.grad / 2 for parameter in model.parameters()])
        for parameter, first, second in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = first + second
        optimizer.step()
    return model.state_dict()
