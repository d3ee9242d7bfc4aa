"""Test the interpreter of PTX (tests/support/ptx) on kernels of a few instructions, written by hand."""

import pytest
import torch
from support.ptx.handwritten import run
from support.ptx.interpreter import Fault

from fastlm.testing import seeded_normal

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
    "and.b32 %r4, %r1, 1;\nbrx.idx %r4, targets;\n$one:\nmov.b32 %r4, 7;\n$zero:": 7 * (A & 1),
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
    "redux.sync.max.f32 %r4, %r2, -1;": torch.full((32,), Y.nan_to_num(-torch.inf).max().item()),
    "neg.f32 %r4, %r1;\nabs.f32 %r4, %r4;\nneg.f32 %r4, %r4;\nredux.sync.max.f32 %r4, %r4, -1;": -X.abs().min().expand(32),
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


@pytest.mark.parametrize("seed", range(5))
def test_a_warp_waits_for_registers_that_others_give_back(seed):
    body = "setp.lt.u32 %p1, %r0, 64;\n@%p1 bra $take;\nsetmaxnreg.dec.sync.aligned.u32 {};\nbra $out;\n$take:\n"
    body += "setmaxnreg.inc.sync.aligned.u32 232;\n$out:"
    run(body.format(24), NOTHING, threads=128, seed=seed)
    with pytest.raises(Fault, match="deadlock: there are never enough registers"):
        run(body.format(32), NOTHING, threads=128, seed=seed)


def test_two_blocks_that_store_the_same_element_are_a_race():
    with pytest.raises(Fault, match="block 1, line .*: race with another block's store"):
        run("st.global.b64 [%d5], %d6;", NOTHING[:32], grid=2)


def test_operands_that_nobody_declared_are_refused():
    with pytest.raises(ValueError, match="unknown operand %x1"):
        run("mov.b32 %r1, %x1;", NOTHING[:32])


ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"


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
        (f"{ALLOC} [0], 48;", "an allocation of 48 columns"),
        (f"{ALLOC} [0], 512;\n{ALLOC} [0], 32;", "deadlock: there are too few columns"),
        (f"tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n{ALLOC} [0], 32;", "after the permit is relinquished"),
        (f"{ALLOC} [0], 64;\ntcgen05.dealloc.cta_group::1.sync.aligned.b32 448, 32;", "freed that was not allocated so"),
        (f"setp.eq.s32 %p1, %r0, 0;\n@%p1 {ALLOC} [0], 32;", "by some lanes of a warp"),
        ("frobnicate.b32 %r1, %r2;", "unknown instruction frobnicate"),
        ("add.carry.s32 %r1, %r2, %r3;", "unknown modifier carry"),
        ("add.s32 %r1, %r2, %r3, %r4;", "too many operands of add"),
    ],
)
def test_what_a_gpu_would_trap_at_is_a_fault(body, message):
    with pytest.raises(Fault, match=message):
        run(body, torch.zeros(32, 1, dtype=torch.int64))


# ---- the tensor core and its memory -----------------------------------------------------------------------------------------

ADDRESS, BARRIER, A_IMAGE, B_IMAGE = 0, 8, 1024, 1024 + 128 * 128  # Where they lie in shared memory.
ALLOCATE = f"""
    setp.lt.u32 %p1, %r0, 32;
    @%p1 {ALLOC} [{ADDRESS}], 128;
    setp.eq.s32 %p2, %r0, 0;
    @%p2 mbarrier.init.shared::cta.b64 [{BARRIER}], 1;
    bar.sync 0;
    ld.shared.b32 %r1, [{ADDRESS}];
    and.b32 %r2, %r0, 96;
    shl.b32 %r2, %r2, 16;
    add.s32 %r2, %r2, %r1;
"""  # %r1 is the address of 128 columns, %r2 that of the warp's lanes.
FREE = """
    bar.sync 0;
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 128;
"""
WAIT_FOR_LOADS, WAIT_FOR_STORES = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{r}" for r in range(first, first + count)) + "}"


def fours(instruction: str, first: int, count: int, offset: int = 0) -> str:
    """Return an instruction for each four of so many registers, and for 16 more bytes each."""
    return "\n".join(instruction.format(registers(first + w, 4), offset + 4 * w) for w in range(0, count, 4))


