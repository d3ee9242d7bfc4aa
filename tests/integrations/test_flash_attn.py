"""flash_attn's functions on fastlm give what a naive version in float64 gives, with flash_attn's layouts, options and errors.

Golden is the naive version in float64, plain the same in the dtype, and the rule is that of tests/support/oracle.py.
"""

import inspect

import pytest
import torch
from support.naive_flash_attn import naive_attention, naive_varlen_attention
from support.oracle import Oracle, output_gradients

import fastlm
from fastlm.integrations import flash_attn
from fastlm.integrations.flash_attn import flash_attn_interface, functions
from fastlm.reference.attention import keep_mask
from fastlm.testing import seeded_normal

HALF_AND_FLOAT = [torch.float16, torch.bfloat16, torch.float32]
SEED = 5  # of torch's generator, from which the functions draw the seed of their dropout


def slopes_of(*shape: int) -> torch.Tensor:
    return seeded_normal(13, shape, torch.float32).abs() / 8


# Queries, keys, heads, heads of keys, head_dim, and options: the space of flash_attn's own tests, with short sequences.
CASES = {
    "plain": (37, 37, 4, 4, 32, {}),
    "grouped": (37, 61, 6, 2, 40, {}),
    "one head of keys, causal": (37, 61, 6, 1, 59, {"causal": True}),
    "causal, more queries than keys": (61, 23, 4, 2, 64, {"causal": True}),
    "causal, one query": (1, 61, 6, 2, 128, {"causal": True}),
    "window": (61, 83, 4, 2, 64, {"window_size": (9, 4)}),
    "window to the left, causal": (61, 83, 4, 4, 111, {"window_size": (9, 9), "causal": True}),
    "window to the right": (61, 43, 4, 2, 96, {"window_size": (-1, 3)}),
    "window of more queries than keys": (83, 31, 4, 2, 32, {"window_size": (7, 0)}),
    "slopes": (37, 61, 4, 2, 32, {"alibi_slopes": slopes_of(4), "causal": True}),
    "slopes per example": (37, 61, 4, 4, 64, {"alibi_slopes": slopes_of(2, 4), "window_size": (20, 20)}),
    "softcap": (37, 61, 4, 2, 64, {"softcap": 1.5, "softmax_scale": 0.7, "causal": True}),
    "dropout": (37, 61, 4, 2, 32, {"dropout_p": 0.17, "causal": True, "deterministic": True}),
    "largest head": (19, 23, 2, 1, 256, {"causal": True, "softcap": 0.0}),
}


def naive(query, key, value, dropout_p=0.0, deterministic=False, **options):
    """Return the naive version's results, out as (B, H, Sq, D), with the dropout of `SEED`."""
    if dropout_p:
        torch.manual_seed(SEED)
        shape = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
        options |= {"keep": keep_mask(torch.randint(2**63 - 1, ()), dropout_p, *shape), "dropout_p": dropout_p}
    out, lse = naive_attention(query, key, value, **options)
    return out.transpose(1, 2), lse


def call_of(case: str, dtype: torch.dtype) -> dict:
    """Make the arguments of a case: a batch of two, (B, S, H, D)."""
    queries, keys, heads, kv_heads, head_dim, options = CASES[case]
    shapes = ("query", queries, heads), ("key", keys, kv_heads), ("value", keys, kv_heads)
    tensors = {name: seeded_normal(i, (2, rows, h, head_dim), dtype) for i, (name, rows, h) in enumerate(shapes)}
    return {**tensors, **options}


def checked(ours, **arguments) -> None:
    """Hold values and gradients of ``ours(query, key, value, **options)`` to the rule."""

    def function(query, key, value, backend=None, **options):
        if backend == "reference":
            return naive(query, key, value, **options)
        torch.manual_seed(SEED)
        out, lse, weights = ours(query, key, value, **options, return_attn_probs=True)
        assert weights is None
        return out.transpose(1, 2), lse

    Oracle(function, arguments, ("query", "key", "value"), set()).check()


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    checked(flash_attn.flash_attn_func, **call_of(case, dtype))


