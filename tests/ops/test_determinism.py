"""Test that the same inputs and seed give the same bits on any number of threads, any instruction set, and in any batch."""

import pytest
import torch
from cases import SPECS
from support.oracle import ISAS, run

import fastlm
from fastlm.backend import cpu as native
from fastlm.ops.noise import normal
from fastlm.testing import FLOATS, seeded_normal

DIFFERENTIABLE = ("mu", "logvar", "prior_mu", "prior_logvar")
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def latent(dtype, *shape, prior_mu=None, prior_logvar=None, **options) -> dict:
    call = {"mu": seeded_normal(1, shape, dtype), "logvar": seeded_normal(2, shape, dtype), "seed": 1, **options}
    if prior_mu:
        call["prior_mu"] = seeded_normal(3, prior_mu, dtype)
    if prior_logvar:
        call["prior_logvar"] = seeded_normal(4, prior_logvar, dtype)
    return call


def results_of(call: dict) -> dict:
    return run(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, backend="cpu")


def assert_same_bits(results: dict, expected: dict) -> None:
    assert results.keys() == expected.keys()
    for what, result in results.items():
        assert torch.equal(result, expected[what]), what


# These calls are large enough to be split among several threads, in each of the ways of splitting.
LARGE_CALLS = {
    "many rows": lambda dtype: latent(dtype, 4099, 65, prior_mu=(65,), prior_logvar=(1,)),
    "a few long rows": lambda dtype: latent(dtype, 3, 100_003, prior_mu=(3, 1), prior_logvar=(100_003,)),
    "no rows": lambda dtype: latent(dtype, 300_007, event_dims=0, prior_logvar=(1,)),
    "one row": lambda dtype: latent(dtype, 300_007, prior_mu=(1,)),
    "samples": lambda dtype: latent(dtype, 1031, 65, num_samples=3, prior_mu=(65,), prior_logvar=(1031, 1)),
    "stream per example": lambda dtype: latent(dtype, 4099, 65, seed=torch.arange(4099)),
    "everything": lambda dtype: latent(
        dtype, 64, 33, 65, event_dims=2, prior_mu=(33, 1), prior_logvar=(65,), free_bits=0.2, logvar_clamp=(-1.0, 1.0)
    ),
}


@DTYPES
@pytest.mark.parametrize("case", LARGE_CALLS)
def test_any_number_of_threads_gives_the_same_bits(case, dtype, threads, widest_isa):
    threads(1)
    expected = results_of(LARGE_CALLS[case](dtype))
    for count in (2, 3, 4):
        threads(count)
        assert_same_bits(results_of(LARGE_CALLS[case](dtype)), expected)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_any_number_of_threads_draws_the_same_noise(count, threads, isa):
    threads(1)
    expected = normal((1_000_003,), seed=5, position=3, backend="cpu")
    threads(count)
    assert torch.equal(normal((1_000_003,), seed=5, position=3, backend="cpu"), expected)


def on(isa: str, function, *args):
    native.C.set_isa(isa)
    return function(*args)


@DTYPES
@pytest.mark.parametrize("case", LARGE_CALLS)
def test_every_instruction_set_gives_the_same_bits(case, dtype, widest_isa):
    expected = on(ISAS[0], results_of, LARGE_CALLS[case](dtype))
    for isa in ISAS[1:]:
        assert_same_bits(on(isa, results_of, LARGE_CALLS[case](dtype)), expected)


# Attention and linear add in the order that is fastest on their instruction set, so their bits depend on it.
@pytest.mark.parametrize("name", [name for name in SPECS if not name.endswith(("attention", "linear"))])
def test_every_case_of_every_latent_spec_gives_the_same_bits_on_every_instruction_set(name, widest_isa):
    spec = SPECS[name]
    for case, make in spec.cases.items():
        for dtype in spec.dtypes:
            expected, *others = (
                on(isa, lambda: run(spec.function, make(dtype), spec.differentiable, backend="cpu"))  # noqa: B023
                for isa in ISAS
            )
            for other in others:
                for what, result in other.items():
                    assert torch.equal(result, expected[what]), f"{what} of {case}, {dtype}"


def test_every_instruction_set_draws_the_same_noise(widest_isa):
    expected, *others = (on(isa, lambda: normal((1 << 20,), seed=9, position=1, backend="cpu")) for isa in ISAS)
    assert all(torch.equal(other, expected) for other in others)


