"""Weights 2^x for GPUs on which exp2 limits the forward: multiply-adds, which take two numbers each, compute a quarter of them.

sm_100 multiplies matrices twice as fast as sm_90, and its unit for exponentials is no faster.
Source: FlashAttention-4, whose polynomial is shorter. This one has the precision of the unit.
"""

import struct

import triton
import triton.language as tl


def _float(number: float) -> str:
    """Return a float32 number as PTX writes it."""
    return "0f" + struct.pack(">f", number).hex()


def _twice(number: float) -> str:
    """Return a pair of equal numbers as PTX writes it."""
    return f"{{{_float(number)}, {_float(number)}}}"


# $0 to $7 become weights. Their scores are $8 to $15, with factors from $16 on and offsets from $24 on.
_EXPONENTS = [
    instruction
    for i in (0, 2, 4, 6)
    for instruction in (
        f"mov.b64 x, {{${8 + i}, ${9 + i}}}",
        f"mov.b64 y, {{${16 + i}, ${17 + i}}}",
        f"mov.b64 c, {{${24 + i}, ${25 + i}}}",
        "fma.rn.f32x2 x, x, y, c",
        f"mov.b64 {{${i}, ${i + 1}}}, x",
    )
]
_SIX_BY_THE_UNIT = [f"ex2.approx.ftz.f32 ${i}, ${i}" for i in range(6)]
# For the last two, 2^x = 2^n 2^f with n the integer nearest to x. The low bits of x + ROUND are n + 127, the exponent of 2^n.
# They are 0 from x = -127 down, and so is the weight. max.NaN keeps a NaN.
_ROUND, _LEAST = 1.5 * 2**23 + 127, -127.0
_SPLIT = [
    f"max.NaN.f32 low, $6, {_float(_LEAST)}",
    f"max.NaN.f32 high, $7, {_float(_LEAST)}",
    "mov.b64 x, {low, high}",
    f"mov.b64 c, {_twice(_ROUND)}",
    "add.rn.f32x2 n, x, c",
    "sub.rn.f32x2 f, n, c",
    "sub.rn.f32x2 f, x, f",
    "mov.b64 {low, high}, n",
    "shl.b32 low, low, 23",
    "shl.b32 high, high, 23",
    "mov.b64 n, {low, high}",
]
# A polynomial fitted to 2^f for |f| <= 1/2, with a relative error of 1.7e-7 in float32. The highest power comes first.
_HIGHEST, *_OTHERS = map(
    float.fromhex, ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p+0")
)
_POLYNOMIAL = [f"mov.b64 y, {_twice(_HIGHEST)}"]
for _coefficient in _OTHERS:
    _POLYNOMIAL += [f"mov.b64 c, {_twice(_coefficient)}", "fma.rn.f32x2 y, y, f, c"]
_PRODUCT = ["mul.rn.f32x2 y, y, n", "mov.b64 {$6, $7}, y"]
_REGISTERS = [".reg .b32 low, high", ".reg .b64 x, y, c, n, f"]
_INSTRUCTIONS = _REGISTERS + _EXPONENTS + _SIX_BY_THE_UNIT + _SPLIT + _POLYNOMIAL + _PRODUCT

WEIGHTS = tl.constexpr("{\n" + "".join(f"{instruction};\n" for instruction in _INSTRUCTIONS) + "}")
OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 24))


@triton.jit
def exp2_of_fma(x, factor, offset):
    """Return 2^(x * factor + offset) of a float32 tile.

    Which elements are polynomials depends on the layout of the tile alone, and so not on the batch.
    """
    return tl.inline_asm_elementwise(WEIGHTS, OPERANDS, [x, factor, offset], dtype=tl.float32, is_pure=True, pack=8)
