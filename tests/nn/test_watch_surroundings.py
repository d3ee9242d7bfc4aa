"""Test that `fastlm.watch` changes nothing, and tells what it could not see."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
from support.watched import BATCH, HEADS, LENGTH, WIDTH, Attend, Stack, encoder, normals, on_fastlm, padding
from support.watched import nothing_is_left as nothing_is_left
from torch import Tensor, nn

import fastlm
from fastlm.ops.attention import observer

# ---- nothing changes --------------------------------------------------------------------------------------------------------


def results_of(model: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Return the output and all gradients of a step, and those of a penalty on the input's gradient."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = model(x, **options)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    gradients = torch.autograd.grad(gradient.square().sum() + out.sum(), [x, *model.parameters()], allow_unused=True)
    return [out.detach(), gradient.detach(), *(g for g in gradients if g is not None), torch.rand(3)]


@pytest.mark.parametrize("model", [encoder(dropout=0.2), Stack(Attend(causal=True), Attend())], ids=["encoder", "attention"])
@pytest.mark.parametrize("key_mass", [False, True])
def test_results_and_derivatives_are_the_same_bits(model, key_mass):
    model, x = on_fastlm(model), normals(BATCH, LENGTH, WIDTH)
    before = results_of(model, x)
    with fastlm.watch(model, key_mass=key_mass) as stats:
        inside = results_of(model, x)
    assert len(stats) == 2
    for ours, theirs in zip(inside, before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (3, 0)}, {"dropout_p": 0.3, "seed": 1}], ids=str)
def test_the_output_of_inference_is_the_same_bits(backend, options):
    """Compare the output without gradients, where one pass computes it and the statistics."""
    model, x = Attend(backend=backend, **options), normals(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        before = model(x)
        with fastlm.watch(model, key_mass=True):
            assert torch.equal(model(x), before)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_a_packed_batch_stays_packed_and_its_layers_have_names(inference):
    model, x = on_fastlm(encoder()).eval(), normals(BATCH, LENGTH, WIDTH)
    with inference():
        before = model(x, src_key_padding_mask=padding())
        with fastlm.watch(model) as stats:
            inside = model(x, src_key_padding_mask=padding())
    assert torch.equal(inside, before) and not before[2, 1:].any()
    assert {name: layer.rows[0].item() for name, layer in stats.items()} == dict.fromkeys(
        ["layers.0.self_attn", "layers.1.self_attn"], (~padding()).sum().item()
    )


def test_sums_of_inference_mode_go_on_in_training():
    model, x = Attend(), normals(BATCH, LENGTH, WIDTH)
    with fastlm.watch(model, key_mass=True) as stats:
        with torch.inference_mode():
            model(x)
        model(torch.cat([x, x], dim=1)).sum().backward()
        with torch.inference_mode():
            model(x)
    assert stats[""].calls == 3 and not stats[""].entropy.requires_grad


def test_hooks_are_removed_also_after_an_exception():
    model = Stack(Attend(), Attend(scale="wrong"))
    with pytest.raises(TypeError), warnings.catch_warnings(), fastlm.watch(model) as stats:
        warnings.simplefilter("error")
        try:
            model(normals(BATCH, LENGTH, WIDTH))
        finally:
            assert observer.stack() == []  # The module's own hooks have left it.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(stats) == ["layers.0"] and not stats.is_open


def test_copies_and_pickles_of_a_watched_model_are_not_watched():
    model, x = Attend(), normals(BATCH, LENGTH, WIDTH)
    with fastlm.watch(layers := on_fastlm(encoder())) as stats, fastlm.watch(model) as of_model:
        layers(x)
        copies = copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))
        for one in copies:
            one(x)
        model(x)
    assert [layer.calls for layer in stats.values()] == [1, 1] and of_model[""].calls == 1


def test_explain_and_a_call_outside_of_the_model_are_not_counted():
    model, x = Attend(), normals(BATCH, LENGTH, WIDTH)
    with fastlm.watch(model) as stats:
        fastlm.attention(*model.heads(x))
        model(x)
        fastlm.explain(fastlm.attention, *model.heads(x))
    assert stats[""].calls == 1


def test_statistics_that_the_call_asks_for_keep_their_gradients():
    class Module(Attend):
        def forward(self, x):
            return fastlm.attention(*self.heads(x), return_stats=("entropy",))[1].entropy

    model, x = Module(), normals(BATCH, LENGTH, WIDTH)
    before = torch.autograd.grad(model(x).sum(), model.project.weight)[0]
    with fastlm.watch(model, key_mass=True) as stats:
        entropy = model(x)
        inside = torch.autograd.grad(entropy.sum(), model.project.weight)[0]
    assert torch.equal(inside, before)
    torch.testing.assert_close(stats[""].entropy, entropy.double().mean((0, 2)).detach())


# ---- what is not seen is told -----------------------------------------------------------------------------------------------


def test_calls_without_statistics_are_counted_and_keep_their_derivatives():
    class Cached(nn.Module):
        def forward(self, q, cache):
            return fastlm.kvcache_attention(q, cache, cache, torch.tensor([5], dtype=torch.int32))

    model, x = Stack(Attend()), normals(BATCH, LENGTH, WIDTH)
    model.layers.append(cached := Cached())
    attend = model.layers[0]
    before = torch.func.jvp(attend, (x,), (x,)), torch.func.vmap(attend)(x[None])
    with fastlm.watch(model) as stats:
        after = torch.func.jvp(attend, (x,), (x,)), torch.func.vmap(attend)(x[None])
        cached(normals(1, HEADS, 1, 4), normals(1, HEADS, 8, 4))
        attend(x)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert stats["layers.0"].calls == 1 and sorted(stats.missed.values()) == [1, 2]
    assert "1 calls have no statistics: fastlm.kvcache_attention" in stats.table()


def test_compiled_modules_are_named_and_not_compiled_for_ever():
    model, x = on_fastlm(encoder()), normals(BATCH, LENGTH, WIDTH)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.layers[0].compile(backend=backend, fullgraph=True)
    expected = model(x)
    for _ in range(3):
        with fastlm.watch(model) as stats:
            assert torch.equal(model(x), expected)
        model(x)
    assert len(graphs) == 1
    assert list(stats) == ["layers.1.self_attn"] and stats.unseen == ["layers.0.self_attn"]
    assert "1 modules were not seen (not run, not on fastlm, or compiled): layers.0.self_attn" in stats.table()
    torch._dynamo.reset()
    with fastlm.watch(model) as stats:
        model(x)
    for _ in range(3):
        model(x)
    assert len(graphs) <= 3


def test_a_model_that_is_not_on_fastlm_warns_once_and_says_what_to_do():
    model = encoder()
    message = r"in TransformerEncoder\. A model runs on fastlm after fastlm\.replace\(model\)"
    with pytest.warns(UserWarning, match=message), fastlm.watch(model) as stats:
        model(normals(BATCH, LENGTH, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stats:
            pass
    assert not stats and "has seen nothing" in repr(stats) and "2 modules were not seen" in stats.table()
    with pytest.raises(ValueError, match="saw no call of attention"):
        stats.plot()


WRONG = {"model": ((3,), {}), "key_mass": ((nn.Linear(1, 1),), {"key_mass": 1})}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    args, options = WRONG[name]
    with pytest.raises(TypeError, match=f"{name} must be"):
        fastlm.watch(*args, **options)


# ---- use of the block -------------------------------------------------------------------------------------------------------


def test_a_block_may_be_entered_again_but_not_twice_at_once():
    model, x = Attend(), normals(BATCH, LENGTH, WIDTH)
    with fastlm.watch(model) as stats:
        model(x)
        with pytest.raises(RuntimeError, match="open already"), stats:
            pass
    model(x)
    with stats:
        model(x)
    assert stats[""].calls == 2
    stats.reset()
    assert not stats and not stats.missed
    with pytest.raises(KeyError):
        stats[""]


def test_what_is_kept_does_not_grow_with_the_steps():
    model, x = Attend(), normals(BATCH, LENGTH, WIDTH)
    with fastlm.watch(model, key_mass=True) as stats:
        for _ in range(20):
            model(x).sum().backward()
    (totals,) = stats._totals[""].values()
    sizes = {name: t.numel() for name, t in vars(totals).items() if isinstance(t, Tensor)}
    assert sizes.pop("key_mass") == HEADS * LENGTH and set(sizes.values()) == {HEADS}
    assert not any(t.requires_grad for t in vars(totals).values() if isinstance(t, Tensor))


def test_the_table_and_the_plot_show_every_layer():
    model = Stack(Attend(), Attend(causal=True))
    with fastlm.watch(model, key_mass=True) as stats:
        model(normals(BATCH, LENGTH, WIDTH))
    head, *rows = stats.table().splitlines()
    assert head.split("  ")[0] == "layer" and head.endswith("on the first key") and str(stats) == stats.table()
    assert [row.split()[:3] for row in rows] == [[f"layers.{i}", str(HEADS), str(BATCH * LENGTH)] for i in range(2)]
    maps = [axes for axes in stats.plot().axes if axes.images]
    titles = ["".join(map(axes.get_title, ("left", "center", "right"))) for axes in maps]  # A user's style may move them.
    assert titles == ["entropy, nats", "largest logit", "share of the first key"]
    assert maps[0].images[0].get_array().shape == (2, HEADS)


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    model = Attend()
    with fastlm.watch(model) as stats:
        model(normals(BATCH, LENGTH, WIDTH))
    monkeypatch.delitem(sys.modules, "fastlm.nn.watch_plot", raising=False)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'fastlm\[plot\]'"):
        stats.plot()
