"""Test attention with the rest of torch: opcheck, compile, checkpoint, autocast, vmap, fork, threads, autograd's own rules."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.processes import in_a_forked_child, printed
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.backend import cpu as native
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernels, because these tests are about the ops."""


def normals(*shape, seed=1, dtype=torch.float32):
    return seeded_normal(seed, shape, dtype)


def qkv(*lead, q_len=9, k_len=11, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim))
    return [seeded_normal(i, (*lead, *shape), dtype) for i, shape in enumerate(shapes)]


def assert_equal(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


# ---- the ops as torch.library sees them -------------------------------------------------------------------------------------

BASE = (None,) * 7  # mask, sinks, slopes, seed, cu_seqlens_q, cu_seqlens_k, places
PLAIN = (None, None, 0.3, 0.0, 0.0)  # left, right, scale, softcap, dropout_p
CU = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 11, 11], dtype=torch.int32)
PLACES = torch.tensor([[2, 7, 4, 0], [1, 7, 8, 4]])  # position, first_query, first_key, stream
OP_CALLS = {
    "plain": ((*qkv(2), *BASE), PLAIN),
    "causal": ((*qkv(2), *BASE), (None, 0, 0.3, 0.0, 0.0)),
    "half": ((*qkv(2, dtype=torch.bfloat16), *BASE), PLAIN),
    "transposed": (([t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(2)] + list(BASE)), PLAIN),
    "all": (
        (*qkv(2), normals(9, 11), normals(4), normals(2, 4).abs(), torch.tensor([1, 2]), None, None, PLACES),
        (5, 2, 0.3, 2.0, 0.4),
    ),
    "packed": ((*qkv(1), None, None, None, None, *CU, None), PLAIN),
    "empty": ((*qkv(2, k_len=0), *BASE), PLAIN),
}


@pytest.mark.parametrize("call", OP_CALLS)
def test_the_forward_op_passes_opcheck(call):
    inputs, options = OP_CALLS[call]
    torch.library.opcheck(torch.ops.fastlm.attention.default, (*inputs, *options))


@pytest.mark.parametrize("call", OP_CALLS)
def test_the_backward_op_passes_opcheck(call):
    inputs, options = OP_CALLS[call]
    out, lse, statistics = torch.ops.fastlm.attention(*inputs, *options)
    needed = tuple(tensor is not None for tensor in inputs[3:5])
    gradients = torch.ones_like(out), torch.ones_like(lse)
    saved = (out, lse, statistics, *needed, *inputs)
    torch.library.opcheck(torch.ops.fastlm.attention_backward.default, (*gradients, *saved, *options))


def tangents_of(inputs):
    """Return tangents of the five differentiable inputs, one of them missing."""
    given = [None if t is None else normals(*t.shape, seed=20 + i).to(t.dtype) for i, t in enumerate(inputs[:5])]
    return (*given[:2], None, *given[3:])


@pytest.mark.parametrize("call", OP_CALLS)
def test_the_ops_of_forward_mode_pass_opcheck(call):
    inputs, options = OP_CALLS[call]
    tangents = tangents_of(inputs)
    torch.library.opcheck(torch.ops.fastlm.attention_jvp.default, (*inputs, *options, *tangents))
    results = torch.ops.fastlm.attention_jvp(*inputs, *options, *tangents)
    needed = tuple(tensor is not None for tensor in inputs[3:5])
    gradients = torch.ones_like(results[0]), torch.ones_like(results[1])
    arguments = (*gradients, *results, *needed, *inputs, *options, *tangents)
    torch.library.opcheck(torch.ops.fastlm.attention_jvp_backward.default, arguments)


@pytest.mark.parametrize("table", [None, torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)], ids=["contiguous", "paged"])
def test_the_decoding_op_passes_opcheck(table):
    cache = normals(2, 2, 8, 8) if table is None else normals(4, 4, 2, 8)
    new = normals(2, 2, 1, 8, seed=2)
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    arguments = (normals(2, 4, 1, 8), cache, cache.clone(), lengths, new, new, table, None, None, None, 0, 0.3, 0.0)
    torch.library.opcheck(torch.ops.fastlm.kvcache_attention.default, arguments)


