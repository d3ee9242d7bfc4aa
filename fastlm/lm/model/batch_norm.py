"""Decorrelated batch normalization of the posterior's means: a latent that cannot collapse, in none of its dimensions.

Normalized means (Zhu et al. 2020, arXiv:2004.12585) keep each dimension in use, but all may say the same. So the means are
decorrelated before, as in Huang et al. 2018 (arXiv:1804.08450), by the covariance of the last batches: that of 32 texts alone
says little of 16 dimensions.
"""

import torch
from torch import Tensor, nn

from ...distributed import context

MOMENTUM = 0.03  # of the running moments: they are of the last 30 batches
LEAST = 1e-2  # of the largest variance in any direction: those with less are not blown up further, rounding errors among them
EPSILON = 1e-5  # is added to variances, as in torch's BatchNorm1d


class DecorrelatedBatchNorm(nn.Module):
    """Give D features the mean 0, the deviation ``std``, and no correlations but those in directions of little variance.

    Mean and deviation are those of a batch; in evaluation they are those over training. If x are the means of posteriors, their
    KL from N(0, 1), averaged over a batch, is at least std^2 / 2 in each dimension, and it comes from the differences between
    the texts.

    A batch is that of all processes of torch.distributed, so that two processes give what one gives. The first batches count
    alike in the running moments: a short training has those of its own texts.

    Attributes:
        running_mean, running_cov: (D,) and (D, D), of x.
        decorrelation: (D, D), the inverse square root of ``running_cov``.
        running_var: (D,), of what is decorrelated: 1, or less where directions of x have less than LEAST.
    """

    def __init__(self, features: int, std: float):
        super().__init__()
        self.features, self.std = features, std
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_cov", torch.eye(features))
        self.register_buffer("decorrelation", torch.eye(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, D), normalized.

        Raises:
            ValueError: this is training, and there is one row in all, which has no deviation.
        """
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                normal, var = self._decorrelated(exact)
            else:
                normal = (exact - self.running_mean) @ self.decorrelation.to(exact.dtype)
                var = self.running_var
            return (self.std * normal * torch.rsqrt(var + EPSILON)).to(x.dtype)

    def _decorrelated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with the mean 0 and no correlations, and its variance (D,), and move the running moments towards x's."""
        if len(x) < 2 and not context.has_processes():
            raise ValueError("a batch must have at least 2 texts in training with mean_std; got 1")
        count = context.total_of_all(x.new_tensor(len(x)))
        mean = context.total_of_all(x.sum(0)) / count
        x = x - mean
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = (1 / self.num_batches_tracked).clamp(min=MOMENTUM)
            self.running_mean += rate * (mean - self.running_mean)
            self.running_cov += rate * (context.total_of_all(x.T @ x) / count - self.running_cov)
            root = inverse_root(self.running_cov)
            self.decorrelation.copy_(root)
        x = x @ root.to(x.dtype)
        var = context.total_of_all(x.square().sum(0)) / count
        with torch.no_grad():
            self.running_var += rate * (var - self.running_var)
        return x, var

    def extra_repr(self) -> str:
        return f"{self.features}, std={self.std}"


def inverse_root(cov: Tensor) -> Tensor:
    """Return the inverse square root (D, D) of a covariance, as if each direction had LEAST of the largest variance."""
    variances, directions = torch.linalg.eigh(cov.double())
    least = (LEAST * variances.max()).clamp(min=torch.finfo(torch.float32).tiny)
    return directions * variances.clamp(min=least).rsqrt() @ directions.T
