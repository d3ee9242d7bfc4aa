"""Test fastlm's functions on DTensors: results and gradients are those of one process, whatever is sharded."""

import itertools

import torch
from support.processes import printed
from support.ranks import run
from support.sharded import assert_as_one_process, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.testing import seeded_normal

WHOLE, BATCH, HEADS, SEQUENCE = Replicate(), Shard(0), Shard(1), Shard(2)
ROWS = {"output 0", "output 1", "gradient of query", "gradient of key", "gradient of value"}


def qkv(batch=5, heads=4, key_heads=4, queries=9, keys=11, dtype=torch.float32) -> dict:
    shapes = {"query": (batch, heads, queries, 8), "key": (batch, key_heads, keys, 8), "value": (batch, key_heads, keys, 16)}
    return {name: seeded_normal(i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}


def placed(query, keys=None) -> dict:
    keys = query if keys is None else keys
    return {"query": query, "key": keys, "value": keys}


# ---- attention: what is sharded ---------------------------------------------------------------------------------------------


def shards_of_attention(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for query, keys in itertools.product((WHOLE, BATCH, HEADS, SEQUENCE), repeat=2):
        exact = ROWS if keys == WHOLE or query == keys else {"output 0"}
        results = assert_as_one_process(
            fastlm.attention, mesh, qkv(), placed([query], [keys]), exact, causal=True, return_lse=True
        )
        chosen = query if query != WHOLE else keys if keys in (BATCH, HEADS) else WHOLE
        assert results["output 0"].placements == results["output 1"].placements == (chosen,)
    for dtype in (torch.bfloat16, torch.float16):
        assert_as_one_process(fastlm.attention, mesh, qkv(dtype=dtype), placed([HEADS]), ROWS)


def test_any_dimension_of_queries_and_keys_may_be_sharded():
    run(shards_of_attention, 2)


def grouped_heads(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for heads, key_heads in ((8, 4), (8, 8), (4, 1), (4, 2), (12, 6), (6, 3), (6, 2), (3, 3), (2, 1)):
        for keys in (HEADS, WHOLE, BATCH):
            assert_as_one_process(
                fastlm.attention, mesh, qkv(3, heads, key_heads), placed([HEADS], [keys]), causal=True, return_lse=True
            )


def test_grouped_heads_of_keys_follow_the_queries_or_are_cut():
    run(grouped_heads, 4)


def meshes_of_two_dimensions(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    options = {"causal": True, "dropout_p": 0.3, "seed": 5, "return_lse": True}
    for query, keys in (
        ([BATCH, HEADS], [BATCH, HEADS]),
        ([BATCH, HEADS], [BATCH, WHOLE]),
        ([HEADS, BATCH], [WHOLE, BATCH]),
        ([BATCH, BATCH], [BATCH, BATCH]),
        ([HEADS, HEADS], [HEADS, WHOLE]),
        ([SEQUENCE, HEADS], [SEQUENCE, HEADS]),
        ([WHOLE, HEADS], [WHOLE, HEADS]),
        ([BATCH, WHOLE], [BATCH, WHOLE]),
        ([WHOLE, WHOLE], [WHOLE, WHOLE]),
    ):
        results = assert_as_one_process(fastlm.attention, mesh, qkv(5, 4, 2), placed(query, keys), **options)
        assert results["output 0"].placements == tuple(query)


def test_meshes_of_two_dimensions():
    run(meshes_of_two_dimensions, 4)


def sequences_with_few_heads(rank, world):
    """Shard the sequence of heads that do not divide by the ranks, so that keys and values go round."""
    mesh, pairs = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    tensors, short = qkv(heads=3, key_heads=1, queries=14, keys=14), qkv(heads=2, key_heads=2, queries=3, keys=2)
    options = {"window": (5, 3), "softcap": 3.0, "dropout_p": 0.3, "seed": 5, "return_lse": True}
    more = {
        "mask": seeded_normal(7, (5, 1, 14, 14), torch.float32),
        "sinks": seeded_normal(8, (3,), torch.float32),
        "alibi_slopes": torch.linspace(0.1, 0.9, 3),
    }
    for given in (tensors, tensors | more, tensors | more | {"mask": more["mask"][:, :, :1]}):
        results = assert_as_one_process(fastlm.attention, mesh, given, placed([SEQUENCE]), **options)
        assert results["output 0"].placements == (SEQUENCE,)
    assert_as_one_process(fastlm.attention, mesh, short, placed([SEQUENCE]), causal=True)
    assert_as_one_process(fastlm.attention, pairs, tensors, placed([BATCH, SEQUENCE]), causal=True)
    assert_as_one_process(fastlm.attention, pairs, qkv(heads=1, key_heads=1), placed([HEADS, SEQUENCE]))
    for noise in ({"dropout_p": 0.3, "seed": 5}, {"return_stats": ("key_mass",)}):  # each rank gets the whole sequence
        assert_as_one_process(fastlm.attention, pairs, tensors, placed([BATCH, SEQUENCE]), causal=True, **noise)


def test_sequences_with_few_heads():
    run(sequences_with_few_heads, 4)


def partial_and_plain(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = qkv()
    expected = fastlm.attention(**tensors)
    share = (tensors["query"] / world).requires_grad_()
    part = DTensor.from_local(share, mesh, [Partial()])
    keys = distributed({name: tensors[name] for name in ("key", "value")}, mesh, placed([BATCH]))
    out = fastlm.attention(part, **keys)
    assert out.placements == (BATCH,) and torch.equal(out.full_tensor(), expected)
    out.sum().backward()
    query = tensors["query"].clone().requires_grad_()
    fastlm.attention(query, tensors["key"], tensors["value"]).sum().backward()
    torch.testing.assert_close(share.grad, query.grad)
    out = fastlm.attention(part, tensors["key"], tensors["value"])
    assert out.placements == (WHOLE,) and torch.equal(out.to_local(), expected)
    mask = seeded_normal(8, (5, 1, 9, 11), torch.float32)
    out = fastlm.attention(**tensors, mask=distributed({"mask": mask}, mesh, {"mask": [BATCH]})["mask"])
    assert torch.equal(out.full_tensor(), fastlm.attention(**tensors, mask=mask))
    other = init_device_mesh("cpu", (world, 1))
    try:
        fastlm.attention(tensors["query"], keys["key"], distributed(tensors, other, {})["value"])
    except ValueError as error:
        assert "one mesh" in str(error)
    else:
        raise AssertionError("two meshes were taken")


def test_partial_tensors_are_reduced_and_plain_ones_count_as_replicated():
    run(partial_and_plain, 2)


# ---- attention: options -----------------------------------------------------------------------------------------------------

B, H, LQ, LK = 5, 4, 9, 11
OPTIONS = {
    "window": {"window": (3, 1)},
    "numbers": {"scale": 0.4, "softcap": 2.0, "causal": True},
    "a mask of all": {"mask": seeded_normal(7, (B, H, LQ, LK), torch.float32)},
    "a mask by batch": {"mask": seeded_normal(7, (B, 1, 1, LK), torch.float32)},
    "a mask by head": {"mask": seeded_normal(7, (H, LQ, 1), torch.float32)},
    "a mask by key": {"mask": seeded_normal(7, (LK,), torch.float32)},
    "a bool mask": {"mask": seeded_normal(7, (B, 1, LQ, LK), torch.float32) > -0.5},
    "slopes by head": {"alibi_slopes": torch.linspace(0.1, 0.9, H), "causal": True},
    "slopes by batch and head": {"alibi_slopes": torch.linspace(0.1, 0.9, B * H).view(B, H)},
    "sinks": {"sinks": seeded_normal(8, (H,), torch.float32), "return_lse": True},
    "statistics": {"return_stats": ("entropy", "max_logit", "key_mass"), "causal": True},
    "dropout": {"dropout_p": 0.4, "seed": -3, "causal": True},
    "dropout by a tensor": {"dropout_p": 0.4, "seed": torch.tensor(2**40)},
    "dropout per example": {"dropout_p": 0.4, "seed": torch.arange(B) * 7},
    "the reference": {"backend": "reference", "dropout_p": 0.4, "seed": 1},
    "all": {
        "mask": seeded_normal(7, (B, 1, LQ, LK), torch.float32),
        "sinks": seeded_normal(8, (H,), torch.float32),
        "alibi_slopes": torch.linspace(0.1, 0.9, H),
        "dropout_p": 0.2,
        "seed": 11,
        "softcap": 3.0,
        "window": (5, 2),
        "return_lse": True,
        "return_stats": ("key_mass",),
    },
}


def options_of_attention(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = qkv(B, H, 2, LQ, LK)
    for options in OPTIONS.values():
        more = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
        numbers = {name: value for name, value in options.items() if name not in more}
        exact = {"output 0", "gradient of query"} if "backend" not in options else ()
        for query in (BATCH, HEADS, SEQUENCE):
            assert_as_one_process(fastlm.attention, mesh, tensors | more, placed([query]), exact, **numbers)


def test_every_option_is_that_of_the_whole_call():
    run(options_of_attention, 2)


def drawn_seeds(rank, world):
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = qkv(4, 4)
    mu = {"mu": seeded_normal(4, (4, 7), torch.float32), "logvar": seeded_normal(5, (4, 7), torch.float32)}
    torch.manual_seed(0)
    expected = fastlm.attention(**tensors, dropout_p=0.5), fastlm.reparameterize(**mu)
    torch.manual_seed(rank)
    for placements in ([BATCH, HEADS], [HEADS, WHOLE], [WHOLE, WHOLE]):
        torch.manual_seed(rank)  # each rank's generator is its own
        out = fastlm.attention(**distributed(tensors, mesh, placed(placements)), dropout_p=0.5)
        z = fastlm.reparameterize(**distributed(mu, mesh, {"mu": [BATCH, WHOLE], "logvar": [BATCH, WHOLE]}))
        assert torch.equal(out.full_tensor(), expected[0]) and torch.equal(z.full_tensor(), expected[1])


def test_ranks_agree_on_a_seed_that_is_drawn():
    run(drawn_seeds, 4)


# ---- attention's other functions --------------------------------------------------------------------------------------------


def other_functions(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = qkv(4, 4, 2, queries=7, keys=7)
    for query, is_causal in itertools.product((BATCH, HEADS, SEQUENCE, WHOLE), (False, True)):
        assert_as_one_process(
            fastlm.scaled_dot_product_attention, mesh, tensors, placed([query]), is_causal=is_causal, enable_gqa=True
        )
    _, lse = fastlm.attention(**tensors, causal=True, return_lse=True)
    scored = {"query": tensors["query"], "key": tensors["key"], "lse": lse.detach()}
    for query in (BATCH, HEADS, WHOLE):
        placements = {"query": [query], "key": [query], "lse": [query]}
        rows = torch.tensor([6, 0, 3])
        assert_as_one_process(fastlm.attention_weights, mesh, scored, placements, rows=rows, causal=True)
        assert_as_one_process(fastlm.top_keys, mesh, scored, placements, {"output 0", "output 1"}, k=3, causal=True)


def test_scaled_dot_product_attention_and_weights():
    run(other_functions, 2)


def packed_sequences(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    lengths = torch.tensor([0, 4, 4, 11, 17], dtype=torch.int32)
    tensors = {name: seeded_normal(i, (17, 4, 8), torch.float32) for i, name in enumerate(("query", "key", "value"))}
    tensors |= {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    for rows, seed in itertools.product((Shard(0), Shard(1), WHOLE), (9, torch.arange(4))):
        more = {"seed": seed} if isinstance(seed, torch.Tensor) else {}
        options = {"causal": True, "dropout_p": 0.3, "return_lse": True} | ({} if more else {"seed": seed})
        slopes = {"alibi_slopes": torch.linspace(0.1, 0.9, 16).view(4, 4)}
        assert_as_one_process(
            fastlm.varlen_attention, mesh, tensors | more | slopes, placed([rows]), {"output 0", "output 1"}, **options
        )


def test_packed_sequences():
    run(packed_sequences, 2)


def caches(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = {
        "query": seeded_normal(1, (4, 4, 1, 8), torch.float32),
        "key_cache": seeded_normal(2, (4, 2, 6, 8), torch.float32),
        "value_cache": seeded_normal(3, (4, 2, 6, 8), torch.float32),
        "cache_seqlens": torch.tensor([0, 3, 5, 2], dtype=torch.int32),
    }
    new = {"key": seeded_normal(4, (4, 2, 1, 8), torch.float32), "value": seeded_normal(5, (4, 2, 1, 8), torch.float32)}
    whole = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = fastlm.kvcache_attention(**whole, **new, causal=True)
    for placement in (BATCH, HEADS, WHOLE):
        given = distributed(tensors, mesh, {name: [placement] for name in ("query", "key_cache", "value_cache")})
        copies = {name: tensor.clone() for name, tensor in given.items()}
        out = fastlm.kvcache_attention(**copies, **distributed(new, mesh, {}), causal=True)
        assert torch.equal(out.full_tensor(), expected) and out.placements == (placement,)
        assert torch.equal(copies["key_cache"].full_tensor(), whole["key_cache"])
        assert torch.equal(copies["value_cache"].full_tensor(), whole["value_cache"])
        read = fastlm.kvcache_attention(**given | {"key_cache": tensors["key_cache"]})
        assert torch.equal(read.full_tensor(), fastlm.kvcache_attention(**tensors))
    given = distributed(tensors, mesh, {"query": [HEADS]})
    try:
        fastlm.kvcache_attention(**given, **distributed(new, mesh, {}))
    except ValueError as error:
        assert "key_cache is written in place" in str(error)
    else:
        raise AssertionError("a rank would have written its heads to a cache that all ranks share")


def test_caches_are_read_and_written_where_they_lie():
    run(caches, 2)


def paged_caches(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = {
        "query": seeded_normal(1, (2, 4, 1, 8), torch.float32),
        "key_cache": seeded_normal(2, (5, 3, 2, 8), torch.float32),
        "value_cache": seeded_normal(3, (5, 3, 2, 8), torch.float32),
        "cache_seqlens": torch.tensor([5, 2], dtype=torch.int32),
        "block_table": torch.tensor([[4, 0], [2, 1]], dtype=torch.int32),
    }
    new = {"key": seeded_normal(4, (2, 2, 1, 8), torch.float32), "value": seeded_normal(5, (2, 2, 1, 8), torch.float32)}
    for query, caches in ((HEADS, Shard(2)), (HEADS, WHOLE), (BATCH, WHOLE), (WHOLE, Shard(2))):
        given = distributed(tensors, mesh, {"query": [query], "key_cache": [caches], "value_cache": [caches]})
        assert torch.equal(fastlm.kvcache_attention(**given).full_tensor(), fastlm.kvcache_attention(**tensors))
    whole = {name: tensor.clone() for name, tensor in tensors.items()}
    given = distributed(tensors, mesh, {"query": [HEADS], "key_cache": [Shard(2)], "value_cache": [Shard(2)]})
    given = {name: tensor.clone() for name, tensor in given.items()}
    out = fastlm.kvcache_attention(**given, **new, causal=True)
    assert torch.equal(out.full_tensor(), fastlm.kvcache_attention(**whole, **new, causal=True))
    assert torch.equal(given["key_cache"].full_tensor(), whole["key_cache"])


def test_paged_caches():
    run(paged_caches, 2)


# ---- torch's own surroundings -----------------------------------------------------------------------------------------------


def compiled(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    given = distributed(qkv(4, 4, 2), mesh, placed([HEADS]))
    given |= distributed({"weight": seeded_normal(6, (8, 8), torch.float32)}, mesh, {})

    def loss(query, key, value, weight):
        query = fastlm.linear(query, weight)
        out, lse = fastlm.attention(query, key, value, causal=True, dropout_p=0.2, seed=3, return_lse=True)
        z, kl = fastlm.reparameterize_with_kl(out.transpose(0, 1), out.transpose(0, 1), seed=4, num_samples=2)
        return sum(part.full_tensor().square().mean() for part in (out, lse, z, kl))

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [tensor.detach().requires_grad_() for tensor in given.values()]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad.full_tensor() for leaf in leaves)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_calls_on_dtensors_can_be_compiled():
    run(compiled, 2)


def surroundings(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tensors = qkv(2, 4, 4, 6, 6)

    def gradients(attend):
        torch.manual_seed(rank)
        leaves = {name: t.requires_grad_() for name, t in distributed(tensors, mesh, placed([HEADS])).items()}
        out = attend(lambda *args: fastlm.attention(*args, dropout_p=0.5), *leaves.values())
        return [g.full_tensor() for g in torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    again = gradients(lambda function, *args: checkpoint(function, *args, use_reentrant=False))
    for actual, expected in zip(again, gradients(lambda function, *args: function(*args))):
        assert torch.equal(actual, expected)

    def gradient(query, key, value):
        out = fastlm.attention(query, key, value, causal=True)
        return torch.autograd.grad(out.sin().sum(), query, create_graph=True)[0]

    assert_as_one_process(gradient, mesh, tensors, placed([BATCH]))  # and its own gradients
    with torch.inference_mode():
        out = fastlm.attention(**distributed(tensors, mesh, placed([BATCH])))
        assert torch.equal(out.full_tensor(), fastlm.attention(**tensors))

    torch.manual_seed(0)
    latent, x = fastlm.nn.GaussianLatent(8, 6), seeded_normal(1, (4, 8), torch.float32)
    expected = latent(x, seed=3)
    distribute_module(latent, mesh)
    for actual, whole in zip(latent(distributed({"x": x}, mesh, {"x": [BATCH]})["x"], seed=3), expected):
        assert actual.placements == (BATCH,)
        torch.testing.assert_close(actual.full_tensor(), whole)


def test_checkpoints_second_derivatives_inference_mode_and_modules():
    run(surroundings, 2)


def ranks_without_anything(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    options = {"causal": True, "dropout_p": 0.3, "seed": 1, "return_lse": True}
    assert_as_one_process(fastlm.attention, mesh, qkv(batch=1), placed([BATCH]), ROWS, **options)
    assert_as_one_process(fastlm.attention, mesh, qkv(heads=2, key_heads=1), placed([HEADS], [WHOLE]), **options)


def test_ranks_may_have_nothing():
    run(ranks_without_anything, 4)


def explained(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    given = distributed(qkv(), mesh, placed([HEADS]))
    assert fastlm.explain(fastlm.attention, **given).backend == "cpu"
    with torch.autocast("cpu"):
        assert fastlm.attention(**given).dtype == torch.bfloat16


def test_calls_on_dtensors_can_be_explained_and_run_under_autocast():
    run(explained, 2)


def test_fastlm_does_not_import_dtensor_before_there_is_one():
    loaded = (
        'print([name for name in sys.modules if name.startswith(("torch.distributed.tensor", "fastlm.distributed.dtensor."))])'
    )
    assert printed(f"import sys, fastlm; {loaded}") == "[]"
