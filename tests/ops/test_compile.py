"""Test that torch.compile makes one graph without breaks, and that its forward and backward give the bits of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastlm
from fastlm.testing import seeded_normal

pytestmark = pytest.mark.slow_sanitized


@pytest.fixture(autouse=True)
def fresh_dynamo(widest_isa):
    """Require the C++ kernel, and let no test reuse another's graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(*shape):
    both = seeded_normal(1, (*shape[:-1], 2 * shape[-1]), torch.float32).requires_grad_()
    return both, seeded_normal(2, (shape[-1],), torch.float32).requires_grad_()


def step(both, prior, seed):
    mu, logvar = (both * 2).chunk(2, dim=-1)
    z, kl = fastlm.reparameterize_with_kl(mu, logvar, prior_logvar=prior, seed=seed, free_bits=0.01, num_samples=2)
    return z, kl, fastlm.reparameterize(mu, logvar, seed=seed), fastlm.gaussian_kl(mu, logvar)


def results_of(function, both, prior, seed):
    outputs = function(both, prior, seed)
    gradients = [seeded_normal(5 + i, out.shape, out.dtype) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, (both, prior), gradients)]


@pytest.mark.parametrize("seed", [7, torch.tensor(7), torch.tensor([1, 2, 3, 4, 5])], ids=["int", "tensor", "per example"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_gives_the_bits_of_eager_mode(backend, seed):
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    arguments = (*leaves(5, 33), seed)
    for result, expected in zip(results_of(compiled, *arguments), results_of(step, *arguments)):
        assert torch.equal(result, expected)


def test_one_graph_serves_every_size():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for rows in (2, 7, 64):
        arguments = (*leaves(rows, 16 + rows), torch.tensor(3))
        for result, expected in zip(results_of(compiled, *arguments), results_of(step, *arguments)):
            assert torch.equal(result, expected)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_without_a_seed_each_call_draws_fresh_noise_that_manual_seed_repeats(backend):
    zeros = torch.zeros(5, 33)
    compiled = torch.compile(lambda mu: fastlm.reparameterize(mu, mu), fullgraph=True, backend=backend)
    torch.manual_seed(1)
    first, second = compiled(zeros), compiled(zeros)
    torch.manual_seed(1)
    assert torch.equal(compiled(zeros), first) and torch.equal(compiled(zeros), second)
    assert not torch.equal(first, second)


def test_the_backward_of_a_call_without_a_seed_uses_the_forward_s_noise():
    """z = mu + e^(logvar/2)·eps; so with mu = 0, the gradient of sum(z) for logvar is z / 2."""
    compiled = torch.compile(lambda mu, logvar: fastlm.reparameterize(mu, logvar), fullgraph=True, backend="aot_eager")
    logvar = torch.zeros(5, 33, requires_grad=True)
    z = compiled(torch.zeros(5, 33), logvar)
    z.sum().backward()
    assert torch.equal(logvar.grad, z.detach() / 2)


def test_a_module_compiles_and_trains():
    module = fastlm.nn.GaussianLatent(6, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = seeded_normal(1, (5, 6), torch.float32)
    z, kl = compiled(x, seed=1)
    (z.sum() + kl.sum()).backward()
    gradient, module.linear.weight.grad = module.linear.weight.grad, None
    expected_z, expected_kl = module(x, seed=1)
    (expected_z.sum() + expected_kl.sum()).backward()
    assert torch.equal(z, expected_z) and torch.equal(kl, expected_kl)
    torch.testing.assert_close(gradient, module.linear.weight.grad)


def test_a_bad_call_is_refused_in_a_compiled_function_too():
    compiled = torch.compile(lambda mu: fastlm.gaussian_kl(mu, mu, event_dims=5), backend="aot_eager")
    with pytest.raises(ValueError, match="event_dims"):
        compiled(torch.zeros(3, 4))


# ---- torch.func inside -------------------------------------------------------------------------------------------------------

X, Y = (seeded_normal(i, (1, 2, 9, 8), torch.float32) for i in (1, 2))
LOSSES = {
    "attention": lambda x: fastlm.attention(x, Y, Y).square().sum(),
    "linear": lambda x: fastlm.linear(x, Y[0, 0], backend="cpu").pow(3).sum(),
    "latent": lambda x: sum(out.square().sum() for out in fastlm.reparameterize_with_kl(x, Y, seed=1)),
}
DERIVATIVES = {
    "grad": lambda loss: torch.func.grad(loss),
    "grad of grad": lambda loss: torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum()),
    "jvp": lambda loss: lambda x: torch.func.jvp(loss, (x,), (Y,))[1],
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_derivatives_of_torch_func_inside_are_no_zeros(loss, derivative, widest_isa):
    """Dynamo leaves autograd.Functions out of a torch.func.grad that it traces, so that it must not trace one of ours."""
    derived = derivative(loss)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(derived, backend="aot_eager")(X), derived(X))


def test_a_compiled_backward_is_not_silently_differentiated_again(widest_isa):
    x = X.clone().requires_grad_()
    out, lse, statistics = torch.ops.fastlm.attention(x.detach(), Y, Y, *(None,) * 9, 0.3, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="second order cannot be compiled"):
        torch.ops.fastlm.attention_backward(out, lse, out, lse, statistics, False, False, x, Y, Y, *(None,) * 9, 0.3, 0.0, 0.0)
