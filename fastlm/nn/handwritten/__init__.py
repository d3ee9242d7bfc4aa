"""Attention that is spelled out, ``softmax(q @ k.mT * scale + bias) @ v``, found while it runs and computed by one call."""

from .deferred import Deferred, begin, stands_in_for, uncounted
from .products import least_scores, may_be_scores
