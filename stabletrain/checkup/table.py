"""All checks of ``stabletrain doctor``: what each measures, its threshold, what to do, and where it comes from.

docs/doctor.md is generated from the table, `CHECKS`. The numbers are constants beside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from stabletrain.checkup import data_checks as data
from stabletrain.checkup import learning_checks as learning
from stabletrain.checkup import loss_checks as loss
from stabletrain.checkup import module_checks as module
from stabletrain.checkup.answer import Answer
from stabletrain.checkup.case import Case

Family = Literal["data", "module", "loss", "learning"]


class Check(NamedTuple):
    """A check, as a row of the table.

    Args:
        name: of it.
        family: what it is about.
        measured: in words.
        threshold: in words; above it the answer is a finding.
        advice: what to do.
        source: where the check or its threshold comes from.
        ask: answers for a case.
    """

    name: str
    family: Family
    measured: str
    threshold: str
    advice: str
    source: str
    ask: Callable[[Case], Answer]


KARPATHY = "Karpathy 2019, A Recipe for Training Neural Networks"
PLAYBOOK = "tuning playbook (Godbole et al. 2023)"
TORCH = "torch's documentation"

CHECKS: tuple[Check, ...] = (
    Check(
        "loader",
        "data",
        "what the loaders give",
        "no batch, one batch, or an exception",
        "read the loader alone: for batch in loader",
        TORCH,
        data.loaders,
    ),
    Check(
        "raises",
        "module",
        "the first 120 steps",
        "an exception, or never a loss",
        "the traceback is below; in a script, the report has it",
        KARPATHY,
        module.raises,
    ),
    Check(
        "label range",
        "data",
        "class indices that reach cross_entropy or nll_loss",
        "below 0, or as many as there are classes or more; ignore_index is left out",
        "count labels from 0, or give the last layer more outputs",
        TORCH,
        data.label_range,
    ),
    Check(
        "non-finite data",
        "data",
        "all batches that were read",
        "any NaN or infinity",
        "find the samples, and drop or repair them",
        KARPATHY,
        data.nonfinite_data,
    ),
    Check(
        "non-finite loss",
        "learning",
        "the first 120 steps",
        "any NaN or infinity",
        "the data first, then a lower learning rate; torch.autograd.set_detect_anomaly names the operation",
        "Micikevicius et al. 2018",
        learning.nonfinite_loss,
    ),
    Check(
        "stale gradients",
        "module",
        "gradients of the optimizer's parameters before the backward pass, 10 steps",
        "any that is not zero",
        "call zero_grad; an own optimizer_zero_grad has to call the optimizer's",
        "Karpathy 2018, most common neural net mistakes",
        module.stale_gradients,
    ),
    Check(
        "not in optimizer",
        "module",
        "parameters with requires_grad",
        "any that is in no optimizer",
        "give the optimizer self.parameters(), or set requires_grad=False if that is meant",
        TORCH,
        module.not_in_optimizer,
    ),
    Check(
        "unused",
        "module",
        "parameters with requires_grad after the first backward pass",
        "any without a gradient",
        "look for a layer that forward does not call, or a detach or no_grad before the loss",
        TORCH,
        module.unused,
    ),
    Check(
        "probabilities",
        "loss",
        "what reaches the loss function",
        "cross_entropy: rows in 0..1 that sum to 1 within 0.001, or all of at least 64 values in 0..1, which is also "
        "the limit of binary_cross_entropy_with_logits; nll_loss: a logsumexp above 0.01",
        "return logits: remove the last softmax, sigmoid or ReLU; for nll_loss use log_softmax",
        "Karpathy 2018, most common neural net mistakes",
        loss.probabilities,
    ),
    Check(
        "broadcast",
        "loss",
        "shapes of output and target of mse_loss, l1_loss, smooth_l1_loss, huber_loss",
        "any difference",
        "give both the same shape: output.squeeze(-1), or target.unsqueeze(-1)",
        TORCH,
        loss.broadcast,
    ),
    Check(
        "ignores input",
        "module",
        "outputs for two batches after 120 steps, same weights and random numbers",
        "a largest difference below 1e-6 (of the largest output, if that is above 1)",
        "follow one sample through forward: what is passed on is not the batch",
        KARPATHY + " (input-independent baseline)",
        module.ignores_input,
    ),
    Check(
        "no better than guessing",
        "learning",
        "mean of the last 20 losses, without weights and label smoothing, after 120 steps; after at most 400 where an "
        "epoch has 200 batches or more",
        "above 0.97 of the loss of the best constant output for the targets seen",
        "labels that do not belong to the inputs, a learning rate, a layer that passes nothing on",
        KARPATHY + " (input-independent baseline)",
        learning.no_better_than_guessing,
    ),
    Check(
        "one batch",
        "learning",
        "lowest mean of 5 losses within 150 steps on the first batch, also at ten times the rate",
        "not below 0.7 of the first loss",
        "a model this size must fit one batch: look for a detach, a broadcast, a wrong target",
        KARPATHY + " (overfit one batch)",
        learning.one_batch,
    ),
    Check(
        "loss rises",
        "learning",
        "means of the first 5 and the last 20 of 120 losses",
        "the end above the start by 2 % and 0.02",
        "a lower learning rate or a warm-up, then the sign of the loss",
        PLAYBOOK,
        learning.rises,
    ),
    Check(
        "rate too high",
        "learning",
        "loss after 60 steps, mean of 15, at the configured rate and at a tenth",
        "a tenth is better by 5 % of the first loss",
        "stabletrain lr-range, or a warm-up, which in a script is not part of this check unless the module makes it",
        "Smith 2017; " + PLAYBOOK,
        learning.rate_too_high,
    ),
    Check(
        "loss at the start",
        "loss",
        "the first cross_entropy, nll_loss or binary_cross_entropy",
        "above 1.5 ln(classes) + 0.3",
        "a smaller initialisation of the last layer, and inputs with a deviation near 1",
        KARPATHY + " (verify loss @ init)",
        loss.loss_at_start,
    ),
    Check(
        "sum reduction",
        "loss",
        "reduction of the loss function, and the loss that is trained",
        "a sum that makes at least half of the loss",
        "reduction='mean', or divide by the samples: otherwise the rate depends on the batch size",
        TORCH,
        loss.summed,
    ),
    Check(
        "eval mode",
        "module",
        "training flag of BatchNorm and dropout, 4 steps; without those whose parameters are all frozen",
        "any that is False",
        "call train() at the start of training: Lightning 2 keeps the mode that a layer has",
        "Lightning's documentation",
        module.eval_mode,
    ),
    Check(
        "few values in BatchNorm",
        "module",
        "values per channel in one batch",
        "below 16",
        "a larger batch, GroupNorm, or LayerNorm",
        "Wu and He 2018, Group Normalization",
        module.few_values,
    ),
    Check(
        "dead units",
        "module",
        "units of ReLU, GELU and SiLU that are above zero in at most 0.1 % of the values of each of 4 batches",
        "more than half of a layer",
        "a smaller negative bias, another initialisation, a lower learning rate",
        "Lu et al. 2019, Dying ReLU and Initialization",
        module.dead_units,
    ),
    Check(
        "size of outputs",
        "module",
        "root mean square of the first output of each linear, convolution and recurrent layer",
        "above 100 or, unless it is 0, below 1e-6",
        "an initialisation that keeps the size: He et al. 2015, Glorot and Bengio 2010; or normalisation layers",
        "He et al. 2015; Glorot and Bengio 2010",
        module.output_scale,
    ),
    Check(
        "leak",
        "data",
        "validation samples, by hash, in the first 60 batches of both loaders",
        "more than 1 % that are in the training data, too",
        "split by sample, or by what samples have in common, before anything else",
        "Kapoor and Narayanan 2023, Leakage and the reproducibility crisis",
        data.leak,
    ),
    Check(
        "order",
        "data",
        "neighbours in the first 60 batches with the same label",
        "more than half of the way from chance to always",
        "DataLoader(shuffle=True)",
        "Bottou 2012, Stochastic Gradient Descent Tricks",
        data.order,
    ),
    Check(
        "scale",
        "data",
        "first tensor of a batch, if it is floating-point: deviation and largest mean of its features",
        "a deviation above 10 or below 0.01, or a mean beyond 30",
        "normalise: subtract the mean and divide by the deviation of the training data",
        "LeCun et al. 1998, Efficient BackProp",
        data.scale,
    ),
    Check(
        "rate too low",
        "learning",
        "loss after 60 steps, mean of 15, at the configured rate and at a hundred times",
        "a hundred times learns 5 times as much, and 2 % of the first loss",
        "stabletrain lr-range",
        "Smith 2017; " + PLAYBOOK,
        learning.rate_too_low,
    ),
    Check(
        "frozen",
        "module",
        "parameters with requires_grad=False",
        "any",
        "nothing if it is meant, as in fine-tuning; else remove requires_grad_(False)",
        TORCH,
        module.frozen,
    ),
    Check(
        "duplicates",
        "data",
        "training samples, by hash, in the first 60 batches",
        "more than 2 % that occurred before; not if the sampler draws with replacement",
        "remove them, or weight samples on purpose",
        "Lee et al. 2022, Deduplicating Training Data",
        data.duplicates,
    ),
    Check(
        "constant features",
        "data",
        "columns of inputs (samples, at most 64 features)",
        "a deviation below 1e-9",
        "remove the column: it says nothing",
        KARPATHY,
        data.constant_features,
    ),
)
"""All checks, the worst finding first."""
