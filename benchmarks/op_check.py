"""Is the answer right? Asked of every row that can be asked before it is timed. The rule is that of DESIGN.md, 'Numbers'."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastlm.ops.spec import Benchmark, seeded_normal

VALUE_FACTOR, GRADIENT_FACTOR, ULPS = 2.0, 3.0, 4
MOST_SCORES = 1 << 25  # that the reference is asked to hold in float64: 256 MiB, several times over
SOME_QUERIES = 64  # that are checked of a call with more

Results = dict[str, Tensor]


def outputs_of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Judge:
    """Of the answers to one call, whoever gives them.

    Golden is the reference in float64 on the same ``arguments``, plain the reference in the inputs' own dtype.
    """

    def __init__(self, benchmark: Benchmark, arguments: dict):
        self.benchmark, self.arguments = benchmark, arguments
        self.dtype = arguments[benchmark.differentiable[0]].dtype if benchmark.differentiable else None
        self.queries = SOME_QUERIES if _too_large(benchmark, arguments) else None
        if self.queries:  # the last ones, which see the same keys without the others, causal or not
            arguments = arguments | {"query": arguments["query"][:, :, -self.queries :]}
        self.plain = self._reference(arguments)
        self.golden = self._reference({name: _double(value) for name, value in arguments.items()})

    def errors(self, call: Callable) -> dict[str, dict[str, float]]:
        """How wrong each result of ``call()`` is, and may be: {"output 0": {"error": …, "allowed": …}, "gradient of mu": …}."""
        actual = _results(self.benchmark, self.arguments, call, self.dtype)
        if self.queries:
            actual = {"output 0": actual["output 0"][:, :, -self.queries :]}
        return {name: judge(name, actual[name], self.plain[name], self.golden[name]) for name in self.golden}

    def _reference(self, arguments: dict) -> Results:
        for name in self.benchmark.differentiable:
            arguments[name].requires_grad_()
        call = partial(self.benchmark.function, **arguments, backend="reference")
        return _results(self.benchmark, arguments, call, self.dtype)


def judge(name: str, actual: Tensor, plain: Tensor, golden: Tensor) -> dict[str, float]:
    """One result; names that begin with "output" are held to the rule for values, others to that for gradients.

    Its largest error may be twice (for gradients: three times) that of ``plain``, plus 4 ulps. Both figures are shares of the
    largest golden value.
    """
    golden = golden.double()
    largest = golden.abs().max().item()
    # Noise is float32 whatever the dtype; tests hold what has none to float64's own ulps.
    ulp = max(torch.finfo(dtype).eps for dtype in (actual.dtype, torch.float32))
    factor = VALUE_FACTOR if name.startswith("output") else GRADIENT_FACTOR
    return {
        "error": (actual - golden).abs().max().item() / largest,
        "allowed": factor * (plain - golden).abs().max().item() / largest + ULPS * ulp,
    }


def worst(judged: dict[str, dict[str, float]]) -> dict[str, float]:
    """The result with the largest error, and what it is allowed; empty where nothing was judged."""
    return max(judged.values(), key=lambda j: j["error"], default={})


def _too_large(benchmark: Benchmark, arguments: dict) -> bool:
    query = arguments.get("query")
    if benchmark.differentiable or query is None or query.dim() != 4 or "key" not in arguments:
        return False
    return query.shape[:3].numel() * arguments["key"].shape[2] > MOST_SCORES


def _double(value):
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(benchmark: Benchmark, arguments: dict, call: Callable, dtype: torch.dtype | None) -> Results:
    """Outputs and gradients by name. The gradients of the outputs are rounded to ``dtype``, whatever the call computes in."""
    outputs = outputs_of(call())
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if benchmark.differentiable:
        leaves = [arguments[name] for name in benchmark.differentiable]
        gradients = [seeded_normal(100 + i, out.shape, dtype).to(out.dtype) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, leaves, gradients)
        results |= {f"gradient of {name}": grad for name, grad in zip(benchmark.differentiable, grads)}
    return results
