"""Test the benchmarks' rows, and runs of them: what is asked for, missing, wrong, and interrupted."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import run as benchmark_run
import torch
import workloads
from suite import catalog, memory
from suite.check import SOME_QUERIES, ErrorCheck
from suite.journal import Journal
from suite.model_section import ModelSection
from suite.op_section import OpRunner
from suite.rows import Filter, Row, Setting, Unavailable
from support.bench import HANG
from support.processes import printed
from workloads import PEERS, text_vae
from workloads.models import Model
from workloads.peers import eager_latent

import fastlm
from fastlm import cli

HERE = Path(__file__).parent
TINY = "attention, a tiny call"
SMALL = {"BxHxSxD": (2, 2, 300, 16), "rows x columns": (9, 7), "elements": (99,), "rows x depth x out": (3, 600, 1024)}
BENCHMARKS = {benchmark.name: benchmark for benchmark in workloads.BENCHMARKS if benchmark.device == "cpu"}

# ---- what is asked for ------------------------------------------------------------------------------------------------------


def test_every_benchmark_has_peers_and_every_row_its_own_key():
    settings = [setting for section in catalog.sections().values() for setting in section.settings(Filter(full=True))]
    found = [row for setting in settings for row in catalog.rows_of(setting, full=True)]
    assert len(set(found)) == len(found)
    for benchmark in workloads.BENCHMARKS:
        assert set(benchmark.peers) <= set(PEERS[benchmark.function.__name__])


def test_a_section_is_asked_for_by_its_name_or_a_part_of_names():
    assert [s.name for s in catalog.selected(Filter(only="attention, forward"))] == ["attention, forward"]
    assert {s.name for s in catalog.selected(Filter(only="GROWTH"))} == {
        n for n in catalog.sections() if n.startswith("growth")
    }
    with pytest.raises(ValueError, match="OP must be a part of a section's name; got 'nothing'.*varlen_attention, causal"):
        catalog.settings(Filter(only="nothing"))


def test_sizes_of_ones_own():
    found = catalog.settings(Filter(only="attention, forward, causal", sizes=("1x2x64x32", "2x2x64x32")))
    assert found == [Setting("attention, forward, causal", size, "float32") for size in ("1x2x64x32", "2x2x64x32")]
    section = catalog.sections()["attention, forward, causal"]
    arguments = section.workload("2x2x64x32").make(torch.float32)
    assert arguments["query"].shape == (2, 2, 64, 32) and arguments["causal"]
    assert section.cost(found[1]).work == 2 * section.cost(found[0]).work == 4 * 2 * 2 * 64 * 64 * 32 // 2
    with pytest.raises(ValueError, match="'attention, forward, causal' are written BxHxSxD; got '3xS'"):
        catalog.settings(Filter(only="attention, forward, causal", sizes=("3xS",)))
    with pytest.raises(ValueError, match="--sizes needs one section"):
        catalog.settings(Filter(only="attention", sizes=("1x2x64x32",)))


# ---- rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if not b.name.startswith("growth")])
def test_peers_compute_what_fastlm_does(name):
    """Check each at the smallest size. A latent's peers draw their own noise, so fastlm alone is checked there."""
    benchmark = BENCHMARKS[name]
    numbers = SMALL.get(benchmark.sizes, (2, 70))
    runner = OpRunner(benchmark, benchmark.sized(*numbers).make(torch.float32))
    quick = [peer for peer in benchmark.peers if "compiled" not in peer and peer != "FlexAttention"]
    for peer in (f"fastlm {benchmark.backends[0]}", *quick):
        try:
            runner.step(peer)
        except Unavailable as reason:
            assert "No module named" in str(reason) or "has no window" in str(reason)
            continue
        errors = runner.errors(peer)
        assert errors or (benchmark.own_noise and peer in benchmark.peers)
        assert all(j["error"] <= 4 * j["allowed"] for j in errors.values()), (peer, errors)


