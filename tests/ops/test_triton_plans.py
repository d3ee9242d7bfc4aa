"""Test that a plan is made once for calls that are alike, that no other call gets it, and that it holds no tensor."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fastlm.backend import triton as triton_kernels
from fastlm.testing import seeded_normal

plans = pytest.importorskip("fastlm.kernels.common.plans", reason="the Triton kernels need Triton")
launch = pytest.importorskip("fastlm.kernels.common.launch", reason="the Triton kernels need Triton")

# ---- a planner of our own ---------------------------------------------------------------------------------------------------


class Binary(launch.CompiledKernel):
    """A binary that notes how it is started."""

    module = None

    def __init__(self, started: list):
        self.started = started

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append(("directly", *arguments))


class Kernel:
    """A kernel that notes how it is started."""

    __name__ = "kernel"
    arg_names = ("pair", "scratch", "size")

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        def start(**arguments):
            self.started.append(("by Triton", *(arguments[name] for name in self.arg_names)))
            return Binary(self.started)

        return start


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def planner(kernel):
    """Return a planner of a pair of tensors and an option, with a list of the sizes that it was planned for."""

    @plans.planned_once
    def plan(pair, size):
        plan.sizes.append(size)
        arguments = {"scratch": plans.Scratch(3, dtype=torch.int32), "size": size, "pair": pair}
        return [launch.make_launch(kernel, 1, arguments)]

    plan.sizes = []
    return plan


def pair_of(start: int = 0, dtype=torch.float32, shape=(4, 8), strides=(8, 1), device="cpu") -> tuple[Tensor, Tensor]:
    """Return two tensors that start at an element of memory of their own."""
    return tuple(torch.zeros(1000, dtype=dtype, device=device)[start:].as_strided(shape, strides, start) for _ in range(2))


def test_calls_that_are_alike_are_planned_once_and_each_starts_on_its_own_tensors(planner, kernel):
    first, second = pair_of(), pair_of(start=4)
    launch.run(planner(first, 7))
    launch.run(planner(second, 7))
    assert planner.sizes == [7]
    (how, pair, scratch, size), (how_again, pair_again, scratch_again, size_again) = kernel.started
    assert (how, how_again, size, size_again) == ("by Triton", "directly", 7, 7)
    assert all(a is b for a, b in zip((*pair, *pair_again), (*first, *second), strict=True))
    assert scratch is not scratch_again and scratch.shape == scratch_again.shape == (3,) and scratch.dtype == torch.int32


def test_on_amd_views_of_large_memory_have_plans_and_binaries_of_their_own(planner, kernel, monkeypatch):
    """AMD's compiler asks for the memory behind a tensor, and so has the last word on what is large."""
    monkeypatch.setattr(plans, "ON_AMD", True)
    compiler = pytest.importorskip("triton.backends.amd.compiler")
    for count in (1000, (1 << 29) - 1, 1 << 29):  # Of 4 bytes each.
        pair = tuple(torch.empty(count, device="meta")[:32].view(4, 8) for _ in range(2))
        launch.run(planner(pair, 7))
        launch.run(planner(pair, 7))
        is_large = not compiler.HIPBackend.is_within_2gb(pair[0])
        assert is_large == (count == 1 << 29) == (len(planner.sizes) == 2)
    assert [how for how, *_ in kernel.started].count("by Triton") == 2


@pytest.mark.parametrize(
    "other",
    [{"start": 1}, {"dtype": torch.int32}, {"shape": (4, 7)}, {"strides": (16, 1)}, {"device": "meta"}],
    ids=["alignment", "dtype", "shape", "strides", "device"],
)
def test_other_layouts_have_plans_and_binaries_of_their_own(planner, kernel, other):
    for pair in (pair_of(), pair_of(**other), pair_of(), pair_of(**other)):
        launch.run(planner(pair, 7))
    assert planner.sizes == [7, 7] and [how for how, *_ in kernel.started] == ["by Triton"] * 2 + ["directly"] * 2


def test_other_options_have_plans_of_their_own(planner, kernel):
    for size in (1, 2, 1, 2):
        launch.run(planner(pair_of(), size))
    assert planner.sizes == [1, 2] and [size for *_, size in kernel.started] == [1, 2, 1, 2]


