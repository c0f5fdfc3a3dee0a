import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """Mean of batch means, weighted by the number of samples; NaN and Inf propagate.

    `torchmetrics.MeanMetric` either drops NaN, which hides that a model diverged, or, with `nan_strategy="disable"`,
    ignores the weights (torchmetrics 1.9.0).

    >>> mean = WeightedMean()
    >>> mean.update(torch.tensor(1.0), 3)
    >>> mean.update(torch.tensor(5.0), 1)
    >>> mean.compute()
    tensor(2.)
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, samples: int) -> None:
        """Add a batch.

        Args:
            mean: scalar mean of the batch.
            samples: number of samples in the batch, at least 1.
        """
        self.total = self.total + mean.detach().float() * samples
        self.weight = self.weight + samples

    def compute(self) -> Tensor:
        """Return the mean of all samples since the last reset."""
        return self.total / self.weight


class Perplexity(WeightedMean):
    """Exponential of the mean loss in nats.

    `torchmetrics.text.Perplexity` takes the logarithm of a softmax, which underflows: one very unlikely target token
    makes it infinite while the loss is finite.
    """

    def compute(self) -> Tensor:
        """Return the perplexity of all samples since the last reset."""
        return super().compute().exp()
