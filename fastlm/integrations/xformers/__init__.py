"""xformers' memory-efficient attention on fastlm, on every device that fastlm runs on.

    from fastlm.integrations.xformers.ops import LowerTriangularMask, memory_efficient_attention

    import fastlm.integrations.xformers
    fastlm.integrations.xformers.install()  # before the code that says ``import xformers.ops``
    fastlm.integrations.xformers.uninstall()

`install` puts it under the name ``xformers`` where that is not installed: ``xformers.ops``, ``xformers.ops.fmha`` and
``xformers.ops.fmha.attn_bias``. What fastlm has not (xformers' kernels by name, paged and gappy masks, SwiGLU, RMSNorm, …) is
an ImportError that names it.

diffusers asks for xformers when it is imported, so install first. Its ``XFormersAttnProcessor`` and its attention backend
"xformers" run on a CPU then; ``enable_xformers_memory_efficient_attention()`` raises there, as it asks for CUDA itself.
"""

from .. import stand_in
from .ops import memory_efficient_attention as memory_efficient_attention

_OPS = f"{__name__}.ops"
PACKAGE = stand_in.Package(
    distribution="xformers",
    version="0.0.35",
    modules={
        "xformers": None,
        "xformers.ops": _OPS,
        "xformers.ops.fmha": _OPS,
        "xformers.ops.fmha.attn_bias": f"{__name__}.attn_bias",
    },
)


def install() -> bool:
    """Let ``import xformers`` find this, and return whether it does: not where xformers is installed, which stays."""
    return stand_in.install(PACKAGE)


def uninstall() -> None:
    """Undo `install`."""
    stand_in.uninstall(PACKAGE)
