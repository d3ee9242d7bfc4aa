"""Make `import fastlm` work for a Python with a torch of its own, without changing that Python, and without a network.

Where this checkout is not installed there already, it is built into a folder, which `make gpu` puts on PYTHONPATH. Where it
cannot be built, the folder gets links to the Python files, with which Triton's kernels run and those in C++ and CUDA do not.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "gpu" / "site"
BUILT = SITE / ".built"  # It is there if the folder has a build.


def sources() -> list[Path]:
    """Return what a build is made of."""
    files = [path for folder in ("fastlm", "kernels", "csrc") for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(f for f in files if "__pycache__" not in f.parts)]


def is_installed() -> bool:
    """Tell whether this Python finds the checkout itself, as after pip install --editable."""
    spec = importlib.util.find_spec("fastlm")
    return spec is not None and spec.origin is not None and Path(spec.origin) == ROOT / "fastlm" / "__init__.py"


def build() -> bool:
    """Build fastlm into SITE, and return whether that worked. Without dependencies: torch stays as it is."""
    command = [sys.executable, "-m", "pip", "install", "--upgrade", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", SITE, "-C", f"build-dir={ROOT / 'build' / 'gpu' / 'cmake'}", "-C", "install.strip=false", ROOT]
    settings = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | os.environ
    if subprocess.run(command, env=settings, check=False).returncode:
        return False
    BUILT.touch()
    return True


def link() -> None:
    """Lay the package out in SITE with links: kernels/ is a part of it."""
    for name in ("fastlm", "fastlm_cli"):
        (SITE / name).mkdir(parents=True, exist_ok=True)
    targets = {SITE / "fastlm" / path.name: path for path in (ROOT / "fastlm").iterdir()} | {
        SITE / "fastlm" / "kernels": ROOT / "kernels",
        SITE / "fastlm_cli" / "__init__.py": ROOT / "fastlm" / "fastlm_cli" / "__init__.py",
    }
    for place, target in targets.items():
        if not place.exists():
            place.symlink_to(target)


def main() -> int:
    sys.path[:] = [path for path in sys.path if Path(path) != SITE]
    if is_installed():
        print(f"{sys.executable} has this checkout installed")
        return 0
    if BUILT.exists() and BUILT.stat().st_mtime > max(path.stat().st_mtime for path in sources()):
        print(f"{SITE} is up to date")
        return 0
    if build():
        return 0
    if not BUILT.exists():
        link()
    print("\nfastlm could not be built, see above: its kernels in C++ and CUDA are missing, Triton's are there.")
    print("A build needs a C++17 compiler, and of Python: pip install scikit-build-core pybind11 cmake ninja")
    return 1


if __name__ == "__main__":
    sys.exit(main())
