"""Put functions of ours in the place of functions of torch, under every name that loaded modules have for them, and back.

In this way no call of anything else costs more, as it would under a TorchFunctionMode, which sees them all.
"""

import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType


def _itself(function: Callable) -> Callable:
    return function


class EntryPoints:
    """Functions of torch, and those that stand in for them from `put_in` to `take_out`.

    Both may be called by several threads and inside each other: the functions are in place as long as anyone wants them.
    """

    def __init__(self, pairs: Iterable[tuple[Callable, Callable]]) -> None:
        """Take pairs of (torch's, ours)."""
        self._pairs: dict[int, tuple[Callable, Callable]] = {}  # by the id of either
        for theirs, ours in pairs:
            ours.__prepare_scriptable__ = partial(_itself, theirs)  # torch.jit.script compiles torch's.
            self._pairs[id(theirs)] = self._pairs[id(ours)] = theirs, ours
        self._lock = threading.Lock()
        self._wanted = 0
        self._places: list[tuple[dict, str, Callable, Callable]] = []  # (a module's names, one of them, torch's, ours)
        self._searched: set[str] = set()  # names of modules
        self._modules = 0  # how many there were at the last search

    def stand_in(self, theirs: Callable) -> Callable:
        """Return ours for that function of torch."""
        return self._pairs[id(theirs)][1]

    def put_in(self) -> None:
        """Put ours in place."""
        with self._lock:
            self._wanted += 1
            if self._wanted == 1:
                self._search()
                for names, name, theirs, ours in self._places:
                    if names.get(name) is theirs:
                        names[name] = ours

    def take_out(self) -> None:
        """Put torch's functions back if nobody else wants ours, also where modules have copied ours in the meantime."""
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                self._search()
                for names, name, theirs, ours in self._places:
                    if names.get(name) is ours:
                        names[name] = theirs

    def _search(self) -> None:
        """Search the modules that are new, and the program itself, which gets new names at any time."""
        self._search_module(sys.modules.get("__main__"))
        if len(sys.modules) == self._modules:
            return
        for module_name in sys.modules.keys() - self._searched:
            module = sys.modules.get(module_name)
            if not module_name.startswith("torch._C"):  # where torch itself looks up what its functions are
                self._search_module(module)
            if not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self._searched.add(module_name)
        self._modules = len(sys.modules)

    def _search_module(self, module: ModuleType | None) -> None:
        if not isinstance(module, ModuleType):
            return
        names = module.__dict__
        for name, value in list(names.items()):
            pair = self._pairs.get(id(value))
            if pair is not None and not any(names is n and name == known for n, known, *_ in self._places):
                self._places.append((names, name, *pair))
