"""Word dropout and span masking are pure and seeded, and mask at the rates they are given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlm.lm.data.augment import span_masking, word_dropout

MASK = 3
IDS = torch.arange(10, 10 + 64 * 512).view(64, 512)  # all different, so that a moved token would show


def both(ids, share, **options):
    """Return the masked ids of each function."""
    return word_dropout(ids, share, MASK, **options), span_masking(ids, share, MASK, mean_length=100, **options)[0]


@given(st.floats(0, 0.99), st.integers(0, 2**63 - 1), st.sampled_from([(7,), (3, 11), (2, 3, 5), (0,), (4, 0)]))
def test_pure_and_reproducible(share, seed, shape):
    ids = torch.arange(10, 10 + torch.Size(shape).numel()).view(shape)
    before, keep = ids.clone(), torch.arange(shape[-1]) % 2 == 0
    state = torch.get_rng_state()
    for first, again in zip(both(ids, share, seed=seed, keep=keep), both(ids, share, seed=seed, keep=keep)):
        assert torch.equal(first, again) and torch.equal(ids, before) and first.shape == ids.shape
        assert torch.equal(first[..., keep], ids[..., keep])
        assert ((first == ids) | (first == MASK)).all()
    masked, where = span_masking(ids, share, MASK, seed=seed, mean_length=100)
    assert torch.equal(where, masked == MASK)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_word_dropout_is_as_often_as_told(share):
    dropped = (word_dropout(IDS, share, MASK, seed=1) == MASK).double()
    assert abs(dropped.mean() - share) < 4 * (share * (1 - share) / IDS.numel()) ** 0.5
    together = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(together - share**2) < 4 * (share**2 / IDS.numel()) ** 0.5, "each by itself"


@pytest.mark.parametrize(("share", "mean_length"), [(0.15, 3.0), (0.15, 1 / 0.85), (0.5, 3.0), (0.5, 2.0), (0.6, 10.0)])
def test_span_masking_is_as_often_and_as_long_as_told(share, mean_length):
    """The mean of n Markov states has the variance p (1 - p) / n (1 + r) / (1 - r), with r the correlation of neighbours."""
    masked = span_masking(IDS, share, MASK, seed=2, mean_length=mean_length)[1].double()
    correlation = 1 - 1 / mean_length / (1 - share)
    variance = share * (1 - share) * (1 + correlation) / (1 - correlation) / IDS.numel()
    assert abs(masked.mean() - share) < 4 * variance**0.5
    stops = (masked[:, :-1] * (1 - masked[:, 1:])).sum() / masked[:, :-1].sum()
    assert abs(stops - 1 / mean_length) < 4 * (1 / mean_length * (1 - 1 / mean_length) / (share * IDS.numel())) ** 0.5
    firsts = span_masking(IDS.view(-1, 2), share, MASK, seed=3, mean_length=mean_length)[1].double().mean(0)  # (2,)
    assert (abs(firsts - share) < 4 * (share * (1 - share) / (IDS.numel() / 2)) ** 0.5).all(), "also where a row begins"


def test_extremes():
    for masked in both(IDS, 0.0, seed=3):
        assert torch.equal(masked, IDS)
    assert (word_dropout(IDS, 1.0, MASK, seed=3) == MASK).all()
    assert not torch.equal(*(word_dropout(IDS, 0.5, MASK, seed=seed) for seed in (4, 5)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: word_dropout(IDS, 1.5, MASK, seed=0), ValueError, "probability must be from 0 to 1; got 1.5"),
        (lambda: span_masking(IDS, 1.0, MASK, seed=0), ValueError, "share must be at least 0 and below 1; got 1.0"),
        (
            lambda: span_masking(IDS, 0.5, MASK, seed=0, mean_length=1),
            ValueError,
            r"mean_length must be at least .* = 2 tokens",
        ),
        (lambda: word_dropout(IDS.float(), 0.5, MASK, seed=0), TypeError, "ids must be an integer tensor.*got torch.float32"),
        (lambda: word_dropout([1, 2], 0.5, MASK, seed=0), TypeError, "ids must be an integer tensor.*got list"),
        (lambda: word_dropout(IDS, 0.5, MASK, seed=0, keep=IDS), TypeError, "keep must be a bool tensor; got torch.int64"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
