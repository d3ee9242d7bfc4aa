"""Test the calls that swapped modules and `fastlm.use` leave to torch's own code, so that they work as with torch alone."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.wrapped_tensor import Wrapped
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.testing import seeded_normal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

X, OTHER = (seeded_normal(seed, (3, 6, 16), torch.float32) for seed in (1, 2))
PADDING = torch.arange(6)[None] >= torch.tensor([[6], [3], [1]])  # (N, S), True: padding


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the fused path."""


class Model(nn.Module):
    """Hold a module of every kind that is swapped."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.layer = layer

    def forward(self, x, padding):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.layer(self.encoder(x, src_key_padding_mask=padding), src_key_padding_mask=padding)


def pair():
    torch.manual_seed(0)
    original = Model()
    ours = copy.deepcopy(original)
    assert len(fastlm.replace(ours).swapped) == 8
    return original, ours


# ---- subclasses of Tensor ---------------------------------------------------------------------------------------------------


INPUTS = ("query", "key", "value", "key_padding_mask", "attn_mask")
WEIGHTS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "bias_k", "bias_v")
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@pytest.mark.parametrize("which", [*INPUTS, *WEIGHTS, *SEPARATE])
def test_a_wrapper_in_any_place(which):
    """All tensors of a call count, also those that torch cannot see by __torch_function__."""
    torch.manual_seed(0)
    widths = {"kdim": 8, "vdim": 4} if which in SEPARATE else {}
    original = nn.MultiheadAttention(16, 4, add_bias_kv=which in ("bias_k", "bias_v"), **widths).eval()
    call = {"query": X, "key": OTHER[..., : widths.get("kdim", 16)], "value": OTHER[..., : widths.get("vdim", 16)]}
    call |= {"key_padding_mask": torch.zeros(6, 3), "attn_mask": torch.zeros(3, 3)}  # torch does nothing to them first.
    with torch.no_grad():
        expected = original(**call, need_weights=False)[0]
        if which in call:
            call[which] = Wrapped(call[which])
        else:
            owner, _, name = which.rpartition(".")
            owner = original.get_submodule(owner)
            weight = Wrapped(getattr(owner, name).detach())
            delattr(owner, name)
            setattr(owner, name, weight)
        ours = copy.copy(original)
        assert fastlm.replace(ours).swapped
        torch.testing.assert_close(ours(**call, need_weights=False)[0], expected)
        with fastlm.use() as report:
            torch.testing.assert_close(original(**call, need_weights=False)[0], expected)
        assert list(report.left) == ["a subclass of Tensor"] and not report.routed


@pytest.mark.parametrize("which", range(4))
def test_a_wrapper_in_any_place_of_sdpa(which):
    call = [X[:, None], OTHER[:, None], OTHER[:, None], torch.ones(6, 6).tril().bool()]
    expected = F.scaled_dot_product_attention(*call)
    call[which] = Wrapped(call[which])
    with fastlm.use() as report:
        torch.testing.assert_close(F.scaled_dot_product_attention(*call), expected)
        torch.testing.assert_close(F.scaled_dot_product_attention(*call[:3], attn_mask=call[3]), expected)
    assert report.left == {"a subclass of Tensor": 2} and not report.routed


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("which", ["src", "padding"])
def test_a_wrapper_in_an_encoder(which, grad):
    original, ours = (model.encoder.eval() for model in pair())
    src, padding = Wrapped(X) if which == "src" else X, Wrapped(PADDING) if which == "padding" else PADDING
    with torch.set_grad_enabled(grad):
        expected = original(src, src_key_padding_mask=padding)
        torch.testing.assert_close(ours(src, src_key_padding_mask=padding), expected)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Make a device mesh of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    path = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_dtensors_are_not_left(mesh, masked, training):
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    original, ours = (model.train(training) for model in pair())
    x = distribute_tensor(X, mesh, [Replicate()])
    padding = distribute_tensor(PADDING, mesh, [Replicate()]) if masked else None
    for model in (original, ours):
        distribute_module(model, mesh)
    results = []
    for model, inside in ((original, nullcontext()), (ours, nullcontext()), (original, fastlm.use())):
        with inside as report:
            outs = [model.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]]
            outs += [model.layer(x, src_key_padding_mask=padding)]
            if training or not masked:  # Otherwise torch asks DTensors where padding is, which they cannot tell.
                outs += [model.encoder(x, src_key_padding_mask=padding)]
        assert all(isinstance(out, DTensor) for out in outs) and (report is None or report.routed)
        results.append([out.full_tensor() for out in outs])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_fake_tensors_are_plain():
    """torch.compile and torch.export run modules on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), fastlm.use() as report:
        q = torch.empty(2, 4, 6, 8)
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
        attention, x = fastlm.nn.MultiheadAttention(16, 4, batch_first=True), torch.empty(3, 6, 16)
        assert attention(x, x, x, need_weights=False)[0].shape == x.shape
    assert report.routed == 1


