"""xformers' attention on fastlm: its layouts and masks, held to scores spelled out in float64, and its name."""

import importlib
import importlib.util
import math
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from support.libraries import Ops, assert_held
from support.processes import HANG
from torch import Tensor

from fastlm.integrations import xformers
from fastlm.integrations.stand_in import Package
from fastlm.integrations.stand_in import install as install_package
from fastlm.integrations.xformers import attn_bias as masks
from fastlm.integrations.xformers.ops import (
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from fastlm.testing import seeded_normal

H, K, KV = 3, 16, 8


def spelled_out(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, bias: Tensor | None) -> Tensor:
    """Attend with (B, M, H, K) as xformers' documentation spells it out. Rows that see nothing are zeros."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


def tensors(batch: int, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (batch, queries, H, K), (batch, keys, H, K), (batch, keys, H, KV)
    return [seeded_normal(i, shape, dtype).requires_grad_() for i, shape in enumerate(shapes)]


def results(attend, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Return the output and the gradients of the inputs."""
    out = attend(*inputs)
    gradients = torch.autograd.grad(out, inputs, seeded_normal(9, out.shape, torch.float64).to(out.dtype))
    return {"out": out.detach()} | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def assert_right(inputs: list[Tensor], attend, plain) -> None:
    """Hold ``attend`` to the error rule, and see that one op of fastlm ran forward and one backward."""
    golden = results(plain, [tensor.detach().double().requires_grad_() for tensor in inputs])
    with Ops() as ops:
        actual = results(attend, inputs)
    assert len(ops.fastlm) == 2, ops.fastlm
    assert_held(actual, results(plain, inputs), golden)


# Which key a query sees, told for each mask by itself: i is the query, j the key, of so many.
PLAIN = {
    "LowerTriangularMask": (masks.LowerTriangularMask(), lambda i, j, queries, keys: j <= i),
    "LowerTriangularFromBottomRightMask": (
        masks.LowerTriangularFromBottomRightMask(),
        lambda i, j, queries, keys: j <= i + keys - queries,
    ),
    "LowerTriangularFromBottomRightLocalAttentionMask": (
        masks.LowerTriangularFromBottomRightMask().make_local_attention(3),
        lambda i, j, queries, keys: 0 <= i + keys - queries - j < 3,
    ),
    "LocalAttentionFromBottomRightMask": (
        masks.LocalAttentionFromBottomRightMask(2, 1),
        lambda i, j, queries, keys: -1 <= i + keys - queries - j <= 2,
    ),
}
Q_LENGTHS, K_LENGTHS, PADDING = [3, 1, 5, 4], [5, 1, 2, 9], 10
MORE_KEYS = [5, 1, 7, 9]  # Masks aligned at the last key have no fewer keys than queries.
BLOCKS = {
    "BlockDiagonalMask": (masks.BlockDiagonalMask.from_seqlens(Q_LENGTHS, K_LENGTHS), lambda i, j, queries, keys: True),
    "BlockDiagonalCausalMask": (
        masks.BlockDiagonalMask.from_seqlens(Q_LENGTHS, K_LENGTHS).make_causal(),
        lambda i, j, queries, keys: j <= i,
    ),
    "BlockDiagonalCausalMask of equal lengths": (
        masks.BlockDiagonalCausalMask.from_seqlens(Q_LENGTHS),
        lambda i, j, queries, keys: j <= i,
    ),
    "BlockDiagonalCausalFromBottomRightMask": (
        masks.BlockDiagonalMask.from_seqlens(Q_LENGTHS, MORE_KEYS).make_causal_from_bottomright(),
        lambda i, j, queries, keys: j <= i + keys - queries,
    ),
    "BlockDiagonalCausalLocalAttentionMask": (
        masks.BlockDiagonalMask.from_seqlens(Q_LENGTHS, K_LENGTHS).make_local_attention(3),
        lambda i, j, queries, keys: 0 <= i - j < 3,
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        masks.BlockDiagonalMask.from_seqlens(Q_LENGTHS, MORE_KEYS).make_local_attention_from_bottomright(3),
        lambda i, j, queries, keys: 0 <= i + keys - queries - j < 3,
    ),
    "BlockDiagonalPaddedKeysMask": (
        masks.BlockDiagonalPaddedKeysMask.from_seqlens(Q_LENGTHS, PADDING, MORE_KEYS),
        lambda i, j, queries, keys: True,
    ),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (
        masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q_LENGTHS, PADDING, MORE_KEYS),
        lambda i, j, queries, keys: j <= i + keys - queries,
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        masks.BlockDiagonalPaddedKeysMask.from_seqlens(Q_LENGTHS, PADDING, MORE_KEYS).make_local_attention(2, 1),
        lambda i, j, queries, keys: -1 <= i + keys - queries - j <= 2,
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (
        masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(Q_LENGTHS, PADDING, MORE_KEYS, 3),
        lambda i, j, queries, keys: 0 <= i + keys - queries - j < 3,
    ),
}


def seen_of(rule, queries: int, keys: int) -> Tensor:
    return torch.tensor([[bool(rule(i, j, queries, keys)) for j in range(keys)] for i in range(queries)])


def seen_of_blocks(mask, rule) -> tuple[Tensor, Tensor]:
    """Return which keys each query sees, and which keys are padding."""
    q, k = mask.q_seqinfo, mask.k_seqinfo
    used = getattr(k, "seqlen_py", [b - a for a, b in zip(k.seqstart_py, k.seqstart_py[1:])])
    seen = torch.zeros(q.seqstart_py[-1], k.seqstart_py[-1], dtype=torch.bool)
    padding = torch.ones(k.seqstart_py[-1], dtype=torch.bool)
    for (first, end), begin, length in zip(zip(q.seqstart_py, q.seqstart_py[1:]), k.seqstart_py, used):
        seen[first:end, begin : begin + length] = seen_of(rule, end - first, length)
        padding[begin : begin + length] = False
    return seen, padding


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("lengths", [(7, 7), (4, 9), (9, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(name, lengths, dtype):
    mask, rule = PLAIN[name]
    seen = seen_of(rule, *lengths)
    assert torch.equal(mask.materialize((2, H, *lengths)), torch.where(seen, 0.0, -math.inf).expand(2, H, *lengths))
    attend = lambda q, k, v: memory_efficient_attention(q, k, v, mask)  # noqa: E731
    assert_right(tensors(2, *lengths, dtype), attend, lambda q, k, v: spelled_out(q, k, v, seen, None))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_blocks(name, dtype):
    mask, rule = BLOCKS[name]
    assert type(mask).__name__ == name.split()[0]
    seen, padding = seen_of_blocks(mask, rule)
    assert torch.equal(mask.materialize(seen.shape), torch.where(seen, 0.0, -math.inf))
    inputs = tensors(1, *seen.shape, dtype)
    with torch.no_grad():
        for tensor in inputs[1:]:
            tensor[:, padding] = math.nan  # which nobody reads
    read = [torch.where(tensor.isnan(), 0.0, tensor.detach()).requires_grad_() for tensor in inputs]

    def plain(q, k, v):
        return spelled_out(q, k, v, seen, None)

    actual = results(lambda q, k, v: memory_efficient_attention(q, k, v, mask), inputs)
    golden = results(plain, [tensor.detach().double().requires_grad_() for tensor in read])
    assert_held(actual, results(plain, read), golden)


@pytest.mark.parametrize("lengths", [(7, 7), (4, 9)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_tensor_is_added_to_the_scores_and_has_a_gradient(lengths, causal):
    inputs = [*tensors(2, *lengths, torch.float32), seeded_normal(4, (2, H, *lengths), torch.float32).requires_grad_()]
    seen = seen_of(lambda i, j, *_: j <= i, *lengths) if causal else None
    mask = masks.LowerTriangularMask()

    def attend(q, k, v, bias):
        return memory_efficient_attention(q, k, v, mask.add_bias(bias) if causal else bias)

    assert_right(inputs, attend, lambda q, k, v, bias: spelled_out(q, k, v, seen, bias))
    if causal:
        shown = mask.add_bias(inputs[3]).materialize((2, H, *lengths))
        assert torch.equal(shown, torch.where(seen, inputs[3], -math.inf))


def test_one_head_without_a_dimension():
    inputs = [t.detach()[:, :, 0].requires_grad_() for t in tensors(2, 4, 9, torch.float32)]
    inputs.append(seeded_normal(4, (2, 4, 9), torch.float32).requires_grad_())
    with_head = lambda q, k, v, bias: spelled_out(q[:, :, None], k[:, :, None], v[:, :, None], None, bias[:, None])[:, :, 0]  # noqa: E731
    assert_right(inputs, memory_efficient_attention, with_head)


def test_groups_of_heads_are_read_once():
    groups, heads = 2, 3
    q = seeded_normal(1, (2, 5, groups, heads, K), torch.float32).requires_grad_()
    k, v = (seeded_normal(i, (2, 7, groups, 1, K), torch.float32).requires_grad_() for i in (2, 3))
    bias = seeded_normal(4, (2, groups, heads, 5, 7), torch.float32).requires_grad_()

    def attend(q, k, v, bias):
        expanded = (tensor.expand(-1, -1, -1, heads, -1) for tensor in (k, v))
        return memory_efficient_attention(q, *expanded, bias)

    def plain(q, k, v, bias):
        flat = [t.expand(-1, -1, -1, heads, -1).flatten(2, 3) for t in (q, k, v)]
        return spelled_out(*flat, None, bias.flatten(1, 2)).unflatten(2, (groups, heads))

    assert_right([q, k, v, bias], attend, plain)
    with Ops() as ops, torch.no_grad():
        memory_efficient_attention(q, *(t.expand(-1, -1, -1, heads, -1) for t in (k, v)))
    assert not {"aten::clone", "aten::copy_", "aten::_reshape_copy"} & set(ops.all), ops.all
    one = memory_efficient_attention(q.flatten(2, 3), *(t[:, :, :1, 0].expand(-1, -1, 6, -1) for t in (k, v)))
    assert torch.equal(one, memory_efficient_attention(q.flatten(2, 3), k[:, :, :1, 0], v[:, :, :1, 0]))


def test_scale_dropout_lse_and_dtype():
    q, k, v = (tensor.detach() for tensor in tensors(2, 4, 9, torch.float32))
    half = memory_efficient_attention(q, k, v, scale=0.5 / math.sqrt(K))
    assert torch.equal(half, memory_efficient_attention(q * 0.5, k, v))
    assert memory_efficient_attention(q, k, v, output_dtype=torch.float16).dtype == torch.float16
    torch.manual_seed(1)
    dropped = memory_efficient_attention(q, k, v, masks.LowerTriangularMask(), p=0.5)
    torch.manual_seed(1)
    assert torch.equal(memory_efficient_attention(q, k, v, masks.LowerTriangularMask(), 0.5), dropped)
    assert not torch.equal(memory_efficient_attention(q, k, v, masks.LowerTriangularMask()), dropped)
    assert not memory_efficient_attention_forward(q.requires_grad_(), k, v).requires_grad
    out, lse = memory_efficient_attention_forward_requires_grad(q, k, v)
    expected = torch.logsumexp(torch.einsum("bmhk,bnhk->bhmn", q.double(), k.double()) / math.sqrt(K), dim=-1)
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=0)
    assert out.shape == (2, 4, H, KV)


def test_dropout_differs_between_sequences():
    """Each sequence of a top-left mask draws its own weights, as with the other masks."""
    one = seeded_normal(1, (1, 4, H, K), torch.float32)
    twice, keys = torch.cat([one, one], 1), seeded_normal(2, (1, 6, H, K), torch.float32)
    mask = masks.BlockDiagonalCausalMask.from_seqlens([4, 4], [6, 6])
    first, second = memory_efficient_attention(twice, *[torch.cat([keys, keys], 1)] * 2, mask, p=0.5).split(4, dim=1)
    assert not torch.equal(first, second)


def test_tensors_are_packed_and_split():
    parts = [seeded_normal(i, (batch, length, H, K), torch.float32) for i, (batch, length) in enumerate([(2, 3), (1, 5)])]
    mask, packed = masks.BlockDiagonalMask.from_tensor_list(parts)
    assert packed.shape == (1, 11, H, K)
    outs = mask.split(memory_efficient_attention(packed, packed, packed, mask.make_causal()))
    for part, out in zip(parts, outs, strict=True):
        alone = memory_efficient_attention(part, part, part, masks.LowerTriangularMask())
        assert torch.equal(out, alone)
    longer = [torch.cat([part, part], dim=1) for part in parts]
    mask, queries, keys, values = masks.BlockDiagonalMask.from_tensor_lists_qkv(parts, longer, longer)
    assert [t.shape for t in mask.split_queries(queries)] == [t.shape for t in parts]
    assert all(map(torch.equal, mask.split_kv(values), longer))
    with pytest.raises(ValueError, match="use split_queries or split_kv"):
        mask.split(queries)


def test_bad_input():
    q, k, v = (tensor.detach() for tensor in tensors(2, 4, 9, torch.float32))
    for expected, arguments, options in (
        ("query, key and value must all have shape", (q, k[0], v), {}),
        ("attn_bias must be a floating tensor", (q, k, v, torch.ones(4, 9, dtype=torch.bool)), {}),
        ("attn_bias must be a floating tensor .* got str", (q, k, v, "causal"), {}),
        ("attn_bias", (q, k, v, torch.zeros(5, 9)), {}),
        ("p must lie in", (q, k, v), {"p": 1.5}),
        ("op must be None", (q, k, v), {"op": object()}),
        ("query, key and value must be batches of one", (q, k, v, masks.BlockDiagonalMask.from_seqlens([4], [9])), {}),
    ):
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=expected):
            memory_efficient_attention(*arguments, **options)
    with pytest.raises(ValueError, match="sequence 1 has 2 keys, 3 queries"):
        masks.BlockDiagonalCausalFromBottomRightMask.from_seqlens([1, 3], [1, 2])
    with pytest.raises(ValueError, match="kv_seqlen must not be longer than kv_padding, 4"):
        masks.BlockDiagonalPaddedKeysMask.from_seqlens([1], 4, [5])
    with pytest.raises(ValueError, match="window_size must be at least 1"):
        masks.LowerTriangularFromBottomRightMask().make_local_attention(0)


# ---- under its name ---------------------------------------------------------------------------------------------------------


def test_install_and_uninstall():
    assert xformers.install()
    assert xformers.install()
    try:
        ops = importlib.import_module("xformers.ops")
        assert ops.memory_efficient_attention is memory_efficient_attention
        assert ops.fmha.attn_bias.BlockDiagonalMask is masks.BlockDiagonalMask
        assert importlib.import_module("xformers.ops.fmha.attn_bias").LowerTriangularMask is masks.LowerTriangularMask
        version = importlib.import_module("xformers").__version__
        assert metadata.version("xformers") == metadata.version("XFormers") == version
        assert metadata.packages_distributions()["xformers"] == ["xformers"]
        assert importlib.util.find_spec("xformers.components") is None
        assert not hasattr(ops, "SwiGLU")
        with pytest.raises(ImportError, match="SwiGLU"):
            exec("from xformers.ops import SwiGLU", {})
        with pytest.raises(ImportError, match="xformers.triton"):
            exec("import xformers.triton", {})
        with pytest.raises(ImportError, match="PagedBlockDiagonalPaddedKeysMask"):
            exec("from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask", {})
    finally:
        xformers.uninstall()
    xformers.uninstall()
    assert importlib.util.find_spec("xformers") is None and not [name for name in sys.modules if name.startswith("xformers")]
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("xformers")


def test_a_real_package_stays():
    assert not install_package(Package("torch", "9", {"torch": None}))


DIFFUSERS = """
import fastlm.integrations.xformers
fastlm.integrations.xformers.install()
import pytest, torch
from diffusers.models.attention_processor import Attention, AttnProcessor, XFormersAttnProcessor
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.utils import is_xformers_available
from support.libraries import Ops
assert is_xformers_available()
torch.manual_seed(0)
attention = Attention(query_dim=32, heads=4, dim_head=8, processor=AttnProcessor()).eval()
x, context, mask = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.zeros(2, 1, 5).index_fill(2, torch.tensor([4]), -1e4)
for options in ({}, {"encoder_hidden_states": context}, {"encoder_hidden_states": context, "attention_mask": mask}):
    options = {k: v.repeat_interleave(4, 0) if k == "attention_mask" else v for k, v in options.items()}
    attention.set_processor(AttnProcessor())
    expected = attention(x, **options)
    attention.set_processor(XFormersAttnProcessor())
    with Ops() as ops:
        torch.testing.assert_close(attention(x, **options), expected)
    assert any("attention" in name for name in ops.fastlm), ops.all
with pytest.raises(ValueError, match="torch.cuda.is_available"):
    attention.set_use_memory_efficient_attention_xformers(True)
q = torch.randn(2, 9, 4, 8)
expected = dispatch_attention_fn(q, q, q)
with attention_backend("xformers"), Ops() as ops:
    torch.testing.assert_close(dispatch_attention_fn(q, q, q), expected)
assert any("attention" in name for name in ops.fastlm), ops.all
"""


def test_diffusers_takes_it():
    run = subprocess.run([sys.executable, "-c", DIFFUSERS], capture_output=True, text=True, timeout=HANG, cwd="tests")
    assert run.returncode == 0, run.stderr
