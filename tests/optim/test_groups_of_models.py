"""The groups of well-known models: no embedding, norm or bias decays, every hidden matrix does, each tensor once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabletrain.optim.groups import parameter_groups
from stabletrain.optim.kinds import named_tensors
from stabletrain.workloads.gpt import GPT

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(10, 8), nn.LSTM(8, 8, 2), nn.Linear(8, 10)


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "gpt": (lambda: GPT(2, 4, 32, 16, 84, 0.0, True, False), set()),
    "gpt-tied": (lambda: GPT(2, 4, 32, 16, 84, 0.0, True, True), set()),
    "transformer": (lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True), set()),
    "lstm": (Recurrent, set()),
}
"""The model, and the names of matrices that are neither embeddings nor biases, and do not decay all the same."""


def _hugging_face() -> dict[str, tuple[Callable[[], nn.Module], set[str]]]:
    import transformers as tr

    positions = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    return {
        "gpt2": (
            lambda: tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)),
            set(),
        ),
        "llama": (lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**SMALL)), set()),
        "bert": (lambda: tr.BertForMaskedLM(tr.BertConfig(**SMALL)), set()),
        "t5": (
            lambda: tr.T5ForConditionalGeneration(
                tr.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
            ),
            set(),
        ),
        "vit": (
            lambda: tr.ViTForImageClassification(
                tr.ViTConfig(**{**SMALL, "vocab_size": 0}, image_size=32, patch_size=8)
            ),
            positions,
        ),
        "mamba": (
            lambda: tr.MambaForCausalLM(
                tr.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=8)
            ),
            {"backbone.layers.0.mixer.A_log"},
        ),
    }


def check(model: nn.Module, exceptions: set[str]) -> None:
    """Compare the groups with what each parameter's name and owner say, by other means than the code under test."""
    groups = parameter_groups(model, weight_decay=0.1)
    placed = [id(each) for group in groups for each in group["params"]]
    assert sorted(placed) == sorted({id(each) for each in model.parameters()})
    decaying = {id(each) for group in groups if group["weight_decay"] for each in group["params"]}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for owner_name, owner in model.named_modules():
        for name, each in owner.named_parameters(recurse=False):
            full = f"{owner_name}.{name}".lstrip(".")
            is_norm = "norm" in type(owner).__name__.lower()
            hidden = each.ndim >= 2 and not is_norm and "bias" not in name and id(each) not in embeddings
            assert (id(each) in decaying) == (hidden and full not in exceptions), full


@pytest.mark.parametrize("name", MODELS)
def test_models_of_torch(name: str) -> None:
    """Bugs: an embedding that decays because it is a matrix; a 3-D bias or a tied weight that is counted twice."""
    make, exceptions = MODELS[name]
    check(make(), exceptions)


@pytest.mark.slow
def test_models_of_transformers() -> None:
    """Bugs: GPT-2's Conv1D is no nn.Linear; RMSNorm of a library is no nn.RMSNorm; Mamba's norm_f and D; T5's bias."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 6


def test_parameters_that_shape_or_name_would_misjudge() -> None:
    """Bugs, one in each entry: owners hidden by lists, parametrizations, wrappers, subclasses, or the order of ties."""

    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.ones(2, 2))])

    class LN(nn.LayerNorm):
        pass

    class ScaledLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2, bias=False)
            self.scale = nn.Parameter(torch.ones(2))
            self.lora_a = nn.Parameter(torch.ones(2, 2))

    class NormalizedLinear(nn.Linear):
        pass

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

    class FSDPConv1D(Conv1D):
        pass

    class PreNormAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.g = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 1, 1))

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 9, bias=False)
            self.tokens = nn.Embedding(9, 4)
            self.head.weight = self.tokens.weight
            self.norm, self.ln, self.scaled, self.normalized = (
                MyNorm(),
                LN((2, 2)),
                ScaledLinear(),
                NormalizedLinear(2, 2),
            )
            self.pre, self.sharded = PreNormAttention(), FSDPConv1D()
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
            self.decomposed = nn.Parameter(torch.ones(2, 2))
            self.gain = nn.Parameter(torch.ones(()))

    kinds = {each.name: (each.kind, each.decays) for each in named_tensors(Root())}
    assert kinds == {
        "pos_embed": ("other", False),
        "decomposed": ("other", True),
        "gain": ("other", False),
        "head.weight": ("embedding", False),
        "norm.weights.0": ("norm", False),
        "ln.weight": ("norm", False),
        "ln.bias": ("bias", False),
        "scaled.scale": ("other", False),
        "scaled.lora_a": ("other", True),
        "scaled.weight": ("weight", True),
        "normalized.weight": ("weight", True),
        "normalized.bias": ("bias", False),
        "pre.qkv": ("other", True),
        "pre.g": ("norm", False),
        "sharded.weight": ("weight", True),
        "attention.in_proj_weight": ("weight", True),
        "attention.in_proj_bias": ("bias", False),
        "attention.bias_k": ("bias", False),
        "attention.bias_v": ("bias", False),
        "attention.out_proj.weight": ("weight", True),
        "attention.out_proj.bias": ("bias", False),
        "parametrized.bias": ("bias", False),
        "parametrized.parametrizations.weight.original0": ("weight", True),
        "parametrized.parametrizations.weight.original1": ("weight", True),
    }
    wrapped = nn.Module()
    wrapped._orig_mod = Root()  # as torch.compile does
    assert {each.name: (each.kind, each.decays) for each in named_tensors(wrapped)} == kinds


if __name__ == "__main__":
    for model_name, (make_model, allowed) in _hugging_face().items():
        check(make_model(), allowed)
        print(model_name)
