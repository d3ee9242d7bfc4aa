"""Test the CUDA kernels on a GPU if there is one, else their device code on the host (cuda_host.py)."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import SPECS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_host
from support.banded import Banded
from support.cuda_host import CUDA, DEVICE, ON_GPU
from support.oracle import Oracle, noisy_results, output_gradients, run
from support.processes import HANG
from support.sweep import scaled
from test_cases import oracle
from test_latent_sweep import (
    DIFFERENTIABLE,
    GRADIENT_LAYOUTS,
    assume_clear_of_free_bits,
    kl_calls,
    laid_out,
    output_gradients_laid_out,
    seeds,
)
from test_noise import BOX_MULLER_ULPS, ulps_apart

import fastlm
from fastlm.backend import cuda as cuda_kernels
from fastlm.ops.noise import normal
from fastlm.testing import FLOATS, seeded_normal

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
ORDERS = ("forward", "reverse", "1")
on_host = pytest.mark.skipif(ON_GPU, reason="a GPU has an order of its own")
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def latent(dtype, *shape, prior_mu=None, prior_logvar=None, **options) -> dict:
    call = {"mu": seeded_normal(1, shape, dtype), "logvar": seeded_normal(2, shape, dtype), "seed": 1, **options}
    for seed, name, own in ((3, "prior_mu", prior_mu), (4, "prior_logvar", prior_logvar)):
        if own is not None:
            call[name] = seeded_normal(seed, own, dtype)
    return call


def on_cuda(call: dict, gradients=output_gradients, function=fastlm.reparameterize_with_kl) -> dict:
    with cuda_host.use():
        return run(function, call, DIFFERENTIABLE, gradients, **CUDA)


def assert_as_on_the_cpu(call: dict, gradients=output_gradients) -> None:
    """Assert the CPU's bits, as an element's arithmetic is the same. A KL may differ: it adds its terms in another order."""
    expected = run(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, gradients, backend="cpu")
    actual = on_cuda(call, gradients)
    assert actual.keys() == expected.keys()
    for what, result in actual.items():
        broadcast = what.startswith("gradient of prior") and call[what.split()[-1]].shape != call["mu"].shape
        if what == "output 1" or (ON_GPU and broadcast):
            assert_few_ulps(result, expected[what], what)
        else:
            assert torch.equal(result.nan_to_num(), expected[what].nan_to_num()), what


def assert_few_ulps(actual, expected, what: str, ulps: int = 8) -> None:
    """Assert an error of few ulps: of each KL, whose terms have one sign, and of the largest value in other sums."""
    size = expected.double().abs() if what == "output 1" else expected.double().abs().max()
    off = (actual.double() - expected.double()).abs() / (size * torch.finfo(expected.dtype).eps).clamp(min=1e-300)
    assert not (off > ulps).any(), f"{what} is off by {off.max():.3g} ulps"


# ---- correctness ------------------------------------------------------------------------------------------------------------

CALLS = [
    pytest.param(spec.name, case, dtype, id=f"{spec.name}-{case}-{str(dtype).removeprefix('torch.')}")
    for spec in SPECS.values()
    if "cuda" in spec.backends and spec.differentiable  # The noise is tested below.
    for case in spec.cases
    for dtype in spec.dtypes
]


@pytest.mark.parametrize(("name", "case", "dtype"), CALLS)
def test_values_and_gradients_are_as_good_as_plain_pytorch(name, case, dtype):
    with cuda_host.use():
        oracle(name, case, dtype).check(**CUDA)


@settings(max_examples=scaled(80))
@given(st.data())
def test_reparameterize_with_kl_anywhere(data):
    call = data.draw(kl_calls())
    assume_clear_of_free_bits(call)
    call["seed"] = data.draw(seeds(tuple(call["mu"].shape)))
    call["num_samples"] = data.draw(st.sampled_from([None, None, 1, 2, 5]))
    layout = output_gradients_laid_out(data.draw(GRADIENT_LAYOUTS))
    function = fastlm.reparameterize_with_kl
    with cuda_host.use():
        Oracle(function, call, DIFFERENTIABLE, noisy_results(function.__name__), layout).check(**CUDA)


@settings(max_examples=scaled(120))
@given(st.data())
def test_the_same_bits_as_on_the_cpu_anywhere(widest_isa, data):
    call = data.draw(kl_calls())
    call["seed"] = data.draw(seeds(tuple(call["mu"].shape)))
    call["num_samples"] = data.draw(st.sampled_from([None, None, 1, 2, 5]))
    assert_as_on_the_cpu(call, output_gradients_laid_out(data.draw(GRADIENT_LAYOUTS)))


# Row lengths around a lane's four terms, a strip, a short tile, a tile, and several pieces (csrc/cuda/latent.cuh).
EDGES = (1, 2, 3, 4, 5, 8, 9, 31, 33, 64, 100, 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4099)


@pytest.mark.parametrize("event", EDGES)
def test_rows_of_any_length(event, widest_isa):
    rows = max(3, 3000 // event)
    for i, dtype in enumerate(FLOATS):
        assert_as_on_the_cpu(latent(dtype, rows + i, event, prior_mu=(event,) if i % 2 else None, free_bits=0.05))


@DTYPES
def test_long_rows_of_strided_inputs(dtype, widest_isa):
    halves = seeded_normal(1, (3, 2 * 6001), dtype)
    mu, logvar = halves.chunk(2, dim=1)
    prior = seeded_normal(2, (3, 1), torch.float32)
    assert_as_on_the_cpu({"mu": mu, "logvar": logvar, "prior_logvar": prior, "seed": torch.tensor([5, -6, 7])})


@pytest.mark.parametrize("layout", ["chunk", "transposed", "stepped", "offset", "expanded"])
@pytest.mark.parametrize("columns", [24, 25, 26])
@DTYPES
def test_every_layout_of_every_dtype(dtype, columns, layout, widest_isa):
    """Kernels read 16 bytes at a time if the columns allow it, and single elements otherwise."""
    shape, prior_dtype = (7, columns), torch.bfloat16 if dtype == torch.float32 else torch.float32
    call = {name: laid_out(layout, shape, dtype, seed, 1) for seed, name in enumerate(("mu", "logvar"))}
    call |= {"prior_mu": laid_out(layout, shape, prior_dtype, 5, 1), "prior_logvar": laid_out(layout, shape, dtype, 6, 1)}
    seed = torch.arange(7)
    assert_as_on_the_cpu({**call, "seed": seed, "num_samples": 3, "logvar_clamp": (-1.0, 1.0)})


@pytest.mark.parametrize("position", [0, 1, 2**34 - 7, 2**62 + 1])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 1030])
def test_the_noise_has_the_bits_of_the_cpu_s(count, position, widest_isa):
    expected = normal((count,), seed=-5, position=position, backend="cpu")
    with cuda_host.use():
        actual = normal((count,), seed=-5, position=position, **CUDA).cpu()
    assert torch.equal(actual, expected)
    reference = normal((count,), seed=-5, position=position, backend="reference")
    assert count == 0 or ulps_apart(actual, reference).max() <= BOX_MULLER_ULPS


@pytest.mark.parametrize("wanted", ["z", "kl"])
@pytest.mark.parametrize("num_samples", [None, 3])
def test_a_loss_may_use_one_of_the_outputs_alone(wanted, num_samples, widest_isa):
    mu, logvar = (seeded_normal(seed, (4, 9), torch.float32).requires_grad_() for seed in (1, 2))

    def gradients(backend):
        z, kl = fastlm.reparameterize_with_kl(
            mu.to(DEVICE), logvar.to(DEVICE), seed=1, num_samples=num_samples, backend=backend
        )
        return torch.autograd.grad((z if wanted == "z" else kl).sum(), (mu, logvar))

    expected = gradients("reference")
    with cuda_host.use():
        for actual, right in zip(gradients("cuda"), expected):
            torch.testing.assert_close(actual, right)


def test_what_is_not_a_number_stays_where_it_is():
    call = latent(torch.float32, 6, 40, free_bits=0.1, logvar_clamp=(-1.0, 1.0))
    call["mu"][1, 3], call["logvar"][2, 5], call["logvar"][4, 39] = math.nan, math.nan, math.inf
    with cuda_host.use():
        Oracle(fastlm.reparameterize_with_kl, call, DIFFERENTIABLE, noisy_results("reparameterize_with_kl")).check(**CUDA)


# ---- nothing outside the tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 64), (2, 2051), (1030,)])
@DTYPES
def test_nothing_is_read_or_written_outside(dtype, shape, shift, monkeypatch):
    bands = Banded(shift, DEVICE)
    call = latent(dtype, *shape, prior_mu=shape[-1:], prior_logvar=shape, num_samples=2)
    leaves = {name: bands.put(value).requires_grad_() for name, value in call.items() if isinstance(value, torch.Tensor)}
    with cuda_host.use():
        monkeypatch.setattr(cuda_kernels, "empty", bands.empty)
        z, kl = fastlm.reparameterize_with_kl(**{**call, **leaves}, backend="cuda")
        grads = [bands.put(torch.ones(out.shape, dtype=out.dtype)) for out in (z, kl)]
        torch.autograd.grad((z, kl), list(leaves.values()), grads)
    assert len(bands.whole) == 6
    bands.check()


SANITIZED_TESTS = "anywhere or layout or outside or strided or (plain_pytorch and bfloat16)"


@on_host
@pytest.mark.skipif(cuda_host.SANITIZED, reason="this is that run")
def test_the_sanitizers_find_nothing():
    """Run the same tests with the device code under AddressSanitizer and UBSan, if those run here."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip(f"{compiler} has no sanitizers here")
    settings = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [os.path.join(os.path.dirname(sys.executable), "pytest"), "-q", "-x", __file__, "-k", SANITIZED_TESTS]
    process = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=HANG, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]


