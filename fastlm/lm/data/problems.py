"""What could not be read, counted by file and reason."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SHOWN = 5  # problems to keep as examples, and reasons to print


@dataclass
class Problems:
    """The rows and files that could not be read.

    Attributes:
        count: their number.
        first: the first five of them.
        reasons: for each reason, their number.
        examples: for each reason, the first of them.
        files: for each file, the reasons and their numbers; files that were skipped are among them.
        skipped: for each suffix that is not read, the number of files with it.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, path: Path, reason: str, *, line: int | None = None, detail: str = "") -> None:
        """Count a row, or a file where there is no ``line``; ``detail`` is what differs from row to row."""
        self.count += 1
        message = f"{path if line is None else f'{path}:{line}'}: {reason}{detail}"
        if len(self.first) < SHOWN:
            self.first.append(message)
        self.examples.setdefault(reason, message)
        for counts in (self.reasons, self.files.setdefault(str(path), {})):
            counts[reason] = counts.get(reason, 0) + 1

    def skip(self, path: Path) -> None:
        """Count a file of a folder whose suffix is not read."""
        suffix = path.suffix.lower() or "without a suffix"
        self.skipped[suffix] = self.skipped.get(suffix, 0) + 1
        self.files[str(path)] = {f"skipped: {suffix}": 1}

    def lines(self) -> list[str]:
        """Return the lines of a summary."""
        lines = []
        if self.skipped:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in Counter(self.skipped).most_common())
            count = sum(self.skipped.values())
            lines.append(f"skipped     {count} files of folders, as their suffixes are not read: {kinds[:200]}")
        if self.count:
            lines.append(f"unreadable  {self.count} rows or files of {len(self.files) - sum(self.skipped.values())} files:")
            shown = Counter(self.reasons).most_common(SHOWN)
            lines += [f"            {count}: {self.examples[reason]}" for reason, count in shown]
            if left := self.count - sum(count for _, count in shown):
                lines.append(f"            {left}: other reasons")
        return lines