# ---- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(query, key, value, mask, sinks, seed):
    out, lse = fastlm.attention(query * 2, key, value, mask=mask, sinks=sinks, dropout_p=0.2, seed=seed, return_lse=True)
    return out, lse, fastlm.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def results_of(function, *arguments):
    leaves = [t.detach().requires_grad_() for t in arguments if t.is_floating_point()]
    outputs = function(*leaves, *arguments[len(leaves) :])
    gradients = [seeded_normal(5 + i, out.shape, out.dtype) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


@pytest.mark.slow_sanitized
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_gives_the_bits_of_eager_mode(backend, dynamic, fresh_dynamo):
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (9, 14) if dynamic else (9,):
        arguments = (*qkv(2, q_len=rows), normals(rows, 11), normals(4), torch.tensor(3))
        assert_equal(results_of(compiled, *arguments), results_of(step, *arguments))


@pytest.mark.slow_sanitized
def test_compiled_decoding_appends_and_gives_the_bits_of_eager_mode(fresh_dynamo):
    def decode(query, key_cache, value_cache, lengths, new):
        return fastlm.kvcache_attention(query, key_cache, value_cache, lengths, key=new, value=new, causal=True)

    query, new, lengths = normals(2, 4, 1, 8), normals(2, 2, 1, 8, seed=2), torch.tensor([3, 7], dtype=torch.int32)
    caches, others = ([normals(2, 2, 8, 8, seed=seed) for seed in (3, 4)] for _ in range(2))
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, *caches, lengths, new), decode(query, *others, lengths, new))
    assert_equal(caches, others)


@pytest.mark.slow_sanitized
def test_a_compiled_varlen_call_gives_the_bits_of_eager_mode(fresh_dynamo):
    def packed(query, key, value):
        return fastlm.varlen_attention(query, key, value, *CU, causal=True)

    tensors = [t[0].transpose(0, 1) for t in qkv(1)]
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), packed(*tensors))


# ---- autograd ---------------------------------------------------------------------------------------------------------------


def test_little_but_inputs_and_results_is_saved_for_backward():
    leaves, saved = [t.requires_grad_() for t in qkv(2)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, lse = fastlm.attention(*leaves, dropout_p=0.1, return_lse=True, backend="cpu")
    known = {t.data_ptr() for t in (*leaves, out, lse)}
    others = [(t.dtype, t.numel()) for t in saved if t.data_ptr() not in known]
    assert others == [(torch.int64, 1), (torch.float32, 2 * lse.numel())]  # The seed, and two numbers per row.


def test_an_input_changed_in_place_before_backward_is_noticed():
    query, key, value = qkv(1)
    out = fastlm.attention(query.requires_grad_(), key, value, backend="cpu")
    key.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_drops_the_same_weights_again(use_reentrant):
    def attend(*tensors):
        return fastlm.attention(*(t.sin() for t in tensors), dropout_p=0.5, backend="cpu")

    def gradients(call):
        leaves = [t.requires_grad_() for t in qkv(2)]
        torch.manual_seed(4)
        (call(*leaves) ** 2).sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(attend)
    assert_equal(gradients(lambda *leaves: checkpoint(attend, *leaves, use_reentrant=use_reentrant)), expected)


def test_autocast_runs_it_in_half_precision_and_gives_gradients_in_full():
    leaves = [t.requires_grad_() for t in qkv(2)]
    mask = normals(9, 11).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastlm.attention(*leaves, mask=mask, backend="cpu")
        small = fastlm.attention(*(t.detach() for t in leaves))
        packed = fastlm.varlen_attention(*(t[0].transpose(0, 1).detach() for t in leaves), *CU)
        torch_s = fastlm.scaled_dot_product_attention(*(t.detach() for t in leaves), enable_gqa=True)
    expected = fastlm.attention(*(t.detach().bfloat16() for t in leaves), mask=mask.detach().bfloat16(), backend="cpu")
    assert torch.equal(out, expected) and {t.dtype for t in (out, small, packed, torch_s)} == {torch.bfloat16}
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (*leaves, mask))