def test_a_peer_that_fails_is_unavailable_and_a_bug_of_ours_is_not(monkeypatch):
    runner = OpRunner(BENCHMARKS[TINY], BENCHMARKS[TINY].workloads[0].make(torch.float32))

    def fails(**arguments):
        raise RuntimeError("does not do this\nand more")

    monkeypatch.setitem(PEERS["attention"], "SDPA", fails)
    with pytest.raises(Unavailable, match="^RuntimeError: does not do this$"):
        runner.step("SDPA")
    monkeypatch.setattr(runner, "_call", lambda implementation: fails)
    with pytest.raises(RuntimeError, match="does not do this"):
        runner.step("fastlm cpu")


def test_a_wrong_answer_is_seen():
    benchmark = BENCHMARKS[TINY]
    arguments = benchmark.workloads[0].make(torch.float32)
    right = fastlm.attention(**arguments)
    for factor, ok in ((1.0, True), (1.001, False)):
        errors = ErrorCheck(benchmark, arguments).errors((right * factor,))["output 0"]
        assert (errors["error"] <= errors["allowed"]) == ok


@pytest.mark.parametrize("name", ["attention, forward", "attention, forward, causal", "attention, forward, window 256"])
def test_of_a_large_call_the_last_queries_are_checked(name, monkeypatch):
    monkeypatch.setattr("suite.check.MOST_SCORES", 1000)
    benchmark = BENCHMARKS[name]
    arguments = benchmark.sized(1, 2, 400, 16).make(torch.float32)
    right, error_check = fastlm.attention(**arguments), ErrorCheck(benchmark, arguments)
    assert error_check.golden["output 0"].shape[2] == SOME_QUERIES
    assert all(j["error"] <= j["allowed"] for j in error_check.errors((right,)).values())
    wrong = right.clone()
    wrong[:, :, -1] += 1e-3
    errors = error_check.errors((wrong,))["output 0"]
    assert errors["error"] > errors["allowed"]


@pytest.mark.parametrize(
    ("name", "sizes", "whole", "part"),
    [
        ("attention, forward", (1, 2, 400, 16), (1, 2, 400, 16), (1, 2, SOME_QUERIES, 16)),
        ("attention, forward + backward, causal", (2, 3, 70, 16), (2, 3, 70, 16), (2, 1, 70, 16)),
        ("attention, forward + backward, dropout 0.1", (1, 3, 70, 16), (1, 3, 70, 16), (1, 1, 70, 16)),
        ("varlen_attention, causal", (2, 30), (45, 8, 64), (45, 1, 64)),
    ],
)
def test_of_a_slow_call_a_part_is_checked(name, sizes, whole, part, monkeypatch):
    """Compare the part's results and gradients with the whole call's."""
    benchmark = BENCHMARKS[name]
    runner = OpRunner(benchmark, benchmark.sized(*sizes).make(torch.bfloat16))
    assert runner.error_check.golden["output 0"].shape == whole
    monkeypatch.setattr("suite.check.MOST_SECONDS", 0.0)
    results, error_check = runner.step("fastlm cpu")(), ErrorCheck(benchmark, runner.arguments)
    errors = error_check.errors(results)
    assert len(errors) == len(results) and error_check.golden["output 0"].shape == part
    assert all(j["error"] <= j["allowed"] for j in errors.values()), errors
    for i, name in enumerate(errors):
        wrong = [result.detach().clone() for result in results]
        wrong[i] += 1.0
        j = error_check.errors(tuple(wrong))[name]
        assert j["error"] > j["allowed"], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_large_latent_the_first_rows_are_checked(dtype, monkeypatch):
    """Noise, outputs and gradients of these rows are the whole call's."""
    monkeypatch.setattr("suite.check.MOST_NUMBERS", 100)
    benchmark = BENCHMARKS["reparameterize_with_kl"]
    runner = OpRunner(benchmark, benchmark.sized(50, 30).make(dtype))
    results = runner.step("fastlm cpu")()
    errors = runner.error_check.errors(results)
    assert set(errors) == {"output 0", "output 1", "gradient of mu", "gradient of logvar"}
    assert all(j["error"] <= j["allowed"] for j in errors.values()), errors
    assert runner.error_check.golden["output 0"].shape == (3, 30)
    for i, name in enumerate(errors):
        wrong = [result.detach().clone() for result in results]
        wrong[i][2] *= 1.5
        j = runner.error_check.errors(tuple(wrong))[name]
        assert j["error"] > j["allowed"], name


