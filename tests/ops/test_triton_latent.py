"""Test the Triton kernels of the latent and of the noise: on the GPU if there is one, in Triton's interpreter elsewhere.

The interpreter takes about a tenth of a second for a program, which is a tile of 1024 elements.
"""

import itertools
import math
import os
import tempfile

import numpy as np
import pytest
import torch
from cases import SPECS
from hypothesis import given, settings
from hypothesis import strategies as st
from support.banded import Banded
from support.oracle import Oracle, noisy_results, output_gradients, run
from support.triton_interpreter import DEVICE, ON_GPU
from test_cases import oracle
from test_cuda import assert_few_ulps, latent
from test_latent_parts import assert_parts_are_of_the_whole
from test_latent_sweep import (
    DIFFERENTIABLE,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    assume_clear_of_free_bits,
    kl_calls,
    laid_out,
    output_gradients_laid_out,
    seeds,
)
from test_noise import BOX_MULLER_ULPS, ulps_apart

import fastlm
from fastlm.backend import triton as triton_kernels
from fastlm.ops.latent import triton as latent_kernels
from fastlm.ops.noise import normal
from fastlm.testing import FLOATS, seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")

TRITON = {"backend": "triton", "device": DEVICE}
SCALE = int(os.environ.get("FASTLM_SWEEP", "1"))  # How many times as many random calls.
FEW = 3000  # Elements that the interpreter computes in a second or two.
TILE = 1024  # kernels/latent/__init__.py
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
BOTH = fastlm.reparameterize_with_kl


# ---- correctness ------------------------------------------------------------------------------------------------------------


def _cases() -> list:
    """Return each case in one dtype, those of few elements; on a GPU, which is fast, all of them in all dtypes."""
    specs = [spec for spec in SPECS.values() if "triton" in spec.backends and "mu" in spec.differentiable]
    cases = [(spec.name, case) for spec in specs for case, make in spec.cases.items() if ON_GPU or _is_small(make)]
    return [
        pytest.param(name, case, dtype, id=f"{name}-{case}-{str(dtype).removeprefix('torch.')}")
        for i, (name, case) in enumerate(cases)
        for dtype in (FLOATS if ON_GPU else FLOATS[i % len(FLOATS) :][:1])
    ]


def _is_small(make) -> bool:
    return make(torch.float32)["mu"].numel() <= FEW


@pytest.mark.parametrize(("name", "case", "dtype"), _cases())
def test_values_and_gradients_are_as_good_as_plain_pytorch(name, case, dtype):
    oracle(name, case, dtype).check(**TRITON)


@settings(max_examples=15 * SCALE)
@given(st.data())
def test_reparameterize_with_kl_anywhere(data):
    call = data.draw(kl_calls().filter(lambda call: call["mu"].numel() <= FEW))
    assume_clear_of_free_bits(call)
    call["seed"] = data.draw(seeds(tuple(call["mu"].shape)))
    call["num_samples"] = data.draw(st.sampled_from([None, None, 1, 2]))
    layout = output_gradients_laid_out(data.draw(GRADIENT_LAYOUTS))
    Oracle(BOTH, call, DIFFERENTIABLE, noisy_results(BOTH.__name__), layout).check(**TRITON)


# ---- the CPU's bits ---------------------------------------------------------------------------------------------------------


def assert_as_on_the_cpu(call: dict, gradients=output_gradients) -> None:
    """Assert the CPU's bits, as an element's arithmetic is the same. A KL may differ: it adds its terms in another order."""
    expected = run(BOTH, call, DIFFERENTIABLE, gradients, backend="cpu")
    actual = run(BOTH, call, DIFFERENTIABLE, gradients, **TRITON)
    assert actual.keys() == expected.keys()
    for what, result in actual.items():
        summed_by_torch = what.startswith("gradient of prior") and call[what.split()[-1]].shape != call["mu"].shape
        if what == "output 1" or (ON_GPU and summed_by_torch):
            finite = expected[what].isfinite()
            assert torch.equal(result[~finite].nan_to_num(), expected[what][~finite].nan_to_num()), what
            assert_few_ulps(result[finite], expected[what][finite], what) if finite.any() else None
        else:
            assert torch.equal(result.nan_to_num(), expected[what].nan_to_num()), what


