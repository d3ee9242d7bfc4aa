"""The check that the library of an integration is installed and new enough. Each is an extra of fastlm by its own name."""

import re
from importlib import metadata


def require(library: str) -> None:
    """Raise an ImportError that names the extra to install if ``library`` is missing or too old."""
    minimum, install = _minimum(library), f"pip install 'fastlm[{library}]'"
    try:
        found = metadata.version(library)
    except metadata.PackageNotFoundError:
        raise ImportError(f"fastlm.integrations.{library} needs {library} >= {minimum}, which is missing: {install}") from None
    if _numbers(found) < _numbers(minimum):
        raise ImportError(f"fastlm.integrations.{library} needs {library} >= {minimum}; {found} is installed: {install}")


def _minimum(library: str) -> str:
    """Return the lower bound of fastlm's extra, from the metadata of the installed package."""
    bounds = (re.match(rf"{library}>=([\d.]+)", requirement) for requirement in metadata.requires("fastlm") or ())
    return next(bound for bound in bounds if bound)[1]


def _numbers(version: str) -> tuple[int, ...]:
    """Return (0, 35) for "0.35", "0.35.0", "0.35.dev0" and "0.35+cpu": zeros at the end do not count."""
    release = re.match(r"\d+(\.\d+)*", version)[0]
    return tuple(map(int, re.sub(r"(\.0)+$", "", release).split(".")))
