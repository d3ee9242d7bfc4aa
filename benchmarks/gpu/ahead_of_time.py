"""Compile launches for GPUs that are not at hand, with the settings and specializations that they would have there.

binary = compile_launch(launch, "sm_90")
binary.asm["cubin"]  # machine_code.py reads it.
"""

from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


def target_of(arch: str) -> GPUTarget:
    """Return Triton's target for an architecture, such as 'sm_90' or 'gfx942'."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 32 if arch.startswith(("gfx10", "gfx11", "gfx12")) else 64)


class BoundLaunch(NamedTuple):
    """A launch as Triton would compile it for a GPU."""

    source: ASTSource
    target: GPUTarget
    options: dict
    arguments: dict  # By name, for the names in source.signature; a tuple's signature is a tuple.


def bind_launch(launch, arch: str) -> BoundLaunch:
    """Specialize a launch (attention.Launch) for its arguments, whose tensors may be on any device, 'meta' included."""
    target = target_of(arch)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialization, options)
    return BoundLaunch(ASTSource(kernel, signature, constants, attributes), target, options.__dict__, bound)


def compile_launch(launch, arch: str):
    """Return the compiled kernel of a launch."""
    bound = bind_launch(launch, arch)
    return triton.compile(bound.source, target=bound.target, options=bound.options)
