"""Test the statistics that attention returns from its pass: values, gradients, and how they go along with the rest of torch."""

import math
from functools import cache

import pytest
import torch
from cases import SPECS
from support.oracle import Oracle, run
from support.processes import printed
from support.stats import ALL_STATS, with_stats
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.testing import seeded_normal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("query", "key", "value", "mask", "sinks")
CASES = [(name, case) for name in ("attention", "varlen_attention") for case in SPECS[name].cases]


def qkv(q_len=37, k_len=45, batch=1, heads=2, dim=16, dtype=torch.float32) -> dict:
    shapes = {"query": q_len, "key": k_len, "value": k_len}
    return {name: seeded_normal(i, (batch, heads, rows, dim), dtype) for i, (name, rows) in enumerate(shapes.items())}


def stats_of(*names, **call) -> fastlm.AttentionStats:
    return fastlm.attention(**call, return_stats=names or ALL_STATS)[-1]


# ---- values and gradients ---------------------------------------------------------------------------------------------------


@cache
def oracle(name, case, dtype) -> Oracle:
    spec = SPECS[name]
    return Oracle(with_stats(spec.function), spec.cases[case](dtype), spec.differentiable, set())


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_as_good_as_plain_pytorch(name, case, dtype, isa):
    oracle(name, case, dtype).check(backend="cpu")


@pytest.mark.parametrize("names", [("entropy",), ("max_logit",), ("key_mass",), ("entropy", "key_mass")], ids=str)
@pytest.mark.parametrize("case", ["everything", "grouped", "sinks alone"])
def test_some_of_them_are_as_good_as_plain_pytorch(names, case, isa):
    call = SPECS["attention"].cases[case](torch.float32)
    Oracle(with_stats(fastlm.attention, names), call, DIFFERENTIABLE, set()).check(backend="cpu")


