"""Functions that return attention's statistics beside its other results, so that tests of values and gradients test them."""

from collections.abc import Callable

ALL_STATS = ("entropy", "max_logit", "key_mass")


def with_stats(function: Callable, names: tuple[str, ...] = ALL_STATS) -> Callable:
    """Return a function of the same arguments whose last results are the statistics of these names."""

    def both(**arguments):
        *results, stats = function(**arguments, return_stats=names)
        assert tuple(name for name in stats._fields if getattr(stats, name) is not None) == names
        return *results, *(tensor for tensor in stats if tensor is not None)

    return both
