"""What is found in the attributes of an optimizer, and what is left out."""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import SGD, AdamW

from stabletrain.runtime.internals.attributes import has_hooks
from stabletrain.runtime.internals.optimizer_attributes import Fingerprint, find, is_data


class Shared:
    """One for the whole process, as bitsandbytes' managers are."""

    instance: ClassVar[Any] = None
    table: dict[str, int]


Shared.instance = Shared()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def rate(self) -> float:
        return 1.0


class Slotted:
    __slots__ = ("count",)


class Rich(SGD):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.parameters(), 0.1)
        self.model, self.shared, self.lock = module, Shared.instance, threading.Lock()
        self.log, self.code, self.device = logging.getLogger("x"), len, torch.device("cpu")
        self.own, self.bound, self.partial = Counter(), Counter().rate, functools.partial(Counter().rate)
        self.optimizers = {"a": [(AdamW([nn.Parameter(torch.ones(1))]),)]}
        self.slotted, self.random, self.net = Slotted(), torch.Generator(), nn.Linear(1, 1)
        self.back = self  # a cycle


def test_objects_and_optimizers_are_found_and_what_is_the_process_s_is_not() -> None:
    # catches a snapshot without the optimizers in a list, one that rolls back a singleton, and an endless search
    module = nn.Linear(2, 2)
    found = find(Rich(module), module)
    assert [type(each).__name__ for each in found.optimizers] == ["Rich", "AdamW"]
    paths = {each.path for each in found.owners}
    assert paths >= {"Rich", "Rich.own", "Rich.bound", "Rich.partial", "Rich.net", "Rich.optimizers['a'][0][0]"}
    assert not any(word in path for path in paths for word in ("model", "shared", "lock", "log", "code"))
    assert [path for path, _ in found.generators] == ["Rich.random"]
    assert [path for path, _ in found.values] == ["Rich.slotted"]
    state = found.owners[0].state()
    assert not state.keys() & {"code", "step", "state", "param_groups", "defaults"}
    assert [is_data(each) for each in ({"a": 1}, torch.ones(1), Counter())] == [True, True, False]


def test_plain_optimizers_have_no_state_in_attributes() -> None:
    # catches a new attribute of torch's that a snapshot would restore, or that a checkpoint would contain
    for make in (AdamW, SGD, functools.partial(AdamW, fused=True)):
        p = nn.Parameter(torch.ones(2))
        optimizer = make([p], lr=0.1)
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        p.grad = torch.ones(2)
        optimizer.step()
        assert [each.state() for each in find(optimizer, nn.Module()).owners] == [{}]


def test_a_fingerprint_changes_with_state_and_parameters_only() -> None:
    # catches a step that is taken for one that did nothing, and the reverse
    for lr, momentum in ((0.1, 0.0), (0.0, 0.0), (0.0, 0.9)):
        p = nn.Parameter(torch.ones(2))
        optimizer = SGD([p], lr, momentum)
        p.grad = torch.zeros(2)
        before = Fingerprint(optimizer, nn.Module())
        assert not before.has_changed()
        optimizer.step()
        assert before.has_changed()


def test_hooks_of_a_parameter_are_seen() -> None:
    # catches a new name of torch's attributes
    p = nn.Parameter(torch.ones(2))
    assert not has_hooks(p)
    handle = p.register_post_accumulate_grad_hook(lambda _: None)
    assert has_hooks(p)
    handle.remove()
    handle = p.register_hook(lambda _: None)
    assert has_hooks(p)
    handle.remove()
    assert not has_hooks(p)
