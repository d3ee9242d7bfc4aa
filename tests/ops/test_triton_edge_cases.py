"""Test the Triton kernels at the edges: the table of test_edge_numbers.py, tensors beyond 2**31 elements, and their plans."""

import math
import tempfile

import numpy as np
import pytest
import torch
from support.oracle import Oracle, run
from support.sweep import EVERY_DTYPE
from support.triton_interpreter import DEVICE, ON_GPU
from test_edge_numbers import CASES, DIFFERENTIABLE, ON_KERNELS, ROW, attention, masked_row, qkv
from test_kvcache_attention import Fresh

import fastlm
from fastlm.backend import triton as triton_kernels
from fastlm.testing import seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

TRITON = {"backend": "triton", "device": DEVICE}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKED = [name for name in ON_KERNELS if name.startswith(("a row of", "huge"))]  # They run in every dtype, others take turns.
CALLS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for i, name in enumerate(ON_KERNELS)
    for dtype in (DTYPES if EVERY_DTYPE or name in MASKED else DTYPES[i % 3 :][:1])
]

# ---- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_kernels_are_as_good_as_plain_pytorch(name, dtype):
    Oracle(attention, CASES[name](dtype), DIFFERENTIABLE, set()).check(**TRITON)


@pytest.mark.parametrize("fill", [-1e9, -2.5e38, -3e38, torch.finfo(torch.float32).min])
def test_a_row_of_large_finite_numbers_weighs_all_keys_the_same(fill):
    """torch computes the same in float32. The scores vanish beside the mask, and so does log(n) in the LSE."""
    call = masked_row(fill)(torch.float32)
    results = run(attention, call, ("value",), lambda outputs, _: _for_the_row(*outputs), **TRITON)
    torch.testing.assert_close(results["output 0"][:, :, ROW], call["value"].mean(dim=2), rtol=1e-5, atol=1e-6)
    assert (results["output 1"][:, :, ROW] == torch.tensor(fill)).all()
    gradient = results["gradient of value"]
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / gradient.shape[2]), rtol=1e-5, atol=0)


def _for_the_row(out: torch.Tensor, lse: torch.Tensor) -> list[torch.Tensor]:
    """Return gradients of the outputs: 1 for the values of ROW, and 0 elsewhere."""
    gradient = torch.zeros_like(out)
    gradient[:, :, ROW] = 1
    return [gradient, torch.zeros_like(lse)]


def test_differences_between_the_lowest_numbers_still_count():
    """-3e38 is far below -2.5e38, though both times log2(e) would overflow."""
    call = masked_row(-3e38)(torch.float32)
    call["mask"][ROW, 7] = -2.5e38
    out = run(attention, call, (), **TRITON)["output 0"]
    torch.testing.assert_close(out[:, :, ROW], call["value"][:, :, 7], rtol=1e-6, atol=0)


def test_a_block_of_nothing_but_nan_in_the_mask_is_visited():
    mask = torch.zeros(256, 256) if ON_GPU else torch.zeros(64, 64)
    half = len(mask) // 2  # This covers whole blocks of every pass.
    mask[half:, half:] = math.nan
    call = {**qkv(torch.float32, len(mask), len(mask)), "mask": mask}
    out = Oracle(attention, call, DIFFERENTIABLE, set()).check(**TRITON)["output 0"]
    assert out[:, :, half:].isnan().all() and out[:, :, :half].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 2.0**-61, 3e38, 1e-45])
def test_scales_far_from_1(dtype, scale):
    """Take scales of which the largest would be infinite after a multiplication by log2(e)."""
    call = {**qkv(dtype, 40, 40), "scale": scale, "causal": True}
    if scale > 1:
        call["query"] = call["query"] * (1e-38 if dtype != torch.float16 else 0.0)
        call["key"] = call["key"] * 1e-3
    Oracle(attention, call, ("query", "key", "value"), set()).check(**TRITON)


@pytest.fixture
def equal_sums(monkeypatch):
    """Let the interpreter sum up all elements of a product in one order, as a GPU does.

    BLAS has another order at the edges of a tile on some processors (seen with OpenBLAS' kernels for Haswell, on a Zen 5), so
    that equal logits become unequal.
    """
    monkeypatch.setattr(np, "matmul", lambda a, b, **options: np.einsum("...ij,...jk->...ik", a, b, **options))


@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e6, 1e12, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_of_any_size_share_a_row(dtype, magnitude, equal_sums):
    """Let the forward's multiply-add in half precision round away what it can bear; the backward's weights sum to 1."""
    one = torch.full((1, 1, 40, 16), math.sqrt(magnitude), dtype=dtype)
    call = {"query": one, "key": one, "value": seeded_normal(1, (1, 1, 40, 16), dtype), "causal": True}
    Oracle(attention, call, ("query", "key", "value"), set()).check(**TRITON)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1.0, 3e4])
