"""Check in the files what CONTRIBUTING.md promises of the layout."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted(ROOT.glob("fastlm/**/*.py"))
NATIVE = sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())
MAX_LINES = 500


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- imports run one way ----------------------------------------------------------------------------------------------------

# The parts of fastlm that each part may import. A module's part is its first name under the package.
BELOW = {
    "reference": set(),
    "kernels": set(),
    "testing": set(),
    "backend": {"kernels", "_C"},
    "ops": {"reference", "backend"},
    "nn": {"ops"},
    "distributed": {"ops", "backend"},
    "integrations": {"distributed", "nn", "ops", "backend"},
    "lm": {"integrations", "distributed", "nn", "ops"},
    "fastlm_cli": {"cli"},
    "cli": {"lm", "integrations", "nn", "ops", "backend", "fastlm"},
    "fastlm": {"backend", "ops", "nn", "distributed"},  # fastlm/__init__.py
}


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT / "fastlm").parts[0]
    return "fastlm" if first == "__init__.py" else first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Return the parts of fastlm that a file imports, anywhere in it."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names_are_modules = base == ["fastlm"]
            modules += [[*base, alias.name] for alias in node.names] if names_are_modules else [base]
    parts = {(module + ["fastlm"])[1] if module[0] == "fastlm" else None for module in modules} - {None}
    return {part if part in BELOW or part == "_C" else "fastlm" for part in parts}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in BELOW, f"{name_of(path)} belongs to no part of the layout"
    assert imported_parts(path) <= BELOW[part] | {part}


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file under a folder of ``sys.path``; kernels/ is a part of the package."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = ("fastlm", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, name: str, modules: dict[str, Path]) -> set[str]:
    """Return which of ``modules`` a file imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + (node.module.split(".") if node.module else []))
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return found & modules.keys()


@pytest.mark.parametrize(
    ("root", "folders"), [(".", ("fastlm", "kernels")), ("benchmarks", (".",)), ("tests", ("support", "cases"))]
)
def test_no_files_import_each_other_in_a_circle(root, folders):
    root = ROOT / root
    modules = {module_name(path, root): path for folder in folders for path in root.glob(f"{folder}/**/*.py")}
    imports = {name: imported_modules(path, name, modules) for name, path in modules.items()}
    graphlib.TopologicalSorter(imports).prepare()  # It raises CycleError, which names the circle.


def test_kernels_import_torch_and_triton_only():
    for path in ROOT.glob("kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            others = {name.split(".")[0] for name in names} - {"torch", "triton", *sys.stdlib_module_names}
            assert not others, f"{name_of(path)} imports {others}"


def test_kernels_can_not_be_imported_under_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---- the C++ code -----------------------------------------------------------------------------------------------------------


def includes_of(path: Path) -> list[tuple[str, bool]]:
    """Return (included name, whether it is in quotes) for each include of a C++ file."""
    found = re.findall(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>|(\w+))', path.read_text(), flags=re.M)
    return [(quoted or angled or macro, not angled) for quoted, angled, macro in found]


@pytest.mark.parametrize("path", NATIVE, ids=name_of)
def test_native_code_includes_its_own_folder_and_common_only(path):
    folders = {path.relative_to(ROOT / "csrc").parts[0], "common"}
    for included, quoted in includes_of(path):
        if quoted and "." in included:  # A macro has no dot.
            target = (path.parent / included).resolve()
            assert target.exists(), f"{included} is not found from {name_of(path)}"
            assert target.relative_to(ROOT / "csrc").parts[0] in folders, included
        assert "torch" not in included and "ATen" not in included


# C headers and the compiler's intrinsics have no templates, of which the linker would keep one copy.
ALLOWED_IN_ISA_CODE = re.compile(r"(c?(std(int|def|bool)|limits|float|string|math)(\.h)?|(imm|x86|arm_)\w*\.h)")


def reached_from(path: Path) -> dict[str, str]:
    """Return the system headers that a file reaches through the repository's own headers, and from where."""
    found, todo, seen = {}, [path], set()
    while todo:
        current = todo.pop()
        if current in seen or not current.exists():
            continue
        seen.add(current)
        for included, quoted in includes_of(current):
            if quoted:
                todo.append((current.parent / included).resolve())
            else:
                found[included] = name_of(current)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/cpu/**/*-inl.h")), ids=name_of)
def test_code_for_each_instruction_set_includes_no_templates_of_the_standard_library(path):
    """Keep out what a std::vector did in such code: it leaked AVX instructions into the baseline through the linker."""
    for header, origin in reached_from(path).items():
        assert ALLOWED_IN_ISA_CODE.fullmatch(header), f"<{header}>, included by {origin}"


def isa_objects() -> list[Path]:
    """Return the objects of the newest build that hold code for one instruction set."""
    builds = {path.parent for path in ROOT.glob("build/*/build.ninja") if any(path.parent.glob("CMakeFiles/fastlm_isa_*.dir"))}
    newest = max(builds, key=lambda build: (build / "build.ninja").stat().st_mtime, default=None)
    return sorted(newest.glob("CMakeFiles/fastlm_isa_*.dir/**/*.o")) if newest else []


def test_objects_for_each_instruction_set_were_found():
    """Find what the build leaves in build/ (make test, pip install -e .), without which the next test would test nothing."""
    assert isa_objects()


@pytest.mark.parametrize("path", isa_objects(), ids=lambda path: str(path.relative_to(ROOT / "build")))
def test_objects_for_an_instruction_set_hold_no_weak_symbols(path):
    """Find no weak symbol: the linker keeps any one copy, and an AVX-512 copy would crash an AVX2 machine."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"^\S+ [WwVvu] .*$", symbols, flags=re.M)


# ---- all files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", tracked_files(), ids=name_of)
def test_no_source_file_is_longer_than_a_reader_can_hold(path):
    if path == ROOT / "benchmarks" / "RESULTS.md":
        return  # A run writes this report, and its tables are folded away.
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".txt", ".toml"} or path.name == "Makefile":
        assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_file_names_the_host_of_a_package_index():
    """Indexes are a matter of the machine's settings; a host in a file would override them."""
    host = re.compile(r"pypi\.(org|python)|pythonhosted\.org|download\.pytorch\.org|anaconda\.(org|com)/")
    others = [path for path in tracked_files() if path != Path(__file__)]
    assert [name_of(path) for path in others if host.search(path.read_text(errors="ignore"))] == []
