"""Test that large samples of torch.distributions draw fastlm's noise inside a block, and only there."""

import threading

import pytest
import torch
from torch import distributions
from torch.distributions.utils import _standard_normal as imported_before
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.nn.use import LEAST_NOISE
from fastlm.testing import seeded_normal

SHAPE = (LEAST_NOISE // 64, 64)


def noise_of(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the reference's normals of the seed that torch's generator gives after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    zeros = torch.zeros(shape, dtype=dtype)
    return fastlm.reparameterize(zeros, zeros, seed=torch.randint(2**63 - 1, ()), backend="reference")


def leaves(dtype=torch.float32):
    loc, scale = (seeded_normal(seed, SHAPE, dtype) for seed in (1, 2))
    return loc.requires_grad_(), scale.abs().add(0.1).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sample_is_torch_s_of_other_noise(dtype):
    loc, scale = leaves(dtype)
    eps = noise_of(7, dtype=dtype)
    torch.manual_seed(7)
    with fastlm.use() as report:
        sample = distributions.Normal(loc, scale).rsample()
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype is torch.float64 else {}  # The normals are float32's.
    torch.testing.assert_close(sample, loc + scale * eps, **tolerance)
    weights = seeded_normal(3, SHAPE, dtype)
    grads = torch.autograd.grad(sample, (loc, scale), weights)
    torch.testing.assert_close(grads, (weights, weights * eps), **tolerance)
    assert report.drawn == 1 and "1 samples drew fastlm's noise" in str(report)


def sample_of(make):
    torch.manual_seed(5)
    return make().rsample()


def normal_of(shape):
    return distributions.Normal(torch.zeros(shape), torch.ones(shape))


LARGE = {
    "Independent": lambda: distributions.Independent(normal_of(SHAPE), 1),
    "LogNormal": lambda: distributions.LogNormal(torch.zeros(SHAPE), torch.ones(SHAPE)),
    "MultivariateNormal": lambda: distributions.MultivariateNormal(torch.zeros(SHAPE), torch.eye(64)),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_what_is_made_of_normals_gains(make):
    outside = sample_of(make)
    with fastlm.use() as report:
        first, second = sample_of(make), sample_of(make)
    assert report.drawn == 2 and torch.equal(first, second) and not torch.equal(first, outside)
    assert torch.equal(sample_of(make), outside)
    inner = first.log() if make is LARGE["LogNormal"] else first
    assert inner.mean().abs() < 0.05 and (inner.std() - 1).abs() < 0.05


def test_torch_draws_all_else():
    """Small samples, those on other devices, of transforms and of tracers are torch's."""
    small = [sample_of(lambda: normal_of((8, 4)))]
    with fastlm.use() as report:
        small.append(sample_of(lambda: normal_of((8, 4))))
        assert torch.equal(*small)
        assert imported_before(SHAPE, torch.float32, torch.device("meta")).is_meta
        torch.func.grad(lambda loc: distributions.Normal(loc, 1.0).rsample().sum())(torch.zeros(SHAPE))
        with torch._subclasses.FakeTensorMode():
            assert isinstance(imported_before(SHAPE, torch.float32, torch.device("cpu")), torch._subclasses.FakeTensor)
    assert report.drawn == 0


def test_a_checkpoint_draws_the_same_again():
    loc, scale = leaves()
    with fastlm.use() as report:
        torch.manual_seed(1)
        sample = checkpoint(lambda *args: distributions.Normal(*args).rsample().square(), loc, scale, use_reentrant=False)
        grad = torch.autograd.grad(sample.sum(), loc)[0]
        torch.manual_seed(1)
        expected = torch.autograd.grad(distributions.Normal(loc, scale).rsample().square().sum(), loc)[0]
    torch.testing.assert_close(grad, expected)
    assert report.drawn == 3


def test_other_threads_draw_torch_s():
    drawn = []
    outside = sample_of(lambda: normal_of(SHAPE))
    with fastlm.use():
        thread = threading.Thread(target=lambda: drawn.append(sample_of(lambda: normal_of(SHAPE))))
        thread.start()
        thread.join()
    assert torch.equal(drawn[0], outside)
