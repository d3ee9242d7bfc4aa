"""fastlm.lm reads text, JSONL and CSV in a stream, counts malformed rows, and names files that it cannot read."""

import csv
import gzip
import inspect
import io
import json
import random
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.lm.data.default_corpus import default_corpus
from fastlm.lm.data.lines import MAX_DOCUMENT, MAX_LINE
from fastlm.lm.data.problems import Problems
from fastlm.lm.data.read import documents
from fastlm.lm.data.rows import CHUNK, rows


def read(*paths, **options):
    problems = Problems()
    return list(documents(paths, problems, **options)), problems


def test_units_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne.\r\ntwo\n\n \nthree\n".encode())
    for unit, texts, lines in [
        ("paragraph", ["One.\ntwo\n", "three"], [1, 5]),
        ("line", ["One.", "two", "three"], [1, 2, 5]),
        ("file", ["One.\ntwo\n\n \nthree"], [1]),
    ]:
        found, problems = read(path, unit=unit)
        assert [document.text for document in found] == texts and problems.count == 0
        assert [document.origin for document in found] == [f"{path}:{line}" for line in lines]


def test_a_long_document_comes_in_several(tmp_path):
    path, line = tmp_path / "a.txt", "a line of words\n"
    path.write_text(line * (2 * MAX_DOCUMENT // len(line) + 2))
    found, _ = read(path, unit="file")
    assert len(found) == 3 and max(len(document.text) for document in found) < MAX_DOCUMENT + MAX_DOCUMENT // 8
    assert "\n".join(document.text for document in found).count("a line of words") == 2 * MAX_DOCUMENT // len(line) + 2


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [{"text": "eins", "label": "de"}, {"text": "two\nlines", "label": 3}, {"text": "三"}]
    bad = ["{", "[1]", '{"text": 1}', '{"label": "x"}', "[" * 100_000, '{"text": "\\u12"}']
    path.write_text("\n".join([json.dumps(good[0]), *bad, "", *map(json.dumps, good[1:])]))
    found, problems = read(path)
    assert [(d.text, d.label, d.origin) for d in found] == [
        ("eins", "de", f"{path}:1"),
        ("two\nlines", "3", f"{path}:9"),
        ("三", None, f"{path}:10"),
    ]
    assert problems.count == 6 and len(problems.first) == 5 and problems.reasons["not JSON"] == 3
    assert problems.first[2] == f"{path}:4: the field 'text' must be a text; got 1"


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('label,text\nx,"two\nlines, ""quoted"""\nx\ny,b,c\n\nz,"a"b\ny,last\n')
    found, problems = read(path)
    assert [(d.text, d.label) for d in found] == [('two\nlines, "quoted"', "x"), ("last", "y")]
    assert problems.count == 3
    assert problems.first[0] == f"{path}:4: expected 2 fields, as in the header; got 1" and "not CSV" in problems.first[2]


@pytest.mark.parametrize("last", ["", 'z,"a quoted one"\n', 'z,"two\nlines"\n', '"z",""\n' * 3])
def test_a_quote_that_is_never_closed_costs_its_line_alone_and_says_so(tmp_path, last):
    path, many = tmp_path / "a.csv", [("y", f"number {number}") for number in range(50_000)]
    path.write_text('label,text\nx,fine\nx,"open\n' + "".join(f"{label},{text}\n" for label, text in many) + last)
    found, problems = read(path)
    assert [(d.label, d.text) for d in found][:50_001] == [("x", "fine"), *many] and len(found) >= 50_001
    assert {d.text for d in found[50_001:]} <= {"a quoted one", "two\nlines"} and bool(found[50_001:]) == ('z,"' in last)
    assert problems.count == 1 and problems.first[0].startswith(f"{path}:3: not CSV, where a quote opens that is not closed")


def test_a_field_of_a_million_characters(tmp_path):
    path, long = tmp_path / "a.csv", "a line of words\n" * 70_000
    path.write_text(f'text\n"{long}"\nlast\n')
    found, problems = read(path)
    assert [d.text for d in found] == [long, "last"] and found[0].origin == f"{path}:2" and not problems.count


def test_a_text_of_one_long_line_comes_in_pieces(tmp_path):
    for text in ("words of one line " * 300_000, "这是一行没有空格的文字。" * 300_000):
        path = tmp_path / "a.txt"
        path.write_text(f"{text}\n\nlast\n")
        found, problems = read(path)
        assert (
            "".join(document.text for document in found[:-1]) == f"{text}\n" and found[-1].text == "last" and not problems.count
        )
        assert len(found) > 5 and max(len(document.text) for document in found) <= MAX_DOCUMENT + 20
        assert found[1].origin == f"{path}:1" and found[-1].origin == f"{path}:3"
    path.write_bytes(b"good " * 500_000 + b"\xff" + b" good" * 500_000)
    found, problems = read(path)
    assert sum(len(document.text) for document in found) > 3_900_000 and problems.count == 1, "it costs a piece"
    assert problems.first[0].startswith(f"{path}:1: not utf-8: byte 0xff at column")


def test_json_arrays(tmp_path):
    path = tmp_path / "a.json"
    good = [{"text": f"number {number}, 三 " * 40, "label": number % 3} for number in range(6_000)]
    path.write_text(json.dumps([*good[:3], {"text": 1}, "x", *good[3:]], indent=1, ensure_ascii=False))
    found, problems = read(path)
    assert path.stat().st_size > 2 * CHUNK
    assert [(d.text, d.label) for d in found] == [(row["text"], str(row["label"])) for row in good]
    assert found[1].origin == f"{path}:6" and problems.count == 2
    assert problems.first[0] == f"{path}:14: the field 'text' must be a text; got 1"
    path.write_text(path.read_text()[:-30])
    found, problems = read(path)
    assert len(found) == 5_999 and "not JSON, so that the rest of the array is not read" in problems.first[2]
    path.write_text('{"text": "a row"}\n{"text": "another"}\n')
    assert [d.text for d in read(path)[0]] == ["a row", "another"]
    path.write_text('{\n "text": "one object"\n}\n')
    with pytest.raises(ValueError, match=r"a\.json is neither an array of objects nor has an object in each line"):
        read(path)


def test_gzipped_files(tmp_path):
    for name, text in {
        "a.txt.gz": "one",
        "b.jsonl.gz": '{"text": "one"}',
        "c.csv.gz": "text\none",
        "d.json.gz": '[{"text": "one"}]',
    }.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert [document.text for document in read(tmp_path / name)[0]] == ["one"]
    assert len(read(tmp_path)[0]) == 4
    whole = gzip.compress(random.Random(0).randbytes(200_000).hex().encode())
    for content in (b"not gzipped", whole[:-20], whole[:-100] + b"\xff" * 100):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.txt\.gz is damaged or cut short"):
            read(tmp_path / "a.txt.gz")


def test_parquet(tmp_path, monkeypatch):
    parquet, path = pytest.importorskip("pyarrow.parquet"), tmp_path / "a.parquet"
    table = pytest.importorskip("pyarrow").table({"text": ["eins", None, "三"], "label": [1, 2, 3], "more": [[1], [2], []]})
    parquet.write_table(table, path)
    found, problems = read(path)
    assert found == [("eins", "1", f"{path}:1"), ("三", "3", f"{path}:3")]
    assert problems.first == [f"{path}:2: the field 'text' must be a text; got null"]
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'review'; its columns are text, label, more"):
        read(path, text_field="review")
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"b\.parquet is no Parquet file, or damaged"):
        read(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow to be read: pip install 'fastlm\[parquet\]'"):
        read(path)


def test_problems_are_counted_by_file_and_reason(tmp_path):
    for name, content in {
        "a.jsonl": "{\n[]\n" * 7,
        "b.csv": "text\na,b\n" * 2,
        "c.txt": "\0",
        "d.html": "x",
        "e.HTML": "x",
        "f": "x",
    }.items():
        (tmp_path / name).write_text(content)
    _, problems = read(tmp_path)
    assert problems.files == {
        f"{tmp_path}/a.jsonl": {"not JSON": 7, "expected an object": 7},
        f"{tmp_path}/b.csv": {"expected 1 fields, as in the header": 2},
        f"{tmp_path}/c.txt": {"is binary, not text: it has a zero byte at offset 0": 1},
        f"{tmp_path}/d.html": {"skipped: .html": 1},
        f"{tmp_path}/e.HTML": {"skipped: .html": 1},
        f"{tmp_path}/f": {"skipped: without a suffix": 1},
    }
    assert problems.count == 17 and problems.reasons["not JSON"] == 7
    skipped, counted, *reasons = problems.lines()
    assert skipped.endswith("3 files of folders, as their suffixes are not read: 2 .html, 1 without a suffix")
    assert counted == "unreadable  17 rows or files of 3 files:"
    assert reasons[1] == f"            7: {tmp_path}/a.jsonl:2: expected an object; got list" and len(reasons) == 4


@given(st.lists(st.tuples(st.text("ab ,\"\n\t'ü三"), st.text('ab,"\nü三')), max_size=8))
def test_csv_gives_back_what_was_written(tmp_path, values):
    path, out = tmp_path / "a.csv", io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("source", "target"), *values])
    path.write_text(out.getvalue(), newline="")
    problems = Problems()
    assert [tuple(row.values()) for _, row in rows(path, ["source", "target"], problems)] == values and not problems.count


