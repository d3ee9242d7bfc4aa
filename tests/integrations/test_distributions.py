"""fastlm's Normal agrees with torch's: samples, gradients, densities and KL, alone and in torch.distributions' machinery."""

import copy
import math

import mpmath
import pytest
import torch
from support.libraries import Ops, assert_held
from support.wrapped_tensor import Wrapped
from torch import distributions
from torch.distributions import Independent, TransformedDistribution, kl_divergence

from fastlm.integrations.distributions import Normal
from fastlm.ops.noise import normal
from fastlm.testing import FLOATS, ULPS, seeded_normal

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel."""


def parameters(*shape, dtype=torch.float32, seed=1):
    """Draw loc and scale as leaves, with scales from 0.05 to a few."""
    loc, scale = seeded_normal(seed, shape, dtype), (seeded_normal(seed + 1, shape, torch.float64).abs() + 0.05).to(dtype)
    return loc.requires_grad_(), scale.requires_grad_()


def torch_rsample(loc, scale, eps):
    """Compute torch.distributions.Normal.rsample from given noise."""
    return loc + eps.to(loc.dtype) * scale


def with_gradients(sample, leaves, names=("loc", "scale")):
    gradient = seeded_normal(9, sample.shape, torch.float32).to(sample.dtype)
    grads = torch.autograd.grad(sample, leaves, gradient)
    return {"sample": sample.detach(), **{f"gradient of {name}": grad for name, grad in zip(names, grads)}}


def doubled(*leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


# ---- samples ----------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)], ids=str)
def test_a_sample_and_its_gradients_are_torch_s_of_the_same_noise(dtype, sample_shape):
    leaves = parameters(4, 37, dtype=dtype)
    with Ops() as ops:
        actual = with_gradients(Normal(*leaves).rsample(sample_shape, seed=7), leaves)
    assert ops.fastlm == ["reparameterize"] * 2  # the forward, and the backward, which draws the noise again
    eps = normal((*sample_shape, 4, 37), seed=7)
    plain = with_gradients(torch_rsample(*leaves, eps), leaves)
    others = doubled(*leaves)
    assert actual["sample"].dtype == dtype
    assert_held(actual, plain, with_gradients(torch_rsample(*others, eps), others))


def test_parameters_broadcast_and_numbers_are_parameters():
    loc, scale = torch.zeros(3, 1, requires_grad=True), torch.tensor([0.5, 2.0], requires_grad=True)
    sample = Normal(loc, scale).rsample((5,), seed=1)
    eps = normal((5, 3, 2), seed=1)
    assert torch.equal(sample, eps * torch.tensor([0.5, 2.0]))
    sample.sum().backward()
    assert loc.grad.tolist() == [[10.0]] * 3 and scale.grad.shape == (2,)
    torch.testing.assert_close(scale.grad, eps.sum((0, 1)))
    assert torch.equal(Normal(0, 1).sample((4,), seed=2), normal((4,), seed=2))
    assert Normal(0.0, torch.ones(3)).sample(seed=2).shape == (3,)


def test_the_sample_is_right_for_scales_that_logarithms_would_blur():
    loc, scale = torch.zeros(6), torch.tensor([1e-30, 1e-6, 1.0, 1e30, 0.0, -2.0], requires_grad=True)
    sample = Normal(loc, scale, validate_args=False).rsample(seed=3)
    eps = normal((6,), seed=3)
    assert torch.equal(sample, eps * scale)
    (gradient,) = torch.autograd.grad(sample.sum(), scale)
    assert torch.equal(gradient, eps)


def test_a_scale_that_is_not_positive_is_refused_as_by_torch():
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="parameter scale"):
            Normal(torch.zeros(2), torch.tensor([1.0, scale]), validate_args=True)


@pytest.mark.parametrize(
    ("loc", "options", "error", "message"),
    [
        (torch.tensor([1, 2]), {}, TypeError, "loc must be float32.*int64"),
        (torch.zeros(3), {"seed": 1.5}, TypeError, "seed must be an int"),
        (torch.zeros(3), {"seed": torch.arange(2)}, ValueError, r"seed must be 0-d or of shape \(3,\)"),
    ],
)
def test_what_can_not_be_sampled_is_named(loc, options, error, message):
    with pytest.raises(error, match=message):
        Normal(loc, torch.ones_like(loc)).rsample(**options)


def test_samples_of_an_example_with_a_seed_of_its_own_do_not_depend_on_the_batch():
    loc, scale = parameters(5, 2, 9)
    seeds = torch.arange(5)
    whole = Normal(loc, scale).sample((2, 3), seed=seeds)
    for i in range(5):
        assert torch.equal(whole[:, :, i], Normal(loc[i], scale[i]).sample((2, 3), seed=i))
    gradient = seeded_normal(4, whole.shape, torch.float32)
    grads = torch.autograd.grad(Normal(loc, scale).rsample((2, 3), seed=seeds), (loc, scale), gradient)
    eps = (whole - loc) / scale
    torch.testing.assert_close(grads[1], (gradient * eps).sum((0, 1)))
    torch.testing.assert_close(grads[0], gradient.sum((0, 1)))


def test_manual_seed_repeats_a_sample_and_the_next_is_another():
    posterior = Normal(*parameters(4, 5))
    torch.manual_seed(1)
    first, second = posterior.rsample(), posterior.rsample()
    torch.manual_seed(1)
    assert torch.equal(posterior.sample(), first) and not torch.equal(first, second)
    assert first.requires_grad and not posterior.sample().requires_grad


def test_no_noise_is_kept_for_the_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Normal(*parameters(64, 64)).rsample((8,))
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.int64, 1)]


def test_the_noise_is_standard_normal():
    """Mean, variance, skewness and excess kurtosis of a million draws are within five standard errors of 0, 1, 0 and 0."""
    count = 1_000_000
    draws = (Normal(torch.full((10,), 3.0), 0.25).sample((count // 10,), seed=5).double().flatten() - 3) / 0.25
    for power, expected, error in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((draws**power).mean() - expected) < 5 * error / math.sqrt(count)


def test_derivatives_of_the_derivatives_are_torch_s():
    leaves = doubled(*parameters(3, 4))
    assert torch.autograd.gradcheck(lambda *leaves: Normal(*leaves, validate_args=False).rsample((2,), seed=1), leaves)
    assert torch.autograd.gradgradcheck(lambda *leaves: Normal(*leaves, validate_args=False).rsample((2,), seed=1) ** 2, leaves)


def test_it_works_under_compile_and_vmap():
    loc, scale = parameters(4, 6)

    def step(loc, scale):
        posterior = Normal(loc, scale, validate_args=False)
        return posterior.rsample(seed=1), kl_divergence(posterior, distributions.Normal(0.0, 1.0, validate_args=False))

    expected = step(loc, scale)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(loc, scale)
    grads = [torch.autograd.grad(sum(out.sum() for out in outs), (loc, scale)) for outs in (expected, compiled)]
    for a, b in zip((*expected, *grads[0]), (*compiled, *grads[1])):
        torch.testing.assert_close(a, b)
    mapped = torch.func.vmap(lambda loc, scale: step(loc, scale)[1])(loc, scale)
    torch.testing.assert_close(mapped, expected[1])
    each = torch.func.vmap(lambda loc, scale, seed: Normal(loc, scale, validate_args=False).rsample(seed=seed))
    torch.testing.assert_close(each(loc, scale, torch.arange(4)), Normal(loc, scale).rsample(seed=torch.arange(4)))


# ---- torch.distributions' machinery ---------------------------------------------------------------------------------------


def test_expand_independent_and_transformed_sample_by_the_kernel():
    loc, scale = parameters(3)
    wide = Normal(loc, scale).expand((4, 3))
    assert type(wide) is Normal and wide.batch_shape == (4, 3)
    several = Independent(Normal(*parameters(4, 3)), 1)
    log_normal = TransformedDistribution(Normal(loc, scale), distributions.ExpTransform())
    for distribution in (wide, several, log_normal, several.expand((2, 4))):
        with Ops() as ops:
            sample = distribution.rsample((5,))
        assert ops.fastlm == ["reparameterize"]
        assert sample.shape == (5, *distribution.batch_shape, *distribution.event_shape)
    assert several.log_prob(several.sample()).shape == (4,)


def test_log_prob_cdf_entropy_and_the_rest_are_torch_s():
    loc, scale = parameters(4, 5)
    ours, torch_s, value = Normal(loc, scale), distributions.Normal(loc, scale), seeded_normal(4, (4, 5), torch.float32)
    for method in ("log_prob", "cdf"):
        assert torch.equal(getattr(ours, method)(value), getattr(torch_s, method)(value))
    assert torch.equal(ours.entropy(), torch_s.entropy()) and torch.equal(
        ours.icdf(value.sigmoid()), torch_s.icdf(value.sigmoid())
    )
    assert torch.equal(ours.mean, loc) and torch.equal(ours.variance, torch_s.variance) and torch.equal(ours.mode, loc)
    assert isinstance(ours, distributions.Normal) and repr(ours) == repr(torch_s)


def test_a_deep_copy_samples_the_same():
    ours = Normal(*(leaf.detach() for leaf in parameters(4, 5)))
    assert torch.equal(copy.deepcopy(ours).sample(seed=1), ours.sample(seed=1))


# ---- the KL divergence ------------------------------------------------------------------------------------------------------


def kl_with_gradients(make_p, make_q, leaves):
    kl = kl_divergence(make_p(*leaves[:2]), make_q(*leaves[2:]))
    gradient = seeded_normal(9, kl.shape, torch.float32).to(kl.dtype)
    grads = torch.autograd.grad(kl, leaves, gradient)
    return {"kl": kl.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads)}}


PAIRS = pytest.mark.parametrize(
    ("make_p", "make_q"),
    [(Normal, Normal), (Normal, distributions.Normal), (distributions.Normal, Normal)],
    ids=["ours, ours", "ours, torch's", "torch's, ours"],
)


@DTYPES
@PAIRS
def test_the_kl_and_its_gradients_are_torch_s(dtype, make_p, make_q):
    leaves = (*parameters(4, 50, dtype=dtype), *parameters(50, dtype=dtype, seed=5))
    with Ops() as ops:
        actual = kl_with_gradients(make_p, make_q, leaves)
    assert ops.fastlm == ["reparameterize"]
    plain = kl_with_gradients(distributions.Normal, distributions.Normal, leaves)
    golden = kl_with_gradients(distributions.Normal, distributions.Normal, doubled(*leaves))
    assert actual["kl"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_held(actual, plain, golden)


def test_no_other_kl_of_torch_s_is_changed():
    assert torch.equal(
        kl_divergence(Normal(0.0, 1.0), distributions.Laplace(0.0, 1.0)),
        kl_divergence(distributions.Normal(0.0, 1.0), distributions.Laplace(0.0, 1.0)),
    )


def exact_kl(p_loc, p_scale, q_loc, q_scale) -> float:
    """Compute the KL in 50 digits by the textbooks' formula."""
    with mpmath.workdps(50):
        p_loc, p_scale, q_loc, q_scale = map(mpmath.mpf, (p_loc, p_scale, q_loc, q_scale))
        r2, d = (p_scale / q_scale) ** 2, (p_loc - q_loc) / q_scale
        return float((d * d + r2 - 1 - mpmath.log(r2)) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_right_to_its_last_bits_from_equality_to_scales_far_apart(dtype):
    ratios = torch.logspace(-7, 4, 300, dtype=torch.float64)
    q_scale = torch.tensor([1e-3, 0.3, 700.0], dtype=dtype)[:, None].expand(3, 600)
    p_scale = (q_scale * torch.cat([1 + ratios, 1 / (1 + ratios)])).to(dtype)
    loc = torch.full_like(p_scale, 0.7)
    kl = kl_divergence(Normal(loc, p_scale), Normal(loc, q_scale))
    rows = zip(*(t.double().flatten().tolist() for t in (loc, p_scale, loc, q_scale)))
    exact = torch.tensor([exact_kl(*row) for row in rows], dtype=torch.float64).reshape(kl.shape)
    assert (kl >= 0).all()
    log_r2 = 2 * (p_scale.double() / q_scale.double()).log().abs()  # the exponential magnifies rounding by this
    assert ((kl.double() - exact).abs() <= (ULPS + 2 * log_r2) * torch.finfo(dtype).eps * exact).all()
    torch_s = kl_divergence(distributions.Normal(loc, p_scale), distributions.Normal(loc, q_scale))
    assert not ((torch_s.double() - exact).abs() <= 1000 * torch.finfo(dtype).eps * exact).all()  # torch's formula cancels


def test_it_is_zero_at_equality_with_gradients_of_zero():
    leaves = (*parameters(7), *parameters(7))
    results = kl_with_gradients(Normal, Normal, leaves)
    assert not any(result.any() for result in results.values())


def test_second_derivatives_of_the_kl_are_right_at_equality_too():
    for other in (1, 5):
        leaves = doubled(*parameters(3), *parameters(3, seed=other))

        def kl(*leaves):
            return kl_divergence(Normal(*leaves[:2], validate_args=False), Normal(*leaves[2:], validate_args=False))

        assert torch.autograd.gradcheck(kl, leaves) and torch.autograd.gradgradcheck(kl, leaves)


def test_scales_of_zero_and_below_give_torch_s_kl_where_it_has_one():
    p = torch.tensor([0.0, -2.0, 3.0]), torch.ones(3)
    make = [lambda scale, cls=cls: cls(torch.zeros(3), scale, validate_args=False) for cls in (Normal, distributions.Normal)]
    ours, torch_s = (kl_divergence(cls(p[0]), cls(p[1])) for cls in make)
    torch.testing.assert_close(ours, torch_s)
    assert ours[0] == math.inf


def test_independents_sum_their_dimensions():
    loc, scale = parameters(4, 5)
    prior = distributions.Normal(torch.zeros(5), torch.ones(5))
    kl = kl_divergence(Independent(Normal(loc, scale), 1), Independent(prior.expand((4, 5)), 1))
    torch.testing.assert_close(kl, kl_divergence(distributions.Normal(loc, scale), prior).sum(-1))


# ---- other dtypes, other tensors, and none ----------------------------------------------------------------------------------

MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
MIXED += [(torch.float32, torch.float64), (torch.float64, torch.float32)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("of_loc", "of_scale"), MIXED, ids=str)
def test_dtypes_are_promoted_as_by_torch(of_loc, of_scale, autocast):
    loc, scale = torch.randn(3, 4).to(of_loc).requires_grad_(), torch.ones(3, 4, dtype=of_scale, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = (cls(loc, scale) for cls in (Normal, torch.distributions.Normal))
        assert mine.rsample((2,)).dtype == theirs.rsample((2,)).dtype
        assert mine.sample((2,)).dtype == theirs.sample((2,)).dtype == of_loc
        kl = kl_divergence(mine, torch.distributions.Normal(torch.zeros((), dtype=of_scale), 2.0))
        grads = torch.autograd.grad(mine.rsample().float().sum() + kl.sum(), [loc, scale])
    assert [grad.dtype for grad in grads] == [of_loc, of_scale]
    exact = kl_divergence(torch.distributions.Normal(loc.double(), scale.double()), torch.distributions.Normal(0.0, 2.0))
    torch.testing.assert_close(kl, exact.to(kl.dtype))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_empty_batches(shape):
    loc, scale = torch.zeros(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    mine, theirs = Normal(loc, scale), torch.distributions.Normal(loc, scale)
    for sample_shape in ((), (2,), (0,)):
        assert mine.rsample(sample_shape).shape == mine.sample(sample_shape).shape == theirs.rsample(sample_shape).shape
    assert kl_divergence(mine, theirs).shape == shape and Normal(0.0, 1.0).sample((0, 2)).shape == (0, 2)
    grads = torch.autograd.grad(mine.rsample((2,)).sum() + kl_divergence(mine, theirs).sum(), [loc, scale])
    assert all(grad.shape == shape for grad in grads)


@pytest.mark.parametrize("wrapped", ["loc", "scale"])
def test_subclasses_of_tensor_are_torch_s(wrapped):
    plain = {"loc": torch.randn(3, 4), "scale": torch.rand(3, 4) + 0.5}
    given = {**plain, wrapped: Wrapped(plain[wrapped])}
    torch.manual_seed(1)
    mine = Normal(**given, validate_args=False).sample()
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(mine, torch.distributions.Normal(**plain).rsample())
    standard = torch.distributions.Normal(torch.zeros(3, 4), torch.ones(3, 4))
    kl = kl_divergence(Normal(**given, validate_args=False), standard)
    assert torch.equal(kl, kl_divergence(torch.distributions.Normal(**plain), standard))


@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")
def test_a_trace_draws_anew():
    """torch.jit.trace records neither a seed nor noise as a constant."""
    traced = torch.jit.trace(
        lambda loc, scale: Normal(loc, scale).rsample(), (torch.zeros(3), torch.ones(3)), check_trace=False
    )
    assert not torch.equal(traced(torch.zeros(3), torch.ones(3)), traced(torch.zeros(3), torch.ones(3)))
    assert traced(torch.full((3,), 50.0), torch.ones(3)).min() > 30
