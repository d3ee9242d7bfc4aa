"""Test the interpreter of PTX (tests/support/ptx) on kernels of a few instructions, written by hand."""

import numpy as np
import pytest
import torch
from support.ptx.interpreter import Fault, interpret
from support.ptx.program import Program

HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<99>;
    .reg .b64 %d<9>;
    ld.param.b64 %d0, [kernel_param_0];
    ld.param.b64 %d1, [kernel_param_1];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d2, %r0, {stride};
    add.s64 %d3, %d0, %d2;
    mul.wide.u32 %d4, %r0, 8;
    add.s64 %d5, %d1, %d4;
{body}
    ret;
}}
"""


def run(body: str, inputs: torch.Tensor, threads: int = 32, grid: int = 1, shared: int = 1024, **options) -> torch.Tensor:
    """Run a kernel. Thread t of a block has its row of the inputs at [%d3] and its element of the int64 results at [%d5]."""
    results = torch.full((threads,), -1, dtype=torch.int64)
    program = Program(HEADER.format(threads=threads, stride=inputs.element_size() * inputs[0].numel(), body=body))
    tensors = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in (inputs, results)]
    parameters = np.array([address for address, _ in tensors], np.uint64).tobytes()
    interpret(program, grid, shared, parameters, tensors, **options)
    return results


# ---- a lane by itself -------------------------------------------------------------------------------------------------------

A, B, C = (torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(seed)) for seed in range(3))
UNSIGNED_A, UNSIGNED_B = A % 2**32, B % 2**32


def word(value: torch.Tensor) -> torch.Tensor:
    """Return the low 32 bits."""
    return value % 2**32


INTEGERS = {
    "add.s32 %r4, %r1, %r2;": word(A + B),
    "sub.s32 %r4, %r1, %r2;": word(A - B),
    "mul.lo.s32 %r4, %r1, %r2;": word(A * B),
    "mul.hi.s32 %r4, %r1, %r2;": word(A * B >> 32),
    "mad.lo.s32 %r4, %r1, %r2, %r3;": word(A * B + C),
    "div.s32 %r4, %r1, %r2;": word(torch.div(A, B, rounding_mode="trunc")),
    "rem.s32 %r4, %r1, %r2;": word(torch.fmod(A, B)),
    "div.u32 %r4, %r1, %r2;": UNSIGNED_A // UNSIGNED_B,
    "min.s32 %r4, %r1, %r2;": word(torch.minimum(A, B)),
    "max.u32 %r4, %r1, %r2;": torch.maximum(UNSIGNED_A, UNSIGNED_B),
    "min.relu.s32 %r4, %r1, %r2;": torch.minimum(A, B).clamp(min=0),
    "neg.s32 %r4, %r1;": word(-A),
    "abs.s32 %r4, %r1;": A.abs(),
    "not.b32 %r4, %r1;": word(~A),
    "xor.b32 %r4, %r1, %r2;": word(A ^ B),
    "lop3.b32 %r4, %r1, %r2, %r3, 0xCA;": word((A & B) | (~A & C)),
    "shl.b32 %r4, %r1, 7;": word(A << 7),
    "shl.b32 %r4, %r1, 40;": torch.zeros_like(A),
    "shr.s32 %r4, %r1, 7;": word(A >> 7),
    "shr.u32 %r4, %r1, 7;": UNSIGNED_A >> 7,
    "bfe.u32 %r4, %r1, 3, 9;": UNSIGNED_A >> 3 & 511,
    "bfe.s32 %r4, %r1, 28, 9;": word(A >> 28),
    "prmt.b32 %r4, %r1, %r2, 0x5410U;": word((UNSIGNED_A & 0xFFFF) | UNSIGNED_B << 16),
    "popc.b32 %r4, %r1;": torch.tensor([value.bit_count() for value in UNSIGNED_A.tolist()]),
    "setp.lt.s32 %p1, %r1, %r2;\nselp.b32 %r4, 1, 0, %p1;": (A < B).long(),
    "setp.lo.u32 %p1, %r1, %r2;\nselp.b32 %r4, 1, 0, %p1;": (UNSIGNED_A < UNSIGNED_B).long(),
    "setp.ge.s32 %p1, %r1, 0;\nsetp.lt.and.s32 %p2, %r2, 0, %p1;\nselp.b32 %r4, 1, 0, %p2;": ((A >= 0) & (B < 0)).long(),
    "mov.b32 {%h1, %h2}, %r1;\nmov.b32 %r4, {%h2, %h1};": word(UNSIGNED_A >> 16 | UNSIGNED_A << 16),
    "mov.b32 %r4, 5;\nsetp.ge.s32 %p1, %r1, 0;\n@%p1 bra $over;\nmov.b32 %r4, 6;\n$over:": 5 + (A < 0).long(),
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction):
    body = f"ld.global.v4.b32 {{%r1, %r2, %r3, %r9}}, [%d3];\n{instruction}\ncvt.u64.u32 %d6, %r4;\nst.global.b64 [%d5], %d6;"
    assert torch.equal(run(body, torch.stack([A, B, C, C], 1).int()), INTEGERS[instruction])


X, Y, Z = (torch.randn(32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
Y[3] = torch.nan

FLOATS = {
    "add.rn.f32 %r4, %r1, %r2;": X + Y,
    "fma.rn.f32 %r4, %r1, %r2, %r3;": (X.double() * Y.double() + Z.double()).float(),
    "cvt.rn.bf16.f32 %h1, %r1;\nadd.rn.f32.bf16 %r4, %h1, %r3;": X.bfloat16().float() + Z,
    "div.full.f32 %r4, %r1, %r2;": X / Y,
    "max.f32 %r4, %r1, %r2;": torch.fmax(X, Y),
    "max.NaN.f32 %r4, %r1, %r2;": torch.maximum(X, Y),
    "max.f32 %r4, %r1, %r2, %r3;": torch.fmax(torch.fmax(X, Y), Z),
    "ex2.approx.ftz.f32 %r4, %r1;": torch.exp2(X),
    "abs.f32 %r4, %r1;": X.abs(),
    "copysign.f32 %r4, %r1, %r2;": torch.copysign(Y, X),
    "cvt.rni.f32.f32 %r4, %r1;": X.round(),
    "cvt.rzi.s32.f32 %r5, %r1;\ncvt.rn.f32.s32 %r4, %r5;": X.trunc() + 0.0,
    "cvt.rn.f16.f32 %h1, %r1;\ncvt.f32.f16 %r4, %h1;": X.half().float(),
    "cvt.rn.bf16x2.f32 %r5, %r2, %r1;\nmov.b32 {%h1, %h2}, %r5;\ncvt.f32.bf16 %r4, %h2;": Y.bfloat16().float(),
    "cvt.rn.f16x2.f32 %r5, %r3, %r1;\nmul.f16x2 %r5, %r5, %r5;\nmov.b32 {%h1, %h2}, %r5;\ncvt.f32.f16 %r4, %h1;": (
        X.half() * X.half()
    ).float(),
    "mov.b64 %d6, {%r1, %r3};\nfma.rn.f32x2 %d7, %d6, %d6, %d6;\nmov.b64 {%r5, %r4}, %d7;": (
        Z.double() * Z.double() + Z.double()
    ).float(),
    "setp.neu.f32 %p1, %r2, %r2;\nselp.f32 %r4, 0f3F800000, 0f00000000, %p1;": Y.isnan().float(),
    "setp.lt.f32 %p1, %r1, %r2;\nselp.f32 %r4, 0f3F800000, 0f00000000, %p1;": (X < Y).float(),
    "shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;": X.view(16, 2).flip(1).flatten(),
    "shfl.sync.up.b32 %r4|%p1, %r1, 1, 0, -1;\n@!%p1 mov.b32 %r4, 0f00000000;": torch.cat([torch.zeros(1), X[:-1]]),
}


@pytest.mark.parametrize("instruction", FLOATS)
def test_floats(instruction):
    body = f"ld.global.v4.b32 {{%r1, %r2, %r3, %r9}}, [%d3];\n{instruction}\ncvt.u64.u32 %d6, %r4;\nst.global.b64 [%d5], %d6;"
    results = run(body, torch.stack([X, Y, Z, Z], 1)).int().view(torch.float32)
    torch.testing.assert_close(results, FLOATS[instruction], rtol=2e-7, atol=0, equal_nan=True)


# ---- matrices ---------------------------------------------------------------------------------------------------------------

PRODUCT = """
    mov.b32 %r20, smem;
    shl.b32 %r21, %r0, 4;
    add.s32 %r22, %r20, %r21;
    cp.async.cg.shared.global [%r22+0], [%d3+0], 16, 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r22];
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r5, %r6, %r7, %r8}, [%r22];
    mov.b32 %r9, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {%r10, %r11, %r12, %r13}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r9, %r9, %r9, %r9};
    mov.b64 %d6, {%r10, %r13};
    st.global.b64 [%d5], %d6;
