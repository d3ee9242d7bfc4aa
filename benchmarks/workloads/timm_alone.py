"""Import timm without torchvision. PyPI's does not import beside a CPU build of torch, and a broken one breaks transformers.

    timm = import_timm()

While timm is imported, whatever it asks of torchvision is a stand-in; afterwards no module of that name is left behind. Models
and layers work; datasets and transforms, which need torchvision, do not.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

NAME = "torchvision"


class _StandIns(MetaPathFinder, Loader):
    """Finds torchvision and all below it, and makes mocks of them."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == NAME else None

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        return MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module: MagicMock) -> None:
        pass


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
            del sys.modules[name]


def import_alone(name: str) -> ModuleType:
    """Return a module whose package asks for torchvision.

    Raises:
        ImportError: it, or something else that it asks for, is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    with _stand_ins():
        return importlib.import_module(name)


def import_timm() -> ModuleType:
    """Return the module timm.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise ImportError("timm is not installed: pip install --no-deps 'timm>=1.0'")
    return import_alone("timm")
