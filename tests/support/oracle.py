"""Hold every backend to the rule of errors (fastlm/testing.py) by running a call several ways.

*Golden* is the reference in float64 on the very same inputs. *Plain* is the reference in the inputs' own dtype, as plain
PyTorch computes it. A backend's error may be a small factor times the error of plain, plus a few ulps of the largest value.
Where large terms cancel, as in a z near 0, plain is right by luck alone. So the effect of one rounding of each input counts,
too: *nudged* is golden on inputs and gradients that are all off by one ulp of the arithmetic, up or down at random. Small
results are perturbed several times, because one random perturbation may change little.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import pytest
import torch
from torch import Tensor

from fastlm.backend import cpu as native
from fastlm.testing import (
    GRADIENT_FACTOR,
    ULPS,
    VALUE_FACTOR,
    allowed_error,
    assert_within,
    seeded_normal,
    ulp_of_largest,
    worst_error,
)

FEW = 64  # A result of at most this many numbers is small.
ISAS = native.C.isas() if native.C else ["no fastlm._C"]  # This machine's instruction sets, fastest last.
Results = dict[str, Tensor]  # Names are "output 0", "output 1", …, "gradient of mu", …


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Run the block on one instruction set. Without the C++ module the test fails, because a build problem must show."""
    if native.C is None:
        pytest.fail(native.load_error)
    before = native.C.isa()
    native.C.set_isa(isa)
    assert native.C.isa() == isa
    try:
        yield
    finally:
        native.C.set_isa(before)


# ---- the runs ---------------------------------------------------------------------------------------------------------------


