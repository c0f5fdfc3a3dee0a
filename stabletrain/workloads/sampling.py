from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def continue_tokens(
    forward: Callable[[Tensor], Tensor],
    prompt: Tensor,
    length: int,
    context: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the prompt followed by tokens that are sampled one at a time from a causal model.

    Random numbers are drawn on the CPU from `generator`, never from the global generators. The model's input always has
    the shape `(1, context)`, so a compiled model is compiled once.

    Args:
        forward: maps (1, context) tokens to (1, context, vocabulary) logits.
        prompt: 1-D integer tensor of at least one token.
        length: number of tokens to sample, at least 0.
        context: number of tokens of the model's input.
        temperature: divides the logits; 0: the most likely token.
        generator: on the CPU; None: a new one with seed 0.

    Returns:
        1-D int64 tensor of `len(prompt) + length` tokens, on the prompt's device.

    Raises:
        ValueError: if the prompt has no tokens, or length or temperature is negative.
        FloatingPointError: if logits are not finite.
    """
    if prompt.ndim != 1 or not len(prompt):
        raise ValueError(f"prompt: expected a 1-D tensor of at least one token, got shape {tuple(prompt.shape)}")
    if length < 0 or not temperature >= 0:
        raise ValueError(f"length and temperature: expected at least 0 each, got {length} and {temperature}")
    generator = generator or torch.Generator().manual_seed(0)
    tokens = torch.cat([prompt.long(), prompt.new_zeros(length, dtype=torch.long)])
    for end in range(len(prompt), len(prompt) + length):
        seen = tokens[max(0, end - context) : end]
        # padding after the last token does not change its logits: the model is causal
        padded = torch.nn.functional.pad(seen, (0, context - len(seen)))
        logits = forward(padded[None])[0, len(seen) - 1].float().cpu()
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"logits after token {end - 1} are not finite: the parameters contain NaN or Inf, or are so large "
                f"that the forward overflows; sample from an earlier checkpoint"
            )
        if temperature == 0:
            tokens[end] = logits.argmax()
        else:
            tokens[end] = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)[0]
    return tokens
