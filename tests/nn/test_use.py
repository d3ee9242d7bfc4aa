"""Test that ``with fastlm.use():`` routes torch's attention through fastlm, whoever calls it, and back afterwards."""

import pickle
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from support.processes import printed
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

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


def test_a_block_inside_itself(qkv):
    block = fastlm.use()
    with block, block:
        F.scaled_dot_product_attention(*qkv)
    with block:
        F.scaled_dot_product_attention(*qkv)
    F.scaled_dot_product_attention(*qkv)
    assert block.routed == 2


def test_no_mode_watches_other_calls():
    with fastlm.use():
        assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0
        assert F.linear is torch._C._nn.linear


def test_after_a_block_no_module_has_a_function_of_ours(monkeypatch):
    """Not even one that was imported inside and copied it."""
    theirs, early, late = F.scaled_dot_product_attention, types.ModuleType("early"), types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "early", early)
    early.attend = theirs
    for _ in range(2):
        with fastlm.use():
            ours = F.scaled_dot_product_attention
            monkeypatch.setitem(sys.modules, "late", late)
            late.attend = ours
            assert early.attend is ours is not theirs
        assert F.scaled_dot_product_attention is early.attend is late.attend is theirs
        assert torch.backends.mha.get_fastpath_enabled()


def test_blocks_of_two_threads_end_in_any_order(qkv):
    inside, over = threading.Event(), threading.Event()
    reports = []

    def work():
        with fastlm.use() as report:
            inside.set()
            over.wait(20)
            F.scaled_dot_product_attention(*qkv)
        reports.append(report)

    theirs = F.scaled_dot_product_attention
    thread = threading.Thread(target=work)
    with fastlm.use() as report:
        thread.start()
        assert inside.wait(20)
    F.scaled_dot_product_attention(*qkv)  # Functions of ours are still in place, for the other thread.
    over.set()
    thread.join()
    assert report.routed == 0 and reports[0].routed == 1 and F.scaled_dot_product_attention is theirs


def test_enable_holds_for_all_threads_until_disable(qkv):
    theirs = F.scaled_dot_product_attention
    report = fastlm.enable()
    try:
        assert fastlm.enable() is report
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv))
        thread.start()
        thread.join()
        with fastlm.use() as block:
            F.scaled_dot_product_attention(*qkv)
        assert (report.routed, block.routed) == (1, 1)
    finally:
        fastlm.disable()
    fastlm.disable()
    assert F.scaled_dot_product_attention is theirs


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_a_block_is_computed_again_by_fastlm(qkv, reentrant):
    leaves = [t.requires_grad_() for t in qkv]
    expected = torch.autograd.grad(fastlm.scaled_dot_product_attention(*leaves).sum(), leaves)
    with fastlm.use() as report, set_checkpoint_early_stop(False):  # It would end the second call before it is counted.
        checkpoint(F.scaled_dot_product_attention, *leaves, use_reentrant=reentrant).sum().backward()
    assert report.routed == 2
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected))


def test_a_user_s_mode_sees_the_call_and_may_pass_it_on(qkv):
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    with fastlm.use() as report, Watching():
        F.scaled_dot_product_attention(*qkv)
    with torch.device("cpu"), fastlm.use() as other:
        F.scaled_dot_product_attention(*qkv)
    assert len(seen) == report.routed == other.routed == 1


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_subclass_may_ask_whether_it_is_the_function_of_that_name(bias, qkv):
    """torch's own CausalBias does, and would otherwise be taken for a float mask without values."""
    query, key, value = qkv[0], qkv[1][:, :, :7], qkv[2][:, :, :7]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias(9, 7))
    with fastlm.use() as report:
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, attn_mask=bias(9, 7)), expected)
    assert report.left.total() == 1
    mask = bias(9, 7)
    torch.compiler.reset()
    with fastlm.use():
        compiled = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask), backend="eager")
        torch.testing.assert_close(compiled(query, key, value), expected)


def test_modes_that_are_switched_off(qkv):
    with fastlm.use() as report, torch.device("cpu"), torch._C.DisableTorchFunction():
        F.scaled_dot_product_attention(*qkv)
    assert report.routed == 1


def test_modules_that_are_loaded_when_they_are_used_stay_asleep(monkeypatch):
    class Asleep(types.ModuleType):
        def __getattribute__(self, name):
            raise ImportError("it was woken")

    monkeypatch.setitem(sys.modules, "asleep", Asleep("asleep"))
    with fastlm.use():
        pass


