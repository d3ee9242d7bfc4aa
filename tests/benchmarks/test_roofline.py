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


def test_products_of_64_rows_take_as_long_as_those_of_128_on_sm_100():
    """Keep all other units idle. The forward's products have the queries' rows, and those of dK and dV the keys'."""
    idle = ROW | {"arch": "sm_100", "units": {"tensor": 64}, "instructions": 0, "tensor_columns": 512}
    wide, narrow = {"q": 128, "k": 64}, {"q": 64, "k": 128}
    assert (predict(idle | wide).expected, predict(idle | narrow).expected) == (1.0, 0.5)
    keys = idle | {"pass_name": "grad_key_value"}
    assert (predict(keys | wide).expected, predict(keys | narrow).expected) == (0.5, 1.0)


def test_blocks_of_few_rows_are_limited_by_the_cache_that_they_are_copied_from():
    """16 rows have a quarter of the scores of 64 rows, for the same 16 KiB of keys and values at 47 bytes a cycle."""
    units = {unit: number / 4 for unit, number in ROW["units"].items()}
    prediction = predict(ROW | {"q": 16, "units": units, "instructions": 100})
    assert prediction.busiest == "l2"
    assert prediction.expected == prediction.best == pytest.approx(128 / (16 * 1024 / 47))
