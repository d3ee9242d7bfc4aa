"""Test `make gpu` without a GPU: its steps, its report and archive, what is kept of a lost GPU, and tiles that are timed."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from gpu import install, steps, summary, tuning
from gpu.steps import GPU_LOST, Step, run_step
from gpu.variants import Variant
from suite.budget import Budget
from suite.journal import Journal
from support.processes import HANG, printed

pytest.importorskip("triton", reason="the Triton kernels need Triton")

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "on_gpu.py"

# ---- steps ------------------------------------------------------------------------------------------------------------------


def step(name: str, code: str, seconds: float = 60.0) -> Step:
    """Return a step that runs Python code in its folder; it has the folder's path as an argument."""
    return Step(name, f"what {name} does", seconds, lambda folder: [sys.executable, "-c", code, str(folder)], ROOT)


LOSES_THE_GPU_ONCE = f"""
import sys; from pathlib import Path
seen = Path(sys.argv[1], "seen"); sys.exit({GPU_LOST} * (not seen.exists() and not seen.touch()))
"""
FINISHED = """{"test": "a", "outcome": "passed", "seconds": 1.0, "message": ""}
{"test": "b", "outcome": "failed", "seconds": 1.0, "message": "def b():\\nE   assert 1 == 2\\ntest.py:1"}
{"test": "c", "outcome": "skipped", "seconds": 0.0, "message": "Skipped: needs a second GPU"}
"""


def test_each_step_is_kept_if_the_next_one_fails_and_all_of_it_is_one_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE", 0.2)
    sleeps = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begins', flush=True); time.sleep(600)"
    every = [
        step("good", "print('all is well')"),
        step("bad", "print('before'); raise ValueError('no such kernel')"),
        step("slow", sleeps, seconds=2.0),
        step("lost", LOSES_THE_GPU_ONCE),
        step("tests", f"import sys; open(sys.argv[1] + '/tests.jsonl', 'w').write({FINISHED!r})"),
    ]
    results = {each.name: run_step(each, tmp_path, {}, resume=False) for each in every}
    assert [result["status"] for result in results.values()] == ["passed", "failed", "out of time", "passed", "passed"]
    assert results["lost"]["runs"] == 2 and results["slow"]["seconds"] < 60
    archive = summary.pack(tmp_path, [*results, "never"], dry_run=True)
    with tarfile.open(archive) as file:
        names = file.getnames()
        report = file.extractfile("report.md").read().decode()
        assert file.extractfile("slow/log.txt").read() == b"begins\n"
    assert {f"{name}/{kept}" for name in results for kept in ("log.txt", "step.json")} <= set(names)
    for fact in (
        summary.DRY_RUN,
        "| good | what good does | passed |",
        "| never | | not run |",
        "ValueError: no such kernel",
        "The GPU was lost 1 times",
        "1 failed, 1 passed, 1 skipped",
        "`b` failed: E assert 1 == 2",
        "1 skipped: needs a second GPU",
    ):
        assert fact in report, fact


def test_a_run_that_is_resumed_leaves_out_what_is_done(tmp_path):
    counts = "import sys; from pathlib import Path; file = Path(sys.argv[1], 'n'); file.open('a').write('x'); sys.exit(%s)"
    for code, status in ((0, "passed"), (1, "failed")):
        each = step(status, counts % code)
        for resume in (False, True):
            assert run_step(each, tmp_path, {}, resume)["status"] == status
        assert (tmp_path / status / "n").read_text() == "x"
    again = step("passed", counts % 0)
    (tmp_path / "passed" / steps.RESULT).unlink()  # It was interrupted.
    run_step(again, tmp_path, {}, resume=True)
    assert (tmp_path / "passed" / "n").read_text() == "xx"
    run_step(again, tmp_path, {}, resume=False)
    assert (tmp_path / "passed" / "n").read_text() == "x"


