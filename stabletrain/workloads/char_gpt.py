from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from stabletrain.runtime.records.run_files import SAMPLE
from stabletrain.workloads.base import Workload, decay_groups
from stabletrain.workloads.gpt import GPT
from stabletrain.workloads.metrics import Perplexity, WeightedMean
from stabletrain.workloads.sampling import continue_tokens


class CharGPT(Workload):
    """Decoder-only GPT that predicts the next character.

    A batch is an integer tensor (batch, time + 1). Logs `val_loss` (nats per character, without smoothing and z-loss),
    `val_perplexity` and `train_loss`. At the end of a fit it writes `sample.txt` into the Trainer's default_root_dir.

    Args:
        layers: number of blocks, at least 1.
        heads: attention heads per block, at least 1.
        width: size of a token's vector; divisible by heads.
        context: greatest number of tokens seen at once, at least 1.
        vocab_size: number of different tokens; 84 for the shipped text.
        dropout: probability, 0 <= p < 1.
        qk_norm: layer-normalise queries and keys per head; tolerates higher learning rates (arXiv 2309.14322).
        z_loss: coefficient of the mean squared log-partition added to the loss; 0 is off, PaLM has 1e-4
            (arXiv 2204.02311).
        tie_embeddings: the output layer shares the input embedding's weight.
        label_smoothing: share of the target spread over all tokens, 0 <= s < 1.
        lr: learning rate of the default AdamW, above 0.
        weight_decay: of the default AdamW, on matrices only, at least 0.
        sample_length: characters drawn at the end of a fit; 0 is off.
        sample_temperature: divides the logits; 0 takes the most likely character.
        sample_prompt: text that the sample continues, at least one character.
    """

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
        for key, number, least in (
            ("layers", layers, 1),
            ("heads", heads, 1),
            ("width", width, 1),
            ("context", context, 1),
            ("vocab_size", vocab_size, 1),
            ("z_loss", z_loss, 0),
            ("weight_decay", weight_decay, 0),
            ("sample_length", sample_length, 0),
            ("sample_temperature", sample_temperature, 0),
        ):
            if not number >= least:
                raise ValueError(f"model.{key}: expected a number of at least {least}, got {number}; raise it")
        for key, share in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0 <= share < 1:
                raise ValueError(f"model.{key}: expected 0 <= {key} < 1, got {share}; 0 switches it off")
        if width % heads:
            raise ValueError(f"model.width: expected a multiple of model.heads={heads}, got {width}")
        if not sample_prompt:
            raise ValueError("model.sample_prompt: expected at least one character, got ''; a line feed is the default")
        self.save_hyperparameters(logger=False)
        self.net = GPT(layers, heads, width, context, vocab_size, dropout, qk_norm, tie_embeddings)
        self.context, self.vocab_size = context, vocab_size
        self.z_loss, self.label_smoothing, self.lr, self.weight_decay = z_loss, label_smoothing, lr, weight_decay
        self.sample_length, self.sample_temperature = sample_length, sample_temperature
        self.sample_prompt = sample_prompt
        self.val_loss = WeightedMean()
        self.val_perplexity = Perplexity()

    def setup(self, stage: str) -> None:
        """Check the vocabulary and the prompt against the data, before any step is spent."""
        data: Any = getattr(self.trainer, "datamodule", None)
        needed = getattr(data, "vocab_size", 0)
        if self.vocab_size < needed:
            raise ValueError(
                f"model.vocab_size: expected at least the {needed} tokens of the data, got {self.vocab_size}; raise it"
            )
        if self.sample_length and hasattr(data, "encode"):
            try:
                data.encode(self.sample_prompt)
            except ValueError as error:
                raise ValueError(f"model.sample_prompt: {error}") from error

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocab_size) of the token after each of (batch, time)."""
        logits: Tensor = self.net(tokens)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss in nats per token: smoothed cross-entropy plus z-loss.

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
        """Loss of one batch."""
        return self.loss(self(batch[:, :-1]), batch[:, 1:])

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, without smoothing and z-loss."""
        return F.cross_entropy(self(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())

    def on_validation_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch to loss and perplexity."""
        samples = batch[:, 1:].numel()
        self.val_loss.update(outputs, samples)
        self.val_perplexity.update(outputs, samples)

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and the training's loss."""
        super().on_validation_epoch_end()
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_perplexity", self.val_perplexity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with a constant learning rate and betas (0.9, 0.95)."""
        return torch.optim.AdamW(decay_groups(self, self.weight_decay), lr=self.lr, betas=(0.9, 0.95))

    def generate(
        self, prompt: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Prompt followed by `length` drawn tokens; the global random numbers stay untouched.

        Args:
            prompt: 1-D integer tensor of at least one token.
            length: tokens to draw, at least 0.
            temperature: divides the logits; 0 takes the most likely token.
            generator: of the CPU; None: a fresh one with seed 0.

        Raises:
            FloatingPointError: logits are not finite.
        """
        training = self.training
        self.eval()
        try:
            return continue_tokens(self, prompt.to(self.device), length, self.context, temperature, generator)
        finally:
            self.train(training)

    def on_train_end(self) -> None:
        """Draw a sample and write it to `sample.txt`, where the data can encode and decode text."""
        data: Any = getattr(self.trainer, "datamodule", None)
        rehearsal = getattr(self.trainer, "fast_dev_run", False)
        if not self.sample_length or rehearsal or not hasattr(data, "decode"):
            return
        # All ranks draw, through the strategy's own wrapper, because a sharded forward is a collective operation.
        model = self.trainer.strategy.model or self
        training = model.training
        model.eval()
        try:
            prompt = data.encode(self.sample_prompt).to(self.device)
            tokens = continue_tokens(model, prompt, self.sample_length, self.context, self.sample_temperature)
        except FloatingPointError as error:
            rank_zero_warn(f"no sample was drawn after step {self.trainer.global_step}: {error}")
            return
        finally:
            model.train(training)
        if self.trainer.is_global_zero:
            sample = data.decode(tokens)
            path = Path(self.trainer.default_root_dir) / SAMPLE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(sample + "\n", encoding="utf-8")
            rank_zero_info(f"Sample after step {self.trainer.global_step} ({path}):\n{sample}")
