"""Run code in a fresh interpreter, to test decisions that fall when fastlm is imported."""

import os
import subprocess
import sys

HANG = 1800.0  # Seconds until a test gives up waiting. Only a hang takes so long, however busy the machine is.

# In front of `import fastlm`, this code imitates a package whose native build is missing.
WITHOUT_THE_MODULE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fastlm._C":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code outside the repository's folders, with the given environment variables and no others of fastlm's."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("FASTLM_", "TRITON_"))}
    if "PYTHONPATH" in settings:
        settings["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, settings["PYTHONPATH"].split(os.pathsep)))
    command, settings = [sys.executable, "-c", code], settings | environment
    return subprocess.run(command, env=settings, cwd="/", capture_output=True, text=True, timeout=HANG, check=False)


def printed(code: str, **environment: str) -> str:
    """Run code, which must end well, and return what it printed."""
    process = python(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def in_a_forked_child(compute: str) -> str:
    """Return code that runs ``compute()``, which the given code defines, in a forked child and holds it to the parent's bits.

    torch's own parallel loops hang in such a child, so it may run torch's ops on a few numbers only.
    """
    return f"{_START}{compute}{_FORK}"


_START = """
import os, signal, torch, fastlm
torch.set_num_threads(2)
"""
_FORK = """
def same(results, expected):
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(results, expected))
expected = compute()  # starts the parent's threads
child = os.fork()
if child == 0:
    signal.alarm(30)  # a hang ends the child
    os._exit(0 if same(compute(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0, "the forked child failed or hung"
assert same(compute(), expected)
"""
