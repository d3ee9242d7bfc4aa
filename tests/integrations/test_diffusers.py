"""fastlm's DiagonalGaussianDistribution against diffusers' own, for images, videos and sound."""

import copy
import math

import pytest
import torch
from diffusers.models.autoencoders import vae as theirs
from support.libraries import Ops, assert_held
from support.wrapped_tensor import Wrapped

from fastlm.integrations import diffusers as integration
from fastlm.integrations.diffusers import DiagonalGaussianDistribution
from fastlm.ops.noise import normal
from fastlm.testing import FLOATS, ULPS, seeded_normal

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
CLASSES = (DiagonalGaussianDistribution, theirs.DiagonalGaussianDistribution)
SHAPES = {"image": (3, 8, 5, 4), "video": (2, 6, 3, 4, 5), "sound": (3, 4, 17), "vector": (3, 10)}
LATENTS = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel."""


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def seed_from(generator):
    """Return the seed that a generator draws."""
    return torch.randint(2**63 - 1, (), generator=generator)


def parameters_of(shape, dtype=torch.float32, seed=1, scale=1.0):
    """Draw the parameters of a posterior; with a scale of 20 some log-variances are outside of diffusers' clamp."""
    return (scale * seeded_normal(seed, shape, torch.float64)).to(dtype).requires_grad_()


def summed(kl):
    """Sum the dimensions after the fourth, which diffusers' kl and nll keep."""
    return kl.flatten(1).sum(1) if kl.dim() > 1 else kl


def padded(parameters):
    """Reshape to at least four dimensions, which diffusers needs, with the same elements."""
    return parameters.reshape(*parameters.shape, *(1,) * (4 - parameters.dim()))


def gradients(outputs, leaves):
    """Return the gradients for the same output gradients, whatever the dtype."""
    given = [seeded_normal(20 + i, out.shape, torch.float32).to(out.dtype) for i, out in enumerate(outputs)]
    return {f"gradient {i}": grad for i, grad in enumerate(torch.autograd.grad(outputs, leaves, given))}


def everything_of(posterior, leaves, sample, other=None, at=None):
    """Return sample, kl and nll of a posterior of either library, and the gradients of the leaves."""
    nll = posterior.nll(at.reshape(sample.shape))
    values = {"sample": sample.reshape(at.shape), "kl": summed(posterior.kl(other)), "nll": summed(nll)}
    return {**{name: value.detach() for name, value in values.items()}, **gradients(list(values.values()), leaves)}


