"""Test that `fastlm.watch` collects what attention did, by layer and head."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from support.watched import BATCH, HEADS, LENGTH, WIDTH, Attend, Stack, encoder, normals, on_fastlm, padding
from support.watched import nothing_is_left as nothing_is_left
from torch import Tensor, nn

import fastlm
from fastlm.ops.attention import observer
from fastlm.testing import VALUE_FACTOR, allowed_error, assert_within, ulp_of_largest

# ---- numbers ----------------------------------------------------------------------------------------------------------------


def by_hand(p: Tensor) -> dict[str, Tensor]:
    """Return a layer's statistics from its weights (B, H, Lq, Lk), in which every row sees a key."""
    rows = p.shape[0] * p.shape[2]
    entropy = torch.special.entr(p).sum(-1)
    return {
        "entropy": entropy.sum((0, 2)) / rows,
        "least_entropy": entropy.amin((0, 2)),
        "key_mass": p.sum((0, 2)) / rows,
    }


def weights_of(model: nn.TransformerEncoder, x: Tensor, **masks) -> list[Tensor]:
    """Return the weights (B, H, L, L) of each layer of an untouched encoder."""
    found, model = [], copy.deepcopy(model).to(x.dtype)
    for layer in model.layers:
        original = layer.self_attn.forward

        def ask(*args, original=original, **options):
            out, weights = original(*args, **{**options, "need_weights": True, "average_attn_weights": False})
            found.append(weights.detach())
            return out, None

        layer.self_attn.forward = ask
    model.train()(x, **masks)  # Without dropout, and not by torch's fused path.
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_an_encoder_has_the_statistics_of_its_weights(padded, grad):
    model, x = encoder(), normals(BATCH, LENGTH, WIDTH)
    masks = {"src_key_padding_mask": padding()} if padded else {}
    with torch.set_grad_enabled(grad), fastlm.watch(fast := on_fastlm(model), key_mass=True) as stats:
        fast(x, **masks)
    golden, plain = ([by_hand(p) for p in weights_of(model, x.to(dtype), **masks)] for dtype in (torch.float64, torch.float32))
    assert list(stats) == ["layers.0.self_attn", "layers.1.self_attn"] and len(golden) == 2
    for layer, exact, rough in zip(stats.values(), golden, plain):
        assert layer.calls == 1 and layer.rows.tolist() == [BATCH * LENGTH] * HEADS
        for what, answer in exact.items():
            actual = getattr(layer, what)
            if what == "key_mass":  # It ends where nothing was reached.
                actual = F.pad(actual, (0, LENGTH - actual.shape[1]))
            allowed = allowed_error(rough[what], answer, VALUE_FACTOR, ulp_of_largest(answer, torch.float32))
            assert_within(actual, answer, allowed, what)


def test_the_largest_logit_is_that_of_the_products():
    model, xs = Attend(), [normals(BATCH, n, WIDTH, seed=n) for n in (LENGTH, 5)]
    with fastlm.watch(model) as stats:
        for x in xs:
            model(x)

    def largest(dtype):
        of_calls = [copy.deepcopy(model).to(dtype).heads(x.to(dtype)) for x in xs]
        return torch.stack([(q @ k.mT / q.shape[-1] ** 0.5).amax((0, 2, 3)) for q, k, _ in of_calls]).amax(0).double().detach()

    golden, plain = largest(torch.float64), largest(torch.float32)
    allowed = allowed_error(plain, golden, VALUE_FACTOR, ulp_of_largest(golden, torch.float32))
    assert_within(stats[""].max_logit, golden, allowed)
    assert stats[""].calls == 2 and stats[""].rows.tolist() == [BATCH * (LENGTH + 5)] * HEADS


def test_steps_of_different_lengths_are_weighted_by_their_queries():
    model = Attend(causal=True)
    parts = [normals(BATCH, n, WIDTH, seed=n) for n in (1, LENGTH, 1)]
    each = []
    for x in parts:
        with fastlm.watch(model, key_mass=True) as one:
            model(x)
        each.append(one[""])
    with fastlm.watch(model, key_mass=True) as stats:
        for x in parts:
            model(x)
    together, rows = stats[""], torch.stack([one.rows for one in each])
    torch.testing.assert_close(together.entropy, sum(o.entropy * o.rows for o in each) / rows.sum(0))
    mass = sum(F.pad(o.key_mass, (0, LENGTH - o.key_mass.shape[1])) * o.rows[:, None] for o in each)
    torch.testing.assert_close(together.key_mass, mass / rows.sum(0)[:, None])
    torch.testing.assert_close(together.key_mass.sum(1), torch.ones(HEADS, dtype=torch.float64))


def test_packed_sequences_count_by_the_position_within_each():
    torch.manual_seed(0)
    model, bounds = Attend(), torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    x = normals(1, 9, WIDTH)

    class Packed(nn.Module):
        def forward(self, x):
            q, k, v = (t[0].transpose(0, 1) for t in model.heads(x))
            return fastlm.varlen_attention(q, k, v, bounds, bounds)

    packed = Packed()
    with fastlm.watch(packed, key_mass=True) as stats, fastlm.watch(model, key_mass=True) as apart:
        packed(x)
        model(x[:, :4]), model(x[:, 4:])
    for name in ("rows", "entropy", "max_logit", "key_mass"):
        torch.testing.assert_close(getattr(stats[""], name), getattr(apart[""], name))