def test_a_module_that_takes_another_s_place_is_searched(monkeypatch, qkv):
    for _ in range(2):
        module = types.ModuleType("replaced")
        module.attend = F.scaled_dot_product_attention
        sys.modules.pop("replaced", None)
        monkeypatch.setitem(sys.modules, "replaced", module)
        with fastlm.use() as report:
            module.attend(*qkv)
        assert report.routed == 1


def test_threads_that_share_a_block_leave_it_in_any_order(qkv):
    block, inside, over = fastlm.use(), threading.Event(), threading.Event()
    with fastlm.use() as outer:

        def work():
            with block:
                inside.set()
                over.wait(20)
            F.scaled_dot_product_attention(*qkv)

        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(20)
        with block:
            over.set()
            thread.join()
        F.scaled_dot_product_attention(*qkv)
    assert (outer.routed, block.routed) == (1, 0)


def test_enabled_before_torch_imports_its_compiler():
    """Then, too, what is compiled is traced into, and its graph holds the op of fastlm."""
    code = """
import torch, fastlm
torch.manual_seed(0)
attention, x = torch.nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
expected = attention(x, x, x, need_weights=False)[0]
report = fastlm.enable()
compiled = torch.compile(attention, backend="aot_eager")
torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
fastlm.disable()
torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
print("agree")
"""
    assert printed(code) == "agree"


def test_a_replaced_encoder_packs_inside_a_block(monkeypatch):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1).eval()
    fastlm.replace(encoder)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), fastlm.use():
        assert not encoder(normals(2, 3, 16), src_key_padding_mask=padding)[0, 2].any()


def test_a_subclass_is_told_torch_s_name_of_the_function():
    named = []

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            named.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    theirs = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
    x, attention = normals(9, 2, 16).as_subclass(Named), nn.MultiheadAttention(16, 4)
    with fastlm.use() as report:
        F.scaled_dot_product_attention(x, x, x)
        attention(x, x, x, need_weights=False)
    assert theirs <= set(named) and report.routed == 0 and report.left.total() == 2


def test_scripts_graphs_and_pickles_name_torch_s_function(qkv):
    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    theirs, module = F.scaled_dot_product_attention, nn.MultiheadAttention(16, 4).eval()
    src = normals(9, 3, 16)
    with fastlm.use():
        scripted, scripted_module = torch.jit.script(attend), torch.jit.script(module)
        graph = torch.fx.symbolic_trace(attend)
        pickled = pickle.dumps(F.scaled_dot_product_attention)
    assert "aten::scaled_dot_product_attention" in str(scripted.graph)
    assert torch.equal(scripted(*qkv), attend(*qkv)) and torch.equal(graph(*qkv), attend(*qkv))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [theirs]
    torch.testing.assert_close(scripted_module(src, src, src)[0], module(src, src, src)[0])
    assert torch.equal(pickle.loads(pickled)(*qkv), theirs(*qkv))


def test_other_threads_are_left_alone(qkv):
    with fastlm.use() as report:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv))
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
        of_nested = F.scaled_dot_product_attention(*(nested,) * 3)
        everything_dropped = F.scaled_dot_product_attention(*(t.float() for t in tensors), dropout_p=1.0)
    assert torch.equal(of_nested.values(), F.scaled_dot_product_attention(*(nested,) * 3).values())
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


def test_flex_attention_is_counted_as_left(qkv):
    from torch.nn.attention import flex_attention as module  # which few programs load

    theirs = module.flex_attention
    with fastlm.use() as report:
        module.flex_attention(*qkv)
    assert report.routed == 0 and "FlexAttention" in str(report) and module.flex_attention is theirs


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
    """Compile a function outside the block and again inside; after the block it is its old self."""
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
    """Run the backend that FASTLM_BACKEND names, even the reference."""
    monkeypatch.setattr("fastlm.backend.DEFAULT", "reference")
    monkeypatch.setattr("fastlm.ops.attention.batched.DEFAULT", "reference")
    monkeypatch.setattr("fastlm.ops.attention.cpu.DEFAULT", "reference")
    with fastlm.use() as report:
        out = F.scaled_dot_product_attention(*qkv)
    assert report.routed == 1
    assert torch.equal(out, fastlm.scaled_dot_product_attention(*qkv, backend="reference"))
