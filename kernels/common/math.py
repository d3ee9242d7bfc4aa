"""Elementary functions of csrc/common/math.h, with its constants, operations and order of operations, and so with its bits.

They consist of additions, multiplications and explicit fused multiply-adds. A launch tells the compiler to fuse nothing else
(launch.py). Numbers are float32, or float64 where a function says so.
"""

import triton
import triton.language as tl


def _constants(*numbers: str) -> tl.constexpr:
    """Return numbers in C's hexadecimal notation, which has every bit."""
    return tl.constexpr(tuple(map(float.fromhex, numbers)))


@triton.constexpr_function
def _length(constants) -> int:
    return len(constants)


# e^x is 0 below the first, -104 or -746, and inf above the second, 89 or 710; log2(e); the high and low part of log(2); adding
# and then subtracting the last rounds to the nearest integer.
EXPONENTIAL_32 = _constants("-0x68", "0x59", "0x1.715476p+0", "0x1.62e4p-1", "0x1.7f7d1cp-20", "0x1.8p+23")
EXPONENTIAL_64 = _constants(
    "-0x2ea", "0x2c6", "0x1.71547652b82fep+0", "0x1.62e42fefa0000p-1", "0x1.cf79abc9e3b3ap-40", "0x1.8p+52"
)  # fmt: skip

EXP_TAIL_32 = _constants("0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558f0p-5", "0x1.1239d4p-7", "0x1.6a247ep-10")
EXP_TAIL_64 = _constants(
    "0x1.000000000000ap-1", "0x1.55555555554fap-3", "0x1.555555555088bp-5", "0x1.1111111127b77p-7", "0x1.6c16c18426874p-10",
    "0x1.a01a012a73b36p-13", "0x1.a0199a1698f63p-16", "0x1.71df252768968p-19", "0x1.28ad68e98de0dp-22",
    "0x1.ad7f94af5cccbp-26",
)  # fmt: skip

EXPM1_MINUS_32 = _constants(
    "0x1p-1", "0x1.555554p-3", "0x1.555560p-5", "0x1.111180p-7", "0x1.6c117ap-10", "0x1.9ff35ep-13", "0x1.a2096ep-16",
    "0x1.72ab18p-19", "0x1.da3dbap-23", "0x1.97a49cp-25",
)  # fmt: skip
EXPM1_MINUS_64 = _constants(
    "0x1p-1", "0x1.5555555555555p-3", "0x1.5555555555555p-5", "0x1.1111111111102p-7", "0x1.6c16c16c16cabp-10",
    "0x1.a01a01a01b6c8p-13", "0x1.a01a01a00c3ebp-16", "0x1.71de3a5490b93p-19", "0x1.27e4fb819caa2p-22",
    "0x1.ae6456e234036p-26", "0x1.1eed87b31bfb9p-29", "0x1.61246c4eb89d6p-33", "0x1.939befa5c3f89p-37",
    "0x1.ae54e4375e376p-41", "0x1.adfd0cc7947b5p-45", "0x1.a5a9ffa62daeap-49", "0x1.f91c0d6671bb8p-54",
    "0x1.2c6ebf051125ap-56",
)  # fmt: skip

LOG_UNIT = _constants(
    "0x1.555554p-2", "-0x1.000228p-2", "0x1.99a00ap-3", "-0x1.547246p-3", "0x1.22d9f8p-3", "-0x1.0d8518p-3", "0x1.055c40p-3",
    "-0x1.38b852p-4",
)  # fmt: skip
SINE = _constants("0x1.921fb6p+0", "-0x1.4abbbap-1", "0x1.465e92p-4", "-0x1.2d9302p-8")  # sin(pi f/2) / f
COSINE = _constants("0x1p+0", "-0x1.3bd3ccp+0", "0x1.03c1dap-2", "-0x1.55c4eap-6", "0x1.d99f54p-11")  # cos(pi f/2)


@triton.jit
def constant(value, like):
    """Return a number as a scalar of the dtype of `like`. Older versions of Triton round numbers given to `fma` to float32."""
    return tl.full((), value, like.dtype)


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr):
    """Evaluate a polynomial by Horner's rule."""
    DEGREE: tl.constexpr = _length(COEFFICIENTS) - 1
    p = tl.full(x.shape, COEFFICIENTS[DEGREE], x.dtype)
    for k in tl.static_range(DEGREE - 1, -1, -1):
        p = tl.fma(p, x, tl.full((), COEFFICIENTS[k], x.dtype))
    return p


