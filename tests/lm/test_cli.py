"""The command line: ``fastlm lm prepare``, help texts without torch, and the language model as an extra."""

import json
from importlib.metadata import entry_points

import pytest
from support.lm_corpus import texts
from support.processes import fresh_python, output_of, printed, python

import fastlm
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


PROGRAM = """
import resource, sys
from fastlm_cli import main
def run(*arguments):
    sys.argv[1:] = arguments
    try:
        return main()
    except SystemExit as end:
        return end.code
"""


@pytest.mark.parametrize(
    ("arguments", "code", "most_seconds"),
    [
        (["--help"], 0, 1.0),
        (["doctor", "fly"], 2, 1.0),
        (["lm", "--help"], 0, 2.0),
        *(
            (["lm", name, "--help"], 0, 2.0)
            for name in (
                "prepare",
                "train",
                "finetune",
                "predict",
                "generate",
                "evaluate",
                "attend",
                "neighbours",
                "export",
                "serve",
            )
        ),
        (["lm", "train", "--epochs", "many"], 2, 2.0),
    ],
    ids=str,
)
def test_help_and_usage_errors_take_no_torch(arguments, code, most_seconds):
    """Hold each to seconds of the CPU, which a busy machine hardly stretches; importing torch alone takes longer."""
    measure = "print(sorted({'torch', 'transformers'} & sys.modules.keys()), sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    *_, line = output_of(fresh_python(f"{PROGRAM}\nassert run(*{arguments}) == {code}\n{measure}")).splitlines()
    heavy, _, seconds = line.rpartition(" ")
    assert heavy == "[]" and float(seconds) < most_seconds


@pytest.mark.parametrize("arguments", [["doctor"], ["lm", "prepare", "SOURCE", "--output", "OUTPUT", "--vocab-size", "0"]])
def test_the_program_loads_the_whole_package_before_a_command_runs(tmp_path, arguments):
    (tmp_path / "source.txt").write_text("\n\n".join(texts(50)))
    paths = {"SOURCE": f"{tmp_path}/source.txt", "OUTPUT": f"{tmp_path}/corpus"}
    arguments = [paths.get(argument, argument) for argument in arguments]
    code = (
        f"{PROGRAM}\nassert run(*{arguments}) == 0\nimport fastlm, torch\nprint(fastlm.__version__, torch.ops.fastlm.attention)"
    )
    assert output_of(fresh_python(code)).splitlines()[-1] == f"{fastlm.__version__} fastlm.attention"


def test_the_program_is_installed_as_the_light_package():
    (program,) = entry_points(group="console_scripts", name="fastlm")
    assert program.value == "fastlm_cli:main"


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