def output_gradients(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Draw normals for the outputs' gradients, rounded to the call's dtype. Every run of a call gets the same numbers."""
    return [seeded_normal(100 + i, out.shape, dtype).to(out.dtype) for i, out in enumerate(outputs)]


def run(
    function: Callable, arguments: dict, differentiable: tuple, make_gradients=output_gradients, device="cpu", **options
) -> Results:
    """Return the outputs of ``function(**arguments, **options)`` and the gradients of the tensors in ``differentiable``."""
    arguments = {name: _moved(value, device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    tensors = {name: arguments[name] for name in differentiable if arguments.get(name) is not None}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    outputs = function(**{**arguments, **leaves, **options})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": out.detach().cpu() for i, out in enumerate(outputs)}
    if leaves:
        gradients = [g.to(device) for g in make_gradients(outputs, _dtype_of(arguments))]
        for name, gradient in zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), gradients)):
            results[f"gradient of {name}"] = gradient.cpu()
    return results


def _moved(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor to the device with its strides. Tensor.to would make a view with gaps contiguous."""
    if tensor.device.type == device:
        return tensor
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _dtype_of(arguments: dict) -> torch.dtype:
    """Return the dtype of the call: that of its first floating tensor, or float32 where it has none."""
    tensors = (value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point())
    return next((tensor.dtype for tensor in tensors), torch.float32)


def _in(dtype: torch.dtype, arguments: dict) -> dict:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


class Oracle:
    """Hold the golden answer to a call, and the allowed error of each of its results."""

    def __init__(
        self, function: Callable, arguments: dict, differentiable: tuple[str, ...], noisy: set[str], gradients=output_gradients
    ):
        self.function, self.arguments, self.differentiable = function, arguments, differentiable
        self.noisy = noisy  # These results hold noise, which is float32 whatever the dtype.
        self.gradients = gradients
        self.dtype = _dtype_of(arguments)
        self.golden = self._reference(_in(torch.float64, arguments), self.dtype)
        self.plain = self._reference(arguments, self.dtype)
        self.nudged: dict[tuple[torch.dtype, int], Results] = {}
        self.allowed: dict[tuple[str, torch.dtype, int], float] = {}  # By a result, its dtype and the draws.

    def _reference(self, arguments: dict, gradient_dtype: torch.dtype, nudge: float = 0.0, draw: int = 0) -> Results:
        """Run the reference. The gradients of the outputs hold the same numbers whatever the dtype of the run."""
        if nudge:  # A nudged logvar might jump over the end of a clamp.
            arguments = {name: value if name == "logvar" else _off_by(nudge, value, draw) for name, value in arguments.items()}

        def gradients(outputs, dtype):
            same = [g.to(out.dtype) for g, out in zip(self.gradients(outputs, gradient_dtype), outputs)]
            if nudge and "query" in arguments:
                same = with_rounded_deltas(torch.finfo(self.dtype).eps, [out.detach() for out in outputs], same, draw)
            return [_off_by(nudge, g, draw) for g in same] if nudge else same

        return run(self.function, arguments, self.differentiable, gradients, backend="reference")

    def _nudged(self, arithmetic: torch.dtype, draw: int) -> Results:
        """Run golden on tensors off by an ulp of the arithmetic, or by eight in float64, where golden is rounded, too."""
        if (arithmetic, draw) not in self.nudged:
            nudge = torch.finfo(arithmetic).eps * (8 if arithmetic == torch.float64 else 1)
            results = self._reference(_in(torch.float64, self.arguments), self.dtype, nudge, draw)
            self.nudged[arithmetic, draw] = results
        return self.nudged[arithmetic, draw]

    def check(self, **options) -> Results:
        """Run the call with ``options`` and hold each of its results to the rule."""
        results = run(self.function, self.arguments, self.differentiable, self.gradients, **options)
        self.compare(results)
        return results

    def check_on_every_isa(self) -> None:
        """Check the CPU's kernels on each instruction set of this machine, all against one golden answer."""
        for isa in ISAS:
            with instruction_set(isa):
                try:
                    self.check(backend="cpu")
                except AssertionError as error:
                    raise AssertionError(f"on {isa}: {error}") from error

    def compare(self, results: Results) -> None:
        """Hold results of the call, wherever they come from, to the rule."""
        assert results.keys() == self.golden.keys()
        for what, actual in results.items():
            try:
                self._check(what, actual, draws=1)
            except AssertionError:
                if actual.numel() > FEW:
                    raise
                self._check(what, actual, draws=8)

    def _check(self, what: str, actual: Tensor, draws: int) -> None:
        if self.dtype != torch.float64:
            assert actual.dtype == self.plain[what].dtype, f"{what} is {actual.dtype}, not {self.plain[what].dtype}"
        key = what, actual.dtype, draws
        if key not in self.allowed:
            self.allowed[key] = self._allowed(*key)
        assert_within(actual, self.golden[what], self.allowed[key], what)

    def _allowed(self, what: str, dtype: torch.dtype, draws: int) -> float:
        factor = VALUE_FACTOR if what.startswith("output") else GRADIENT_FACTOR
        slack = self._slack(what, dtype, draws)
        if self.dtype == torch.float64:
            return factor * self._error_in_float64(what) + ULPS * slack
        return allowed_error(self.plain[what], self.golden[what], factor, slack)

    def _slack(self, what: str, dtype: torch.dtype, draws: int) -> float:
        """Return a nudge's effect plus an ulp of the largest value, of the coarser dtype of result and arithmetic."""
        golden = self.golden[what]
        arithmetic = torch.float64 if self.dtype == torch.float64 and what not in self.noisy else torch.float32
        ulp = max(ulp_of_largest(golden, dtype), ulp_of_largest(golden, arithmetic))
        return ulp + max(worst_error(self._nudged(arithmetic, draw)[what], golden) for draw in range(draws))

    def _error_in_float64(self, what: str) -> float:
        """Return plain's float32 error, scaled to float64, where golden and plain are one. Noise, float32, is not scaled."""
        scale = 1.0 if what in self.noisy else torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return scale * self.errors_in_float32[what]

    @cached_property
    def errors_in_float32(self) -> dict[str, float]:
        arguments = _in(torch.float32, self.arguments)
        golden, plain = (self._reference(_in(dtype, arguments), torch.float32) for dtype in (torch.float64, torch.float32))
        return {what: worst_error(plain[what], golden[what]) for what in golden}


def _off_by(relative: float, value, draw: int):
    """Return a tensor with each number off by that much, up or down. Return any other value as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value * (1 + relative * seeded_normal(200 + 10 * draw + value.dim(), value.shape, torch.float64).sign())


def rounding_of_delta(relative: float, out: Tensor, gradient: Tensor, draw: int) -> Tensor:
    """Return the effect of a rounded output on delta = sum(out * its gradient), which backwards compute from that output.

    Adding it to the gradient of the log-sum-exp subtracts it from the scores' gradients.
    """
    sizes = (out * gradient).abs().sum(dim=-1)
    sizes = sizes if out.dim() == 4 else sizes.T  # Packed: (total, heads); the log-sum-exp is (heads, total).
    return relative * sizes * seeded_normal(400 + draw, sizes.shape, torch.float64).sign()


def with_rounded_deltas(relative: float, outputs: list[Tensor], gradients: list[Tensor], draw: int) -> list[Tensor]:
    """Return the gradients of (out, lse), and of statistics or tangents, with the effect of rounded deltas. Others stay.

    The backward of the tangents computes two more deltas, of the gradient of out's tangent with out and with its tangent. They
    act as gradients of the tangent of the log-sum-exp and of the log-sum-exp.
    """

    def rounding(out: int, gradient: int, number: int) -> Tensor:
        return rounding_of_delta(relative, outputs[out], gradients[gradient], draw + number)

    rank = outputs[0].dim()
    ranks = tuple(out.dim() for out in outputs)
    if ranks[:2] == (rank, rank - 1) and rank not in ranks[2:]:  # The statistics have a dimension less than out.
        return [gradients[0], gradients[1] + rounding(0, 0, 0), *gradients[2:]]
    if ranks != (rank, rank - 1) * 2:
        return gradients
    of_lse = gradients[1] + rounding(0, 0, 0) + rounding(2, 2, 50)
    return [gradients[0], of_lse, gradients[2], gradients[3] + rounding(0, 2, 60)]


def noisy_results(name: str) -> set[str]:
    """Return which results of the op of that name hold noise."""
    return {"output 0", "gradient of logvar"} if name in ("normal", "reparameterize", "reparameterize_with_kl") else set()
