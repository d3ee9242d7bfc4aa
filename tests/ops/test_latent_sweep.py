"""Test the latent's functions on random calls: shapes, strides, dtypes, priors, options, seeds, gradients."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.oracle import Oracle, noisy_results, output_gradients

import fastlm
from fastlm.reference.latent import kl_divergence
from fastlm.testing import FLOATS, seeded_normal

DIFFERENTIABLE = ("mu", "logvar", "prior_mu", "prior_logvar")
SIZES = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13, 17, 33, 67])
SHAPES = st.lists(SIZES, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 4_000)
LAYOUTS = ("contiguous", "chunk", "transposed", "stepped", "offset", "expanded")
CLAMPS = [None, None, (-0.75, 0.5), (-math.inf, 1.0), (0.25, 0.25)]
SEEDS = st.integers(-(2**63), 2**64 - 1)


def laid_out(layout: str, shape: tuple, dtype, seed: int, dim: int) -> torch.Tensor:
    """Make normals of a shape, in memory as ``layout`` says, along ``dim`` if there is a choice."""

    def normals(*sizes):
        return seeded_normal(seed, sizes, dtype)

    if not shape or layout == "contiguous":
        return normals(*shape)
    before, size, after = shape[:dim], shape[dim], shape[dim + 1 :]
    if layout == "chunk":
        return normals(*before, 2 * size, *after).narrow(dim, size, size)
    if layout == "transposed":
        swapped = list(shape)
        swapped[0], swapped[dim] = swapped[dim], swapped[0]
        return normals(*swapped).transpose(0, dim)
    if layout == "stepped":
        return normals(*before, 3 * size, *after)[(slice(None),) * dim + (slice(1, None, 3),)]
    if layout == "offset":  # Contiguous; the address is a multiple of only the element's size.
        return normals(math.prod(shape) + 1)[1:].view(shape)
    return normals(*before, 1, *after).expand(shape)


@st.composite
def latents(draw, shape: tuple, dtype) -> torch.Tensor:
    layout, dim = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, max(0, len(shape) - 1)))
    return laid_out(layout, shape, dtype, draw(st.integers(0, 9)), dim)


@st.composite
def priors(draw, shape: tuple) -> torch.Tensor | None:
    """Draw None, or normals of any dtype that lack some leading dimensions of ``shape`` and have size 1 in others."""
    if draw(st.booleans()):
        return None
    own = tuple(draw(st.sampled_from([1, size, size])) for size in shape[draw(st.integers(0, len(shape))) :])
    return draw(latents(own, draw(st.sampled_from(FLOATS))))


@st.composite
def seeds(draw, shape: tuple):
    kind = draw(st.sampled_from(["int", "tensor", "per example"] if shape else ["int", "tensor"]))
    if kind == "int":
        return draw(SEEDS)
    numbers = st.integers(-(2**63), 2**63 - 1)
    if kind == "tensor":
        return torch.tensor(draw(numbers))
    first = draw(numbers.filter(lambda n: n < 2**63 - 200))
    return (torch.arange(shape[0]) + first).repeat_interleave(2)[::2]  # strided


@st.composite
def kl_calls(draw) -> dict:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(FLOATS))
    return {
        "mu": draw(latents(shape, dtype)),
        "logvar": draw(latents(shape, dtype)),
        "prior_mu": draw(priors(shape)),
        "prior_logvar": draw(priors(shape)),
        "event_dims": draw(st.integers(0, len(shape))),
        "free_bits": draw(st.sampled_from([0.0, 0.0, 0.05, 0.7])),
        "logvar_clamp": draw(st.sampled_from(CLAMPS)),
    }


def output_gradients_laid_out(layout):
    """Return a function that makes the outputs' gradients with other strides: one expanded number (as of sum) or transposed."""

    def make(outputs, dtype):
        gradients = output_gradients(outputs, dtype)
        if layout == "transposed":
            return [g.mT.contiguous().mT if g.dim() > 1 else g for g in gradients]
        if layout == "expanded":
            return [seeded_normal(7, (), dtype).to(g.dtype).expand(g.shape) for g in gradients]
        return gradients

    return make


def assume_clear_of_free_bits(call: dict) -> None:
    """Reject examples whose KL may round to the other side of free_bits. The gradient changes there, which is no error."""
    if call["free_bits"] == 0.0:
        return
    mu, logvar, prior_mu, prior_logvar = (None if call[n] is None else call[n].double() for n in DIFFERENTIABLE)
    if call["logvar_clamp"]:
        logvar = logvar.clamp(*call["logvar_clamp"])
    kl = kl_divergence(mu, logvar, prior_mu, prior_logvar, event_dims=0, free_bits=0.0)
    assume(not ((kl - call["free_bits"]).abs() < 1e-4 * (1 + kl)).any())


def check(function, call: dict, layout: str) -> None:
    differentiable = tuple(name for name in DIFFERENTIABLE if name in call)
    oracle = Oracle(function, call, differentiable, noisy_results(function.__name__), output_gradients_laid_out(layout))
    oracle.check(backend="cpu")