class Attending(torch.nn.Module):
    """A model that fastlm can be put into."""

    def __init__(self):
        super().__init__()
        self.linear, self.attend = torch.nn.Linear(8, 8), torch.nn.functional.scaled_dot_product_attention

    def forward(self, x):
        query = self.linear(x)
        return self.attend(query, query, query)


def swapped(model):
    model.attend = fastlm.scaled_dot_product_attention
    return torch.no_grad


def missing(model):
    raise ImportError("pip install it")


def a_layer(put_in, peers=None):
    """Return a section of one small model, and its setting."""
    x = torch.randn(2, 1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Model(
        name="a layer",
        workload="B2",
        unit="tokens/s",
        items=2,
        build=Attending,
        ready=lambda m: lambda: (m(x.to(m.linear.weight.dtype)),),
        put_in=put_in,
        peers=peers or {},
    )
    section = ModelSection(model.name, [model])
    return section, next(iter(section.settings(Filter())))


def test_a_model_is_timed_and_checked_before_and_after():
    section, setting = a_layer({"swap": swapped, "missing": missing, "nothing": lambda m: torch.no_grad})
    assert section.implementations(setting, full=False) == ["fastlm swap", "fastlm missing", "fastlm nothing", "before"]
    runner = section.runner(setting)
    torch.testing.assert_close(runner.step("fastlm swap")()[0], runner.step("before")()[0])  # of the same first weights
    errors = runner.errors("fastlm swap")["output"]
    assert 0 < errors["error"] <= errors["allowed"]
    with pytest.raises(Unavailable, match="ImportError: pip install it"):
        runner.step("fastlm missing")
    with pytest.raises(AssertionError, match="fastlm nothing: no op of fastlm ran in a layer"):
        runner.step("fastlm nothing")
    assert section.cost(setting).throughput(0.5) == 4


def test_peers_of_a_model_may_be_missing_or_wrong():
    def wrong(model):
        model.linear.weight.data *= 2
        return nullcontext

    section, setting = a_layer({"swap": swapped}, {"missing": missing, "wrong": wrong})
    assert section.implementations(setting, full=False) == ["fastlm swap", "before", "missing", "wrong"]
    runner = section.runner(setting)
    runner.step("wrong")
    assert runner.errors("wrong")["output"]["error"] > 0.1 and "wrong" in runner.first_seconds
    with pytest.raises(Unavailable, match="ImportError: pip install it"):
        runner.step("missing")


def test_operations_of_a_model_are_counted_attention_and_its_backward_included():
    batch, length, width = 2, 5, 8

    def ready(module):
        x = torch.randn(batch, 1, length, width)

        def step():
            out = module(x)
            out.sum().backward()
            return (out,)

        return step

    model = Model("a layer", "B2", "tokens/s", 2, Attending, ready, {"swap": lambda model: swapped(model) and nullcontext})
    runner = ModelSection(model.name, [model]).runner(Setting("a layer", "B2", "float32"))
    runner.step("fastlm swap")
    assert runner.flops is None
    runner.step("before")
    product, scores = 2 * batch * length * width * width, 2 * batch * length * length * width
    assert runner.flops == 2 * product + (2 + 5) * scores  # x has no gradient; the backward computes the scores once more


def test_the_text_vae_is_the_same_model_before_and_on_kernels():
    """Both have the same loss of the posterior's mean and the same texts, and each has its own latent."""
    torch.manual_seed(0)
    mu, logvar = torch.randn(4000, 3), torch.randn(4000, 3)
    z, kl = eager_latent(mu, logvar)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    golden = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl, golden, rtol=1e-5, atol=1e-5)
    noise = (z - mu) / (0.5 * logvar).exp()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05

    before = text_vae.text_vae()
    after = copy.deepcopy(before)
    text_vae.on_kernels(after)
    implementations = [{m.config._attn_implementation for m in (v, v.encoder, v.decoder.model)} for v in (before, after)]
    assert implementations == [{"sdpa"}, {"fastlm"}]
    assert before.latent.sample is eager_latent and "sample" not in vars(after.latent)
    for step in (
        partial(text_vae.noiseless_gradients, batch=2, longest=12),
        partial(text_vae.text_generation, batch=2, new_tokens=4),
    ):
        for ours, theirs in zip(step(after)(), step(before)()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert text_vae.text_gradients(after, 2, 12)()[0].shape == (2,)


def test_memory_that_is_kept_between_calls_is_not_taken_for_none(monkeypatch):
    found = {"bytes": 0, "result_bytes": 1 << 20}
    monkeypatch.setattr(memory, "_ask", lambda target, arguments, seconds: found)
    assert "keeps its memory" in memory.peak_extra_bytes("suite.catalog:fresh_step")["why_not"]
    found["bytes"] = 1 << 21
    assert memory.peak_extra_bytes("suite.catalog:fresh_step") == {"bytes": 1 << 21, "result_bytes": 1 << 20}


def test_memory_is_measured_in_a_process_of_its_own_and_a_failure_or_a_crash_is_told_from_a_figure(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE, HERE.parent))))
    memory._server.cache_clear()
    large = memory.peak_extra_bytes("test_run:takes", megabytes=32, returned=8)
    assert large["result_bytes"] == 8 << 20 and 39 << 20 <= large["bytes"] < 42 << 20
    assert memory.peak_extra_bytes("test_run:fails") == {"why_not": "RuntimeError: not today"}
    assert memory.peak_extra_bytes("test_run:crashes") == {"why_not": "exit code 7"}
    assert memory.peak_extra_bytes("test_run:takes", megabytes=1, returned=8)["bytes"] >= 8 << 20  # and it goes on
    memory._server.cache_clear()


