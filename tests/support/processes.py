"""Run code in processes of their own, to test decisions that fall when fastlm is imported.

    assert printed("import fastlm; print(fastlm.backends()['cpu'])", FASTLM_CPU_ISA="avx2").startswith("available")

To import torch takes two seconds. So a server, this file run as a program, imports it once, and forks a process for each code.
Code that is about torch's own import, or takes other variables than fastlm's and Triton's, runs in a fresh interpreter.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

HANG = 1800.0  # Seconds until a test gives up waiting. Only a hang takes so long, however busy the machine is.

OURS = "FASTLM_", "TRITON_"

# In front of `import fastlm`, this code imitates a package whose native build is missing.
WITHOUT_THE_MODULE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fastlm._C":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Blocker())
"""


def fresh_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, as `python` does."""
    command = [sys.executable, "-c", code]
    settings = _settings() | environment
    return subprocess.run(command, env=settings, cwd="/", capture_output=True, text=True, timeout=HANG, check=False)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code outside the repository's folders, with the given environment variables and no others of fastlm's."""
    if not all(name.startswith(OURS) for name in environment):
        return fresh_python(code, **environment)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        server = _server()
        print(json.dumps([code, _settings() | environment, str(out), str(err)]), file=server.stdin, flush=True)
        exit_code = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, exit_code, out.read_text(), err.read_text())


def output_of(process: subprocess.CompletedProcess) -> str:
    """Return what a process printed, which must have ended well."""
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def printed(code: str, **environment: str) -> str:
    """Run code, as `python` does, and return what it printed."""
    return output_of(python(code, **environment))


def _settings() -> dict[str, str]:
    """Return the environment without fastlm's variables and Triton's; its folders are absolute."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    if "PYTHONPATH" in settings:
        settings["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, settings["PYTHONPATH"].split(os.pathsep)))
    return settings


@functools.cache
def _server() -> subprocess.Popen:
    """Start this process's server. It ends with its standard input, and so with this process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=_settings(), cwd="/", **pipes)


def _serve() -> None:
    """Fork a process for each line of the standard input, and answer with its exit code."""
    sys.argv[:], sys.path[0] = ["-c"], ""  # As an interpreter has them that is given code.
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            return _run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(code: str, environment: dict[str, str], out: str, err: str) -> None:
    """Run code in this process as the main module, with its output in two files."""
    signal.alarm(int(HANG))  # It ends a process that hangs.
    os.environ.clear()
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_CREAT
    for stream, opened in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(out, flags), os.open(err, flags))):
        os.dup2(opened, stream)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))


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

if __name__ == "__main__":
    _serve()