LOAD_ROW, STORE_RESULTS = "ld.global.v4.b32 {0}, [%d3+{1}];", "st.global.v4.b32 [%d5+{1}], {0};"
WORDS = torch.arange(128 * 8, dtype=torch.int32).view(128, 8)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("second", "lane", "column"), [(4, 0, 4), (16 << 16, 16, 0)])
def test_tensor_memory_is_read_in_halves(second, lane, column, late):
    """Store 8 columns of a warp's 32 lanes, and read 4 columns of 16 lanes and 4 columns of the same or other lanes."""
    body = f"""
        {ALLOCATE}
        {fours(LOAD_ROW, 10, 8)}
        tcgen05.st.sync.aligned.32x32b.x8.b32 [%r2 + 32], {registers(10, 8)};
        {WAIT_FOR_STORES}
        tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {registers(20, 4)}, [%r2 + 32], {second};
        {WAIT_FOR_LOADS}
        {fours(STORE_RESULTS, 20, 4)}
        {FREE}
    """
    results = run(body, WORDS, threads=128, each=2, late=late).view(torch.int32).view(4, 32, 4)  # (warp, lane, column)
    words = WORDS.view(4, 32, 8)
    expected = torch.cat([words[:, :16, :4], words[:, lane : lane + 16, column : column + 4]], 1)
    assert torch.equal(results, expected)


def test_what_is_read_before_the_wait_for_a_store_may_be_old():
    body = f"""
        {ALLOCATE}
        {fours(LOAD_ROW, 10, 8)}
        tcgen05.st.sync.aligned.32x32b.x8.b32 [%r2 + 0], {registers(10, 8)};
        tcgen05.ld.sync.aligned.32x32b.x8.b32 {registers(20, 8)}, [%r2 + 0];
        {WAIT_FOR_LOADS}
        {WAIT_FOR_STORES}
        {fours(STORE_RESULTS, 20, 8)}
        {FREE}
    """
    early, late = (run(body, WORDS, threads=128, each=4, late=late).view(torch.int32) for late in (False, True))
    assert torch.equal(early, WORDS.flatten())
    assert (late == -1).all()  # New columns are full of NaN.


