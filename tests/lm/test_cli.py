"""``fastlm lm prepare``, and that the rest of fastlm needs nothing of it."""

import json

import pytest
from support.processes import printed, python

from fastlm.cli import main


def test_the_default_corpus_from_the_command_line(tmp_path, capsys):
    assert main(["lm", "prepare", "--output", str(tmp_path / "corpus"), "--vocab-size", "1000", "--similarity", "1"]) == 0
    out = capsys.readouterr().out
    assert "documents from Python's own documentation" in out and f"The corpus is in {tmp_path / 'corpus'}" in out
    assert json.loads((tmp_path / "corpus" / "report.json").read_text())["vocabulary"] == 1000
    with open(tmp_path / "corpus" / "train.jsonl") as file:
        labels = {json.loads(line)["label"] for line in file}
    assert {"asyncio", "pydoc_data.topics", "argparse"} <= labels


def test_errors_are_one_line_that_names_the_file(tmp_path, capsys):
    (tmp_path / "in.txt").write_bytes(b"a\0")
    assert main(["lm", "prepare", str(tmp_path / "in.txt"), "--output", str(tmp_path / "corpus")]) == 1
    assert capsys.readouterr().err == (
        f"fastlm lm prepare: {tmp_path}/in.txt is binary, not text: it has a zero byte at offset 1\n"
    )
    assert list((tmp_path / "corpus").iterdir()) == []


@pytest.mark.parametrize(("arguments", "expected"), [(["--help"], "lm"), (["lm", "--help"], "prepare")])
def test_help_lists_the_commands(capsys, arguments, expected):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0 and expected in capsys.readouterr().out


def test_help_of_prepare_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["lm", "prepare", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for part in ("--window N characters of a text at most; longer ones are cut (default: 1000)", "report.json", "examples:"):
        assert part in out


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["lm", "fly"])
    assert end.value.code == 2 and "fly" in capsys.readouterr().err


def test_fastlm_does_not_import_its_language_model():
    loaded = printed("import sys, fastlm, fastlm.cli; print(*sys.modules)").split()
    assert "fastlm.cli" in loaded and not [name for name in loaded if name.startswith(("fastlm.lm", "ftfy", "tokenizers"))]


def test_a_missing_extra_is_named():
    process = python("""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ftfy" else find(name, *rest)
from fastlm.cli import main
sys.exit(main(["lm", "prepare"]))
""")
    assert process.returncode == 1 and process.stderr == "fastlm lm: fastlm.lm needs ftfy: pip install 'fastlm[lm]'\n"
