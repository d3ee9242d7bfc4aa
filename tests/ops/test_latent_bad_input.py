"""Test that bad input is refused with an error that names the argument and the fault, and that odd but legal input is taken."""

import math
import re

import pytest
import torch

import fastlm
from fastlm.ops.noise import normal
from fastlm.testing import FLOATS

MU = torch.zeros(3, 5)
NAN = math.nan


def dtype_of(name, dtype):
    return f"{name} must be float32, float64, bfloat16 or float16; got torch.{dtype}"


POSTERIOR = [
    ({"mu": [1.0, 2.0]}, TypeError, "mu must be a tensor; got list"),
    ({"mu": None}, TypeError, "mu must be a tensor; got NoneType"),
    ({"logvar": 0.0}, TypeError, "logvar must be a tensor; got float"),
    ({"mu": MU.int()}, TypeError, dtype_of("mu", "int32")),
    ({"mu": MU.bool()}, TypeError, dtype_of("mu", "bool")),
    ({"mu": MU.cfloat()}, TypeError, dtype_of("mu", "complex64")),
    ({"mu": MU.to(torch.float8_e4m3fn)}, TypeError, dtype_of("mu", "float8_e4m3fn")),
    ({"logvar": MU.long()}, TypeError, dtype_of("logvar", "int64")),
    ({"logvar": MU.double()}, TypeError, "logvar must have mu's dtype torch.float32; got torch.float64"),
    ({"mu": MU.bfloat16()}, TypeError, "logvar must have mu's dtype torch.bfloat16; got torch.float32"),
    ({"logvar": torch.zeros(3, 4)}, ValueError, "logvar must have mu's shape (3, 5); got (3, 4)"),
    ({"logvar": torch.zeros(5)}, ValueError, "logvar must have mu's shape (3, 5); got (5,)"),
    ({"logvar": torch.zeros(3, 1)}, ValueError, "logvar must have mu's shape (3, 5); got (3, 1)"),
    ({"logvar": torch.zeros(3, 5, device="meta")}, ValueError, "logvar must be on mu's device cpu; got meta"),
    ({"mu": MU.to_sparse()}, TypeError, "mu must be a dense tensor; got layout torch.sparse_coo"),
    ({"logvar": MU.to_sparse()}, TypeError, "logvar must be a dense tensor; got layout torch.sparse_coo"),
    ({"backend": "gpu"}, ValueError, "backend (or FASTLM_BACKEND) must be one of cuda, triton, cpu, reference; got 'gpu'"),
    ({"backend": "CPU"}, ValueError, "backend (or FASTLM_BACKEND) must be one of cuda, triton, cpu, reference; got 'CPU'"),
    ({"backend": "cuda"}, fastlm.UnsupportedError, "cannot run on backend 'cuda': the tensors are on cpu"),
]

