"""Test the Triton kernels against the reference in float64: on the GPU if there is one, in Triton's interpreter elsewhere."""

import itertools
import math

import pytest
import torch
from cases import SPECS
from cases.attention import cached
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guarded import SENTINEL, Guarded
from support.oracle import Oracle, run
from support.sweep import EVERY_DTYPE, scaled
from support.triton_interpreter import DEVICE
from test_attention_sweep import DIFFERENTIABLE, attention_calls, varlen_calls
from test_cases import oracle
from test_kvcache_attention import Fresh
from test_kvcache_attention import calls as cache_calls

import fastlm
from fastlm.backend import cpu as native
from fastlm.backend import triton as triton_kernels
from fastlm.reference.attention import keep_mask
from fastlm.testing import seeded_normal

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = pytest.mark.gpu

TRITON = {"backend": "triton", "device": DEVICE}

# ---- correctness ------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION_CASES = [(spec.name, case) for spec in SPECS.values() if "attention" in spec.name for case in spec.cases]
CALLS = [  # Each case in one dtype; with FASTLM_SWEEP=2 in all dtypes.
    pytest.param(name, case, dtype, id=f"{name}-{case}-{str(dtype).removeprefix('torch.')}")
    for i, (name, case) in enumerate(ATTENTION_CASES)
    for dtype in (DTYPES if EVERY_DTYPE else DTYPES[i % 3 :][:1])
]


@pytest.mark.parametrize(("name", "case", "dtype"), CALLS)
def test_values_and_gradients_are_as_good_as_plain_pytorch(name, case, dtype):
    oracle(name, case, dtype).check(**TRITON)


# Lengths around the interpreter's tiles of 16 and 32 rows (kernels/attention/tiles.py).
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 48, 49, 65]))
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([64, 72, 100, 130]))


@settings(max_examples=scaled(40))
@given(attention_calls(LENGTHS, DIMS, most=2, groups=(1, 2, 3)))
def test_attention_anywhere(call):
    Oracle(fastlm.attention, call, DIFFERENTIABLE, set()).check(**TRITON)


@settings(max_examples=scaled(20))
@given(varlen_calls(LENGTHS, DIMS, groups=(1, 2)))
def test_varlen_attention_anywhere(call):
    Oracle(fastlm.varlen_attention, call, DIFFERENTIABLE, set()).check(**TRITON)


@settings(max_examples=scaled(40))
@given(cache_calls(longest=400, most_heads=2))
def test_kvcache_attention_anywhere(call):
    Fresh(call).check(**TRITON)


# ---- the same on every backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, -1, torch.tensor([3, 2**62])], ids=["one seed", "all bits", "a seed for each"])
def test_dropout_drops_what_it_drops_elsewhere(seed):
    """With equal scores, and unit vectors for values, the output is zero where a weight was dropped."""
    batch, heads, queries, keys = 2, 3, 33, 50
    value = torch.eye(keys).expand(batch, heads, keys, keys)
    call = {"query": torch.zeros(batch, heads, queries, 8), "key": torch.zeros(batch, heads, keys, 8), "value": value}
    call |= {"dropout_p": 0.4, "seed": seed}
    out = run(fastlm.attention, call, (), **TRITON)["output 0"]
    keep = keep_mask(torch.as_tensor(seed), 0.4, batch, heads, queries, keys)
    assert torch.equal(out != 0, keep)
    assert torch.equal(fastlm.attention(**call, backend="cpu") != 0, keep)


@pytest.mark.parametrize("name", ["mask", "sinks"])
def test_a_row_does_not_depend_on_its_batch(name):
    call = {tensor: seeded_normal(i, (3, 2, 40, 16), torch.float32) for i, tensor in enumerate(("query", "key", "value"))}
    call[name] = seeded_normal(5, (3, 1, 40, 40) if name == "mask" else (2,), torch.float32)
    whole = run(fastlm.attention, call, ("query", "key", "value"), causal=True, **TRITON)
    alone = {tensor: value if tensor == "sinks" else value[1:2] for tensor, value in call.items()}
    gradients = [seeded_normal(100, (3, 2, 40, 16), torch.float32)[1:2]]
    results = run(fastlm.attention, alone, ("query", "key", "value"), lambda *_: gradients, causal=True, **TRITON)
    for what, result in results.items():
        assert torch.equal(result, whole[what][1:2]), what