""".replace("f32\n", "f32")  # An instruction is one line.


@pytest.mark.parametrize("late", [False, True])
def test_product_of_fragments(late):
    """Four matrices (8, 8) are A (16, 16), by columns of matrices; two of them are B (16, 8), transposed by the load."""
    matrices = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    results = run(PRODUCT, matrices.view(32, 8), late=late).view(torch.float32).view(8, 4, 2)  # (row, pair of columns, which)
    a = torch.cat([torch.cat([matrices[0], matrices[1]]), torch.cat([matrices[2], matrices[3]])], 1).float()  # (16, 16)
    product = a @ torch.cat([matrices[0], matrices[1]]).float()  # (16, 8)
    expected = torch.stack([product[:8, ::2], product[8:, 1::2]], 2)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


# ---- warps that wait for each other -----------------------------------------------------------------------------------------

REVERSE = """
    shl.b32 %r1, %r0, 2;
    st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r2, %r1, 508;
    ld.shared.b32 %r3, [%r2];
    cvt.u64.u32 %d6, %r3;
    st.global.b64 [%d5], %d6;
"""
NOTHING = torch.zeros(128, 1, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(5))
def test_a_barrier_orders_warps(seed):
    results = run(REVERSE.format(barrier="bar.sync 0;"), NOTHING, threads=128, seed=seed)
    assert torch.equal(results, torch.arange(127, -1, -1))


@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_is_a_race(seed):
    with pytest.raises(Fault, match="race: warp . (reads|writes) shared address"):
        run(REVERSE.format(barrier=""), NOTHING, threads=128, seed=seed)


def test_a_barrier_that_a_warp_leaves_out_is_a_deadlock():
    body = "setp.lt.s32 %p1, %r0, 32;\n@%p1 bra $out;\nbar.sync 0;\n$out:"
    with pytest.raises(Fault, match="deadlock"):
        run(body, NOTHING, threads=128)


def test_two_blocks_that_store_the_same_element_are_a_race():
    with pytest.raises(Fault, match="block 1, line .*: race with another block's store"):
        run("st.global.b64 [%d5], %d6;", NOTHING[:32], grid=2)


def test_operands_that_nobody_declared_are_refused():
    with pytest.raises(ValueError, match="unknown operand %x1"):
        run("mov.b32 %r1, %x1;", NOTHING[:32])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b64 [%d5+256], %d6;", "out of bounds: access of 8 bytes to global"),
        ("ld.global.b32 %r1, [%d3+-4];", "out of bounds: access of 4 bytes to global"),
        ("ld.shared.b32 %r1, [smem+1024];", "out of bounds: access of 4 bytes to shared"),
        ("ld.shared.b32 %r1, [smem+-4];", "out of bounds: access of 4 bytes to shared"),
        ("ld.global.b64 %d6, [%d3+4];", "misaligned access of 8 bytes"),
        ("mov.b32 %r1, 0;\nrem.s32 %r2, %r0, %r1;", "integer division by zero"),
        ("setp.eq.s32 %p1, %r0, 0;\n@%p1 bar.sync 0;", "a barrier for some lanes"),
        ("frobnicate.b32 %r1, %r2;", "unknown instruction frobnicate"),
        ("add.carry.s32 %r1, %r2, %r3;", "unknown modifier carry"),
        ("add.s32 %r1, %r2, %r3, %r4;", "too many operands of add"),
    ],
)
def test_what_a_gpu_would_trap_at_is_a_fault(body, message):
    with pytest.raises(Fault, match=message):
        run(body, torch.zeros(32, 1, dtype=torch.int64))