@pytest.mark.parametrize("case", ["grouped", "window", "slopes per example", "dropout"])
def test_packed_keys_and_values(case):
    def packed(q, k, v, **options):
        return flash_attn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **options)

    checked(packed, **call_of(case, torch.bfloat16))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window_size": (5, 5)}, {"alibi_slopes": slopes_of(4), "dropout_p": 0.1}]
)
def test_packed_queries_keys_and_values(options):
    def packed(q, k, v, **options):
        return flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **options)

    checked(packed, **{**call_of("plain", torch.bfloat16), **options})


# ---- packed sequences -------------------------------------------------------------------------------------------------------

QUERIES, KEYS = (5, 0, 31, 1), (9, 4, 20, 17)
VARLEN = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (6, 3), "softcap": 2.0},
    "slopes per sequence": {"alibi_slopes": slopes_of(4, 6), "causal": True},
    "scale": {"softmax_scale": 0.3, "alibi_slopes": slopes_of(6)},
}


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def varlen_call(dtype: torch.dtype, queries=QUERIES, keys=KEYS, kv_heads=2, **options) -> dict:
    shapes = ("query", queries, 6), ("key", keys, kv_heads), ("value", keys, kv_heads)
    tensors = {name: seeded_normal(i, (sum(rows), h, 24), dtype) for i, (name, rows, h) in enumerate(shapes)}
    return {**tensors, "cu_seqlens_q": offsets(queries), "cu_seqlens_k": offsets(keys), **options}


def checked_varlen(ours, **arguments) -> None:
    def function(query, key, value, cu_seqlens_q, cu_seqlens_k, backend=None, **options):
        if backend == "reference":
            return naive_varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, **options)
        longest = [cu.diff().max() for cu in (cu_seqlens_q, cu_seqlens_k)]  # 0-d tensors, as transformers has them
        *results, weights = ours(query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, **options, return_attn_probs=True)
        assert weights is None
        return tuple(results)

    Oracle(function, arguments, ("query", "key", "value"), set()).check()


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("case", VARLEN)
def test_varlen_values_and_gradients(case, dtype):
    checked_varlen(flash_attn.flash_attn_varlen_func, **varlen_call(dtype, **VARLEN[case]))


def test_varlen_packed_keys_and_values():
    def packed(q, k, v, *lengths, **options):
        return flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *lengths, **options)

    checked_varlen(packed, **varlen_call(torch.bfloat16, causal=True))


def test_varlen_packed_queries_keys_and_values():
    def packed(q, k, v, cu_seqlens, _, longest, *__, **options):
        return flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), 1), cu_seqlens, longest, **options)

    checked_varlen(packed, **varlen_call(torch.bfloat16, keys=QUERIES, kv_heads=6, window_size=(2, 2)))


def test_varlen_rows_of_pages():
    def paged(q, k, v, cu_q, cu_k, *longest, **options):
        pages, table = q.new_zeros(2, 13, 8, 2, 24), torch.full((4, 3), -1, dtype=torch.int32)
        free = iter(torch.randperm(13, generator=torch.Generator().manual_seed(0)).tolist())
        for b, (begin, end) in enumerate(zip(cu_k[:-1].tolist(), cu_k[1:].tolist())):
            for j in range(0, end - begin, 8):
                table[b, j // 8] = page = next(free)
                rows = torch.stack((k, v))[:, begin + j : min(begin + j + 8, end)]
                pages[:, page, : rows.shape[1]] = rows
        return flash_attn.flash_attn_varlen_func(q, *pages, cu_q, cu_k, *longest, **options, block_table=table)

    checked_varlen(paged, **varlen_call(torch.float32, causal=True))


# ---- forward and backward apart ---------------------------------------------------------------------------------------------


def of_out_alone(outputs, dtype):
    """Draw a gradient for out, and none for the log-sum-exp, for which flash_attn's backward takes none."""
    gradient, *_ = output_gradients(outputs[:1], dtype)
    return [gradient, torch.zeros_like(outputs[1])]


DEFAULTS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
}


def spelled_out(options: dict) -> dict:
    """Return the options as the passes take them, which have no defaults."""
    options = {name: options.get(name, default) for name, default in DEFAULTS.items()}
    left, right = options.pop("window_size")
    return {**options, "window_size_left": left, "window_size_right": right}


