"""Test MultiheadAttention's weights: nobody pays for them who drops them, and who reads them gets torch's."""

import itertools

import pytest
import torch
from torch import nn

import fastlm
from fastlm.testing import seeded_normal

pytestmark = pytest.mark.usefixtures("any_size")


PADDING = torch.arange(7)[None] >= torch.tensor([[7], [4], [5]])
MASK = torch.ones(7, 7).triu(1).bool()
CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": PADDING},
    "causal mask": {"attn_mask": MASK},
    "causal hint": {"attn_mask": MASK, "is_causal": True},
    "float mask": {"attn_mask": seeded_normal(3, (7, 7), torch.float32)},
    "masks of heads": {"attn_mask": seeded_normal(4, (12, 7, 7), torch.float32)},
    "both": {"key_padding_mask": PADDING, "attn_mask": MASK},
}
BUILT = {"plain": {}, "batch second": {"batch_first": False}, "no bias": {"bias": False}, "added bias": {"add_bias_kv": True},
         "zero attention": {"add_zero_attn": True}, "other keys": {"kdim": 12, "vdim": 12}}  # fmt: skip


def made(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(12, 4, **{"batch_first": True, **options})


def called(module: nn.MultiheadAttention, **options) -> tuple[torch.Tensor, torch.Tensor]:
    x = seeded_normal(1, (3, 7, 12), torch.float32)
    x = x if module.batch_first else x.transpose(0, 1)
    return module(x, x, x, **options)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_output_weights_and_gradients_are_torch_s(built, call):
    for training, average in itertools.product((True, False), repeat=2):
        module, replaced = made(**built).train(training), made(**built).train(training)
        assert fastlm.replace(replaced).swapped
        options = {**call, "average_attn_weights": average}
        expected = called(module, **options)
        with fastlm.use() as report:
            routed = called(module, **options)
        is_left = module.add_zero_attn or (module.bias_k is not None and "is_causal" in call)
        assert report.routed == (0 if is_left else 1)
        for actual, of in ((called(replaced, **options), replaced), (routed, module)):
            torch.testing.assert_close(actual, expected)
            for index in range(2):
                ours, theirs = (
                    torch.autograd.grad(out[index].square().sum(), list(m.parameters()), allow_unused=True, retain_graph=True)
                    for out, m in ((actual, of), (expected, module))
                )
                for mine, torchs in zip(ours, theirs):
                    torch.testing.assert_close(mine, torchs if mine is not None or torchs is None else None)


def test_without_a_batch():
    module, x = made(), seeded_normal(1, (7, 12), torch.float32)
    with fastlm.use() as report:
        actual = module(x, x, x)
    assert report.routed == 1
    torch.testing.assert_close(actual, module(x, x, x))


def test_weights_after_dropout_are_those_that_were_used():
    module = made(dropout=0.5).train()
    fastlm.replace(module)
    x = seeded_normal(1, (3, 7, 12), torch.float32)
    out, weights = module(x, x, x, average_attn_weights=False)
    value = torch.nn.functional.linear(x, *(p.chunk(3)[2] for p in (module.in_proj_weight, module.in_proj_bias)))
    heads = weights @ value.unflatten(-1, (4, 3)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj(heads.transpose(1, 2).flatten(-2)), out)
    assert 0.3 < (weights == 0).float().mean() < 0.7


def test_weights_that_are_dropped_are_never_computed(monkeypatch):
    module = made().eval()
    fastlm.replace(module)
    monkeypatch.setattr("fastlm.nn.handwritten.record.Record.result", None)
    called(module)
    with pytest.raises(TypeError, match="not callable"):
        called(module)[1].sum()


def test_compiled_modules_return_torch_s_weights():
    module = made().eval()
    fastlm.replace(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(called(compiled), called(made().eval()))