def test_one_tensor_in_two_places_is_not_taken_for_two(planner, kernel):
    one, pair = pair_of()[0], pair_of()
    launch.run(planner((one, one), 7))
    launch.run(planner(pair, 7))
    (_, given, *_), (_, given_again, *_) = kernel.started
    assert given[0] is given[1] is one and given_again[0] is pair[0] and given_again[1] is pair[1]


def test_a_plan_keeps_no_tensor_of_a_call(planner):
    pair = pair_of()
    gone = [weakref.ref(tensor) for tensor in pair]
    planner(pair, 7)
    del pair
    gc.collect()
    assert all(each() is None for each in gone)


def test_plans_are_bounded(planner):
    pair = pair_of()
    most = plans._plan.cache_info().maxsize
    for size in range(most + 10):
        planner(pair, size)
    assert plans._plan.cache_info().currsize == most
    planner(pair, most)
    assert len(planner.sizes) == most + 10
    planner(pair, 0)
    assert len(planner.sizes) == most + 11, "the first plan was not dropped"
    plans.forget_plans()


def test_each_call_converts_its_own_tensors_where_its_layout_needs_it(kernel):
    @plans.planned_once
    def plan(pair):
        double = plans.converted(pair[0], Tensor.double)
        own = plans.converted(plans.converted(double, torch.neg), torch.abs), plans.converted(pair[1], Tensor.float)
        return [launch.make_launch(kernel, 1, {"pair": own, "scratch": double, "size": plans.converted(None, Tensor.double)})]

    for value in (2.0, 3.0):
        pair = pair_of()
        pair[0].fill_(value)
        launch.run(plan(pair))
        _, own, double, nothing = kernel.started[-1]
        assert own[1] is pair[1] and nothing is None
        assert double.dtype == own[0].dtype == torch.float64 and (double == value).all() and (own[0] == value).all()


def test_a_planner_may_not_convert_tensors_otherwise(kernel):
    @plans.planned_once
    def plan(pair):
        return [launch.make_launch(kernel, 1, {"pair": (pair[0].double(), pair[1]), "scratch": None, "size": 1})]

    with pytest.raises(AttributeError, match="converted_from"):
        plan(pair_of())


def test_a_launch_has_all_arguments_of_its_kernel_and_no_others(kernel):
    for names in (("pair", "scratch"), ("pair", "scratch", "size", "more")):
        with pytest.raises(TypeError, match="kernel takes"):
            launch.make_launch(kernel, 1, dict.fromkeys(names))


# ---- attention's ------------------------------------------------------------------------------------------------------------


def launches_of(arch: str | None, tensors: dict, options: dict) -> list:
    """Return the launches of a forward and its backward, and of a step of decoding."""
    kernels = triton_kernels.attention()
    query, key = tensors["query"], tensors["key"]
    call = kernels.Call(**tensors, **options, arch=arch)
    lse, statistics = query.new_empty(query.shape[:3], dtype=torch.float32), query.new_empty((*query.shape[:3], 2)).float()
    launches = kernels.plan_forward(call, query, lse, statistics)
    launches += kernels.plan_backward(call, query, statistics, query, None, (query, key, key, None), lse)
    lengths = torch.zeros(len(query), dtype=torch.int32, device=query.device)
    step = kernels.KVCacheCall(query[:, :, :1], key, tensors["value"], lengths, key[:, :, :1], key[:, :, :1], arch=arch)
    return launches + kernels.plan_kvcache(step, query[:, :, :1], lse[:, :, :1])


