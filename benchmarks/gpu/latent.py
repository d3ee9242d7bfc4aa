"""The Triton kernels of the latent and the noise, compiled for GPUs that are not here: what they take, and every option.

Nothing here runs on a GPU, and no figure is a measurement.
"""

import itertools
import math
from typing import NamedTuple

import torch
from fastlm.kernels import latent, noise
from fastlm.kernels.common.launch import Launch
from torch import Tensor

from gpu import ahead_of_time, machine_code
from gpu.variants import GPUS

PASSES = ("forward", "backward")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("plain", "everything", "long rows")


class LatentVariant(NamedTuple):
    """One compilation of a pass."""

    arch: str
    pass_name: str  # one of PASSES
    dtype: str
    kind: str  # one of KINDS


def every_variant() -> list[LatentVariant]:
    return [LatentVariant(*variant) for variant in itertools.product(GPUS, PASSES, DTYPES, KINDS)]


def covering_variants() -> list[LatentVariant]:
    """Return each pass for every GPU; dtypes and kinds take turns."""
    turns = itertools.cycle(itertools.product(KINDS, DTYPES))
    return [LatentVariant(arch, name, *next(turns)[::-1]) for arch, name in itertools.product(GPUS, PASSES)]


def _tensor(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lanes(arch: str) -> int:
    return ahead_of_time.target_of(arch).warp_size


def _plan(
    arch: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    chunk: bool = False,
    priors: tuple[Tensor | None, Tensor | None] = (None, None),
    seeds: bool = False,
    samples: tuple[int, int, int] = (0, 0, 0),
    event_dims: int = 1,
    outputs: str = "z and kl",
) -> list[Launch]:
    """Return the launches of forward and backward of a call; with `chunk`, mu and logvar are halves of one tensor."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    mu = logvar = _tensor(*shape, dtype=dtype)
    if chunk:
        mu, logvar = _tensor(*shape[:-1], 2 * shape[-1], dtype=dtype).chunk(2, -1)
    priors = tuple(None if prior is None else prior.expand(shape) for prior in priors)
    grads = [None if prior is None else _tensor(*shape, dtype=prior.dtype) for prior in priors]
    z = _tensor(*((samples[0],) if samples[0] else ()), *shape, dtype=dtype) if "z" in outputs else None
    kl = _tensor(*shape[: len(shape) - event_dims], dtype=accumulator) if "kl" in outputs else None
    seed = _tensor(*(shape[:1] if seeds else ()), dtype=torch.int64) if z is not None else None
    tensors, own = (mu, logvar, *priors), _tensor(*shape, dtype=dtype)
    options = latent.Options(seed, event_dims, samples, (0.1, -math.inf, math.inf, 1.0), _lanes(arch))
    forward = latent.plan_forward(tensors, z, kl, options)
    return forward + latent.plan_backward(tensors, z, kl, (own, own, *grads), options)


def _launches_of(variant: LatentVariant) -> list[Launch]:
    dtype = getattr(torch, variant.dtype)
    if variant.kind == "plain":
        launches = _plan(variant.arch, (4096, 64), dtype)
    elif variant.kind == "long rows":
        launches = _plan(variant.arch, (64, 4099), dtype, chunk=True)
    else:
        priors = _tensor(513, 37, dtype=dtype), _tensor(37, dtype=dtype)
        launches = _plan(variant.arch, (513, 37), dtype, chunk=True, priors=priors, seeds=True, samples=(3, 0, 0))
    return launches[-1:] if variant.pass_name == "backward" else launches[:-1]


def inspect(variant: LatentVariant) -> dict:
    """Compile a variant; return what the kernel that takes most takes, and how many loads of the pass have 16 bytes."""
    try:
        binaries = [ahead_of_time.compile_launch(launch, variant.arch) for launch in _launches_of(variant)]
    except Exception as error:  # A compiler that gives up is a finding, and the other variants go on.
        return {**variant._asdict(), "error": f"{type(error).__name__}: {error}"[:500]}
    usages = [machine_code.usage(binary, variant.arch) for binary in binaries]
    most = {name: max(getattr(usage, name) for usage in usages) for name in usages[0]._fields}
    return {**variant._asdict(), **most, "wide_loads": machine_code.wide_loads(binaries[0], variant.arch)}


def features(arch: str) -> dict[str, list[Launch]]:
    """Return the launches of calls that between them have every option, and of the smallest calls.

    The compiler makes a constant of an argument that is 1, and leaves out what is None; the interpreter knows neither.
    """
    of_one = _tensor(1), _tensor(1)
    out, seed = _tensor(5), _tensor(dtype=torch.int64)
    return {
        "one of each": _plan(arch, (1,), priors=of_one),
        "no dimension": _plan(arch, (), event_dims=0),
        "one of each, a sample": _plan(arch, (1, 1), seeds=True, samples=(1, 1, 1), event_dims=2),
        "an element for each seed": _plan(arch, (7, 1), seeds=True, samples=(2, 0, 0)),
        "a part": _plan(arch, (9, 64), samples=(3, 128, 4096), chunk=True),
        "a part at any element": _plan(arch, (9, 7), samples=(3, 5, 701)),
        "the KL alone": _plan(arch, (9, 48), priors=(None, _tensor(48, dtype=torch.float64)), outputs="kl"),
        "the KL of elements": _plan(arch, (9, 48), torch.bfloat16, event_dims=0, outputs="kl"),
        "z alone": _plan(arch, (9, 48), torch.float16, outputs="z"),
        "a row as long as a tile": _plan(arch, (3, latent.TILE), seeds=True, priors=(_tensor(3, 1), None)),
        "rows that begin anywhere": _plan(arch, (3, 700, 3), event_dims=2, chunk=True),
        "the noise": noise.plan_normal(seed, 0, out) + noise.plan_normal(seed, 2**40 + 1, out),
    }
