"""The check that the libraries of an extra of fastlm are installed. This file brings no other."""

from importlib.util import find_spec


def require(extra: str, *libraries: str, what: str = "this") -> None:
    """Raise an ImportError that names the extra to install if one of the libraries that ``what`` needs is missing."""
    if missing := [library for library in libraries if find_spec(library) is None]:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'fastlm[{extra}]'")
