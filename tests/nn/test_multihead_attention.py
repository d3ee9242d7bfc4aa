"""Test that fastlm.nn.MultiheadAttention has the arguments, state, answers and errors of torch.nn.MultiheadAttention."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.drop_in import assert_as_good_as_original
from torch.testing._internal.common_modules import module_db

import fastlm
from fastlm.nn import multi_head_call
from fastlm.testing import seeded_normal

TORCHS, OURS = torch.nn.MultiheadAttention, fastlm.nn.MultiheadAttention
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, because these tests are about the fused path."""


@pytest.fixture
def fused(monkeypatch):
    """Return a list that grows with every call of the fused attention."""
    calls = []

    def attention(*args, **options):
        calls.append(options)
        return fastlm.attention(*args, **options)

    monkeypatch.setattr(multi_head_call, "attention", attention)
    return calls


def normals(*shape, seed=1):
    return seeded_normal(seed, shape, torch.float32).requires_grad_()


def pair(*args, dtype=torch.float32, **options):
    """Make torch's module, and ours with the same numbers."""
    torch.manual_seed(0)
    original = TORCHS(*args, **options).to(dtype)
    for parameter in original.parameters():  # torch initializes some to zero.
        torch.nn.init.normal_(parameter, std=0.3)
    ours = OURS(*args, **options).to(dtype)
    ours.load_state_dict(original.state_dict(), strict=True)
    return original, ours


def attend(module, inputs):
    """Run the module's fused path on ``inputs`` by name. A missing key is query, and a missing value is key."""
    query = inputs["query"]
    key = inputs.get("key", query)
    rest = {name: value for name, value in inputs.items() if name not in ("query", "key", "value")}
    return module(query, key, inputs.get("value", key), need_weights=False, **rest)[0]


def compare(modules, inputs: dict, dtype=torch.float32, training=False, **options):
    """Hold ours to torch's results."""
    original, ours = (module.train(training) for module in modules)
    assert_as_good_as_original(ours, original, attend, {**inputs, **options}, dtype)


def causal_mask(length):
    return torch.nn.Transformer.generate_square_subsequent_mask(length)


# (N, L, S) = (3, 5, 7), E = 12, 4 heads; batch first
INPUTS = {
    "self-attention": {"query": normals(3, 7, 12)},
    "encoder-decoder": {"query": normals(3, 5, 12), "key": normals(3, 7, 12, seed=2)},
    "three inputs": {"query": normals(3, 5, 12), "key": normals(3, 7, 12, seed=2), "value": normals(3, 7, 12, seed=3)},
}
PADDING = torch.arange(7)[None] >= torch.tensor([[7], [4], [1]])  # (N, S), True: padding
MASK = {rows: seeded_normal(7, (rows, 7), torch.float32) > 0.8 for rows in (5, 7)}
MASKS = {
    "none": lambda rows: {},
    "padding": lambda rows: {"key_padding_mask": PADDING},
    "float padding": lambda rows: {"key_padding_mask": torch.zeros(3, 7).masked_fill(PADDING, -torch.inf)},
    "mask": lambda rows: {"attn_mask": MASK[rows]},
    "mask and padding": lambda rows: {"attn_mask": MASK[rows], "key_padding_mask": PADDING},
    "both floating": lambda rows: {
        "attn_mask": seeded_normal(5, (rows, 7), torch.float32),
        "key_padding_mask": seeded_normal(6, (3, 7), torch.float32),
    },
    "mask of each head": lambda rows: {"attn_mask": seeded_normal(8, (12, rows, 7), torch.float32)},
    "mask of each head and padding": lambda rows: {
        "attn_mask": seeded_normal(8, (12, rows, 7), torch.float32) > 1,
        "key_padding_mask": PADDING,
    },
}
BUILT = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("built", BUILT)
def test_values_and_gradients(fused, built, inputs, masks):
    rows = INPUTS[inputs]["query"].shape[1]
    compare(pair(12, 4, batch_first=True, **BUILT[built]), INPUTS[inputs], **MASKS[masks](rows))
    assert len(fused) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masks", ["none", "padding", "mask and padding"])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision(fused, dtype, masks, training):
    compare(pair(12, 4, batch_first=True, dtype=dtype), INPUTS["self-attention"], dtype, training, **MASKS[masks](7))
    assert len(fused) == 1


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
def test_layouts(fused, batch_first, inputs):
    """Inputs may have rows before batches, contiguous or not; outputs are contiguous if torch's are."""
    turned = {n: t if batch_first else t.detach().transpose(0, 1).requires_grad_() for n, t in INPUTS[inputs].items()}
    compare(pair(12, 4, batch_first=batch_first), turned)
    assert len(fused) == 1
    original, ours = pair(12, 4, batch_first=batch_first)
    query, key = (torch.randn(6, 6, 12) for _ in range(2))
    theirs, mine = (module(query, key, key, need_weights=False)[0] for module in (original, ours))
    assert mine.is_contiguous() or not theirs.is_contiguous()


