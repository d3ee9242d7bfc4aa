"""Look into a model while it runs: the entropy, the largest logit and the keys' mass of its attention, by layer and head."""

import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..ops.attention.call import AttentionCall
from ..ops.attention.observer import count_open
from . import running
from .layer_stats import LayerStats, Totals, merged
from .replace import check_model


class watch(Mapping):  # noqa: N801 (read as a verb: `with fastlm.watch(model) as stats:`)
    """Collect statistics of a model's attention, by layer and head, inside ``with fastlm.watch(model) as stats:``.

    Seen is what runs on fastlm while the forward of a module of ``model`` runs, in training, inference and generation, in any
    thread: fastlm.nn's modules, transformers' models with ``attn_implementation="fastlm"``, models after `fastlm.replace`, and
    what a block of `fastlm.use` routes. Outputs, gradients and derivatives of any order are what they are without the watch,
    on CPUs to the bit, on GPUs where the pass with statistics has the same tiles (kernels/attention/tiles.py), and to rounding
    elsewhere. The statistics come from the forward's own pass, the keys' mass from one more product of queries and keys.
    What is kept does not grow with the number of calls, stays on its device, and nothing waits for a GPU until it is read.

    A layer has the name of the innermost module whose forward made the call, as in ``model.named_modules()``. The calls of a
    module that is run many times, as ALBERT's one layer, are one layer here. The second call of attention within one forward
    of a module is a layer of its own, "name (call 2)", and calls of another number of heads are, too: "name (8 heads)". Where
    a model folds its batch into its heads, so do the statistics.

    Queries that see no key count nowhere. Queries that are padding, but see keys, do count, unless the batch is packed. What
    a checkpoint computes again in the backward counts once. Positions of the key mass are columns of the keys, and within
    packed sequences those of the sequence. In generation every step counts its queries, and columns are those of the cache.

    Not seen are calls that torch.compile has compiled, `fastlm.kvcache_attention`, calls inside torch.func's transforms or
    forward mode, and what runs on torch. ``missed`` and ``unseen`` tell of them, and `table` does.

    The block may be entered again, which goes on with the same numbers. Blocks may be nested. While one is open, forward
    hooks are on the modules (torch's own TransformerEncoderLayer leaves its fused eval path where there are hooks).

    Args:
        model: any module.
        key_mass: whether to collect the keys' mass, which costs up to 60 % of attention's forward.

    Attributes:
        missed: for each reason, the number of calls of attention on fastlm without statistics.

    As a mapping it holds each layer's `LayerStats` by its name: ``stats["encoder.layers.0.self_attn"].entropy`` is (heads,).

    Raises:
        TypeError: an argument is of a wrong type.
    """

    def __init__(self, model: nn.Module, *, key_mass: bool = False) -> None:
        check_model(model)
        if not isinstance(key_mass, bool):
            raise TypeError(f"key_mass must be a bool; got {type(key_mass).__name__}")
        self.model, self.key_mass, self.is_open = model, key_mass, False
        self._lock, self._handles = threading.Lock(), []
        self._has_warned = False
        self.reset()

    def reset(self) -> None:
        """Forget all that was collected."""
        self.missed: Counter[str] = Counter()
        self._totals: dict[str, dict[tuple[torch.device, int], Totals]] = {}

    def __enter__(self) -> "watch":
        if self.is_open:
            raise RuntimeError("this fastlm.watch is open already; make another one to nest them")
        self._handles = running.hook(self.model, self, lambda name: _Running(self, name))
        self.is_open = True
        count_open(1)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.is_open = False
        count_open(-1)
        for handle in self._handles:
            handle.remove()
        running.forget(self)
        if kind is None and not self._totals and not self._has_warned:
            self._has_warned = True
            warnings.warn(self._why_empty(), stacklevel=2)

    # ---- what is collected --------------------------------------------------------------------------------------------------

    def _record(self, name: str, call: AttentionCall, stats: tuple[Tensor, Tensor, Tensor]) -> None:
        # Sums must not be tensors of inference mode, which could not be changed outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            key = call.query.device, call.query.shape[1]
            layer = self._totals.setdefault(name, {})
            if key not in layer:
                layer[key] = Totals(key[1], key[0], self.key_mass)
            layer[key].add(call, *stats)

    def _miss(self, reason: str) -> None:
        with self._lock:
            self.missed[reason] += 1

    # ---- what is read -------------------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, list[Totals]]:
        """Return the totals of each layer, in the order of the model's modules."""
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        found = {}
        for name in sorted(self._totals, key=lambda name: order[_module_of(name)]):
            first = next(iter(self._totals[name]))[1]
            for (_, heads), totals in self._totals[name].items():
                found.setdefault(name if heads == first else f"{name} ({heads} heads)", []).append(totals)
        return found

    def __getitem__(self, name: str) -> LayerStats:
        return merged(self._layers()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers())

    def __len__(self) -> int:
        return len(self._layers())

    @property
    def unseen(self) -> list[str]:
        """Return the names of attention modules, as their classes' names say, in which no call was seen."""
        modules = {name: m for name, m in self.model.named_modules() if name and "atten" in type(m).__name__.lower()}
        innermost = [name for name in modules if not any(other.startswith(f"{name}.") for other in modules)]
        seen = [_module_of(name) for name in self._totals]
        return [n for n in innermost if not any(_is_within(n, s) or _is_within(s, n) for s in seen if s)]

    def table(self) -> str:
        """Return a table of the layers, and of what was not seen, as text."""
        columns = ["layer", "heads", "rows", "entropy", "of the lowest head", "largest logit"]
        columns += ["on the first key"] * self.key_mass
        layers = dict(self)
        rows = [columns] + [_cells(name, layer) for name, layer in layers.items()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        nan_rows = {name: int(layer.nan_rows.sum()) for name, layer in layers.items()}
        lines += [f"{name}: {count} rows of NaN were left out" for name, count in nan_rows.items() if count]
        lines += [f"{count} calls have no statistics: {reason}" for reason, count in self.missed.items()]
        if unseen := self.unseen:
            lines.append(f"{len(unseen)} modules were not seen (not run, not on fastlm, or compiled): {', '.join(unseen)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.table() if self._totals else f"<fastlm.watch of {type(self.model).__name__}, which has seen nothing>"

    __str__ = __repr__

    def plot(self):
        """Draw each statistic as a heat map of layers and heads; return the matplotlib Figure.

        ``stats.plot().savefig("heads.png")`` saves it.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is nothing to draw.
        """
        from .watch_plot import draw  # Imported here, because it needs matplotlib.

        if not self._totals:
            raise ValueError(self._why_empty())
        return draw(dict(self))

    def _why_empty(self) -> str:
        missed = "".join(f"; {count} calls had no statistics: {reason}" for reason, count in self.missed.items())
        return (
            f"fastlm.watch saw no call of attention on fastlm in {type(self.model).__name__}{missed}. A model runs on fastlm "
            'after fastlm.replace(model), with attn_implementation="fastlm", or inside `with fastlm.use():`; compiled code is '
            "not seen"
        )


class _Running:
    """Stand for one forward of a module, on the stack of the thread that runs it."""

    __slots__ = ("watch", "name", "calls")

    def __init__(self, watch: watch, name: str) -> None:
        self.watch, self.name, self.calls = watch, name, 0

    def record(self, call: AttentionCall, *stats: Tensor) -> None:
        self.calls += 1
        self.watch._record(self.name if self.calls == 1 else f"{self.name}{_CALL}{self.calls})", call, stats)

    def miss(self, reason: str) -> None:
        self.calls += 1
        self.watch._miss(reason)


_CALL = " (call "


def _module_of(layer: str) -> str:
    """Return the name of the module whose forward made a layer's calls."""
    return layer.partition(_CALL)[0]


def _is_within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _cells(name: str, layer: LayerStats) -> list[str]:
    """Return a layer's row of the table."""
    lowest = layer.entropy[~layer.entropy.isnan()]
    numbers = [layer.entropy.mean(), lowest.min() if len(lowest) else math.nan, layer.max_logit.max()]
    if layer.key_mass is not None:
        numbers.append(layer.key_mass[:, 0].mean() if layer.key_mass.shape[1] else math.nan)
    shown = [f"{float(number):.3f}" for number in numbers]
    return [name or "the model", str(len(layer.rows)), str(int(layer.rows.max())), *shown]
