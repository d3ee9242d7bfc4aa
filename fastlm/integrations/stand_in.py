"""Put modules of fastlm under the name of a package that is not installed, so that code which imports it runs.

`install` adds a finder to ``sys.meta_path``, behind Python's own. It finds the package's modules for ``import`` and
``importlib.util.find_spec``, and its distribution for ``importlib.metadata``, which libraries ask whether a package is there.
Libraries keep the answer, most of them from their own import on, so install first.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


@dataclass(frozen=True)
class Package:
    """A package that fastlm stands in for.

    Attributes:
        distribution: the name that pip knows: "flash-attn".
        version: the version whose functions are there.
        modules: the package's modules by name, each with the module of fastlm whose names it has, or None if it has none of
            its own. A module that others are in is a package, and imports them.
    """

    distribution: str
    version: str
    modules: Mapping[str, str | None]

    def top_level(self) -> set[str]:
        """Return the names that one imports it by."""
        return {name.partition(".")[0] for name in self.modules}

    def inside(self, name: str) -> list[str]:
        """Return the modules directly in a module."""
        return [other for other in self.modules if other.rpartition(".")[0] == name]


def is_installed(package: Package) -> bool:
    """Return whether the package's names are fastlm's."""
    return _finder_of(package) is not None


def install(package: Package) -> bool:
    """Let the package be imported, until `uninstall`. It may have been installed before.

    Returns:
        Whether the names are fastlm's: not if the real one is installed, which is never replaced.
    """
    if not is_installed(package):
        if any(name in sys.modules or find_spec(name) is not None for name in package.top_level()):
            return False
        sys.meta_path.append(_Finder(package))
    return True


def uninstall(package: Package) -> None:
    """Undo `install`. Modules that have imported the package keep what they have of it."""
    finder = _finder_of(package)
    if finder is not None:
        sys.meta_path.remove(finder)
        for name in package.modules:
            sys.modules.pop(name, None)


def _finder_of(package: Package) -> "_Finder | None":
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder) and finder.package is package), None)


_EVERY = metadata.DistributionFinder.Context()


class _Finder(metadata.DistributionFinder):
    """Find a package's modules and its distribution."""

    def __init__(self, package: Package):
        self.package = package

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname not in self.package.modules:
            return None
        return ModuleSpec(fullname, _Loader(self.package), is_package=bool(self.package.inside(fullname)))

    def find_distributions(self, context=_EVERY) -> Iterator[metadata.Distribution]:
        if context.name is None or _normalized(context.name) == _normalized(self.package.distribution):
            yield _Distribution(self.package)


class _Loader(Loader):
    """Make a module of the package, which has the names of fastlm's: those of its ``__all__``, or all."""

    def __init__(self, package: Package):
        self.package = package

    def exec_module(self, module: ModuleType) -> None:
        name, version = module.__name__, self.package.version

        def absent(attribute: str):
            raise AttributeError(f"fastlm stands in for {name}, and has no {name}.{attribute}")

        module.__version__, module.__getattr__ = version, absent
        source = self.package.modules[name]
        if source is not None:
            ours = vars(importlib.import_module(source))
            names = ours.get("__all__", [key for key in ours if not key.startswith("__")])
            vars(module).update({key: ours[key] for key in names})
        for inner in self.package.inside(name):
            importlib.import_module(inner)


class _Distribution(metadata.Distribution):
    """The metadata of a package that has no files."""

    def __init__(self, package: Package):
        self.package = package

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {self.package.distribution}\nVersion: {self.package.version}\n"
        return "\n".join(sorted(self.package.top_level())) if filename == "top_level.txt" else None

    def locate_file(self, path):
        raise FileNotFoundError(f"{self.package.distribution} is fastlm's stand-in, which has no file {path}")


def _normalized(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
