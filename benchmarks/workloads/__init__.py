"""The sections of the report about ops: one file for each op of fastlm.ops, found by the op's name."""

import pkgutil
from importlib import import_module

import fastlm.ops

_files = {module.name for module in pkgutil.iter_modules(__path__)}
_ops = [module.name for module in pkgutil.iter_modules(fastlm.ops.__path__) if module.name in _files]
BENCHMARKS = tuple(one for op in _ops for one in import_module(f"{__name__}.{op}").BENCHMARKS)