def of_theirs(monkeypatch, leaves, eps, at, dtype):
    """Return the same of diffusers' own class in this dtype, on the same noise."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    monkeypatch.setattr(theirs, "randn_tensor", lambda shape, dtype, **_: eps.reshape(shape).to(dtype))
    posterior, *other = [theirs.DiagonalGaussianDistribution(padded(leaf)) for leaf in leaves]
    return everything_of(posterior, leaves, posterior.sample(), *other, at=at.to(dtype))


# ---- values and gradients ---------------------------------------------------------------------------------------------------


@LATENTS
@DTYPES
@pytest.mark.parametrize("with_other", [False, True], ids=["standard", "other"])
def test_all_is_as_diffusers_has_it(shape, dtype, with_other, monkeypatch):
    leaves = [parameters_of(shape, dtype)] + [parameters_of(shape, dtype, seed=2)] * with_other
    posterior, *other = map(DiagonalGaussianDistribution, leaves)
    eps, at = normal(posterior.mean.shape, seed=seed_from(generator())), seeded_normal(5, posterior.mean.shape, dtype)
    with Ops() as ops:
        actual = everything_of(posterior, leaves, posterior.sample(generator()), *other, at=at)
    assert ops.fastlm == ["reparameterize"] * (1 + with_other) + ["reparameterize_backward"] * (1 + with_other)
    plain, golden = (of_theirs(monkeypatch, leaves, eps, at, dtype) for dtype in (dtype, torch.float64))
    assert actual["sample"].dtype == dtype and actual["kl"].dtype == actual["nll"].dtype
    assert actual["kl"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_held(actual, plain, golden)


@LATENTS
def test_log_variances_are_held_to_diffusers_range(shape, monkeypatch):
    leaves = [parameters_of(shape, scale=20.0)]
    posterior = DiagonalGaussianDistribution(leaves[0])
    raw = leaves[0].detach().chunk(2, dim=1)[1]
    assert (raw < -30).any() and (raw > 20).any()
    eps = normal(posterior.mean.shape, seed=seed_from(generator()))
    at = torch.zeros_like(posterior.mean).detach()
    actual = everything_of(posterior, leaves, posterior.sample(generator()), at=at)
    assert_held(actual, *(of_theirs(monkeypatch, leaves, eps, at, dtype) for dtype in (torch.float32, torch.float64)))
    outside = (raw < -30) | (raw > 20)
    assert not actual["gradient 0"].chunk(2, dim=1)[1][outside].any()


@pytest.mark.parametrize(("logvar", "of_other"), [(-50.0, -28.0), (0.0, -50.0), (40.0, 10.0), (0.0, 40.0), (-50.0, 40.0)])
def test_both_log_variances_of_a_kl_from_another_are_held(logvar, of_other):
    leaves = [torch.tensor([0.5, x], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_() for x in (logvar, of_other)]
    results = []
    for cls in CLASSES:
        p, q = map(cls, leaves)
        results.append((p.kl(q), *torch.autograd.grad(p.kl(q).sum(), leaves)))
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other)


@LATENTS
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_attributes_are_diffusers(shape, deterministic):
    parameters = parameters_of(shape, scale=20.0)
    ours, others = (cls(parameters, deterministic) for cls in CLASSES)
    assert isinstance(ours, theirs.DiagonalGaussianDistribution)
    assert ours.parameters is parameters and ours.deterministic == deterministic
    for name in ("mean", "logvar", "std", "var"):
        mine, other = getattr(ours, name), getattr(others, name)
        assert torch.equal(mine, other) and mine.requires_grad == other.requires_grad, name
        if mine.requires_grad:
            grads = (torch.autograd.grad(value.sum(), parameters, retain_graph=True)[0] for value in (mine, other))
            assert torch.equal(*grads), name
    assert torch.equal(ours.mode(), others.mode())


def test_a_deterministic_one_gives_its_mean_and_diffusers_zeros():
    ours = DiagonalGaussianDistribution(parameters_of((2, 4, 3, 3)), deterministic=True)
    others = theirs.DiagonalGaussianDistribution(ours.parameters, deterministic=True)
    assert torch.equal(ours.sample(), others.sample())
    assert torch.equal(ours.kl(), others.kl()) and torch.equal(ours.nll(ours.mean), others.nll(ours.mean))
    (gradient,) = torch.autograd.grad(ours.sample().sum(), ours.parameters)
    assert torch.equal(gradient[:, :2], torch.ones(2, 2, 3, 3)) and not gradient[:, 2:].any()
    assert DiagonalGaussianDistribution(ours.parameters).kl(others).tolist() == [math.inf] * 2


def test_the_nll_sums_the_dimensions_that_are_asked_for():
    ours = DiagonalGaussianDistribution(parameters_of((2, 6, 3, 4, 5)))
    others, at = theirs.DiagonalGaussianDistribution(ours.parameters), seeded_normal(3, (2, 3, 3, 4, 5), torch.float32)
    for dims in ([1, 2, 3], (2,), [1, -1]):
        torch.testing.assert_close(ours.nll(at, dims=dims), others.nll(at, dims=dims))


def test_the_kl_from_another_takes_diffusers_class_and_broadcasts():
    one, many = parameters_of((1, 4, 3, 3)), parameters_of((5, 4, 3, 3), seed=2)
    for p, q in ((one, many), (many, one)):
        expected = theirs.DiagonalGaussianDistribution(p).kl(theirs.DiagonalGaussianDistribution(q))
        torch.testing.assert_close(DiagonalGaussianDistribution(p).kl(theirs.DiagonalGaussianDistribution(q)), expected)


def test_the_kl_does_not_cancel_where_diffusers_does():
    parameters = torch.zeros(1, 2, 1, 1, requires_grad=True) + torch.tensor([0.0, 1e-4])[None, :, None, None]
    kl = DiagonalGaussianDistribution(parameters).kl().item()
    exact = 0.5 * (1e-4**2 / 2 + 1e-4**3 / 6)
    assert kl == pytest.approx(exact, rel=ULPS * 1e-6)
    assert theirs.DiagonalGaussianDistribution(parameters).kl().item() != pytest.approx(exact, rel=0.5)


# ---- one pass ---------------------------------------------------------------------------------------------------------------


def test_a_sample_and_its_kl_are_one_pass_forward_and_backward():
    parameters = parameters_of((2, 8, 5, 4))
    with Ops() as ops:
        posterior = DiagonalGaussianDistribution(parameters)
        (posterior.sample().sum() + posterior.kl().sum()).backward()
    assert ops.fastlm == ["reparameterize", "reparameterize_backward"]
    assert not {"aten::exp", "aten::clamp", "aten::randn"} & set(ops.all)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_kl_after_a_sample_without_gradient_has_its_own(guard):
    posterior = DiagonalGaussianDistribution(parameters_of((2, 4, 3, 3)))
    with guard():
        posterior.sample()
        assert not posterior.kl().requires_grad
    assert posterior.kl().requires_grad
    posterior.kl().sum().backward()
    assert posterior.parameters.grad.any()


def test_both_halves_are_read_in_place_whatever_the_strides():
    base = parameters_of((2, 8, 5, 4)).detach()
    expected = DiagonalGaussianDistribution(base)
    for parameters in (base.contiguous(memory_format=torch.channels_last), base.transpose(2, 3).contiguous().transpose(2, 3)):
        posterior = DiagonalGaussianDistribution(parameters)
        assert torch.equal(posterior.sample(generator()), expected.sample(generator()))
        torch.testing.assert_close(posterior.kl(), expected.kl())
        assert posterior.mean.data_ptr() == parameters.data_ptr()


def test_it_works_under_compile():
    def step(parameters):
        posterior = DiagonalGaussianDistribution(parameters)
        return posterior.sample() + posterior.kl()[:, None, None, None], posterior.nll(posterior.mode())

    parameters = parameters_of((2, 4, 3, 3))
    torch.manual_seed(1)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(parameters)
    torch.manual_seed(1)
    for a, b in zip(compiled, step(parameters)):
        torch.testing.assert_close(a, b)


# ---- noise ------------------------------------------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_sample_and_then_the_next():
    posterior, g = DiagonalGaussianDistribution(parameters_of((2, 4, 3, 3))), generator()
    first, second = posterior.sample(g), posterior.sample(g)
    assert torch.equal(posterior.sample(generator()), first) and not torch.equal(first, second)
    assert torch.equal(posterior.sample([generator()]), first)
    torch.manual_seed(3)
    first = posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), first)


def test_a_generator_leaves_torch_s_default_one_alone():
    state = torch.random.get_rng_state()
    DiagonalGaussianDistribution(parameters_of((2, 4, 3, 3))).sample(generator())
    assert torch.equal(torch.random.get_rng_state(), state)


@LATENTS
def test_with_a_generator_each_an_example_does_not_depend_on_its_batch(shape):
    parameters = parameters_of((5, *shape[1:]))
    whole = DiagonalGaussianDistribution(parameters).sample([generator(i) for i in range(5)])
    for i in range(5):
        assert torch.equal(whole[i : i + 1], DiagonalGaussianDistribution(parameters[i : i + 1]).sample([generator(i)]))
    some = DiagonalGaussianDistribution(parameters[[3, 1]]).sample([generator(3), generator(1)])
    assert torch.equal(some, whole[[3, 1]])
    assert not torch.equal(whole[0] - parameters[0, : len(whole[0])], whole[1] - parameters[1, : len(whole[1])])


def test_the_noise_is_standard_normal():
    """Mean, variance, skewness and excess kurtosis of a million draws are within five standard errors of 0, 1, 0 and 0."""
    parameters = torch.cat([torch.full((4, 10, 50, 500), 3.0), torch.full((4, 10, 50, 500), 2 * math.log(0.25))], dim=1)
    draws = (DiagonalGaussianDistribution(parameters).sample([generator(i) for i in range(4)]).double().flatten() - 3) / 0.25
    for power, expected, error in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((draws**power).mean() - expected) < 5 * error / math.sqrt(len(draws))


# ---- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "parameters must be a tensor; got list"),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError, "parameters must be float32.*int64"),
        (torch.zeros(2, 3, 4), ValueError, r"parameters must have shape \(B, 2 \* channels, ...\); got \(2, 3, 4\)"),
        (torch.zeros(4), ValueError, r"parameters must have shape .* got \(4,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(parameters, error, message):
    with pytest.raises(error, match=message):
        DiagonalGaussianDistribution(parameters)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (7, TypeError, "generator must be a torch.Generator, a list of them or None; got int"),
        ([generator(), None, generator()], TypeError, "generator must be a torch.Generator, .* got NoneType"),
        ([generator(), generator()], ValueError, "generator must be one, or one for each of the 3 examples; got 2"),
        ([], ValueError, "generator must be one, or one for each of the 3 examples; got 0"),
    ],
)
def test_generators_that_do_not_fit_are_named(given, error, message):
    with pytest.raises(error, match=message):
        DiagonalGaussianDistribution(torch.zeros(3, 4, 2, 2)).sample(given)


def test_a_deep_copy_is_the_same_posterior():
    posterior = DiagonalGaussianDistribution(parameters_of((2, 4, 3, 3)).detach())
    assert torch.equal(copy.deepcopy(posterior).sample(generator()), posterior.sample(generator()))
    assert integration.LOGVAR_CLAMP == (-30.0, 20.0)


@pytest.mark.parametrize(("own", "of_other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_kl_from_another_of_another_dtype(own, of_other, autocast):
    """Posteriors of different dtypes promote."""
    mine, other = (parameters_of(SHAPES["image"], dtype, seed) for seed, dtype in ((1, own), (2, of_other)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kl = DiagonalGaussianDistribution(mine).kl(theirs.DiagonalGaussianDistribution(other))
    exact = theirs.DiagonalGaussianDistribution(mine.double()).kl(theirs.DiagonalGaussianDistribution(other.double()))
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-5)
    assert [grad.dtype for grad in torch.autograd.grad(kl.sum(), [mine, other])] == [own, of_other]


@LATENTS
def test_empty_batches(shape):
    parameters = parameters_of((0, *shape[1:]))
    posterior, of_theirs = DiagonalGaussianDistribution(parameters), theirs.DiagonalGaussianDistribution(padded(parameters))
    other = DiagonalGaussianDistribution(parameters.detach())
    sample, kl = posterior.sample(generator()), posterior.kl()
    assert sample.shape == posterior.mode().shape == posterior.mean.shape == (0, shape[1] // 2, *shape[2:])
    assert kl.shape == posterior.kl(other).shape == posterior.nll(sample).shape == of_theirs.kl().shape[:1]
    (grad,) = torch.autograd.grad(sample.sum() + kl.sum() + posterior.kl(other).sum(), parameters)
    assert grad.shape == parameters.shape


def test_subclasses_of_tensor_keep_diffusers_posterior():
    plain = parameters_of(SHAPES["image"]).detach()
    kept = integration._ours(theirs.DiagonalGaussianDistribution(Wrapped(plain)))
    assert type(kept) is theirs.DiagonalGaussianDistribution
    assert torch.equal(kept.kl(), theirs.DiagonalGaussianDistribution(plain).kl())
    assert type(integration._ours(theirs.DiagonalGaussianDistribution(plain))) is DiagonalGaussianDistribution
