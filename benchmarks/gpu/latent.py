"""Times the Gaussian latent on a GPU: fastlm's CUDA kernels beside the same thing in plain PyTorch and in torch.compile.

    fastlm bench --only gpu        # a part of `make bench` where torch sees a GPU

Forward and backward of reparameterize_with_kl, medians of CUDA events with a cold second-level cache (attention.py). The share
of bandwidth counts each input read once and each result written once per pass, against a large copy on the same GPU. Each
fastlm row was checked against the reference before it was timed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastlm
from gpu.attention import cold_median, peak_mib

FASTLM = "fastlm cuda"
COPY_BYTES = 1 << 30
CHECKED = 1 << 20  # elements: the reference takes a hundred times their memory


class Work(NamedTuple):
    """One thing to time."""

    what: str  # "forward" or "forward + backward"
    rows: int
    columns: int
    dtype: torch.dtype

    def elements(self) -> int:
        return self.rows * self.columns

    def bytes_moved(self) -> int:
        """mu, logvar -> z; then mu, logvar, grad_z -> grad_mu, grad_logvar. The KL's are as good as none."""
        return self.elements() * self.dtype.itemsize * (8 if "backward" in self.what else 3)


SHAPES = ((32, 100), (1024, 256), (4096, 1024), (65536, 128), (65536, 1024), (16, 1 << 22))
WORKS = tuple(
    Work(what, *shape, dtype)
    for what in ("forward", "forward + backward")
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
)


# ---- what is timed ----------------------------------------------------------------------------------------------------------


def _eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """What users write."""
    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn_like(std) * std
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)


def _fastlm(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend="cuda")


def _compiled() -> Callable:
    torch._dynamo.reset()  # it keeps a few compilations of a function, and runs it eagerly from there on
    return torch.compile(_eager, dynamic=False)


def implementations() -> dict[str, Callable]:
    """fastlm first, then what a user would write instead."""
    return {FASTLM: _fastlm, "eager": _eager, "compile": _compiled()}


def inputs(work: Work, device: str) -> list[Tensor]:
    """mu and logvar."""
    torch.manual_seed(0)
    tensors = [torch.randn(work.rows, work.columns, device=device, dtype=work.dtype) for _ in range(2)]
    return [t.requires_grad_("backward" in work.what) for t in tensors]


def step_of(function: Callable, tensors: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call, and the gradients where inputs ask for them."""

    def step():
        z, kl = function(*tensors)
        if not tensors[0].requires_grad:
            return z, kl
        return z, kl, *torch.autograd.grad((z, kl), tensors, (z.detach(), torch.ones_like(kl)))

    return step


# ---- how --------------------------------------------------------------------------------------------------------------------


def check(work: Work, results: tuple[Tensor, ...], tensors: list[Tensor]) -> float:
    """The largest error over the largest value, against the reference on the first rows; raises where it is wrong."""
    rows = max(1, CHECKED // work.columns)
    some = [t.detach()[:rows].requires_grad_(t.requires_grad) for t in tensors]
    expected = step_of(lambda mu, logvar: fastlm.reparameterize_with_kl(mu, logvar, seed=1, backend="reference"), some)()
    pairs = [(a.detach()[:rows].double(), e.detach().double()) for a, e in zip(results, expected)]
    error = max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)
    if not error < 4 * torch.finfo(work.dtype).eps:
        raise AssertionError(f"{FASTLM}: {work} is wrong by {error:.1%} of the largest value")
    return error


def copy_bandwidth(device: str, time: Callable, count: int = COPY_BYTES) -> float:
    """Bytes read and written a millisecond by a large copy."""
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * count / time(lambda: target.copy_(source))


def measure(work: Work, name: str, function: Callable, tensors: list[Tensor], time: Callable, limit: float) -> dict:
    """A row: the time, the throughput, the share of bandwidth and the peak memory, or why there is none."""
    row = {**work._asdict(), "dtype": str(work.dtype).removeprefix("torch."), "implementation": name}
    step = step_of(function, tensors)
    try:
        results = step()
        if name == FASTLM:
            row["error"] = check(work, results, tensors)
        del results
        milliseconds = time(step)
    except Exception as error:  # a peer that fails is a row, and the rest goes on
        if name == FASTLM:
            raise
        return {**row, "why_not": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    rates = {"gelem_s": work.elements() / milliseconds / 1e6, "of_bandwidth": work.bytes_moved() / milliseconds / limit}
    return {**row, "ms": milliseconds, **rates, "peak_mib": peak_mib(step)}


def run(works=WORKS, device: str = "cuda", time: Callable = cold_median, copied: int = COPY_BYTES) -> list[dict]:
    """All rows; implementations of a setting one after the other."""
    limit, rows = copy_bandwidth(device, time, copied), []
    for work in works:
        tensors = inputs(work, device)
        rows += [measure(work, name, function, tensors, time, limit) for name, function in implementations().items()]
    return rows


HEADER = ("work", "implementation", "ms", "throughput", "of bandwidth", "peak MiB", "speed-up")


def cells(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """A row as a reader sees it, under HEADER; speed-ups are over eager in the same setting."""
    work = f"{row['what']} {row['rows']} x {row['columns']} {row['dtype']}"
    if "why_not" in row:
        return work, row["implementation"], "–", row["why_not"], "–", "–", "–"
    setting = ("what", "rows", "columns", "dtype")
    eager = next((r.get("ms") for r in rows if r["implementation"] == "eager" and all(r[k] == row[k] for k in setting)), None)
    rates = f"{row['gelem_s']:.1f} Gelem/s", f"{row['of_bandwidth']:.0%}", f"{row['peak_mib']:.0f}"
    return work, row["implementation"], f"{row['ms']:.4f}", *rates, f"{eager / row['ms']:.1f} ×" if eager else "–"