@pytest.mark.parametrize("masks", [{}, {"key_padding_mask": PADDING[1]}, {"attn_mask": MASK[5]}])
def test_unbatched(fused, masks):
    compare(pair(12, 4), {"query": normals(5, 12), "key": normals(7, 12, seed=2)}, **masks)
    three = normals(4, 5, 7, seed=4).detach()
    compare(pair(12, 4), {"query": normals(5, 12), "key": normals(7, 12, seed=2)}, attn_mask=three)
    assert len(fused) == 2


def test_keys_and_values_of_other_widths(fused):
    inputs = {"query": normals(3, 5, 12), "key": normals(3, 7, 10, seed=2), "value": normals(3, 7, 6, seed=3)}
    compare(pair(12, 4, kdim=10, vdim=6, batch_first=True), inputs)
    compare(pair(12, 4, kdim=10, vdim=6, batch_first=True, bias=False), inputs)
    assert len(fused) == 2


def test_causal(fused):
    """The hint replaces the mask where it does so in torch; with padding, the mask counts."""
    inputs = INPUTS["self-attention"]
    compare(pair(12, 4, batch_first=True), inputs, attn_mask=causal_mask(7), is_causal=True)
    assert fused[-1]["causal"] and fused[-1]["mask"] is None
    for built in ("bias_kv", "zero_attn"):  # torch's hint hides the key that they add; its mask does not.
        compare(pair(12, 4, batch_first=True, **BUILT[built]), inputs, attn_mask=causal_mask(7), is_causal=True)
    assert len(fused) == 1
    padding = torch.zeros(3, 7).masked_fill(PADDING, -torch.inf)
    compare(pair(12, 4, batch_first=True), inputs, attn_mask=causal_mask(7), is_causal=True, key_padding_mask=padding)
    assert not fused[-1]["causal"] and fused[-1]["mask"] is not None


def test_dropout():
    """Weights are dropped only in training, by torch's seed, and about as many as asked for."""
    _, ours = pair(12, 4, batch_first=True, dropout=0.4)
    x = torch.randn(2, 9, 12)
    ours.eval()
    still = ours(x, x, x, need_weights=False)[0]
    assert torch.equal(still, ours(x, x, x, need_weights=False)[0])
    ours.train()
    torch.manual_seed(3)
    first = ours(x, x, x, need_weights=False)[0]
    assert not torch.equal(first, ours(x, x, x, need_weights=False)[0]) and not torch.equal(first, still)
    torch.manual_seed(3)
    assert torch.equal(first, ours(x, x, x, need_weights=False)[0])
    # With values of 1 and no biases, an output is the sum of the kept weights, divided by 1 - p: 1 on average.
    ones = OURS(64, 1, dropout=0.4, bias=False, batch_first=True)
    with torch.no_grad():
        ones.in_proj_weight.zero_()
        ones.in_proj_weight[128:].fill_(1 / 64)
        ones.out_proj.weight.copy_(torch.eye(64))
    x = torch.ones(8, 256, 64)
    kept = ones(x, x, x, need_weights=False)[0][..., 0]  # 2048 sums of 256 equal weights.
    deviation = (0.4 / 0.6 / 256) ** 0.5
    assert abs(kept.mean().item() - 1) < 5 * deviation / 2048**0.5
    assert abs(kept.std().item() / deviation - 1) < 0.1


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("built", BUILT)
def test_weights_are_torch_s(fused, average, training, built):
    original, ours = pair(12, 4, batch_first=True, **BUILT[built])
    x = torch.randn(3, 7, 12)
    calls = [m.train(training)(x, x, x, key_padding_mask=PADDING, average_attn_weights=average) for m in (original, ours)]
    for theirs, mine in zip(*calls, strict=True):
        assert torch.equal(theirs, mine)
    assert not fused


EMPTY = list(itertools.product((0, 2), (0, 3), (0, 5)))[:-1]  # (N, L, S)


