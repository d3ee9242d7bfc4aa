"""Which block of `use` a call is in."""

import torch

# The blocks of a thread are one of torch's thread-local objects, which its autograd threads get from the thread that calls
# backward: (the innermost, the blocks around it), or None. In place of a block stands None where not even enable() holds.
_KEY = "fastlm.use"
everywhere: object | None = None  # the block of enable()


def _blocks() -> tuple[object | None, tuple | None] | None:
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def enter(block: object | None) -> None:
    """Enter a block, or with None what is outside of all."""
    torch._C._stash_obj_in_tls(_KEY, (block, _blocks()))


def leave() -> None:
    """Leave the innermost block of this thread."""
    blocks = _blocks()
    torch._C._stash_obj_in_tls(_KEY, blocks and blocks[1])  # There are none if a generator goes on in another thread.


def current() -> object | None:
    """Return the block that a call of this thread is in."""
    blocks = _blocks()
    return everywhere if blocks is None else blocks[0]


class Outside:
    """Leave to torch what is called within ``with Outside():``."""

    __slots__ = ()

    def __enter__(self) -> None:
        enter(None)

    def __exit__(self, *_) -> None:
        leave()
