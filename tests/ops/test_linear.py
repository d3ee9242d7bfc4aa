"""Test what is linear's own: the rule that chooses the product, derivatives, dtypes, torch's errors, bits."""

import pytest
import torch
import torch.nn.functional as F
from support.oracle import Oracle, noisy_results

import fastlm
from fastlm.ops.linear import cpu
from fastlm.testing import seeded_normal

FLOAT, HALF = torch.float32, torch.bfloat16


def n(seed: int, *shape: int, dtype=FLOAT) -> torch.Tensor:
    return seeded_normal(seed, shape, dtype)


@pytest.fixture
def kernel(widest_isa):
    """Require the C++ kernels."""


# ---- values and bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16])
def test_the_number_of_threads_changes_no_bit(rows, transposed, dtype, isa):
    weight = n(2, 700, 901, dtype=dtype).t() if transposed else n(2, 901, 700, dtype=dtype)
    input, bias, before = n(1, rows, 700, dtype=dtype), n(3, 901, dtype=dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fastlm.linear(input, weight, bias, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows", [7, 60])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows, isa):
    input, weight = n(1, rows, 333), n(2, 64, 333)
    whole = fastlm.linear(input, weight, backend="cpu")
    part = fastlm.linear(input[2 : rows - 2], weight, backend="cpu")
    assert torch.equal(whole[2 : rows - 2], part)


@pytest.mark.parametrize("rows", [2, 40])
def test_not_finite_numbers_stay_in_their_rows_and_columns(rows, isa):
    input, weight = n(1, rows, 50), n(2, 30, 50)
    input[1, 49], weight[29, 3] = float("nan"), float("inf")
    out = fastlm.linear(input, weight, backend="cpu")
    expected = F.linear(input, weight)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert out[0, :29].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16, 100])
def test_long_sums_are_added_up_in_parts(rows, transposed, isa):
    """Compare rounding with torch's: one sum over 8192 products has six times as much, which a deep model's layers add up."""
    input, weight = n(1, rows, 8192), n(2, 200, 8192)
    weight = weight.t().contiguous().t() if transposed else weight
    golden = input.double() @ weight.double().t()
    results = fastlm.linear(input, weight, backend="cpu"), F.linear(input, weight)
    ours, torchs = ((out - golden).square().mean().sqrt() for out in results)
    assert ours <= 4 * torchs


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_sums_are_float32(dtype, isa):
    """4096 products of 1 are 4096: in half precision the sum would stop at 256 or 2048."""
    for rows in (3, 20):
        out = fastlm.linear(torch.ones(rows, 4096, dtype=dtype), torch.ones(5, 4096, dtype=dtype), backend="cpu")
        assert (out == 4096).all()


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.requires_grad_()])
def test_outputs_are_written_whole(make, kernel, monkeypatch):
    monkeypatch.setattr(cpu.native, "empty", lambda like, shape: like.new_full(shape, float("nan")))
    for rows in (1, 4, 16, 33, 270):
        for weight in (n(2, 77, 45), n(2, 45, 77).t()):
            assert fastlm.linear(make(n(1, rows, 45)), weight, backend="cpu").isfinite().all()


# ---- derivatives ------------------------------------------------------------------------------------------------------------


def test_derivatives_of_every_order(kernel):
    """Compare third derivatives, through gradients that are calls of linear themselves, with torch's in float64."""

    def third(function, *leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = function(*leaves).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            loss = sum(grad.square().sum() for grad in grads)
        return grads

    leaves = n(1, 3, 6), n(2, 5, 6), n(3, 5)
    golden = third(F.linear, *(leaf.double() for leaf in leaves))
    for grad, expected in zip(third(lambda *t: fastlm.linear(*t, backend="cpu"), *leaves), golden, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


PRIMALS = n(1, 2, 3, 6), n(2, 5, 6), n(3, 5)
TANGENTS = n(4, 2, 3, 6), n(5, 5, 6), n(6, 5)


@pytest.mark.parametrize("moved", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_forward_mode(moved, kernel):
    def jvp(linear):
        def of_moved(*tensors):
            return linear(*(dict(zip(moved, tensors)).get(i, t) for i, t in enumerate(PRIMALS)))

        return torch.func.jvp(of_moved, tuple(PRIMALS[i] for i in moved), tuple(TANGENTS[i] for i in moved))

    torch.testing.assert_close(jvp(lambda *t: fastlm.linear(*t, backend="cpu")), jvp(F.linear))


def test_mixtures_with_forward_mode(kernel):
    def results(linear):
        def loss(*tensors):
            return linear(*tensors).pow(3).sum()

        grad = torch.func.grad(loss, argnums=(0, 1, 2))
        second = torch.func.grad(lambda *t: torch.func.jvp(loss, t, TANGENTS)[1], argnums=(0, 1, 2))(*PRIMALS)
        forward_over_forward = torch.func.jvp(lambda *t: torch.func.jvp(linear, t, TANGENTS)[1], PRIMALS, TANGENTS)
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, tangent) for t, tangent in zip(PRIMALS, TANGENTS)]
            dual = torch.autograd.forward_ad.unpack_dual(linear(*duals))
        return (
            torch.func.jvp(grad, PRIMALS, TANGENTS),
            second,
            forward_over_forward,
            tuple(dual),
            torch.func.jacfwd(linear)(*PRIMALS),
        )

    torch.testing.assert_close(results(lambda *t: fastlm.linear(*t, backend="cpu")), results(F.linear), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (None, 0, 0), (0, 0, None), (None, None, 0)])