def test_modes_that_watch_ops_see_small_calls_too():
    """Show a small call, which otherwise bypasses torch's dispatcher, to whoever listens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    query = normals(1, 1, 4, 8)
    with Watch():
        fastlm.attention(query, query, query)
    assert any("fastlm.attention" in op for op in seen)
    with torch.profiler.profile() as profile:
        fastlm.attention(query, query, query)
    assert any("fastlm::attention" in event.key for event in profile.key_averages())


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.empty(2, 9, 4, 8).transpose(1, 2)
        out = fastlm.attention(query, query, query)
    assert out.shape == query.shape and out.stride() == query.stride()


# ---- torch.func -------------------------------------------------------------------------------------------------------------

N = 3


def loop(function, *columns):
    return tuple(torch.stack(results) for results in zip(*(function(*row) for row in zip(*columns))))


VMAPPED = {
    "plain": {},
    "causal": {"causal": True, "softcap": 3.0},
    "mask for all": {"mask": normals(9, 11)},
    "mask per example": {"mask": normals(2, 1, 1, 11)},
    "sinks": {"sinks": normals(4)},
    "dropout": {"dropout_p": 0.4, "seed": 3},
    "dropout per example": {"dropout_p": 0.4, "seed": torch.tensor([3, 4])},
}


@pytest.mark.parametrize("options", VMAPPED.values(), ids=VMAPPED)
def test_vmap_is_the_loop(options):
    def call(*tensors):
        return fastlm.attention(*tensors, return_lse=True, backend="cpu", **options)

    assert_equal(vmap(call)(*qkv(N, 2)), loop(call, *qkv(N, 2)))
    (query, key, value), moved = qkv(N, 2), qkv(N, 2)[0].movedim(0, 2)
    assert_equal(vmap(call, in_dims=(2, None, None))(moved, key[0], value[0]), loop(lambda q: call(q, key[0], value[0]), query))


def test_vmap_over_everything_and_its_gradient_is_the_loop():
    def loss(query, key, value, mask, sinks, slopes, seed):
        options = {"alibi_slopes": slopes, "dropout_p": 0.2, "seed": seed, "return_lse": True, "backend": "cpu"}
        out, lse = fastlm.attention(query, key, value, mask=mask, sinks=sinks, **options)
        return (out**2).sum() + lse.sin().sum()

    def eager(*arguments):
        leaves = [t.clone().requires_grad_() for t in arguments[:5]]
        return torch.autograd.grad(loss(*leaves, *arguments[5:]), leaves)

    columns = (*qkv(N, 2), normals(N, 2, 1, 1, 11), normals(N, 4), normals(N, 2, 4).abs(), torch.tensor([5, 6, 7]))
    assert_equal(vmap(grad(loss, argnums=(0, 1, 2, 3, 4)))(*columns), loop(eager, *columns))


def test_vmap_of_a_plain_gradient_and_a_batch_of_gradients_are_the_loop():
    def loss(query, key, value):
        return (fastlm.attention(query, key, value, causal=True, backend="cpu") ** 2).sum()

    def eager(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(loss(*leaves), leaves)

    assert_equal(vmap(grad(loss, argnums=(0, 1, 2)))(*qkv(N, 2)), loop(eager, *qkv(N, 2)))
    leaves = [t.requires_grad_() for t in qkv(2)]
    out = fastlm.attention(*leaves, backend="cpu")
    batch = normals(N, *out.shape)
    results = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True)
    assert_equal(results, loop(lambda row: torch.autograd.grad(out, leaves, row, retain_graph=True), batch))


# ---- fork and threads -------------------------------------------------------------------------------------------------------

COMPUTE = """
tensors = [t.requires_grad_() for t in torch.randn(3, 1, 4, 300, 64).unbind()]
gradient = torch.ones(1, 4, 300, 64)
def compute():
    out = fastlm.attention(*tensors, causal=True, backend="cpu")
    return out.detach(), *torch.autograd.grad(out, tensors, gradient)