@triton.jit
def smaller(a, b):
    """Return the smaller number, and b if one is NaN."""
    return tl.where(a < b, a, b)


@triton.jit
def larger(a, b):
    """Return the larger number, and b if one is NaN."""
    return tl.where(a > b, a, b)


@triton.jit
def scale2(x, n):
    """Return x * 2^n, for n that is an integer.

    It multiplies in two steps of half the exponent, so that neither factor overflows or underflows, and only the last product
    rounds.
    """
    exponent = tl.where(n == n, n, 0.0).to(tl.int32)
    half = exponent >> 1
    if x.dtype == tl.float64:
        first = ((half + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        second = ((exponent - half + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        first = ((half + 127) << 23).to(tl.float32, bitcast=True)
        second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return x * first * second


@triton.jit
def exp(x):
    """Return e^x, float32 or float64, to about one ulp, also in the subnormal range."""
    E: tl.constexpr = EXPONENTIAL_64 if x.dtype == tl.float64 else EXPONENTIAL_32
    TAIL: tl.constexpr = EXP_TAIL_64 if x.dtype == tl.float64 else EXP_TAIL_32
    x = smaller(constant(E[1], x), larger(constant(E[0], x), x))
    to_integer = constant(E[5], x)
    n = tl.fma(x, constant(E[2], x), to_integer) - to_integer
    r = tl.fma(n, constant(-E[4], x), tl.fma(n, constant(-E[3], x), x))
    return scale2(tl.fma(r * r, horner(r, TAIL), r) + constant(1.0, x), n)


@triton.jit
def expm1(x, e):
    """Return (e^x - 1 - x, e^x - 1), given e = e^x, in float32 or float64 and without cancellation.

    The first is never negative. Both are series where e^x and 1 + x are close, and come from e elsewhere.
    """
    SERIES: tl.constexpr = EXPM1_MINUS_64 if x.dtype == tl.float64 else EXPM1_MINUS_32
    one = constant(1.0, x)
    near = x * x * horner(x, SERIES)
    far = e - (one + smaller(constant(1e30, x), x))  # capped, so that x = inf gives inf, not inf - inf
    off_centre = x - constant(0.75, x)
    distance = larger(constant(0.0, x) - off_centre, off_centre)
    is_near = distance < constant(1.75, x)
    return tl.where(is_near, near, far), tl.where(is_near, x + near, e - one)


@triton.jit
def log_unit(u):
    """Return log(u) for 2^-126 <= u <= 1 to about one ulp; that of 1 is exactly 0.

    With u = 2^e m and m in [sqrt(1/2), sqrt(2)): log(u) = e log(2) + f - f^2/2 + f^3 L(f), f = m - 1.
    """
    ONE: tl.constexpr = 0x3F800000
    SQRT_HALF: tl.constexpr = 0x3F3504F3
    bits = u.to(tl.uint32, bitcast=True)
    biased = (bits + (ONE - SQRT_HALF)) >> 23
    e = biased.to(tl.float32) - 127.0
    f = (bits - (biased << 23) + ONE).to(tl.float32, bitcast=True) - 1.0
    tail = tl.fma(f * f, tl.fma(f, horner(f, LOG_UNIT), constant(-0.5, f)), e * constant(EXPONENTIAL_32[4], f))
    return tl.fma(e, constant(EXPONENTIAL_32[3], f), f + tail)


@triton.jit
def sincos_turn(t):
    """Return the sine and the cosine of 2 pi t for 0 <= t <= 1.

    It subtracts the nearest quarter turn exactly; the rest is at most 1/8 turn.
    """
    to_integer, four = constant(EXPONENTIAL_32[5], t), constant(4.0, t)
    shifted = tl.fma(t, four, to_integer)
    quarter = shifted.to(tl.uint32, bitcast=True)  # its low bits count the quarter turns
    f = tl.fma(t, four, to_integer - shifted)
    square = f * f
    s, c = f * horner(square, SINE), horner(square, COSINE)
    odd = (quarter & 1) != 0
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    return sine.to(tl.float32, bitcast=True), cosine.to(tl.float32, bitcast=True)
