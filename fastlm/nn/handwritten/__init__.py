"""Attention that is spelled out, ``softmax(q @ k.mT * scale + bias) @ v``, found while it runs and computed by one call."""

from .deferred import Deferred as Deferred
from .deferred import begin as begin
from .deferred import stands_in_for as stands_in_for
from .deferred import uncounted as uncounted
from .products import may_be_scores as may_be_scores
from .products import pays as pays
