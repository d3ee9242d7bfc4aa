"""transformers' Conv1D, the linear layer of GPT-2 with transposed weights, on fastlm's kernels."""

from torch import Tensor, nn
from transformers import pytorch_utils

from ...nn.replace import ClassSwap, register
from ...ops.linear import gains, linear


class Conv1D(pytorch_utils.Conv1D):
    """A drop-in for ``transformers.pytorch_utils.Conv1D``: see `fastlm.linear`, which reads the weights where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        """Do what ``transformers.pytorch_utils.Conv1D.forward`` does."""
        return linear(x, self.weight.t(), self.bias)


class Conv1DSwap(ClassSwap):
    """The swap of a Conv1D, on the machines and for the weights that the kernel is ever faster with."""

    def concerns(self, module: nn.Module) -> bool:
        return super().concerns(module) and gains(module.weight.t())


register(Conv1DSwap(pytorch_utils.Conv1D, Conv1D))
