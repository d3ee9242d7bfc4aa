"""Test programs that a review found to be wrong once, or thought to be: aliases, functions of autograd, lists, modes."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.spelled_attention import gradients, scores_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.testing import seeded_normal

pytestmark = pytest.mark.usefixtures("any_size")


class Doubled(torch.autograd.Function):
    """Stand for a user's function."""

    @staticmethod
    def forward(ctx, scores):
        return scores * 2

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Product(torch.autograd.Function):
    """Stand for a user's function that makes scores."""

    @staticmethod
    def forward(ctx, query, key):
        ctx.save_for_backward(query, key)
        return query @ key.transpose(-2, -1)

    @staticmethod
    def backward(ctx, grad):
        query, key = ctx.saved_tensors
        return grad @ key, grad.transpose(-2, -1) @ query


def added_to_a_total(query, key, value):
    total, scores = torch.zeros(2, 3, 7, 7), scores_of(query, key)
    total.add_(scores)
    return torch.cat([total, scores.softmax(-1)])


def added_through_a_view(query, key, value):
    total = torch.zeros(2, 2, 3, 7, 7)
    row = total[1]
    row += scores_of(query, key)
    return total


def scores_of_a_function(query, key, value):
    return (Product.apply(query, key) * 0.3).softmax(-1) @ value


def listed_operands(query, key, value):
    operands = [query, key]
    scores = torch.einsum("bhid,bhjd->bhij", operands)
    operands[0] = query * 2
    return Doubled.apply(scores)


def listed_shape(query, key, value):
    shape = [6, 7, 7]
    scores = scores_of(query, key).reshape(shape)
    shape[:] = [3, 2, 7, 7]
    return scores.exp()


def read_then_written(query, key, value):
    scores = scores_of(query, key)
    tripled = scores * 3
    scores.detach().amax()
    scores.mul_(2)
    return tripled + 0.0 * scores


def written_after_a_view_was_made(query, key, value):
    scores = scores_of(query, key)
    view = scores.unsqueeze(0)
    scores.mul_(0.5)
    return view.softmax(-1) @ value.unsqueeze(0)


def written_through_the_view_that_is_left(query, key, value):
    scores = scores_of(query, key)
    tripled, view = scores * 3, scores.view(6, 7, 7)
    del scores
    view.mul_(2)
    return tripled + view.view(2, 3, 7, 7)


def retained_then_doubled(query, key, value):
    scores = scores_of(query, key)
    scores.register_hook(lambda grad: grad * 0)
    return Doubled.apply(scores)


def hidden_twice(query, key, value):
    bias = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    padding = torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    padding[0, ..., :2] = True
    return (scores_of(query, key) + bias).masked_fill(padding, -1e9).softmax(-1) @ value


def zeros_over_hidden_that_count(query, key, value):
    hidden = torch.ones(7, 7).triu(1).bool()
    weights = (query @ key.mT).masked_fill(hidden, -1e3) * 1e-3
    return weights.softmax(-1).masked_fill(hidden, 0.0) @ value


def chosen_by_scores(query, key, value):
    return torch.where(scores_of(query, key) > 0, 1.0, -math.inf)


PROGRAMS = (
    added_to_a_total,
    added_through_a_view,
    scores_of_a_function,
    listed_operands,
    listed_shape,
    read_then_written,
    written_after_a_view_was_made,
    written_through_the_view_that_is_left,
    retained_then_doubled,
    hidden_twice,
    zeros_over_hidden_that_count,
    chosen_by_scores,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_values_and_gradients_are_torch_s(program, qkv):
    expected = program(*qkv)
    with fastlm.use():
        actual = program(*qkv)
    torch.testing.assert_close(actual, expected)
    if expected.requires_grad:
        for ours, theirs in zip(gradients(actual, qkv), gradients(expected, qkv)):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients_are_torch_s(program, mode, qkv):
    if program is retained_then_doubled:
        pytest.skip("it needs gradients")
    with mode():
        expected = program(*qkv)
        with fastlm.use():
            torch.testing.assert_close(program(*qkv), expected)


def test_weights_out_of_a_checkpoint(qkv):
    leaves = [[t.detach().requires_grad_() for t in qkv] for _ in range(2)]
    for tensors, inside in zip(leaves, (True, False)):
        with fastlm.use(handwritten=inside):
            weights = checkpoint(lambda q, k: scores_of(q, k).softmax(-1), *tensors[:2], use_reentrant=True)
            (weights @ tensors[2]).square().sum().backward()
    for ours, theirs in zip(*leaves):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_function_of_dropped_weights_has_the_gradient_of_the_same_draw(qkv):
    def dropped(query, key, value):
        torch.manual_seed(3)
        return Doubled.apply(F.dropout(scores_of(query, key).softmax(-1), 0.5))

    with fastlm.use():
        actual = dropped(*qkv)
    expected = dropped(*qkv)
    assert torch.equal(actual, expected)
    for ours, theirs in zip(gradients(actual, qkv)[:2], gradients(expected, qkv)[:2]):
        torch.testing.assert_close(ours, theirs)


def test_a_query_that_changes_before_the_backward_is_torch_s_error(qkv):
    query, key, _ = qkv
    query = query * 1.0
    with fastlm.use():
        out = Doubled.apply(query @ key.mT)
    with torch.no_grad():
        query.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, [key])


