"""Check the answers of every row, where that can be done, before it is timed. fastlm/testing.py has the rule."""

from dataclasses import dataclass

import torch
from torch import Tensor
from workloads.workload import Benchmark

from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, allowed_error, errors_of, seeded_normal, ulp_of_largest
from suite.device import DEVICES

# A part of a call is checked where the whole would exceed one of these.
MOST_SCORES = 1 << 25  # The reference holds them in float64: 256 MiB, several times over.
MOST_SECONDS = 3.0  # Of the reference in the inputs' own dtype: many CPUs compute half precision very slowly.
MOST_NUMBERS = 1 << 20  # Of a latent: its reference draws noise in many passes, which takes a busy core 6 s for so many.
MOST_NUMBERS_OF_CACHE = 1 << 26  # Of the keys: the reference repeats them for each query head of a group.
SOME_QUERIES = 64  # So many queries are then checked.

Results = dict[str, Tensor]


def outputs_of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Part:
    """The part of a call that is checked where the whole would be too much. It depends on nothing outside it."""

    names: tuple[str, ...]  # the arguments that are cut; results are cut alike
    dim: int
    whole: int  # the size of that dimension before the cut
    start: int
    length: int

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.length)

    def arguments(self, arguments: dict) -> dict:
        return arguments | {name: self.take(arguments[name].detach()) for name in self.names}


class ErrorCheck:
    """Tell how wrong the answers to one call are, whoever gives them.

    Golden is the reference in float64 on the same ``arguments``, plain the reference in the inputs' own dtype.
    """

    def __init__(self, benchmark: Benchmark, arguments: dict):
        self.benchmark = benchmark
        self.dtype = arguments[benchmark.differentiable[0]].dtype if benchmark.differentiable else None
        self.part = _part_of(benchmark, arguments)
        if self.part and not self._too_much(arguments):
            self.part = None
        arguments = self.part.arguments(arguments) if self.part else arguments
        self.plain = self._reference(arguments)
        self.golden = self._reference({name: _double(value) for name, value in arguments.items()})

    def errors(self, results: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
        """Tell how wrong each result is, and may be: {"output 0": {"error": …, "allowed": …}, "gradient of mu": …}.

        ``results`` are the outputs and then the gradients, for `output_gradients`, of what is differentiable.
        """
        actual = {name: self.part.take(result) if self.part else result for name, result in self._named(results).items()}
        return {name: check_result(name, actual[name], self.plain[name], self.golden[name]) for name in self.golden}

    def _too_much(self, arguments: dict) -> bool:
        """Try the reference on the part, and expect the whole to take as much longer as it is larger."""
        if self.part.length == self.part.whole:
            return False
        if _too_large(arguments):
            return True
        part = self.part.arguments(arguments)
        clock = DEVICES[self.benchmark.device].clock
        start = clock()
        self._reference(part)
        return (clock() - start) * self.part.whole / self.part.length > MOST_SECONDS

    def _reference(self, arguments: dict) -> Results:
        for name in self.benchmark.differentiable:
            arguments[name].requires_grad_()
        outputs = outputs_of(self.benchmark.function(**arguments, backend="reference"))
        if not self.benchmark.differentiable:
            return self._named(outputs)
        leaves = [arguments[name] for name in self.benchmark.differentiable]
        return self._named((*outputs, *torch.autograd.grad(outputs, leaves, output_gradients(outputs, self.dtype, self.part))))

    def _named(self, results: tuple[Tensor, ...]) -> Results:
        outputs = len(results) - len(self.benchmark.differentiable)
        names = [f"output {i}" for i in range(outputs)] + [f"gradient of {name}" for name in self.benchmark.differentiable]
        return {name: result.detach() for name, result in zip(names, results)}


def output_gradients(outputs: tuple[Tensor, ...], dtype: torch.dtype, part: Part | None = None) -> list[Tensor]:
    """Draw the outputs' gradients for a backward, rounded to ``dtype``, whatever the call computes in.

    Where the outputs are ``part`` of others, so are their gradients.
    """
    gradients = []
    for i, out in enumerate(outputs):
        shape = list(out.shape)
        if part:
            shape[part.dim] = part.whole
        gradient = seeded_normal(100 + i, tuple(shape), dtype).to(out)
        gradients.append(part.take(gradient) if part else gradient)
    return gradients


def check_result(name: str, actual: Tensor, plain: Tensor, golden: Tensor) -> dict[str, float]:
    """Return the error of one result and what it may be, as shares of the largest golden value.

    Names that begin with "output" are held to the rule for values, others to that for gradients.
    """
    golden = golden.double()
    largest = golden.abs().max().item()
    # Noise is float32 whatever the dtype. Tests hold what has none to float64's own ulps.
    ulp = max(ulp_of_largest(golden, dtype) for dtype in (actual.dtype, torch.float32))
    factor = VALUE_FACTOR if name.startswith("output") else GRADIENT_FACTOR
    return {
        "error": errors_of(actual, golden).max().item() / largest,
        "allowed": allowed_error(plain, golden, factor, ulp) / largest,
    }


def worst(errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the figures of the result with the largest error, or nothing where no result was checked."""
    return max(errors.values(), key=lambda each: each["error"], default={})


def _part_of(benchmark: Benchmark, arguments: dict) -> Part | None:
    """Return a latent's first rows, or the last sequence of a cache.

    Of attention, return the last queries, or the last head where keys and values get gradients, or with dropout the first,
    whose noise is the same without the others.
    """
    if benchmark.checked_whole:
        return None
    if "mu" in arguments:
        rows, columns = arguments["mu"].shape
        return Part(("mu", "logvar"), 0, rows, 0, min(rows, max(1, MOST_NUMBERS // columns)))
    if "key_cache" in arguments:
        sequences = len(arguments["query"])
        return Part(("query", "key_cache", "value_cache", "cache_seqlens"), 0, sequences, sequences - 1, 1)
    if "query" not in arguments:
        return None
    query, key = arguments["query"], arguments["key"]
    if "dropout_p" in arguments:
        return Part(("query", "key", "value"), 1, query.shape[1], 0, 1) if len(query) == 1 else None
    if query.dim() == 4 and not benchmark.differentiable:
        # The last queries see the same keys without the others, causal or not.
        queries = min(SOME_QUERIES, query.shape[2])
        return Part(("query",), 2, query.shape[2], query.shape[2] - queries, queries)
    if query.shape[1] == key.shape[1]:  # (B, H, L, D) or (total, H, D)
        return Part(("query", "key", "value"), 1, query.shape[1], query.shape[1] - 1, 1)
    return None


def _too_large(arguments: dict) -> bool:
    """Say whether the reference has no memory for the whole, so that it is not even tried."""
    if "mu" in arguments:
        return arguments["mu"].numel() > MOST_NUMBERS
    if "key_cache" in arguments:
        return arguments["key_cache"].numel() > MOST_NUMBERS_OF_CACHE
    query, key = arguments["query"], arguments["key"]
    return query.dim() == 4 and query.shape[:3].numel() * key.shape[2] > MOST_SCORES


def _double(value):
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