@settings(max_examples=15 * SCALE)
@given(st.data())
def test_the_same_bits_as_on_the_cpu_anywhere(widest_isa, data):
    call = data.draw(kl_calls().filter(lambda call: 0 < call["mu"].numel() <= FEW))
    call["seed"] = data.draw(seeds(tuple(call["mu"].shape)))
    call["num_samples"] = data.draw(st.sampled_from([None, None, 1, 2]))
    assert_as_on_the_cpu(call, output_gradients_laid_out(data.draw(GRADIENT_LAYOUTS)))


@pytest.mark.parametrize("columns", [24, 25])
@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, itertools.cycle(FLOATS))), ids=str)
def test_every_layout(layout, dtype, columns, widest_isa):
    """Kernels read 16 bytes at a time if the columns allow it, and single elements otherwise."""
    shape, prior_dtype = (7, columns), torch.bfloat16 if dtype == torch.float32 else torch.float32
    call = {name: laid_out(layout, shape, dtype, seed, 1) for seed, name in enumerate(("mu", "logvar"))}
    call |= {"prior_mu": laid_out(layout, shape, prior_dtype, 5, 1), "prior_logvar": laid_out(layout, shape, dtype, 6, 1)}
    assert_as_on_the_cpu({**call, "seed": torch.arange(7), "num_samples": 3, "logvar_clamp": (-1.0, 1.0)})


NUMBERS = (math.nan, math.inf, -math.inf, 1e30, -1e30, 88.7, 89.0, -87.0, -104.0, -200.0, 1e-30, 0.0, -0.0)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"free_bits": 0.1, "logvar_clamp": (-1.0, 1.0)}], ids=["plain", "free bits, clamp"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_numbers_at_the_edge(name, options, dtype, widest_isa):
    """What is not finite comes out of the element, or the row of the KL, that it went into, as on the CPU."""
    call = latent(dtype, len(NUMBERS), 5, prior_mu=(len(NUMBERS), 5), prior_logvar=(len(NUMBERS), 5), **options)
    call[name][:, 2] = torch.tensor(NUMBERS, dtype=torch.float64).to(dtype)
    assert_as_on_the_cpu(call)


@pytest.mark.parametrize(("count", "position"), [(0, 0), (1, 2**34 - 7), (3, 1), (4, 2**62 + 1), (2050, 0), (1030, 2**62 + 3)])
def test_the_noise_has_the_bits_of_the_cpu_s(count, position, widest_isa):
    expected = normal((count,), seed=-5, position=position, backend="cpu")
    actual = normal((count,), seed=-5, position=position, **TRITON).cpu()
    assert torch.equal(actual, expected)
    reference = normal((count,), seed=-5, position=position, backend="reference")
    assert count == 0 or ulps_apart(actual, reference).max() <= BOX_MULLER_ULPS


@pytest.mark.skipif(ON_GPU, reason="the parts are CPU tensors")
@pytest.mark.parametrize(("num_samples", "seed"), [(None, -5), (3, torch.tensor(2**62 + 3)), (3, torch.arange(9) - 4)], ids=str)
def test_a_part_has_the_bits_of_the_whole(num_samples, seed):
    assert_parts_are_of_the_whole(torch.float32, num_samples, seed, "triton")


# ---- sums in one order ------------------------------------------------------------------------------------------------------

# Row lengths around powers of 2, a tile, and several pieces, whose rows start at multiples of 16 or do not.
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 336, 504, 505, 512, 700, 1008, 1009, 1023, 1024, 1025, 2016, 2017, 3030)