@pytest.mark.parametrize("case", ["causal", "everything", "sinks alone"])
def test_the_reference_s_derivatives_are_those_of_finite_differences(case):
    call = SPECS["attention"].cases[case](torch.float64)
    leaves = {name: call[name].requires_grad_() for name in DIFFERENTIABLE if call.get(name) is not None}
    call["return_lse"] = False

    def function(*tensors):
        stats = stats_of(**{**call, **dict(zip(leaves, tensors)), "dropout_p": 0.0, "seed": None})
        return tuple(tensor.masked_fill(tensor == -math.inf, 0.0) for tensor in stats)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_they_are_what_the_matrix_says(backend, isa):
    call = qkv(batch=2, heads=3)
    stats = stats_of(**call, causal=True, scale=0.9, backend=backend)
    scores = 0.9 * call["query"].double() @ call["key"].double().mT
    scores = scores.masked_fill(torch.ones(37, 45, dtype=torch.bool).triu(1 + 45 - 37), -math.inf)
    weights = torch.softmax(scores, dim=3)
    torch.testing.assert_close(stats.entropy.double(), torch.special.entr(weights).sum(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.max_logit.double(), scores.amax(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.key_mass.double(), weights.sum(2), rtol=0, atol=1e-5)


def test_the_mass_of_thousands_of_queries_keeps_its_digits(isa):
    """Sum so many rows that a plain sum along them would lose two digits."""
    call = qkv(q_len=20_000, k_len=70, heads=1, dim=8)
    Oracle(with_stats(fastlm.attention, ("key_mass",)), call, (), set()).check(backend="cpu")


def test_a_few_queries_of_many_keys_are_split_and_joined(isa):
    call = {**qkv(q_len=2, k_len=2000, heads=8), "sinks": seeded_normal(9, (8,), torch.float32)}
    Oracle(with_stats(fastlm.attention), {**call, "return_lse": True}, DIFFERENTIABLE, set()).check(backend="cpu")


@pytest.mark.parametrize("case", SPECS["attention"].cases)
def test_out_and_its_gradients_have_the_same_bits_with_and_without(case, widest_isa):
    call = SPECS["attention"].cases[case](torch.float32)
    plain = run(fastlm.attention, call, DIFFERENTIABLE, backend="cpu")

    def ignored(**arguments):
        return fastlm.attention(**arguments, return_stats=ALL_STATS)[:2]

    for what, result in run(ignored, call, DIFFERENTIABLE, backend="cpu").items():
        assert torch.equal(result, plain[what]), what


# ---- known answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])], ids=["no sinks", "sinks"])
def test_a_query_without_keys_has_no_entropy_and_no_mass(backend, sinks, isa):
    call = qkv(q_len=45, k_len=30)  # The first 15 queries see no key.
    leaves = [tensor.requires_grad_() for tensor in call.values()]
    stats = stats_of(**call, causal=True, sinks=sinks, backend=backend)
    assert not stats.entropy[:, :, :15].any() and (stats.max_logit[:, :, :15] == -math.inf).all()
    if sinks is None:
        torch.testing.assert_close(stats.key_mass.sum(2), torch.full((1, 2), 30.0))
    gradients = torch.autograd.grad([t[t.isfinite()].sum() for t in stats], leaves[:2])
    assert all(gradient.isfinite().all() for gradient in gradients) and not gradients[0][:, :, :15].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_weights_have_the_largest_entropy_and_one_key_has_none(backend, isa):
    call = {**qkv(), "query": torch.zeros(1, 2, 37, 16)}
    stats = stats_of(**call, backend=backend)
    torch.testing.assert_close(stats.entropy, torch.full((1, 2, 37), math.log(45)))
    torch.testing.assert_close(stats.key_mass, torch.full((1, 2, 45), 37 / 45))
    assert not stats.max_logit.any()
    alone = stats_of(**qkv(), window=(0, 0), backend=backend)
    assert alone.entropy.max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gradient_of_the_largest_logit_goes_to_the_first_of_equal_keys(backend, isa):
    """Keys 20, 21 and 100 are equal, and the best for every query."""
    query, key = torch.ones(1, 1, 5, 4), torch.full((1, 1, 130, 4), -1.0)
    key[:, :, [20, 21, 100]] = 1.0
    key.requires_grad_()
    stats = stats_of("max_logit", query=query, key=key, value=key.detach(), scale=1.0, backend=backend)
    (gradient,) = torch.autograd.grad(stats.max_logit.sum(), key)
    assert gradient[0, 0, 20].tolist() == [5.0] * 4 and gradient.count_nonzero() == 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("places", [(3,), (3, 90), (90, 3), (90, 91)], ids=str)
def test_nan_and_infinity_are_the_largest_as_in_torch(places, backend, isa):
    """Scores are NaN at the first of the places, and +inf at the second."""
    call = qkv(q_len=50, k_len=150)
    mask = torch.zeros(50, 150)
    mask[7, places[0]] = math.nan
    mask[[7, 9], places[-1]] += math.inf
    mask[8, 12] = math.inf
    scores = 0.25 * call["query"] @ call["key"].mT + mask
    stats = stats_of("max_logit", **call, mask=mask, backend=backend)
    assert torch.equal(stats.max_logit.isnan(), scores.amax(3).isnan())
    assert torch.equal(stats.max_logit == math.inf, scores.amax(3) == math.inf)


# ---- the same bits, and little memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"dropout_p": 0.2, "seed": 3}], ids=["causal", "dropout"])
def test_any_number_of_threads_gives_the_same_bits(dtype, options, threads, widest_isa):
    call = {**qkv(q_len=300, k_len=700, heads=4, dtype=dtype), "return_lse": True, **options}
    threads(1)
    expected = run(with_stats(fastlm.attention), call, DIFFERENTIABLE, backend="cpu")
    for count in (2, 3, 7):
        threads(count)
        for what, result in run(with_stats(fastlm.attention), call, DIFFERENTIABLE, backend="cpu").items():
            assert torch.equal(result, expected[what]), what


def test_an_example_is_the_same_in_any_batch(threads, widest_isa):
    threads(2)
    call = qkv(q_len=70, k_len=300, batch=3, heads=4)
    whole = stats_of(**call)
    for b in range(3):
        alone = stats_of(**{name: tensor[b : b + 1] for name, tensor in call.items()})
        for tensor, expected in zip(alone, whole):
            assert torch.equal(tensor, expected[b : b + 1])


MEASURED = """
import resource, torch, fastlm
q, k, v = (torch.randn(1, 2, 8192, 32, requires_grad=True) for _ in range(3))
def step():
    out, stats = fastlm.attention(q, k, v, causal=True, return_stats=("entropy", "max_logit", "key_mass"))
    (out.sum() + sum(tensor.sum() for tensor in stats)).backward()
fastlm.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], return_stats=("entropy",))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_memory_is_linear_in_the_length(widest_isa):
    """Measure two heads, whose weights would take 512 MiB."""
    assert int(printed(MEASURED)) < 64


# ---- with the rest of torch -------------------------------------------------------------------------------------------------

EMPTY = (None,) * 7  # mask, sinks, slopes, seed, cu_seqlens_q, cu_seqlens_k, places
CU = torch.tensor([0, 4, 37], dtype=torch.int32), torch.tensor([0, 11, 45], dtype=torch.int32)
OP_CALLS = {
    "plain": (*qkv().values(), *EMPTY, None, None, 0.3, 0.0, 0.0),
    "all": (
        *qkv(dtype=torch.bfloat16).values(), torch.zeros(37, 45), torch.zeros(2), torch.tensor([0.1, 0.2]), torch.tensor([4]),
        None, None, torch.tensor([[5, 0, 4, 2]]), 30, 5, 0.3, 2.0, 0.4,
    ),
    "packed": (*qkv().values(), None, None, None, None, *CU, None, None, 0, 0.3, 0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("call", OP_CALLS.values(), ids=OP_CALLS)
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)], ids=str)
def test_the_ops_pass_opcheck(call, flags, widest_isa):
    torch.library.opcheck(torch.ops.fastlm.attention_stats.default, (*flags, *call))
    out, lse, statistics, *row_stats, max_key, mass = torch.ops.fastlm.attention_stats(*flags, *call)
    of_rows = [torch.ones_like(tensor) if flags[0] else None for tensor in row_stats]
    of_mass = torch.ones_like(mass) if flags[1] else None
    saved = (torch.ones_like(out), None, out, lse, statistics, *of_rows, of_mass, row_stats[0], max_key)
    needed = (call[3] is not None, call[4] is not None)
    torch.library.opcheck(torch.ops.fastlm.attention_stats_backward.default, (*saved, *needed, *call))


def loss(query, key, value, names=ALL_STATS):
    out, stats = fastlm.attention(query, key, value, causal=True, return_stats=names)
    return out.square().sum() + sum(tensor.square().sum() for tensor in stats if tensor is not None)


def gradients_of(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


@pytest.mark.slow_sanitized
@pytest.mark.parametrize("names", [ALL_STATS, ("key_mass",), ("entropy",)], ids=str)
def test_a_compiled_step_gives_the_bits_of_eager_mode(names, widest_isa):
    torch._dynamo.reset()
    tensors = qkv(q_len=45).values()

    def step(*tensors):
        out, stats = fastlm.attention(*tensors, causal=True, return_stats=names)
        return out, *(tensor for tensor in stats if tensor is not None)

    def results_of(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = function(*leaves)
        gradients = [seeded_normal(i, t.shape, t.dtype) for i, t in enumerate(outputs)]
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, value in zip(results_of(compiled), results_of(step), strict=True):
        assert torch.equal(result, value)


def test_transforms_of_torch_func(widest_isa):
    tensors = qkv(q_len=45, batch=3).values()
    whole = gradients_of(loss, *tensors)
    stacked = [tensor.unsqueeze(1) for tensor in tensors]  # Each example is a call of its own.
    by_example = vmap(grad(loss, argnums=(0, 1, 2)))(*stacked)
    for result, expected in zip(by_example, whole, strict=True):
        torch.testing.assert_close(result.squeeze(1), expected, rtol=0, atol=0)


def test_checkpoint_and_autocast(widest_isa):
    tensors = qkv(q_len=45).values()
    expected = gradients_of(loss, *tensors)
    for result, value in zip(gradients_of(lambda *t: checkpoint(loss, *t, use_reentrant=False), *tensors), expected):
        assert torch.equal(result, value)
    with torch.autocast("cpu", torch.bfloat16):
        out, stats = fastlm.attention(*tensors, return_stats=ALL_STATS)
    assert out.dtype == torch.bfloat16 and all(tensor.dtype == torch.float32 for tensor in stats)


def test_derivatives_of_second_order_are_the_reference_s(widest_isa):
    leaves = [tensor.requires_grad_() for tensor in qkv(q_len=45).values()]
    (first,) = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(first.square().sum(), leaves[0])


def test_forward_mode_is_the_reference_s(widest_isa):
    call = qkv(q_len=45)
    query = call.pop("query")

    def entropy(backend):
        return jvp(lambda q: stats_of("entropy", query=q, **call, backend=backend).entropy, (query,), (torch.ones_like(query),))

    for result, expected in zip(entropy(None), entropy("reference")):
        assert torch.equal(result, expected)
    with pytest.raises(fastlm.UnsupportedError, match="forward-mode"):
        entropy("cpu")


def test_explain_names_the_backend(widest_isa):
    assert fastlm.explain(fastlm.attention, **qkv(), return_stats=("entropy",)).backend == "cpu"


# ---- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["entropy", None, 3, True], ids=str)
def test_names_that_are_no_tuple_are_refused(names):
    with pytest.raises(TypeError, match="return_stats must be a tuple of names"):
        fastlm.attention(**qkv(), return_stats=names)


@pytest.mark.parametrize("name", ["mass", "", 3], ids=str)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="return_stats must hold names of 'entropy', 'max_logit', 'key_mass'; got"):
        fastlm.attention(**qkv(), return_stats=["entropy", name])


def test_no_names_return_no_statistics():
    assert isinstance(fastlm.attention(**qkv(), return_stats=[]), torch.Tensor)
    out, lse = fastlm.attention(**qkv(), return_lse=True, return_stats=())
    assert out.shape == (1, 2, 37, 16) and lse.shape == (1, 2, 37)
