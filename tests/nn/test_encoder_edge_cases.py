"""Test torch.nn.TransformerEncoder after `fastlm.replace` in its special cases: odd padding, half in training, hooks, empty."""

import copy

import pytest
import torch
from support.drop_in import assert_as_good_as_original
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.testing import seeded_normal

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")

AT_END = torch.arange(6)[None] >= torch.tensor([[6], [3], [1]])  # (N, S), True: padding
SRC = seeded_normal(1, (3, 6, 16), torch.float32)


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the fused path."""


def pair(layers=2, dropout=0.0, heads=4, activation="relu", norm_first=False, batch_first=True, **options):
    """Make torch's encoder in eval mode, and ours with the same numbers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, heads, 32, dropout=dropout, activation=activation, norm_first=norm_first, batch_first=batch_first
    )
    original = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(16), **options).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(original)
    assert fastlm.replace(ours).swapped
    return original, ours


def compare(original, ours, padding, src=SRC, dtype=torch.float32, **options):
    def call(module, inputs):
        return module(inputs["src"], src_key_padding_mask=padding, **options)

    assert_as_good_as_original(ours, original, call, {"src": src}, dtype)


# ---- padding ----------------------------------------------------------------------------------------------------------------

PADDINGS = {
    "at the end": (AT_END, True),
    "at the start": (AT_END.flip(1), False),
    "with gaps": (torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1], [0] * 6]).bool(), False),
    "none": (torch.zeros_like(AT_END), True),
    "a whole sequence": (AT_END | torch.tensor([[False], [False], [True]]), True),
    "-inf": (torch.zeros(3, 6).masked_fill(AT_END, -torch.inf), True),
    "-inf at the start": (torch.zeros(3, 6).masked_fill(AT_END.flip(1), -torch.inf), False),
    "a finite number": (torch.zeros(3, 6).masked_fill(AT_END, -1.5), True),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_values_at_padding_are_torch_s(fused, padding):
    """torch computes values at padding, unless it is at the end: then torch makes a nested tensor, and zeros at padding."""
    mask, packs = PADDINGS[padding]
    original, ours = pair()
    with torch.no_grad():
        compare(original, ours, mask)
    assert fused == ["varlen_attention" if packs else "attention"] * 2


@pytest.mark.parametrize("mask_check", [True, False])
@pytest.mark.parametrize("padding", ["at the end", "at the start"])
def test_mask_check(fused, mask_check, padding):
    """Without mask_check, torch treats padding anywhere as the same amount of padding at the end."""
    original, ours = pair(mask_check=mask_check)
    with torch.no_grad():
        compare(original, ours, PADDINGS[padding][0])
    assert fused == ["attention" if mask_check and padding == "at the start" else "varlen_attention"] * 2


def _flag(name, value):
    def change(model):
        setattr(model, name, value)

    return change


NOT_NESTED = {
    "enable_nested_tensor": ({"enable_nested_tensor": False}, None),
    "use_nested_tensor": ({}, _flag("use_nested_tensor", False)),
    "norm_first": ({"norm_first": True}, None),
    "an odd number of heads": ({"heads": 1}, None),
    "another activation": ({"activation": nn.functional.silu}, None),
}


@pytest.mark.parametrize("what", NOT_NESTED)
def test_what_keeps_torch_from_nesting_keeps_ours_from_packing(fused, what):
    options, change = NOT_NESTED[what]
    original, ours = pair(**options)
    for model in (original, ours):
        if change is not None:
            change(model)
    with torch.no_grad():
        compare(original, ours, AT_END)
    assert fused == ["attention"] * 2


def test_circumstances_that_keep_torch_from_nesting(fused):
    original, ours = pair()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            compare(original, ours, AT_END)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad(), torch.device("cpu"):  # This mode intercepts every function.
        compare(original, ours, AT_END)
    compare(original, ours, AT_END)  # Parameters require gradients.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # torch's own raises here; elsewhere it does not nest.
        out = ours(SRC, src_key_padding_mask=AT_END)
    assert out.isfinite().all() and (out[AT_END] != 0).any()
    assert fused == ["attention"] * 8


def test_a_mask_besides(fused):
    original, ours = pair()
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.no_grad():
        compare(original, ours, torch.zeros(3, 6).masked_fill(AT_END, -torch.inf), mask=causal)
    assert fused == ["attention"] * 2


def test_layers_count_and_not_the_encoder(fused):
    """torch asks the first layer, not the encoder, whether it trains."""
    for model in (modules := pair()):
        model.train()
        model.layers.eval()
    with torch.no_grad():
        compare(*modules, AT_END)
    assert fused == ["varlen_attention"] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_zeros_where_torch_nests_and_nothing_is_packed(fused, dtype):
    """A hook on a layer prevents packing, and so does a dtype that no kernel takes."""
    original, ours = (model.to(dtype) for model in pair())
    for model in (original, ours):
        model.layers[1].linear1.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        compare(original, ours, AT_END, dtype=dtype)
    assert fused == ([] if dtype == torch.float64 else ["attention"] * 2)


# ---- modules whose effect packing must not skip -----------------------------------------------------------------------------


def _train(path):
    return lambda model: model.get_submodule(path).train()


