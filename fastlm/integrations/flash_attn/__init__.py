"""flash_attn's functions on fastlm's kernels, with its names, signatures, layouts and defaults.

    from fastlm.integrations.flash_attn import flash_attn_func  # in the place of `from flash_attn import flash_attn_func`
    from fastlm.integrations.flash_attn.bert_padding import pad_input, unpad_input

    import fastlm.integrations.flash_attn

    fastlm.integrations.flash_attn.install()  # for code that imports flash_attn itself: transformers, diffusers, remote code

They run wherever fastlm does, on CPUs too, in float32 too. flash_attn's ``ops``, ``losses``, ``models`` and ``utils`` are not
here.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .installation import VERSION as __version__
from .installation import install, uninstall

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