def test_kvcache_attention_with_huge_logits_and_sinks(dtype, magnitude):
    signs = [seeded_normal(i, (2, 2, 300, 16), dtype).sign() * magnitude for i in range(2)]
    call = {"query": signs[0][:, :, :2], "key_cache": signs[1], "value_cache": seeded_normal(3, (2, 2, 300, 16), dtype)}
    call |= {"cache_seqlens": torch.tensor([300, 17], dtype=torch.int32), "return_lse": True, "causal": True}
    Fresh(call).check(**TRITON)
    for sinks in ([math.nan, 0.0], [-math.inf, 3e4], [-3e4, 6e4]):
        Fresh({**call, "sinks": torch.tensor(sinks, dtype=dtype)}).check(**TRITON)


def test_a_cache_that_is_said_to_hold_more_than_integers_do_is_full():
    query, cache = seeded_normal(1, (1, 1, 2, 16), torch.float32), seeded_normal(2, (1, 1, 64, 16), torch.float32)
    length = torch.tensor([2**31 - 1], dtype=torch.int32)
    call = {"query": query, "key_cache": cache, "value_cache": cache, "key": query, "value": query}
    results = run(fastlm.kvcache_attention, {**call, "cache_seqlens": length}, (), **TRITON)
    full = run(fastlm.kvcache_attention, {**call, "cache_seqlens": torch.tensor([62], dtype=torch.int32)}, (), **TRITON)
    assert results["output 0"].isfinite().all() and full["output 0"].isfinite().all()


# ---- indices ----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy warns where the interpreter divides by 0.
def test_more_heads_fit_into_the_l2_cache_than_32_bits_count_with_their_blocks(monkeypatch):
    """With few keys, and a power of 2 of blocks, the product of heads and blocks was 0, and the kernel divided by it."""
    monkeypatch.setattr(triton_kernels.attention().arguments, "L2_BUDGET", 1 << 30)
    triton_kernels.attention().forget_plans()
    call = {name: torch.zeros(1, 1, length, 4) for name, length in (("query", 512), ("key", 0), ("value", 0))}
    results = run(attention, {**call, "causal": True}, (), **TRITON)
    assert not results["output 0"].any() and (results["output 1"] == -math.inf).all()


@pytest.fixture
def sparse():
    """Yield a function that makes float16 normals (1, 1, rows, columns) whose rows lie far apart, in a file with a hole."""
    with tempfile.TemporaryDirectory() as folder:

        def make(seed: int, rows: int, columns: int, stride: int) -> torch.Tensor:
            if ON_GPU:
                whole = torch.empty((rows - 1) * stride + columns, dtype=torch.float16, device=DEVICE)
            else:
                length = ((rows - 1) * stride + columns,)
                whole = torch.from_numpy(np.memmap(f"{folder}/{seed}", dtype=np.float16, mode="w+", shape=length))
            tensor = whole.as_strided((1, 1, rows, columns), (stride, stride, stride, 1))
            return tensor.copy_(seeded_normal(seed, (1, 1, rows, columns), torch.float16))

        yield make


STRIDE = 1024 * 18432  # The last of 128 rows lies past 2**31. The interpreter's fewer rows take a longer stride.


def test_rows_that_lie_further_apart_than_32_bits_count(sparse):
    """Attend over such rows, as a projection with the sequence first, (L, B, 3 H D), has them, seen as (B, H, L, D)."""
    rows, stride = (128, STRIDE) if ON_GPU else (32, STRIDE * 8)
    far = [sparse(i, rows, 16, stride) for i in range(3)]
    near = [tensor.contiguous() for tensor in far]
    results = []
    for tensors in (far, near):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out, lse = fastlm.attention(*leaves, causal=True, return_lse=True, backend="triton")
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)


def test_offsets_are_64_bits_wide_only_where_they_must_be():
    kernels = triton_kernels.attention()
    near, far = (
        torch.empty_strided((1, 2, 500, 64), (64, 64, row, 1), dtype=torch.float16, device="meta") for row in (4096, STRIDE)
    )
    assert kernels.arguments.rows_of(near).wide is None and kernels.arguments.rows_of(far).wide


# ---- surroundings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "kvcache_attention"])
def test_the_default_dtype_and_device_change_nothing(name):
    if name == "attention":
        mask = seeded_normal(4, (40, 40), torch.float32)
        call = {**qkv(torch.float32, 40, 40), "mask": mask, "dropout_p": 0.3, "seed": torch.tensor(3), "causal": True}
        function, leaves = attention, ("query", "key", "value", "mask")
    else:
        caches = {f"{side}_cache": seeded_normal(i, (2, 2, 64, 16), torch.float32) for i, side in enumerate(("key", "value"))}
        call = {"query": seeded_normal(3, (2, 4, 1, 16), torch.float32), **caches}
        call |= {"cache_seqlens": torch.tensor([64, 30], dtype=torch.int32), "sinks": torch.ones(4), "return_lse": True}
        function, leaves = fastlm.kvcache_attention, ()
    given = [seeded_normal(9, (1, 2, 40, 16), torch.float32).to(DEVICE), torch.zeros(1, 2, 40, device=DEVICE)]
    expected = run(function, call, leaves, lambda *_: given, **TRITON)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        results = run(function, call, leaves, lambda *_: given, **TRITON)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for what, result in results.items():
        assert result.dtype == expected[what].dtype and torch.equal(result, expected[what]), what
