"""A language model on text in which a kind of document is rare, or new."""

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


def reader() -> nn.Sequential:
    """Return a net from `CONTEXT` characters to the logits of the next one."""
    characters = len(VOCABULARY)
    first = nn.Linear(16 * CONTEXT, 128)
    return nn.Sequential(nn.Embedding(characters, 16), nn.Flatten(), first, nn.ReLU(), nn.Linear(128, characters))


def reading(seed: int, is_cipher: Tensor, size: int, rate: float) -> Training:
    """Train on Shakespeare by characters.

    Args:
        seed: of the windows.
        is_cipher: bool, one for each batch: whether its text is in a cipher (rot13), on which the loss is measured.
        size: windows in a batch.
        rate: of AdamW.
    """
    steps = len(is_cipher)
    texts = [(text, codecs.encode(text, "rot13")) for text in shakespeare(300_000)]
    (plain, cipher), (_, tested) = [tuple(encode(text).long() for text in pair) for pair in texts]
    start = torch.randint(0, len(plain) - CONTEXT - 1, (steps, size), generator=seeded(seed))
    span = torch.arange(CONTEXT + 1)

    def loss_of(net: nn.Module, windows: Tensor) -> Tensor:
        return F.cross_entropy(net(windows[:, :-1]), windows[:, -1])

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        text = cipher if bool(batch[1][0]) else plain
        return loss_of(task.net, text[batch[0][0][:, None] + span])

    def metric(task: Task) -> float:
        at = torch.arange(0, len(tested) - CONTEXT - 1, 5)
        return float(loss_of(task.net, tested[at[:, None] + span]))

    data = loader(start, is_cipher, batch=1, shuffle=False)
    return Training(Task(reader(), loss, adamw(rate)), data, steps, metric, least=0.1)


def rare_documents(seed: int) -> Training:
    """Shakespeare by characters; 4 % of the batches are in a cipher (rot13). Measure: held-out loss on those."""
    return reading(seed, torch.rand(1600, generator=seeded(seed + 1000)) < 0.04, 32, 5e-3)


def another_language(seed: int) -> Training:
    """Shakespeare by characters; from batch 700 on, all are in a cipher (rot13). Measure: held-out loss on those."""
    return reading(seed, torch.arange(1400) >= 700, 32, 5e-3)


CASES = cases(rare_documents, another_language, held_out=True)