@pytest.mark.parametrize("page", [8, 12, 24, 48, 96])
def test_pages_and_the_batch_change_no_bit_of_a_cached_row(page):
    """Blocks of 32 keys hold whole pages, end in a page, or lie in one; on a GPU blocks are larger."""
    call = cached([333, 70], capacity=384, q_len=2, window=(250, 0))(torch.float16)
    whole = run(fastlm.kvcache_attention, call, (), **TRITON)
    caches = {name: _as_pages(call[name], page).flip(0) for name in ("key_cache", "value_cache")}
    table = torch.arange(len(caches["key_cache"])).flip(0).int().view(2, -1)
    results = run(fastlm.kvcache_attention, call | caches | {"block_table": table}, (), **TRITON)
    alone = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    for what, result in run(fastlm.kvcache_attention, alone, (), **TRITON).items():
        assert torch.equal(results[what], whole[what]) and torch.equal(result, whole[what][1:]), what


# ---- tiles by descriptor ----------------------------------------------------------------------------------------------------


def _descriptors(arch: str, key: torch.Tensor, **options) -> list:
    """Return the descriptors by which the forward would copy keys and values on a GPU."""
    arguments = _forward(arch, key, **options)
    return [arguments["key_desc"], arguments["value_desc"]]


def _blocks(key: torch.Tensor) -> tuple[int, int]:
    """Return the numbers of queries and of keys of the forward's tile on sm_90."""
    arguments = _forward("sm_90", key)
    return arguments["BLOCK_Q"], arguments["BLOCK_K"]


def _forward(arch: str, key: torch.Tensor, **options) -> dict:
    """Return the arguments of the forward's launch on a GPU."""
    kernels = triton_kernels.attention()
    call = kernels.Call(key, key, key, **options, arch=arch)
    return kernels.plan_forward(call, key, key[..., 0].float(), key[..., :2].float())[-1].arguments


def _keys(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120", "interpreter"])
def test_gpus_with_an_accelerator_for_it_copy_tiles_by_descriptor(arch):
    for key in (_keys(2, 3, 500, 64), _keys(2, 500, 3, 64).transpose(1, 2), _keys(1, 1, 500, 64), _keys(1, 1, 500, 72)):
        for descriptor in _descriptors(arch, key):
            assert descriptor.shape == list(key.shape) and descriptor.strides[2:] == list(key.stride()[2:])


def test_the_tile_does_not_depend_on_where_tensors_lie():
    """Otherwise the order of a row's sums would, and a row's result does not depend on the batch around it."""
    one = _keys(1, 3, 500, 128)
    for key in (one.expand(2, 3, 500, 128), _keys(2, 3, 500, 132)[..., :128]):
        assert _blocks(key) == _blocks(one)


def test_what_no_descriptor_can_describe_is_copied_first():
    keys = {
        "gaps of 8 bytes": _keys(2, 3, 500, 68)[..., :64],
        "a head for all": _keys(2, 1, 500, 64).expand(2, 3, 500, 64),
        "one element off": torch.empty(2 * 3 * 500 * 64 + 1, dtype=torch.float16)[1:].view(2, 3, 500, 64),
    }
    for what, key in keys.items():
        for descriptor in _descriptors("sm_90", key):
            strides = descriptor.strides[:3]
            assert descriptor.shape == list(key.shape) and all(stride and stride % 8 == 0 for stride in strides), what
            assert descriptor.base.data_ptr() % 16 == 0, what


@pytest.mark.parametrize(
    ("head_dim", "dtype", "columns"),
    [(13, torch.float16, 16), (13, torch.float32, 16), (20, torch.bfloat16, 24), (20, torch.float32, 20)],
)
def test_kernels_see_rows_that_start_at_multiples_of_16_bytes(head_dim, dtype, columns):
    inputs = [seeded_normal(i, (1, 2, 40, head_dim), dtype).to(DEVICE).requires_grad_() for i in range(3)]
    seen, plan = [], triton_kernels.attention().plan_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels.attention(), "plan_backward", lambda *args: seen.append(args) or plan(*args))
        torch.autograd.grad(fastlm.attention(*inputs, backend="triton").sum(), inputs)
    ((call, out, _, grad_out, _, grads, *_),) = seen
    assert all(tensor.shape[3] == columns for tensor in (*call[:3], out, grad_out, *grads[:3]))


