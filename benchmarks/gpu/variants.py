"""Variants of the Triton kernels, compiled for GPUs that are not here, and what their machine code is made of.

Nothing here runs on a GPU, and no figure is a measurement.
"""

import itertools
import multiprocessing
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from fastlm.kernels import attention
from fastlm.kernels.attention.tiles import (
    FORWARD,
    FORWARD_STATS,
    GRAD_KEY_VALUE,
    GRAD_KEY_VALUE_STATS,
    GRAD_MASK,
    GRAD_QUERY,
    GRAD_QUERY_STATS,
    JVP,
    JVP_GRAD_KEY_VALUE,
    JVP_GRAD_MASK,
    JVP_GRAD_QUERY,
    KEY_MASS,
    KVCACHE,
    MASS_MEAN,
    LoopKind,
    has_descriptors,
    tile_for,
)
from torch import Tensor

from gpu import ahead_of_time, machine_code

GPUS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")
PASSES = (FORWARD, GRAD_KEY_VALUE, GRAD_QUERY, KVCACHE)
TANGENT_PASSES = (JVP, JVP_GRAD_KEY_VALUE, JVP_GRAD_QUERY)
STATS_PASSES = (FORWARD_STATS, GRAD_KEY_VALUE_STATS, GRAD_QUERY_STATS, KEY_MASS, MASS_MEAN)
MASK_PASSES = (GRAD_MASK, JVP_GRAD_MASK)  # Their loop is always the masked one.
HEAD_DIMS = (64, 128, 256)
UNEVEN_HEAD_DIMS = (56, 120, 248)  # Rows start at multiples of 16 bytes, while Triton specializes kernels for 32.
DTYPES = ("bfloat16", "float16", "float32")
LOOPS = ("plain", "masked", "packed", "part")  # Attention alone; with mask and dropout; packed; a larger call's, with dropout.
DROPPING = ("masked", "part")  # These loops draw dropout.
PAGED = "paged"  # The KV cache's loop, over pages of 16 rows.


class Variant(NamedTuple):
    """One compilation."""

    arch: str
    pass_name: str  # one of PASSES, TANGENT_PASSES, STATS_PASSES or MASK_PASSES
    head_dim: int
    dtype: str
    causal: bool
    loop: str = "plain"  # one of LOOPS, or PAGED


def every_variant() -> list[Variant]:
    """Return all variants.

    The KV cache's pass has no diagonal to skip, so it comes without a causal limit, and paged besides. Other loops that are not
    plain, and so the passes over a mask, come with a causal limit only.
    """
    kinds = ((False, "plain"), *((True, loop) for loop in LOOPS))
    passes = PASSES + TANGENT_PASSES + STATS_PASSES
    variants = [Variant(*v, *kind) for v in itertools.product(GPUS, passes, HEAD_DIMS, DTYPES) for kind in kinds]
    variants = [variant for variant in variants if variant.pass_name != KVCACHE or not variant.causal]
    variants += [Variant(arch, KVCACHE, *v, False, PAGED) for arch, *v in itertools.product(GPUS, HEAD_DIMS, DTYPES)]
    variants += [Variant(*v, True, "masked") for v in itertools.product(GPUS, MASK_PASSES, HEAD_DIMS, DTYPES)]
    return variants + _uneven_variants(UNEVEN_HEAD_DIMS)


def _uneven_variants(head_dims: tuple[int, ...]) -> list[Variant]:
    """Return the plain passes with these head_dims, for GPUs that copy by pointers and by descriptor."""
    return [Variant(*v, "bfloat16", True) for v in itertools.product(("sm_80", "sm_90", "sm_120"), PASSES[:3], head_dims)]


