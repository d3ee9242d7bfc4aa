"""Train a variational autoencoder of handwritten digits, save and load it, and draw samples of it.

    python benchmarks/digits_vae.py                        # 8 x 8 digits that come with scikit-learn: about ten seconds
    python benchmarks/digits_vae.py --data mnist           # 28 x 28, the network 784 -> 64 -> 2 * 100 -> 64 -> 784
    python benchmarks/digits_vae.py --latent eager         # the same model in plain PyTorch

The stochastic layer is `fastlm.nn.GaussianLatent`; that one line is all a VAE needs to use the fused kernel. The network is
that of an example copied all over the web, three of whose mistakes are put right: look for "Often wrong" in the comments, here
and in workloads/peers.py.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from workloads.peers import eager_latent

from digits.data import Digits, load_digits
from digits.plot import draw_digits
from fastlm.nn import GaussianLatent
from fastlm.ops import noise

HIDDEN, LATENT = 64, 100
BATCH, LEARNING_RATE = 128, 3e-3
EPOCHS = {"digits": 300, "mnist": 20}
COLUMNS = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn()
PICTURE_WIDTH = 16  # digits to a row of the picture


class EagerLatent(GaussianLatent):
    """The same layer as people write it, in plain PyTorch. With a ``seed``, it draws the very noise of the fused layer."""

    def forward(self, x: Tensor, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        mu, logvar = self.parameters_of(x)
        eps = None if seed is None else noise.normal(mu.shape, seed=seed).to(mu.dtype)
        return eager_latent(mu, logvar, eps=eps)


LATENTS = {"fused": GaussianLatent, "eager": EagerLatent}


class VAE(nn.Module):
    """Linear pixels -> 64 -> 2 * latent, and back: the decoder mirrors the encoder."""

    def __init__(self, pixels: int, latent: type[GaussianLatent] = GaussianLatent):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.ReLU())
        self.latent = latent(HIDDEN, LATENT)
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, pixels))

    def forward(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Return logits of the reconstructions (N, pixels) of images (N, pixels) in [0, 1], and their KL (N,) in nats."""
        z, kl = self.latent(self.encoder(x), seed=seed)
        return self.decoder(z), kl

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Decode the posterior's mean, without noise."""
        return torch.sigmoid(self.decoder(self.latent.mode(self.encoder(x))))

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Make new digits by decoding draws from the prior N(0, 1)."""
        return torch.sigmoid(self.decoder(torch.randn(count, LATENT, generator=generator)))


def new_model(pixels: int, latent: str, seed: int) -> VAE:
    """Return a VAE with its first weights, which depend on the ``seed`` alone and not on the kind of latent."""
    torch.manual_seed(seed)
    return VAE(pixels, LATENTS[latent])


def loss_of(logits: Tensor, x: Tensor, kl: Tensor) -> Tensor:
    """Return the negative evidence lower bound in nats per image: reconstruction plus KL, averaged over the batch.

    Often wrong: binary_cross_entropy with its default reduction averages over pixels as well. Added to a KL summed over
    everything, it weighs next to nothing, and the model learns to ignore its input. Both terms are sums per image here.
    """
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=-1)
    # Often wrong: pixels normalised to [-1, 1]. Cross-entropy needs targets in [0, 1], the sigmoid's range; see data.py.
    return (reconstruction + kl).mean()


def train_step(model: VAE, optimizer: torch.optim.Optimizer, x: Tensor, seed: int | None = None) -> float:
    """Take a step of gradient descent on images ``x`` (N, pixels), return the loss. ``seed`` fixes the step's noise."""
    logits, kl = model(x, seed)
    loss = loss_of(logits, x, kl)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@dataclass
class History:
    """The loss in nats per image and the seconds of each step of a training."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        return 1.0 / statistics.median(self.seconds)


def optimizer_of(model: VAE) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def train(model: VAE, images: Tensor, epochs: int, seed: int, same_noise: bool = False) -> History:
    """Train on ``images`` (N, pixels) with Adam. ``seed`` fixes their order.

    With ``same_noise`` it also gives each step's noise a seed, so that every kind of latent is trained with the same.
    """
    history, optimizer = History(), optimizer_of(model)
    generator = torch.Generator().manual_seed(seed)
    with Progress(*COLUMNS) as progress:
        task = progress.add_task("", total=epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=generator).split(BATCH):
                x, noise_seed = images[batch], None
                if same_noise:
                    noise_seed = torch.randint(2**63 - 1, (), generator=generator).item()
                start = time.perf_counter()
                history.losses.append(train_step(model, optimizer, x, noise_seed))
                history.seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, description=f"loss {history.losses[-1]:.2f} nats")
    return history


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, seed: int = 0) -> float:
    """Return the loss on ``images`` (N, pixels) with one draw of noise each, in nats per image."""
    logits, kl = model(images, seed)
    return loss_of(logits, images, kl).item()


def picture(model: VAE, digits: Digits, path: Path) -> None:
    """Draw digits of the test set, their reconstructions, and digits that never were."""
    seen = digits.test[:PICTURE_WIDTH]
    samples = model.sample(4 * PICTURE_WIDTH, torch.Generator().manual_seed(0))
    rows = {"test digits": seen, "reconstructed": model.reconstruct(seen), "sampled from the prior": samples}
    draw_digits(path, rows, digits.side, PICTURE_WIDTH)


def save_and_load(model: VAE, pixels: int, path: Path) -> VAE:
    """Write the weights, and read them into a model with fastlm's latent. All latents have the same parameters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path)
    loaded = VAE(pixels)
    load_model(loaded, path)
    return loaded


def main() -> None:
    options = parse_options()
    digits = load_digits(options.data)
    model = new_model(digits.train.shape[1], options.latent, options.seed)
    epochs = options.epochs or EPOCHS[options.data]
    print(f"{model}\nTraining on {len(digits.train):,} digits of {digits.side} x {digits.side} pixels for {epochs} epochs:")
    history = train(model, digits.train, epochs, options.seed)
    print(f"  {history.steps_per_second:,.0f} steps/s; loss {history.losses[0]:.2f} -> {history.losses[-1]:.2f} nats per image")

    weights, image = options.out / "digits_vae.safetensors", options.out / "digits.png"
    loaded = save_and_load(model, digits.train.shape[1], weights)
    print(f"  {weights}: loaded again, loss {evaluate(loaded, digits.test):.2f} nats on {len(digits.test):,} test digits")
    picture(loaded, digits, image)
    print(f"  {image}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=EPOCHS, default="digits", help="default: digits, embedded in scikit-learn")
    parser.add_argument("--latent", choices=LATENTS, default="fused", help="default: fused")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and the noise; default: 0")
    parser.add_argument("--out", type=Path, default=Path("build/digits"), help="default: build/digits")
    return parser.parse_args()
