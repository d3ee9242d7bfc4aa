"""Is the answer right? Asked of every row that can be asked before it is timed. The rule is that of DESIGN.md, 'Numbers'."""

import time

import torch
from torch import Tensor

from fastlm.ops.spec import Benchmark, seeded_normal

VALUE_FACTOR, GRADIENT_FACTOR, ULPS = 2.0, 3.0, 4
MOST_SCORES = 1 << 25  # that the reference is asked to hold in float64: 256 MiB, several times over
MOST_SECONDS = 3.0  # of the reference in the inputs' own dtype, which many CPUs compute very slowly in half precision
MOST_NUMBERS = 1 << 20  # of a latent, whose reference draws its noise in many passes: 6 s for so many on a busy core
SOME_QUERIES = 64  # that are checked of a call that is too large or too slow

Results = dict[str, Tensor]


def outputs_of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Judge:
    """Of the answers to one call, whoever gives them.

    Golden is the reference in float64 on the same ``arguments``, plain the reference in the inputs' own dtype. Of a large or a
    slow call a part is checked that does not depend on the rest: the last queries of attention, the first rows of a latent.
    """

    def __init__(self, benchmark: Benchmark, arguments: dict):
        self.benchmark = benchmark
        self.dtype = arguments[benchmark.differentiable[0]].dtype if benchmark.differentiable else None
        self.take, self.rows = None, None
        if "mu" in arguments and arguments["mu"].numel() > MOST_NUMBERS:
            self._check_rows(arguments)
        elif _has_queries_apart(benchmark, arguments):
            self._check_queries(arguments)
        arguments = self._part(arguments)
        self.plain = self._reference(arguments)
        self.golden = self._reference({name: _double(value) for name, value in arguments.items()})

    def errors(self, results: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
        """Tell how wrong each result is, and may be: {"output 0": {"error": …, "allowed": …}, "gradient of mu": …}.

        ``results`` are the outputs and then the gradients, for `output_gradients`, of what is differentiable.
        """
        actual = {name: self.take(result) if self.take else result for name, result in self._named(results).items()}
        return {name: judge(name, actual[name], self.plain[name], self.golden[name]) for name in self.golden}

    def _check_rows(self, arguments: dict) -> None:
        self.rows, columns = arguments["mu"].shape
        self.take = lambda result: result[: max(1, MOST_NUMBERS // columns)]

    def _check_queries(self, arguments: dict) -> None:
        """Choose the last queries, which see the same keys without the others, causal or not, where all would be too much."""
        self.take = lambda tensor: tensor[:, :, -SOME_QUERIES:]
        some = self._part(arguments)
        if _scores(arguments) <= MOST_SCORES:
            start = time.perf_counter()
            self._reference(some)
            if (time.perf_counter() - start) * _scores(arguments) / _scores(some) <= MOST_SECONDS:
                self.take = None

    def _part(self, arguments: dict) -> dict:
        """Cut what has as many rows as the results have."""
        names = [name for name in ("query", "mu", "logvar") if self.take and name in arguments]
        return arguments | {name: self.take(arguments[name].detach()) for name in names}

    def _reference(self, arguments: dict) -> Results:
        for name in self.benchmark.differentiable:
            arguments[name].requires_grad_()
        outputs = outputs_of(self.benchmark.function(**arguments, backend="reference"))
        if not self.benchmark.differentiable:
            return self._named(outputs)
        leaves = [arguments[name] for name in self.benchmark.differentiable]
        return self._named((*outputs, *torch.autograd.grad(outputs, leaves, output_gradients(outputs, self.dtype, self.rows))))

    def _named(self, results: tuple[Tensor, ...]) -> Results:
        outputs = len(results) - len(self.benchmark.differentiable)
        names = [f"output {i}" for i in range(outputs)] + [f"gradient of {name}" for name in self.benchmark.differentiable]
        return {name: result.detach() for name, result in zip(names, results)}


def output_gradients(outputs: tuple[Tensor, ...], dtype: torch.dtype, rows: int | None = None) -> list[Tensor]:
    """Draw the outputs' gradients for a backward, rounded to ``dtype``, whatever the call computes in.

    Where the outputs are the first of so many ``rows``, their gradients are those of these rows.
    """
    shapes = [(rows or len(out), *out.shape[1:]) for out in outputs]
    gradients = [seeded_normal(100 + i, shape, dtype) for i, shape in enumerate(shapes)]
    return [gradient[: len(out)].to(out.dtype) for gradient, out in zip(gradients, outputs)]


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


def _has_queries_apart(benchmark: Benchmark, arguments: dict) -> bool:
    """Say whether some queries of the call can be checked without the others."""
    query = arguments.get("query")
    if benchmark.differentiable or query is None or query.dim() != 4 or "key" not in arguments:
        return False
    return query.shape[2] > SOME_QUERIES


def _scores(arguments: dict) -> int:
    return arguments["query"].shape[:3].numel() * arguments["key"].shape[2]


def _double(value):
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
