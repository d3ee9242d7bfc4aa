"""fastlm: fused attention and VAE kernels for PyTorch language models, as drop-in replacements."""

from . import nn
from .backend import UnsupportedError, backends, explain
from .ops.reparameterize import gaussian_kl, reparameterize, reparameterize_with_kl

__version__ = "0.1.0"
__all__ = ["UnsupportedError", "backends", "explain", "gaussian_kl", "nn", "reparameterize", "reparameterize_with_kl"]