def _sum_of_neighbours(terms: torch.Tensor, length: int) -> torch.Tensor:
    """Sum rows (rows, n), as (rows, length) with zeros behind, neighbour with neighbour. `length` is a power of 2."""
    terms = torch.nn.functional.pad(terms, (0, length - terms.shape[1]))
    while terms.shape[1] > 1:
        terms = terms[:, ::2] + terms[:, 1::2]
    return terms[:, 0]


def _sum_of_pieces(terms: torch.Tensor) -> torch.Tensor:
    """Sum rows, float32 (rows, n), as kernels do: in pieces if they are longer than a tile has room for."""
    n = terms.shape[1]
    room = TILE if n % 16 == 0 else TILE - 16
    if n <= room or n <= TILE - 16:
        return _sum_of_neighbours(terms, 1 << (n - 1).bit_length())
    pieces = [_sum_of_neighbours(piece, TILE).double() for piece in terms.split(TILE - 16, dim=1)]
    return _sum_of_neighbours(torch.stack(pieces, 1), 128).float()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_order_of_a_sum_depends_on_its_length_alone(length):
    """The order is that of neighbours, and so no matter of threads. The rows of a call lie at every place of a tile."""
    rows = max(3, 1100 // length)
    call = latent(torch.float32, rows, length, prior_mu=(length,))
    tensors = {name: tensor.to(DEVICE) for name, tensor in call.items() if name != "seed"}
    kl = fastlm.gaussian_kl(**tensors, free_bits=0.05, backend="triton")
    terms = fastlm.gaussian_kl(**tensors, free_bits=0.05, event_dims=0, backend="triton")
    assert torch.equal(kl.cpu(), _sum_of_pieces(terms.cpu()))


@pytest.mark.parametrize(("columns", "dtype"), list(zip((3, 37, 512, 1500), FLOATS)), ids=str)
def test_a_row_is_the_same_anywhere_in_any_batch(columns, dtype):
    rows = 5
    call = latent(dtype, rows, columns, prior_mu=(columns,), seed=torch.tensor([5, -6, 7, 2**62, 9]))
    weights = seeded_normal(5, (rows, columns), dtype), seeded_normal(6, (rows,), dtype)

    def results(which) -> dict:
        some = {name: value[which] if name in ("mu", "logvar", "seed") else value for name, value in call.items()}
        gradients = [w[which] for w in weights]
        make = lambda outputs, dtype: [w.to(out.dtype) for w, out in zip(gradients, outputs)]  # noqa: E731
        return run(BOTH, some, ("mu", "logvar"), make, **TRITON)

    whole = results(slice(rows))
    for which in (slice(1), torch.tensor([4, 0, 3])):
        for what, part in results(which).items():
            assert torch.equal(part, whole[what][which]), what


# ---- nothing outside the tensors --------------------------------------------------------------------------------------------


def watch_loads(monkeypatch, bands: Banded) -> None:
    """Make the interpreter assert that it loads nothing from a band. A kernel may drop what it loads outside a tensor."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def watched(self, pointers, mask, *rest):
        assert not bands.hold(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]), "a read outside"
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("shape", "dtype"), list(zip([(1,), (3, 5), (7, 64), (2, 1051)], FLOATS)), ids=str)
def test_nothing_is_read_or_written_outside(shape, dtype, shift, monkeypatch):
    bands = Banded(shift, DEVICE)
    call = latent(dtype, *shape, prior_mu=shape[-1:], prior_logvar=shape, num_samples=2)
    leaves = {name: bands.put(value).requires_grad_() for name, value in call.items() if isinstance(value, torch.Tensor)}
    monkeypatch.setattr(latent_kernels, "empty", bands.empty)
    if not ON_GPU:
        watch_loads(monkeypatch, bands)
    z, kl = BOTH(**{**call, **leaves}, backend="triton")
    grads = [bands.put(torch.ones(out.shape, dtype=out.dtype)) for out in (z, kl)]
    torch.autograd.grad((z, kl), list(leaves.values()), grads)
    assert len(bands.whole) == 6
    bands.check()


def test_elements_that_lie_further_apart_than_32_bits_count():
    stride = (1 << 31) + 64
    length = 2 * stride
    with tempfile.TemporaryDirectory() as folder:
        if ON_GPU:
            whole = torch.empty(length, dtype=torch.float16, device=DEVICE)
        else:  # A file without blocks, but for what is written.
            whole = torch.from_numpy(np.memmap(f"{folder}/numbers", dtype=np.float16, mode="w+", shape=(length,)))
        far = whole.as_strided((2, 2, 16), (stride - 32, stride, 1)).copy_(seeded_normal(1, (2, 2, 16), torch.float16))
        results = [BOTH(mu, mu, seed=1, backend="triton") for mu in (far, far.contiguous())]
        for actual, expected in zip(*results):
            assert torch.equal(actual, expected)


# ---- torch around it --------------------------------------------------------------------------------------------------------


def _gradients(backend: str, function=BOTH, create_graph: bool = False, **options) -> tuple[torch.Tensor, ...]:
    mu, logvar = (seeded_normal(i, (3, 5), torch.float32).to(DEVICE).requires_grad_() for i in (1, 2))
    z, kl = function(mu, logvar, seed=3, backend=backend, **options)
    first = torch.autograd.grad(z.square().sum() + kl.square().sum(), (mu, logvar), create_graph=create_graph)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (mu, logvar)) if create_graph else first


def test_second_derivatives_are_those_of_the_reference():
    for actual, expected in zip(_gradients("triton", create_graph=True), _gradients("reference", create_graph=True)):
        torch.testing.assert_close(actual, expected)


def test_tangents_are_those_of_the_reference():
    mu, logvar = (seeded_normal(i, (3, 5), torch.float32).to(DEVICE) for i in (1, 2))
    tangents = [
        torch.func.jvp(lambda *x, backend=backend: BOTH(*x, seed=3, backend=backend), (mu, logvar), (logvar, mu))[1]
        for backend in ("triton", "reference")
    ]
    for actual, expected in zip(*tangents):
        torch.testing.assert_close(actual, expected)


def test_vmap_gives_each_entry_a_stream():
    mu, logvar, seed = seeded_normal(1, (3, 5), torch.float32).to(DEVICE), torch.zeros(3, 5), torch.arange(3)
    logvar, seed = logvar.to(DEVICE), seed.to(DEVICE)
    z, kl = torch.vmap(lambda *call: BOTH(*call[:2], seed=call[2], backend="triton"))(mu, logvar, seed)
    expected = BOTH(mu, logvar, seed=seed, backend="triton")
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])


def test_opcheck_and_compile():
    mu = seeded_normal(1, (3, 5), torch.float32).to(DEVICE)
    options = (True, 1, 0.1, -1.0, 1.0, 2, 1.0, 0, None)
    seed = torch.tensor(4, device=DEVICE)
    torch.library.opcheck(torch.ops.fastlm.triton_reparameterize.default, (mu, mu, mu[0], None, seed, *options))
    grads = mu.new_ones(2, 3, 5), mu.new_ones(3), True, False
    backward = torch.ops.fastlm.triton_reparameterize_backward.default
    torch.library.opcheck(backward, (*grads, mu, mu, mu[0], None, seed, *options))
    torch.library.opcheck(torch.ops.fastlm.triton_normal.default, (seed, [3, 5], 1))
    torch._dynamo.reset()
    compiled = torch.compile(BOTH, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(_gradients("triton", compiled), _gradients("triton")):
        torch.testing.assert_close(actual, expected)


def test_tensors_on_a_cpu_run_there_unless_triton_is_named():
    x = torch.zeros(3, 5)
    assert fastlm.explain(BOTH, x, x).backend == "cpu"
    explanation = fastlm.explain(BOTH, x.to(DEVICE), x.to(DEVICE), backend="triton")
    assert explanation.backend == "triton" and "triton" not in explanation.why_not


def test_without_the_interpreter_a_cpu_s_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    x = torch.zeros(3, 5)
    with pytest.raises(fastlm.UnsupportedError, match="'triton': the tensors are on cpu"):
        BOTH(x, x, backend="triton")
