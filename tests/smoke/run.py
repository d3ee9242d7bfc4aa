"""Builds the sdist and the wheel as a release would, and tries the one wheel under several versions of torch.

python tests/smoke/run.py 2.13.0 2.14.1     # each in a fresh environment under build/smoke

The build environment has no torch: the wheel knows nothing of it. What smoke.py tries, it tries outside the repository.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "smoke"


def run(*command: str | Path, cwd: Path = WORK) -> None:
    """Run a command without the environment variables that would lead it back into the repository."""
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


def make_environment(name: str) -> Path:
    """Make a fresh environment, and return its Python."""
    venv.create(WORK / name, clear=True, with_pip=True)
    return WORK / name / "bin" / "python"


def build() -> Path:
    """Build the sdist and from it the wheel, and return the wheel."""
    dist = WORK / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    python = make_environment("build")
    run(python, "-m", "pip", "install", "--quiet", "build")
    run(python, "-m", "build", "--outdir", dist, cwd=ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    check_contents(sdist, wheel)
    return wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """All sources are in the sdist; package and kernels are in the wheel, tests and sources are not."""
    sources = subprocess.run(
        ["git", "ls-files", "csrc", "kernels", "fastlm"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    missing = set(sources.stdout.split()) - packed
    assert not missing, f"not in the sdist: {sorted(missing)}"
    installed = zipfile.ZipFile(wheel).namelist()
    modules = {f"fastlm/{name}" for name in sources.stdout.split() if name.startswith("kernels/") and name.endswith(".py")}
    modules |= {
        name.replace("fastlm/fastlm_cli/", "fastlm_cli/") for name in sources.stdout.split() if name.startswith("fastlm/")
    }
    assert modules <= set(installed), f"not in the wheel: {sorted(modules - set(installed))}"
    strangers = [name for name in installed if not name.startswith(("fastlm/", "fastlm_cli/", "fastlm-"))]
    assert not strangers, f"should not be in the wheel: {strangers}"


def try_under(torch: str, wheel: Path) -> None:
    """Installs torch, then the wheel, and runs smoke.py in an environment of its own, which is removed if it passes."""
    name = f"torch-{torch}"
    python = make_environment(name)
    run(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", "numpy")
    run(python, "-m", "pip", "install", "--quiet", wheel)
    script = shutil.copy(Path(__file__).with_name("smoke.py"), WORK / "smoke.py")
    run(python, "-W", "error::ImportWarning", script, torch)
    run(python.with_name("fastlm"), "doctor")
    shutil.rmtree(WORK / name)


def main() -> None:
    versions = sys.argv[1:] or sys.exit(__doc__)
    WORK.mkdir(parents=True, exist_ok=True)
    wheel = build()
    for torch in versions:
        try_under(torch, wheel)
    print(f"{wheel.name} ({wheel.stat().st_size >> 10} KiB) works under torch {', '.join(versions)}")


if __name__ == "__main__":
    main()
