"""Sizes of the models to train, by name. This file brings no torch: the command line lists the names."""

from dataclasses import dataclass

KINDS = ("vae", "decoder")


@dataclass(frozen=True)
class Preset:
    """The size of a model. The defaults of `fastlm.lm.training.settings.Settings` suit every size."""

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    layers: int  # of the decoder
    encoder_layers: int
    latent_dim: int
    max_tokens: int


PRESETS = {
    "tiny": Preset(64, 176, 4, 2, 2, 1, 16, 128),  # to try things out, and for the tests
    "small": Preset(256, 704, 4, 2, 4, 2, 16, 320),  # minutes on two cores
    "base": Preset(768, 2048, 12, 4, 12, 6, 64, 1024),  # hours on a GPU
}