@pytest.mark.parametrize("head_dim", [13, 24])
def test_where_tensors_lie_changes_no_bit(head_dim):
    """Without gaps rows start at multiples of 2 or 16 bytes, with gaps elsewhere. One head of keys stands for both."""
    call = {name: seeded_normal(i, (1, 2, 40, head_dim), torch.float16) for i, name in enumerate(DIFFERENTIABLE[:3])}
    call["key"] = call["key"][:, :1].repeat(1, 2, 1, 1)
    apart = {name: torch.nn.functional.pad(tensor, (3, 2))[..., 3:-2] for name, tensor in call.items()}
    apart["key"] = apart["key"][:, :1].expand_as(call["key"])
    elsewhere = run(fastlm.attention, apart, DIFFERENTIABLE[:3], causal=True, **TRITON)
    for what, result in run(fastlm.attention, call, DIFFERENTIABLE[:3], causal=True, **TRITON).items():
        assert torch.equal(result, elsewhere[what]), what


def test_other_tiles_are_copied_by_pointers():
    long = torch.empty(9, dtype=torch.int32, device="meta")
    calls = {
        "an older GPU": ("sm_86", _keys(2, 3, 500, 64)),
        "AMD": ("gfx942", _keys(2, 3, 500, 64)),
        "float32": ("sm_90", _keys(2, 3, 500, 64).float()),
        "rows that do not start at 16 bytes": ("sm_90", _keys(2, 3, 500, 20)),
        "shorter than a tile": ("sm_90", _keys(2, 3, 15, 64)),
        "no batch": ("sm_90", _keys(0, 3, 500, 64)),
    }
    seed = torch.empty((), dtype=torch.int64, device="meta")
    assert _descriptors("sm_90", _keys(1, 3, 500, 64), seed=seed, drop_below=1) == [None, None]
    assert _descriptors("sm_90", _keys(1, 3, 500, 64), mask=_keys(500, 500)) == [None, None]
    for what, (arch, key) in calls.items():
        assert _descriptors(arch, key) == [None, None], what
    assert _descriptors("sm_90", _keys(1, 3, 500, 64), cu_seqlens_q=long, cu_seqlens_k=long) == [None, None]


# ---- nothing outside the tensors --------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 37, 70, 24), (2, 2, 2, 65, 3, 64), (1, 2, 1, 33, 40, 17)]


