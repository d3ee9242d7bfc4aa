"""Compare the digits VAE with the fused and with the eager latent: their trainings, their speed, and their memory."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from suite.memory import peak_extra_bytes
from suite.terminal import Activity
from torch import Tensor

from digits.data import load_digits
from digits.vae import BATCH, EPOCHS, LATENTS, evaluate, new_model, optimizer_of, picture, save_and_load, train, train_step
from fastlm.testing import GRADIENT_FACTOR, allowed_error, errors_of, ulp_of_largest

SEED = 0
FIRST_STEPS = 50
EPOCH_TOLERANCE = 0.01
TIMED_STEPS = 500
TRAININGS = {"float64": ("eager", torch.float64), "eager": ("eager", torch.float32), "fused": ("fused", torch.float32)}


def run_digits(activity: Activity, out: Path) -> dict:
    """Train both, return what the report says of them, and leave digits.png in ``out``."""

    def begin(text: str) -> None:
        activity.print(f"  {text}")
        activity.say(text)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # A network this small gains nothing from more.
    digits = load_digits("digits")
    curves, tests, models = {}, {}, {}
    for name, (latent, dtype) in TRAININGS.items():
        begin(f"training with the {latent} latent in {str(dtype).removeprefix('torch.')}")
        models[name] = new_model(digits.train.shape[1], latent, SEED).to(dtype)
        images = digits.train.to(dtype)
        curves[name] = train(models[name], images, EPOCHS["digits"], SEED, same_noise=True).losses
        tests[name] = evaluate(models[name], digits.test.to(dtype))
    begin("timing steps of the two, in turn; then their memory")
    steps_per_epoch = -(-len(digits.train) // BATCH)
    result = {
        "curves": curves,
        "steps_per_epoch": steps_per_epoch,
        "test_loss": tests,
        "agreement": agreement(curves, steps_per_epoch),
        "batch": BATCH,
        "steps_per_second": speeds(digits.train),
        "memory_batch": len(digits.train),
        "memory": {latent: peak_extra_bytes("digits.compare_latents:whole_step", latent=latent) for latent in LATENTS},
    }
    picture(save_and_load(models["fused"], digits.train.shape[1], out / "digits_vae.safetensors"), digits, out / "digits.png")
    torch.set_num_threads(threads)
    return result


def agreement(curves: dict[str, list[float]], steps_per_epoch: int) -> dict:
    """Check whether the loss curves of one seed and one noise agree.

    At first, rounding is all that can part them: the fused curve may stray from the float64 one three times as far as the eager
    one does, plus 4 ulps of the largest loss. Later a training is chaotic, as rounding errors turn units of the network on and
    off: from there on the mean losses of each epoch have to agree to 1 %, about ten times what eager's own in float32 and in
    float64 were seen to differ.
    """
    fused, eager, golden = (torch.tensor(curves[name], dtype=torch.float64) for name in ("fused", "eager", "float64"))
    first = slice(FIRST_STEPS)
    ulp = ulp_of_largest(golden[first], torch.float32)
    allowed = allowed_error(eager[first], golden[first], GRADIENT_FACTOR, ulp)  # A training is made of gradients.
    error = errors_of(fused[first], golden[first]).max().item()
    means = [curve.unfold(0, steps_per_epoch, steps_per_epoch).mean(dim=1) for curve in (fused, eager)]
    apart = ((means[0] - means[1]).abs() / means[1]).max().item()
    return {
        "first_steps": FIRST_STEPS,
        "first_error": error,
        "first_allowed": allowed,
        "epochs_apart": apart,
        "epochs_allowed": EPOCH_TOLERANCE,
        "agree": error <= allowed and apart <= EPOCH_TOLERANCE,
    }


def speeds(images: Tensor) -> dict[str, float]:
    """Return steps per second of a batch, by the median of steps taken in turn. Each latent draws noise its usual way."""
    steps = {latent: _step(latent, images[:BATCH]) for latent in LATENTS}
    seconds = {latent: [] for latent in LATENTS}
    for _ in range(TIMED_STEPS):
        for latent, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[latent].append(time.perf_counter() - start)
    return {latent: 1.0 / statistics.median(times) for latent, times in seconds.items()}


def _step(latent: str, x: Tensor) -> Callable[[], float]:
    model = new_model(x.shape[1], latent, SEED)
    return partial(train_step, model, optimizer_of(model), x)


def whole_step(latent: str) -> Callable[[], float]:
    """Return a step on all training images at once, for memory.py. With BATCH of them the latent is too small to see."""
    return _step(latent, load_digits("digits").train)
