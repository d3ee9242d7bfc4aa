"""Run every GPU kernel once, through the public ops and within a minute: the first tests of `make gpu`.

On a GPU, if there is one; elsewhere in Triton's interpreter, and CUDA's kernels on the host.
"""

import sys
from pathlib import Path

import pytest
import torch
from cases import SPECS
from support import cuda_host
from support.derivatives import add_tangents, and_tangents, with_tangents
from support.oracle import Oracle, noisy_results, run
from support.stats import ALL_STATS, with_stats
from support.triton_interpreter import DEVICE, ON_GPU

import fastlm
from fastlm.backend import triton as triton_kernels
from fastlm.testing import seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

QKV = ("query", "key", "value")
LENGTH, DIM = (300, 64) if ON_GPU else (40, 16)  # GPUs copy by descriptor what is as long as a tile.


def normals(*shapes: tuple[int, ...]) -> dict:
    """Return query, key and value, of half precision, with these shapes."""
    return {name: seeded_normal(i, shape, torch.float16) for i, (name, shape) in enumerate(zip(QKV, shapes))}


def square(**options) -> dict:
    """Return a causal call of two query heads over one of keys."""
    shapes = (1, 2, LENGTH, DIM), (1, 1, LENGTH, DIM), (1, 1, LENGTH, DIM)
    return {**normals(*shapes), "causal": True, "return_lse": True, **options}


def of_spec(name: str, case: str, dtype=torch.float16):
    """Return a case of an op's spec as (function, arguments, differentiable tensors, results that hold noise)."""
    spec = SPECS[name]
    return spec.function, spec.cases[case](dtype), spec.differentiable, noisy_results(name)


ATTENTION = {
    "attention": (fastlm.attention, square(), QKV, set()),
    "a float mask": (
        fastlm.attention,
        square(mask=seeded_normal(9, (LENGTH, LENGTH), torch.float16)),
        (*QKV, "mask"),
        set(),
    ),
    "dropout": of_spec("attention", "dropout", torch.float32),
    "packed": of_spec("varlen_attention", next(iter(SPECS["varlen_attention"].cases))),
    "statistics": (with_stats(fastlm.attention, ALL_STATS), square(), QKV, set()),
    "tangents": (
        with_tangents(fastlm.attention),
        add_tangents(square(), QKV),
        and_tangents(QKV),
        set(),
    ),
    "decoding": of_spec("kvcache_attention", "split, paged"),
    "decoding, appended": of_spec("kvcache_attention", "appended"),
}
LATENT = {
    "the latent": of_spec("reparameterize_with_kl", "samples of everything", torch.bfloat16),
    "its KL": of_spec("gaussian_kl", "everything", torch.float32),
    "its sample": of_spec("reparameterize", "seed per example", torch.float32),
    "the noise": of_spec("normal", "inside a block", torch.float32),
}
LATENT_BACKENDS = [backend for backend in SPECS["reparameterize_with_kl"].backends if backend in ("cuda", "triton")]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    Oracle(*ATTENTION[name]).check(backend="triton", device=DEVICE)


@pytest.mark.parametrize("backend", LATENT_BACKENDS)
@pytest.mark.parametrize("name", LATENT)
def test_the_latent(name, backend):
    if backend == "triton":
        Oracle(*LATENT[name]).check(backend="triton", device=DEVICE)
        return
    if DEVICE == "cuda" and (reason := fastlm.backends()["cuda"]) and not reason.startswith("available"):
        pytest.skip(reason)
    with cuda_host.use():
        Oracle(*LATENT[name]).check(**cuda_host.CUDA)


def test_these_calls_launch_every_kernel_of_attention(monkeypatch):
    """Compare with all features of the kernels (benchmarks/gpu/features.py). Nothing is computed."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from gpu.features import features

    kernels, launched = triton_kernels.attention(), set()
    monkeypatch.setattr(kernels, "run", lambda launches: launched.update(each.kernel.__name__ for each in launches))
    for function, call, differentiable, _ in ATTENTION.values():
        run(function, call, differentiable, backend="triton", device=DEVICE)
    assert launched == {each.kernel.__name__ for launches in features("sm_90").values() for each in launches}
