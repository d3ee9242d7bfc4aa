"""Test that whatever touches deferred scores and weights gets torch's bits."""

import copy
import io
import pickle

import numpy
import pytest
import torch
import torch.nn.functional as F
from support.spelled_attention import gradients, scores_of
from torch import Tensor

import fastlm

pytestmark = pytest.mark.usefixtures("any_size")


def assert_same_bits(function, tensors: list[Tensor]) -> None:
    """Assert that ``function(*tensors)`` gives torch's bits inside a block, and so do its gradients."""
    expected = function(*tensors)
    with fastlm.use():
        actual = function(*tensors)
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected) and actual.dtype == expected.dtype and actual.stride() == expected.stride()
        if expected.requires_grad:
            for ours, theirs in zip(gradients(actual, tensors), gradients(expected, tensors)):
                assert ours is theirs is None or torch.equal(ours, theirs)
    else:
        assert type(actual) is type(expected)
        numpy.testing.assert_equal(actual, expected)


# ---- whatever else touches scores gets torch's bits --------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Stand for a user's function, to which Python's torch functions do not show its arguments."""

    @staticmethod
    def forward(ctx, scores):
        ctx.save_for_backward(scores)
        return scores * 2

    @staticmethod
    def backward(ctx, grad):
        (scores,) = ctx.saved_tensors
        return 2 * grad + 0 * scores


class Written(torch.autograd.Function):
    """Write into its argument, as functions that are marked so may."""

    @staticmethod
    def forward(ctx, scores):
        ctx.mark_dirty(scores)
        return scores.mul_(3)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def set_a_row(scores):
    scores = scores * 1.0
    scores[..., 0] = -5.0
    return scores


def log_of_weights(scores):
    return scores.softmax(-1).log()


def written_after_a_look(scores):
    largest = scores.detach().amax(-1, keepdim=True)
    scores.sub_(largest)
    return scores.exp()


def written_through_a_view(scores):
    view = scores.view(6, 7, 7)
    view.mul_(2.0)
    return scores + 0.0


def view_of_what_is_written(scores):
    view = scores.view(6, 7, 7)
    scores.add_(1.0)
    return view + 0.0


def old_value_of_what_is_written(scores):
    old = scores * 2.0
    scores.mul_(5.0)
    return old + 0.0 * scores.detach()


def written_after_a_function(scores):
    doubled = Doubled.apply(scores.exp())
    scores.mul_(0.5)
    return doubled + scores


def hooked(scores):
    scores.register_hook(lambda grad: grad * 2)
    return scores.tanh()


