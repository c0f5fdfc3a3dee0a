from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from stabletrain.core.metric_names import MetricInfo
from stabletrain.errors import UserError
from stabletrain.optim.groups import parameter_groups
from stabletrain.runtime.records.run_files import SAMPLE
from stabletrain.workloads.arguments import number, whole
from stabletrain.workloads.base import Workload
from stabletrain.workloads.gpt import GPT
from stabletrain.workloads.metrics import Perplexity, WeightedMean
from stabletrain.workloads.sampling import continue_tokens

METRICS = (
    MetricInfo("val/loss", "nats per character", "mean over the validation, without smoothing and z-loss"),
    MetricInfo("val/perplexity", "characters", "exponential of val/loss"),
)

_MOST_PARAMETERS = 10**10


class CharGPT(Workload):
    """Decoder-only GPT that predicts the next character.

    A batch is an integer tensor (batch, time + 1). Logs `val/loss` (nats per character, without smoothing and z-loss),
    `val/perplexity` and `train/loss`. At the end of a fit it writes `sample.txt` into the Trainer's default_root_dir.

    Args:
        layers: number of blocks, at least 1.
        heads: attention heads per block, at least 1.
        width: size of a token's vector; divisible by heads.
        context: maximum number of tokens of an input, at least 1.
        vocab_size: number of different tokens; 84 for the shipped text.
        dropout: probability, 0 <= p < 1.
        qk_norm: apply layer norm to queries and keys per head, which allows higher learning rates (arXiv 2309.14322).
        z_loss: coefficient of the mean squared log-partition function in the loss; 0: off; PaLM uses 1e-4
            (arXiv 2204.02311).
        tie_embeddings: use the input embedding's weight in the output layer.
        label_smoothing: fraction of the target distributed over all tokens, 0 <= s < 1.
        lr: learning rate of the default AdamW, above 0.
        weight_decay: of the default AdamW, not on embeddings, biases and norms; at least 0.
        sample_length: characters sampled at the end of a fit; 0: off.
        sample_temperature: divides the logits; 0: the most likely character.
        sample_prompt: the beginning of the sample, at least one character.
    """

    data_option = "shakespeare"

    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "net.blocks.*.attention.qkv": "colwise:3",
        "net.blocks.*.attention.heads": "divide",
        "net.blocks.*.attention.*_norm": "partial",
        "net.blocks.*.attention.out": "rowwise",
        "net.blocks.*.mlp.0": "colwise",
        "net.blocks.*.mlp.2": "rowwise",
    }
    """For `TensorParallelStrategy`: attention is divided by heads, the perceptron by hidden units."""

    def __init__(
        self,
        layers: int = 2,
        heads: int = 4,
        width: int = 128,
        context: int = 64,
        vocab_size: int = 84,
        dropout: float = 0.0,
        qk_norm: bool = False,
        z_loss: float = 0.0,
        tie_embeddings: bool = False,
        label_smoothing: float = 0.0,
        lr: float = 5e-3,
        weight_decay: float = 0.1,
        sample_length: int = 400,
        sample_temperature: float = 0.8,
        sample_prompt: str = "\n",
    ) -> None:
        super().__init__()
        for key, value, least, most in (
            ("layers", layers, 1, 1000),
            ("heads", heads, 1, 65_536),
            ("width", width, 1, 65_536),
            ("context", context, 1, 1_000_000),
            ("vocab_size", vocab_size, 1, 10_000_000),
            ("sample_length", sample_length, 0, 1_000_000),
        ):
            whole(f"model.{key}", value, least, most)
        for key, share in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            number(f"model.{key}", share, 0, 1)
        for key, amount in (
            ("z_loss", z_loss),
            ("weight_decay", weight_decay),
            ("sample_temperature", sample_temperature),
        ):
            number(f"model.{key}", amount)
        number("model.lr", lr, above_least=True)
        if width % heads:
            raise UserError(f"model.width: expected a multiple of model.heads={heads}, got {width}")
        if not sample_prompt:
            raise UserError("model.sample_prompt: expected at least one character, got ''; the default is a line feed")
        parameters = width * (12 * layers * width + vocab_size * (1 if tie_embeddings else 2) + context)
        if parameters > _MOST_PARAMETERS:
            raise UserError(
                f"model: expected at most {_MOST_PARAMETERS:.0e} parameters, got about {parameters:.0e} from "
                f"model.layers={layers}, model.width={width}, model.vocab_size and model.context; lower them"
            )
        self.save_hyperparameters(logger=False)
        self.net = GPT(layers, heads, width, context, vocab_size, dropout, qk_norm, tie_embeddings)
        self.context, self.vocab_size = context, vocab_size
        self.z_loss, self.label_smoothing, self.lr, self.weight_decay = z_loss, label_smoothing, lr, weight_decay
        self.sample_length, self.sample_temperature = sample_length, sample_temperature
        self.sample_prompt = sample_prompt
        self.val_loss = WeightedMean()
        self.val_perplexity = Perplexity()

    def setup(self, stage: str) -> None:
        """Check the vocabulary and the prompt against the data before training."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        needed = getattr(data, "vocab_size", 0)
        if self.vocab_size < needed:
            raise UserError(
                f"model.vocab_size: expected at least the {needed} tokens of the data, got {self.vocab_size}"
            )
        if self.sample_length and hasattr(data, "encode"):
            try:
                data.encode(self.sample_prompt)
            except ValueError as error:
                raise UserError(f"model.sample_prompt: {error}") from error

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, time, vocab_size) of the next token for tokens (batch, time)."""
        logits: Tensor = self.net(tokens)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss in nats per token: smoothed cross-entropy plus z-loss.

        Args:
            logits: (batch, time, vocab_size).
            targets: (batch, time), int64.
        """
        logits = logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=self.label_smoothing)
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        return self.loss(self(batch[:, :-1]), batch[:, 1:])

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch, without smoothing and z-loss."""
        return F.cross_entropy(self(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())

    def on_validation_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update loss and perplexity."""
        samples = batch[:, 1:].numel()
        self.val_loss.update(outputs, samples)
        self.val_perplexity.update(outputs, samples)

    def on_validation_epoch_end(self) -> None:
        """Log validation loss, perplexity and training loss."""
        super().on_validation_epoch_end()
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/perplexity", self.val_perplexity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with a constant learning rate and betas (0.9, 0.95)."""
        return torch.optim.AdamW(parameter_groups(self, weight_decay=self.weight_decay), lr=self.lr, betas=(0.9, 0.95))

    def generate(
        self, prompt: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the prompt followed by `length` sampled tokens; does not use the global random generators.

        Args:
            prompt: 1-D integer tensor of at least one token.
            length: number of tokens to sample, at least 0.
            temperature: divides the logits; 0: the most likely token.
            generator: on the CPU; None: a new one with seed 0.

        Raises:
            FloatingPointError: if logits are not finite.
        """
        training = self.training
        self.eval()
        try:
            return continue_tokens(self, prompt.to(self.device), length, self.context, temperature, generator)
        finally:
            self.train(training)

    def on_train_end(self) -> None:
        """Write a sample of the model to `sample.txt` if the data module can encode and decode text."""
        data: Any = getattr(self.trainer, "datamodule", None)
        is_dev_run = getattr(self.trainer, "fast_dev_run", False)
        if not self.sample_length or is_dev_run or not hasattr(data, "decode"):
            return
        # on all ranks, and through the strategy's wrapper: the forward of a sharded model is a collective
        model = self.trainer.strategy.model or self
        training = model.training
        model.eval()
        try:
            prompt = data.encode(self.sample_prompt).to(self.device)
            tokens = continue_tokens(model, prompt, self.sample_length, self.context, self.sample_temperature)
        except FloatingPointError as error:
            rank_zero_warn(f"no sample was written after step {self.trainer.global_step}: {error}")
            return
        finally:
            model.train(training)
        if self.trainer.is_global_zero:
            sample = data.decode(tokens)
            path = Path(self.trainer.default_root_dir) / SAMPLE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(sample + "\n", encoding="utf-8")
            rank_zero_info(f"Sample after step {self.trainer.global_step} ({path}):\n{sample}")