def test_vmap(in_dims, kernel):
    shapes = ((4, 6), (5, 6), (5,))
    tensors = []
    for seed, (shape, dim) in enumerate(zip(shapes, in_dims)):
        tensor = n(seed, *shape) if dim is None else n(seed, 3, *shape).movedim(0, dim)
        tensors.append(tensor)
    expected = torch.vmap(F.linear, in_dims)(*tensors)
    torch.testing.assert_close(torch.vmap(lambda *t: fastlm.linear(*t, backend="cpu"), in_dims)(*tensors), expected)
    gradient = torch.func.grad(lambda x, w, b: fastlm.linear(x, w, b, backend="cpu").square().sum(), (0, 1, 2))
    plain = torch.func.grad(lambda x, w, b: F.linear(x, w, b).square().sum(), (0, 1, 2))
    torch.testing.assert_close(torch.vmap(gradient, in_dims)(*tensors), torch.vmap(plain, in_dims)(*tensors))


def test_what_needs_no_gradient_is_not_saved(kernel):
    weight = n(2, 5, 6).requires_grad_()
    out = fastlm.linear(n(1, 3, 6), weight, backend="cpu")
    saved = out.grad_fn.saved_tensors
    assert saved[1] is None and saved[0].shape == (3, 6)


# ---- which product runs -----------------------------------------------------------------------------------------------------


def test_explain_says_which_product_runs():
    assert fastlm.explain(fastlm.linear, n(1, 3, 6), n(2, 5, 6), backend="reference").backend == "reference"
    assert fastlm.explain(fastlm.linear, n(1, 3, 6).double(), n(2, 5, 6).double()).backend == "reference"
    if fastlm.backends()["cpu"].startswith("available"):
        assert fastlm.explain(fastlm.linear, n(1, 3, 6), n(2, 5, 6), backend="cpu").backend == "cpu"


@pytest.mark.parametrize("intel", [False, True])
def test_small_weights_are_worth_a_call_for_many_rows_where_mkl_is_slow(intel, kernel, monkeypatch):
    monkeypatch.setattr(cpu, "_IS_INTEL", intel)
    monkeypatch.setattr(cpu, "_RULE", {torch.float32: cpu._ANYWHERE})
    monkeypatch.setattr(cpu, "_FEWEST_WEIGHTS", 1 << 17)
    small, smaller, large = torch.empty(256, 256), torch.empty(255, 256), torch.empty(512, 256)
    assert cpu.gains(small) is not intel
    assert cpu.gains(large) and not cpu.gains(smaller)
    faster = [rows for rows in (1, 8, 63, 64, 1000) if cpu.is_faster(torch.float32, torch.empty(rows, 256), small)]
    assert faster == ([] if intel else [64, 1000])
    assert cpu.is_faster(torch.float32, torch.empty(1, 256), large)


def test_a_call_that_torch_runs_does_not_warn(recwarn):
    fastlm.linear(n(1, 300, 300).double(), n(2, 300, 300).double())
    assert not recwarn.list


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(fastlm.UnsupportedError, match="float64"):
        fastlm.linear(n(1, 3, 6).double(), n(2, 5, 6).double(), backend="cpu")


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_autocast_converts_as_torch_does(dtype, kernel):
    input, weight, bias = n(1, 2, 6).requires_grad_(), n(2, 5, 6).requires_grad_(), n(3, 5).requires_grad_()
    with torch.autocast("cpu", dtype):
        out, expected = fastlm.linear(input, weight, bias, backend="cpu"), F.linear(input, weight, bias)
        mixed = fastlm.linear(input.to(dtype), weight, bias, backend="cpu")
    assert out.dtype == mixed.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert input.grad.dtype == weight.grad.dtype == bias.grad.dtype == FLOAT


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (FLOAT, torch.float64), (torch.float64, HALF)])
def test_autocast_leaves_float64_alone(dtypes, kernel):
    input, weight = n(1, 2, 600, dtype=dtypes[0]), n(2, 1024, 600, dtype=dtypes[1])
    results = []
    with torch.autocast("cpu", HALF):
        for function in (F.linear, fastlm.linear):
            try:
                results.append(function(input, weight))
            except RuntimeError as error:
                results.append(str(error))
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert results[0].dtype == results[1].dtype == torch.float64 and torch.equal(*results)