def takes(megabytes: int, returned: int):
    """Return a call that allocates and frees so many megabytes, and returns so many."""

    def call():
        taken, result = torch.ones(megabytes << 18), torch.ones(returned << 18)  # float32
        return (result.add_(taken[0]),)

    return call


def fails():
    raise RuntimeError("not today\nnor tomorrow")


def crashes():
    return lambda: os._exit(7)


# ---- the journal ------------------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_where_it_was_cut_off(tmp_path):
    path, run = tmp_path / "bench.jsonl", {"full": False, "sizes": ("1x2",)}
    journal = Journal(path, run)
    assert journal.once("machine", lambda: {"cores": 2}) == {"cores": 2}
    journal.add("memory", {"bytes": 1})
    with path.open("a") as file:
        file.write('["memory", {"byt')  # killed while it wrote
    resumed = Journal(path, run, resume=True)
    assert resumed.of("memory") == [{"bytes": 1}]
    assert resumed.once("machine", lambda: pytest.fail("measured again")) == {"cores": 2}
    resumed.add("memory", {"bytes": 2})
    assert Journal(path, run, resume=True).of("memory") == [{"bytes": 1}, {"bytes": 2}]
    assert Journal(path, run).of("memory") == []


def test_a_journal_of_another_run_is_not_gone_on_with(tmp_path):
    with pytest.raises(ValueError, match="no interrupted run in"):
        Journal(tmp_path / "bench.jsonl", {"full": False}, resume=True)
    Journal(tmp_path / "bench.jsonl", {"full": False})
    with pytest.raises(ValueError, match="is of another run: full was False and is True"):
        Journal(tmp_path / "bench.jsonl", {"full": True}, resume=True)


# ---- the command ------------------------------------------------------------------------------------------------------------


# A run measures the machine's peaks two or three times, which takes 10 s each. What they are is of no account here.
PROGRAM = f"""
import sys
sys.path.append({str(HERE.parents[1] / "benchmarks")!r})
from suite import peak
peak.GEMM_SECONDS, peak.FLOATS, peak.FMA_ROUNDS = 0.1, 1 << 20, 1000
from fastlm.cli import main
sys.exit(main())
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "bench", *arguments]


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=HANG)


def main(monkeypatch, *arguments: str) -> int:
    """Run the command in this process, where it measures nothing."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return benchmark_run.main()


