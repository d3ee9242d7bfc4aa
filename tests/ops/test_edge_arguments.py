"""Test arguments at the edge of the legal. If torch answers, so does fastlm; otherwise an error names the argument.

They are NumPy's numbers, sides of a window past 64-bit integers, slopes with gradients, mixed dtypes under autocast, and nested
tensors.
"""

import numpy as np
import pytest
import torch

import fastlm
from fastlm.ops.noise import normal
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernels."""


def qkv(dtype=torch.float32) -> list[torch.Tensor]:
    return [seeded_normal(i, (2, 2, 5, 8), dtype) for i in range(3)]


# ---- NumPy's numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64, np.uint8])
def test_integers_of_numpy_are_integers(kind):
    q, k, v = qkv()
    expected = fastlm.attention(q, k, v, window=(2, 1), dropout_p=0.5, seed=7)
    assert torch.equal(fastlm.attention(q, k, v, window=(kind(2), kind(1)), dropout_p=0.5, seed=kind(7)), expected)
    assert torch.equal(normal((5,), seed=kind(7), position=kind(4)), normal((5,), seed=7, position=4))
    results = fastlm.reparameterize_with_kl(q, k, seed=kind(7), event_dims=kind(2), num_samples=kind(3))
    torch.testing.assert_close(results, fastlm.reparameterize_with_kl(q, k, seed=7, event_dims=2, num_samples=3))


def test_floats_of_numpy_are_numbers():
    q, k, v = qkv()
    options = {"scale": 0.5, "softcap": 2.0, "dropout_p": 0.25}
    expected = fastlm.attention(q, k, v, **options, seed=1)
    assert torch.equal(fastlm.attention(q, k, v, **{k: np.float32(v) for k, v in options.items()}, seed=1), expected)


def test_the_largest_seed_of_numpy():
    assert torch.equal(normal((5,), seed=np.uint64(2**64 - 1)), normal((5,), seed=2**64 - 1))


@pytest.mark.parametrize("wrong", [np.bool_(True), np.float64(3)])
def test_other_scalars_of_numpy_are_no_seeds(wrong):
    with pytest.raises(TypeError, match="seed must be an int, an int64 tensor or None"):
        normal((5,), seed=wrong)


# ---- sizes past 64-bit integers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2**31, 2**63 - 1, 2**63, 2**100])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_side_of_a_window_may_be_any_integer(side, backend):
    q, k, v = qkv()
    unlimited = fastlm.attention(q, k, v, window=(None, 1), backend=backend)
    assert torch.equal(fastlm.attention(q, k, v, window=(side, 1), backend=backend), unlimited)


# ---- slopes that would get a gradient ---------------------------------------------------------------------------------------


def test_slopes_that_require_a_gradient_are_refused_only_where_one_would_be_missing():
    q, k, v = qkv()
    slopes = torch.nn.Parameter(torch.tensor([0.5, 2.0]))
    with pytest.raises(ValueError, match="alibi_slopes get no gradient"):
        fastlm.attention(q, k, v, alibi_slopes=slopes)
    expected = fastlm.attention(q, k, v, alibi_slopes=slopes.detach())
    with torch.no_grad():
        assert torch.equal(fastlm.attention(q, k, v, alibi_slopes=slopes), expected)
    lengths = torch.tensor([5, 5], dtype=torch.int32)
    decoded = fastlm.kvcache_attention(q, k, v, lengths, alibi_slopes=slopes)  # Decoding is documented to have no gradient.
    torch.testing.assert_close(decoded, expected)


# ---- dtypes under autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_autocast_promotes_mu_and_logvar_as_torch_does(dtypes):
    mu, logvar = (seeded_normal(i, (4, 6), dtype).requires_grad_() for i, dtype in enumerate(dtypes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, kl = fastlm.reparameterize_with_kl(mu, logvar, seed=1)
        assert fastlm.reparameterize(mu, logvar, seed=1).dtype == z.dtype == torch.float32
        torch.testing.assert_close(fastlm.gaussian_kl(mu, logvar), kl)
    expected = fastlm.reparameterize_with_kl(mu.detach().float(), logvar.detach().float(), seed=1)
    torch.testing.assert_close((z, kl), expected)
    (z.sum() + kl.sum()).backward()
    assert (mu.grad.dtype, logvar.grad.dtype) == dtypes
    with pytest.raises(TypeError, match="logvar must have mu's dtype"):
        fastlm.gaussian_kl(mu, logvar)


# ---- nested tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    nested = torch.nested.nested_tensor([torch.ones(2, 5, 8), torch.ones(2, 5, 8)], layout=layout)
    q, k, v = qkv()
    for call in (
        lambda: fastlm.attention(nested, k, v),
        lambda: fastlm.scaled_dot_product_attention(nested, k, v),
        lambda: fastlm.varlen_attention(nested, k, v, *(torch.zeros(1, dtype=torch.int32),) * 2),
    ):
        with pytest.raises(TypeError, match="query must be a dense tensor"):
            call()
    with pytest.raises(TypeError, match="mask must be a dense tensor"):
        fastlm.attention(q, k, v, mask=nested)
    with pytest.raises(TypeError, match="logvar must be a dense tensor"):
        fastlm.gaussian_kl(q, nested)
