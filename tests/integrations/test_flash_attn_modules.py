"""flash_attn's padding, rotary and attention modules on fastlm: what they return, and their gradients."""

from types import SimpleNamespace

import pytest
import torch
from support.naive_flash_attn import naive_attention, naive_rotation
from torch import Tensor

from fastlm.integrations.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from fastlm.integrations.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from fastlm.integrations.flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)

# ---- padding ----------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["integers", "bools"])
def test_padding_goes_and_comes_back(mask):
    rows = torch.randn(3, 4, 2, 5, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = unpad_input(rows, mask)
    assert torch.equal(tokens, rows[mask.bool()])
    assert indices.tolist() == [0, 1, 5, 6, 7, 8]
    assert cu_seqlens.tolist() == [0, 2, 5, 6] and cu_seqlens.dtype == torch.int32
    assert (longest, used.tolist(), used.dtype) == (3, [2, 3, 1], torch.int32)
    padded = pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, rows * mask[..., None, None])
    (gradient,) = torch.autograd.grad(padded.sum(), rows)
    assert torch.equal(gradient, mask[..., None, None].expand_as(rows).float())


def test_places_that_are_kept_unused():
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = unpad_input(torch.randn(3, 4, 5), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8] and tokens.shape == (8, 5)
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 7, 8], 4, [2, 3, 1])


def test_several_sequences_in_a_row():
    rows = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(rows, lengths)
    assert torch.equal(tokens, torch.cat((rows[0, :5], rows[1, :5], rows[2])))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_by_their_places(dtype):
    rows, indices = torch.randn(5, 2, 3, requires_grad=True), torch.tensor([4, 0], dtype=dtype)
    taken, same = index_first_axis_residual(rows, indices)
    assert torch.equal(taken, rows[[4, 0]]) and torch.equal(same, rows)
    put = index_put_first_axis(index_first_axis(rows, indices), indices, 6)
    assert torch.equal(put[[4, 0]], rows[[4, 0]]) and not put[[1, 2, 3, 5]].any()
    torch.autograd.gradcheck(lambda x: index_put_first_axis(index_first_axis(x, indices), indices, 6), rows.double())


# ---- rotary -----------------------------------------------------------------------------------------------------------------


def tables_of(dtype=torch.float64, pairs: int = 3) -> tuple[Tensor, Tensor]:
    angles = torch.randn(20, pairs, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def naively(x: Tensor, tables: tuple[Tensor, Tensor], positions, interleaved: bool) -> Tensor:
    return naive_rotation(x, *(table[positions] for table in tables), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 4, torch.tensor([3, 0])], ids=str)
def test_rotation_of_a_batch(offset, interleaved):
    tables, x = tables_of(), torch.randn(2, 5, 4, 9, dtype=torch.float64)
    first = offset.tolist() if isinstance(offset, Tensor) else [offset] * 2
    expected = torch.stack([naively(row, tables, slice(at, at + 5), interleaved) for row, at in zip(x, first)])
    before = x.clone()
    actual = apply_rotary_emb(x, *tables, interleaved=interleaved, seqlen_offsets=offset)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(x, before)
    assert apply_rotary_emb_func(x, *tables, interleaved=interleaved, inplace=True, seqlen_offsets=offset) is x
    assert torch.equal(x, actual)


def test_rotation_of_packed_sequences():
    tables, x, cu_seqlens = tables_of(), torch.randn(9, 2, 6, dtype=torch.float64), torch.tensor([0, 4, 4, 9]).int()
    for offset, first in ((2, [2, 2]), (torch.tensor([1, 0, 7]), [1, 7])):
        parts = zip((x[:4], x[4:]), first)
        expected = torch.cat([naively(part, tables, slice(at, at + len(part)), False) for part, at in parts])
        actual = apply_rotary_emb(x, *tables, seqlen_offsets=offset, cu_seqlens=cu_seqlens, max_seqlen=5)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_rotation_has_a_gradient(inplace):
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    tables = tables_of()
    torch.autograd.gradcheck(lambda x: apply_rotary_emb(x * 1, *tables, interleaved=True, inplace=inplace), x)