NOT_AT_REST = {path: _train(path) for path in ("layers.0.self_attn", "layers.1.self_attn", "layers.1", "layers.1.dropout1")}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", NOT_AT_REST)
def test_any_module_that_trains_drops(what, grad):
    """Dropout may stay on in eval mode (MC dropout), in a whole layer or in one of its modules."""
    _, ours = pair(dropout=0.5)
    NOT_AT_REST[what](ours)
    with torch.set_grad_enabled(grad):
        first, second = (ours(SRC, src_key_padding_mask=AT_END) for _ in range(2))
    assert not torch.equal(first[~AT_END], second[~AT_END])


def test_layers_alone_in_training(fused):
    original, ours = pair()
    for model in (original, ours):
        model.layers.train()
    with torch.no_grad():
        compare(original, ours, AT_END)  # torch computes values for padding here.
    assert fused == ["attention"] * 2


def _watch(path):
    def change(model, seen):
        module = model.get_submodule(path)
        held = module.forward
        module.forward = lambda *args, **options: (seen.append(path), held(*args, **options))[1]

    return change


@pytest.mark.parametrize("path", ["layers.0", "layers.1.self_attn", "layers.1.linear2"])
def test_a_forward_of_its_own_is_called(path):
    _, ours = pair()
    seen = []
    _watch(path)(ours, seen)
    with torch.no_grad():
        ours(SRC, src_key_padding_mask=AT_END)
    assert seen == [path]


def test_hooks_of_all_modules_see_them_all():
    _, ours = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            ours(SRC, src_key_padding_mask=AT_END)
    finally:
        handle.remove()
    assert {ours.layers[0], ours.layers[1].self_attn, ours.layers[1].linear2} <= set(seen)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_keys_that_an_attention_adds_are_attended_to(fused, options):
    _, ours = pair()
    ours.layers[1].self_attn = fastlm.nn.MultiheadAttention(16, 4, batch_first=True, **options).eval()
    with torch.no_grad():
        out = ours(SRC, src_key_padding_mask=AT_END)
        alone = [ours(row[~pad][None], src_key_padding_mask=None)[0] for row, pad in zip(SRC, AT_END)]
    torch.testing.assert_close(out[~AT_END], torch.cat(alone))
    assert set(fused) == {"attention"}


def test_the_math_backend_alone(fused):
    original, ours = pair()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        compare(original, ours, AT_END)
    assert not fused


# ---- empty inputs -----------------------------------------------------------------------------------------------------------


def _empty_calls(batch, length):
    """Yield (module, arguments, options) for nn.Transformer's modules, with a source of that size and a target of four rows."""
    src, tgt = torch.zeros(batch, length, 16), torch.ones(batch, 4, 16)
    padding, mask = torch.zeros(batch, length, dtype=torch.bool), torch.zeros(length, length, dtype=torch.bool)
    for path in ("encoder", "encoder.layers.0"):
        yield from [(path, (src,), {}), (path, (src, mask), {}), (path, (src,), {"src_key_padding_mask": padding})]
    for path in ("decoder", "decoder.layers.0"):
        yield from [(path, (tgt, src), {}), (path, (tgt, src), {"memory_key_padding_mask": padding})]
    yield from [("", (src, tgt), {}), ("", (src, tgt), {"src_key_padding_mask": padding})]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 0)], ids=str)
def test_empty_batches_and_sequences(shape, training, grad):
    """If torch answers, ours gives its answer. On empty padding, torch's own mostly fails, and ours does not."""
    torch.manual_seed(0)
    original = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True).train(training)
    ours = copy.deepcopy(original)
    fastlm.replace(ours)
    for path, args, options in _empty_calls(*shape):
        with torch.set_grad_enabled(grad):
            out = ours.get_submodule(path)(*args, **options)
            try:
                expected = original.get_submodule(path)(*args, **options)
            except (RuntimeError, IndexError):
                assert options and out.shape == (args[-1] if path == "" else args[0]).shape and out.isfinite().all()
                continue
            torch.testing.assert_close(out, expected)
            if not options:
                with fastlm.use() as report:
                    torch.testing.assert_close(original.get_submodule(path)(*args), expected)
                assert report.routed and not report.left
        if grad:
            out.sum().backward()


def test_batches_of_padding_alone():
    original, ours = pair()
    with torch.no_grad():
        compare(original, ours, torch.zeros(3, 6, dtype=torch.bool))
        out = ours(SRC, src_key_padding_mask=torch.ones(3, 6, dtype=torch.bool))
    assert torch.equal(out, ours.norm(torch.zeros(3, 6, 16)))


BAD = {
    "padding of another batch": {"src_key_padding_mask": AT_END[:2]},
    "padding of another length": {"src_key_padding_mask": AT_END[:, :4]},
    "integer padding": {"src_key_padding_mask": AT_END.long()},
    "integer mask": {"mask": torch.zeros(6, 6, dtype=torch.long)},
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", BAD)
def test_bad_masks_raise_what_torch_raises(what, grad):
    raised = []
    for model in pair():
        with torch.set_grad_enabled(grad), pytest.raises((AssertionError, RuntimeError)) as error:
            model(SRC, **BAD[what])
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]
