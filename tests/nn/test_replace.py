"""Test that fastlm.replace swaps a model's modules in place, that fastlm.restore undoes it, and that both report it."""

import copy
import pickle

import pytest
import torch
from support.drop_in import assert_as_good_as_original
from torch import nn

import fastlm
from fastlm.testing import seeded_normal

PADDING = torch.arange(9)[None] >= torch.tensor([[9], [4], [1]])  # (N, S) True: padding
CAUSAL = nn.Transformer.generate_square_subsequent_mask(9)


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the fused path."""


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, **{"batch_first": True, **options})
    model = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def normals(*shape, seed=1):
    return seeded_normal(seed, shape, torch.float32)


def call_encoder(module, inputs):
    return module(inputs["src"], mask=inputs.get("mask"), src_key_padding_mask=inputs.get("padding"))


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}], ids=str)
@pytest.mark.parametrize("masks", [{}, {"padding": PADDING}, {"mask": CAUSAL}], ids=["no mask", "padding", "causal"])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_with_gradients(fused, options, masks, training):
    original = encoder(**options).train(training)
    ours = copy.deepcopy(original)
    report = fastlm.replace(ours)
    assert set(report.swapped) == {"", "layers.0", "layers.1", "layers.0.self_attn", "layers.1.self_attn"} and not report.left
    src = normals(3, 9, 16) if options.get("batch_first", True) else normals(9, 3, 16)
    assert_as_good_as_original(ours, original, call_encoder, {"src": src.requires_grad_(), **masks})
    assert fused == ["attention"] * 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("aligned", ["left", "right", "nowhere"])
def test_padded_batches_are_packed(fused, dtype, options, aligned):
    """In eval mode, torch makes nested tensors, whose padding becomes zeros. The other values are the same."""
    original = encoder(**options).eval().to(dtype)
    ours = copy.deepcopy(original)
    fastlm.replace(ours)
    padding = {"left": PADDING, "right": PADDING.flip(1), "nowhere": torch.zeros_like(PADDING)}[aligned]
    inputs = {"src": normals(3, 9, 16), "padding": padding}

    def call(module, inputs):
        return call_encoder(module, inputs).masked_fill(padding[..., None], 0)

    with torch.no_grad():
        assert_as_good_as_original(ours, original, call, inputs, dtype)
        packs = not options.get("norm_first") and aligned != "right"  # Otherwise torch makes no nested tensors.
        assert fused == ["varlen_attention" if packs else "attention"] * 2
        out = call_encoder(ours, {**inputs, "src": inputs["src"].to(dtype)})
        if packs:
            assert torch.equal(out[padding], ours.norm(torch.zeros(1, 16, dtype=dtype)).expand(int(padding.sum()), 16))
    if dtype == torch.float32:
        torch.testing.assert_close(ours(inputs["src"], src_key_padding_mask=padding)[~padding], out[~padding])


def test_nothing_is_packed_that_torch_would_not(fused):
    """Each of these makes a padded call: hooks, gradients, training, a second mask, a model without nested tensors."""
    src, plain = normals(3, 9, 16), encoder().eval()
    fastlm.replace(plain)
    plain(src, src_key_padding_mask=PADDING)  # Parameters require gradients.
    with torch.no_grad():
        plain(src, mask=-torch.inf == CAUSAL, src_key_padding_mask=PADDING)
        handle = plain.layers[1].linear1.register_forward_hook(lambda *_: None)
        plain(src, src_key_padding_mask=PADDING)
        handle.remove()
        asked = encoder(norm_first=False)
        asked.use_nested_tensor = False
        fastlm.replace(asked.eval())
        asked(src, src_key_padding_mask=PADDING)
        assert fused == ["attention"] * 8
        plain(src, src_key_padding_mask=PADDING)
        assert fused[8:] == ["varlen_attention"] * 2


def test_eval_does_not_go_past_our_attention(fused):
    """In eval mode without gradients, torch's fused layer kernel would bypass it."""
    model = encoder().eval()
    fastlm.replace(model)
    with torch.inference_mode():
        model(normals(3, 9, 16))
        model.layers[0](normals(3, 9, 16), src_key_padding_mask=PADDING)
    assert fused == ["attention"] * 3


def test_the_whole_transformer(fused):
    torch.manual_seed(0)
    original = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(original)
    assert len(fastlm.replace(ours).swapped) == 1 + 2 * 2 + 2 * 2  # The encoder; layers and attentions of both stacks.

    def call(module, inputs):
        return module(inputs["src"], inputs["tgt"], tgt_mask=CAUSAL.to(inputs["tgt"]), tgt_is_causal=True)

    inputs = {"src": normals(3, 7, 16).requires_grad_(), "tgt": normals(3, 9, 16, seed=2).requires_grad_()}
    assert_as_good_as_original(ours, original, call, inputs)
    assert len(fused) == 2 + 2 * 2