def readable(value, inputs: dict[int, str]) -> object:
    """Return what can be compared of an argument: of tensors their layout, and the name of the input at their address."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), inputs.get(value.data_ptr())
    if hasattr(value, "block_shape"):
        return readable(value.base, inputs), value.shape, value.strides, value.block_shape
    return tuple(readable(each, inputs) for each in value) if isinstance(value, tuple) else value


def read(arch: str, tensors: dict, options: dict) -> list:
    """Return what can be compared of the launches of a call."""
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    return [
        (each.kernel.__name__, each.grid, readable(tuple(each.arguments.values()), names), each.options)
        for each in launches_of(arch, tensors, options)
    ]


def inputs(**changed) -> dict:
    """Return query, key and value of half precision."""
    made = {name: seeded_normal(i, (2, 4, 200, 64), torch.float16) for i, name in enumerate(("query", "key", "value"))}
    return made | changed


def calls() -> list[tuple]:
    """Return calls that differ in one thing each."""
    plain, mask = inputs(), torch.zeros(200, 200, dtype=torch.bool)
    other = seeded_normal(5, (2, 200, 4, 64), torch.float16).transpose(1, 2)
    misaligned = torch.zeros(2 * 4 * 200 * 64 + 1, dtype=torch.float16)[1:].view(2, 4, 200, 64)
    slopes = torch.ones(4)
    tensors = [plain, inputs(key=other), inputs(value=misaligned), inputs(mask=mask), inputs(alibi_slopes=slopes)]
    options = [{"right": 0}, {"left": 3, "right": 0}, {"scale": 2.0}, {"softcap": 5.0}]
    archs = ["sm_80", "sm_120", "gfx942"]
    return (
        [("sm_90", each, {}) for each in tensors]
        + [("sm_90", plain, each) for each in options]
        + [(a, plain, {}) for a in archs]
    )


def test_attention_has_the_plans_that_it_would_have_without_others_before():
    """Plan calls in turn, twice, beside fresh plans of each."""
    fresh = []
    for call in (own := calls()):
        triton_kernels.attention().forget_plans()
        fresh.append(read(*call))
    triton_kernels.attention().forget_plans()
    for _ in range(2):
        for call, expected in zip(own, fresh):
            assert read(*call) == expected
    assert len({str(each) for each in fresh}) == len(fresh)


# ---- the latent's -----------------------------------------------------------------------------------------------------------


def latent_calls() -> list[tuple]:
    """Return (mu, prior_mu, options) of calls that differ in one thing each."""
    kernels = triton_kernels.latent()
    mu, other = torch.zeros(6, 700), torch.zeros(700, 6).t()
    numbers, seed, seeds = (0.0, -9.0, 9.0, 1.0), torch.zeros((), dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    plain = kernels.Options(seed, 1, (0, 0, 0), numbers, 32)
    changes = [
        {"seed": seeds}, {"event_dims": 2}, {"samples": (1, 0, 0)}, {"samples": (1, 4, 0)}, {"numbers": (0.5, *numbers[1:])},
        {"lanes": 64},
    ]  # fmt: skip
    changed = [(mu, None, plain._replace(**change)) for change in changes]
    return [(mu, None, plain), (other, None, plain), (mu, mu, plain), (mu[:, :699], None, plain), *changed]


def read_latent(mu: Tensor, prior_mu: Tensor | None, options) -> list:
    """Return what can be compared of the launches of a forward and its backward."""
    kernels, tensors = triton_kernels.latent(), (mu, mu, prior_mu, None)
    z, kl = torch.zeros((1, *mu.shape) if options.samples[0] else mu.shape), torch.zeros(mu.shape[: 2 - options.event_dims])
    launches = kernels.plan_forward(tensors, z, kl, options)
    launches += kernels.plan_backward(tensors, z, kl, (mu, mu, prior_mu, None), options)
    names = {mu.data_ptr(): "mu", options.seed.data_ptr(): "seed"}
    return [(each.grid, readable(tuple(each.arguments.values()), names), each.options) for each in launches]


def test_the_latent_has_the_plans_that_it_would_have_without_others_before():
    fresh = []
    for call in (own := latent_calls()):
        plans.forget_plans()
        fresh.append(read_latent(*call))
    plans.forget_plans()
    for _ in range(2):
        for call, expected in zip(own, fresh):
            assert read_latent(*call) == expected
    assert len({str(each) for each in fresh}) == len(fresh)


# ---- settings ---------------------------------------------------------------------------------------------------------------


def test_settings_of_tiles_hold_from_the_next_plan_on(monkeypatch):
    kernels = triton_kernels.attention()

    def tiles() -> set[int]:
        kernels.forget_plans()
        return {each.arguments["BLOCK_K"] for each in launches_of("sm_90", inputs(), {}) if "BLOCK_K" in each.arguments}

    before = tiles()
    monkeypatch.setattr(kernels.tiles, "SAFE", True)
    assert tiles() == {16} != before
    monkeypatch.undo()
    assert tiles() == before