"""


def test_a_forked_child_computes_the_same_bits():
    printed(in_a_forked_child(COMPUTE))


def test_several_python_threads_at_once_get_their_own_right_answers():
    def compute(seed):
        leaves = [t.requires_grad_() for t in qkv(2, q_len=60 + seed, k_len=90)]
        out = fastlm.attention(*leaves, dropout_p=0.1, seed=seed, backend="cpu")
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    expected = [compute(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, wanted in zip(pool.map(compute, range(8)), expected):
                assert_equal(results, wanted)


# ---- how tensors reach C++ --------------------------------------------------------------------------------------------------

DESCRIBED = """
import torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
import fastlm
assert fastlm.backend.cpu.view.__name__ == "_described"
torch.manual_seed(0)
query, key, value = (torch.randn(2, 6, 33, 16).half().requires_grad_() for _ in range(3))
lengths = torch.tensor([5, 33], dtype=torch.int32)
results = []
for backend in ("cpu", "reference"):
    options = {"sinks": torch.ones(6).half(), "dropout_p": 0.2, "seed": 1, "backend": backend}
    out = fastlm.attention(query.mT.contiguous().mT, key, value, **options)
    results.append([out, *torch.autograd.grad(out.float().sum(), (query, key, value))])
    results[-1].append(fastlm.kvcache_attention(query[:, :, :1], key, value, lengths, backend=backend))
    z, kl = fastlm.reparameterize_with_kl(query[0, 0], key[0, 0], seed=3, backend=backend)
    results[-1] += [z, kl, *torch.autograd.grad(z.float().sum() + kl.sum(), (query, key))]
for a, b in zip(*results):
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
"""


def test_a_torch_without_the_exchange_api_is_served_too():
    printed(DESCRIBED)


def test_a_torch_with_the_exchange_api_uses_it():
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert native.view(normals(3)) is not None and isinstance(native.view(normals(3)), torch.Tensor)


def test_a_view_that_negates_is_not_read_as_it_lies():
    values = normals(1, 2, 5, 8)
    negated = torch._neg_view(values)
    assert negated.is_neg()
    expected = fastlm.attention(-values, values, -values, backend="cpu")
    assert torch.equal(fastlm.attention(negated, values, negated), expected)
    assert torch.equal(fastlm.attention(negated, values, negated, return_lse=True)[0], expected)


# ---- NaN and infinity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_a_row_stays_in_its_row(value, isa):
    query, key, values = qkv(1, q_len=70, k_len=130)
    clean = fastlm.attention(query, key, values, backend="cpu")
    query[0, 1, 40, 3] = value
    out = fastlm.attention(query, key, values, backend="cpu")
    expected = fastlm.attention(query, key, values, backend="reference")
    assert torch.equal(out.isnan(), expected.isnan()) and out[0, 1, 40].isnan().all()
    others = torch.ones(70, dtype=torch.bool)
    others[40] = False
    assert torch.equal(out[:, :, others], clean[:, :, others])


def test_keys_that_no_query_sees_may_hold_anything(isa):
    """Such keys lie behind the diagonal and outside the window."""
    query, key, values = qkv(1, q_len=70, k_len=70)
    clean = fastlm.attention(query[:, :, :10], key[:, :, :10], values[:, :, :10], causal=True, backend="cpu")
    key[:, :, 64:], values[:, :, 64:] = math.nan, math.nan
    out = fastlm.attention(query, key, values, causal=True, backend="cpu")
    torch.testing.assert_close(out[:, :, :10], clean)
    assert out[:, :, :48].isfinite().all()
