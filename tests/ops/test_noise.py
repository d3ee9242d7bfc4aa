"""Test that the generator's integers are Philox4x32-10, and its normals are normal and depend only on seed and position."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.philox_paper import philox_of_the_paper

import fastlm
from fastlm.ops.noise import normal
from fastlm.reference import noise as reference

SEEDS = st.integers(-(2**63), 2**64 - 1)
SIGMAS = 4.5  # A statistic of a fixed seed may be off by this many standard errors.

# ---- the integers -----------------------------------------------------------------------------------------------------------


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_paper_s_philox_gives_random123_s_published_answers(counter, key, answer):
    assert philox_of_the_paper(words(counter), words(key)) == words(answer)


def reference_philox(seed: int, block: int) -> list[int]:
    counter = (torch.tensor(word) for word in (block & reference.LOW, block >> 32, 0, 0))
    return [int(word) for word in reference.philox(torch.tensor(seed), *counter)]


def test_the_reference_gives_random123_s_answer_for_zeros():
    assert reference_philox(0, 0) == words("6627e8d5 e169c58d bc57ac4c 9b00dbd8")


def test_the_reference_gives_cpp26_s_ten_thousandth_value():
    """With its default seed, std::philox4x32 must give 1955073260 as its 10,000th value: the last word of block 2499."""
    assert reference_philox(20111115, 2499)[3] == 1955073260


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
def test_the_reference_is_the_paper_s_philox_for_any_seed_and_block(seed, block):
    key, counter = seed % 2**64, [block % 2**32, block >> 32, 0, 0]
    assert reference_philox(seed, block) == philox_of_the_paper(counter, [key % 2**32, key >> 32])


# ---- from integers to normals -----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**64 - 1), block=st.integers(0, 2**40))
def test_the_reference_s_normals_are_box_muller_of_the_words(seed, block):
    r0, r1, r2, r3 = philox_of_the_paper([block % 2**32, block >> 32, 0, 0], [seed % 2**32, seed >> 32])
    expected = []
    for radius_word, angle_word in ((r0, r1), (r2, r3)):
        u, turn = (float(torch.tensor(float(r)).add(0.5)) / 2**32 for r in (radius_word, angle_word))
        radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * turn
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    actual = normal((4,), seed=seed, position=4 * block, backend="reference")
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=2**-23, atol=1e-12)


# The roundings of a float32 Box-Muller add up, in ulps of the result: half of the logarithm's 1.5, the square root's 0.5, 1.5
# for the quarter turn's scaling and the polynomial, 0.5 for the last product, and 0.5 for the reference's own rounding.
BOX_MULLER_ULPS = 4


def ulps_apart(actual, expected):
    expected = expected.double()
    ulp = torch.ldexp(torch.ones_like(expected), torch.frexp(expected).exponent.clamp(min=-125) - 24)
    return (actual.double() - expected).abs() / ulp


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, -(2**63), 2**63 - 1, 2**64 - 2, 0x0123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 2**34 - 7, 2**40 + 3, 2**62 + 1])
def test_the_kernel_s_normals_are_those_of_the_reference(seed, position, isa):
    """Another word gives another normal, so that this test holds the kernel's integers to the reference's, too."""
    actual = normal((20_001,), seed=seed, position=position, backend="cpu")
    expected = normal((20_001,), seed=seed, position=position, backend="reference")
    assert ulps_apart(actual, expected).max() <= BOX_MULLER_ULPS


def test_the_kernel_s_normals_are_right_to_the_last_bit_mostly(isa):
    actual = normal((1 << 20,), seed=3, backend="cpu")
    expected = normal((1 << 20,), seed=3, backend="reference")
    assert ulps_apart(actual, expected).mean() <= 0.5


@pytest.mark.parametrize(("block", "word"), [(5145262111, 0), (3230741590, 2)])
def test_the_smallest_uniform_gives_the_longest_radius_and_no_infinity(block, word, isa):
    """In these blocks of seed 0, found by search, the word that gives the radius is 0, so that u = 2**-33."""
    assert reference_philox(0, block)[word] == 0
    pair = normal((2,), seed=0, position=4 * block + word, backend="cpu").double()
    assert pair.norm().item() == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)


@pytest.mark.parametrize(("block", "word"), [(38471471, 0), (24962728, 2), (35333089, 2)])
def test_the_largest_uniform_gives_zero_and_no_nan(block, word, isa):
    """In these blocks of seed 0, found by search, the word that gives the radius is so large that u rounds to 1."""
    assert reference_philox(0, block)[word] >= 2**32 - 128
    assert normal((2,), seed=0, position=4 * block + word, backend="cpu").tolist() == [0.0, 0.0]


# torch 2.14.1 gave these on a CPU: torch.func._random.normal(torch.tensor([seed, offset], dtype=torch.uint64), (8,)).
TORCH_S_NORMALS = {
    (7, 0): "0.000291600649 -0.304847002 1.788757205 1.067872524 0.376403838 -1.287011623 1.811504126 -0.491239965",
    (7, 5): "-0.758979857 1.260850787 -0.090816118 -0.465376854 -0.649623692 0.13237889 -1.668492317 1.0663867",
    (2**64 - 3, 2**40): "1.601195812 0.814952254 1.357465148 -1.063137531 -0.044530053 1.342164755 1.045697331 1.371248484",
    (2**62 + 1, 3): "-1.692173123 -2.262035608 -0.965296745 -0.184102923 -0.907655776 0.839013100 0.627326727 1.165647030",
}
# torch rounds the angle 2*pi*u to float32. Half an ulp below 8 is 2.4e-7, and its constant 2*pi is off by 1.7e-7. The longest
# radius, 6.77, multiplies these errors.
TORCH_S_ROUNDING = 3e-6


@pytest.mark.parametrize(("key", "values"), TORCH_S_NORMALS.items())
def test_the_normals_are_those_recorded_from_torch_s_stateless_generator(key, values, isa):
    expected = torch.tensor([float(value) for value in values.split()])
    actual = normal((8,), seed=key[0], position=4 * key[1], backend="cpu")
    torch.testing.assert_close(actual, expected, rtol=0, atol=TORCH_S_ROUNDING)


def torch_s_generator():
    """Return torch.func._random.normal, or None if this torch has none for CPUs. Then the recorded values stand for it."""
    try:
        from torch.func._random import normal as torch_s_normal

        torch_s_normal(torch.tensor([0, 0], dtype=torch.uint64), (1,))
    except (ImportError, NotImplementedError):
        return None
    return torch_s_normal


@pytest.mark.skipif(torch_s_generator() is None, reason="this torch has no stateless generator on CPUs (2.14 has)")
@pytest.mark.parametrize("key", [(11, 0), (2**63 + 5, 1234)])
def test_a_million_normals_are_those_of_torch_s_stateless_generator(key, widest_isa):
    expected = torch_s_generator()(torch.tensor(key, dtype=torch.uint64), (1 << 20,))
    actual = normal((1 << 20,), seed=key[0], position=4 * key[1], backend="cpu")
    torch.testing.assert_close(actual, expected, rtol=0, atol=TORCH_S_ROUNDING)


# ---- the distribution -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    """Draw four million normals with the kernel, as float64."""
    return normal((1 << 22,), seed=2024, backend="cpu").double()


@pytest.mark.parametrize(
    ("power", "moment", "variance"),
    [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)],  # The variance of z^p is E z^2p - (E z^p)^2.
)
def test_the_moments_are_those_of_a_normal(sample, power, moment, variance):
    assert abs(sample.pow(power).mean().item() - moment) <= SIGMAS * math.sqrt(variance / sample.numel())


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0, 5.0])
def test_as_many_lie_in_the_tails_as_should(sample, limit):
    for tail, count in (("right", (sample > limit).sum().item()), ("left", (sample < -limit).sum().item())):
        expected = sample.numel() * stats.norm.sf(limit)
        assert 1e-4 < stats.poisson.cdf(count, expected) < 1 - 1e-4, f"{count} in the {tail} tail, not {expected:.1f}"


@pytest.mark.parametrize("part", range(4))
def test_kolmogorov_and_smirnov_find_nothing(sample, part):
    assert stats.kstest(sample[part::4].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16])
def test_neighbours_are_uncorrelated(sample, lag):
    left, right = sample[:-lag], sample[lag:]
    limit = SIGMAS / math.sqrt(left.numel())
    assert abs((left * right).mean().item()) <= limit
    assert abs(((left**2 - 1) * (right**2 - 1) / 2).mean().item()) <= limit


def test_the_two_of_a_pair_are_independent(sample):
    cosine, sine = sample.view(-1, 2).unbind(1)
    limit = SIGMAS / math.sqrt(cosine.numel())
    assert abs((cosine * sine).mean().item()) <= limit
    assert abs(((cosine**2 - 1) * (sine**2 - 1) / 2).mean().item()) <= limit
    angles = torch.atan2(sine, cosine) / (2 * math.pi) + 0.5
    assert stats.kstest(angles.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("other", [2025, 2024 + 2**32, -2024])
def test_streams_of_different_seeds_are_uncorrelated(sample, other):
    stranger = normal((1 << 22,), seed=other, backend="cpu").double()
    assert abs((sample * stranger).mean().item()) <= SIGMAS / math.sqrt(sample.numel())


# ---- the same bits for every caller -----------------------------------------------------------------------------------------


@given(seed=SEEDS, position=st.integers(0, 2**40), start=st.integers(0, 3000), count=st.integers(0, 3000))
def test_any_piece_of_a_stream_has_the_bits_of_the_whole(isa, seed, position, start, count):
    whole = normal((6000,), seed=seed, position=position, backend="cpu")
    piece = normal((count,), seed=seed, position=position + start, backend="cpu")
    assert torch.equal(piece, whole[start : start + count])


@given(seed=st.integers(2**63, 2**64 - 1))
def test_an_unsigned_seed_is_its_negative_twin(seed):
    assert torch.equal(normal((9,), seed=seed, backend="cpu"), normal((9,), seed=seed - 2**64, backend="cpu"))


def latent_noise(shape, seed, **options):
    """Return the noise that the op draws, which is z of the standard normal."""
    zeros = torch.zeros(shape)
    return fastlm.reparameterize_with_kl(zeros, zeros, seed=seed, backend="cpu", **options)[0]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 9), (3, 4, 1030), (40_007,)])
def test_the_op_draws_the_stream_in_row_major_order(shape, isa):
    z = latent_noise(shape, -12, event_dims=0)
    assert torch.equal(z, normal(shape, seed=-12, backend="cpu"))


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 9), (3, 4, 103)])
def test_sample_k_starts_at_k_times_the_number_of_elements(shape, isa):
    z = latent_noise(shape, 5, num_samples=4)
    for k in range(4):
        assert torch.equal(z[k], normal(shape, seed=5, position=k * math.prod(shape), backend="cpu"))


@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (3, 5, 101)])
def test_each_example_draws_from_its_own_stream(shape, isa):
    seeds = torch.tensor([4, -9, 2**62])
    z = latent_noise(shape, seeds, num_samples=2)
    for k in range(2):
        for example in range(3):
            position = k * math.prod(shape[1:])
            expected = normal(shape[1:], seed=seeds[example].item(), position=position, backend="cpu")
            assert torch.equal(z[k, example], expected)
