"""Put fastlm's functions under the name ``flash_attn`` where that is not installed, for code that imports it.

A finder in ``sys.meta_path`` answers to imports of flash_attn and to importlib.metadata. That is enough for code that asks no
more. transformers asks for a GPU too: its question is_flash_attn_2_available gets a function of ours, under every name that a
module has for it, and its table of devices a row for CPUs. diffusers decides at its own import, so that its switch is set where
it has been imported before. `uninstall` undoes all of it.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module, util
from types import ModuleType

import torch
from torch import Tensor, nn

from ...nn.entry_points import EntryPoints
from .. import stand_in
from ..extras import require

VERSION = "2.8.3"  # whose functions these are
PARTS = ("bert_padding", "flash_attn_interface", "layers", "layers.rotary", "modules", "modules.mha")

PACKAGE = stand_in.Package(
    distribution="flash-attn",
    version=f"{VERSION}+fastlm",
    modules={"flash_attn": __package__} | {f"flash_attn.{part}": f"{__package__}.{part}" for part in PARTS},
)
_lock = threading.Lock()


def install() -> bool:
    """Let ``import flash_attn`` give fastlm's functions, and the libraries that ask for it find it, on a CPU too.

    Then ``attn_implementation="flash_attention_2"`` of transformers, the "flash" backend of diffusers, and remote code that
    imports flash_attn run on fastlm, whether these libraries were imported before or are imported later. transformers is
    imported here, if it is installed. Parts of flash_attn that fastlm lacks (ops, losses, models, …) raise ImportError.

    Returns:
        Whether the name is fastlm's: False if a flash_attn is installed, which is never replaced.

    Warns:
        UserWarning: the installed transformers is too old to be told, and will not find flash_attn on a CPU.
    """
    with _lock:
        if stand_in.is_installed(PACKAGE):
            return True
        if not stand_in.install(PACKAGE):
            return False
        if util.find_spec("transformers") is not None:
            try:
                require("transformers")
            except ImportError as error:
                warnings.warn(f"flash_attention_2 is not offered to transformers: {error}", stacklevel=2)
            else:
                _transformers.put_in()
        _set_in_diffusers(True)
        return True


def uninstall() -> None:
    """Undo `install`: transformers and diffusers find no flash_attn, and ``import flash_attn`` fails again."""
    with _lock:
        if stand_in.is_installed(PACKAGE):
            stand_in.uninstall(PACKAGE)
            _transformers.take_out()
            _set_in_diffusers(False)


# ---- transformers -----------------------------------------------------------------------------------------------------------


def is_flash_attn_2_available(kernels_fallback_ok: bool = False) -> bool:
    """Answer transformers, in the place of its function, which looks for a GPU."""
    return True


def _cast_without_linear(theirs: Callable) -> Callable:
    """Return transformers' answer what to cast float32 queries to, also for modules without the Linear that it looks for."""

    @functools.wraps(theirs)
    def get_target_dtype(query: Tensor, module: nn.Module) -> torch.dtype | None:
        try:
            return theirs(query, module)
        except StopIteration:  # GPT-2 has Conv1D.
            return next(module.parameters()).dtype

    return get_target_dtype


def _always() -> bool:
    return True


class _Transformers:
    """Let transformers offer flash_attention_2 on any device, from `put_in` to `take_out`."""

    def __init__(self) -> None:
        self._names: EntryPoints | None = None
        self._row: dict = {}  # of the table of versions, as it was
        self._late: list[ModuleType] = []  # modules of models that were imported without flash_attn

    def put_in(self) -> None:
        utils, flash = _modules_of_transformers()
        if self._names is None:
            cast = import_module("transformers.integrations.flash_attention").get_target_dtype
            pairs = (utils.is_flash_attn_2_available, is_flash_attn_2_available), (cast, _cast_without_linear(cast))
            self._names = EntryPoints(pairs, skipped=(__name__,))
        _forget_answers(utils)
        self._names.put_in()
        row = flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        self._row = dict(row)
        row["general_availability_check"] = is_flash_attn_2_available
        row["supported_devices"] = (*row["supported_devices"], (_always, "cpu"))
        for module in list(sys.modules.values()):
            if _imports_if_available(module):
                module._flash_attention_forward = flash._flash_attention_forward
                self._late.append(module)

    def take_out(self) -> None:
        if not self._row:
            return
        utils, flash = _modules_of_transformers()
        self._names.take_out()
        flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2].update(self._row)
        self._row = {}
        while self._late:
            del self._late.pop()._flash_attention_forward
        if flash._loaded_implementation == "flash_attention_2":
            for name in _LOADED:
                setattr(flash, name, None)
        _forget_answers(utils)


# What modeling_flash_attention_utils keeps of the implementation that it has loaded.
_LOADED = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn")
_LOADED += ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn")

_transformers = _Transformers()


def _modules_of_transformers() -> tuple[ModuleType, ModuleType]:
    names = "utils.import_utils", "modeling_flash_attention_utils"
    return tuple(import_module(f"transformers.{name}") for name in names)


def _forget_answers(utils: ModuleType) -> None:
    """Clear the caches of what transformers has found out about flash_attn."""
    for name in ("_package_distribution_mapping", "is_flash_attn_greater_or_equal"):
        getattr(utils, name).cache_clear()


def _imports_if_available(module: ModuleType) -> bool:
    """Tell whether a module of a model imported transformers' function only if there was a flash_attn, and there was none."""
    names = vars(module) if getattr(module, "__name__", "").startswith("transformers.models.") else {}
    return "is_flash_attn_available" in names and "_flash_attention_forward" not in names


# ---- diffusers --------------------------------------------------------------------------------------------------------------


def _set_in_diffusers(available: bool) -> None:
    """Set what diffusers' modules found out about flash_attn when they were imported, if they were."""
    found = sys.modules.get("diffusers.utils.import_utils")
    if found is not None:
        found._flash_attn_available = available
        found._flash_attn_version = f"{VERSION}+fastlm" if available else "N/A"
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        dispatch._CAN_USE_FLASH_ATTN = available
        interface = import_module(f"{__package__}.flash_attn_interface")
        for name in _NAMES_IN_DIFFUSERS:
            setattr(dispatch, name, getattr(interface, name) if available else None)


_NAMES_IN_DIFFUSERS = (
    "flash_attn_func",
    "flash_attn_varlen_func",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
)
