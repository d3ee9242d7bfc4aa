"""Keep what a run has measured so far, a line of JSON for each finished part, so that an interrupted run can go on."""

import json
from pathlib import Path


class Journal:
    """The file of a run.

    ``run`` says what is measured and of what (options, commit). A journal of another run cannot be resumed.

    Raises:
        ValueError: there is nothing to resume, or it is of another run.
    """

    def __init__(self, path: Path, run: dict, resume: bool = False):
        self.path, self.rows = path, []
        if resume:
            self.rows = _read(path)
            self._check(run)
            path.write_text("".join(_line(*row) for row in self.rows))  # A line that was cut off is left out.
        else:
            path.write_text("")
            self.add("run", run)

    def add(self, step: str, row) -> None:
        self.rows.append((step, row))
        with self.path.open("a") as file:
            file.write(_line(step, row))

    def of(self, step: str) -> list:
        """Return the rows of a step in the order that they were measured in."""
        return [row for name, row in self.rows if name == step]

    def one(self, step: str):
        """Return the content of a step that has one row, or None where it was not run."""
        return next(iter(self.of(step)), None)

    def once(self, step: str, measure):
        """Return the content of such a step. Measure it now, unless the interrupted run had got that far."""
        if not self.of(step):
            self.add(step, measure())
        return self.one(step)

    def _check(self, run: dict) -> None:
        before = self.one("run")
        if before is None:
            raise ValueError(f"--resume: {self.path} holds no interrupted run")
        run = json.loads(json.dumps(run))
        differing = [
            f"{name} was {before.get(name)!r} and is {run.get(name)!r}" for name in run if run[name] != before.get(name)
        ]
        if differing:
            raise ValueError(f"--resume: {self.path} is of another run: {'; '.join(differing)}")


def _line(step: str, row) -> str:
    return json.dumps([step, row]) + "\n"


def _read(path: Path) -> list[tuple]:
    """Return its rows. A last line that the interruption cut off is left out."""
    if not path.exists():
        raise ValueError(f"--resume: there is no interrupted run in {path.parent}")
    *lines, _ = path.read_text().split("\n")  # What follows the last end of line is not whole.
    return [tuple(json.loads(line)) for line in lines]
