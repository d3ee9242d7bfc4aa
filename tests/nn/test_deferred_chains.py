"""Test what is recorded of hand-written attention: where it is found, under which modes, and what changes in between do."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from support.spelled_attention import attend, gradients, scores_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.testing import seeded_normal

pytestmark = pytest.mark.usefixtures("any_size")


# ---- weights that are returned -----------------------------------------------------------------------------------------------


def test_weights_are_computed_when_they_are_read(qkv):
    query, key, value = qkv
    with fastlm.use() as report:
        weights = scores_of(query, key).softmax(-1)
        out = weights @ value
    assert (report.routed, report.left.total()) == (1, 0)
    expected = scores_of(query, key).softmax(-1)
    assert torch.equal(weights, expected) and report.left.total() == 0
    for ours, theirs in zip(gradients(weights, qkv), gradients(expected, qkv)):
        assert ours is theirs is None or torch.equal(ours, theirs)
    torch.testing.assert_close(out, expected @ value)


def test_weights_that_are_read_are_those_that_were_dropped(qkv):
    query, key, value = qkv
    with fastlm.use() as report:
        weights = F.dropout(scores_of(query, key).softmax(-1), 0.5)
        first, second = weights @ value, weights @ value
    assert report.routed == 1, "the second product belongs to the same weights"
    assert torch.equal(first, second)
    torch.testing.assert_close(weights @ value, first)
    kept = scores_of(query, key).softmax(-1) * 2
    assert bool(((weights == 0) | (weights - kept).abs().lt(1e-6)).all()) and 0.3 < (weights == 0).float().mean() < 0.7
    for ours, theirs in zip(gradients(weights @ value, qkv), gradients(first, qkv)):
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_reproducible(qkv):
    def dropped():
        torch.manual_seed(5)
        with fastlm.use():
            return F.dropout(scores_of(*qkv).softmax(-1), 0.5) @ qkv[2]

    assert torch.equal(dropped(), dropped())


# ---- changes between the product and its use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["query", "key", "bias"])
@pytest.mark.parametrize("use_of", ["values", "scores"])
def test_a_tensor_that_changes_before_the_scores_are_used_is_an_error(changed, use_of, qkv):
    tensors = dict(zip(("query", "key", "value"), (t.detach() for t in qkv))) | {"bias": torch.zeros(7)}
    with fastlm.use():
        scores = scores_of(tensors["query"], tensors["key"]) + tensors["bias"]
        tensors[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="changed in place.*handwritten=False"):
            scores.softmax(-1) @ tensors["value"] if use_of == "values" else scores.sum()


@pytest.mark.parametrize("required", [True, False])
def test_a_gradient_that_is_required_too_late_or_no_longer_is_an_error(required, qkv):
    query, key, value = qkv
    query = query.detach().requires_grad_(not required)
    with fastlm.use():
        weights = scores_of(query, key).softmax(-1)
        query.requires_grad_(required)
        with pytest.raises(RuntimeError, match="changed in place"):
            weights @ value


def test_a_tensor_of_inference_mode_may_change(qkv):
    query, key, value = (t.detach() for t in qkv)
    expected = attend(query, key, value)
    with torch.inference_mode(), fastlm.use() as report:
        query, bias, hidden = query + 0.0, torch.zeros(7), torch.zeros(7, 7, dtype=torch.bool)
        scores = (scores_of(query, key) + bias).masked_fill(hidden, -math.inf)
        query.zero_()
        bias.fill_(math.nan)
        hidden.fill_(True)
        out = scores.softmax(-1) @ value
    assert report.routed == 1
    torch.testing.assert_close(out, expected)


def test_values_may_change_later(qkv):
    query, key, value = (t.detach().clone() for t in qkv)
    with fastlm.use():
        out = attend(query, key, value)
        expected = out.clone()
        value.zero_()
    assert torch.equal(out, expected)


# ---- blocks, threads, modes --------------------------------------------------------------------------------------------------


def test_a_deferred_tensor_outlives_its_block_and_its_thread(qkv):
    query, key, value = qkv
    with fastlm.use() as report:
        first, second = scores_of(query, key), scores_of(query, key).softmax(-1)
    results = []
    thread = threading.Thread(target=lambda: results.append((first.softmax(-1), second @ value)))
    thread.start()
    thread.join()
    weights, out = results[0]
    assert torch.equal(weights, scores_of(query, key).softmax(-1)) and report.routed == 1
    torch.testing.assert_close(out, attend(*qkv))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_a_block(reentrant, qkv):
    expected = gradients(attend(*qkv), qkv)
    with fastlm.use() as report:
        out = checkpoint(attend, *qkv, use_reentrant=reentrant)
        out.backward(seeded_normal(9, out.shape, out.dtype))
    assert report.routed >= 1 and not report.left
    for leaf, grad in zip(qkv, expected):
        torch.testing.assert_close(leaf.grad, grad)


def test_autocast_holds_as_it_was_at_each_call(qkv):
    with torch.autocast("cpu"):
        expected = attend(*qkv)
        scores = scores_of(*qkv)
    with fastlm.use() as report, torch.autocast("cpu"):
        out = attend(*qkv)
        deferred = scores_of(*qkv)
    assert report.routed == 1 and out.dtype == expected.dtype == deferred.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    assert torch.equal(deferred.softmax(-1), scores.softmax(-1)), "it is read outside of autocast"


def test_steps_under_other_modes_are_not_mixed(qkv):
    with fastlm.use():
        scores = scores_of(*qkv)
        with torch.no_grad():
            weights = scores.softmax(-1)
        assert not weights.requires_grad and torch.equal(weights, scores_of(*qkv).softmax(-1))
        with torch.inference_mode():
            assert (scores.softmax(-1) @ qkv[2]).is_inference()
        with torch.no_grad():
            constant = scores_of(*qkv)
        out = constant.softmax(-1) @ qkv[2]
    assert [grad is None for grad in gradients(out, qkv)] == [True, True, False]


class Watching(TorchFunctionMode):
    """Record what torch functions are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_user_s_mode_sees_all_calls(qkv):
    with fastlm.use() as report, Watching() as watching:
        out = attend(*qkv)
    names = [function.__name__ for function in watching.seen]
    assert report.routed == 1 and names[-4:] == ["deferred_matmul_method", "mul", "softmax", "deferred_matmul_method"]
    torch.testing.assert_close(out, attend(*qkv))


