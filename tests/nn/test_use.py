"""Test that ``with fastlm.use():`` routes torch's attention through fastlm, whoever calls it, and back afterwards."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_before

import fastlm
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the fused path."""


def normals(*shape, seed=1, dtype=torch.float32):
    return seeded_normal(seed, shape, dtype)


@pytest.fixture
def qkv():
    return [normals(2, 4, 9, 8, seed=i) for i in range(3)]


def ran_on_fastlm(out) -> bool:
    """Tell by the node that autograd keeps."""
    return "Direct" in type(out.grad_fn).__name__


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(9, 9).tril().bool()},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_calls_are_routed_and_back(qkv, options):
    leaves = [t.requires_grad_() for t in qkv]
    before = F.scaled_dot_product_attention(*leaves, **options)
    with fastlm.use() as report:
        inside = F.scaled_dot_product_attention(*leaves, **options)
        by_another_name = imported_before(*leaves, **options)
    after = F.scaled_dot_product_attention(*leaves, **options)
    assert torch.equal(inside, fastlm.scaled_dot_product_attention(*leaves, **options))
    assert [ran_on_fastlm(t) for t in (before, inside, by_another_name, after)] == [False, True, True, False]
    assert torch.equal(before, after) and report.routed == 2 and not report.left
    torch.testing.assert_close(inside, before)
    for ours, theirs in zip(torch.autograd.grad(inside.sum(), leaves), torch.autograd.grad(before.sum(), leaves)):
        torch.testing.assert_close(ours, theirs)


def test_an_error_ends_the_block(qkv):
    with pytest.raises(ZeroDivisionError), fastlm.use():
        raise ZeroDivisionError
    qkv[0].requires_grad_()
    assert not ran_on_fastlm(F.scaled_dot_product_attention(*qkv))


def test_blocks_inside_blocks(qkv):
    with fastlm.use() as outer:
        with fastlm.use() as inner:
            F.scaled_dot_product_attention(*qkv)
        F.scaled_dot_product_attention(*qkv)
    assert (outer.routed, inner.routed) == (1, 1)


def test_other_threads_are_left_alone(qkv):
    with fastlm.use() as report:
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=qkv)
        thread.start()
        thread.join()
    assert report.routed == 0


def test_torch_s_modules_in_eval_mode_and_in_training():
    """Neither multi_head_attention_forward nor the fused eval kernels of torch's layers bypass fastlm."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model, src = nn.TransformerEncoder(layer, 2), normals(3, 9, 16)
    padding = torch.arange(9)[None] >= torch.tensor([[9], [4], [1]])
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            expected = model(src, src_key_padding_mask=padding)[~padding]
            with fastlm.use() as report:
                out = model(src, src_key_padding_mask=padding)[~padding]
        assert report.routed == 2 and not report.left
        torch.testing.assert_close(out, expected)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    with fastlm.use() as report:
        attention(src, src, src, need_weights=False)
        attention(src, src, src)
    assert report.routed == 1 and list(report.left.values()) == [1]


def test_what_fastlm_cannot_do_is_torch_s():
    tensors = [normals(2, 4, 9, 8, seed=i, dtype=torch.float64) for i in range(3)]

    class Marked(torch.Tensor):
        """Stand for a user's subclass."""

    rows = [torch.randn(4, 9, 8), torch.randn(4, 9, 8)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    expected = F.scaled_dot_product_attention(*tensors)
    with fastlm.use() as report:
        assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
        marked = [t.float().as_subclass(Marked) for t in tensors]
        assert type(F.scaled_dot_product_attention(*marked)) is Marked
        F.scaled_dot_product_attention(*(nested,) * 3)
        everything_dropped = F.scaled_dot_product_attention(*(t.float() for t in tensors), dropout_p=1.0)
    assert report.routed == 1 and report.left.total() == 3
    assert torch.equal(everything_dropped, torch.zeros_like(everything_dropped))
    assert "float64" in str(report) and "3 were left" in str(report)


BAD = {
    "mask of other lengths": {"attn_mask": torch.zeros(5, 5)},
    "integer mask": {"attn_mask": torch.zeros(9, 9, dtype=torch.int64)},
    "dropout_p": {"dropout_p": 2.0},
    "key's dtype": {"key": normals(2, 4, 9, 8, dtype=torch.float64)},
    "mask's floating dtype": {"attn_mask": torch.zeros(9, 9, dtype=torch.float64)},
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_calls_raise_what_torch_raises(qkv, options):
    call = {**dict(zip(("query", "key", "value"), qkv)), **options}
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(**call)
    with fastlm.use(), pytest.raises(RuntimeError) as ours:
        F.scaled_dot_product_attention(**call)
    assert str(ours.value) == str(theirs.value)


def test_empty_calls():
    for queries, keys, head_dim in ((0, 5, 8), (3, 0, 8), (0, 0, 8), (3, 5, 0)):
        query, key = torch.ones(2, 4, queries, head_dim), torch.ones(2, 4, keys, head_dim)
        expected = F.scaled_dot_product_attention(query, key, key)
        with fastlm.use():
            torch.testing.assert_close(F.scaled_dot_product_attention(query, key, key), expected)
    with fastlm.use() as report:
        assert F.scaled_dot_product_attention(*(torch.ones(0, 4, 5, 8),) * 3).shape == (0, 4, 5, 8)
    assert report.routed == 1


def test_compiled_code_follows(qkv):
    """A function compiled outside the block is compiled again inside, and is its old self after the block."""
    graphs = []

    def backend(graph, inputs):
        graphs.append("fastlm" in graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), backend=backend, fullgraph=True)
    outside = compiled(*qkv)
    with fastlm.use():
        inside = compiled(*qkv)
        again = compiled(*qkv)
    after = compiled(*qkv)
    assert graphs == [False, True], "one graph for each"
    assert torch.equal(outside, after) and torch.equal(inside, again)
    assert torch.equal(inside, fastlm.scaled_dot_product_attention(*qkv, is_causal=True))


def test_a_compiled_module():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    src = normals(3, 9, 16)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with fastlm.use():
        out = compiled(src, src, src, need_weights=False)[0]
        eager = attention(src, src, src, need_weights=False)[0]
    assert torch.equal(out, eager)
    torch.testing.assert_close(out, attention(src, src, src, need_weights=False)[0])


def test_the_environment_s_backend_has_its_way(qkv, monkeypatch):
    """The backend that FASTLM_BACKEND names runs, even the reference."""
    monkeypatch.setattr("fastlm.backend.DEFAULT", "reference")
    monkeypatch.setattr("fastlm.ops.attention.batched.DEFAULT", "reference")
    monkeypatch.setattr("fastlm.ops.attention.cpu.DEFAULT", "reference")
    with fastlm.use() as report:
        out = F.scaled_dot_product_attention(*qkv)
    assert report.routed == 1
    assert torch.equal(out, fastlm.scaled_dot_product_attention(*qkv, backend="reference"))