def test_a_dry_run_of_one_step_and_its_archive(tmp_path):
    command = [sys.executable, str(PROGRAM), "doctor", "--dry-run", "--out", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    with tarfile.open(tmp_path / summary.ARCHIVE) as file:
        log = file.extractfile("doctor/log.txt").read().decode()
    assert "triton: available (Triton's interpreter" in log and "| doctor |" in process.stdout


def test_an_unknown_step_is_refused():
    command = [sys.executable, str(PROGRAM), "test"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert process.returncode == 2 and "STEP must be among install, doctor, smoke" in process.stderr


# ---- tests, and fastlm where it is not installed ----------------------------------------------------------------------------

TWO_TESTS = """
def test_one():
    pass
def test_two():
    assert 1 == 2
"""


def test_finished_tests_are_in_the_journal_and_left_out_of_the_next_run(tmp_path):
    (tmp_path / "test_a.py").write_text(TWO_TESTS)
    journal = tmp_path / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "gpu.pytest_journal", "--journal", str(journal), "-n", "1", "test_a.py"]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT / "benchmarks")}, "capture_output": True, "text": True}
    subprocess.run([*command, "-k", "one"], **options, check=True)
    process = subprocess.run(command, **options, check=False)
    assert "1 failed" in process.stdout and "passed" not in process.stdout
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(row["test"], row["outcome"]) for row in rows] == [
        ("test_a.py::test_one", "passed"),
        ("test_a.py::test_two", "failed"),
    ]
    assert "assert 1 == 2" in rows[1]["message"]


def test_links_to_the_checkout_are_a_package(tmp_path, monkeypatch):
    """Import fastlm with Triton's kernels in a Python that has not the means to build."""
    monkeypatch.setattr(install, "SITE", tmp_path)
    install.link()
    install.link()
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, "known_source_files")]  # The editable install's.
sys.path.insert(0, {str(tmp_path)!r})
import fastlm, fastlm_cli, fastlm.kernels.attention as kernels
print(fastlm.__file__, kernels.__file__)
"""
    found = printed(code, TRITON_INTERPRET="1").split()
    assert all(path.startswith(str(tmp_path)) for path in found)


# ---- tiles ------------------------------------------------------------------------------------------------------------------

DECODING = Variant("interpreter", tuning.KVCACHE, 64, "float16", False)


@pytest.fixture
def timed(monkeypatch):
    """Yield the table of timed tiles, and restore it."""
    table = tuning.timed_tiles.TIMED
    before = dict(table)
    yield table
    table.clear()
    table.update(before)
    tuning.attention.forget_plans()


def test_tiles_are_timed_and_the_faster_ones_become_a_patch(tmp_path, timed):
    """Make the second tile look faster. The patch applies, and then the tile is the table's."""
    journal = Journal(tmp_path / "tiles.jsonl", {})
    assert tuning.time_all([DECODING], journal, Budget(), 1, lambda text: None)
    assert not timed
    (today, other), *rest = tuning.timings(journal).values()
    assert not rest and today.tile == tuning.tile_of(DECODING) and min(today.seconds, other.seconds) > 0
    better = tuning.better_tiles({DECODING: [today._replace(seconds=2.0), other._replace(seconds=1.0)]})
    assert better == {tuning.key_of(DECODING): other.tile}
    assert not tuning.better_tiles({DECODING: [today._replace(seconds=1.0), other._replace(seconds=0.99)]})
    patch = tuning.patch_of(better)
    subprocess.run(["git", "apply", "--check", "-"], input=patch, text=True, cwd=ROOT, check=True)
    assert f"+    {tuning.key_of(DECODING)}: {tuple(other.tile)},".replace("'", '"') in patch
    tuning.put(DECODING, other.tile)
    assert tuning.tile_of(DECODING) == other.tile


def test_a_tile_that_fails_is_skipped_and_one_that_loses_the_gpu_is_not_tried_again(tmp_path, timed, monkeypatch):
    today, lost = tuning.tile_of(DECODING), iter([True])

    def time_tile(variant, tile) -> float:
        if tile == today:
            raise RuntimeError("an illegal memory access")
        return 1.0

    monkeypatch.setattr(tuning, "time_tile", time_tile)
    monkeypatch.setattr(tuning, "gpu_is_lost", lambda: next(lost, False))
    journal = Journal(tmp_path / "tiles.jsonl", {})
    assert not tuning.time_all([DECODING], journal, Budget(), 1, lambda text: None)
    again = Journal(tmp_path / "tiles.jsonl", {}, resume=True)
    assert tuning.time_all([DECODING], again, Budget(), 1, lambda text: None)
    (rows,) = tuning.timings(again).values()
    assert [row.seconds for row in rows] == [None, 1.0] and rows[0].text == "RuntimeError: an illegal memory access"
    assert "none ran" in tuning.page_of({DECODING: rows})