class ByParts(torch.autograd.Function):
    """Attend to the keys in two parts, as a ring of processes does: outputs are joined by their log-sum-exps."""

    @staticmethod
    def forward(ctx, parts, options, q, k, v):
        results = []
        for key, value in zip(k.chunk(parts, 1), v.chunk(parts, 1)):
            out, lse, weights, state = flash_attn_interface._flash_attn_forward(q, key, value, **options, return_softmax=False)
            assert weights is None and not out.requires_grad
            results.append((out.float(), lse))
        outs, lses = map(torch.stack, zip(*results))
        lse = lses.logsumexp(0)
        shares = torch.where(lses == -torch.inf, 0.0, (lses - lse).exp()).transpose(2, 3)[..., None]
        out = (outs * shares).sum(0).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, state)
        ctx.parts, ctx.options = parts, options
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        q, k, v, out, lse, state = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))  # The tests fill them with NaN.
        sum_of_dq = torch.zeros_like(q, dtype=torch.float32)
        for tensors in zip(*(tensor.chunk(ctx.parts, 1) for tensor in (k, v, dk, dv))):
            key, value, *of_part = tensors
            flash_attn_interface._flash_attn_backward(
                grad_out, q, key, value, out, lse, dq, *of_part, **ctx.options, deterministic=True, rng_state=state
            )
            sum_of_dq += dq
        return None, None, sum_of_dq.to(q.dtype), dk, dv


def checked_by_parts(parts: int, **arguments) -> None:
    def function(query, key, value, backend=None, **options):
        if backend == "reference":
            return naive(query, key, value, **options)
        torch.manual_seed(SEED)
        out, lse = ByParts.apply(parts, spelled_out(options), query, key, value)
        return out.transpose(1, 2), lse

    Oracle(function, arguments, ("query", "key", "value"), set(), of_out_alone).check()


@pytest.mark.parametrize("case", ["causal, more queries than keys", "window", "softcap", "slopes per example", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_passes(case, dtype):
    """Compute the gradients from the log-sum-exp alone, of rows without keys, too."""
    checked_by_parts(1, **call_of(case, dtype))


@pytest.mark.parametrize("case", ["plain", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_passes_by_parts_of_the_keys(case, dtype):
    checked_by_parts(2, **call_of(case, dtype))


class Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lengths, options, q, k, v):
        out, lse, _, state = flash_attn_interface._flash_attn_varlen_forward(q, k, v, *lengths, **options)
        ctx.save_for_backward(q, k, v, out, lse, state)
        ctx.lengths, ctx.options = lengths, options
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        *saved, state = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in saved[:3]]
        flash_attn_interface._flash_attn_varlen_backward(
            grad_out, *saved, *grads, *ctx.lengths, **ctx.options, deterministic=False, rng_state=state
        )
        return None, None, *grads


@pytest.mark.parametrize("case", ["causal", "window", "slopes per sequence"])
def test_varlen_passes(case):
    def function(query, key, value, cu_seqlens_q, cu_seqlens_k, backend=None, **options):
        if backend == "reference":
            return naive_varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, **options)
        lengths = cu_seqlens_q, cu_seqlens_k, 31, 20
        return Varlen.apply(lengths, spelled_out(options), query, key, value)

    arguments = varlen_call(torch.bfloat16, **VARLEN[case])
    Oracle(function, arguments, ("query", "key", "value"), set(), of_out_alone).check()


def test_the_wrapped_passes_are_the_passes():
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        passes = (getattr(flash_attn_interface, f"{prefix}flash_attn_{name}") for prefix in ("_", "_wrapped_"))
        assert next(passes) is next(passes)


@pytest.mark.parametrize("name", ["leftpad_k", "seqused_k"])
def test_gaps_between_packed_keys_are_refused(name):
    call = varlen_call(torch.float32)
    lengths = torch.tensor(KEYS, dtype=torch.int32)
    with pytest.raises(fastlm.UnsupportedError, match=name):
        flash_attn_interface._flash_attn_varlen_forward(*call.values(), 31, 20, 0.0, 1.0, False, **{name: lengths})


# ---- what it is not to do ---------------------------------------------------------------------------------------------------


def test_nothing_is_copied(monkeypatch):
    """Hand fastlm views of the tensors, whatever their strides, and return a view of its output."""
    seen, original = [], functions.attention

    def noted(*tensors, **options):
        seen.extend(tensors)
        out = original(*tensors, **options)
        seen.append(out)
        return out

    monkeypatch.setattr(functions, "attention", noted)
    qkv = torch.randn(2, 9, 3, 4, 16)
    out = flash_attn.flash_attn_qkvpacked_func(qkv)
    assert {tensor.untyped_storage().data_ptr() for tensor in seen[:3]} == {qkv.untyped_storage().data_ptr()}
    assert out.data_ptr() == seen[3].data_ptr()
    out.view(2, 9, 64)


def test_a_window_of_all_keys_and_a_list():
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    expected = flash_attn.flash_attn_func(q, k, v)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=[-1, -1], softcap=-1.0), expected)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(5, 5)), expected)


