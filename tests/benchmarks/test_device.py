"""Test how each device of the benchmarks measures time and memory, and a GPU's sections with a CPU in its place."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import workloads
from report import blocks_of
from report.blocks import Details, Plot, Table
from report.results import results_of
from suite import bench_rows, catalog, device, peak
from suite.check import ErrorCheck
from suite.device import CPU, CUDA
from suite.op_section import OpRunner
from suite.rows import Filter, Unavailable
from support.bench import Clock, entry, made_up_run
from workloads.workload import ON_GPU

GPU_BENCHMARKS = {benchmark.name: benchmark for benchmark in workloads.BENCHMARKS if benchmark.device == "cuda"}
SMALL = {"BxHxSxD": (2, 4, 70, 16), "rows x columns": (9, 7), "B x cached rows": (2, 70), "sequences x longest": (3, 70)}
LINUX = pytest.mark.skipif(not device.CLEAR_REFS.exists(), reason="memory is measured on Linux only")

# ---- the CPU ----------------------------------------------------------------------------------------------------------------


def test_the_cpu_is_here_and_its_arguments_stay_where_they_are():
    tensor = torch.ones(3)
    assert CPU.available()
    moved = CPU.move({"query": tensor, "causal": True})
    assert moved["query"] is tensor and moved["causal"] is True


def test_the_difference_of_two_moments_is_in_seconds():
    start = CPU.clock()
    assert 0.0 <= CPU.clock() - start < 60.0


@LINUX
def test_memory_counts_what_a_call_takes_and_what_it_returns():
    def call() -> tuple[torch.Tensor]:
        taken = torch.ones(32 << 20, dtype=torch.uint8)
        return (torch.ones(8 << 20, dtype=torch.uint8).add_(taken[0]),)

    found = device.measure_memory(call)
    assert found["result_bytes"] == 8 << 20
    assert found["bytes"] >= 39 << 20
    assert device.measure_memory(lambda: 1.0)["result_bytes"] == 0


# ---- the GPU, mocked --------------------------------------------------------------------------------------------------------


class FakeGPU:
    """Stand in for torch.cuda: events that a clock stamps, and an allocator that holds what a test says."""

    def __init__(self):
        self.now, self.held, self.most, self.waited = Clock(), 0, 0, 0
        self.Event = partial(FakeEvent, self)

    def take(self, count: int) -> None:
        self.held += count
        self.most = max(self.most, self.held)

    def synchronize(self) -> None:
        self.waited += 1

    def reset_peak_memory_stats(self) -> None:
        self.most = self.held

    def memory_allocated(self) -> int:
        return self.held

    def max_memory_allocated(self) -> int:
        return self.most


class FakeEvent:
    """Stand in for torch.cuda.Event."""

    def __init__(self, gpu: FakeGPU, enable_timing: bool):
        assert enable_timing
        self.gpu, self.waited = gpu, False

    def record(self) -> None:
        self.at = self.gpu.now()

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.waited, "the end was not waited for"
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch) -> FakeGPU:
    fake = FakeGPU()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


class Rounds:
    """Stand in for pytest-benchmark's fixture: time rounds as its `pedantic` does."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, []
        self.stats = SimpleNamespace(stats=SimpleNamespace(min=None))

    def pedantic(self, step, setup, rounds):
        for _ in range(rounds):
            setup()
            start = self.clock()
            step()
            self.seconds.append(self.clock() - start)
        self.stats.stats.min = min(self.seconds)


def test_a_gpu_times_each_call_alone_with_a_cold_cache(gpu):
    cleared = []

    def clear_cache() -> None:
        cleared.append(gpu.now())
        gpu.now.spend(0.001)

    rounds = Rounds(CUDA.clock)
    fastest = bench_rows.timed(rounds, replace(CUDA, clear_cache=clear_cache), lambda: gpu.now.spend(0.25), 7)
    assert fastest == pytest.approx(0.25) and rounds.seconds == pytest.approx([0.25] * 7)
    assert len(cleared) == 7
    bench_rows.timed(rounds, replace(CUDA, clear_cache=clear_cache), lambda: gpu.now.spend(1e-5), 50000)
    assert len(rounds.seconds) == 7 + bench_rows.MOST_ROUNDS


def test_pytest_benchmark_is_given_the_clock_of_the_rows_device():
    for section in catalog.sections().values():
        setting = next(iter(section.settings(Filter())))
        assert bench_rows.mark_of(setting).kwargs["timer"] is section.device.clock
        assert (section.device is CUDA) == section.name.startswith(ON_GPU)


def test_memory_of_a_gpu_is_its_allocators(gpu):
    gpu.take(100)

    def call() -> str:
        gpu.take(30)
        gpu.held -= 20
        return "the result"

    assert CUDA.peak_bytes(call) == (30, "the result")
    assert gpu.waited == 2


def test_memory_is_measured_on_the_device_of_the_results(monkeypatch):
    monkeypatch.setattr(device, "CUDA", replace(CUDA, peak_bytes=lambda call: (7, call())))
    result = (SimpleNamespace(is_cuda=True, nbytes=5),)
    assert device.measure_memory(lambda: result) == {"bytes": 7, "result_bytes": 5}


