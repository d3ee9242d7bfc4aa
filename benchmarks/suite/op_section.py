"""Make a section of the report from an op's `Benchmark`: fastlm's backends beside the peers of peers.py."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor
from workloads import PEERS
from workloads.workload import Benchmark, Workload

from suite.check import ErrorCheck, output_gradients, outputs_of
from suite.device import DEVICES
from suite.rows import FASTLM, GPU, GROWTH, OPS, Cost, Filter, Setting, Step, Unavailable

COMPILED = ("FlexAttention", "eager, compiled")  # A dry run has no minutes for torch.compile.
WORTH_MEMORY = 1 << 20  # A size of a user's own gets a row of memory from so many bytes of inputs and results on.


class OpSection:
    """An op's section; see `rows.Section`."""

    def __init__(self, benchmark: Benchmark):
        self.benchmark = benchmark
        self.name, self.axis, self.baseline = benchmark.name, benchmark.axis, benchmark.peers[0]
        self.device = DEVICES[benchmark.device]
        self.group = GPU if benchmark.device == "cuda" else GROWTH if benchmark.growth else OPS

    def settings(self, row_filter: Filter) -> Iterator[Setting]:
        if row_filter.tiny:
            yield Setting(self.name, self.benchmark.tiny, "float16")
            return
        workloads = [self.workload(size) for size in row_filter.sizes] or self.benchmark.workloads
        for workload in workloads:
            every = row_filter.full and not self.benchmark.growth
            quick = workload.quick or ((torch.float32,) if row_filter.full else ())
            for dtype in self.benchmark.dtypes if every else quick:
                yield Setting(self.name, workload.name, str(dtype).removeprefix("torch."))

    def workload(self, name: str) -> Workload:
        """Return the workload of that name, or the one that sizes such as "1x8x512x64" make.

        Raises:
            ValueError: it is neither.
        """
        for workload in self.benchmark.workloads:
            if workload.name == name:
                return workload
        try:
            made = self.benchmark.sized(*(int(number) for number in name.split("x")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sizes of {self.name!r} are written {self.benchmark.sizes}; got {name!r}") from error
        memory = made.numbers * torch.float32.itemsize >= WORTH_MEMORY
        without = COMPILED if name == self.benchmark.tiny else made.without
        own = {"name": name, "quick": made.quick or (torch.float32,), "memory": memory, "without": without}
        return Workload(**{**vars(made), **own})

    def implementations(self, setting: Setting, full: bool) -> list[str]:
        left_out = self.workload(setting.workload).without
        if not full and setting.dtype != "float32":
            left_out += self.benchmark.slow_in_half
        names = [FASTLM + backend for backend in self.benchmark.backends] + list(self.benchmark.peers)
        return [name for name in names if name not in left_out]

    def cost(self, setting: Setting) -> Cost:
        unit, workload = self.benchmark.unit, self.workload(setting.workload)
        itemsize = getattr(torch, setting.dtype).itemsize
        work = workload.work * (itemsize if unit == "GB/s" else 1)
        return Cost(unit, workload.size, work, workload.numbers * itemsize, unit == "GFLOP/s", self.device.name)

    def threads(self, setting: Setting) -> int | None:
        return self.workload(setting.workload).threads

    def has_memory(self, setting: Setting) -> bool:
        return getattr(torch, setting.dtype) == self.benchmark.dtypes[0] and self.workload(setting.workload).memory

    def runner(self, setting: Setting) -> "OpRunner":
        return OpRunner(self.benchmark, self.workload(setting.workload).make(getattr(torch, setting.dtype)))


class OpRunner:
    """An op's runner; see `rows.Runner`. A step is forward and backward, or the forward where nothing gets a gradient."""

    flops = None  # The section's cost has them.

    def __init__(self, benchmark: Benchmark, arguments: dict):
        self.benchmark, self.device = benchmark, DEVICES[benchmark.device]
        self.arguments = arguments = self.device.move(arguments)
        self.leaves = {n: arguments[n].requires_grad_() for n in benchmark.differentiable if isinstance(arguments[n], Tensor)}
        self.first: dict[str, tuple[Tensor, ...]] = {}  # Results of first runs wait here for their check.
        self.first_seconds: dict[str, float] = {}
        torch.compiler.reset()  # Dynamo compiles a function only so many times.

    def step(self, implementation: str) -> Step:
        """Return the step after its first run."""
        try:
            call = self._call(implementation)
            step = self._with_gradients(call) if self.leaves else lambda: outputs_of(call())
            step = self.device.capture(step) if self.benchmark.graph else step
            start = self.device.clock()
            self.first[implementation] = tuple(result.detach() for result in step())
            self.first_seconds[implementation] = self.device.clock() - start
        except Exception as error:
            if implementation.startswith(FASTLM) and not isinstance(error, NotImplementedError):
                raise  # It is a bug of ours, and nothing is missing.
            raise Unavailable(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:240]) from error
        return step

    def _call(self, implementation: str) -> Callable:
        if implementation.startswith(FASTLM):
            backend = implementation.removeprefix(FASTLM)
            named = {} if self.benchmark.by_rule else {"backend": backend}
            return partial(self.benchmark.function, **self.arguments, **named)
        return PEERS[self.benchmark.function.__name__][implementation](**self.arguments)

    def _with_gradients(self, call: Callable) -> Step:
        leaves, gradients = tuple(self.leaves.values()), []

        def step() -> tuple[Tensor, ...]:
            outputs = outputs_of(call())
            if not gradients:
                gradients.extend(output_gradients(outputs, leaves[0].dtype))
            return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

        return step

    def errors(self, implementation: str) -> dict[str, dict[str, float]]:
        results = self.first.pop(implementation)
        if not implementation.startswith(FASTLM) and self.benchmark.own_noise:
            return {}
        return self.error_check.errors(results)

    @cached_property
    def error_check(self) -> ErrorCheck:
        return ErrorCheck(self.benchmark, self.arguments)