@pytest.mark.parametrize("masks", ["none", "padding", "mask", "mask of each head", "both"])
@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batches_and_sequences(built, batch_first, masks):
    """Ours has torch's shapes, numbers and gradients. torch's reshape fails on empty masks; ours does not."""
    original, ours = pair(12, 4, batch_first=batch_first, **BUILT[built])
    for n, rows, keys in EMPTY:
        query, key = (torch.ones(n, r, 12) if batch_first else torch.ones(r, n, 12) for r in (rows, keys))
        options = {"need_weights": False}
        if masks in ("padding", "both"):
            options["key_padding_mask"] = torch.zeros(n, keys, dtype=torch.bool)
        if masks in ("mask", "both"):
            options["attn_mask"] = torch.zeros(rows, keys, dtype=torch.bool)
        if masks == "mask of each head":
            options["attn_mask"] = torch.zeros(4 * n, rows, keys)
        inputs = [(query, key, key)] if rows != keys else [(query, key, key), (query, query, query)]
        for args, training, grad in itertools.product(inputs, (True, False), (True, False)):
            with torch.set_grad_enabled(grad):
                out = ours.train(training)(*args, **options)[0]
                with fastlm.use() as report:
                    used = original.train(training)(*args, **options)[0]
                assert report.routed == 1
                try:
                    expected = original(*args, **options)[0]
                except RuntimeError as error:
                    assert masks != "none" and "cannot reshape tensor of 0 elements" in str(error)
                    assert out.shape == used.shape == query.shape and out.isfinite().all()
                    continue
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(used, expected)
            if grad:
                parameters = [[p for p in m.parameters()] for m in (ours, original)]
                sums = zip((out, expected), parameters)
                ours_s, theirs = (torch.autograd.grad(o.sum(), p, allow_unused=True, materialize_grads=True) for o, p in sums)
                torch.testing.assert_close(ours_s, theirs)


def test_an_empty_sequence_without_a_batch():
    original, ours = pair(12, 4)
    for rows, keys in ((0, 5), (3, 0), (0, 0)):
        args = torch.ones(rows, 12), torch.ones(keys, 12), torch.ones(keys, 12)
        torch.testing.assert_close(*(m(*args, need_weights=False)[0] for m in (ours, original)))