# ---- determinism ------------------------------------------------------------------------------------------------------------

PER_ROW = ("output 0", "output 1", "gradient of mu", "gradient of logvar")


@DTYPES
@pytest.mark.parametrize("columns", [3, 37, 300, 2100])
def test_a_row_is_the_same_anywhere_in_any_batch(columns, dtype):
    rows = 7
    seed = torch.tensor([5, -6, 7, 2**62, 9, 10, 11])
    call = latent(dtype, rows, columns, prior_mu=(columns,), seed=seed)
    weights = seeded_normal(5, (rows, columns), dtype), seeded_normal(6, (rows,), dtype)

    def results(which) -> dict:
        some = {name: value[which] if name in ("mu", "logvar", "seed") else value for name, value in call.items()}
        return on_cuda(some, lambda outputs, dtype: [w[which].to(out.dtype) for w, out in zip(weights, outputs)])

    whole = results(slice(rows))
    for which in (slice(1), slice(3, 5), torch.tensor([6, 0, 3])):
        part = results(which)
        for what in PER_ROW:
            assert torch.equal(part[what], whole[what][which]), what


RACES = {
    "tiny rows": lambda: latent(torch.float32, 501, 3),
    "strips": lambda: latent(torch.float32, 3, 700, prior_logvar=(700,)),
    "pieces": lambda: latent(torch.float64, 2, 9000),
    "many pieces": lambda: latent(torch.float32, 300_000),
    "samples": lambda: latent(torch.bfloat16, 9, 50, num_samples=3, seed=torch.arange(9)),
}


