"""Batch normalization of the posterior's means: a latent that cannot collapse (Zhu et al. 2020, arXiv:2004.12585)."""

import torch
from torch import Tensor, nn

from ...distributed import context


class BatchNorm(nn.BatchNorm1d):
    """Give each of D features the mean 0 and the standard deviation ``std``: over a batch, in evaluation over training's.

    If x are the means of posteriors, their KL from N(0, 1), averaged over a batch, is at least std^2 / 2 in each dimension, and
    it comes from the differences between the texts.

    A batch is that of all processes of torch.distributed, so that two processes give what one gives (torch's SyncBatchNorm does
    so on GPUs alone). The first ten batches count alike in the running moments: a short training has those of its own texts.
    """

    def __init__(self, features: int, std: float):
        super().__init__(features, affine=False)
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, D), normalized.

        Raises:
            ValueError: this is training, and there is one row in all, which has no deviation.
        """
        mean, var = self._moments(x) if self.training else (self.running_mean, self.running_var)
        return (self.std * (x - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance (D,) of all processes' rows, and move the running ones towards them."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if len(x) < 2 and not context.has_processes():
            raise ValueError("a batch must have at least 2 texts in training with mean_std; got 1")
        count = context.total_of_all(x.new_tensor(len(x)))
        mean = context.total_of_all(x.sum(0)) / count
        var = context.total_of_all((x - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = (1 / self.num_batches_tracked).clamp(min=self.momentum)
            self.running_mean += rate * (mean - self.running_mean)
            self.running_var += rate * (var - self.running_var)
        return mean, var

    def extra_repr(self) -> str:
        return f"{self.num_features}, std={self.std}"