TOUCHES = {
    "itself": lambda s: s + 0.0,
    "max": lambda s: s.max(),
    "slice": lambda s: s[:, 1:, :, ::2],
    "sum of squares": lambda s: (s * s).sum(),
    "cat": lambda s: torch.cat([s, s], -1),
    "out of another": lambda s: torch.ones(7) * s,
    "rows": lambda s: s.transpose(-1, -2).softmax(-1),
    "softmax of queries": lambda s: s.softmax(-2),
    "log softmax": lambda s: F.log_softmax(s, -1),
    "logsumexp": lambda s: s.logsumexp(-1),
    "log of weights": log_of_weights,
    "clamp": lambda s: s.clamp(min=0.0).softmax(-1),
    "sigmoid": lambda s: s.sigmoid() / 7,
    "top": lambda s: s.topk(3, -1).values,
    "numpy": lambda s: s.detach().numpy(),
    "as array": lambda s: numpy.asarray(s.detach()),
    "list": lambda s: s.tolist(),
    "item": lambda s: s[0, 0, 0, 0].item(),
    "repr": repr,
    "format": lambda s: f"{s.mean():.3f}",
    "dlpack": lambda s: torch.from_dlpack(s.detach()),
    "function": Doubled.apply,
    "function that writes": lambda s: Written.apply(s + 0.0),
    "function that writes into scores": Written.apply,
    "written after a function": written_after_a_function,
    "hook": hooked,
    "row set": set_a_row,
    "written after a look": written_after_a_look,
    "written through a view": written_through_a_view,
    "view of what is written": view_of_what_is_written,
    "old value of what is written": old_value_of_what_is_written,
    "integer power": lambda s: s**2,
    "double": lambda s: s.double(),
    "to int": lambda s: s.detach().to(torch.int32),
    "unbind": lambda s: s.unbind(1)[2],
    "iterated": lambda s: list(s)[1],
    "with alpha": lambda s: torch.add(s, torch.ones(7), alpha=2),
    "out": lambda s: torch.mul(s.detach(), 2, out=torch.empty(2, 3, 7, 7)),
    "written into another": lambda s: torch.zeros(2, 3, 7, 7).copy_(s),
    "deep copy": lambda s: copy.deepcopy(s.detach()),
    "pickle": lambda s: pickle.loads(pickle.dumps(s.detach())),
    "zeros like": lambda s: torch.zeros_like(s),
    "new zeros": lambda s: s.new_zeros(3, 4),
    "mask of": lambda s: s > 0,
    "truth": lambda s: bool((s == s).all()),
    "all attributes": lambda s: [
        str(getattr(s, a)) for a in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ],
    "all questions": lambda s: (s.dim(), s.size(), s.numel(), s.stride(), s.is_contiguous(), len(s), s.is_floating_point()),
    "is leaf": lambda s: s.is_leaf,
    "reversed product": lambda s: torch.ones(7, 7) @ s,
    "product before softmax": lambda s: s @ torch.ones(2, 3, 7, 5),
    "vmap": lambda s: torch.vmap(lambda row: row.softmax(-1))(s),
    "weights added up": lambda s: s.softmax(-1).sum(-2),
    "weights times weights": lambda s: s.softmax(-1) @ s.softmax(-1),
    "finfo": lambda s: torch.finfo(s.dtype).min,
    "narrow fill": lambda s: s.masked_fill(torch.ones(7, 7).triu(1).bool(), -3.0).softmax(-1) @ torch.ones(2, 3, 7, 4),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_what_touches_scores_gets_torch_s_bits(touch, qkv):
    assert_same_bits(lambda query, key, value: touch(scores_of(query, key)), qkv)


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_touches_scores_without_gradients(touch, mode, qkv):
    if touch is hooked:
        pytest.skip("a hook needs a gradient")
    with mode():
        assert_same_bits(lambda query, key, value: touch(scores_of(query, key)), qkv)


def test_a_saved_deferred_tensor_is_an_ordinary_one(qkv):
    with fastlm.use():
        scores = scores_of(*qkv)
        file = io.BytesIO()
        torch.save({"scores": scores}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["scores"], scores_of(*qkv)) and type(loaded["scores"]) is Tensor


def test_retained_gradients(qkv):
    expected = scores_of(*qkv)
    expected.retain_grad()
    (expected.softmax(-1) @ qkv[2]).sum().backward()
    with fastlm.use():
        scores = scores_of(*qkv)
        scores.retain_grad()
        (scores.softmax(-1) @ qkv[2]).sum().backward()
    assert torch.equal(scores.grad, expected.grad)


def test_gradients_through_a_function_and_past_it(qkv):
    """Both reach the query, each by its own product, so that rounding differs from torch's, which adds them up before."""

    def mixed(query, key, value):
        scores = scores_of(query, key)
        return Doubled.apply(scores) + scores.exp()

    with fastlm.use():
        actual = gradients(mixed(*qkv), qkv[:2])
    torch.testing.assert_close(actual, gradients(mixed(*qkv), qkv[:2]))


def test_double_backward_through_a_function(qkv):
    def penalty(query, key, value):
        (grad,) = torch.autograd.grad(Doubled.apply(scores_of(query, key)).exp().sum(), query, create_graph=True)
        return grad.square().sum()

    assert_same_bits(penalty, qkv)
