"""Test that torch.func's grad, vmap, both on top of each other, and jacobians give the results of a loop over plain calls."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

import fastlm
from fastlm.testing import seeded_normal

N, B, D = 4, 3, 7  # Entries of the vmap, and the shape (B, D) of one call.
SEEDS = torch.tensor([3, -1, 2**40, 8])


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the op."""


def latents(*lead, seed=1):
    return seeded_normal(seed, (*lead, B, D), torch.float32), seeded_normal(seed + 50, (*lead, B, D), torch.float32)


def both(mu, logvar, seed, **options):
    return fastlm.reparameterize_with_kl(mu, logvar, seed=seed, backend="cpu", **options)


def assert_equal(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def loop(function, *columns):
    """Call the function for each entry, and stack the results."""
    return tuple(torch.stack(results) for results in zip(*(function(*row) for row in zip(*columns))))


# ---- values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [None, 1, 3])
def test_vmap_with_a_seed_for_each_entry_is_the_loop(num_samples):
    def call(mu, logvar, seed):
        return both(mu, logvar, seed, num_samples=num_samples)

    columns = (*latents(N), SEEDS)
    assert_equal(vmap(call)(*columns), loop(call, *columns))


@pytest.mark.parametrize("num_samples", [None, 3])
def test_vmap_with_one_seed_gives_every_entry_its_noise(num_samples):
    def call(mu, logvar):
        return both(mu, logvar, 12, num_samples=num_samples)

    columns = latents(N)
    assert_equal(vmap(call)(*columns), loop(call, *columns))


@pytest.mark.parametrize("num_samples", [None, 2])
def test_vmap_of_calls_with_a_seed_for_each_example_is_the_loop(num_samples):
    def call(mu, logvar, seeds):
        return both(mu, logvar, seeds, num_samples=num_samples)

    columns = (*latents(N), torch.arange(N * B).reshape(N, B) * 7 - 5)
    assert_equal(vmap(call)(*columns), loop(call, *columns))


@pytest.mark.parametrize("in_dims", [(1, 0), (2, 1), (-1, 0)])
def test_vmap_over_another_dimension_is_the_loop(in_dims):
    mu, logvar = latents(N)
    moved = mu.movedim(0, in_dims[0]).contiguous(), logvar.movedim(0, in_dims[1]).contiguous()
    results = vmap(lambda mu, logvar: both(mu, logvar, 1), in_dims=in_dims)(*moved)
    assert_equal(results, loop(lambda mu, logvar: both(mu, logvar, 1), mu, logvar))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)])
def test_vmap_over_one_input_alone_is_the_loop(in_dims):
    mu, logvar = latents(N)
    arguments = (mu if in_dims[0] == 0 else mu[0], logvar if in_dims[1] == 0 else logvar[0])
    columns = [t if d == 0 else t.expand(N, B, D) for t, d in zip(arguments, in_dims)]
    results = vmap(lambda mu, logvar: both(mu, logvar, 1), in_dims=in_dims)(*arguments)
    assert_equal(results, loop(lambda mu, logvar: both(mu, logvar, 1), *columns))


def test_vmap_over_the_seed_alone_draws_one_latent_several_times():
    mu, logvar = latents()
    results = vmap(lambda seed: both(mu, logvar, seed))(SEEDS)
    assert_equal(results, loop(lambda seed: both(mu, logvar, seed), SEEDS))


@pytest.mark.parametrize("prior_shape", [(D,), (B, 1), (1, D), (B, D), ()])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_vmap_with_a_prior_is_the_loop(prior_shape, batched):
    prior = seeded_normal(9, ((N, *prior_shape) if batched else prior_shape), torch.float32)

    def call(mu, logvar, prior):
        return both(mu, logvar, 5, prior_mu=prior, prior_logvar=prior, event_dims=2, free_bits=0.1)

    results = vmap(call, in_dims=(0, 0, 0 if batched else None))(*latents(N), prior)
    assert_equal(results, loop(call, *latents(N), prior if batched else [prior] * N))


def test_vmap_of_vmap_is_the_loop_of_loops():
    mu, logvar = latents(2, N)
    seeds = torch.arange(2 * N).reshape(2, N)
    expected = loop(lambda *rows: loop(both, *rows), mu, logvar, seeds)
    assert_equal(vmap(vmap(both))(mu, logvar, seeds), expected)


@pytest.mark.parametrize("function", [fastlm.reparameterize, fastlm.gaussian_kl])
def test_vmap_of_an_op_with_one_output_is_the_loop(function):
    options = {"seed": 3} if function is fastlm.reparameterize else {"event_dims": 2}

    def call(mu, logvar):
        return (function(mu, logvar, backend="cpu", **options),)

    assert_equal(vmap(call)(*latents(N)), loop(call, *latents(N)))


def test_without_a_seed_each_entry_draws_its_own_noise_where_asked():
    zeros = torch.zeros(N, B, D)
    z = vmap(lambda mu: fastlm.reparameterize(mu, mu, backend="cpu"), randomness="different")(zeros)
    assert len({row.sum().item() for row in z}) == N
    torch.manual_seed(7)
    first = vmap(lambda mu: fastlm.reparameterize(mu, mu, backend="cpu"), randomness="different")(zeros)
    torch.manual_seed(7)
    assert torch.equal(vmap(lambda mu: fastlm.reparameterize(mu, mu, backend="cpu"), randomness="different")(zeros), first)