@on_host
@pytest.mark.parametrize("case", RACES)
def test_the_order_of_threads_changes_no_bit(case):
    results = []
    for order in ORDERS:
        with cuda_host.schedule(order):
            results.append(on_cuda(RACES[case]()))
    for other in results[1:]:
        assert all(torch.equal(other[what], results[0][what]) for what in other)


def kl_in_each_order(case: str, skip: int) -> list[torch.Tensor]:
    found = []
    for order in ORDERS:
        stranger = {name: v + 1 if isinstance(v, torch.Tensor) else v for name, v in RACES[case]().items()}
        on_cuda(stranger)  # This leaves other numbers in shared memory.
        with cuda_host.schedule(order, skip):
            found.append(on_cuda(RACES[case]())["output 1"])
    return found


@on_host
@pytest.mark.parametrize(("case", "skip"), [("tiny rows", 0), ("strips", 0), ("strips", 1), ("pieces", 1), ("many pieces", 4)])
def test_a_missing_barrier_shows(case, skip):
    """Otherwise the test of the order of threads would prove nothing."""
    right, missing = kl_in_each_order(case, -1), kl_in_each_order(case, skip)
    assert all(torch.equal(kl, right[0]) for kl in right)
    assert not all(torch.equal(kl, right[0]) for kl in missing)


@on_host
def test_the_stand_in_for_cuda_s_runtime_does_what_it_should(tmp_path):
    compiler, program = os.environ.get("CXX", "g++"), tmp_path / "selftest"
    source = cuda_host.STAND_IN / "selftest.cpp"
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Wextra", f"-I{source.parent}", source, "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == ""


# ---- tests that need a GPU --------------------------------------------------------------------------------------------------


@on_gpu
def test_a_graph_draws_anew_from_the_seed_that_stands_on_the_device():
    mu, logvar = (seeded_normal(seed, (64, 100), torch.float32).cuda() for seed in (1, 2))
    seed = torch.tensor(1, device="cuda")
    fastlm.reparameterize_with_kl(mu, logvar, seed=seed, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, kl = fastlm.reparameterize_with_kl(mu, logvar, seed=seed, backend="cuda")
    for number in (1, 2, -3):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(z, fastlm.reparameterize(mu, logvar, seed=number, backend="cuda"))


@on_gpu
def test_kernels_follow_torch_s_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        mu = torch.zeros(100, 100, device="cuda") + 1.0
        kl = fastlm.gaussian_kl(mu, torch.zeros_like(mu), backend="cuda")
    stream.synchronize()
    assert torch.equal(kl.cpu(), torch.full((100,), 50.0))