def test_rows_that_see_no_key_are_zeros():
    _, ours = pair(12, 4, batch_first=True)
    x = torch.randn(3, 7, 12)
    padding = PADDING.clone()
    padding[1] = True
    with torch.no_grad():
        out = ours(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    assert torch.equal(out[1], ours.out_proj.bias.expand(7, 12)) and out.isfinite().all()


def test_what_no_kernel_takes_is_torch_s(fused):
    """torch's own code runs for float64 and for nested tensors."""
    original, ours = pair(12, 4, batch_first=True)
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    original.double()
    assert torch.equal(original(x, x, x, need_weights=False)[0], ours.double()(x, x, x, need_weights=False)[0])
    ours.float().eval()
    rows = [torch.randn(4, 12), torch.randn(6, 12)]
    nested = torch.nested.nested_tensor(rows, layout=torch.strided)
    with torch.no_grad():
        out = ours(nested, nested, nested, need_weights=False)[0]
        alone = [ours(r, r, r)[0] for r in rows]
    for one, other in zip(out.unbind(), alone, strict=True):
        torch.testing.assert_close(one, other)
    assert not fused


def test_signatures_and_state():
    for method in ("__init__", "forward"):
        ours, torchs = (list(inspect.signature(getattr(c, method)).parameters.values()) for c in (OURS, TORCHS))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in torchs]
    for options in ({}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 3, "vdim": 5}):
        torch.manual_seed(0)
        theirs = TORCHS(12, 4, **options)
        torch.manual_seed(0)
        ours = OURS(12, 4, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours._reset_parameters()
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert type(again) is OURS and torch.equal(again.k_proj_weight, ours.k_proj_weight)


x3, x2 = torch.randn(4, 4, 4), torch.randn(4, 4)
BAD = {
    "2-D key": ((x3, x2, x3), {}),
    "2-D value": ((x3, x3, x2), {}),
    "3-D key of a 2-D query": ((x2, x3, x2), {}),
    "1-D padding mask": ((x3, x3, x3), {"key_padding_mask": torch.zeros(4, dtype=torch.bool)}),
    "2-D padding mask of a 2-D query": ((x2, x2, x2), {"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)}),
    "1-D mask": ((x3, x3, x3), {"attn_mask": torch.zeros(4, dtype=torch.bool)}),
    "mask of other lengths": ((x3, x3, x3), {"attn_mask": torch.zeros(5, 4, dtype=torch.bool)}),
    "mask of other heads": ((x2, x2, x2), {"attn_mask": torch.zeros(5, 4, 4, dtype=torch.bool)}),
    "padding mask of another length": ((x3, x3, x3), {"key_padding_mask": torch.zeros(4, 5, dtype=torch.bool)}),
    "integer mask": ((x3, x3, x3), {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}),
    "wrong width": ((torch.randn(4, 4, 5),) * 3, {}),
    "value longer than key": ((x3, x3, torch.randn(5, 4, 4)), {}),
    "another batch": ((x3, torch.randn(4, 3, 4), torch.randn(4, 3, 4)), {}),
    "another dtype": ((x3.double(),) * 3, {}),
    "causal without a mask": ((x3, x3, x3), {"is_causal": True}),
    "a mask of another floating dtype": ((x3, x3, x3), {"attn_mask": torch.zeros(4, 4, dtype=torch.float64)}),
    "a padding mask of another floating dtype": ((x3, x3, x3), {"key_padding_mask": torch.zeros(4, 4, dtype=torch.float16)}),
    "keys of another dtype": ((x3, x3.bfloat16(), x3.bfloat16()), {}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_what_torch_raises(what):
    args, options = BAD[what]
    messages = []
    for module in (TORCHS(4, 4), OURS(4, 4)):
        with pytest.raises((AssertionError, RuntimeError)) as error:
            module(*args, need_weights=False, **options)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


def test_masks_of_two_kinds_warn_as_torch_s(fused):
    original, ours = pair(12, 4, batch_first=True)
    x = torch.randn(3, 7, 12)
    options = {"attn_mask": torch.zeros(7, 7), "key_padding_mask": PADDING, "need_weights": False}
    with pytest.warns(UserWarning, match="mismatched"):
        mine = ours(x, x, x, **options)[0]
    with pytest.warns(UserWarning, match="mismatched"):
        assert torch.equal(original(x, x, x, **options)[0], mine)
    assert not fused


@pytest.mark.parametrize("options", [{}, {"key_padding_mask": PADDING}, {"need_weights": True}], ids=str)
def test_compiles_whole(options):
    _, ours = pair(12, 4, batch_first=True)
    x = torch.randn(3, 7, 12)
    options = {"need_weights": False, **options}
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, **options)[0], ours(x, x, x, **options)[0])
    compiled(x, x, x, **options)[0].sum().backward()


def test_autocast_and_checkpoint(fused):
    original, ours = pair(12, 4, batch_first=True)
    x = torch.randn(3, 7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (m(x, x, x, need_weights=False)[0] for m in (ours, original))
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    x.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(lambda x: ours(x, x, x, need_weights=False)[0], x, use_reentrant=False)
    again = ours(x, x, x, need_weights=False)[0]
    assert torch.equal(*(torch.autograd.grad(o.sum(), x)[0] for o in (out, again)))


# ---- the samples of PyTorch's own tests of its modules ----------------------------------------------------------------------

SAMPLES = {info.name: info for info in module_db if info.module_cls.__module__.startswith("torch.nn")}
MODULES = ["nn.MultiheadAttention", "nn.TransformerEncoderLayer", "nn.TransformerDecoderLayer", "nn.TransformerEncoder"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*MODULES, "nn.Transformer"])
def test_torch_s_own_samples(name, training):
    """torch's modules build, run and differentiate each sample, and so do ours after `fastlm.replace`."""
    info = SAMPLES[name]
    torch.manual_seed(0)  # The samples are drawn from it.
    samples = list(info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=training))
    assert samples
    weights = (False, True) if name == "nn.MultiheadAttention" else (None,)
    for sample, need_weights in itertools.product(samples, weights):
        args, options = sample.forward_input.args, sample.forward_input.kwargs
        torch.manual_seed(0)
        original = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).train(training)
        for module in original.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, TORCHS):
                module.dropout = 0.0
        ours = copy.deepcopy(original)
        assert fastlm.replace(ours).swapped

        def call(module, given, sample=sample, need_weights=need_weights):
            names = [name for name in given if not name.isdigit()]
            args = [given[str(i)] for i in range(len(given) - len(names))]
            weights = {} if need_weights is None else {"need_weights": need_weights}
            out = module(*args, **{name: given[name] for name in names}, **weights)
            return out[0] if isinstance(out, tuple) else out

        given = {**{str(i): arg for i, arg in enumerate(args)}, **options}
        if call(original, given).isfinite().all():  # torch gives NaN if a query sees no key.
            assert_as_good_as_original(ours, original, call, given)
        else:
            assert call(ours, given).isfinite().all()


def test_functional_call_matches_torch_s_signature():
    """MultiHeadCall has the parameters of F.multi_head_attention_forward, and then one of its own."""
    theirs = inspect.signature(F.multi_head_attention_forward).parameters.values()
    ours = list(inspect.signature(multi_head_call.MultiHeadCall).parameters.values())
    assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs]
    assert ours[-1].name == "batch_first"