def covering_variants() -> list[Variant]:
    """Return, for every GPU, each pass with each head_dim, and each pass with each loop; all else takes turns.

    The KV cache's pass comes paged with each head_dim. Of the passes with tangents, with statistics and of a larger call there
    are a few, because compiling takes long. Those over a mask come once for every GPU. Uneven head_dims come up to 128.
    """
    turns = itertools.cycle(itertools.product((True, False), DTYPES))
    variants = []
    for arch, name, head_dim in itertools.product(GPUS, PASSES, HEAD_DIMS):
        causal, dtype = next(turns)
        variants.append(Variant(arch, name, head_dim, dtype, causal and name != KVCACHE))
    for i, (arch, name, loop) in enumerate(itertools.product(GPUS, PASSES[:3], LOOPS[1:3])):
        variants.append(Variant(arch, name, HEAD_DIMS[(i + i // 6) % 3], DTYPES[i // 2 % 3], True, loop))
    for arch, (head_dim, dtype) in itertools.product(GPUS, zip(HEAD_DIMS, DTYPES)):
        variants.append(Variant(arch, KVCACHE, head_dim, dtype, False, PAGED))
    head_dims = itertools.cycle((64, 128))
    for arch, name in itertools.product(("sm_86", "sm_90", "gfx942"), TANGENT_PASSES + STATS_PASSES):
        variants.append(Variant(arch, name, next(head_dims), "bfloat16", True))
    for (arch, head_dim), name in itertools.product((("sm_80", 128), ("sm_90", 64), ("gfx942", 128)), PASSES[:3]):
        variants.append(Variant(arch, name, head_dim, "bfloat16", True, "part"))
    turns = itertools.cycle(itertools.product(DTYPES, HEAD_DIMS))
    for arch, name in itertools.product(GPUS, MASK_PASSES):
        dtype, head_dim = next(turns)
        variants.append(Variant(arch, name, head_dim, dtype, True, "masked"))
    return [*variants, Variant("sm_80", JVP, 64, "float32", False), *_uneven_variants(UNEVEN_HEAD_DIMS[:2])]


def launch_of(variant: Variant) -> attention.Launch:
    """Return the launch of a variant, to be compiled."""
    return launch_named(variant, launches_of(variant))


def launches_of(variant: Variant, device: str = "meta", heads: int = 16, length: int = 4096) -> list[attention.Launch]:
    """Return the launches of a variant's call of 4 sequences, in the order in which they run; its own is among them.

    On a real device the inputs are normals, and running all launches fills what the variant's own one reads.
    """
    batch, head_dim = 4, variant.head_dim

    def tensor(*shape, dtype=None):
        made = torch.zeros(shape, dtype=dtype or getattr(torch, variant.dtype), device=device)
        return made.normal_() if made.is_floating_point() and device != "meta" else made

    query, key, value, out = (tensor(batch, heads, length, head_dim) for _ in range(4))
    lse, scale = tensor(batch, heads, length, dtype=torch.float32), head_dim**-0.5
    statistics = tensor(batch, heads, length, 2, dtype=torch.float32)
    if variant.pass_name == KVCACHE:
        options, shape = {}, (batch, heads // 4, length, head_dim)
        if variant.loop == PAGED:
            pages = batch * length // 16
            shape = pages, 16, heads // 4, head_dim
            options["block_table"] = torch.arange(pages, dtype=torch.int32, device=device).view(batch, -1)
        caches = [tensor(*shape) for _ in range(2)]
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        one = tensor(batch, heads, 1, head_dim)
        call = attention.KVCacheCall(one, *caches, lengths, scale=scale, arch=variant.arch, **options)
        return attention.plan_kvcache(call, torch.empty_like(one), lse[:, :, :1])
    options = {}
    if variant.loop in DROPPING:
        options = {"seed": tensor(dtype=torch.int64), "drop_below": 1 << 29}
    if variant.loop == "masked":
        options["mask"] = tensor(batch, heads, length, length, dtype=torch.float32)
    if variant.loop == "part":
        options["places"] = tensor(batch, 4, dtype=torch.int64)
    if variant.loop == "packed":
        query, key, value, out, lse, statistics = (t[:1] for t in (query, key, value, out, lse, statistics))
        bounds = torch.linspace(0, length, batch + 1, device=device).int()
        options = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), bounds)
    right = 0 if variant.causal else None
    call = attention.Call(query, key, value, right=right, scale=scale, arch=variant.arch, **options)
    if variant.pass_name in (*TANGENT_PASSES, JVP_GRAD_MASK):
        tangents = attention.TangentTensors(query, key, value, call.mask, None)
        results = attention.JvpResults(out, lse, statistics, out, lse)
        launches = attention.plan_jvp(call, tangents, results)
        grads, deltas = (query, key, value, call.mask), (lse, lse)
        return launches + attention.plan_jvp_backward(call, tangents, results, out, None, grads, deltas)
    if variant.pass_name in (*STATS_PASSES, GRAD_MASK):  # The gradient of a mask is hardest with statistics.
        return _with_stats(call, out, lse, statistics)
    launches = attention.plan_forward(call, out, lse, statistics)
    if variant.pass_name == FORWARD:
        return launches
    grads = (*(torch.empty_like(tensor) for tensor in (query, key, value)), None)
    return launches + attention.plan_backward(call, out, statistics, out, None, grads, lse)


def _with_stats(call: attention.Call, out: Tensor, lse: Tensor, statistics: Tensor) -> list[attention.Launch]:
    """Return the launches of all passes with all statistics and their gradients."""
    by_key = lse.new_zeros(*lse.shape[:2], call.key.shape[2])
    stats = attention.StatsGrads(lse, lse, lse.int(), by_key)
    launches = attention.plan_forward(call, out, lse, statistics, attention.RowStats(lse, lse, lse.int()))
    launches += attention.plan_key_mass(call, statistics, by_key)
    launches += attention.plan_mass_mean(call, statistics, by_key, lse)
    grads = call.query, call.key, call.value, call.mask
    return launches + attention.plan_backward(call, out, statistics, out, None, grads, lse, stats)


def launch_named(variant: Variant, launches: list[attention.Launch]) -> attention.Launch:
    """Return the launch of the variant's pass."""
    name = GRAD_MASK if variant.pass_name == JVP_GRAD_MASK else variant.pass_name.removesuffix("_stats")
    return next(launch for launch in launches if launch.kernel.__name__ == f"attention_{name}")


def kind_of(variant: Variant) -> LoopKind:
    """Return which row of the settings table the variant's loop takes its tile from."""
    by_descriptor = variant.loop == "plain" and variant.pass_name not in (*TANGENT_PASSES, KVCACHE, KEY_MASS, MASS_MEAN)
    if variant.loop in DROPPING:
        return LoopKind.MASKED
    if by_descriptor and has_descriptors(variant.arch, getattr(torch, variant.dtype)):
        return LoopKind.DESCRIPTORS
    return LoopKind.PLAIN


def inspect(variant: Variant) -> dict:
    """Compile a variant; return what it takes, and the instructions of its hot loop."""
    warnings.simplefilter("ignore")
    launch = launch_of(variant)
    row = {**variant._asdict(), "q": launch.arguments["BLOCK_Q"], "k": launch.arguments["BLOCK_K"], **launch.options}
    row["specialized"] = launch.arguments.get("SPECIALIZED", False)
    tile = tile_for(variant.pass_name, variant.arch, getattr(torch, variant.dtype), variant.head_dim, kind_of(variant))
    try:
        binary = ahead_of_time.compile_launch(launch, variant.arch)
    except Exception as error:  # A compiler that gives up is a finding, and the other variants go on.
        return {**row, "error": f"{type(error).__name__}: {error}"[:500]}
    row |= machine_code.usage(binary, variant.arch)._asdict() | {"may_spill": tile.spilled}
    loops = machine_code.loops_of(binary, variant.arch)
    if row["specialized"]:
        row["softmax"] = _counted(machine_code.softmax_loop(loops))
    return row | _counted(machine_code.hot_loop(loops))


def _counted(loop: machine_code.Loop) -> dict:
    """Return the number of a loop's instructions, of all and by unit."""
    return {"instructions": len(loop.opcodes), "units": dict(loop.units)}


def inspect_all(variants: list[Variant], jobs: int) -> Iterator[dict]:
    """Yield the rows of the variants, in the order in which they are done."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(inspect, variants)
