"""The loss as a function of the weights: exact products with the Hessian, and a module that is left as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stabletrain.landscape.objective import Objective


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 2))


def state(module: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in (*module.parameters(), *module.buffers())]


def loss_of(module: nn.Module, seed: int = 1) -> Callable[[], Tensor]:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return lambda: F.cross_entropy(module(inputs), inputs[:, 0].gt(0).long())


@pytest.mark.parametrize("batch_stats", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_buffers_modes_gradients_and_generators_are_put_back(batch_stats: bool, fails: bool) -> None:
    """Bugs: running statistics that moved, dropout left off, a gradient left behind, random numbers drawn."""
    module = normed().train()
    module[4].eval()
    before, random = state(module), torch.get_rng_state()
    objective = Objective(module, [loss_of(module)], batch_stats=batch_stats)
    try:
        with objective.opened():
            objective.move([torch.full_like(each, torch.nan) for each in objective.parameters])
            objective.loss()
            objective.product(torch.ones(objective.size))
            torch.rand(1)
            assert not module[2].training
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(torch.equal(a, b) for a, b in zip(before, state(module), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert [each.training for each in module] == [True, True, True, True, False]
    assert all(p.grad is None for p in module.parameters())


def test_the_loss_is_a_function_of_the_weights_alone() -> None:
    """Bugs: noise in training_step, or statistics of an earlier evaluation, makes a surface of what is flat."""
    module, inputs = normed(), torch.ones(8, 4)

    def noisy() -> Tensor:
        return F.cross_entropy(module(inputs + torch.randn(8, 4)), torch.arange(8) % 2)

    objective = Objective(module, [noisy, noisy], batch_stats=True)
    with objective.opened():
        first = objective.loss()
        objective.move([2 * each for each in objective.weights()])
        assert objective.loss() != first
        objective.move([each / 2 for each in objective.weights()])
        assert objective.loss() == first
    assert objective.passes == 6


class Recurrent(nn.Module):
    """Carries a state from batch to batch in an attribute that no state_dict contains."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.RNNCell(4, 3), None

    def forward(self, inputs: Tensor) -> Tensor:
        state = self.cell(inputs, self.state)
        self.state = state.detach()
        return state


def test_a_state_that_is_carried_on_begins_anew_at_each_evaluation() -> None:
    """Bug: neighbouring points of a plane differ since a recurrent state has gone on."""
    torch.manual_seed(0)
    module = Recurrent()
    loss = loss_of(module)
    objective = Objective(module, [loss, loss])
    with objective.opened():
        first = objective.loss()
        assert objective.loss() == first
        objective.product(torch.ones(objective.size))
        assert objective.loss() == first
    assert module.state is None


class Counting(nn.Linear):
    """Registers another tensor as its buffer in each forward pass, and has a buffer that cannot be written in place."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("ones", torch.ones(1).expand(2), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(inputs) * self.calls * self.ones


def test_buffers_that_a_forward_pass_replaces_are_put_back() -> None:
    """Bugs: only the tensor that was registered first is put back; an expanded buffer ends everything."""
    module = Counting()
    registered = module.calls
    objective = Objective(module, [loss_of(module), loss_of(module, 2)])
    with objective.opened():
        objective.move(objective.weights(), objective.fixed())
        assert objective.loss() == objective.loss()
    assert module.calls is registered
    assert module.calls == 0


def test_batch_statistics_are_another_function() -> None:
    """Bug: --batch-stats changes nothing."""
    module = normed().train()
    for _ in range(3):
        loss_of(module, seed=5)()
    found = []
    for batch_stats in (False, True):
        objective = Objective(module, [loss_of(module)], batch_stats=batch_stats)
        with objective.opened():
            found.append(objective.loss())
    module[2].p = 0.0
    assert found[1] == pytest.approx(loss_of(module)().item())
    assert found[0] != pytest.approx(found[1], rel=1e-3)


class Attention(nn.Module):
    """Calls the fused kernel of the CPU, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v = self.qkv(inputs.view(-1, 1, 4, 4)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).mean((1, 2)).repeat_interleave(4, 0)