GRADIENT_LAYOUTS = st.sampled_from(["contiguous", "transposed", "expanded"])


@settings(max_examples=400)
@given(st.data())
def test_reparameterize_with_kl_anywhere(widest_isa, data):
    call = data.draw(kl_calls())
    assume_clear_of_free_bits(call)
    call["seed"] = data.draw(seeds(tuple(call["mu"].shape)))
    call["num_samples"] = data.draw(st.sampled_from([None, None, 1, 2, 5]))
    check(fastlm.reparameterize_with_kl, call, data.draw(GRADIENT_LAYOUTS))


@settings(max_examples=200)
@given(kl_calls(), GRADIENT_LAYOUTS)
def test_gaussian_kl_anywhere(widest_isa, call, layout):
    assume_clear_of_free_bits(call)
    check(fastlm.gaussian_kl, call, layout)


@settings(max_examples=200)
@given(st.data())
def test_reparameterize_anywhere(widest_isa, data):
    shape, dtype = data.draw(SHAPES), data.draw(st.sampled_from(FLOATS))
    call = {name: data.draw(latents(shape, dtype)) for name in ("mu", "logvar")}
    call["seed"], call["temperature"] = data.draw(seeds(shape)), data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.7]))
    check(fastlm.reparameterize, call, data.draw(GRADIENT_LAYOUTS))


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("dims", [11, 12, 13, 16])
def test_tensors_of_very_many_dimensions(dims, num_samples, isa):
    shape = (2, 3, 2) + (1,) * (dims - 6) + (2, 1, 5)
    mu, logvar = (seeded_normal(seed, shape, torch.float32).transpose(0, -1) for seed in (1, 2))
    call = {"mu": mu, "logvar": logvar, "seed": 1, "event_dims": dims - 1, "num_samples": num_samples}
    call["prior_mu"] = seeded_normal(3, (3,) + (1,) * (dims - 2), torch.float32)
    call["prior_logvar"] = seeded_normal(4, (2, 1, 2), torch.float32)
    check(fastlm.reparameterize_with_kl, call, "contiguous")


@pytest.mark.parametrize("wanted", ["z", "kl"])
@pytest.mark.parametrize("num_samples", [None, 3])
def test_a_loss_may_use_one_of_the_outputs_alone(wanted, num_samples, isa):
    mu, logvar = (seeded_normal(seed, (4, 9), torch.float32).requires_grad_() for seed in (1, 2))

    def gradients(backend):
        z, kl = fastlm.reparameterize_with_kl(mu, logvar, seed=1, num_samples=num_samples, backend=backend)
        return torch.autograd.grad((z if wanted == "z" else kl).sum(), (mu, logvar))

    for actual, expected in zip(gradients("cpu"), gradients("reference")):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [3, 5000, 1_000_000])
def test_the_gradient_of_a_sum_is_read_in_place(rows, widest_isa):
    """sum() passes on one number with stride 0. No copy of it may be read after it is freed."""
    mu, logvar = (seeded_normal(seed, (rows, 2), torch.float32).requires_grad_() for seed in (1, 2))
    fastlm.gaussian_kl(mu, logvar, backend="cpu").sum().backward()
    torch.testing.assert_close(mu.grad, mu.detach())
    torch.testing.assert_close(logvar.grad, torch.expm1(logvar.detach()) / 2)


@pytest.mark.parametrize("rows", [3, 5000, 100_000])
def test_strided_seeds_are_read_as_their_contiguous_copies(rows, widest_isa):
    mu, logvar = (seeded_normal(seed, (rows, 2), torch.float32).requires_grad_() for seed in (1, 2))
    seeds = torch.arange(2 * rows)
    strided, contiguous = seeds[::2], seeds[::2].clone()
    results = [fastlm.reparameterize(mu, logvar, seed=seed, backend="cpu") for seed in (strided, contiguous)]
    gradients = [torch.autograd.grad(z.sum(), logvar)[0] for z in results]
    assert torch.equal(*results) and torch.equal(*gradients)


@pytest.mark.parametrize("needed", DIFFERENTIABLE)
def test_only_the_gradients_asked_for_are_given(needed, isa):
    tensors = {name: seeded_normal(seed, (4, 9), torch.float32) for seed, name in enumerate(DIFFERENTIABLE)}
    tensors[needed].requires_grad_()
    z, kl = fastlm.reparameterize_with_kl(**tensors, seed=1, backend="cpu")
    (z.sum() + kl.sum()).backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [needed]


def test_views_of_one_tensor_are_read_in_place(isa):
    """The views are the two halves of a Linear's output. Their neighbours in memory stay as they were."""
    both = seeded_normal(1, (64, 2 * 129), torch.float32)
    before = both.clone()
    mu, logvar = both.chunk(2, dim=-1)
    z, kl = fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend="cpu")
    copies = fastlm.reparameterize_with_kl(mu.contiguous(), logvar.contiguous(), seed=1, backend="cpu")
    assert torch.equal(z, copies[0]) and torch.equal(kl, copies[1]) and torch.equal(both, before)
    assert z.is_contiguous() and kl.is_contiguous()
