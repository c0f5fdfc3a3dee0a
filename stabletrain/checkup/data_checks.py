"""Checks of the data: the first batches of both loaders, samples compared by hash."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stabletrain.checkup.answer import Answer, finding, fine, not_applicable
from stabletrain.checkup.batches import inputs, labels, samples, tensors
from stabletrain.checkup.case import SCAN, Case
from stabletrain.runtime.observing.losses import LossCall

LARGE_DEVIATION, SMALL_DEVIATION, LARGE_MEAN = 10.0, 1e-2, 30.0
FEATURES, CONSTANT = 64, 1e-9
DUPLICATES, LEAK = 0.02, 0.01
ORDER = 0.5
_NO_BATCH = "the train loader has given no batch"


def loaders(case: Case) -> Answer:
    """Whether both loaders give batches."""
    for name, each in (("train", case.train), ("validation", case.val)):
        if each is None:
            continue
        if each.error is not None:
            text = f"the {name} loader raises at batch {len(each.read)}: {type(each.error).__name__}: {each.error}"
            return finding(text, each.trace)
        if not each.read:
            return finding(f"the {name} loader is empty")
    count = len(case.train.read)
    if count == 1 and case.train.is_whole:
        return finding("the train loader has one batch, so an epoch is one step")
    return fine(f"{count} batches" + (", all of an epoch" if case.train.is_whole else ""))


def nonfinite_data(case: Case) -> Answer:
    """NaN or infinity in a batch."""
    batches = case.train.read
    if not batches:
        return not_applicable(_NO_BATCH)
    bad = [i for i, batch in enumerate(batches) if any(not _is_finite(each) for each in tensors(batch))]
    if bad:
        return finding(f"{len(bad)} of {len(batches)} batches hold NaN or infinity, the first is batch {bad[0]}")
    return fine(f"{len(batches)} batches")


class _Moments(NamedTuple):
    mean: Tensor
    deviation: Tensor
    dimensions: int


def scale(case: Case) -> Answer:
    """Deviation and mean of floating-point inputs."""
    found = _moments(case)
    if isinstance(found, Answer):
        return found
    deviation = float(found.deviation.square().mean().sqrt())
    mean = float(found.mean.abs().max())
    text = f"inputs have a deviation of {deviation:.3g} and a mean of at most {mean:.3g}"
    if deviation == 0:
        return not_applicable("the inputs never change")
    wrong = deviation > LARGE_DEVIATION or deviation < SMALL_DEVIATION or mean > LARGE_MEAN
    return finding(text) if wrong else fine(text)


def constant_features(case: Case) -> Answer:
    """Columns of a table that never change."""
    found = _moments(case)
    if isinstance(found, Answer):
        return found
    count = len(found.mean)
    if found.dimensions != 2 or count > FEATURES:
        return not_applicable(f"for inputs (samples, at most {FEATURES} features); images have corners that are dark")
    same = (found.deviation < CONSTANT).nonzero().flatten().tolist()
    if same:
        return finding(f"{len(same)} of {count} features never change: {_few(same)}")
    return fine(f"{count} features")


def duplicates(case: Case) -> Answer:
    """Training samples that occur twice in an epoch."""
    if case.train.draws_again:
        return not_applicable("the sampler draws with replacement")
    hashes = _hashes(case.train.read)
    if not hashes:
        return not_applicable("no samples of at least two dimensions")
    again = len(hashes) - len(set(hashes))
    text = f"{again} of {len(hashes)} training samples have occurred before"
    return finding(text) if again > DUPLICATES * len(hashes) else fine(text)


def leak(case: Case) -> Answer:
    """Validation samples that are in the training data, too."""
    if case.val is None:
        return not_applicable("there is no validation loader")
    known, hashes = set(_hashes(case.train.read)), _hashes(case.val.read)
    if not known or not hashes:
        return not_applicable("no samples of at least two dimensions")
    hits = sum(each in known for each in hashes)
    text = f"{hits} of {len(hashes)} validation samples are in the training data"
    return finding(text) if hits > LEAK * len(hashes) else fine(text)


def order(case: Case) -> Answer:
    """Labels that are sorted."""
    found = [y for batch in case.train.read[:SCAN] if (y := labels(batch)) is not None]
    if not found:
        return not_applicable("no batch has one whole number for each sample")
    y = torch.cat(found).long()
    y = y[y >= 0]
    if len(y) < 2 or len(kinds := torch.unique(y, return_inverse=True)[1]) < 2 or int(kinds.max()) == 0:
        return not_applicable("there are too few labels")
    share = torch.bincount(kinds).double() / len(kinds)
    chance = float(share.square().sum())
    same = float((y[1:] == y[:-1]).double().mean())
    text = f"neighbours share a label in {same:.0%}, by chance in {chance:.0%}"
    return finding(text) if same > chance + ORDER * (1 - chance) else fine(text)


def label_range(case: Case) -> Answer:
    """Class indices that the loss function has no class for."""
    if not case.has_batches:
        return not_applicable(_NO_BATCH)
    calls = [call for step in case.first.calls for call in step if _takes_classes(call)]
    if not calls:
        return not_applicable("no cross_entropy or nll_loss with class indices was called")
    for call in calls:
        classes = call.input.shape[1 if call.input.ndim > 1 else 0]
        y = call.target[call.target != call.arguments["ignore_index"]]
        if y.numel() and (int(y.min()) < 0 or int(y.max()) >= classes):
            return finding(f"labels from {int(y.min())} to {int(y.max())}, for {classes} classes: expected from 0")
    return fine(f"{calls[0].input.shape[1 if calls[0].input.ndim > 1 else 0]} classes")


def _takes_classes(call: LossCall) -> bool:
    return call.name in ("cross_entropy", "nll_loss") and not call.target.is_floating_point() and call.input.ndim > 0


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _moments(case: Case) -> _Moments | Answer:
    rows: list[Tensor] = []
    dimensions = 0
    for batch in case.train.read[:SCAN]:
        first = inputs(batch)
        if first is None or not first.is_floating_point():
            return not_applicable("the input, the first tensor of a batch, is no floating-point tensor")
        dimensions = first.ndim
        if not _is_finite(first) or not first.numel():
            continue
        rows.append(first.detach().cpu().reshape(len(first), -1).double())
    if not rows:
        return not_applicable(_NO_BATCH if not case.train.read else "no batch is finite, and has a sample")
    if len({row.shape[1] for row in rows}) > 1:
        rows = [row.reshape(-1, 1) for row in rows]
    count = sum(len(row) for row in rows)
    mean = torch.stack([row.sum(0) for row in rows]).sum(0) / count
    square = torch.stack([(row - mean).square().sum(0) for row in rows]).sum(0) / count
    return _Moments(mean, square.sqrt(), dimensions)


def _hashes(batches: list[object]) -> list[bytes]:
    return [each for batch in batches[:SCAN] for each in samples(batch)]


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + (" ..." if len(values) > 5 else "")
