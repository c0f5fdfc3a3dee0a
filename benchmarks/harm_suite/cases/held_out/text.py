"""A language model on text in which a kind of document is rare."""

from __future__ import annotations

import codecs

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harm_suite.data import loader, seeded, shakespeare
from harm_suite.training import Task, Training, adamw, cases
from stabletrain.workloads.text import VOCABULARY, encode

CONTEXT = 6
"""Characters from which the next one is predicted."""


def rare_documents(seed: int) -> Training:
    """Shakespeare by characters; 4 % of the batches are in a cipher (rot13). Measure: held-out loss on those."""
    steps, size = 1600, 32
    g = seeded(seed)
    texts = [(text, codecs.encode(text, "rot13")) for text in shakespeare(300_000)]
    (plain, cipher), (_, tested) = [tuple(encode(text).long() for text in pair) for pair in texts]
    is_cipher = torch.rand(steps, generator=g) < 0.04
    start = torch.randint(0, len(plain) - CONTEXT - 1, (steps, size), generator=g)
    span = torch.arange(CONTEXT + 1)

    def loss_of(net: nn.Module, windows: Tensor) -> Tensor:
        return F.cross_entropy(net(windows[:, :-1]), windows[:, -1])

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        text = cipher if bool(batch[1][0]) else plain
        return loss_of(task.net, text[batch[0][0][:, None] + span])

    def metric(task: Task) -> float:
        at = torch.arange(0, len(tested) - CONTEXT - 1, 5)
        return float(loss_of(task.net, tested[at[:, None] + span]))

    characters = len(VOCABULARY)
    net = nn.Sequential(
        nn.Embedding(characters, 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, 128),
        nn.ReLU(),
        nn.Linear(128, characters),
    )
    data = loader(start, is_cipher, batch=1, shuffle=False)
    return Training(Task(net, loss, adamw(5e-3)), data, steps, metric, least=0.1)


CASES = cases(rare_documents, held_out=True)