def test_without_a_seed_all_entries_share_noise_where_asked():
    z = vmap(lambda mu: fastlm.reparameterize(mu, mu, backend="cpu"), randomness="same")(torch.zeros(N, B, D))
    assert all(torch.equal(row, z[0]) for row in z)


def test_without_a_seed_vmap_asks_what_randomness_is_meant():
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda mu: fastlm.reparameterize(mu, mu, backend="cpu"))(torch.zeros(N, B, D))


# ---- gradients --------------------------------------------------------------------------------------------------------------


def loss(mu, logvar, prior_mu, prior_logvar, seed):
    z, kl = both(mu, logvar, seed, prior_mu=prior_mu, prior_logvar=prior_logvar)
    return (z**2).sum() + (kl * torch.arange(1.0, B + 1)).sum()


def eager_gradients(*arguments):
    leaves = [t.detach().clone().requires_grad_() for t in arguments[:4]]
    return torch.autograd.grad(loss(*leaves, arguments[4]), leaves)


def priors(*lead):
    return seeded_normal(3, (*lead, D), torch.float32), seeded_normal(4, (*lead, B, 1), torch.float32)


ALL = (0, 1, 2, 3)


def test_grad_is_autograd():
    arguments = (*latents(), *priors(), 5)
    assert_equal(grad(loss, argnums=ALL)(*arguments), eager_gradients(*arguments))


def test_vjp_is_autograd():
    arguments = (*latents(), *priors())
    value, back = vjp(lambda *tensors: loss(*tensors, 5), *arguments)
    assert_equal(back(torch.ones_like(value)), eager_gradients(*arguments, 5))


def test_vmap_of_grad_is_the_loop():
    columns = (*latents(N), *priors(N), SEEDS)
    assert_equal(vmap(grad(loss, argnums=ALL))(*columns), loop(eager_gradients, *columns))


def test_vmap_of_grad_with_priors_that_all_entries_share_is_the_loop():
    arguments = (*latents(N), *priors(), SEEDS)
    results = vmap(grad(loss, argnums=ALL), in_dims=(0, 0, None, None, 0))(*arguments)
    expected = [eager_gradients(mu, logvar, *priors(), seed) for mu, logvar, seed in zip(*latents(N), SEEDS)]
    assert_equal(results, [torch.stack(gradients) for gradients in zip(*expected)])


def test_grad_of_vmap_sums_over_the_entries():
    def total(mu, logvar, prior_mu, prior_logvar):
        return vmap(loss, in_dims=(0, 0, None, None, 0))(mu, logvar, prior_mu, prior_logvar, SEEDS).sum()

    results = grad(total, argnums=ALL)(*latents(N), *priors())
    expected = [eager_gradients(mu, logvar, *priors(), seed) for mu, logvar, seed in zip(*latents(N), SEEDS)]
    assert_equal(results[:2], [torch.stack(gradients) for gradients in list(zip(*expected))[:2]])
    for result, gradients in zip(results[2:], list(zip(*expected))[2:]):
        torch.testing.assert_close(result, torch.stack(gradients).sum(0))


def test_per_example_gradients_of_a_module_are_those_of_one_example_at_a_time():
    module = fastlm.nn.GaussianLatent(5, D)
    x, parameters = seeded_normal(1, (N, 5), torch.float32), {k: v.detach() for k, v in module.named_parameters()}

    def one(parameters, x, seed):
        z, kl = functional_call(module, parameters, (x,), {"seed": seed})
        return (z**2).sum() + kl.sum()

    results = vmap(grad(one), in_dims=(None, 0, 0))(parameters, x, SEEDS)
    for i in range(N):
        module.zero_grad()
        one(dict(module.named_parameters()), x[i], SEEDS[i]).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(results[name][i], parameter.grad)


@pytest.mark.parametrize("wanted", [0, 1], ids=["z", "kl"])
def test_jacobians_are_those_of_the_reference(wanted):
    def output(backend):
        return lambda mu, logvar, prior: fastlm.reparameterize_with_kl(
            mu, logvar, prior_mu=prior, prior_logvar=prior, seed=3, num_samples=2, backend=backend
        )[wanted]

    arguments = (*latents(), seeded_normal(3, (D,), torch.float32))
    results = jacrev(output("cpu"), argnums=(0, 1))(*arguments)
    expected = jacrev(output("reference"), argnums=(0, 1))(*arguments)
    torch.testing.assert_close(results, expected)


def test_autograd_takes_a_batch_of_gradients():
    leaves = [t.requires_grad_() for t in (*latents(), *priors())]
    z, kl = both(*leaves[:2], 5, prior_mu=leaves[2], prior_logvar=leaves[3])
    batch = [seeded_normal(6, (N, *out.shape), torch.float32) for out in (z, kl)]
    results = torch.autograd.grad((z, kl), leaves, batch, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad((z, kl), leaves, row, retain_graph=True) for row in zip(*batch)]
    assert_equal(results, [torch.stack(gradients) for gradients in zip(*expected)])