def test_peaks_of_a_gpu_are_measured_with_its_clock(monkeypatch):
    clock = Clock()

    def product(a, b):
        clock.spend(2 * len(a) ** 3 / 1e12)

    cleared = []
    there = replace(CPU, clock=clock, clear_cache=lambda: cleared.append(1))
    assert peak.gemm_rate(torch.float32, product, there, (64, 128)) == pytest.approx(1000.0)
    assert cleared
    monkeypatch.setattr(peak, "CUDA", CPU)
    monkeypatch.setattr(peak, "FLOATS", 1 << 16)
    monkeypatch.setattr(peak, "GPU_GEMM_SIZES", (64,))
    said = []
    found = peak.of_gpu(said.append)
    assert len(said) == peak.GPU_STEPS
    assert found["bandwidth_gb_s"] > 0 and set(found["peak_gflop_s"]) == set(peak.GPU_DTYPES)


# ---- the sections of a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPU_BENCHMARKS)
def test_peers_on_a_gpu_compute_what_fastlm_does(name):
    """Run the peers on small sizes, with a CPU in the place of the GPU and fastlm's CPU backend in that of its GPU's."""
    benchmark = replace(GPU_BENCHMARKS[name], device="cpu", backends=("cpu",))
    runner = OpRunner(benchmark, benchmark.sized(*SMALL[benchmark.sizes]).make(benchmark.dtypes[0]))
    ran = set()
    for peer in ("fastlm cpu", *(peer for peer in benchmark.peers if "compiled" not in peer and peer != "FlexAttention")):
        try:
            runner.step(peer)
        except Unavailable as reason:
            assert any(why in str(reason) for why in ("No module named", "No viable backend", "from the 'CPU' backend"))
            continue
        ran.add(peer)
        errors = runner.errors(peer)
        assert errors or (benchmark.own_noise and peer in benchmark.peers)
        assert all(j["error"] <= 4 * j["allowed"] for j in errors.values()), (peer, errors)
    assert {"fastlm cpu", benchmark.peers[0]} <= ran
    assert ran >= {"SDPA flash", "SDPA math"} & set(benchmark.peers)


def test_of_a_large_cache_the_last_sequence_is_checked(monkeypatch):
    monkeypatch.setattr("suite.check.MOST_NUMBERS_OF_CACHE", 1000)
    benchmark = replace(GPU_BENCHMARKS[f"{ON_GPU}kvcache_attention, decoding"], device="cpu", backends=("cpu",))
    runner = OpRunner(benchmark, benchmark.sized(3, 70).make(torch.bfloat16))
    (result,), error_check = runner.step("fastlm cpu")(), ErrorCheck(benchmark, runner.arguments)
    assert result.shape == (3, 32, 1, 128) and error_check.golden["output 0"].shape == (1, 32, 1, 128)
    (errors,) = error_check.errors((result,)).values()
    assert errors["error"] <= errors["allowed"]
    wrong = result.clone()
    wrong[-1] += 1.0
    (errors,) = error_check.errors((wrong,)).values()
    assert errors["error"] > errors["allowed"]


def test_without_a_gpu_a_run_has_no_rows_of_one(monkeypatch):
    sections = catalog.sections().values()
    for here in (False, True):
        for section in sections:
            if section.device.name == "cuda":
                monkeypatch.setattr(section, "device", replace(CUDA, available=lambda here=here: here))
        found = {setting.op for setting in catalog.settings(Filter()) if setting.op.startswith(ON_GPU)}
        assert found == (set(GPU_BENCHMARKS) if here else set())
    assert {setting.op for setting in catalog.settings(Filter(only=ON_GPU))} == set(GPU_BENCHMARKS)


def test_rows_of_a_gpu_stand_in_the_report_under_the_limits_of_the_gpu(tmp_path):
    op, workload = f"{ON_GPU}attention, forward, head_dim 64", "B16 H32 S1024"
    rows = [
        entry(name, [seconds], op=op, workload=workload) for name, seconds in (("fastlm triton", 0.001), ("SDPA math", 0.004))
    ]
    run = made_up_run(*rows, entry("fastlm triton", [0.002], op=op, workload="B4 H32 S4096"))
    for each in run["benchmarks"]:
        each["params"]["dtype"] = "bfloat16"
    run["machine"]["gpu_peaks"] = {
        "copy_gb_s": 2000.0,
        "read_gb_s": 1900.0,
        "bandwidth_gb_s": 2000.0,
        "peak_gflop_s": {"float32": 50e3, "bfloat16": 500e3},
    }
    results = results_of(run)
    flops = 4 * 16 * 32 * 1024 * 1024 * 64
    assert results[0].share(run["machine"]) == pytest.approx(flops / 0.001 / 1e9 / 500e3)
    blocks = blocks_of(run, results, tmp_path)
    (plot,) = [b for b in blocks if isinstance(b, Plot) and "GPU" in b.name]
    assert len(plot.draw(2).axes[0].lines) == 3  # two implementations and the limit
    assert any("fastlm triton" in str(b.blocks[0].rows) for b in blocks if isinstance(b, Details) and "GPU" in b.summary)
    assert any("the GPU's product" in str(b.rows) for b in blocks if isinstance(b, Table))
    assert "No GPU was at hand" not in str(blocks) and "No GPU was at hand" in str(blocks_of(made_up_run(), [], tmp_path))