def test_rotation_is_rounded_once():
    """Compute in float32: a bfloat16 result is the rounded one of these numbers."""
    tables, x = tables_of(torch.bfloat16), torch.randn(1, 7, 2, 6).bfloat16()
    expected = apply_rotary_emb(x.float(), *(table.float() for table in tables)).bfloat16()
    assert torch.equal(apply_rotary_emb(x, *tables), expected)
    assert torch.equal(apply_rotary_emb_torch(x, *tables), expected)


def test_rotation_of_packed_projections_in_place():
    tables, of_keys, x = tables_of(), tables_of(), torch.randn(1, 5, 8, 6, dtype=torch.float64)
    q, k, v = x.split((4, 2, 2), dim=2)
    expected = torch.cat((naively(q[0], tables, slice(5), False), naively(k[0], of_keys, slice(5), False), v[0]), 1)
    qkv = x.clone()
    assert apply_rotary_emb_qkv_(qkv, *tables, *of_keys, num_heads_q=4) is qkv
    torch.testing.assert_close(qkv[0], expected)
    kv = torch.stack((k, v), 2)
    assert apply_rotary_emb_kv_(kv, *of_keys, seqlen_offsets=2) is kv
    torch.testing.assert_close(kv[0, :, 0], naively(k[0], of_keys, slice(2, 7), False))
    assert torch.equal(kv[:, :, 1], v)


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_rotary_embedding(scale_base):
    """Turn pair i at position p by p * base ** (-2 i / dim); with xPos also scale it, keys the other way round."""
    rotary = RotaryEmbedding(6, base=100.0, scale_base=scale_base)
    qkv = torch.randn(1, 5, 3, 2, 8)
    angles = torch.arange(2, 7)[:, None] * 100.0 ** (-torch.arange(0, 6, 2) / 6)
    cos, sin = angles.cos(), angles.sin()
    scale = torch.ones(5, 3)
    if scale_base is not None:
        per_pair = (torch.arange(0, 6, 2) + 0.4 * 6) / (1.4 * 6)
        scale = per_pair ** ((torch.arange(2, 7) - 7 // 2) / scale_base)[:, None]
    q, k = (naive_rotation(qkv[0, :, i], cos * s, sin * s, False) for i, s in enumerate((scale, 1 / scale)))
    expected = torch.stack((q, k, qkv[0, :, 2]), 1)
    separately = rotary(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=2)
    assert rotary(qkv, seqlen_offset=2) is qkv
    torch.testing.assert_close(qkv[0], expected)
    assert torch.equal(separately[0], qkv[:, :, 0]) and torch.equal(separately[1], qkv[:, :, 1:])


def test_tables_are_float32_s_in_a_model_of_bfloat16():
    rotary, cast = RotaryEmbedding(8), RotaryEmbedding(8).bfloat16()
    for module in (rotary, cast):
        module(torch.randn(1, 3, 3, 2, 8, dtype=torch.bfloat16), max_seqlen=500)
    assert torch.equal(cast._cos_cached, rotary._cos_cached) and cast._cos_cached.shape == (500, 4)


# ---- modules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 2, 5]).int()], ids=["batch", "packed"])
def test_attention_modules(cu_seqlens):
    qkv = torch.randn(1, 5, 3, 4, 8)
    options = {"causal": True, "softmax_scale": 0.3, "window_size": (3, 3), "alibi_slopes": torch.tensor(get_alibi_slopes(4))}
    bounds = [0, 5] if cu_seqlens is None else cu_seqlens.tolist()
    parts = [qkv[:, a:b].unbind(2) for a, b in zip(bounds, bounds[1:])]
    expected = torch.cat([naive_attention(*part, **options)[0] for part in parts], 1)
    lengths = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "max_seqlen": 3}
    of_keys = {f"{name}_k": value for name, value in lengths.items()}
    given = qkv if cu_seqlens is None else qkv[0]
    q, kv = (given[:, :, 0], given[:, :, 1:]) if cu_seqlens is None else (given[:, 0], given[:, 1:])
    for actual in (
        FlashSelfAttention(**options)(given, **lengths),
        FlashCrossAttention(**options | {"causal": False})(q, kv, causal=True, **lengths, **of_keys),
    ):
        torch.testing.assert_close(actual.reshape(1, 5, 4, 8), expected)


def test_dropout_is_training_s():
    qkv = torch.randn(2, 5, 3, 4, 8)
    for kind in (FlashSelfAttention, SelfAttention):
        module, whole = kind(attention_dropout=0.5), kind()(qkv)
        assert not torch.allclose(module(qkv), whole)
        assert torch.equal(module.eval()(qkv), whole)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_padded_keys(causal):
    q, kv, qkv = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 2, 8), torch.randn(2, 5, 3, 4, 8)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    actual = CrossAttention(causal=causal)(q, kv, key_padding_mask=keep)
    for b, length in enumerate((5, 3)):
        expected, _ = naive_attention(q[b : b + 1], *kv[b : b + 1, :length].unbind(2), causal=causal)
        torch.testing.assert_close(actual[b : b + 1], expected)
    actual = SelfAttention(causal=causal)(qkv, key_padding_mask=keep)
    for b, length in enumerate((5, 3)):  # Queries at padding mean nothing.
        expected, _ = naive_attention(*qkv[b : b + 1, :length].unbind(2), causal=causal)
        torch.testing.assert_close(actual[b : b + 1, :length], expected)


