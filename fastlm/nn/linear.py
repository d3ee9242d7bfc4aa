"""torch.nn.Linear on fastlm's kernels."""

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.linear import gains, linear
from .replace import ClassSwap, register
from .tracing import call_of_leaf, forward_for_script


class Linear(nn.Linear):
    """A drop-in for ``torch.nn.Linear`` with the same constructor, parameters, state_dict and results: see `fastlm.linear`.

    Where torch's own product is as fast, and on GPUs, torch's runs.
    """

    _scripted_forward = forward_for_script(nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        """Do what ``torch.nn.Linear.forward`` does."""
        if torch.jit.is_scripting():
            return self._scripted_forward(input)
        else:
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        leaf = call_of_leaf(self, input)
        return linear(input, self.weight, self.bias) if leaf is None else leaf


class LinearSwap(ClassSwap):
    """The swap of a kind of linear layer, on the machines and for the weights that the kernel is ever faster with."""

    def concerns(self, module: nn.Module) -> bool:
        # MultiheadAttention has the last kind to hold weights, which it reads itself.
        return super().concerns(module) and gains(module.weight) and type(module) is not NonDynamicallyQuantizableLinear


register(LinearSwap(nn.Linear, Linear))
