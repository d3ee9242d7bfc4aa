"""Jagged tensors inside ``with fastlm.use():`` are attended within by fastlm, and give what each sequence gives by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain, seeded_normal

LENGTHS = (5, 1, 0, 9)
BOUNDS = torch.tensor([0, 5, 6, 6, 15])


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel."""


def packed(heads=(4, 4, 4), dtype=torch.float32):
    """Return leaves (tokens, H, D) of query, key and value."""
    return [seeded_normal(i, (15, h, 8), dtype).requires_grad_() for i, h in enumerate(heads)]


def jagged(leaf, bounds=BOUNDS):
    return torch.nested.nested_tensor_from_jagged(leaf, bounds).transpose(1, 2)


def of_each_sequence(leaves, **options):
    """Attend within each sequence by itself, and return the output and its gradients."""
    outs = []
    for begin, end in zip(BOUNDS, BOUNDS[1:]):
        if begin < end:
            one = (leaf[begin:end].transpose(0, 1)[None] for leaf in leaves)
            outs.append(F.scaled_dot_product_attention(*one, **options)[0].transpose(0, 1))
    out = torch.cat(outs)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}, {"enable_gqa": True}], ids=str)
def test_values_and_gradients(options, dtype):
    heads = (4, 2, 2) if "enable_gqa" in options else (4, 4, 4)
    leaves = packed(heads, dtype)
    golden, plain = of_each_sequence([leaf.double() for leaf in leaves], **options), of_each_sequence(leaves, **options)
    with fastlm.use() as report:
        out = F.scaled_dot_product_attention(*map(jagged, leaves), **options)
    assert report.routed == 1 and not report.left
    assert out.shape[2] == jagged(leaves[0]).shape[2] and out._ragged_idx == 2
    values = out.transpose(1, 2).values()
    actual = [values, *torch.autograd.grad(values.square().sum(), leaves)]
    for i, results in enumerate(zip(actual, plain, golden)):
        assert_as_good_as_plain(*results, GRADIENT_FACTOR if i else VALUE_FACTOR, f"result {i}")


def test_the_math_backend_brings_second_derivatives():
    leaves = packed()
    with fastlm.use() as report, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*map(jagged, leaves))
    assert report.routed == 0 and "math backend" in str(report)


def test_dropout_is_repeated_by_the_seed():
    tensors = list(map(jagged, packed()))
    with fastlm.use() as report:
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs.append(F.scaled_dot_product_attention(*tensors, dropout_p=0.5).values())
    assert torch.equal(*outs) and report.routed == 2


OTHER_BOUNDS = torch.tensor([0, 4, 6, 6, 15])
LEFT = {
    "float64": lambda: map(jagged, packed(dtype=torch.float64)),
    "other keys and values": lambda: [jagged(t, b) for t, b in zip(packed(), (BOUNDS, BOUNDS, OTHER_BOUNDS))],
    "a dense key": lambda: [jagged(packed()[0]), packed()[1].transpose(0, 1)[None], jagged(packed()[2])],
    "other numbers of heads": lambda: map(jagged, packed((4, 2, 2))),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_is_torch_s_errors_included(case):
    def outcome():
        try:
            return F.scaled_dot_product_attention(*LEFT[case]()).values().detach()
        except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
            return type(error)

    expected = outcome()
    with fastlm.use() as report:
        actual = outcome()
    assert actual is expected if isinstance(expected, type) else torch.equal(actual, expected)
    assert report.routed == 0 and report.left.total() == 1