SEED = [
    ({"seed": 1.5}, TypeError, "seed must be an int, an int64 tensor or None; got float"),
    ({"seed": True}, TypeError, "seed must be an int, an int64 tensor or None; got bool"),
    ({"seed": "1"}, TypeError, "seed must be an int, an int64 tensor or None; got str"),
    ({"seed": [1, 2, 3]}, TypeError, "seed must be an int, an int64 tensor or None; got list"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must be int64; got torch.float32"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must be int64; got torch.int32"),
    ({"seed": torch.tensor([1, 2])}, ValueError, "seed must be 0-d or of shape (3,), one per example; got shape (2,)"),
    ({"seed": torch.tensor([1])}, ValueError, "seed must be 0-d or of shape (3,), one per example; got shape (1,)"),
    ({"seed": torch.ones(3, 5).long()}, ValueError, "seed must be 0-d or of shape (3,), one per example; got shape (3, 5)"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed must be on cpu, like the other tensors; got meta"),
    ({"seed": 2**64}, ValueError, "seed must lie in [-2**63, 2**64); got 18446744073709551616"),
    ({"seed": -(2**63) - 1}, ValueError, "seed must lie in [-2**63, 2**64); got -9223372036854775809"),
]

KL = [
    ({"prior_mu": 0.0}, TypeError, "prior_mu must be a tensor; got float"),
    ({"prior_mu": MU.int()}, TypeError, dtype_of("prior_mu", "int32")),
    ({"prior_logvar": MU.to_sparse()}, TypeError, "prior_logvar must be a dense tensor; got layout torch.sparse_coo"),
    ({"prior_mu": torch.zeros(3)}, ValueError, "prior_mu must broadcast to mu's shape (3, 5); got (3,)"),
    ({"prior_mu": torch.zeros(2, 3, 5)}, ValueError, "prior_mu must broadcast to mu's shape (3, 5); got (2, 3, 5)"),
    ({"prior_mu": torch.zeros(1, 3, 5)}, ValueError, "prior_mu must broadcast to mu's shape (3, 5); got (1, 3, 5)"),
    ({"prior_logvar": torch.zeros(2, 5)}, ValueError, "prior_logvar must broadcast to mu's shape (3, 5); got (2, 5)"),
    ({"prior_logvar": torch.zeros(0)}, ValueError, "prior_logvar must broadcast to mu's shape (3, 5); got (0,)"),
    ({"prior_logvar": torch.zeros(5, device="meta")}, ValueError, "prior_logvar must be on mu's device cpu; got meta"),
    ({"event_dims": 3}, ValueError, "event_dims must lie between 0 and 2; got 3"),
    ({"event_dims": -1}, ValueError, "event_dims must lie between 0 and 2; got -1"),
    ({"event_dims": 1.0}, TypeError, "event_dims must be an int; got float"),
    ({"event_dims": True}, TypeError, "event_dims must be an int; got bool"),
    ({"event_dims": None}, TypeError, "event_dims must be an int; got NoneType"),
    ({"free_bits": -0.1}, ValueError, "free_bits must be finite and at least 0; got -0.1"),
    ({"free_bits": NAN}, ValueError, "free_bits must be finite and at least 0; got nan"),
    ({"free_bits": math.inf}, ValueError, "free_bits must be finite and at least 0; got inf"),
    ({"free_bits": "1"}, TypeError, "free_bits must be a number; got str"),
    ({"free_bits": True}, TypeError, "free_bits must be a number; got bool"),
    ({"free_bits": None}, TypeError, "free_bits must be a number; got NoneType"),
    ({"logvar_clamp": 3.0}, TypeError, "logvar_clamp must be a pair (low, high); got 3.0"),
    ({"logvar_clamp": (1.0,)}, TypeError, "logvar_clamp must be a pair (low, high); got (1.0,)"),
    ({"logvar_clamp": (0, 1, 2)}, TypeError, "logvar_clamp must be a pair (low, high); got (0, 1, 2)"),
    ({"logvar_clamp": ("a", "b")}, TypeError, "logvar_clamp must be"),
    ({"logvar_clamp": (None, 1.0)}, TypeError, "logvar_clamp must be"),
    ({"logvar_clamp": (1.0, -1.0)}, ValueError, "logvar_clamp must be (low, high) with low <= high; got (1.0, -1.0)"),
    ({"logvar_clamp": (NAN, 1.0)}, ValueError, "logvar_clamp must be (low, high) with low <= high; got (nan, 1.0)"),
    ({"logvar_clamp": (0.0, NAN)}, ValueError, "logvar_clamp must be (low, high) with low <= high; got (0.0, nan)"),
]

SAMPLES = [
    ({"num_samples": 0}, ValueError, "num_samples must lie between 1 and 2147483647; got 0"),
    ({"num_samples": -2}, ValueError, "num_samples must lie between 1 and 2147483647; got -2"),
    ({"num_samples": 2.0}, TypeError, "num_samples must be an int; got float"),
    ({"num_samples": True}, TypeError, "num_samples must be an int; got bool"),
]

TEMPERATURE = [
    ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0; got -1.0"),
    ({"temperature": NAN}, ValueError, "temperature must be finite and at least 0; got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
]

TABLE = [
    pytest.param(function, *row, id=f"{function.__name__} {next(iter(row[0]))} {i}")
    for function, rows in (
        (fastlm.reparameterize, POSTERIOR + SEED + TEMPERATURE),
        (fastlm.reparameterize_with_kl, POSTERIOR + SEED + KL + SAMPLES),
        (fastlm.gaussian_kl, POSTERIOR + KL),
    )
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("function", "wrong", "error", "message"), TABLE)
def test_each_is_refused_by_name(function, wrong, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        function(**{"mu": MU, "logvar": MU, **wrong})
    assert raised.type is error


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_samples", [None, 2])
def test_empty_tensors_give_empty_results_and_gradients(shape, dtype, num_samples, isa):
    mu, logvar = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    prior = torch.zeros(shape[-1:], requires_grad=True)
    z, kl = fastlm.reparameterize_with_kl(mu, logvar, prior_mu=prior, num_samples=num_samples, seed=1, backend="cpu")
    (z.sum() + kl.sum()).backward()
    assert z.shape == (shape if num_samples is None else (num_samples, *shape))
    assert kl.shape == shape[:-1] and not kl.any()
    assert mu.grad.shape == logvar.grad.shape == shape
    assert prior.grad.shape == prior.shape and not prior.grad.any()


def test_an_example_without_elements_may_have_a_seed_of_its_own(isa):
    z = fastlm.reparameterize(torch.zeros(3, 0), torch.zeros(3, 0), seed=torch.tensor([1, 2, 3]), backend="cpu")
    assert z.shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_may_need_gradients_on_every_instruction_set(dtype, isa):
    mu, logvar = (torch.ones(3, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    fastlm.gaussian_kl(mu, logvar, backend="cpu").sum().backward()
    assert mu.grad.dtype == dtype and torch.equal(mu.grad, torch.ones_like(mu))
    torch.testing.assert_close(logvar.grad, torch.full_like(mu, math.expm1(1) / 2))


def test_legal_oddities_are_taken(isa):
    scalar = torch.tensor(0.5)
    z, kl = fastlm.reparameterize_with_kl(scalar, scalar, event_dims=0, seed=2**64 - 1, num_samples=1, backend="cpu")
    assert z.shape == (1,) and kl.shape == ()
    kl = fastlm.gaussian_kl(MU, MU, event_dims=2, free_bits=0, logvar_clamp=[-math.inf, math.inf], backend="cpu")
    assert kl.shape == () and kl == 0.0
    parameter = torch.nn.Parameter(MU)
    assert fastlm.reparameterize(parameter, parameter, temperature=0, backend="cpu").shape == MU.shape


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"position": -1}, ValueError, "position"),
        ({"position": 2**64}, ValueError, "position"),
        ({"position": 1.5}, TypeError, "position"),
        ({"seed": torch.tensor([1])}, ValueError, "seed must be 0-d, one per example; got shape (1,)"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_noise_refuses_what_it_cannot_draw(wrong, error, message, backend, widest_isa):
    with pytest.raises(error, match=re.escape(message)):
        normal((4,), **{"seed": 1, **wrong}, backend=backend)


def test_an_unknown_device_is_not_read(widest_isa):
    meta = torch.zeros(3, 5, device="meta")
    with pytest.raises(fastlm.UnsupportedError, match="the tensors are on meta"):
        fastlm.gaussian_kl(meta, meta, backend="cpu")