@pytest.mark.parametrize("case", LARGE_CALLS)
def test_a_repeated_call_gives_the_same_bits(case, isa):
    call = LARGE_CALLS[case](torch.float32)
    expected = results_of(call)
    for _ in range(3):
        assert_same_bits(results_of(call), expected)


# ---- the batch around a row -------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 130, 37
PER_ROW = ("output 0", "output 1", "gradient of mu", "gradient of logvar", "gradient of prior_mu")


def gradients_of_rows(outputs, dtype):
    """Make gradients that are the same for a row at any place in the batch."""
    return [seeded_normal(5, (ROWS, COLUMNS), dtype)[: out.shape[0], :].to(out.dtype) for out in outputs[:1]] + [
        seeded_normal(6, (ROWS,), dtype)[: out.shape[0]].to(out.dtype) for out in outputs[1:]
    ]


def rows_of(call: dict, rows) -> dict:
    whole = ("mu", "logvar", "prior_mu", "seed")
    return {name: value[rows] if name in whole and isinstance(value, torch.Tensor) else value for name, value in call.items()}


@DTYPES
def test_a_row_does_not_depend_on_what_the_other_rows_hold(dtype, isa):
    call = latent(dtype, ROWS, COLUMNS, prior_mu=(ROWS, COLUMNS))
    other = {**call, **{name: call[name].clone() for name in ("mu", "logvar", "prior_mu")}}
    for name in ("mu", "logvar", "prior_mu"):
        other[name][torch.arange(ROWS) != 7] = seeded_normal(9, (ROWS - 1, COLUMNS), dtype)
    results, expected = results_of(other), results_of(call)
    for what in PER_ROW:
        assert torch.equal(results[what][7], expected[what][7]), what


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 7, 64, 129])
def test_the_first_rows_do_not_depend_on_how_many_follow(dtype, count, isa):
    call = latent(dtype, ROWS, COLUMNS, prior_mu=(ROWS, COLUMNS))
    expected = run(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, gradients_of_rows, backend="cpu")
    fewer = rows_of(call, slice(count))
    results = run(fastlm.reparameterize_with_kl, fewer, DIFFERENTIABLE, gradients_of_rows, backend="cpu")
    for what in PER_ROW:
        assert torch.equal(results[what], expected[what][:count]), what


@DTYPES
@pytest.mark.parametrize("num_samples", [None, 3])
def test_an_example_with_its_own_seed_is_the_same_anywhere_in_any_batch(dtype, num_samples, isa):
    seeds = seeded_normal(8, (ROWS,), torch.float64).mul(1e18).to(torch.int64)
    call = latent(dtype, ROWS, COLUMNS, prior_mu=(ROWS, COLUMNS), seed=seeds, num_samples=num_samples)
    z, kl = fastlm.reparameterize_with_kl(**call, backend="cpu")
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    for rows in (order, order[:5], order[:1], torch.tensor([3, 3, 3])):
        some_z, some_kl = fastlm.reparameterize_with_kl(**rows_of(call, rows), backend="cpu")
        assert torch.equal(some_z, z[..., rows, :]) and torch.equal(some_kl, kl[rows])


@pytest.mark.parametrize("columns", [1, 3, 4, 37, 1000, 5000])
def test_the_backward_of_an_example_with_its_own_seed_is_the_same_in_any_batch(columns, isa):
    seeds = torch.tensor([5, -6, 7])
    mu, logvar = (seeded_normal(seed, (3, columns), torch.float32).requires_grad_() for seed in (1, 2))
    weights = seeded_normal(3, (3, columns), torch.float32)

    def gradient(rows):
        z = fastlm.reparameterize(mu[rows], logvar[rows], seed=seeds[rows], backend="cpu")
        return torch.autograd.grad((z * weights[rows]).sum(), logvar)[0][rows]

    whole = gradient(slice(0, 3))
    for row in range(3):
        assert torch.equal(gradient(slice(row, row + 1))[0], whole[row])


def test_strides_do_not_change_the_bits(isa):
    """Compare a chunk, a transpose and a contiguous copy of the same numbers."""
    mu, logvar = seeded_normal(1, (50, 33), torch.float32), seeded_normal(2, (50, 33), torch.float32)
    expected = fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend="cpu")
    chunks = torch.cat([mu, logvar], dim=1).chunk(2, dim=1)
    transposed = tuple(t.T.contiguous().T for t in (mu, logvar))
    for views in (chunks, transposed):
        results = fastlm.reparameterize_with_kl(*views, seed=1, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(results, expected))
