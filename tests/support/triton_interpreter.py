"""Teach Triton's interpreter bfloat16: its own `dot` multiplies bit patterns, and its conversion truncates where a GPU rounds.
It also gets several times as fast: what it makes or looks up anew at each step, and it is always the same, is kept.

An import of this module, before any kernel is imported, turns the interpreter on if there is no GPU. The interpreter computes
whole tiles in NumPy, so it does not show layouts, races between threads, and TF32.
"""

import dataclasses
import functools
import os

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _convert_float, _create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def _to_float32(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _to_bfloat16(numbers: np.ndarray) -> np.ndarray:
        """Round numbers to the nearest, ties to even; NaN stays NaN."""
        bits = np.ascontiguousarray(numbers).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)

    def _convert(numbers, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(numbers)
        if source == tl.bfloat16 and target == tl.float32:
            return _to_float32(numbers)
        return _convert_float(numbers, source, target, rounding)

    def _dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_to_float32(x.data), tl.float32) for x in (a, b))
        return _create_dot(self, a, b, d, *rest)

    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot

    # ---- speed ----------------------------------------------------------------------------------------------------------

    _patch_lang, _get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    _init_tensor, _init_block_type = tl.tensor.__init__, tl.block_type.__init__
    _unwrap, _is_dtype = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    _PLAIN = {int, bool, float, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}

    @functools.cache
    def _languages_of(function) -> list:
        """Return what of Triton's language a function's module has imported."""
        return [value for value in function.__globals__.values() if value in (tl, tl.core)]

    def _patch_once(function) -> object:
        """Make ready what a function uses of Triton's language, unless it is: the interpreter does it at every call."""
        used = _languages_of(function)
        return _patch_lang(function) if any(map(_is_compiled, used)) else interpreter._LangPatchScope()

    def _is_compiled(language) -> bool:
        return tl.core.is_builtin(language.load)

    _np_dtypes, _blocks, _shapes = {}, {}, {}

    def _np_dtype(dtype: tl.dtype) -> np.dtype:
        if dtype.name not in _np_dtypes:
            _np_dtypes[dtype.name] = _get_np_dtype(dtype)
        return _np_dtypes[dtype.name]

    def _init_block_type_once(self, element_ty: tl.dtype, shape) -> None:
        """Take a block's attributes from the first of its dtype and shape. Pointers differ in more than their names."""
        if element_ty.is_ptr():
            return _init_block_type(self, element_ty, shape)
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in _blocks:
            _init_block_type(self, element_ty, shape)
            _blocks[key] = vars(self).copy()
        vars(self).update(_blocks[key])

    def _init_tensor_once(self, handle, type: tl.dtype) -> None:
        """Take what follows from a tensor's shape from the first tensor of it."""
        key = tuple(type.shape) if type.is_block() else ()
        if key not in _shapes:
            _init_tensor(self, handle, type)
            _shapes[key] = vars(self).copy()
        vars(self).update(_shapes[key], handle=handle, type=type, dtype=type.scalar)

    def _unwrap_if_constexpr(value):
        """Return a constant's value, and what holds no constants as it is."""
        return value.value if type(value) is tl.constexpr else value if type(value) in _PLAIN else _unwrap(value)

    interpreter._patch_lang, interpreter._get_np_dtype = _patch_once, _np_dtype
    tl.core._unwrap_if_constexpr = _unwrap_if_constexpr
    tl.dtype.__eq__ = lambda self, other: self is other or _is_dtype(self, other)
    tl.block_type.__init__, tl.tensor.__init__ = _init_block_type_once, _init_tensor_once

    # The interpreter looks for overflows, and says nothing of them, unless a kernel is debugged.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
