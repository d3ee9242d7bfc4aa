"""Test what the benchmarks read from samples, and how two runs are compared."""

import random

import pytest
from report import compare
from report.plots import apart
from suite.units import count, duration, growth_exponent, percentiles, rate, times
from support.bench import BASE, FORWARD, OTHER, OWN, entry, made_up_run

SIZES = ("B16 H8 S128", "B4 H8 S512", "B1 H8 S2048")

# ---- samples ----------------------------------------------------------------------------------------------------------------


def test_percentiles_are_between_samples_and_in_order():
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_a_growth_exponent_is_found(exponent):
    sizes = [128, 512, 2048, 8192]
    assert growth_exponent(sizes, [3e-6 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-9)


def test_there_is_no_growth_without_two_sizes():
    assert growth_exponent([64], [1.0]) is None
    assert growth_exponent([64, 64], [1.0, 2.0]) is None
    assert growth_exponent([64, 128], [0.0, 2.0]) is None


def test_figures_have_three_digits_and_a_unit():
    assert [duration(s) for s in (4.321e-6, 0.0123456, 2.5, 999.6e-6)] == ["4.32 µs", "12.3 ms", "2.5 s", "1000 µs"]
    assert [count(n) for n in (3200, 65536, 1 << 20)] == ["3,200", "64K", "1M"]
    assert [rate(r) for r in (0.02751, 193.6, 999.7, 27532.0)] == ["0.0275", "194", "1,000", "27,500"]
    assert [times(r) for r in (0.984, 1.0, 2.25, 28.4, 128.0)] == ["0.98 ×", "1.0 ×", "2.2 ×", "28 ×", "128 ×"]


def test_labels_are_moved_apart_and_stay_inside():
    places = apart([0.5, 0.52, 0.97, 0.99], 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in zip(places, places[1:]))
    assert places[-1] <= 1.0 and places[0] == 0.5


# ---- comparing --------------------------------------------------------------------------------------------------------------


def rounds(seconds: float, seed: int, spread: float = 0.02) -> list[float]:
    draw = random.Random(seed)
    return [seconds * (1 + spread * draw.uniform(-1, 1)) for _ in range(30)]


def a_run(own: float, drift: float = 1.0, spread: float = 0.02, seed: int = 0, **machine) -> dict:
    """Make up a run: fastlm takes ``own`` seconds in the last size and 1 in others, peers 2, all multiplied by ``drift``."""
    entries = []
    for i, workload in enumerate(SIZES):
        seconds = own if workload == SIZES[-1] else 1.0
        entries.append(entry(OWN, rounds(drift * seconds, seed + i, spread), workload=workload))
        entries += [entry(peer, rounds(2 * drift, seed + 9 + i, spread), workload=workload) for peer in (BASE, OTHER)]
    run = made_up_run(*entries)
    run["machine"] |= machine
    return run


@pytest.mark.parametrize(("own", "verdict"), [(1.2, compare.SLOWER), (0.8, compare.FASTER), (1.01, compare.SAME)])
def test_a_change_is_told_from_noise(own, verdict):
    found = compare.compare(a_run(1.0), a_run(own, seed=100))
    verdicts = {change.row.workload: change.verdict for change in found.changes}
    assert verdicts == dict.fromkeys(SIZES[:2], compare.SAME) | {SIZES[2]: verdict}


def test_a_slower_machine_is_not_a_slower_row():
    found = compare.compare(a_run(1.0), a_run(1.0, drift=1.5, seed=100))
    assert found.drift == pytest.approx(1.5, rel=0.02)
    assert not found.of(compare.SLOWER)


def test_a_row_that_alone_stayed_on_a_faster_machine_is_slower():
    found = compare.compare(a_run(1.0), a_run(1.5, drift=1 / 1.5, seed=100))
    assert [change.row.workload for change in found.of(compare.SLOWER)] == [SIZES[2]]


def test_what_overlaps_is_the_same():
    found = compare.compare(a_run(1.0, spread=0.5), a_run(1.15, spread=0.5, seed=100))
    assert not found.of(compare.SLOWER) and not found.of(compare.FASTER)


def test_peers_that_change_a_lot_raise_the_threshold():
    quiet, after = a_run(1.0), a_run(1.12, seed=100)
    for i, row in enumerate(r for r in after["benchmarks"] if r["params"]["implementation"] != OWN):
        row["stats"]["data"] = [seconds * (1.3 if i % 2 else 1 / 1.3) for seconds in row["stats"]["data"]]
    found = compare.compare(quiet, after)
    assert found.threshold > 0.2 and not found.of(compare.SLOWER)


def test_another_torch_is_no_control_group():
    found = compare.compare(a_run(1.0), a_run(1.2, drift=1.0, seed=100, torch="9.9"))
    assert (found.control, found.drift, found.threshold) == (0, 1.0, compare.ALONE)
    assert len(found.of(compare.SLOWER)) == 1


def test_rows_of_one_run_alone_are_named():
    more = entry(OWN, rounds(1.0, 1), workload="B1 H1 S8192")
    found = compare.compare(made_up_run(*a_run(1.0)["benchmarks"], more), a_run(1.0))
    assert [(row.op, row.workload) for row in found.gone] == [(FORWARD, "B1 H1 S8192")]
    assert not found.new
