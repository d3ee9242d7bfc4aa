"""Test the report: what a row says, and that HTML and Markdown are the same page, safe and in need of no other file."""

import json
import re
from html.parser import HTMLParser

import pytest
import report
from report import blocks_of
from report.blocks import Bullets, Code, Details, Heading, Plot, Table, Text, Warn, plain
from report.html import write_html
from report.markdown import write_markdown
from report.plot_style import new_figure
from report.results import results_of
from support.bench import BASE, FORWARD, OTHER, OWN, entry, made_up_run

NASTY = "<script>alert(1)</script> a|b *c* _d_ `e` [f](g) \\h &amp;"


@pytest.fixture
def run() -> dict:
    """Make up a run with two sizes, the second's difference within the noise, memory of one, and a missing peer."""
    rows = [
        entry(OWN, [1.0, 1.0, 1.1], error=1e-7, allowed=2e-7),
        entry(OWN, [1.0, 1.2, 1.0], turn=1, error=1e-7, allowed=2e-7),
        entry(BASE, [2.0, 2.0, 2.2]),
        entry(OWN, [1.0, 1.5, 2.0], workload="B1 H8 S2048"),
        entry(BASE, [1.1, 1.6, 2.1], workload="B1 H8 S2048"),
    ]
    key = {"op": FORWARD, "workload": "B4 H8 S512", "dtype": "float32"}
    memory = [
        {**key, "implementation": name, "bytes": b, "result_bytes": 50 << 20} for name, b in ((OWN, 60 << 20), (BASE, 80 << 20))
    ]
    missing = [{**key, "implementation": OTHER, "why_not": f"ImportError: {NASTY}"}]
    return made_up_run(*rows, missing=missing, memory=memory)


# ---- rows -------------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_rounds_of_all_its_turns(run):
    own = results_of(run)[0]
    assert (own.fast, own.seconds, own.slow) == pytest.approx((1.0, 1.0, 1.1))
    assert own.speed_up == pytest.approx(2.0) and not own.noisy
    assert own.throughput == pytest.approx(4 * 4 * 8 * 512 * 512 * 64 / 1e9)
    assert own.share(run["machine"]) == pytest.approx(own.throughput / 200.0)
    assert (own.peak_ratio, own.error) == (0.75, 1e-7)


def test_a_model_has_the_share_of_the_peak_that_its_counted_operations_are(run):
    counted = {"op": "GPT-2, small, training", "workload": "B1 S512, dropout 0.1", "flops": 50 * 10**9}
    first = {
        **counted,
        "flops": None,
    }  # fastlm's first turn, before operations are counted, and the only one that it had time for
    run["benchmarks"] += [entry("fastlm replace", [0.5, 0.5], **first), entry("before", [1.0, 1.0], **counted)]
    shares = {r.row.implementation: r.share(run["machine"]) for r in results_of(run) if r.row.op == counted["op"]}
    assert shares == {"fastlm replace": pytest.approx(100 / 200.0), "before": pytest.approx(50 / 200.0)}


def test_a_spread_wider_than_the_difference_is_told(run):
    noisy = {(r.row.workload, r.row.implementation): r.noisy for r in results_of(run)}
    assert noisy[("B1 H8 S2048", OWN)] and not noisy[("B4 H8 S512", OWN)]


def test_a_peer_that_is_missing_is_a_row_that_says_why(run):
    row = next(r for r in results_of(run) if r.row.implementation == OTHER)
    assert row.seconds is None and row.throughput is None and NASTY in row.why_not


# ---- the page ---------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Read a page as a browser does: its text, its tags, and every address that it names."""

    def __init__(self):
        super().__init__()
        self.words, self.tags, self.addresses, self.open, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "xlink:href", "data")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.words.append(text)


def a_plot(columns: int):
    figure = new_figure(3, 2)
    figure.subplots().plot([1, 2], [3, 4], "o-", label="<&>")
    return figure


BLOCKS = [
    Heading(1, "The title"),
    Text("Some **bold**, *italic* and `co<de>`; " + plain(NASTY)),
    Warn("Beware of " + plain(NASTY)),
    Bullets(["one", plain(NASTY)]),
    Code("fastlm bench <OP>"),
    Table(("a", "b"), [("1", plain(NASTY)), ("**2**", "–")]),
    Plot("a_plot", "a plot", a_plot),
    Details("More", [Table(("c",), [("3",)])]),
]


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert not reader.open
    return reader


def test_html_is_one_file_and_shows_text_as_it_stands(tmp_path):
    write_html(BLOCKS, tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert "script" not in reader.tags
    assert all(address.startswith(("#", "data:")) for address in reader.addresses), reader.addresses
    assert len(set(reader.ids)) == len(reader.ids)
    assert "".join(reader.words).count(NASTY) == 4
    assert {"strong", "em", "code", "details", "svg"} <= set(reader.tags)
    text = (tmp_path / "page.html").read_text()
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)


def test_every_colour_of_a_plot_is_one_that_the_style_sheet_changes(tmp_path):
    write_html(BLOCKS, tmp_path / "page.html")
    svgs = "".join(re.findall(r"<svg.*?</svg>", (tmp_path / "page.html").read_text(), flags=re.S))
    assert "var(--ink)" in svgs and "var(--grid)" in svgs
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", svgs)) <= {"#1f77b4"}  # matplotlib's own first colour, of a_plot


def test_markdown_says_the_same(tmp_path):
    write_markdown(BLOCKS, tmp_path / "page.md", tmp_path / "pictures")
    text = (tmp_path / "page.md").read_text()
    assert "![a plot](pictures/a_plot.png)" in text and (tmp_path / "pictures" / "a_plot.png").stat().st_size > 1000
    assert "<script" not in text and "&lt;script" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [3, 3, 3, 3, 2, 2, 2]
    assert "<details><summary>More</summary>\n\n| c |" in text


def test_a_whole_report_has_its_parts_in_both_forms(run, tmp_path):
    blocks = blocks_of(run, results_of(run), tmp_path)
    write_html(blocks, tmp_path / "report.html")
    write_markdown(blocks, tmp_path / "report.md", tmp_path)
    words, text = "".join(read(tmp_path / "report.html").words), (tmp_path / "report.md").read_text()
    for heading in ("Speed-ups", "Roofline", FORWARD, "Memory", "Goals", "How it was measured", "The machine"):
        assert heading in words and f"## {heading}" in text
    for part in ("2.00 ×", "1e-07 (≤ 2e-07)", "0.75 ×", "abc"):
        assert part in words and part in text
    assert "<b>a CPU</b> & co_" in words and NASTY in words
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "memory.png",
        "roofline.png",
        "speed_ups.png",
        "throughput_attention_forward.png",
    ]


def test_publishing_puts_the_report_and_its_pictures_alone_into_the_repository(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BENCHMARKS", tmp_path)
    out, stale = tmp_path / "out", tmp_path / "results" / "stale.png"
    for folder in (out, stale.parent):
        folder.mkdir()
    stale.touch()
    out.joinpath(report.RUN).write_text(json.dumps(run))
    report.write_report(out)
    assert stale.exists() and not (tmp_path / "RESULTS.md").exists()
    report.write_report(out, publish=True)
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "RESULTS.md").read_text())
    assert sorted(linked) == sorted(f"results/{path.name}" for path in stale.parent.iterdir()) and len(linked) == 4


def test_a_disturbed_run_says_so_first(run, tmp_path):
    run["machine"]["others_share"] = 0.5
    assert "Do not trust these times" in next(b for b in blocks_of(run, results_of(run), tmp_path) if isinstance(b, Warn)).text
