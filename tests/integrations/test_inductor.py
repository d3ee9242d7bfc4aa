"""Test that inductor's pass makes attention that is spelled out in compiled code fastlm's, or else leaves it torch's."""

import math
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.spelled_attention import attend, spellings
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

import fastlm
from fastlm.integrations.inductor import fuse_attention
from fastlm.nn.handwritten import graph
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_within, seeded_normal, ulp_of_largest, worst_error


class Ops(CustomGraphPass):
    """Count the ops of fastlm in the graphs that inductor is about to write code for."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, fx_graph: torch.fx.Graph) -> None:
        self.counts.update(str(node.target) for node in fx_graph.nodes if str(node.target).startswith("fastlm."))

    def uuid(self) -> None:
        """Return None, so that nothing comes from a cache."""

    def take(self) -> dict[str, int]:
        counts, self.counts = dict(self.counts), Counter()
        return counts


FORWARD, BACKWARD = "fastlm.attention.default", "fastlm.attention_backward.default"
FILL, FILL_BACKWARD = "fastlm.fill.default", "fastlm.fill_backward.default"


@pytest.fixture
def ops(monkeypatch) -> Iterator[Ops]:
    """Return what inductor sees of fastlm's ops, and let chains of any size be found."""
    ops = Ops()
    torch._dynamo.reset()
    monkeypatch.setattr(graph, "LEAST", 1)
    monkeypatch.setattr(graph, "LEAST_FILLED", 1)
    with inductor.patch(post_grad_custom_post_pass=ops, force_disable_caches=True):
        yield ops
    torch._dynamo.reset()


def compiled_with_pass(function: Callable, **more) -> Callable:
    return torch.compile(function, options={"pre_grad_custom_pass": fuse_attention}, **more)


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    normals = [seeded_normal(50 + i, out.shape, out.dtype) for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, normals, allow_unused=True)
    return [leaf.new_zeros(leaf.shape) if grad is None else grad for leaf, grad in zip(leaves, grads)]


