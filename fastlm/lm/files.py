"""Writing files such that the last good ones stay until the new ones are whole."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def replaced_together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give the block a temporary folder, whose files ``names`` replace those of ``folder``, in order, if the block succeeds.

    If the block fails, for example on a full disk, the earlier files of ``folder`` stay as they were.

    Raises:
        ValueError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder) as temporary:
        yield Path(temporary)
        made = [name for name in names if (Path(temporary) / name).exists()]
        for name in made:
            with open(Path(temporary) / name, "rb") as file:
                os.fsync(file.fileno())
        for name in made:
            os.replace(Path(temporary) / name, folder / name)
        for name in set(names) - set(made):
            (folder / name).unlink(missing_ok=True)