def test_names_of_fields(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("review\tstars\ngood, good\t5\n")
    found, _ = read(path, text_field="review", label_field="stars")
    assert found == [("good, good", "5", f"{path}:2")]
    with pytest.raises(ValueError, match=r"a\.tsv has no column 'text'; its header is review, stars"):
        read(path)


def test_a_folder(tmp_path):
    for name, content in [("b/c.md", b"see"), ("a.txt", b"ay"), ("x.png", b"\x89PNG\0"), (".hidden.txt", b"no")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "other.csv").write_bytes(b"x,y\n1,2\n")
    found, problems = read(tmp_path)
    assert [document.text for document in found] == ["ay", "see"]
    assert problems.count == 3
    assert problems.first == [
        f"{tmp_path}/binary.txt: is binary, not text: it has a zero byte at offset 1",
        f"{tmp_path}/empty.txt: is empty",
        f"{tmp_path}/other.csv: has no column 'text'; its header is x, y",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"ab\0c", "is binary, not text: it has a zero byte at offset 2"),
        ("text".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        (
            "caf\xe9 au lait".encode("latin-1"),
            "is not utf-8 text: byte 0xe9 at offset 3; name its encoding, such as --encoding latin",
        ),
        (
            "今天天气很好，去公园。".encode("gb18030"),
            "is not utf-8 text: byte 0xbd at offset 0; name .*, such as --encoding gb18030, or",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt {message}"):
        read(path)


def test_other_bad_arguments(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    assert read(path, encoding="latin-1")[0][0].text == "café"
    path.write_bytes("今天天气很好".encode("gb18030"))
    assert read(path, encoding="gb18030")[0][0].text == "今天天气很好"
    path.write_text("\ufeffwith a mark", "utf-8")
    assert read(path, encoding="utf-8-sig")[0][0].text == read(path)[0][0].text == "with a mark"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file or folder"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="holds no file that ends in"):
        (tmp_path / "folder").mkdir()
        read(tmp_path / "folder")
    with pytest.raises(ValueError, match="encoding must be the name of a text encoding.*got 'nonsense'"):
        read(path, encoding="nonsense")
    with pytest.raises(ValueError, match="encoding must hold ASCII as it is"):
        read(path, encoding="utf-16-le")
    with pytest.raises(ValueError, match="unit must be one of paragraph, line, file; got 'word'"):
        read(path, unit="word")


def test_lines_that_cannot_be_decoded_or_never_end_are_malformed_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 20_000 + b"bad \xff\n" + b"x" * (MAX_LINE + 10) + b"\n" + good)
    found, problems = read(path)
    assert len(found) == 20_001 and found[-1] == ("good", None, f"{path}:20003")
    assert problems.first == [
        f"{path}:20001: not utf-8: byte 0xff at column 5",
        f"{path}:20002: the line is longer than {MAX_LINE} bytes",
    ]


def test_the_default_corpus_is_python_s_documentation():
    found = list(default_corpus())
    labels = {document.label for document in found}
    assert len(found) > 4000 and {"pydoc_data.topics", "asyncio", "json", "argparse"} <= labels
    assert not labels & {"test", "idlelib", "this"}
    dedent = next(document for document in found if document.text == inspect.getdoc(textwrap.dedent))
    assert dedent.origin.startswith("textwrap:") and dedent.label == "textwrap"
    assert [document.origin for document in default_corpus()] == [document.origin for document in found]