def test_restore_undoes_everything():
    model = encoder()
    before = {name: type(module) for name, module in model.named_modules()}
    parameters = list(map(id, model.parameters()))
    swapped = fastlm.replace(model)
    assert {type(m) for m in model.modules()} & {fastlm.nn.MultiheadAttention, fastlm.nn.TransformerEncoder}
    assert fastlm.replace(model).swapped == {}, "swapped twice"
    assert fastlm.restore(model).swapped.keys() == swapped.swapped.keys()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert list(map(id, model.parameters())) == parameters and model.use_nested_tensor is True
    assert fastlm.restore(model).swapped == {}


def test_the_model_itself_and_modules_that_are_shared():
    attention = nn.MultiheadAttention(8, 2)
    shared = nn.ModuleList([attention, nn.ModuleList([attention])])
    assert fastlm.replace(shared).swapped.keys() == {"0"}
    assert type(attention) is fastlm.nn.MultiheadAttention
    fastlm.restore(attention)
    assert type(attention) is nn.MultiheadAttention


def test_checkpoints_copies_and_pickles():
    model = encoder()
    ours = copy.deepcopy(model)
    fastlm.replace(ours)
    model.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(model.state_dict(), strict=True)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin.layers[0].self_attn) is fastlm.nn.MultiheadAttention
        fastlm.restore(twin)
        assert type(twin) is nn.TransformerEncoder and type(ours) is fastlm.nn.TransformerEncoder
        assert torch.equal(twin(normals(3, 9, 16)), model(normals(3, 9, 16)))


class Scaled(nn.MultiheadAttention):
    """Stand for a user's subclass."""

    def forward(self, *args, **options):
        out, weights = super().forward(*args, **options)
        return 2 * out, weights


def test_a_forward_on_the_instance_is_left_alone():
    """accelerate's hooks set one. It would hide fastlm's forward, and keep it after a restore."""
    model = encoder().eval()
    src, before = normals(3, 9, 16), type(model.layers[0].self_attn)
    for module in (model, model.layers[0], model.layers[0].self_attn):
        held = module.forward
        module.forward = lambda *args, held=held, **options: held(*args, **options)
    report = fastlm.replace(model)
    assert report.left.keys() == {"", "layers.0", "layers.0.self_attn"}
    assert all("forward was set on this module itself" in reason for reason in report.left.values())
    assert type(model.layers[0].self_attn) is before and report.swapped.keys() == {"layers.1", "layers.1.self_attn"}
    swapped = model.layers[1].self_attn
    held = swapped.forward
    swapped.forward = lambda *args, **options: held(*args, **options)
    report = fastlm.restore(model)
    assert report.swapped.keys() == {"layers.1"} and report.left.keys() == {"layers.1.self_attn"}
    assert model(src, src_key_padding_mask=PADDING).shape == src.shape
    del swapped.forward
    assert fastlm.restore(model).swapped.keys() == {"layers.1.self_attn"}


def test_accelerate_s_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model, src = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)), normals(3, 9, 16)
    expected = model(src)
    hooks.add_hook_to_module(model[0].self_attn, hooks.ModelHook())
    report = fastlm.replace(model)
    assert report.swapped.keys() == {"0"} and report.left.keys() == {"0.self_attn"}
    torch.testing.assert_close(model(src), expected)


def test_what_is_left_is_reported_and_stays():
    model = nn.ModuleDict({"own": Scaled(8, 2), "plain": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    report = fastlm.replace(model)
    assert report.swapped.keys() == {"plain"} and report.left.keys() == {"own"}
    assert type(model["own"]) is Scaled and "subclass of torch.nn" in report.left["own"]
    assert "1 swapped, 1 left" in str(report) and "own is left: " in str(report) and "plain: " in str(report)
    layers = nn.TransformerEncoderLayer(8, 2)
    layers.self_attn = Scaled(8, 2)
    report = fastlm.replace(layers)
    assert not report.swapped and report.left.keys() == {"", "self_attn"}


@pytest.mark.parametrize("function", [fastlm.replace, fastlm.restore])
def test_bad_models(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got list"):
        function([nn.MultiheadAttention(8, 2)])


def test_an_optimizer_goes_on():
    """Parameters stay the same objects, so that training goes on where it was."""
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastlm.replace(model)
    before = model.layers[0].self_attn.in_proj_weight.detach().clone()
    model(normals(3, 9, 16)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.layers[0].self_attn.in_proj_weight)
