"""Test that a part of a latent's batch draws the noise that it has in the whole batch."""

import itertools

import pytest
import torch
from support import cuda_host
from test_cuda import on_host

import fastlm
from fastlm.ops import latent
from fastlm.ops.latent.call import LatentCall
from fastlm.testing import FLOATS, seeded_normal

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
ROWS, COLUMNS = 9, 7  # Parts begin at elements that are no multiple of 4.
SHARDS = ((0, 3), (3, 4), (4, 9))


def results(mu, logvar, seed, backend, num_samples=None, first=0, sample_stride=None) -> tuple[torch.Tensor, ...]:
    """Return z, kl and the gradients of mu and logvar, of a call that is a part of another or a whole one."""
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    options = {"with_kl": True, "event_dims": 1, "free_bits": 0.1, "low": -1.0, "high": 1.0, "temperature": 0.7}
    place = {"num_samples": num_samples, "first": first, "sample_stride": sample_stride}
    call = LatentCall(mu, logvar, None, None, None, **options, **place)
    z, kl = latent.run("reparameterize_with_kl", call, seed, backend)
    return z, kl, *torch.autograd.grad((z.double().sin().sum() + kl.double().sum()), (mu, logvar))


def assert_parts_are_of_the_whole(dtype, num_samples, seed, backend) -> None:
    mu, logvar = (seeded_normal(i, (ROWS, COLUMNS), dtype) for i in (1, 2))
    whole = results(mu, logvar, seed, backend, num_samples)
    rows_of_z = (slice(None),) * (num_samples is not None)
    for begin, end in SHARDS:
        rows = slice(begin, end)
        if isinstance(seed, torch.Tensor) and seed.dim():
            part = results(mu[rows], logvar[rows], seed[rows], backend, num_samples)
        else:
            part = results(mu[rows], logvar[rows], seed, backend, num_samples, begin * COLUMNS, ROWS * COLUMNS)
        for i, (actual, of_whole) in enumerate(zip(part, whole)):
            expected = of_whole[(*rows_of_z, rows)] if i == 0 else of_whole[rows]
            assert torch.equal(actual, expected), f"result {i} of rows {begin} to {end}"


SEEDS = {"int": -5, "tensor": torch.tensor(2**62 + 3), "per example": torch.arange(ROWS) - 4}
CALLS = pytest.mark.parametrize(("num_samples", "seed"), list(itertools.product((None, 1, 3), SEEDS)))


@CALLS
@DTYPES
def test_a_part_has_the_bits_of_the_whole(dtype, num_samples, seed, isa):
    assert_parts_are_of_the_whole(dtype, num_samples, SEEDS[seed], "cpu")


@CALLS
@DTYPES
def test_a_part_has_the_numbers_of_the_whole_on_the_reference(dtype, num_samples, seed):
    assert_parts_are_of_the_whole(dtype, num_samples, SEEDS[seed], "reference")


@on_host
@CALLS
@DTYPES
def test_a_part_has_the_bits_of_the_whole_in_cuda_s_kernels(dtype, num_samples, seed):
    with cuda_host.use():
        assert_parts_are_of_the_whole(dtype, num_samples, SEEDS[seed], "cuda")


@on_host
def test_a_part_has_the_same_bits_in_cuda_s_kernels_as_on_the_cpu(widest_isa):
    """Parts that begin at a block of four normals, and parts that do not."""
    mu, logvar = (seeded_normal(i, (3, 32), torch.float32) for i in (1, 2))
    for first, stride in ((64, 256), (64, 250), (21, 256), (2**40 + 4, 2**41)):
        expected = results(mu, logvar, 7, "cpu", 3, first, stride)
        with cuda_host.use():
            actual = results(mu, logvar, 7, "cuda", 3, first, stride)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])


def test_a_part_beyond_32_bits_draws_what_stands_there(isa):
    zero = torch.zeros(2, 5)
    call = LatentCall.sample(zero, zero, None, 1.0)._replace(first=2**35 + 3, num_samples=2, sample_stride=2**36 + 1)
    z, _ = latent.run("reparameterize", call, 3, "cpu")
    for sample, position in zip(z, (2**35 + 3, 2**35 + 2**36 + 4)):
        assert torch.equal(sample.flatten(), fastlm.ops.noise.normal((10,), seed=3, position=position, backend="cpu"))


@pytest.mark.parametrize("num_samples", [None, 3])
def test_derivatives_of_any_order_draw_the_noise_of_the_part(num_samples, widest_isa):
    mu, logvar = (seeded_normal(i, (3, COLUMNS), torch.float32) for i in (1, 2))
    call = LatentCall.sample(mu, logvar, None, 0.7)._replace(num_samples=num_samples, first=21, sample_stride=63)

    def sample(backend):
        return lambda mu, logvar: latent.run("reparameterize", call._replace(mu=mu, logvar=logvar), 4, backend)[0]

    tangents = torch.ones_like(mu), torch.ones_like(mu)
    for derivative in (
        lambda z: torch.func.jvp(z, (mu, logvar), tangents)[1],
        lambda z: torch.func.hessian(lambda *x: z(*x).sin().sum(), argnums=1)(mu, logvar),
        lambda z: torch.func.vmap(z, in_dims=(None, 0))(mu, torch.stack([logvar, logvar])),
    ):
        torch.testing.assert_close(derivative(sample("cpu")), derivative(sample("reference")))


def test_a_part_can_be_compiled(widest_isa):
    mu, logvar = (seeded_normal(i, (3, COLUMNS), torch.float32) for i in (1, 2))

    def z(first):
        return latent.run("reparameterize", LatentCall.sample(mu, logvar, None, 1.0)._replace(first=first), 4, None)[0]

    for first in (0, 21, 42):
        assert torch.equal(torch.compile(z, backend="eager", fullgraph=True)(first), z(first))
