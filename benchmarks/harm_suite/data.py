"""Loaders, nets and real data that the cases share."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import workloads


class _Batched(TensorDataset):
    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [tensor[indices] for tensor in self.tensors]


def loader(*tensors: Tensor, batch: int = 32, shuffle: bool = True, drop_last: bool = True) -> DataLoader:
    """Return a loader that indexes whole batches at once, which is quick; to samplers it is like any other.

    Args:
        tensors: of equal length; a batch is a list of one tensor for each.
        batch: samples per batch.
        shuffle: a new order in every epoch.
        drop_last: leave out an incomplete last batch.
    """
    return DataLoader(_Batched(*tensors), batch, shuffle=shuffle, drop_last=drop_last, collate_fn=_unchanged)


def _unchanged(batch: list[Tensor]) -> list[Tensor]:
    return batch


def mlp(inputs: int, width: int, outputs: int, depth: int = 1) -> nn.Sequential:
    """Return a net with ``depth`` hidden layers and ReLU."""
    layers: list[nn.Module] = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def seeded(seed: int) -> torch.Generator:
    """Return a random generator of its own."""
    return torch.Generator().manual_seed(seed)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits: 1,400 training images (64 pixels in 0 .. 1) and classes, 397 held-out ones."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    return _split(x, y, 1400)


def table(name: str, train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a data set of scikit-learn, with standardised columns: training inputs and targets, held-out ones.

    Args:
        name: ``breast_cancer`` (30 inputs, 2 classes), ``wine`` (13 inputs, 3 classes), or ``diabetes`` (10 inputs, a
            standardised number).
        train: number of training samples; the others are held out.
    """
    import sklearn.datasets

    found = getattr(sklearn.datasets, f"load_{name}")()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    if y.is_floating_point():
        y = ((y - y.mean()) / y.std()).float()
    return _split((x - x.mean(0)) / x.std(0), y, train)


def shakespeare(length: int) -> tuple[str, str]:
    """Return ``length`` characters of the text that stabletrain distributes, for training, and a tenth for testing."""
    path = Path(workloads.__file__).parent / "data" / "shakespeare.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return text[-length:], text[: length // 10]


def _split(x: Tensor, y: Tensor, train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(len(x), generator=seeded(0))
    x, y = x[order], y[order]
    return x[:train], y[:train], x[train:], y[train:]
