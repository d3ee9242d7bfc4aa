"""Test the measurement of the host's time, and on its driver that plans start what Triton's binder would start."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.processes import printed

pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="Triton compiles its launcher with cc"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is there, beside which ours is not loaded"),
]

ON_IDLE_DRIVER = f"""
import json, sys, tempfile
from pathlib import Path
import torch
sys.path.append({str(Path(__file__).parents[2] / "benchmarks")!r})
from fastlm.kernels import attention
from gpu import host, idle_driver
from triton.runtime import driver

idle_driver.activate("sm_90", Path(tempfile.mkdtemp()))
"""
STARTS_THE_SAME = """
class Launcher(driver.active.launcher_cls):
    def __call__(self, *args):
        launched.append(args[:6] + args[9:])  # Between these lies what profilers are told.
        super().__call__(*args)

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if hasattr(a, "block_shape"):
        return a.base is b.base and (a.shape, a.strides, a.block_shape) == (b.shape, b.strides, b.block_shape)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, tuple) else a == b

driver.active.launcher_cls, launched, kernels = Launcher, [], []
for name in ("forward", "decoding"):
    first, second = (host.calls("sm_90")[name]() for _ in range(2))
    attention.run(first)
    for one, other in zip(first, second, strict=True):
        assert one.binaries and one.binaries is other.binaries
        launched.clear()
        attention.run([other])
        assert other.kernel[(other.grid,)](**other.arguments, **other.options) is other.binaries[0]
        directly, by_triton = launched
        assert same(directly, by_triton)
        kernels.append(other.kernel.__name__)
print(json.dumps(kernels))
"""
HAS_ANOTHER_BINARY = """
def launch(start):
    key = torch.zeros(64 * 64 + 8, dtype=torch.bfloat16)[start : start + 64 * 64].view(1, 1, 64, 64)
    lse, statistics = torch.zeros(1, 1, 64), torch.zeros(1, 1, 64, 2)
    call = attention.Call(key, key, key, arch="sm_80")  # For descriptors, sm_90 would copy what is misaligned.
    (only,) = attention.plan_forward(call, torch.zeros_like(key), lse, statistics)
    attention.run([only])
    return only.binaries[0], only.kernel[(only.grid,)](**only.arguments, **only.options)

(aligned, by_triton), (misaligned, by_triton_misaligned), (again, _) = launch(0), launch(1), launch(8)
print(json.dumps([aligned is by_triton is again, misaligned is by_triton_misaligned, misaligned is aligned]))
"""
TIMES = """
host.REPEAT, host.SAMPLES = 2, 1
rows = host.time_calls("sm_90")
assert all(row.call > 0 and row.plan > 0 for row in rows if row.plan is not None)
print(json.dumps([row.name for row in rows if row.plan is not None]))
"""


@pytest.fixture(scope="module")
def told() -> dict:
    """Return what each part found. One process runs them all, because the parts start the same kernels, compiled once."""
    parts = {"starts": STARTS_THE_SAME, "binaries": HAS_ANOTHER_BINARY, "times": TIMES}
    return dict(zip(parts, map(json.loads, printed(ON_IDLE_DRIVER + "".join(parts.values())).splitlines()), strict=True))


def test_a_plan_s_binary_starts_as_triton_would_start_it(told):
    assert told["starts"] == ["attention_forward", "kvcache_append", "attention_kvcache", "attention_combine"]


def test_where_triton_compiles_another_binary_there_is_another_plan(told):
    assert told["binaries"] == [True, True, False]  # The same where both are aligned; Triton's, but another, where one is not.


def test_calls_are_timed(told):
    assert told["times"] == ["forward", "backward", "decoding", "latent", "latent backward"]