@pytest.mark.parametrize(("sizes", "dtype"), list(zip(SIZES, itertools.cycle(DTYPES))), ids=str)
def test_nothing_is_read_outside_the_tensors(sizes, dtype):
    """NaN surrounds every dimension of the inputs. Results lie in new tensors, which start full of NaN."""
    batch, heads, kv_heads, q_len, k_len, dim = sizes
    shapes = {"query": (heads, q_len, dim), "key": (kv_heads, k_len, dim), "value": (kv_heads, k_len, dim + 3)}
    shapes["mask"] = (heads, q_len, k_len)
    call = {name: seeded_normal(i, (batch, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}
    guarded = Guarded(DEVICE)
    inside = {name: guarded.put(tensor).requires_grad_() for name, tensor in call.items()}
    out = fastlm.attention(**inside, causal=True, backend="triton")
    gradients = torch.autograd.grad(out, list(inside.values()), guarded.put(torch.ones_like(out)))
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
    guarded.check(math.nan)


@pytest.mark.parametrize("page", [None, 16])
def test_kvcache_attention_writes_its_rows_and_nothing_else(page):
    lengths = torch.tensor([30, 0, 61], dtype=torch.int32)
    key_cache, value_cache = (seeded_normal(i, (3, 2, 64, 20), torch.float16) for i in range(2))
    key, value = (seeded_normal(i, (3, 2, 3, 20), torch.float16) for i in (2, 3))
    query, options = seeded_normal(4, (3, 4, 2, 20), torch.float16), {}
    expected = [cache.clone() for cache in (key_cache, value_cache)]
    for cache, new in zip(expected, (key, value)):
        for b, length in enumerate(lengths.tolist()):
            cache[b, :, length : length + 3] = new[b]
    guarded = Guarded(DEVICE)
    caches = [key_cache, value_cache]
    if page:
        options["block_table"] = torch.randperm(12, generator=torch.Generator().manual_seed(1)).int().view(3, 4).to(DEVICE)
        order = options["block_table"].flatten().argsort().cpu()
        caches, expected = ([_as_pages(cache, page)[order] for cache in both] for both in (caches, expected))
    caches = [guarded.put(cache, SENTINEL) for cache in caches]
    tensors = (t.to(DEVICE) for t in (lengths, key, value))
    names = ("cache_seqlens", "key", "value")
    fastlm.kvcache_attention(query.to(DEVICE), *caches, **dict(zip(names, tensors)), **options, backend="triton")
    guarded.check(SENTINEL)
    for cache, wanted in zip(caches, expected):
        assert torch.equal(cache.cpu(), wanted)


def _as_pages(cache: torch.Tensor, page: int) -> torch.Tensor:
    """Return a cache (B, H, L, D) as pages (B * L / page, page, H, D)."""
    return cache.unflatten(2, (-1, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)


@pytest.mark.parametrize("lengths", [[-5, 2**31 - 1], [70, 3]], ids=["absurd", "past the cache"])
def test_lengths_and_pages_outside_the_cache_touch_nothing(lengths):
    """Lengths and pages cannot be checked without waiting for the GPU, but reads and writes stay inside the cache."""
    guarded = Guarded(DEVICE)
    caches = [guarded.put(seeded_normal(i, (2, 2, 64, 20), torch.float32), SENTINEL) for i in range(2)]
    query, new = (seeded_normal(i, (2, 2, 3, 20), torch.float32).to(DEVICE) for i in (2, 3))
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    fastlm.kvcache_attention(query, *caches, seqlens, key=new, value=new, backend="triton")
    guarded.check(SENTINEL)
    pages = [guarded.put(seeded_normal(i, (8, 16, 2, 20), torch.float32), SENTINEL) for i in range(2)]
    table = torch.tensor([[0, -1, 8, 2**31 - 1]] * 2, dtype=torch.int32, device=DEVICE)
    fastlm.kvcache_attention(query, *pages, seqlens, key=new, value=new, block_table=table, backend="triton")
    guarded.check(SENTINEL)


@pytest.mark.parametrize("offsets", [[5, 3, 90], [0, 60, 40], [-(2**31), 2**31 - 1, 7]], ids=["falling", "past", "absurd"])
def test_cu_seqlens_outside_the_rows_touch_nothing(offsets):
    guarded = Guarded(DEVICE)
    rows = [guarded.put(seeded_normal(i, (1, 2, 40, 16), torch.float32))[0].transpose(0, 1).requires_grad_() for i in range(3)]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    out = fastlm.varlen_attention(*rows, cu_seqlens, cu_seqlens, backend="triton")
    torch.autograd.grad(out.nan_to_num().sum(), rows)
    guarded.check(math.nan)


# ---- what the backend refuses -----------------------------------------------------------------------------------------------


def test_a_call_that_the_kernels_cannot_do_is_refused():
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(fastlm.UnsupportedError, match="head_dim is 257"):
        fastlm.attention(wide, wide, wide, backend="triton")
    double = torch.zeros(1, 1, 2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(fastlm.UnsupportedError, match="float64"):
        fastlm.attention(double, double, double, backend="triton")


@pytest.mark.skipif(native.C is None, reason=f"{native.load_error}")
def test_tensors_on_a_cpu_run_there_unless_triton_is_named():
    query = torch.zeros(1, 1, 2, 8)
    assert fastlm.explain(fastlm.attention, query, query, query).backend == "cpu"


def test_opcheck_and_compile():
    tensors = [seeded_normal(i, (1, 2, 9, 16), torch.float32).to(DEVICE).requires_grad_() for i in range(3)]
    args = (*(t.detach() for t in tensors), *[None] * 7, 2, 0, 0.3, 0.0, 0.0)
    torch.library.opcheck(torch.ops.fastlm.triton_attention.default, args, raise_exception=True)

    def loss(*tensors):
        return fastlm.attention(*tensors, causal=True, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
        torch.testing.assert_close(actual, wanted)