def test_rows_without_a_key_and_rows_of_nan_are_left_out():
    q, k, v = (normals(2, HEADS, 3, 4, seed=i) for i in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    ruined = q.clone()
    ruined[1, 2, 0] = math.nan

    class Module(nn.Module):
        def forward(self, query):
            return fastlm.attention(query, k, v, mask=mask)

    model = Module()
    with fastlm.watch(model, key_mass=True) as stats:
        model(ruined)
    layer = stats[""]
    assert layer.rows.tolist() == [4, 4, 3, 4] and layer.nan_rows.tolist() == [0, 0, 1, 0]
    for tensor in (layer.entropy, layer.max_logit, layer.key_mass):
        assert tensor.isfinite().all()
    torch.testing.assert_close(layer.key_mass.sum(1), torch.ones(HEADS, dtype=torch.float64))
    assert "1 rows of NaN were left out" in stats.table()


@pytest.mark.parametrize("shape", [(0, LENGTH, WIDTH), (BATCH, 0, WIDTH)], ids=["no batch", "no rows"])
def test_empty_calls_count_no_rows(shape):
    model = Attend()
    with fastlm.watch(model, key_mass=True) as stats:
        model(torch.zeros(shape))
    layer = stats[""]
    assert layer.calls == 1 and not layer.rows.any() and layer.entropy.isnan().all() and layer.key_mass.shape == (HEADS, 0)
    assert "nan" in stats.table()


# ---- who made the call ------------------------------------------------------------------------------------------------------


def test_calls_of_one_forward_are_told_apart_and_forwards_of_one_module_are_not():
    shared = Attend()
    model = Stack(shared, Attend(times=3), shared)
    with fastlm.watch(model) as stats:
        model(normals(BATCH, LENGTH, WIDTH))
    calls = {name: layer.calls for name, layer in stats.items()}
    assert calls == {"layers.0": 2, "layers.1": 1, "layers.1 (call 2)": 1, "layers.1 (call 3)": 1}


def test_calls_with_another_number_of_heads_are_a_layer_of_their_own():
    class Module(nn.Module):
        def forward(self, x):
            return fastlm.attention(x, x, x)

    model = Module()
    with fastlm.watch(model) as stats:
        for heads in (2, 3, 2):
            model(normals(1, heads, 5, 4))
    assert {name: (layer.calls, len(layer.rows)) for name, layer in stats.items()} == {"": (2, 2), " (3 heads)": (1, 3)}


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["saved tensors", "reentrant"])
def test_a_checkpoint_counts_once(options):
    model, x = Stack(Attend(), Attend(), checkpointed=options), normals(BATCH, LENGTH, WIDTH).requires_grad_()
    with fastlm.watch(model) as stats:
        model(x).sum().backward()
        assert observer.stack() == []  # Its recomputation ends early, by an exception.
    assert {name: layer.calls for name, layer in stats.items()} == {"layers.0": 1, "layers.1": 1}


def test_threads_have_modules_of_their_own():
    models = [Stack(Attend()), Attend(), Attend()]
    inside, done = threading.Barrier(3), []

    def run(model, x):
        handle = next(model.modules()).register_forward_pre_hook(lambda *_: (inside.wait(), None)[1])
        for _ in range(3):
            model(x)
        handle.remove()
        done.append(observer.stack() == [])

    with fastlm.watch(models[0]) as first, fastlm.watch(models[1]) as second:
        threads = [threading.Thread(target=run, args=(m, normals(i + 1, 5, WIDTH))) for i, m in enumerate(models)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert done == [True] * 3
    assert {n: s.rows[0].item() for n, s in first.items()} == {"layers.0": 15}
    assert {n: s.rows[0].item() for n, s in second.items()} == {"": 30}


def test_watches_may_be_nested():
    model, x = Stack(Attend(), Attend()), normals(BATCH, LENGTH, WIDTH)
    with fastlm.watch(model) as outer:
        model(x)
        with fastlm.watch(model.layers[1], key_mass=True) as inner, fastlm.watch(model) as same:
            model(x)
        model(x)
    assert [{n: s.calls for n, s in w.items()} for w in (outer, inner, same)] == [
        {"layers.0": 3, "layers.1": 3},
        {"": 1},
        {"layers.0": 1, "layers.1": 1},
    ]
    assert outer["layers.0"].key_mass is None and inner[""].key_mass.shape == (HEADS, LENGTH)


def test_attention_routed_by_use_is_seen(any_size):
    class Spelled(Attend):
        def forward(self, x):
            q, k, v = self.heads(x)
            return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)

    class Sdpa(Attend):
        def forward(self, x):
            return F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)

    model, x = Stack(Spelled(), Sdpa()), normals(BATCH, LENGTH, WIDTH)
    with torch.no_grad(), fastlm.watch(model) as stats, fastlm.use() as report:
        model(x)
    assert report.routed == 2 and {n: s.calls for n, s in stats.items()} == {"layers.0": 1, "layers.1": 1}
