"""Say what a run does: a progress bar on a terminal; in a log a line whenever nothing was printed for a few seconds."""

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SILENCE = 5.0  # Seconds after which a log gets a line.


class Activity:
    """Tell what is being done inside a ``with`` block, in ``total`` steps.

    The bar leaves nothing behind. Without ``bar`` a terminal gets none: the block draws its own.
    """

    def __init__(self, console: Console, total: int, silence: float = SILENCE, bar: bool = True):
        self.console, self.silence = console, silence
        left = TextColumn("elapsed, left"), TimeRemainingColumn()
        columns = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left
        self.bar = Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and bar))
        self.task = self.bar.add_task("", total=total)
        self.text, self.since, self.printed = "", time.monotonic(), time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._break_silence, daemon=True)

    def __enter__(self) -> "Activity":
        self.bar.start()
        if not self.console.is_terminal:
            self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.ended.set()
        self.bar.stop()
        if self.thread.is_alive():
            self.thread.join()

    def say(self, text: str) -> None:
        """Tell what begins now."""
        self.text, self.since = text, time.monotonic()
        self.bar.update(self.task, description=text)

    def advance(self) -> None:
        """Count a step as done."""
        self.bar.advance(self.task)

    def print(self, *content, **options) -> None:
        """Print what stays."""
        self.console.print(*content, **options)
        self.printed = time.monotonic()

    def _break_silence(self) -> None:
        while not self.ended.wait(self.silence / 10):
            now = time.monotonic()
            if now - self.printed >= self.silence and self.text:
                self.print(f"  … {self.text}, {now - self.since:.0f} s", highlight=False, soft_wrap=True, markup=False)
