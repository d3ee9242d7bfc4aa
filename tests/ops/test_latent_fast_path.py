"""Test that calls of the latent without options give the bits of the ordinary way, and that every other call goes that way."""

import pytest
import torch
from support.wrapped_tensor import Wrapped

import fastlm
from fastlm.backend import cpu as native
from fastlm.backend import triton as triton_kernels
from fastlm.ops.latent import cpu
from fastlm.testing import FLOATS, seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the way to it."""


@pytest.fixture
def ordinary(monkeypatch):
    """Return a function that runs another one without the fast path."""

    def run(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "fast_path", lambda *_: None)
            return function(*args, **options)

    return run


@pytest.fixture
def fast_calls(monkeypatch):
    """Return a list that grows by the name of every C++ function that the fast path calls."""
    calls = []

    def recorded(name):
        function = getattr(native.C, name)
        return lambda *args: (calls.append(name), function(*args))[1]

    for name in ("latent_plain_forward", "latent_plain_backward"):
        monkeypatch.setattr(native.C, name, recorded(name))
    return calls


BOTH = ["latent_plain_forward", "latent_plain_backward"]


def latent(*shape, dtype=torch.float32):
    return tuple(seeded_normal(seed, shape, dtype).requires_grad_() for seed in (1, 2))


def step(mu, logvar, loss=lambda z, kl: z.square().sum() + kl.square().sum(), needed=(0, 1), **options):
    """Return z, kl, the gradients, and the next number of torch's generator."""
    torch.manual_seed(5)
    z, kl = fastlm.reparameterize_with_kl(mu, logvar, **options)
    grads = torch.autograd.grad(loss(z, kl), [(mu, logvar)[i] for i in needed])
    return z.detach(), kl.detach(), *grads, torch.rand(1)


def assert_same_bits(results, expected):
    """Compare bit by bit. An element that was not written is NaN (conftest.py), which equals nothing."""
    assert len(results) == len(expected)
    for actual, wanted in zip(results, expected):
        assert actual.dtype == wanted.dtype and actual.stride() == wanted.stride() and torch.equal(actual, wanted)


# ---- the same bits ----------------------------------------------------------------------------------------------------------

SHAPES = [
    ((32, 100), 1), ((100,), 1), ((), 0), ((1, 1), 1), ((2, 3, 5), 0), ((2, 3, 5), 2), ((2, 3, 5), 3), ((3, 20_000), 1),
    ((1, 2_100_000), 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "event_dims"), SHAPES, ids=str)
def test_the_fast_path_gives_the_bits_of_the_ordinary_way(shape, event_dims, dtype, ordinary, fast_calls):
    mu, logvar = latent(*shape, dtype=dtype)
    expected = ordinary(step, mu, logvar, event_dims=event_dims)
    assert fast_calls == []
    results = step(mu, logvar, event_dims=event_dims)
    assert fast_calls == BOTH
    assert_same_bits(results, expected)


LAYOUTS = {
    "halves of a linear's output": lambda: seeded_normal(1, (32, 200), torch.float32).chunk(2, -1),
    "transposed": lambda: tuple(t.detach().T for t in latent(100, 32)),
    "one of them transposed": lambda: (latent(32, 100)[0].detach(), latent(100, 32)[0].detach().T),
    "stepped": lambda: tuple(t.detach()[:, ::3] for t in latent(4, 30)),
    "expanded": lambda: tuple(t.detach().expand(8, 30) for t in latent(30)),
    "twice the same": lambda: (latent(4, 9)[0].detach(),) * 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_bits_of_the_ordinary_way(layout, ordinary, fast_calls):
    mu, logvar = (t.requires_grad_() for t in LAYOUTS[layout]())
    assert_same_bits(step(mu, logvar), ordinary(step, mu, logvar))
    assert fast_calls == BOTH


@pytest.mark.parametrize("seed", [None, 0, -1, 2**63 - 1, 2**63, 2**64 - 1, torch.tensor(7), torch.arange(4)], ids=str)
def test_any_seed_gives_the_bits_of_the_ordinary_way(seed, ordinary, fast_calls):
    mu, logvar = latent(4, 9)
    assert_same_bits(step(mu, logvar, seed=seed), ordinary(step, mu, logvar, seed=seed))
    assert fast_calls == ([] if isinstance(seed, torch.Tensor) else BOTH)


LOSSES = {
    "z": lambda z, kl: z.square().sum(),
    "kl": lambda z, kl: kl.square().sum(),
    "gradients of stride 0": lambda z, kl: z.sum() + kl.sum(),
    "gradients transposed": lambda z, kl: (z.T.contiguous() * z.T.detach()).sum() + kl.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)])
def test_any_loss_and_input_get_the_gradients_of_the_ordinary_way(loss, needed, ordinary, fast_calls):
    mu, logvar = (t.requires_grad_(i in needed) for i, t in enumerate(latent(32, 100)))
    options = {"loss": LOSSES[loss], "needed": needed, "seed": 3}
    assert_same_bits(step(mu, logvar, **options), ordinary(step, mu, logvar, **options))
    assert fast_calls == BOTH


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients_there_is_no_graph(mode, ordinary, fast_calls):
    mu, logvar = latent(32, 100)
    if mode is torch.enable_grad:
        mu, logvar = mu.detach(), logvar.detach()
    with mode():
        results = fastlm.reparameterize_with_kl(mu, logvar, seed=1)
        expected = ordinary(fastlm.reparameterize_with_kl, mu, logvar, seed=1)
    assert fast_calls == BOTH[:1] and not any(t.requires_grad for t in results)
    assert_same_bits(results, expected)


