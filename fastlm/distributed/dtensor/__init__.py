"""Run fastlm's ops on DTensors: each rank runs the call of its own shards, with gradients placed as theirs.

A call has axes, such as the batch and the heads of attention, along which it falls apart into calls that need nothing of each
other. plan.py chooses an axis for each dimension of the mesh and makes local tensors of DTensors, and back; a file for each op
names its axes, and gives the local call what it cannot know: the places at which its noise is drawn.

A plain tensor among DTensors counts as replicated: it must be the same on every rank.
"""

from .attention import run_attention, run_kvcache, run_weights
from .latent import run_latent
from .linear import run_linear

FUNCTIONS = {
    "attention": run_attention,
    "kvcache_attention": run_kvcache,
    "attention_weights": run_weights,
    "linear": run_linear,
    "latent": run_latent,
}
