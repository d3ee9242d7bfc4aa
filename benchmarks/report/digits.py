"""Write the report's section on the digits VAE."""

from functools import partial
from pathlib import Path

from suite.units import size

from report import plots
from report.blocks import Block, Heading, Photo, Plot, Table, Text, plain


def digits_blocks(digits: dict | None, out: Path) -> list[Block]:
    if digits is None:
        return []
    about = f"""\
A VAE trained on the handwritten digits of scikit-learn, with `fastlm.nn.GaussianLatent` and with the same layer in plain
PyTorch: the same first weights, the same order of the images, the same noise. Steps per second are those of whole training
steps of {digits["batch"]} images on one thread (a network this small gains nothing from more), each latent drawing noise in
its own usual way. Peak memory is that of one step on all {digits["memory_batch"]:,} training images at once, beyond the model,
its optimizer and the images."""
    return [
        Heading(2, "Digits VAE"),
        Text(about),
        _table(digits),
        Text(_agreement(digits["agreement"])),
        Plot("losses", "loss curves", partial(plots.losses, digits)),
        Photo(out / "digits.png", "digits"),
        Text("Drawn by the fused model after it was saved and loaded again; pictures are interpolated."),
    ]


def _table(digits: dict) -> Table:
    rows = [_row(digits, latent) for latent in ("fused", "eager")]
    return Table(("latent", "steps/s", "peak extra memory", "test loss (nats per image)"), rows)


def _row(digits: dict, latent: str) -> tuple:
    memory = digits["memory"][latent]
    peak = size(memory["bytes"]) if "bytes" in memory else plain(f"not measured: {memory['why_not']}")
    return latent, f"{digits['steps_per_second'][latent]:,.0f}", peak, f"{digits['test_loss'][latent]:.2f}"


def _agreement(a: dict) -> str:
    return f"""\
**The loss curves {"agree" if a["agree"] else "do NOT agree"}.** Over the first {a["first_steps"]} steps the fused one is never
more than {a["first_error"]:.1e} nats from the same training in float64; {a["first_allowed"]:.1e} are allowed: three times what
the eager one is off, plus 4 ulps. Later, rounding errors turn units of the network on and off, and trainings part, as eager's
own in float32 and float64 do; there the mean losses of an epoch differ by at most {a["epochs_apart"]:.2%}
({a["epochs_allowed"]:.0%} is allowed)."""