# ---- the backward -----------------------------------------------------------------------------------------------------------


def test_a_second_derivative_does_not_change_the_first(ordinary):
    mu, logvar = latent(4, 9)

    def gradients(function, **options):
        z, kl = function(mu, logvar, seed=1)
        return torch.autograd.grad(z.square().sum() + kl.square().sum(), (mu, logvar), **options)

    first = gradients(fastlm.reparameterize_with_kl, create_graph=True)
    assert_same_bits(first, gradients(fastlm.reparameterize_with_kl))
    second = torch.autograd.grad(first, (mu, logvar), (mu, logvar))
    expected = gradients(lambda *args, **options: ordinary(fastlm.reparameterize_with_kl, *args, **options), create_graph=True)
    assert_same_bits(second, torch.autograd.grad(expected, (mu, logvar), (mu, logvar)))


def test_changed_inputs_are_refused():
    mu, logvar = latent(4, 9)
    z, _ = fastlm.reparameterize_with_kl(mu, logvar, seed=1)
    with torch.no_grad():
        logvar.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_batched_gradients_are_those_of_each(fast_calls):
    mu, logvar = latent(4, 9)
    outputs = fastlm.reparameterize_with_kl(mu, logvar, seed=1)
    grads = seeded_normal(3, (5, 4, 9), torch.float32), seeded_normal(4, (5, 4), torch.float32)
    batched = torch.autograd.grad(outputs, (mu, logvar), grads, is_grads_batched=True, retain_graph=True)
    assert fast_calls == BOTH[:1]
    for i in range(5):
        each = torch.autograd.grad(outputs, (mu, logvar), [grad[i] for grad in grads], retain_graph=True)
        assert torch.equal(batched[0][i], each[0]) and torch.equal(batched[1][i], each[1])


def test_a_profiler_sees_the_op_of_the_backward():
    mu, logvar = latent(4, 9)
    expected = step(mu, logvar, seed=1)[2:4]
    z, kl = fastlm.reparameterize_with_kl(mu, logvar, seed=1)
    with torch.autograd.profiler.profile() as profile:
        grads = torch.autograd.grad(z.square().sum() + kl.square().sum(), (mu, logvar))
    assert "fastlm::reparameterize_backward" in {event.name for event in profile.function_events}
    assert_same_bits(grads, expected)


# ---- calls that go the ordinary way -----------------------------------------------------------------------------------------

MU = torch.zeros(3, 5)
OTHERS = {
    "None": {"mu": None},
    "a list": {"logvar": [0.0]},
    "integers": {"mu": MU.int(), "logvar": MU.int()},
    "two dtypes": {"logvar": MU.double()},
    "two shapes": {"logvar": MU[:1]},
    "nothing": {"mu": MU[:0], "logvar": MU[:0]},
    "meta": {"mu": MU.to("meta"), "logvar": MU.to("meta")},
    "sparse": {"logvar": MU.to_sparse()},
    "a subclass": {"mu": Wrapped(MU)},
    "too many event_dims": {"event_dims": 3},
    "too few event_dims": {"event_dims": -1},
    "a bool for event_dims": {"event_dims": True},
    "a float for event_dims": {"event_dims": 1.0},
    "a bool for seed": {"seed": True},
    "a float for seed": {"seed": 1.0},
    "a seed out of range": {"seed": 2**64},
    "a tensor for seed": {"seed": torch.tensor(1)},
    "reference": {"backend": "reference"},
    "an unknown backend": {"backend": "gpu"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_any_other_call_goes_the_ordinary_way_and_draws_nothing(other):
    state = torch.get_rng_state()
    call = {"mu": MU, "logvar": MU, "event_dims": 1, "seed": None, "backend": None}
    assert cpu.fast_path(**call) is not None
    torch.set_rng_state(state)
    assert cpu.fast_path(**{**call, **OTHERS[other]}) is None
    assert torch.equal(torch.get_rng_state(), state)


OPTIONS = {
    "prior_mu": MU[0], "prior_logvar": MU[0], "free_bits": 0.1, "logvar_clamp": (-1.0, 1.0), "num_samples": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_goes_the_ordinary_way(name, fast_calls):
    fastlm.reparameterize_with_kl(MU, MU, **{name: OPTIONS[name]})
    assert fast_calls == []


def test_explain_names_the_backend_and_draws_nothing(fast_calls):
    state = torch.get_rng_state()
    explained = fastlm.explain(fastlm.reparameterize_with_kl, MU, MU)
    assert explained.backend == "cpu" and fast_calls == [] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("default", ["reference", "gpu"])
def test_the_default_backend_is_heeded(default, monkeypatch):
    monkeypatch.setattr(cpu, "DEFAULT", default)
    assert cpu.fast_path(MU, MU, 1, 1, None) is None and cpu.fast_path(MU, MU, 1, 1, "cpu") is not None


def test_without_the_module_the_reference_runs(monkeypatch):
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "load_error", "it is missing")
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    assert fastlm.explain(fastlm.reparameterize_with_kl, MU, MU).backend == "reference"
    assert cpu.fast_path(MU, MU, 1, 1, None) is None