def test_subclasses_are_told_torch_s_functions(qkv):
    class Named(Tensor):
        seen = set()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.add(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    named = qkv[0].detach().as_subclass(Named)
    with fastlm.use() as report:
        assert type(attend(named, *qkv[1:])) is Named
        torch.einsum("bhid,bhjd->bhij", named, qkv[1])
        torch.bmm(named[0], qkv[1][0].mT)
    assert {torch._C.TensorBase.matmul, torch.einsum, torch.bmm} <= Named.seen and report.routed == 0


def test_what_traces_or_transforms_gets_torch_s_products(qkv):
    tensors = [t.detach() for t in qkv]
    expected = attend(*tensors)
    with fastlm.use() as report:
        traced, graph = torch.jit.trace(attend, tensors, check_trace=False), torch.fx.symbolic_trace(attend)
        exported = torch.export.export(Spelled(), tuple(tensors))
        mapped = torch.func.vmap(attend)(*tensors)
        tangent = torch.func.jvp(lambda query: attend(query, *tensors[1:]), (tensors[0],), (tensors[0],))[1]
    assert report.routed == 0 and "fastlm" not in str(exported.graph) and "deferred" not in graph.code
    for out in (traced(*tensors), graph(*tensors), exported.module()(*tensors), mapped):
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        tangent, torch.func.jvp(lambda query: attend(query, *tensors[1:]), (tensors[0],), (tensors[0],))[1]
    )


