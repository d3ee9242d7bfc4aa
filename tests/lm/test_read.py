"""fastlm.lm reads text, JSONL and CSV in a stream, counts malformed rows, and names files that it cannot read."""

import csv
import inspect
import io
import json
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.lm.data.default_corpus import default_corpus
from fastlm.lm.data.read import MAX_DOCUMENT, MAX_LINE, Problems, documents, rows


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
    assert problems.count == 6 and len(problems.first) == 5
    assert problems.first[2] == f"{path}:4: the field 'text' must be a text; got 1"


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('label,text\nx,"two\nlines, ""quoted"""\nx\ny,b,c\n\nz,"a"b\ny,last\n')
    found, problems = read(path)
    assert [(d.text, d.label) for d in found] == [('two\nlines, "quoted"', "x"), ("last", "y")]
    assert problems.count == 3
    assert problems.first[0] == f"{path}:4: expected 2 fields, as in the header; got 1" and "not CSV" in problems.first[2]


def test_a_quote_that_is_never_closed_costs_what_follows_it_and_says_so(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\nfine\n"open\n' + "words\n" * 10)
    found, problems = read(path)
    assert [d.text for d in found] == ["fine"] and problems.count == 1 and "not CSV" in problems.first[0]


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
        ("caf\xe9 au lait".encode("latin-1"), "is not utf-8 text: byte 0xe9 at offset 3; name its encoding"),
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
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" * 20_000 + b"bad \xff\n" + b"x" * (MAX_LINE + 10) + b"\nlast\n")
    found, problems = read(path, unit="line")
    assert len(found) == 20_001 and found[-1] == ("last", None, f"{path}:20003")
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
