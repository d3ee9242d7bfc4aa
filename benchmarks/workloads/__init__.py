"""The sections of the report about ops, and their peers: one file for each op of fastlm.ops, found by the op's name.

A file has BENCHMARKS, its sections, and PEERS: what they compare with, by the name of fastlm's function and of the peer.
"""

import pkgutil
from importlib import import_module

import fastlm.ops

_files = {module.name for module in pkgutil.iter_modules(__path__)}
_ops = [module.name for module in pkgutil.iter_modules(fastlm.ops.__path__) if module.name in _files]
_modules = [import_module(f"{__name__}.{op}") for op in _ops]
BENCHMARKS = tuple(benchmark for module in _modules for benchmark in module.BENCHMARKS)
PEERS = {function: peers for module in _modules for function, peers in module.PEERS.items()}