@pytest.mark.parametrize("observe", [Tensor.retain_grad, lambda weights: weights.register_hook(print)])
def test_gradients_of_weights_that_have_met_their_values_cannot_be_observed(observe, qkv):
    with fastlm.use():
        weights = scores_of(*qkv).softmax(-1)
        weights @ qkv[2]
        with pytest.raises(RuntimeError, match="handwritten=False"):
            observe(weights)


@pytest.mark.parametrize("offset", [8.0, 100.0])
def test_masks_keep_their_precision_under_autocast(offset, qkv):
    bias = seeded_normal(4, (7, 7), torch.float32) + offset
    bias[3] = torch.finfo(torch.float32).min

    def attend(query, key, value):
        return (scores_of(query, key) + bias).softmax(-1) @ value

    with torch.autocast("cpu", torch.bfloat16):
        expected = attend(*qkv)
        with fastlm.use() as report:
            actual = attend(*qkv)
    assert report.routed == 1
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0.03)


def test_a_tensor_of_inference_mode_outside_of_it(qkv):
    with torch.inference_mode():
        query, key, value = (t + 0.0 for t in qkv)
    expected = scores_of(query, key).softmax(-1)
    with fastlm.use(), torch.no_grad():
        weights = scores_of(query, key).softmax(-1)
        with torch.inference_mode():
            query.zero_()
    assert torch.equal(weights, expected)


def test_scores_first_read_under_a_mode_or_a_transform(qkv):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with fastlm.use():
        first, second = scores_of(*qkv), scores_of(*qkv)
    with FakeTensorMode(allow_non_fake_inputs=True):
        first.exp()
    assert torch.equal(first.exp(), scores_of(*qkv).exp())
    grad = torch.func.grad(lambda x: (x * second.detach().sum()).sum())(torch.ones(2))
    torch.testing.assert_close(grad, scores_of(*qkv).sum().expand(2))


def test_nested_tensors_are_torch_s():
    nested = torch.nested.nested_tensor([torch.randn(4, 8), torch.randn(6, 8)])
    expected = torch.matmul(nested, nested.transpose(1, 2))
    with fastlm.use():
        actual = torch.matmul(nested, nested.transpose(1, 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual.unbind(), expected.unbind()))


def test_the_layout_follows_a_transposed_condition(qkv):
    condition = torch.ones(3, 2, 7, 7, dtype=torch.bool).transpose(0, 1)
    for call in (lambda s: torch.where(condition, s, -1e9), lambda s: condition.float() + s, lambda s: s + condition.float()):
        expected = call(scores_of(*qkv))
        with fastlm.use():
            assert call(scores_of(*qkv)).stride() == expected.stride()


def test_questions_by_keyword(qkv):
    with fastlm.use():
        scores = scores_of(*qkv)
        assert torch.numel(input=scores) == 294 and torch.is_floating_point(input=scores)


def test_a_penalty_on_gradients_is_fused_too(qkv):
    def penalties(query, key, value):
        (grad,) = torch.autograd.grad((scores_of(query, key, value).softmax(-1) @ value).sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (query, key, value))

    with fastlm.use() as report:
        fused = penalties(*qkv)
    assert report.routed == 1
    for gradient, expected in zip(fused, penalties(*qkv)):
        torch.testing.assert_close(gradient, expected)


def test_a_penalty_on_a_penalty_is_an_error_that_names_the_way_out(qkv):
    with fastlm.use():
        out = scores_of(*qkv).softmax(-1) @ qkv[2]
    (grad,) = torch.autograd.grad(out.sum(), qkv[0], create_graph=True)
    (grad,) = torch.autograd.grad(grad.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="handwritten=False"):
        grad.square().sum().backward()