def test_compiled():
    torch.compiler.reset()
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    expected = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(2, 2))
    assert torch.equal(compiled(q, k, v, causal=True, window_size=(2, 2)), expected)


def test_signatures_are_read_by_transformers():
    """Have the parameters, in flash_attn's order, by which libraries tell what a version supports."""
    parameters = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    expected = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap"
    assert list(parameters) == [*expected.split(), "alibi_slopes", "deterministic", "return_attn_probs", "block_table"]
    assert parameters["window_size"].default == (-1, -1) and parameters["softcap"].default == 0.0


# ---- bad input --------------------------------------------------------------------------------------------------------------


def tensors_of(*shapes: tuple[int, ...], dtypes=(torch.float32,) * 3) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]


ROWS, HALVES = (1, 4, 2, 8), (torch.float16, torch.bfloat16)
BAD = {
    "FlashAttention only support fp16 and bf16": tensors_of(ROWS, ROWS, ROWS, dtypes=(torch.float64,) * 3),
    "query and key must have the same dtype": tensors_of(ROWS, ROWS, ROWS, dtypes=(*HALVES, torch.float16)),
    "query and value must have the same dtype": tensors_of(ROWS, ROWS, ROWS, dtypes=(torch.float16, *HALVES)),
    "head dimension at most 256": tensors_of(*[(1, 4, 2, 257)] * 3),
    "k must have shape": tensors_of(ROWS, (1, 4, 2, 9), (1, 4, 2, 9)),
    "v must have shape": tensors_of(ROWS, (1, 5, 2, 8), ROWS),
    "heads in key/value must divide": tensors_of((1, 4, 3, 8), ROWS, ROWS),
}


@pytest.mark.parametrize("message", BAD)
def test_flash_attn_s_own_errors(message):
    q, k, v = BAD[message]
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for attend in (
        lambda: flash_attn.flash_attn_func(q, k, v),
        lambda: flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 4, 4),
        lambda: flash_attn_interface._flash_attn_forward(q, k, v, 0.0, 1.0, False, -1, -1, 0.0, None, False),
    ):
        with pytest.raises(RuntimeError, match=message):
            attend()


@pytest.mark.parametrize(
    ("slopes", "message"),
    [(torch.zeros(2, dtype=torch.float16), "must have dtype fp32"), (torch.zeros(2, 2).t()[:1], "contiguous last dimension")],
)
def test_slopes_of_another_dtype_or_with_gaps(slopes, message):
    with pytest.raises(RuntimeError, match=f"ALiBi slopes.* {message}"):
        flash_attn.flash_attn_func(*tensors_of(ROWS, ROWS, ROWS), alibi_slopes=slopes)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "block_table"])
def test_indices_of_another_dtype(name):
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    q = k = v = torch.zeros(4, 2, 8)
    if name == "block_table":
        k, v, indices[name] = k[None], v[None], torch.zeros(1, 1)
    indices[name] = indices[name].long()
    with pytest.raises(RuntimeError, match=f"{name} must have dtype int32"):
        flash_attn.flash_attn_varlen_func(q, k, v, max_seqlen_q=4, max_seqlen_k=4, **indices)