def test_a_run_from_the_command_to_the_report_and_to_a_comparison(tmp_path, monkeypatch, capsys):
    ran = run_command(TINY, "--sizes", "1x1x16x16,1x4x256x64", "--out", str(tmp_path / "a"))
    assert ran.returncode == 0, ran.stderr
    assert {"report.html", "report.md", "bench.json", "speed_ups.png"} <= {path.name for path in (tmp_path / "a").iterdir()}
    run = json.loads((tmp_path / "a" / "bench.json").read_text())
    implementations = [entry["params"]["implementation"] for entry in run["benchmarks"]]
    assert implementations == ["fastlm cpu", "SDPA"] * 6  # two sizes; the implementations take turns, three each
    assert {"machine_info", "commit_info", "version", "missing"} <= set(run)
    assert all(row["bytes"] >= row["result_bytes"] * 0.5 for row in run["memory"]) and len(run["memory"]) == 2
    assert all(entry["extra_info"]["error"] <= entry["extra_info"]["allowed"] for entry in run["benchmarks"])
    assert run["machine"]["peak_gflop_s"]["float32"] >= run["machine"]["gemm_gflop_s"]["float32"] > 0

    slower = json.loads(json.dumps(run))
    for entry in slower["benchmarks"]:
        if entry["params"]["implementation"] == "fastlm cpu":
            # So much that no spread of the measured times, as on a busy machine, is wider.
            entry["stats"]["data"] = [1000 * seconds for seconds in entry["stats"]["data"]]
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    paths = [str(tmp_path / "a" / "bench.json"), str(tmp_path / "slower.json")]
    assert main(monkeypatch, "--compare", *paths) == 1 and "slower: 2" in capsys.readouterr().out
    assert main(monkeypatch, "--compare", *reversed(paths)) == 0 and "faster: 2" in capsys.readouterr().out


def test_a_killed_run_is_gone_on_with(tmp_path):
    """Kill a run once a setting is finished, and resume it: what it had is not measured again."""
    arguments = (TINY, "--sizes", ",".join(f"1x1x{16 * i}x16" for i in range(1, 5)), "--out", str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    journal = tmp_path / "bench.jsonl"
    process = subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + HANG
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and '["rows"' in journal.read_text():
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = journal.read_text().rsplit("\n", 1)[0]
    assert '["rows"' in kept and not (tmp_path / "bench.json").exists()
    ran = run_command(*arguments, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert journal.read_text().startswith(kept)
    run = json.loads((tmp_path / "bench.json").read_text())
    sizes = [entry["params"]["workload"] for entry in run["benchmarks"]]
    assert len(sizes) == 4 * 6 and len(set(sizes)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "OP must be a part of a section's name"),
        (("--compare", "none.json", "none.json"), "none.json is not a run's JSON file"),
        (("attention", "--sizes", "1x2x3x4"), "--sizes needs one section"),
        (("--resume",), "there is no interrupted run"),
    ],
)
def test_a_command_that_makes_no_sense_says_why(arguments, message, tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, *arguments, "--out", str(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_without_a_checkout_the_command_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "site-packages" / "fastlm")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "in fastlm's repository, and not in its wheel" in capsys.readouterr().err


def test_the_folder_of_the_benchmarks_is_the_repositorys():
    assert (cli.PACKAGE.parent / cli.BENCH).parent == HERE.parents[1] / "benchmarks"
    assert Row("op", "w", "float32", "fastlm cpu").own


def test_a_lost_gpu_ends_the_rows_and_its_setting_is_in_the_journal(tmp_path):
    """Run again behind that setting. Here a peer that fails counts as the loss."""
    code = f"""
import sys
sys.path.append({str(HERE.parents[1] / "benchmarks")!r})
from pathlib import Path
from suite import timing
from suite.budget import Budget
from suite.journal import Journal
from suite.rows import Filter
from workloads import PEERS

def fails(**arguments):
    raise RuntimeError("an illegal memory access")

PEERS["attention"]["SDPA"], timing.gpu_is_lost = fails, lambda: True
journal = Journal(Path({str(tmp_path / "bench.jsonl")!r}), {{}})
try:
    timing.time_rows(journal, Filter(only={TINY!r}), Budget())
except timing.GPULost as lost:
    (setting,) = journal.of(timing.STEP)
    print(lost, [row["why_not"] for row in setting["missing"]], sep="; ")
"""
    told = printed(code).splitlines()[-1]
    assert told == f"the GPU was lost by {TINY} B1 H1 S16 float32 SDPA; ['RuntimeError: an illegal memory access']"
