"""A prepared corpus has no duplicates, is split by content and made in a stream, and is written whole or not at all."""

import json
import multiprocessing
import os
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import printed, python
from tqdm import tqdm

from fastlm.cli import main
from fastlm.lm.data import in_processes
from fastlm.lm.data.duplicates import SHINGLE, Duplicates, normal_form, signature
from fastlm.lm.data.prepare import SPLITS, prepare, read_split, split_of
from fastlm.lm.data.tokenizer import load_tokenizer

WORDS = [f"{a}{b}{c}" for a in "bdfklmnprst" for b in "aeiou" for c in ("n", "rt", "la", "mon")]


def sentence(rng, words=12):
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def write(path, texts, labels=None):
    rows = ({"text": text, "label": label} for text, label in zip(texts, labels or [None] * len(texts)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(folder):
    return {split: list(read_split(folder, split)) for split in SPLITS}


def jaccard(one, other):
    def shingles(text):
        form = normal_form(text)
        return {form[i : i + SHINGLE] for i in range(max(len(form) - SHINGLE + 1, 1))}

    one, other = shingles(one), shingles(other)
    return len(one & other) / len(one | other)


# ---- duplicates -------------------------------------------------------------------------------------------------------------


def test_signatures_agree_in_about_the_jaccard_index():
    """Allow the errors of chance: a share of 120 hashes deviates by 0.046 at most, the mean of 40 pairs by 0.0073."""
    rng, errors = random.Random(0), []
    for changed in range(40):
        words = rng.choices(WORDS, k=100)
        other = [rng.choice(WORDS) if rng.random() < changed / 100 else word for word in words]
        one, other = " ".join(words), " ".join(other)
        errors.append(np.mean(signature(one) == signature(other)) - jaccard(one, other))
    assert abs(np.mean(errors)) < 4 * 0.0073 and np.max(np.abs(errors)) < 4 * 0.046


@pytest.mark.parametrize("text", ["", "a", "short", "三" * 9])
def test_texts_shorter_than_a_shingle(tmp_path, text):
    with Duplicates(tmp_path / "index") as seen:
        assert [seen.add(text, 0), seen.add("quite another text", 1), seen.add(text, 2)] == [None, None, "exact duplicate"]


def test_kinds_of_duplicates(tmp_path):
    rng = random.Random(1)
    text = " ".join(sentence(rng) for _ in range(10))
    near = text.replace(text[200:210], "!")
    with Duplicates(tmp_path / "index") as seen:
        assert seen.add(text, owner=0) is None
        assert seen.add(text.upper().replace(" ", "\n "), owner=1) == "exact duplicate"
        assert seen.add(near, owner=0) is None, "a window of the same document"
        assert seen.add(text + " More.", owner=1) == "near duplicate"
        assert seen.add(" ".join(sentence(rng) for _ in range(10)), owner=2) is None
    with Duplicates(tmp_path / "exact", similarity=1) as seen:
        assert [seen.add(text, 0), seen.add(near, 1), seen.add(near, 2)] == [None, None, "exact duplicate"]
    with pytest.raises(ValueError, match=r"similarity must be above 0\.5 and at most 1; got 0\.2"):
        Duplicates(tmp_path / "bad", similarity=0.2)


def test_how_many_near_duplicates_are_found(tmp_path):
    """All pairs with a Jaccard index well above the threshold are found, and none of those well below it."""
    rng = random.Random(3)
    with Duplicates(tmp_path / "index") as seen:
        for number in range(150):
            words = rng.choices(WORDS, k=120)
            text = " ".join(words)
            assert seen.add(text, 3 * number) is None
            less = " ".join(words[:88] + rng.choices(WORDS, k=32))
            assert 0.5 < jaccard(text, less) < 0.65 and seen.add(less, 3 * number + 1) is None
            words[rng.randrange(120)] = "changed"
            assert jaccard(text, " ".join(words)) > 0.9 and seen.add(" ".join(words), 3 * number + 2) == "near duplicate"


def test_texts_of_a_template_take_linear_time_and_near_duplicates_among_them_are_found(tmp_path):
    """All texts share four fifths of a template. Twice the texts take less than thrice as long."""
    rng = random.Random(13)
    template = rng.choices(WORDS, k=60)

    def filled():
        return [
            rng.choice("abcdefg") * 3 + rng.choice(WORDS) if number % 5 == 0 else word for number, word in enumerate(template)
        ]

    def seconds(count, path):
        start = time.process_time()
        with Duplicates(path) as seen:
            for number in range(count):
                words = filled()
                seen.add(" ".join(words), number)
                if number % 20 == 0:
                    words[59] = "changed"
                    assert seen.add(" ".join(words), count + number) is not None
        return time.process_time() - start

    assert seconds(3000, tmp_path / "large") < max(3 * seconds(1500, tmp_path / "small"), 1)


# ---- the corpus -------------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.lists(st.sampled_from(["One is here. ", "Two follows it. ", "Three, then. ", "4\n\n", "ONE IS HERE. "])))


@settings(max_examples=40)
@given(TEXTS)
def test_no_text_is_there_twice_and_no_document_crosses_splits(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("corpus")
    source = write(folder / "in.jsonl", ["".join(text) for text in texts] + ["Something is left to train on."])
    options = {"window": 40, "overlap": 15, "min_characters": 1, "similarity": 1, "vocab_size": 0}
    try:
        prepare([source], folder / "out", validation=0.3, test=0.3, **options)
    except ValueError as error:
        assert "no text is left to train on" in str(error)
        return
    found = records(folder / "out")
    forms = [normal_form(record["text"]) for split in SPLITS for record in found[split]]
    assert len(forms) == len(set(forms))
    numbers = [{record["document"] for record in found[split]} for split in SPLITS]
    assert not (numbers[0] & numbers[1] or numbers[0] & numbers[2] or numbers[1] & numbers[2])
    assert all(len(record["text"]) <= 40 for split in SPLITS for record in found[split])


def test_near_duplicates_do_not_cross_splits(tmp_path):
    """Each document comes four times with one word changed, and shares three sentences with the next: one of four is kept."""
    rng = random.Random(4)
    originals = [" ".join(sentence(rng) for _ in range(8)) for _ in range(60)]
    texts = originals + [" ".join([*text.split()[:-1], f"end{i}."]) for text in originals for i in range(3)]
    rng.shuffle(texts)
    report = prepare([write(tmp_path / "in.jsonl", texts)], tmp_path / "out", validation=0.3, test=0.3, vocab_size=0)
    found = records(tmp_path / "out")
    assert sum(map(len, found.values())) == 60 and report.dropped == {"near duplicate": 180}
    assert all(len(found[split]) > 5 for split in SPLITS)


def test_a_small_corpus_takes_what_vocabulary_there_is_and_says_so(tmp_path, capsys):
    rng = random.Random(14)
    source = write(tmp_path / "in.jsonl", [sentence(rng) for _ in range(200)])
    assert main(["lm", "prepare", str(source), "--output", str(tmp_path / "out")]) == 0
    size = load_tokenizer(tmp_path / "out").vocab_size
    assert 260 < size < 4096
    assert f"warning     the vocabulary was to have 4096 tokens, and the texts yield {size}" in capsys.readouterr().out


def test_six_files_give_texts_of_every_split_or_a_warning(tmp_path):
    rng = random.Random(15)
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(" ".join(sentence(rng) for _ in range(40)))
    options = {"unit": "file", "validation": 0.01, "test": 0.01}
    report = prepare([tmp_path / "in"], tmp_path / "out", **options)
    found = records(tmp_path / "out")  # which checks the sizes of the files
    assert [split["documents"] for split in report.splits.values()] == [4, 1, 1] and len(report.warnings) == 3
    for name, split in report.splits.items():
        assert split["records"] == len(found[name]) and split["characters"] == sum(len(it["text"]) for it in found[name])
        assert split["documents"] == len({record["document"] for record in found[name]})
    for count, name in ((6, "validation"), (5, "test")):
        assert f"of {count} documents none fell to {name} by chance; one was moved there: " in str(report)
    again = prepare([tmp_path / "in" / f"{number}.txt" for number in (5, 2, 0, 1, 4, 3)], tmp_path / "again", **options)
    assert again.splits == report.splits, "whatever their order"
    for number in range(2, 6):
        (tmp_path / "in" / f"{number}.txt").unlink()
    report = prepare([tmp_path / "in"], tmp_path / "out", **options | {"validation": 0}, vocab_size=0)
    assert [split["documents"] for split in report.splits.values()] == [2, 0, 0]
    (warning,) = report.warnings
    assert warning.startswith("the corpus has no test texts") and "take paragraphs" in warning


def test_progress_is_shown_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    rng = random.Random(16)
    source = write(tmp_path / "in.jsonl", [sentence(rng) for _ in range(30)])
    for shown in (True, False):
        if shown:
            monkeypatch.setattr("fastlm.lm.data.prepare.tqdm", lambda **options: tqdm(**options | {"disable": False}))
        else:
            monkeypatch.undo()
        prepare([source], tmp_path / "out", vocab_size=0, progress=True)
        err = capsys.readouterr().err
        assert ("reading" in err and "30 documents" in err) if shown else not err


def test_splits_depend_on_content_alone():
    rng = random.Random(5)
    texts = [sentence(rng) for _ in range(4000)]
    splits = [split_of(text, 0.1, 0.2) for text in texts]
    for split, share in [("train", 0.7), ("validation", 0.1), ("test", 0.2)]:
        assert abs(splits.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert [split_of(text.upper() + "\n", 0.1, 0.2) for text in texts] == splits


def test_a_text_is_in_the_same_split_whatever_else_is_there(tmp_path):
    rng = random.Random(12)
    texts = [" ".join(sentence(rng) for _ in range(30)) for _ in range(60)]
    options = {"validation": 0.3, "test": 0.3, "vocab_size": 0}
    prepare([write(tmp_path / "all.jsonl", texts)], tmp_path / "all", **options)
    prepare([write(tmp_path / "some.jsonl", texts[:20:-1])], tmp_path / "some", **options)
    every, some = records(tmp_path / "all"), records(tmp_path / "some")
    for split in SPLITS:
        texts_of = [{record["text"] for record in found[split]} for found in (every, some)]
        assert texts_of[1] and texts_of[1] < texts_of[0]


def test_the_report_counts_everything(tmp_path):
    rng = random.Random(6)
    long = " ".join(sentence(rng) for _ in range(60))
    texts = [long, long, "no", "1 2 3 4 5 6 7 8 9 10 11 12", *(sentence(rng) for _ in range(80))]
    source = write(tmp_path / "in.jsonl", texts, [str(number) for number in range(len(texts))])
    with open(source, "a") as file:
        file.write("{broken\n" * 7)
    report = prepare([source], tmp_path / "out", vocab_size=300)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report.documents == 84 and written["dropped"] == {"exact duplicate": 1, "too short": 1, "too few letters": 1}
    assert written["examples"]["too short"] == [f"{source}:3: 'no'"]
    assert written["problems"]["count"] == 7 and written["problems"]["files"] == {str(source): {"not JSON": 7}}
    dropped = {"dropped: exact duplicate": 1, "dropped: too short": 1, "dropped: too few letters": 1}
    assert written["files"] == {str(source): {"documents": 84, **dropped}}
    assert written["sources"] == [str(source)] and written["settings"]["window"] == 1000
    assert report.splits == written["splits"] and sum(split["documents"] for split in report.splits.values()) == 81
    found = [record for split in records(tmp_path / "out").values() for record in split]
    assert sum(split["records"] for split in report.splits.values()) == len(found)
    assert sum(split["characters"] for split in report.splits.values()) == sum(len(record["text"]) for record in found)
    assert all(texts[int(record["label"])].find(record["text"]) >= 0 for record in found)
    windows = [record["text"] for record in found if record["label"] == "0"]
    assert len(windows) > 4 and long.startswith(windows[0]) and long.endswith(windows[-1])
    assert load_tokenizer(tmp_path / "out").vocab_size == written["vocabulary"] == 300
    assert "7 rows or files" in str(report) and f"{source}:85: not JSON" in str(report)


def test_the_same_corpus_gives_the_same_bytes(tmp_path):
    rng = random.Random(7)
    source = write(tmp_path / "in.jsonl", [" ".join(sentence(rng) for _ in range(20)) for _ in range(100)])
    for name in ("one", "two"):
        prepare([source], tmp_path / name, vocab_size=400)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["report.json", "test.jsonl", "tokenizer.json", "train.jsonl", "validation.jsonl"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_names_and_labels_that_are_no_unicode(tmp_path, capsys):
    """Keep a lone surrogate in a label and a file name that is not UTF-8, and print them with escapes."""
    source = tmp_path / "in\udcff.jsonl"
    write(source, ["A text that is long enough.", "short"], ["odd \ud800", None])
    assert main(["lm", "prepare", str(source), "--output", str(tmp_path / "out"), "--vocab-size", "0"]) == 0
    (record,) = [record for split in records(tmp_path / "out").values() for record in split]
    assert record["label"] == "odd \ud800" and record["origin"] == f"{source}:1"
    assert "in\\udcff.jsonl:2: 'short'" in capsys.readouterr().out


def test_a_corpus_is_not_read_as_a_text_of_its_own(tmp_path):
    source = write(tmp_path / "in.jsonl", ["A text that is long enough."])
    for paths, output in [([tmp_path], tmp_path / "out"), ([source], tmp_path), ([tmp_path], tmp_path)]:
        with pytest.raises(ValueError, match="output must be apart from what is read; .* lie one inside the other"):
            prepare(paths, output)
    assert list(tmp_path.iterdir()) == [source]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_fails_leaves_the_last_good_corpus(tmp_path):
    rng = random.Random(8)
    source, out = write(tmp_path / "in.jsonl", [sentence(rng) for _ in range(50)]), tmp_path / "out"
    prepare([source], out, vocab_size=280)
    before = contents(out)
    with pytest.raises(ValueError, match="no text is left to train on in(.|\n)*50: too short"):
        prepare([source], out, min_characters=1000)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        prepare([source, tmp_path / "nowhere"], out)
    assert contents(out) == before
    prepare([source], out, vocab_size=0)
    assert "tokenizer.json" not in contents(out), "of another corpus"


@pytest.mark.parametrize(("limit", "message"), [(2_000_000, "the index of duplicates could not"), (300_000, "too large")])
def test_a_full_disk_leaves_the_last_good_corpus(tmp_path, limit, message):
    """A limit on file sizes stands for a full disk. It stops the index, if its cache is small, or else the corpus."""
    rng = random.Random(9)
    small = write(tmp_path / "small.jsonl", [sentence(rng) for _ in range(50)])
    large = write(tmp_path / "large.jsonl", [sentence(rng) for _ in range(5000)])
    prepare([small], tmp_path / "out", vocab_size=0)
    before = contents(tmp_path / "out")
    process = python(f"""
import resource
from fastlm.lm.data import duplicates
from fastlm.lm.data.prepare import prepare
duplicates.CACHE = 1 if {limit} > 1_000_000 else 16
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare([{str(large)!r}], {str(tmp_path / "out")!r}, vocab_size=0)
except OSError as error:
    print("OSError", error)
""")
    assert process.stdout.startswith("OSError") and message in process.stdout, process
    assert contents(tmp_path / "out") == before


def test_the_index_of_duplicates_is_on_the_disk(tmp_path):
    """With a cache of 1 MiB, memory grows by less than half of the index's size."""
    code = f"""
import os, random
from pathlib import Path
from fastlm.lm.data import duplicates
duplicates.CACHE = 1
rng, path = random.Random(0), Path("{tmp_path}/index")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
with duplicates.Duplicates(path) as seen:
    for number in range(15_000):
        assert seen.add("".join(rng.choices("abcdefgh", k=30)), number) is None
        if number == 500:
            before = resident()
    print(resident() - before, path.stat().st_size)
"""
    grown, size = map(int, printed(code, OMP_NUM_THREADS="1").split())
    assert size > 1e7 and grown < size / 2


def test_a_corpus_larger_than_the_memory_it_takes(tmp_path):
    """Peak memory grows from 2 MB to 30 MB of text by less than a third of the difference."""
    code = f"""
import random, resource
from fastlm.lm.data.prepare import prepare
rng = random.Random(0)
words = {WORDS!r}
def corpus(path, megabytes):
    with open(path, "w") as file:
        for _ in range(megabytes * 20):
            text = ". ".join(" ".join(rng.choices(words, k=12)) for _ in range(900))
            file.write(text[:50_000] + "\\n\\n")
for megabytes in (2, 30):
    path = "{tmp_path}/%d.txt" % megabytes
    corpus(path, megabytes)
    report = prepare([path], "{tmp_path}/out", window=50_000, overlap=0, vocab_size=0)
    print(sum(split["characters"] for split in report.splits.values()))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    few, before, many, after = map(int, printed(code, OMP_NUM_THREADS="1").split())
    assert many - few > 25e6
    assert after - before < (many - few) / 3


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory):
    """Write 2 MB of paragraphs, a third of them not ASCII, with some noise, duplicates and long ones."""
    rng, path = random.Random(17), tmp_path_factory.mktemp("paragraphs") / "in.txt"
    texts = [" ".join(sentence(rng) for _ in range(rng.choice([1, 8, 8, 8, 30]))) for _ in range(2800)]
    texts = [text.replace(".", "…”") if number % 3 == 0 else text for number, text in enumerate(texts)]
    path.write_text("\n\n".join([*texts, *texts[::50], *["1 2 3 4"] * 20]))
    return path


def test_several_processes_give_the_bytes_of_one(tmp_path, paragraphs, monkeypatch):
    reports = []
    for name, alone in (("one", 1 << 30), ("several", 1)):
        monkeypatch.setattr(in_processes, "ALONE", alone)
        reports.append(prepare([paragraphs], tmp_path / name, vocab_size=0))
    assert reports[0] == reports[1] and reports[0].dropped["exact duplicate"] > 50
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
    assert not multiprocessing.active_children()


def test_what_stops_the_reading_stops_the_processes(tmp_path, paragraphs, monkeypatch):
    monkeypatch.setattr(in_processes, "ALONE", 1)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        prepare([paragraphs, tmp_path / "nowhere"], tmp_path / "out", vocab_size=0)
    assert not multiprocessing.active_children() and list((tmp_path / "out").iterdir()) == []


def test_two_megabytes_take_two_seconds_of_two_processors(tmp_path, paragraphs):
    """The limit is that time, doubled for machines that do other things, too."""
    before = os.times()
    prepare([paragraphs], tmp_path / "out", vocab_size=0)
    spent = sum(os.times()[:4]) - sum(before[:4])
    assert spent < 2 * 2 * paragraphs.stat().st_size / 2e6


# ---- reading it, and bad arguments ------------------------------------------------------------------------------------------


def test_a_corpus_cut_short_is_refused(tmp_path):
    rng = random.Random(10)
    prepare([write(tmp_path / "in.jsonl", [sentence(rng) for _ in range(50)])], tmp_path / "out", vocab_size=0)
    path = tmp_path / "out" / "train.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train\.jsonl has \d+ bytes, and report\.json says \d+: prepare the corpus again"):
        read_split(tmp_path / "out", "train")
    with pytest.raises(ValueError, match="split must be one of train, validation, test; got 'dev'"):
        read_split(tmp_path / "out", "dev")
    with pytest.raises(FileNotFoundError, match=r"lacks report\.json or test\.jsonl: fastlm lm prepare"):
        read_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.6, "test": 0.4}, "validation and test must be shares that leave some to train on; got 0.6 and 0.4"),
        ({"test": -0.1}, "validation and test must be shares"),
        ({"window": 0}, "size \\(of a window\\) must be at least 1 character; got 0"),
        ({"overlap": 501}, "overlap must be from 0 to half of the window of 1000 characters; got 501"),
        ({"similarity": 0}, "similarity must be above 0.5"),
        ({"vocab_size": 100}, "vocab_size must be at least 260"),
        ({"unit": "word"}, "unit must be one of"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    rng = random.Random(11)
    source = write(tmp_path / "in.jsonl", [sentence(rng) for _ in range(20)])
    with pytest.raises(ValueError, match=message):
        prepare([source], tmp_path / "out", **options)
    assert not (tmp_path / "out" / "report.json").exists()


def test_bad_paths(tmp_path):
    with pytest.raises(TypeError, match="paths must be a sequence of paths, or None; got 'in.txt'"):
        prepare("in.txt", tmp_path / "out")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="output must be a folder; .*file is a file"):
        prepare(None, tmp_path / "file")
