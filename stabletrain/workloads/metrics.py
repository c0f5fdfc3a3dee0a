import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """Mean of batch means, each with the number of its samples as weight; NaN and Inf stay visible in it.

    `torchmetrics.MeanMetric` either drops NaN, which makes a diverged model look healthy, or, with
    `nan_strategy="disable"`, ignores the weights (torchmetrics 1.9.0).

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
            samples: how many samples it is the mean of, at least 1.
        """
        self.total = self.total + mean.detach().float() * samples
        self.weight = self.weight + samples

    def compute(self) -> Tensor:
        """Mean of all samples since the last reset."""
        return self.total / self.weight


class Perplexity(WeightedMean):
    """exp of the mean loss in nats.

    `torchmetrics.text.Perplexity` takes the logarithm of a softmax, which underflows: one target token far below the
    others makes it infinite while the loss is finite.
    """

    def compute(self) -> Tensor:
        """Perplexity of all samples since the last reset."""
        return super().compute().exp()
