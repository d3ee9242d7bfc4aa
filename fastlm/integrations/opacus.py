"""Opacus on models after fastlm.replace: ``import fastlm.integrations.opacus``.

Opacus (differentially private training) looks up what to do with a module by its exact class: how to validate it, what to put
in its place, and how to compute the gradient of each example. Importing this file enters fastlm's classes beside torch's: a
replaced nn.MultiheadAttention is found unfit and fixed, and a replaced nn.Linear has its per-example gradients.
"""

from torch import nn

from ..nn import Linear, MultiheadAttention
from .extras import require

require("opacus")

from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

_TABLES = (
    ModuleValidator.VALIDATORS,
    ModuleValidator.FIXERS,
    GradSampleHooks.GRAD_SAMPLERS,
    GradSampleHooksFastGradientClipping.NORM_SAMPLERS,
)

for _table in _TABLES:
    for _torch_s, _ours in ((nn.Linear, Linear), (nn.MultiheadAttention, MultiheadAttention)):
        if _torch_s in _table:
            _table[_ours] = _table[_torch_s]