def test_slopes_of_alibi():
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


LAYERS = {
    "packed": {},
    "grouped": {"num_heads_kv": 2, "causal": True},
    "rotary": {"rotary_emb_dim": 16, "causal": True},
    "grouped, rotary, interleaved": {"num_heads_kv": 1, "rotary_emb_dim": 8, "rotary_emb_interleaved": True, "causal": True},
    "convolutions": {"dwconv": True, "causal": True},
    "grouped convolutions": {"dwconv": True, "num_heads_kv": 2},
    "checkpointing": {"checkpointing": True, "causal": True},
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_the_same_with_flash_attention_and_without(name):
    torch.manual_seed(0)
    flash, plain = (MHA(64, 4, **LAYERS[name], use_flash_attn=use) for use in (True, False))
    plain.load_state_dict(flash.state_dict())
    x = torch.randn(2, 6, 64, requires_grad=True)
    results = [
        (out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
        for layer in (flash, plain)
        for out in [layer(x)]
    ]
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_layer_by_hand():
    """Attend across, from a part of the rows, and return the residual."""
    torch.manual_seed(0)
    layer = MHA(32, 4, cross_attn=True, return_residual=True, use_flash_attn=True, use_alibi=True, window_size=(2, 2))
    x, other = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    q, kv = layer.Wq(x[:, :3]).unflatten(-1, (4, 8)), layer.Wkv(other).unflatten(-1, (2, 4, 8))
    options = {"window_size": (2, 2), "alibi_slopes": torch.tensor(get_alibi_slopes(4))}
    expected = layer.out_proj(naive_attention(q, *kv.unbind(2), **options)[0].flatten(2))
    out, residual = layer(x, other, mixer_subset=slice(3))
    torch.testing.assert_close(out, expected)
    assert residual is x


@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize(
    "options", [{"window_size": (3, 0)}, {"rotary_emb_dim": 16}, {"num_heads_kv": 2, "use_alibi": True}], ids=str
)
def test_generating_by_the_layer(options, use_flash_attn):
    """Give with a cache, row by row after a first part, what the whole sequence gives."""
    if not use_flash_attn and "rotary_emb_dim" not in options:
        options = {"num_heads_kv": 2}
    torch.manual_seed(0)
    layer = MHA(64, 4, causal=True, layer_idx=1, use_flash_attn=use_flash_attn, **options).eval()
    x = torch.randn(2, 9, 64)
    params = SimpleNamespace(
        max_batch_size=2, max_seqlen=12, batch_size_offset=0, seqlen_offset=0, lengths_per_sample=None, key_value_memory_dict={}
    )
    with torch.no_grad():
        expected, parts = layer(x), []
        for begin, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
            params.seqlen_offset = begin
            parts.append(layer(x[:, begin:end], inference_params=params))
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert params.key_value_memory_dict[1].shape == layer.allocate_inference_cache(2, 12).shape
