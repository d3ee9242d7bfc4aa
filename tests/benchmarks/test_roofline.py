"""Test the predictions for GPUs on made-up kernels: how many programs fit, and what share of the peak that lets expect."""

import pytest

pytest.importorskip("triton", reason="the Triton kernels need Triton")

from gpu.occupancy import programs_at_once  # noqa: E402
from gpu.roofline import predict  # noqa: E402


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "columns", "programs"),
    [
        ("sm_90", 128, 128, 0, 0, 4),  # registers
        ("sm_90", 128, 129, 0, 0, 3),  # A thread is given 136.
        ("sm_90", 256, 255, 0, 0, 1),
        ("sm_90", 128, 32, 75 << 10, 0, 3),  # shared memory
        ("sm_90", 128, 32, 76 << 10, 0, 2),  # The system takes 1 KiB for each.
        ("sm_80", 256, 16, 0, 0, 8),  # threads
        ("sm_86", 256, 16, 0, 0, 6),
        ("sm_100", 256, 128, 0, 256, 2),  # tensor memory
        ("sm_100", 256, 128, 0, 512, 1),
        ("gfx942", 256, 256, 32 << 10, 0, 2),
        ("gfx942", 256, 257, 0, 0, 1),
        ("gfx942", 512, 512, 0, 0, 1),  # What does not fit at all is a finding of others.
    ],
)
def test_what_there_is_least_of_limits_the_programs(arch, threads, registers, shared, columns, programs):
    assert programs_at_once(arch, threads, registers, shared, columns) == programs


# Of 64 x 64 scores on sm_80 the products take 512 cycles, the exponentials as many, and the additions 256.
ROW = {"arch": "sm_80", "pass_name": "forward", "head_dim": 64, "q": 64, "k": 64, "num_warps": 4, "instructions": 300}
ROW |= {"units": {"tensor": 64, "exp": 64, "float": 128}, "registers": 255, "shared_bytes": 0}
ROW |= {"all_warps": 4, "tensor_columns": 0}


@pytest.mark.parametrize(("warps", "registers", "share"), [(8, 255, 0.4), (4, 255, 0.8), (4, 168, 1.0), (4, 64, 1.0)])
def test_programs_side_by_side_share_the_units(warps, registers, share):
    """Eight warps at 255 registers are one program, whose units work in turn; of four warps there are two programs or more."""
    prediction = predict(ROW | {"num_warps": warps, "all_warps": warps, "q": 16 * warps, "registers": registers})
    assert prediction.expected == pytest.approx(share)
    assert (prediction.worst, prediction.best) == (pytest.approx(0.4), 1.0)


@pytest.mark.parametrize(
    ("arch", "pass_name", "q", "k", "share"),
    [
        ("sm_90", "forward", 128, 128, 1.0),
        ("sm_90", "forward", 128, 32, 0.8),  # 64 x 32 scores read 24 KiB in 192 cycles, for 128 of products.
        ("sm_90", "grad_key_value", 32, 128, 0.8),  # The same, twice
        ("sm_100", "forward", 128, 128, 1.0),
        ("sm_100", "forward", 64, 128, 0.5),  # An instruction has 128 rows.
        ("sm_100", "grad_key_value", 128, 128, 1.0),
        ("sm_100", "grad_key_value", 128, 64, 0.5),
        ("sm_80", "forward", 64, 16, 1.0),
    ],
)
def test_products_that_read_shared_memory_want_large_blocks(arch, pass_name, q, k, share):
    """Keep all other units idle, and let the loop copy nothing."""
    idle = {"arch": arch, "units": {}, "instructions": 0, "head_dim": 128, "pass_name": pass_name, "q": q, "k": k}
    assert predict(ROW | idle).best == pytest.approx(share)


def test_blocks_of_few_rows_are_limited_by_the_cache_that_they_are_copied_from():
    """16 rows have a quarter of the scores of 64 rows, for the same 16 KiB of keys and values at 47 bytes a cycle."""
    units = {unit: number / 4 for unit, number in ROW["units"].items()}
    prediction = predict(ROW | {"q": 16, "units": units, "instructions": 100})
    assert prediction.busiest == "l2"
    assert prediction.expected == prediction.best == pytest.approx(128 / (16 * 1024 / 47))
