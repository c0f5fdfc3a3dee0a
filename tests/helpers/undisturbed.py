"""The weights of ``tiny_workload`` after training without a disturbance, computed in this process."""

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DistributedSampler


def tiny_weights(steps: int, *, ranks: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What DDP does: each rank's gradient, divided by their number and added, from its share of Lightning's batches.

    ``tiny_workload`` must be importable. Lightning shuffles if there are several ranks.
    """
    from tiny_workload import TinyData, TinyModel

    seed_everything(seed, workers=True, verbose=False)
    model = TinyModel()
    optimizer = model.configure_optimizers()
    (rows,) = TinyData().train_dataloader().dataset.tensors  # type: ignore[attr-defined]
    every = range(len(rows))
    samplers = [DistributedSampler(every, ranks, rank, shuffle=ranks > 1, seed=seed) for rank in range(ranks)]
    per_epoch = len(rows) // (8 * ranks)
    for step in range(steps):
        total = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for sampler in samplers:
            sampler.set_epoch(step // per_epoch)
            chosen = rows[list(sampler)].split(8)[step % per_epoch]
            loss = (model.layer(chosen) - 1.0).square().mean()
            for sum_, part in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                sum_ += part / ranks
        for parameter, gradient in zip(model.parameters(), total, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return model.state_dict()