def assert_as_exact(function: Callable, inputs: list[Tensor], compiled: Callable, grad: bool) -> None:
    """Assert that compiled code is as exact as eager code, by their errors against float64, gradients included."""

    def run(call: Callable, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_(grad and tensor.is_floating_point()) for tensor in tensors]
        outputs = call(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [out.detach() for out in outputs] + (gradients(outputs, wanted) if grad else []), len(outputs)

    actual, count = run(compiled, inputs)
    plain, _ = run(function, inputs)
    golden, _ = run(function, [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs])
    for i, (ours, theirs, exact) in enumerate(zip(actual, plain, golden, strict=True)):
        assert ours.dtype == theirs.dtype and (i >= count or ours.stride() == theirs.stride())
        factor = VALUE_FACTOR if i < count else GRADIENT_FACTOR
        bound = factor * worst_error(theirs, exact) + 8 * ulp_of_largest(exact, theirs.dtype)
        assert_within(ours, exact, bound, f"result {i}")


# ---- what is found ----------------------------------------------------------------------------------------------------------


@settings(
    max_examples=1,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # Each example takes long to compile.
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.lists(spellings(touched=False), min_size=12, max_size=12))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_every_spelling_is_one_call_and_as_exact_as_torch(drawn, grad, ops):
    names, inputs = [], []
    for spelling in drawn:
        tensors = spelling.inputs()
        names.append(list(tensors))
        inputs += tensors.values()

    def all_of_them(*tensors):
        parts = (tensors[5 * i : 5 * i + 5] for i in range(len(drawn)))
        return [spelling.attend(**dict(zip(n, part)))[0] for spelling, n, part in zip(drawn, names, parts)]

    torch._dynamo.reset()
    compiled = compiled_with_pass(all_of_them, fullgraph=True)
    assert_as_exact(all_of_them, inputs, compiled, grad)
    counts = ops.take()
    assert counts[FORWARD] == len(drawn) and counts.get(BACKWARD, 0) == grad * len(drawn), counts


def qkv(*lead: int, rows: int = 24, keys: int = 40, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    """Return query, key and value of 16 elements."""
    shapes = (*lead, rows, 16), (*lead, keys, 16), (*lead, keys, 16)
    return [seeded_normal(i, shape, dtype).requires_grad_(grad) for i, shape in enumerate(shapes)]


def filled(fill: float | None, after: bool = False) -> Callable:
    """Return attention whose hidden scores are a number, None being the least of the dtype."""

    def attend(query, key, value, hidden):
        scores = query @ key.transpose(-2, -1) / 4.0
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min if fill is None else fill).softmax(-1)
        return (weights.masked_fill(hidden, 0.0) if after else weights) @ value

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_fills_are_replaced_scores(dtype, ops):
    """Also where rows are hidden whole, and where hidden scores count beside the others."""
    hidden = seeded_normal(9, (2, 1, 24, 40), torch.float32) > 0.3
    hidden[:, :, 3] = True
    inputs = qkv(2, 3, dtype=dtype)
    functions = [filled(-1e9), filled(None), filled(-1e4), filled(-1e9, after=True)]

    def all_of_them(query, key, value, low):
        return [function(query, key, value, hidden) for function in functions] + [
            filled(-2000.0)(query + low, key + low, value, hidden)  # scores around the fill
        ]

    low = torch.zeros(16, dtype=dtype)
    low[0] = 90.0
    inputs[0][..., 0], inputs[1][..., 0] = -180.0, 0.0
    compiled = compiled_with_pass(all_of_them, fullgraph=True)
    assert_as_exact(all_of_them, [*inputs, low], compiled, grad=True)
    counts = ops.take()  # Where calls of attention are the same, inductor makes one.
    assert counts[FILL] == counts[FILL_BACKWARD] == 5 and counts[BACKWARD] == 5, counts


@pytest.mark.parametrize("whole", [False, True], ids=["some hidden", "rows hidden whole"])
def test_the_op_of_fills(whole):
    query, key, value = qkv(2, 3)
    attended = seeded_normal(9, (2, 1, 24, 40), torch.float32) < 0.3
    attended[..., 0], attended[:, :, 1] = True, not whole
    out, lse = fastlm.attention(query, key, value, mask=attended, return_lse=True)
    inputs = out, query, key, value, seeded_normal(5, (3, 24, 40), torch.float32), attended, lse, None
    torch.library.opcheck(torch.ops.fastlm.fill.default, (*inputs, 0.25, -1e9, 0.0, False))


def test_steps_in_place_and_shared_tensors(ops):
    """Statements in place, a tensor that two chains share, and autocast around compiled code."""

    def two(query, key, value, bias):
        scores = torch.matmul(query, key.mT)
        scores *= 0.25
        scores += bias
        scores.masked_fill_(torch.ones(24, 40, dtype=torch.bool).triu(17), -math.inf)
        first = scores.softmax(-1) @ value
        return first, torch.softmax(query @ key.mT + bias, -1).matmul(value)

    compiled = compiled_with_pass(two, fullgraph=True)
    assert_as_exact(two, [*qkv(2, 3), seeded_normal(5, (3, 24, 40), torch.float32)], compiled, grad=True)
    assert ops.take() == {FORWARD: 2, BACKWARD: 2}
    inputs = qkv(2, 3)
    with torch.autocast("cpu"):
        out, theirs = compiled_with_pass(attend)(*inputs), attend(*inputs)
    assert ops.take() == {FORWARD: 1} and out.dtype == theirs.dtype == torch.bfloat16
    golden = attend(*(tensor.double() for tensor in inputs))
    bound = VALUE_FACTOR * worst_error(theirs, golden) + 8 * ulp_of_largest(golden, torch.bfloat16)
    assert_within(out, golden, bound, "under autocast")


def test_dropout_is_repeated_by_manual_seed(ops):
    def dropping(query, key, value):
        return F.dropout((query @ key.mT).softmax(-1), 0.25) @ value

    compiled = compiled_with_pass(dropping, fullgraph=True)
    query, key, value = qkv(4, 8, rows=64, keys=64, grad=True)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out = compiled(query, key, value)
        results.append([out.detach(), *gradients([out], [query, key, value])])
    assert all(map(torch.equal, results[0], results[1])) and not torch.equal(results[0][0], results[2][0])
    assert ops.take() == {FORWARD: 1, BACKWARD: 1}
    kept = compiled_with_pass(dropping)
    with torch.no_grad():
        share = kept(query * 0.0, key, torch.ones_like(value)).mean()  # the share of weights that are kept, times 1 / 0.75
    assert abs(float(share) - 1.0) < 0.01
    normals = seeded_normal(50, results[0][0].shape, torch.float32)
    torch.testing.assert_close((results[0][0] * normals).sum(), (results[0][3] * value).sum())  # out is linear in value


# ---- what is left -----------------------------------------------------------------------------------------------------------


def returned_weights(query, key, value):
    weights = (query @ key.mT).softmax(-1)
    return weights @ value, weights


def read_scores(query, key, value):
    scores = query @ key.mT
    return scores.softmax(-1) @ value + scores.max()


def another_step(query, key, value):
    return (query @ key.mT).exp().softmax(-1) @ value


def changed_in_between(query, key, value):
    scores = query @ key.mT
    mask = torch.zeros(24, 40)
    scores = scores + mask
    mask += 1e4 * torch.eye(24, 40)
    return scores.softmax(-1) @ value + mask.sum()


def views_change_together(query, key, value):
    scores = query @ key.mT
    scores.view(-1, 24, 40).mul_(2.0)
    return scores.softmax(-1) @ value


def other_axis(query, key, value):
    return (query @ key.mT).softmax(-2) @ value


def grad_mode_changes(query, key, value):
    with torch.no_grad():
        scores = query @ key.mT
    return scores.softmax(-1) @ value


def autocast_begins(query, key, value):
    with torch.autocast("cpu", torch.bfloat16):
        return (query @ key.mT).softmax(-1).to(value.dtype) @ value


def transformed(query, key, value):
    return torch.func.vmap(attend)(query, key, value)


LEFT = [returned_weights, read_scores, another_step, changed_in_between, views_change_together, other_axis, grad_mode_changes]
LEFT += [autocast_begins, transformed]


@pytest.mark.parametrize("function", LEFT, ids=lambda function: function.__name__)
def test_other_chains_are_torchs(function, ops):
    inputs = qkv(2, 3, grad=True)
    out = compiled_with_pass(function)(*inputs)
    torch.testing.assert_close(out, function(*inputs))
    assert ops.take() == {}


def test_small_problems_are_torchs(ops, monkeypatch):
    monkeypatch.undo()
    with inductor.patch(post_grad_custom_post_pass=ops, force_disable_caches=True):
        compiled_with_pass(attend)(*qkv(2, 3))
        assert ops.take() == {}
        compiled_with_pass(lambda *tensors: attend(*tensors))(*qkv(8, 8, rows=32, keys=32))
    assert ops.take() == {FORWARD: 1}


def test_symbolic_sizes_are_torchs(ops):
    compiled = compiled_with_pass(attend, dynamic=True)
    for keys in (40, 56):
        inputs = qkv(2, 3, keys=keys)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert ops.take() == {}


# ---- inductor ---------------------------------------------------------------------------------------------------------------


def test_the_backward_may_compile_after_the_block(ops):
    inputs = qkv(2, 3, grad=True)
    out = compiled_with_pass(attend)(*inputs)
    torch.testing.assert_close(gradients([out], inputs), gradients([attend(*inputs)], inputs))
    assert ops.take() == {FORWARD: 1, BACKWARD: 1}


def test_checkpoints_around_compiled_code(ops):
    """torch compares what is saved at first and in the recomputation, and compiling saves nothing."""
    inputs = qkv(2, 3, grad=True)
    out = torch.utils.checkpoint.checkpoint(compiled_with_pass(attend), *inputs, use_reentrant=False)
    actual = gradients([out], inputs)
    torch.testing.assert_close(actual, gradients([attend(*inputs)], inputs))
    assert ops.take() == {FORWARD: 1, BACKWARD: 1}


def test_a_cached_graph_holds_the_op(ops, tmp_path, monkeypatch):
    """Take from inductor's caches with the pass what was compiled with it, and without it, what was compiled without."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = qkv(2, 3)
    with inductor.patch(post_grad_custom_post_pass=None, force_disable_caches=False):
        plain, fused = torch.compile(attend)(*inputs), compiled_with_pass(attend)(*inputs)
        assert not torch.equal(plain, fused)
        for compile, expected in ((compiled_with_pass, fused), (torch.compile, plain)):
            torch._dynamo.reset()
            assert torch.equal(compile(attend)(*inputs), expected)