# ---- tools that look into modules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_fastlm_s_op(strict):
    original, ours = (model.eval() for model in pair())
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "padding": {0: batch}}
    program = torch.export.export(ours, (X, PADDING), dynamic_shapes=shapes, strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    assert sum(node.target is torch.ops.fastlm.attention.default for graph in graphs for node in graph.nodes) == 4
    with torch.no_grad():
        out, expected = (model(OTHER[:2], PADDING[:2])[~PADDING[:2]] for model in (program.module(), original))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mask_check", [True, False])
def test_compiles_whole(grad, mask_check):
    """Under torch.compile, torch makes no nested tensors with mask_check, and without it cannot be compiled."""
    original, ours = (model.eval() for model in pair())
    ours.encoder.mask_check = original.encoder.mask_check = mask_check
    with torch.set_grad_enabled(grad):
        torch._dynamo.reset()
        out = torch.compile(ours, backend="aot_eager", fullgraph=True)(X, PADDING)
        if mask_check:
            torch._dynamo.reset()
            expected = torch.compile(original, backend="aot_eager", fullgraph=True)(X, PADDING)
        else:
            expected = original(X, PADDING)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_makes_a_node_of_each(training):
    """The same happens to torch's modules, whose classes lie in torch.nn."""
    original, ours = (model.train(training) for model in pair())
    nodes = []
    for model in (original, ours):
        graph = torch.fx.symbolic_trace(model)
        nodes.append([(node.op, node.target) for node in graph.graph.nodes])
        with torch.no_grad():
            torch.testing.assert_close(graph(OTHER, PADDING), original(OTHER, PADDING))
    assert nodes[0] == nodes[1] and ("call_module", "encoder") in nodes[1]
    assert type(graph.attention) is fastlm.nn.MultiheadAttention


@pytest.mark.parametrize("training", [True, False])
def test_script(training):
    original, ours = (model.train(training) for model in pair())
    scripted = torch.jit.script(ours)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(scripted(OTHER, PADDING), original(OTHER, PADDING))
    assert type(ours.attention) is fastlm.nn.MultiheadAttention
    for module in (ours.attention, ours.layer, ours.encoder):
        torch.jit.script(module)


@pytest.mark.parametrize("training", [True, False])
def test_trace(training):
    """The trace records every call, and none as a constant."""
    original, ours = (model.train(training) for model in pair())
    traced = torch.jit.trace(ours, (X, PADDING), check_trace=False)
    torch.testing.assert_close(traced(OTHER, PADDING), original(OTHER, PADDING))
    q, k = X[:, None], OTHER[:, None]
    with fastlm.use():
        traced = torch.jit.trace(lambda q, k: F.scaled_dot_product_attention(q, k, k), (q, k), check_trace=False)
    torch.testing.assert_close(traced(k, q), F.scaled_dot_product_attention(k, q, q))


# ---- derivatives ------------------------------------------------------------------------------------------------------------


def second_derivative(function, x):
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def test_the_math_backend_brings_second_derivatives():
    """Users of torch ask for second derivatives by choosing that backend."""
    x = X.clone().requires_grad_()
    original, ours = (model.attention for model in pair())
    q = X[:, None].clone().requires_grad_()

    def attend(q):
        return F.scaled_dot_product_attention(q, q, q)

    def project(module):
        return lambda x: module(x, x, x, need_weights=False)[0]

    with sdpa_kernel(SDPBackend.MATH):
        expected = [second_derivative(attend, q), second_derivative(project(original), x)]
        with fastlm.use() as report:
            inside = [second_derivative(attend, q), second_derivative(project(original), x)]
            torch.testing.assert_close(inside, expected)
        torch.testing.assert_close(second_derivative(project(ours), x), expected[1])
    assert report.routed == 0 and report.left.total() == 2 and "math backend" in str(report)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]), fastlm.use() as report:
        attend(q)
    assert report.routed == 1


def test_the_math_backend_in_compiled_code():
    q = X[:, None]

    def attend(q):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, q, q)

    torch._dynamo.reset()
    with fastlm.use():
        torch.testing.assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(q), attend(q))


@pytest.mark.parametrize("how", ["forward_ad", "func.jvp"])
@pytest.mark.parametrize("what", ["module", "module inside use", "function inside use"])
def test_forward_mode_is_right_or_raises(what, how):
    original, ours = (model.attention.double() for model in pair())
    x, tangent = X.double(), OTHER.double()

    def attend(module, x):
        if module is None:
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return module(x, x, x, need_weights=False)[0]

    plain = None if what == "function inside use" else original
    step = 1e-6
    expected = (attend(plain, x + step * tangent) - attend(plain, x - step * tangent)) / (2 * step)
    ours, x, tangent = ours.float(), x.float(), tangent.float()
    module = {"module": ours, "module inside use": original.float(), "function inside use": None}[what]
    try:
        with fastlm.use() if "use" in what else nullcontext():
            if how == "func.jvp":
                _, got = torch.func.jvp(lambda x: attend(module, x), (x,), (tangent,))
            else:
                with torch.autograd.forward_ad.dual_level():
                    dual = torch.autograd.forward_ad.make_dual(x, tangent)
                    got = torch.autograd.forward_ad.unpack_dual(attend(module, dual)).tangent
    except NotImplementedError:
        return
    assert got is not None
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