def dense(module: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """The Hessian of a loss by torch.func, (size, size)."""
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor:
            return loss()

    def at(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), shapes, strict=True)
        return functional_call(Wrapped(), {f"module.{n}": part.view(shape) for n, part, shape in parts}, ())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found: Tensor = jacrev(jacrev(at))(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    return found


@pytest.mark.parametrize("make", [normed, Attention])
def test_products_are_those_of_the_dense_hessian(make: Callable[[], nn.Module]) -> None:
    """Bugs: a kernel without a second derivative; a batch left out of the mean; parameters in another order."""
    torch.manual_seed(0)
    module = make().eval()
    losses = [loss_of(module, seed) for seed in (1, 2)]
    objective = Objective(module, losses)
    expected = (dense(module, losses[0]) + dense(module, losses[1])) / 2
    vector = torch.randn(objective.size)
    with objective.opened():
        found = objective.product(vector)
    assert not objective.by_differences
    assert torch.allclose(found, expected @ vector, atol=1e-5)


class Square(torch.autograd.Function):
    """x squared, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * gradient


def test_without_a_second_derivative_gradients_are_differenced() -> None:
    """Bug: the Hessian of a module that ends in a function of its own is zero, without an error of torch."""
    layer = nn.Linear(3, 1)
    inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    objective = Objective(layer, [lambda: Square.apply(layer(inputs)).mean()])
    vector = torch.tensor([1.0, -2.0, 0.5, 3.0])
    extended = torch.cat([inputs, torch.ones(10, 1)], 1)
    before = state(layer)
    with objective.opened():
        found = objective.product(vector)
        assert all(torch.equal(a, b) for a, b in zip(before, state(layer), strict=True))
    assert objective.by_differences
    assert torch.allclose(found, 2 * extended.T @ extended @ vector / 10, rtol=1e-2, atol=1e-2)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.use_reentrant = nn.Linear(4, 5), nn.Linear(5, 2), use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        if self.use_reentrant is None:
            return self.second(self.first(inputs).tanh())
        hidden = checkpoint(lambda x: self.first(x).tanh(), inputs, use_reentrant=self.use_reentrant)
        return self.second(hidden)


def test_weights_within_activation_checkpoints_have_their_part_of_the_hessian() -> None:
    """Bug: a reentrant checkpoint's weights seem to be unused, and the Hessian lacks their rows without an error."""
    found = []
    for use_reentrant in (None, False, True):
        module = Checkpointed(use_reentrant)
        objective = Objective(module, [loss_of(module)])
        with objective.opened():
            found.append(objective.product(torch.linspace(-1, 1, objective.size)))
        assert all(p.grad is None for p in module.parameters())
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=2e-3)


def test_a_loss_with_a_gradient_in_it_and_sparse_gradients() -> None:
    """Bugs: a gradient penalty has no graph to differentiate; a sparse gradient cannot be joined with the others."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table, layer = nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)
        module = nn.ModuleList([table, layer])

        def loss(table: nn.Module = table, layer: nn.Module = layer) -> Tensor:
            inputs = table(torch.arange(5))
            value = F.cross_entropy(layer(inputs), torch.arange(5) % 2)
            (gradient,) = torch.autograd.grad(value, layer.weight, create_graph=True)
            return value + gradient.square().sum()

        objective = Objective(module, [loss])
        with objective.opened():
            found.append((objective.loss(), objective.product(torch.linspace(-1, 1, objective.size))))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_an_exception_of_the_module_is_not_hidden() -> None:
    """Bug: a bug in the user's forward is taken for a missing second derivative."""
    layer = nn.Linear(2, 2)

    def broken() -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    objective = Objective(layer, [broken])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), objective.opened():
        objective.product(torch.ones(objective.size))
    assert not objective.by_differences