class Spelled(nn.Module):
    """Attention that is spelled out in a module."""

    def forward(self, query, key, value):
        return attend(query, key, value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_torch_s(backend, qkv):
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    with fastlm.use():
        out = compiled(*qkv)
        ours = gradients(out, qkv)
    torch.testing.assert_close(out, attend(*qkv))
    torch.testing.assert_close(ours, gradients(attend(*qkv), qkv))


def test_compiled_code_takes_a_deferred_tensor(qkv):
    torch._dynamo.reset()
    compiled = torch.compile(lambda scores: scores.exp() * 2, backend="aot_eager")
    with fastlm.use():
        out = compiled(scores_of(*qkv))
    torch.testing.assert_close(out, scores_of(*qkv).exp() * 2)


def test_scripts_name_torch_s_functions(qkv):
    with fastlm.use():
        scripted = torch.jit.script(in_torchscript)
    assert "aten::einsum" in str(scripted.graph) and "aten::bmm" in str(scripted.graph)
    torch.testing.assert_close(scripted(*qkv), in_torchscript(*qkv))


def in_torchscript(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", query, key).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1))


# ---- what is found, and what is not ------------------------------------------------------------------------------------------


def test_handwritten_false_leaves_products_to_torch(qkv):
    with fastlm.use(handwritten=False) as report:
        out = attend(*qkv)
    assert report.routed == report.left.total() == 0 and torch.equal(out, attend(*qkv))


def test_enable_finds_hand_written_attention(qkv):
    report = fastlm.enable()
    try:
        attend(*qkv)
    finally:
        fastlm.disable()
    assert report.routed == 1 and "matmul" not in vars(Tensor) and "__matmul__" not in vars(Tensor)


def test_small_products_are_torch_s(qkv, monkeypatch):
    monkeypatch.undo()
    with fastlm.use() as report:
        scores = qkv[0] @ qkv[1].mT
    assert type(scores) is Tensor and "1 times: hand-written scores too few" in str(report)


def test_the_report_says_who_read_the_scores(qkv):
    with fastlm.use() as report:
        scores_of(*qkv).amax(-1)
    assert "read by amax" in str(report)


def test_grouped_heads_are_found_in_views(qkv):
    query = seeded_normal(5, (2, 6, 7, 8), torch.float32).requires_grad_()
    _, key, value = qkv

    def grouped(query, key, value):
        query = query.unflatten(1, (3, 2))  # (B, key heads, queries of each, L, D)
        weights = (query @ key.unsqueeze(2).transpose(-1, -2)).softmax(-1)
        return (weights @ value.unsqueeze(2)).flatten(1, 2)

    def expanded(query, key, value):
        key, value = (t[:, :, None].expand(-1, -1, 2, -1, -1) for t in (key, value))
        return ((query.unflatten(1, (3, 2)) @ key.transpose(-1, -2)).softmax(-1) @ value).flatten(1, 2)

    def by_einsum(query, key, value):
        weights = torch.einsum("bhgid,bhjd->bhgij", query.unflatten(1, (3, 2)), key).softmax(-1)
        return torch.einsum("bhgij,bhjd->bhgid", weights, value).flatten(1, 2)

    def of_one_head(query, key, value):
        weights = torch.einsum("b h i d, b j d -> b h i j", query, key[:, 0]).softmax(-1)
        return torch.einsum("b h i j, b j d -> b h i d", weights, value[:, 0])

    for function in (grouped, expanded, by_einsum, of_one_head):
        with fastlm.use() as report:
            out = function(query, key, value)
        assert report.routed == 1
        torch.testing.assert_close(out, function(query, key, value))
        leaves = [query, key, value]
        for ours, theirs in zip(gradients(out, leaves), gradients(function(query, key, value), leaves)):
            torch.testing.assert_close(ours, theirs)


def test_windows_with_a_bias_for_each_head_and_a_mask_for_each_place():
    """Split the batch by a view for the mask, and merge it again by another, as Swin does."""
    query, key, value = (seeded_normal(i, (8, 3, 9, 4), torch.float32).requires_grad_() for i in range(3))
    bias, mask = seeded_normal(3, (3, 9, 9), torch.float32).requires_grad_(), torch.zeros(4, 9, 9)
    mask[1:, :5, 5:] = mask[1:, 5:, :5] = -100.0

    def attend_windows(query, key, value, bias):
        scores = (query * 0.5) @ key.transpose(-2, -1) + bias.unsqueeze(0)
        scores = scores.view(2, 4, 3, 9, 9) + mask.unsqueeze(1).unsqueeze(0)
        return scores.view(-1, 3, 9, 9).softmax(-1) @ value

    leaves = [query, key, value, bias]
    with fastlm.use() as report:
        out = attend_windows(*leaves)
    assert report.routed == 1
    torch.testing.assert_close(out, attend_windows(*leaves))
    for ours, theirs in zip(gradients(out, leaves), gradients(attend_windows(*leaves), leaves)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
def test_a_learned_temperature_gets_its_gradient(shape, qkv):
    temperature = torch.full(shape, 0.7).requires_grad_()

    def warmed(query, key, value, temperature):
        return ((query @ key.mT) * temperature).softmax(-1) @ value

    leaves = [*qkv, temperature]
    with fastlm.use() as report:
        out = warmed(*leaves)
    assert report.routed == 1
    for ours, theirs in zip(gradients(out, leaves), gradients(warmed(*leaves), leaves)):
        torch.testing.assert_close(ours, theirs)


def test_zeros_written_over_hidden_weights(qkv):
    hidden = torch.zeros(7, 7, dtype=torch.bool)
    hidden[2], hidden[:, 4] = True, True

    def attend_and_zero(query, key, value):
        scores = scores_of(query, key).masked_fill(hidden, torch.finfo(torch.float32).min)
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ value

    with fastlm.use() as report:
        out = attend_and_zero(*qkv)
    assert report.routed == 1
    torch.testing.assert_close(out, attend_and_zero(*qkv))


def test_hidden_keys_that_another_view_or_shape_of_the_mask_hides(qkv):
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True

    def zeroed(query, key, value):  # as SpeechBrain does it
        weights = scores_of(query, key).masked_fill(padding.view(2, 1, 1, 7), -65000.0).softmax(-1)
        return weights.masked_fill(padding.view(2, 1, 1, 7), 0.0) @ value

    def expanded(query, key, value):  # as XLM does it
        scores = scores_of(query, key)
        scores.masked_fill_(padding.view(2, 1, 1, 7).expand_as(scores), torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ value

    def added(query, key, value):  # as GPT-Neo does it
        hidden, mask = torch.ones(7, 7).triu(1).bool(), torch.linspace(-3, 3, 7)
        return (torch.where(~hidden, scores_of(query, key), -1e9) + mask).softmax(-1) @ value

    for function in (zeroed, expanded, added):
        with fastlm.use() as report:
            out = function(*qkv)
        assert report.routed == 1, function.__name__
        torch.testing.assert_close(out, function(*qkv))


def test_a_bias_that_lifts_hidden_scores_is_torch_s(qkv):
    hidden, lift = torch.ones(7, 7).triu(1).bool(), torch.zeros(7).index_fill(0, torch.tensor(6), 1e4)

    def lifted(query, key, value):
        return (scores_of(query, key).masked_fill(hidden, -1e4) + lift).softmax(-1) @ value

    with fastlm.use() as report:
        out = lifted(*qkv)
    assert report.routed == 0 and torch.equal(out, lifted(*qkv))


def test_scores_as_low_as_the_fill_count_beside_it(qkv):
    """Then no kernel is exact, because it does not know how much hidden scores weigh; torch's calls compute it."""
    query, key, value = qkv
    hidden = torch.ones(7, 7).triu(1).bool()

    def far(query, key, value):
        return (query @ key.mT * 1.0 + torch.full((7,), -1e4)).masked_fill(hidden, -1e4).softmax(-1) @ value

    with fastlm.use() as report:
        out = far(query, key, value)
    assert report.routed == 0 and torch.equal(out, far(query, key, value))


def test_a_row_that_is_hidden_in_two_ways_is_torch_s(qkv):
    """By -inf and by a finite fill: the mean is that of the values that the fill hides."""
    hidden = torch.zeros(7, 7, dtype=torch.bool)
    hidden[2, 3:] = True
    bias = torch.zeros(7, 7)
    bias[2, :3] = -math.inf

    def hidden_twice(query, key, value):
        return (scores_of(query, key) + bias).masked_fill(hidden, -1e9).softmax(-1) @ value

    with fastlm.use() as report:
        out = hidden_twice(*qkv)
    assert report.routed == 0 and torch.equal(out, hidden_twice(*qkv))


ERRORS = {
    "a bias of another shape": lambda q, k, v: q @ k.mT + torch.zeros(5),
    "a mask of another shape": lambda q, k, v: (q @ k.mT).masked_fill(torch.zeros(5, 5).bool(), -math.inf),
    "a fill that overflows": lambda q, k, v: (q.half() @ k.half().mT).masked_fill(torch.zeros(7, 7).bool(), -1e9),
    "values of another length": lambda q, k, v: (q @ k.mT).softmax(-1) @ v[:, :, :5],
    "values of another dtype": lambda q, k, v: (q @ k.mT).softmax(-1) @ v.double(),
    "another dimension": lambda q, k, v: (q @ k.mT).softmax(4),
    "a view of another size": lambda q, k, v: (q @ k.mT).view(2, 3, 7, 8),
    "vectors of other lengths": lambda q, k, v: q @ k[..., :5].mT,
    "keys of another dtype": lambda q, k, v: q @ k.mT.double(),
    "a dropout of 2": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 2.0),
    "an argument too many": lambda q, k, v: (q @ k.mT).softmax(-1, torch.float32, 3, 4),
    "no such argument": lambda q, k, v: (q @ k.mT).masked_fill(hidden=1),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors_are_torch_s_and_at_torch_s_place(call, qkv):
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as theirs:
        call(*qkv)
    with fastlm.use(), pytest.raises(theirs.type) as ours:
        call(*qkv)
    assert str(ours.value) == str(theirs.value)
