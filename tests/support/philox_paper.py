"""Implement the generator as its paper gives it, for the tests of noise and dropout to compare with."""


def philox_of_the_paper(counter: list[int], key: list[int]) -> list[int]:
    """Return the words of Philox4x32-10 as figure 1 and table 1 of Salmon et al. (SC'11) give it, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(c0 * 0xD2511F53, 2**32), divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]
