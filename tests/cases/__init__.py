"""The calls that every op is tested with: one file for each op, whose name is all that it takes to be found."""

import pkgutil
from importlib import import_module

_modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
SPECS = {spec.name: spec for module in _modules for spec in getattr(module, "SPECS", ())}
