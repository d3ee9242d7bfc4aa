"""Put functions of ours in the place of functions of torch, under the names that modules and classes have for them, and back.

In this way no call of anything else costs more, as it would under a TorchFunctionMode, which sees them all.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

from torch.jit import _builtins


def _itself(function: Callable) -> Callable:
    return function


class EntryPoints:
    """Functions of torch, and those that stand in for them from `put_in` to `take_out`.

    Both may be called by several threads and inside each other: the functions are in place as long as anyone wants them.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Callable, Callable]],
        skipped: tuple[str, ...],
        methods: Iterable[tuple[type, str, Callable]] = (),
        later: Iterable[tuple[str, str, Callable[[Callable], Callable]]] = (),
    ) -> None:
        """Take pairs of (torch's, ours), and how the names of modules begin whose names stay as they are.

        ``methods`` are (a class, the name of a method that it inherits, ours). ``later`` are (a module that few programs load,
        the name of its function, what makes ours of it).
        """
        self._later = list(later)
        self._methods = tuple(methods)
        self._pairs: dict[int, tuple[Callable, Callable]] = {}  # by the id of either
        for pair in pairs:
            self._add(*pair)
        self._skipped = skipped
        self._lock = threading.RLock()
        self._wanted = self._suspended = 0
        # (a module, one of its names, torch's, ours)
        self._places: list[tuple[weakref.ref, str, Callable, Callable]] = []
        self._searched: weakref.WeakSet[ModuleType] = weakref.WeakSet()
        self._last: tuple[int, object] | None = None  # how many modules there were at the last search, and the newest

    def _add(self, theirs: Callable, ours: Callable) -> None:
        ours.__prepare_scriptable__ = partial(_itself, theirs)  # torch.jit.script compiles torch's.
        builtin = _builtins._find_builtin(theirs)
        if builtin is not None:
            _builtins._register_builtin(ours, builtin)
        self._pairs[id(theirs)] = self._pairs[id(ours)] = theirs, ours

    def put_in(self) -> None:
        """Put ours in place."""
        with self._lock:
            self._search()
            self._wanted += 1
            self._exchange()

    def take_out(self) -> None:
        """Put torch's functions back if nobody else wants ours, also where modules have copied ours in the meantime."""
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                self._search()
            self._exchange()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Put torch's functions back for a while, for code that asks whether a function is the one of that name."""
        with self._lock:
            self._suspended += 1
            self._exchange()
        try:
            yield
        finally:
            with self._lock:
                self._suspended -= 1
                self._exchange()

    def _exchange(self) -> None:
        """Give each name the function that it should have now, if it still has one of the two."""
        wanted = self._wanted > 0 and self._suspended == 0
        for reference, name, theirs, ours in self._places:
            module = reference()
            if module is not None and _names_of(module).get(name) is (theirs if wanted else ours):
                _names_of(module)[name] = ours if wanted else theirs
        for cls, name, ours in self._methods:
            own = vars(cls).get(name)
            if wanted and own is None:
                setattr(cls, name, ours)
            elif not wanted and own is ours:
                delattr(cls, name)

    def _search(self) -> None:
        """Search the modules that are new, and the program itself, which gets new names at any time."""
        self._search_module(sys.modules.get("__main__"))
        newest = len(sys.modules), sys.modules.get(next(reversed(sys.modules)))
        if newest == self._last:
            return
        self._add_what_is_loaded()
        complete = True
        for name, module in list(sys.modules.items()):
            if not isinstance(module, ModuleType) or module in self._searched or name.startswith(self._skipped):
                continue
            self._search_module(module)
            if getattr(_names_of(module).get("__spec__"), "_initializing", False):
                complete = False
            else:
                self._searched.add(module)
        self._last = newest if complete else None

    def _add_what_is_loaded(self) -> None:
        for late in list(self._later):
            module_name, name, make = late
            theirs = getattr(sys.modules.get(module_name), name, None)
            if theirs is not None:
                self._add(theirs, make(theirs))
                self._later.remove(late)
                self._searched.clear()  # Any module may have a copy.

    def _search_module(self, module: ModuleType | None) -> None:
        if not isinstance(module, ModuleType):
            return
        for name, value in list(_names_of(module).items()):
            pair = self._pairs.get(id(value))
            if pair is not None and not any(found() is module and name == known for found, known, *_ in self._places):
                self._places.append((weakref.ref(module), name, *pair))


def _names_of(module: ModuleType) -> dict:
    """Return a module's names, without waking one that is loaded only when it is used."""
    return object.__getattribute__(module, "__dict__")
