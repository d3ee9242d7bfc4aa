"""Test fastlm.nn.Linear: torch's layer with another product, alone and after `fastlm.replace`."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlm
from fastlm.ops import linear as op
from fastlm.testing import seeded_normal

LARGE = 1024, 600  # as many weights as the kernel is faster with


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernels."""
    if not op.gains(torch.empty(LARGE)):
        pytest.skip("the kernel is never faster on this machine")


@pytest.fixture
def products(monkeypatch):
    """Count the kernel's products."""
    counted, forward = [], op.cpu.native.C.linear
    monkeypatch.setattr(op.cpu.native, "C", _Counting(op.cpu.native.C, lambda *args: counted.append(args) or forward(*args)))
    return counted


class _Counting:
    def __init__(self, module, linear):
        self._module, self.linear = module, linear

    def __getattr__(self, name):
        return getattr(self._module, name)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(600, 1024), nn.GELU(), nn.Linear(1024, 600, bias=False), nn.Linear(600, 3))


def x(rows: int = 3) -> torch.Tensor:
    return seeded_normal(1, (rows, 600), torch.float32)


def test_replace_swaps_what_can_gain_and_restore_undoes_it(products):
    ours, torchs = model(), model()
    before = list(ours.parameters())
    report = fastlm.replace(ours)
    assert list(report.swapped) == ["0", "2"] and not report.left and type(ours[3]) is nn.Linear
    assert "torch.nn.modules.linear.Linear -> fastlm.nn.linear.Linear" in str(report)
    assert all(a is b for a, b in zip(before, ours.parameters(), strict=True)) and not fastlm.replace(ours).swapped
    with torch.no_grad():
        torch.testing.assert_close(ours(x()), torchs(x()))
    assert len(products) == 2
    assert list(fastlm.restore(ours).swapped) == ["0", "2"] and type(ours[0]) is nn.Linear


def test_a_training_step_is_torchs(products):
    ours, torchs = model(), model()
    fastlm.replace(ours)
    for each in (ours, torchs):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        each(x()).square().sum().backward()
        optimizer.step()
    assert products
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_tied_weights_stay_tied():
    tied = nn.ModuleDict({"embed": nn.Embedding(1024, 600), "head": nn.Linear(600, 1024, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert list(fastlm.replace(tied).swapped) == ["head"] and tied["head"].weight is tied["embed"].weight


def test_hooks_state_dict_copies_and_pickles_go_on():
    ours, torchs, seen = model(), model(), []
    ours[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fastlm.replace(ours)
    ours(x())
    assert seen == [(3, 1024)]
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    ours[0]._forward_hooks.clear()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(copied[0]) is fastlm.nn.Linear and torch.equal(copied(x()), ours(x()))


def test_fx_script_trace_and_compile_treat_it_as_torchs():
    ours, torchs = model(), model()
    fastlm.replace(ours)
    with torch.no_grad():
        expected = torchs(x())
        graph = torch.fx.symbolic_trace(ours)
        assert [node.op for node in graph.graph.nodes][1:-1] == ["call_module"] * 4
        for made in (graph, torch.jit.script(ours), torch.jit.trace(ours, x()), torch.compile(ours, fullgraph=True)):
            torch.testing.assert_close(made(x()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_the_kernel_does_not_have_are_left(dtype):
    assert not fastlm.replace(nn.Linear(600, 1024, dtype=dtype)).swapped


def test_a_subclass_is_left_and_reported():
    class Mine(nn.Linear):
        pass

    assert "is a subclass of torch.nn" in fastlm.replace(nn.Sequential(Mine(600, 1024))).left["0"]


def test_many_alike_are_one_line_of_the_report():
    report = fastlm.replace(nn.Sequential(*(nn.Linear(600, 1024) for _ in range(5))))
    assert len(report.swapped) == 5 and len(str(report).splitlines()) == 2 and "0 and 4 others: " in str(report)


def test_multihead_attention_uses_it_inside(products):
    attention = fastlm.nn.MultiheadAttention(768, 12, batch_first=True).eval()
    hidden = seeded_normal(1, (1, 3, 768), torch.float32)
    with torch.no_grad():
        attention(hidden, hidden, hidden, need_weights=False)
    assert len(products) == 2
