import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import CharGPT, ShakespeareData
from stabletrain.workloads.sampling import continue_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

SMALL = {"layers": 2, "heads": 2, "width": 32, "context": 16}


def small(**changes: object) -> CharGPT:
    torch.manual_seed(0)
    return CharGPT(**{**SMALL, **changes})  # type: ignore[arg-type]


def some_tokens(batch: int, time: int) -> Tensor:
    return torch.randint(84, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_future_token_changes_no_earlier_logit(qk_norm: bool) -> None:
    """Catches attention that is not causal, which makes the training loss a lie."""
    model = small(qk_norm=qk_norm).eval()
    before = some_tokens(3, 16)
    for changed in range(1, 16):
        after = before.clone()
        after[:, changed] = (after[:, changed] + 1) % 84
        assert torch.equal(model(before)[:, :changed], model(after)[:, :changed])
        assert not torch.equal(model(before)[:, changed], model(after)[:, changed])


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_first_loss_is_that_of_a_uniform_guess(tie_embeddings: bool) -> None:
    """Catches a bad initialisation, or inputs and targets that are not one apart."""
    model = CharGPT(tie_embeddings=tie_embeddings)
    assert model.training_step(some_tokens(16, 65), 0).item() == pytest.approx(math.log(84), abs=0.1)


def test_residual_stream_does_not_grow_with_depth() -> None:
    """Catches a missing residual scaling in the initialisation."""
    shallow, deep = small(layers=2), small(layers=32)
    for model in (shallow, deep):
        writers = [p for n, p in model.named_parameters() if n.endswith(("attention.out.weight", "mlp.2.weight"))]
        assert len(writers) == 2 * len(model.net.blocks)
        expected = 0.02 / math.sqrt(len(writers))
        assert torch.cat([w.flatten() for w in writers]).std().item() == pytest.approx(expected, rel=0.05)


def test_one_batch_is_learned_by_heart() -> None:
    """Catches a parameter that gets no gradient and an optimizer that leaves one out."""
    model = small(lr=1e-2, weight_decay=0.0)
    optimizer, batch = model.configure_optimizers(), some_tokens(4, 17)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert loss.item() < 0.1


def test_z_loss_has_the_gradient_of_the_formula() -> None:
    """Catches a wrong sign, mean or power: d/dz of c mean(L^2) is 2 c L softmax(z) / n with L = logsumexp(z)."""
    logits = torch.randn(2, 5, 84, dtype=torch.float32, requires_grad=True)
    targets = some_tokens(2, 5)
    (with_z,) = torch.autograd.grad(small(z_loss=0.3).loss(logits, targets), logits)
    (without,) = torch.autograd.grad(small().loss(logits, targets), logits)
    partition = logits.logsumexp(-1, keepdim=True)
    expected = 2 * 0.3 * partition * logits.softmax(-1) / 10
    torch.testing.assert_close(with_z - without, expected.detach(), rtol=1e-4, atol=1e-7)


def test_label_smoothing_is_that_of_the_definition() -> None:
    """Catches smoothing that is accepted and not used."""
    logits, targets = torch.randn(2, 5, 84), some_tokens(2, 5)
    log_p = logits.log_softmax(-1)
    exact = -log_p.gather(-1, targets[..., None]).mean()
    spread = -log_p.mean()
    torch.testing.assert_close(small(label_smoothing=0.2).loss(logits, targets), 0.8 * exact + 0.2 * spread)


def test_validation_loss_is_free_of_smoothing_and_z_loss() -> None:
    """Catches a val_loss that cannot be compared between runs; perplexity is its exponential, weighted by tokens."""
    model = small(label_smoothing=0.3, z_loss=1.0, dropout=0.5).eval()
    batches = some_tokens(5, 17), some_tokens(2, 9)
    losses = []
    for batch in batches:
        model.on_validation_batch_end(model.validation_step(batch, 0), batch, 0)
        losses.append(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(model.val_loss.compute(), expected)
    torch.testing.assert_close(model.val_perplexity.compute(), expected.exp())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_model_has_no_healthy_validation_loss(bad: float) -> None:
    """Catches a metric that leaves NaN batches out, and a perplexity that is finite when the loss is not."""
    model = small().eval()
    model.val_loss.update(torch.tensor(1.0), 4)
    model.val_loss.update(torch.tensor(bad), 4)
    model.val_perplexity.update(torch.tensor(bad), 4)
    assert not model.val_loss.compute().isfinite()
    assert not model.val_perplexity.compute().isfinite()


def test_tied_embeddings_share_storage() -> None:
    """Catches a copy, which is two parameters that drift apart."""
    tied, untied = small(tie_embeddings=True), small(tie_embeddings=False)
    assert tied.net.head.weight.data_ptr() == tied.net.token.weight.data_ptr()
    assert untied.net.head.weight.data_ptr() != untied.net.token.weight.data_ptr()
    difference = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert difference == 84 * 32


def test_only_hidden_matrices_decay_and_every_parameter_is_optimized_once() -> None:
    """Catches decay on embeddings, biases and norms, and a tied weight listed twice."""
    model = small(tie_embeddings=True, weight_decay=0.3)
    optimizer = model.configure_optimizers()
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    plain = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    embeddings = {id(model.net.token.weight), id(model.net.position.weight)}
    assert decayed == {id(p) for p in model.parameters() if p.ndim >= 2} - embeddings
    assert decayed | plain == {id(p) for p in model.parameters()}


def test_dropout_is_off_in_evaluation() -> None:
    """Catches attention dropout that ignores the mode."""
    model, tokens = small(dropout=0.5), some_tokens(2, 16)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_is_deterministic_and_does_not_use_the_global_random_generators(temperature: float) -> None:
    """Catches sampling from the global generator, which would change a training that draws samples."""
    model, prompt = small(dropout=0.3), some_tokens(1, 3)[0]
    before = torch.random.get_rng_state()
    texts = [model.generate(prompt, 40, temperature, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0][:3], prompt)
    assert len(texts[0]) == 43
    assert model.training


def test_generate_equals_unpadded_greedy_decoding() -> None:
    """Catches padding that leaks into the logits, and a wrong position after the context is full."""
    model = small().eval()
    torch.nn.init.normal_(model.net.head.weight)
    tokens = some_tokens(1, 3)
    for _ in range(30):
        tokens = torch.cat([tokens, model(tokens[:, -16:])[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(some_tokens(1, 3)[0], 30, temperature=0.0), tokens[0])


def test_generate_refuses_what_it_cannot_do() -> None:
    """Catches an obscure error of multinomial for a diverged model, and silent nonsense for an empty prompt."""
    model = small()
    torch.nn.init.constant_(model.net.norm.bias, math.nan)
    with pytest.raises(FloatingPointError, match="earlier checkpoint"):
        model.generate(some_tokens(1, 3)[0], 1)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(torch.empty(0), 1)
    with pytest.raises(ValueError, match="at least 0 each"):
        continue_tokens(model, some_tokens(1, 3)[0], -1, 16, 1.0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layers": 0}, "model.layers"),
        ({"heads": 3}, "model.width"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"z_loss": math.nan}, "model.z_loss"),
        ({"label_smoothing": -0.1}, "model.label_smoothing"),
        ({"sample_prompt": ""}, "model.sample_prompt"),
    ],
)
def test_a_bad_argument_is_named(changes: dict[str, object], key: str) -> None:
    """Catches an error far away from its cause."""
    with pytest.raises(ValueError, match=key):
        small(**changes)


def test_a_batch_longer_than_the_context_names_both_keys() -> None:
    """Catches an index error of the position embedding, which is a device assert on CUDA."""
    with pytest.raises(ValueError, match=r"model\.context.*data\.context"):
        small()(some_tokens(1, 17))


def test_bf16_autocast_trains_in_float32_loss() -> None:
    """Catches a mixed-dtype error in the norms of queries and keys, and a loss in 8 bits of precision."""
    model = small(qk_norm=True, z_loss=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(some_tokens(2, 17), 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_step_is_one_graph() -> None:
    """Catches a graph break, which costs most of what torch.compile gives."""
    model = small(qk_norm=True, z_loss=1e-4)
    for step in (model.training_step, model.validation_step):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(some_tokens(2, 17), 0), step(some_tokens(2, 17), 0))


def trainer(folder: Path, *callbacks: L.Callback, **arguments: object) -> L.Trainer:
    return quiet_trainer(*callbacks, default_root_dir=folder, **arguments)


def test_a_fit_logs_and_leaves_a_sample(tmp_path: Path) -> None:
    """Catches a missing metric, a train_loss over the wrong steps, and a sample that is not of the asked length."""
    model, data = small(sample_length=20, sample_prompt="ROMEO."), ShakespeareData(context=16, validation_windows=64)
    losses: list[Tensor] = []

    class Retention(L.Callback):
        def on_train_batch_end(self, t: L.Trainer, m: L.LightningModule, outputs: object, *rest: object) -> None:
            losses.append(outputs["loss"])  # type: ignore[index]

    fit = trainer(tmp_path, Retention(), max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)
    fit.fit(model, datamodule=data)
    metrics = fit.callback_metrics
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(metrics)
    torch.testing.assert_close(metrics["train/loss"], torch.stack(losses[2:]).mean())
    torch.testing.assert_close(metrics["val/perplexity"], metrics["val/loss"].exp())
    sample = (tmp_path / "sample.txt").read_text()
    assert sample.startswith("ROMEO.")
    assert len(sample) == len("ROMEO.") + 20 + 1


def test_a_non_finite_loss_is_left_out_of_train_loss() -> None:
    """Catches one bad batch that makes the logged mean NaN although its step was skipped."""
    model, logged = small(), {}
    model.log = lambda name, value, **kwargs: logged.update({name: value})  # type: ignore[method-assign]
    for loss in (1.0, math.nan, math.inf, -math.inf, 3.0):
        model.on_train_batch_end({"loss": torch.tensor(loss)}, None, 0)
    model.on_validation_epoch_end()
    assert logged["train/loss"].item() == 2.0
    logged.clear()
    model.on_validation_epoch_end()
    assert "train/loss" not in logged


def test_validation_and_sampling_do_not_change_the_training(tmp_path: Path) -> None:
    """Catches a validation or a sample that draws from the training's random numbers (dropout shows it)."""
    weights = []
    for validations in (0, 4):
        L.seed_everything(3, verbose=False)
        model = small(dropout=0.2, sample_length=validations)
        fit = trainer(tmp_path, max_steps=4, limit_val_batches=validations, val_check_interval=1)
        fit.fit(model, datamodule=ShakespeareData(context=16))
        weights.append((torch.nn.utils.parameters_to_vector(model.parameters()), torch.random.get_rng_state()))
    assert torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[0][1], weights[1][1])


def test_a_diverged_fit_ends_with_a_warning_instead_of_a_crash(tmp_path: Path) -> None:
    """Catches a run that is marked as failed after its last checkpoint because no sample could be drawn."""
    model = small()
    torch.nn.init.constant_(model.net.norm.bias, math.nan)
    with pytest.warns(UserWarning, match="no sample was written"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=ShakespeareData(context=16))
    assert not (tmp_path / "sample.txt").exists()


def test_a_vocabulary_smaller_than_the_data_is_named(tmp_path: Path) -> None:
    """Catches an index error of the embedding, which is a device assert on CUDA."""
    with pytest.raises(ValueError, match=r"model\.vocab_size.*84.*got 50"):
        trainer(tmp_path, max_steps=1).fit(small(vocab_size=50), datamodule=ShakespeareData(context=16))


def test_a_prompt_outside_the_vocabulary_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Catches a run that fails only when it is over."""
    fit = trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"model\.sample_prompt: character '#'"):
        fit.fit(small(sample_prompt="#"), datamodule=ShakespeareData(context=16))
    assert fit.global_step == 0


def test_a_checkpoint_rebuilds_the_model(tmp_path: Path) -> None:
    """Catches hyper-parameters that weights_only loading refuses, or that are not saved."""
    model = small(qk_norm=True)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(model, datamodule=ShakespeareData(context=16))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = CharGPT.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(again.eval()(some_tokens(1, 9)), model.eval()(some_tokens(1, 9)))