def image(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of 64 halves in 128-byte swizzle: the 8 chunks of row r change places by r % 8."""
    places = torch.arange(8) ^ torch.arange(len(rows))[:, None] % 8  # (rows, 8)
    return rows.view(-1, 8, 8).gather(1, places[:, :, None].expand(-1, -1, 8)).view(-1, 64)


def descriptor(address: int) -> int:
    """Return the descriptor of an operand in 128-byte swizzle, whose cores of 8 rows follow each other."""
    return address >> 4 | (1024 >> 4) << 32 | 1 << 46 | 2 << 61


def product_of(m: int, transposed_b: bool, a_in_tensor_memory: bool) -> str:
    """Return the instructions for D (m, 64) = A (m, 64) B (64, 64), in bfloat16, 16 columns of A at a time, from one thread."""
    bits = 1 << 4 | 1 << 7 | 1 << 10 | transposed_b << 16 | 64 >> 3 << 17 | m >> 4 << 24
    lines = []
    for step in range(4):
        a = f"[%r1 + {64 + 8 * step}]" if a_in_tensor_memory else "%d7"
        lines += [
            f"mov.b64 %d7, {descriptor(A_IMAGE + step * 32)};",
            f"mov.b64 %d8, {descriptor(B_IMAGE + step * (16 * 128 if transposed_b else 32))};",
            f"setp.ne.s32 %p4, {step}, 0;",
            f"@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r1 + 0], {a}, %d8, {bits}, %p4;",
        ]
    return "\n".join(lines)


STORE_A = f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%r2 + 64], {registers(10, 32)};"
FENCE = "fence.proxy.async.shared::cta;"
COMMIT = f"@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [{BARRIER}];"
WAIT_FOR_PRODUCT = f"$wait:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [{BARRIER}], 0;\n@!%p3 bra $wait;"


def product_kernel(product: str) -> str:
    """Return a kernel whose threads have a row of A and one of B each, and write 64 columns of a lane of D."""
    return f"""
        {ALLOCATE}
        {fours(LOAD_ROW, 10, 64)}
        shl.b32 %r3, %r0, 7;
        {fours("st.shared.v4.b32 [%r3+{1}], {0};", 10, 32, A_IMAGE)}
        {fours("st.shared.v4.b32 [%r3+{1}], {0};", 42, 32, B_IMAGE)}
        {STORE_A}
        {WAIT_FOR_STORES}
        {FENCE}
        bar.sync 0;
        {product}
        {COMMIT}
        {WAIT_FOR_PRODUCT}
        tcgen05.ld.sync.aligned.32x32b.x64.b32 {registers(100, 64)}, [%r2 + 0];
        {WAIT_FOR_LOADS}
        {fours(STORE_RESULTS, 100, 64)}
        {FREE}
    """


def run_product(kernel: str, a: torch.Tensor, b: torch.Tensor, **options) -> torch.Tensor:
    """Return 64 columns of each lane; a is (128, 64), b (64, 64)."""
    rows = torch.cat([a, torch.cat([b, b])], 1)
    return run(kernel, rows, threads=128, shared=B_IMAGE + 128 * 128, each=32, **options).view(torch.float32).view(128, 64)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("a_in_tensor_memory", [False, True])
@pytest.mark.parametrize("m", [64, 128])
def test_product_of_the_tensor_core(m, a_in_tensor_memory, transposed_b, late):
    """64 rows take the first 16 lanes of each warp's 32."""
    a, b = (seeded_normal(seed, (rows, 64), torch.bfloat16) for seed, rows in enumerate((m, 64)))
    lanes = torch.arange(128).view(4, 32)[:, : m // 4].flatten()  # (m,): a row's lane.
    rows = torch.zeros(128, 64, dtype=torch.bfloat16)
    rows[lanes if a_in_tensor_memory else torch.arange(m)] = a if a_in_tensor_memory else image(a)
    results = run_product(product_kernel(product_of(m, transposed_b, a_in_tensor_memory)), rows, image(b), late=late)
    expected = a.float() @ (b if transposed_b else b.T).float()
    torch.testing.assert_close(results[lanes], expected, rtol=1e-5, atol=1e-5)


PRODUCTS = product_of(128, False, True)
TWO_WARPS = "and.b32 %r4, %r0, 95;\nsetp.eq.s32 %p5, %r4, 0;\n" + PRODUCTS.replace("%p2", "%p5")
KERNEL = product_kernel(PRODUCTS)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (WAIT_FOR_PRODUCT, "", "race: warp . reads column .* which the tensor core wrote"),
        (WAIT_FOR_LOADS, f"bar.sync 0;\n{PRODUCTS}", "race: the tensor core writes column .* which warp . read"),
        (f"{WAIT_FOR_STORES}\n", "\n", "race: the tensor core reads column .* which warp . wrote"),
        (f"bar.sync 0;\n        {PRODUCTS}", PRODUCTS, "race: (the tensor core|warp 0) reads .* which warp . wrote"),
        (KERNEL[KERNEL.index(WAIT_FOR_PRODUCT) : KERNEL.index(FREE)], "", "race: warp 0 writes .* which the tensor core wrote"),
        (FENCE, "", "the tensor core reads shared address .* wrote with no fence between proxies"),
        (COMMIT, "", "deadlock"),
        (", [%r2 + 0]", ", [%r2 + 448]", "out of bounds: access to column ... in lane . of tensor memory"),
        (", [%r2 + 0]", ", [%r1 + 0]", "a warp has no access to lane 0"),
        (FREE, "", "a block ends with tensor memory that it has not freed"),
        ("[%r1 + 0], [", "[%r1 + 1048576], [", "lanes of D that the tensor core has not"),
        ("@%p2 tcgen05.mma", "tcgen05.mma", "a product of more than one thread"),
        (PRODUCTS, TWO_WARPS, "products of two warps in no order"),
    ],
)
def test_faults_around_the_tensor_core(pattern, replacement, message, late):
    assert pattern in KERNEL
    a, b = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(Fault, match=message):
        run_product(KERNEL.replace(pattern, replacement), a, b, late=late)
