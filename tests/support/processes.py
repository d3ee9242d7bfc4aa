"""Code in a fresh interpreter, for what is decided when fastlm is imported."""

import os
import subprocess
import sys

HANG = 1800.0  # Seconds after which a test gives up waiting: only a hang takes so long, however busy the machine is.

# Put before `import fastlm`, it makes a package whose native build is missing.
WITHOUT_THE_MODULE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fastlm._C":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code with the environment variables given, no others of fastlm's, and away from the repository's own folders."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("FASTLM_", "TRITON_"))}
    if "PYTHONPATH" in settings:
        settings["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, settings["PYTHONPATH"].split(os.pathsep)))
    command, settings = [sys.executable, "-c", code], settings | environment
    return subprocess.run(command, env=settings, cwd="/", capture_output=True, text=True, timeout=HANG, check=False)


def printed(code: str, **environment: str) -> str:
    """What the code printed; it must end well."""
    process = python(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()
