"""transformers' Conv1D, the linear layer of GPT-2 with transposed weights, on fastlm's kernels."""

from torch import Tensor
from transformers import pytorch_utils

from ...nn.linear import LinearSwap
from ...nn.replace import register
from ...ops.linear import linear


class Conv1D(pytorch_utils.Conv1D):
    """A drop-in for ``transformers.pytorch_utils.Conv1D``: see `fastlm.linear`, which reads the weights where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        """Do what ``transformers.pytorch_utils.Conv1D.forward`` does."""
        return linear(x, self.weight.t(), self.bias)


register(LinearSwap(pytorch_utils.Conv1D, Conv1D))
