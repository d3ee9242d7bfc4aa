"""Is the answer right? Asked of every row of fastlm before it is timed. The rule is that of DESIGN.md, 'Numbers'."""

import torch
from op_rows import leaves_of, outputs_of
from torch import Tensor

from fastlm.ops.spec import Benchmark, seeded_normal

VALUE_FACTOR, GRADIENT_FACTOR, ULPS = 2.0, 3.0, 4


def errors(benchmark: Benchmark, arguments: dict, backend: str) -> dict[str, dict[str, float]]:
    """How wrong each result of ``backend`` is, and may be: {"output 0": {"error": …, "allowed": …}, "gradient of mu": …}.

    Golden is the reference in float64 on the same inputs. The backend's largest error may be twice (for gradients: three times)
    that of the reference in the inputs' own dtype, plus 4 ulps. Both figures are shares of the largest golden value.
    """
    actual = _results(benchmark, arguments, backend)
    plain = _results(benchmark, arguments, "reference")
    golden = _results(benchmark, {name: _double(value) for name, value in arguments.items()}, "reference", like=arguments)
    return {name: _judge(name, actual[name], plain[name], golden[name]) for name in golden}


def worst(judged: dict[str, dict[str, float]]) -> dict[str, float]:
    """The result with the largest error, and what it is allowed."""
    return max(judged.values(), key=lambda j: j["error"])


def _double(value):
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(benchmark: Benchmark, arguments: dict, backend: str, like: dict | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name. The gradients of the outputs are rounded to the dtype of the call it is ``like``."""
    leaves = leaves_of(benchmark, arguments)
    outputs = outputs_of(benchmark.function(**arguments, backend=backend))
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if leaves:
        dtype = next(iter(leaves_of(benchmark, like or arguments).values())).dtype
        gradients = [seeded_normal(100 + i, out.shape, dtype).to(out.dtype) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, tuple(leaves.values()), gradients)
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return results


def _judge(name: str, actual: Tensor, plain: Tensor, golden: Tensor) -> dict[str, float]:
    golden = golden.double()
    largest = golden.abs().max().item()
    # Noise is float32 whatever the dtype; tests hold what has none to float64's own ulps.
    ulp = max(torch.finfo(dtype).eps for dtype in (actual.dtype, torch.float32))
    factor = VALUE_FACTOR if name.startswith("output") else GRADIENT_FACTOR
    return {
        "error": (actual - golden).abs().max().item() / largest,
        "allowed": factor * (plain - golden).abs().max().item() / largest + ULPS * ulp,
    }
