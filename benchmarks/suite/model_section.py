"""Make a section of the report from the table's rows of one model: as it is, with fastlm in it, and by peers."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from workloads.models import DTYPES, Model

from suite.check import check_result
from suite.device import CPU
from suite.rows import FASTLM, MODELS, Cost, Filter, Setting, Step, Unavailable

BEFORE = "before"
SEED = 0  # It fixes the weights.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ITS_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTED = {  # Operations, by the shapes of the arguments. torch counts them on GPUs alone.
    _ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    _ITS_BACKWARD: lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value),
}


class ModelSection:
    """A model's section; see `rows.Section`."""

    axis, baseline, group, device = "", BEFORE, MODELS, CPU

    def __init__(self, name: str, models: Iterable[Model]):
        self.name, self.sizes = name, {model.workload: model for model in models}

    def settings(self, row_filter: Filter) -> Iterator[Setting]:
        if row_filter.sizes:
            raise ValueError(f"the sizes of {self.name!r} are fixed; --sizes is for the ops' sections")
        for workload, model in self.sizes.items():
            for dtype in DTYPES if row_filter.full else model.quick:
                yield Setting(self.name, workload, dtype)

    def implementations(self, setting: Setting, full: bool) -> list[str]:
        model = self.sizes[setting.workload]
        return [*(FASTLM + how for how in model.put_in), BEFORE, *model.peers]

    def cost(self, setting: Setting) -> Cost:
        model = self.sizes[setting.workload]
        return Cost(model.unit, model.items, model.items)

    def threads(self, setting: Setting) -> int | None:
        return None

    def has_memory(self, setting: Setting) -> bool:
        return setting.dtype == "float32" and self.sizes[setting.workload].memory

    def runner(self, setting: Setting) -> "ModelRunner":
        return ModelRunner(self.sizes[setting.workload], getattr(torch, setting.dtype))


class _Ops(TorchDispatchMode):
    """Note whether an op of fastlm runs inside. The numbers would agree too if none did."""

    ours = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ours |= function.namespace == "fastlm"
        return function(*args, **(kwargs or {}))


class ModelRunner:
    """A model's runner; see `rows.Runner`. Each implementation has its own copy of the model, with the same first weights."""

    def __init__(self, model: Model, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.checked = model.checked or model.ready
        self.first_seconds: dict[str, float] = {}
        self.flops = None

    def step(self, implementation: str) -> Step:
        """Return the step after its first run."""
        ops, counter = _Ops(), FlopCounterMode(display=False, custom_mapping=COUNTED)
        # Modes would be in the way of a peer's compiler, and of what is deferred.
        shows_ops = implementation.startswith(FASTLM) and not self.model.deferred
        try:
            step = self._step(implementation, self.dtype, self.model.ready)
            with contextlib.ExitStack() as modes:
                if implementation == BEFORE or shows_ops:
                    modes.enter_context(ops)
                    modes.enter_context(counter)
                start = time.perf_counter()
                step()
                self.first_seconds[implementation] = time.perf_counter() - start
        except Exception as error:
            if implementation.startswith(FASTLM) and not isinstance(error, (ImportError, NotImplementedError)):
                raise  # It is a bug of ours, and nothing is missing.
            raise Unavailable(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:240]) from error
        if ops.ours != shows_ops:
            raise AssertionError(f"{implementation}: {'no op' if not ops.ours else 'an op'} of fastlm ran in {self.model.name}")
        if implementation == BEFORE:
            self.flops = counter.get_total_flops() or None
        return step

    def errors(self, implementation: str) -> dict[str, dict[str, float]]:
        """Check against the unchanged model in float64: the first result as a value, those behind it as gradients."""
        plain, golden = self.expected
        actual = plain if implementation == BEFORE else self._step(implementation, self.dtype, self.checked)()
        names = ["output" if i == 0 else f"gradient {i}" for i in range(len(golden))]
        return {name: check_result(name, *each) for name, *each in zip(names, actual, plain, golden)}

    @cached_property
    def expected(self) -> list[tuple[Tensor, ...]]:
        """Return the results of the unchanged model, in the dtype of the runner and in float64."""
        return [self._step(BEFORE, dtype, self.checked)() for dtype in (self.dtype, torch.float64)]

    @cached_property
    def built(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.model.build()

    def _step(self, implementation: str, dtype: torch.dtype, ready: Callable[[nn.Module], Step]) -> Step:
        module = copy.deepcopy(self.built).to(dtype)
        if implementation == BEFORE:
            return ready(module)
        ways = self.model.put_in | self.model.peers
        enter = ways[implementation.removeprefix(FASTLM)](module)
        step = ready(module)

        def entered():
            with enter():
                return step()

        return entered