# ---- bad input: torch's own errors ------------------------------------------------------------------------------------------

BAD = {
    "depths that differ": lambda: (n(1, 3, 6), n(2, 5, 7), None),
    "a bias of another size": lambda: (n(1, 3, 6), n(2, 5, 6), n(3, 4)),
    "integers and floats": lambda: (torch.ones(3, 6, dtype=torch.int64), n(2, 5, 6), None),
    "dtypes that differ": lambda: (n(1, 3, 6), n(2, 5, 6).double(), None),
    "a bias of another dtype": lambda: (n(1, 3, 6), n(2, 5, 6), n(3, 5).double()),
    "weights of 3 dimensions": lambda: (n(1, 3, 6), n(2, 2, 5, 6), n(3, 5)),
    "no tensor": lambda: (None, n(2, 5, 6), None),
    "a list for a bias": lambda: (n(1, 3, 600), n(2, 1024, 600), [1.0]),
    "a large product of depths that differ": lambda: (n(1, 3, 601), n(2, 1024, 600), None),
    "a scalar": lambda: (torch.tensor(1.0), n(2, 5, 6), None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_torch_raises(name):
    args = BAD[name]()
    with pytest.raises((RuntimeError, TypeError, IndexError, ValueError)) as expected:
        F.linear(*args)
    with pytest.raises(type(expected.value)) as raised:
        fastlm.linear(*args)
    assert str(raised.value).split("\n")[0] == str(expected.value).split("\n")[0]


def test_sparse_and_nested_tensors_are_torchs():
    weight = n(2, 900, 600)
    sparse = (weight * (weight > 1)).to_sparse_csr()
    torch.testing.assert_close(fastlm.linear(n(1, 3, 600), sparse), F.linear(n(1, 3, 600), sparse))
    nested = torch.nested.nested_tensor([n(1, 3, 600), n(2, 5, 600)])
    for ours, torchs in zip(fastlm.linear(nested, weight).unbind(), F.linear(nested, weight).unbind(), strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("weight", [lambda: n(2, 6), lambda: n(2, 6).requires_grad_()])
def test_a_vector_of_weights_is_torchs(weight):
    weight = weight()
    torch.testing.assert_close(fastlm.linear(n(1, 3, 6), weight), F.linear(n(1, 3, 6), weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((n(1, 3, 6), n(2, 5, 7), None), "weight"),
        ((n(1, 3, 6), n(2, 5, 6).half(), None), "weight"),
        ((n(1, 3, 6), n(2, 5, 6), n(3, 4)), "bias"),
        ((torch.ones(3, 6, dtype=torch.int64), n(2, 5, 6), None), "input"),
    ],
)
def test_the_op_itself_stays_inside_its_tensors(arguments, message, kernel):
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.fastlm.linear(*arguments)


# ---- torch's own checks, and compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(3,), (2, 20)])
def test_opcheck(rows, kernel):
    torch.library.opcheck(torch.ops.fastlm.linear.default, (n(1, *rows, 6), n(2, 5, 6), n(3, 5)))


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_torch_compile_makes_one_graph(backend, kernel):
    def loss(x, w, b):
        return fastlm.linear(x, w, b, backend=backend).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [t.bfloat16().requires_grad_() for t in (n(1, 4, 6), n(2, 5, 6), n(3, 5))]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_random_calls_are_as_good_as_torch(backend, kernel):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows, depth, out = (int(torch.randint(1, top, (), generator=generator)) for top in (70, 300, 300))
        dtype = (FLOAT, HALF, torch.float16)[int(torch.randint(3, (), generator=generator))]
        arguments = {"input": n(1, rows, depth, dtype=dtype), "weight": n(2, out, depth, dtype=dtype)}
        Oracle(fastlm.linear, arguments, ("input", "weight"), noisy_results("linear")).check(backend=backend)
