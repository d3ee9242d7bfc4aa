"""Test linear and the latent on DTensors: results and gradients are those of one process, whatever is sharded."""

import itertools

import torch
from support.ranks import run
from support.sharded import assert_as_one_process, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard

import fastlm
from fastlm.testing import seeded_normal

WHOLE, BATCH = Replicate(), Shard(0)


# ---- linear -----------------------------------------------------------------------------------------------------------------


def products(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    whole = {
        "input": seeded_normal(1, (3, 5, 12), torch.float32),
        "weight": seeded_normal(2, (10, 12), torch.float32),
        "bias": seeded_normal(3, (10,), torch.float32),
    }
    without_bias = {name: whole[name] for name in ("input", "weight")}
    expected = {Shard(0): Shard(2), Shard(1): Partial()}  # by the weight's placement
    inputs, weights = (WHOLE, Shard(0), Shard(1), Shard(2)), (WHOLE, Shard(0), Shard(1))
    for input, weight, tensors in itertools.product(inputs, weights, (whole, without_bias)):
        for backend in (None, "cpu"):
            results = assert_as_one_process(
                fastlm.linear, mesh, tensors, {"input": [input], "weight": [weight]}, backend=backend
            )
        of_input = Partial() if input == Shard(2) else input
        assert results["output 0"].placements == (expected.get(weight, of_input),)
    assert_as_one_process(fastlm.linear, mesh, whole, {"weight": [Shard(0)], "bias": [Shard(0)]})
    infinite = whole | {"bias": torch.full((10,), torch.inf)}
    row_wise = distributed(infinite, mesh, {"input": [Shard(2)], "weight": [Shard(1)]})
    assert (fastlm.linear(**row_wise).full_tensor() == torch.inf).all()


def test_linear_is_column_wise_row_wise_or_replicated():
    run(products, 2)


def products_on_two_dimensions(rank, world):
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = {
        "input": seeded_normal(1, (3, 5, 12), torch.float32),
        "weight": seeded_normal(2, (10, 12), torch.float32),
        "bias": seeded_normal(3, (10,), torch.float32),
    }
    for input, weight in itertools.product((WHOLE, Shard(0), Shard(2)), repeat=2):
        for other in (WHOLE, Shard(0), Shard(1)):
            placements = {"input": [Shard(0), input], "weight": [other, weight if weight != Shard(2) else Shard(1)]}
            assert_as_one_process(fastlm.linear, mesh, tensors, placements)


def test_linear_on_a_mesh_of_two_dimensions():
    run(products_on_two_dimensions, 4)


# ---- the latent -------------------------------------------------------------------------------------------------------------

LATENT = {"output 0", "output 1", "gradient of mu", "gradient of logvar"}


def latents(rank, world):
    mesh = init_device_mesh("cpu", (2, world // 2))
    shape = (7, 3, 5)
    tensors = {"mu": seeded_normal(1, shape, torch.float32), "logvar": seeded_normal(2, shape, torch.float32)}
    priors = {"prior_mu": seeded_normal(3, (3, 1), torch.float32), "prior_logvar": seeded_normal(4, shape, torch.float32)}
    for places in ([BATCH, WHOLE], [BATCH, BATCH], [Shard(1), BATCH], [WHOLE, Shard(2)], [WHOLE, WHOLE]):
        placements = {"mu": places, "logvar": places}
        for seed in (3, torch.tensor(-4), torch.arange(7) * 5):
            given = tensors | ({"seed": seed} if isinstance(seed, torch.Tensor) else {})
            options = {} if "seed" in given else {"seed": seed}
            assert_as_one_process(fastlm.reparameterize, mesh, given, placements, LATENT, temperature=0.5, **options)
            for num_samples, event_dims in itertools.product((None, 3), (0, 1, 2, 3)):
                assert_as_one_process(
                    fastlm.reparameterize_with_kl,
                    mesh,
                    given | priors,
                    placements,
                    LATENT,
                    num_samples=num_samples,
                    event_dims=event_dims,
                    free_bits=0.1,
                    logvar_clamp=(-1.5, 1.0),
                    **options,
                )
        results = assert_as_one_process(fastlm.gaussian_kl, mesh, tensors, placements, LATENT)
        assert results["output 0"].placements == tuple(p if p != Shard(2) else WHOLE for p in places)


def test_the_latent_s_noise_does_not_depend_on_how_the_batch_is_sharded():
    run(latents, 4)


def ranks_without_rows_or_columns(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    mu = {name: seeded_normal(i, (1, 7), torch.float32) for i, name in enumerate(("mu", "logvar"))}
    placements = {"mu": [BATCH], "logvar": [BATCH]}
    assert_as_one_process(fastlm.reparameterize_with_kl, mesh, mu, placements, LATENT, num_samples=2, seed=3)
    product = {"input": seeded_normal(1, (3, 4), torch.float32), "weight": seeded_normal(2, (2, 4), torch.float32)}
    assert_as_one_process(fastlm.linear, mesh, product, {"weight": [Shard(0)]})
    assert_as_one_process(fastlm.linear, mesh, product, {"input": [Shard(0)]})
    shallow = {"input": seeded_normal(1, (7, 7, 5, 6), torch.float32), "weight": seeded_normal(2, (9, 6), torch.float32)}
    assert_as_one_process(fastlm.linear, mesh, shallow, {"input": [Shard(1)], "weight": [Shard(1)]}, backend="cpu")


def test_ranks_may_have_no_rows_or_columns():
    run(ranks_without_rows_or_columns, 4)
