"""The Triton kernels of LCW against the float64 reference, through the public functions and the ops.

Without a GPU they run in Triton's interpreter (see support/triton_process.py), which is slow: every shape is as small
as its test allows.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from support.numerics import assert_as_exact_as_eager, hostile_layouts
from support.pairwise import name_of, pairwise
from support.triton_process import import_kernels, multiply_bfloat16

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops import lcw_linear as op
from lcw_ops.ops import library

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
kernels = import_kernels("lcw_linear", op.NAME)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _on_triton():
    with lcw_ops.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _interpreted_bfloat16_products(monkeypatch):
    multiply_bfloat16(monkeypatch)


@pytest.fixture
def split(monkeypatch):
    """Choose launches as for a GPU with 16 multiprocessors, where several programs share the columns."""
    monkeypatch.setattr(kernels, "device_facts", lambda device: kernels.Device(16, 227 * 1024, False))


def overload(name):
    return library.get_overload(name, "triton")


def normal(*shape, dtype=torch.float32, device, mean=0.0):
    return (torch.randn(shape, dtype=torch.float64, device=device) + mean).to(dtype)


def eager_weight(weight, basis):
    """The weight in plain torch. Every step is computed in the weight's dtype."""
    if not basis:
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)
    total, s = weight.sum(1, keepdim=True), math.sqrt(weight.shape[1] + 1)
    return torch.cat([weight - total / (s * (s + 1)), -total / s], 1)


def eager_adjoint(gradient, basis):
    if not basis:
        return eager_weight(gradient, False)
    inner, s = gradient[:, :-1], math.sqrt(gradient.shape[1])
    return inner - (inner.sum(1, keepdim=True) / (s * (s + 1)) + gradient[:, -1:] / s)


def dense_basis(columns, basis):
    """The constraint as a matrix (columns, features) in long double, which judges float64 kernels by the same rule."""
    m = columns + basis
    if not basis:
        return np.eye(m, dtype=np.longdouble) - np.longdouble(1) / m
    s = np.sqrt(np.longdouble(m))
    matrix = np.eye(m - 1, m, dtype=np.longdouble) - 1 / (s * (s + 1))
    matrix[:, -1] = -1 / s
    return matrix


def wide(tensor):
    return tensor.detach().double().cpu().numpy().astype(np.longdouble)


def rounded(array, device):
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).to(device)


def assert_weight_matches(shape, basis, dtype, device, mean=0.0, draws=4):
    """Judge the constrained weight and its adjoint over several draws: on few numbers eager may be exact by chance."""
    judged = {"weight": [], "adjoint": []}
    matrix = dense_basis(math.prod(shape[1:]), basis)
    for _ in range(draws):
        weight = normal(*shape, dtype=dtype, device=device, mean=mean)
        exact = rounded(wide(weight.flatten(1)) @ matrix, device)
        judged["weight"].append((F.lcw_weight(weight, basis), eager_weight(weight, basis), exact))
        gradient = normal(*exact.shape, dtype=dtype, device=device, mean=mean)
        exact = rounded(wide(gradient) @ matrix.T, device)
        actual = overload(op.ADJOINT)(gradient, basis)
        judged["adjoint"].append((actual, eager_adjoint(gradient, basis), exact))
    for name, triples in judged.items():
        columns = [torch.cat([tensor.flatten() for tensor in column]) for column in zip(*triples, strict=True)]
        assert_as_exact_as_eager(name, *columns)


def assert_linear_matches(rows, units, features, basis, dtype, device, means=(0.0, 0.0), bias=True, draws=2):
    triples = []
    for _ in range(draws):
        x = normal(rows, features, dtype=dtype, device=device, mean=means[0])
        weight = normal(units, features - basis, dtype=dtype, device=device, mean=means[1])
        b = normal(units, dtype=dtype, device=device) if bias else None
        actual = F.lcw_linear(x, weight, b, basis)
        assert actual.shape == (rows, units)
        assert actual.dtype == dtype
        eager = torch.nn.functional.linear(x, eager_weight(weight, basis), b)
        exact = wide(x) @ (wide(weight) @ dense_basis(features - basis, basis)).T + (wide(b) if bias else 0)
        triples.append((actual, eager, rounded(exact, device)))
    columns = (torch.cat([tensor.flatten() for tensor in column]) for column in zip(*triples, strict=True))
    assert_as_exact_as_eager("output", *columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_weight_in_every_dtype(dtype, basis, mean, device):
    assert_weight_matches((5, 67), basis, dtype, device, mean)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (3, 2), (7, 31), (37, 16), (2, 1023), (1, 1500)])
@pytest.mark.parametrize("basis", [False, True])
def test_weight_of_every_size(shape, basis, device):
    assert_weight_matches(shape, basis, torch.float32, device, draws=8 if math.prod(shape) < 100 else 2)


@pytest.mark.parametrize("length", [65, 128, 250])
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_rows_longer_than_a_program_holds(length, basis, mean, device, monkeypatch):
    monkeypatch.setattr(kernels, "ROW_BYTES", 256)
    assert_weight_matches((3, length), basis, torch.float32, device, mean)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (3, 2, 3, 3), (2, 3, 2, 2, 3)])
def test_weight_of_every_rank_and_layout(shape, device):
    """The weights of a unit are the entries behind dimension 0, flattened."""
    weight = normal(*shape, device=device)
    expected = F.lcw_weight(weight.flatten(1)).view(shape)
    layouts = hostile_layouts(weight)
    if len(shape) >= 4:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        layouts["channels_last"] = weight.contiguous(memory_format=memory_format)
    layouts["contiguous"] = weight
    for name, layout in layouts.items():
        # The kernel keeps some layouts, and then sums in another order.
        torch.testing.assert_close(F.lcw_weight(layout), expected, rtol=0, atol=4e-7, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("means", [(0.0, 0.0), (100.0, 0.0), (0.0, 100.0), (100.0, 100.0)], ids=str)
def test_linear_in_every_dtype(dtype, basis, means, device):
    assert_linear_matches(5, 19, 171, basis, dtype, device, means, draws=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("means", [(0.0, 0.0), (100.0, 100.0)], ids=str)
def test_split_columns_in_every_dtype(dtype, basis, means, split, device):
    # For each size of dtype, the features are twice the smallest part of the columns and a remainder.
    features = {2: 1040, 4: 270, 8: 140}[dtype.itemsize]
    multiple = math.gcd(features - basis, features, 16 // dtype.itemsize)
    launch = kernels.choose_launch(5, 35, features - basis, multiple, dtype.itemsize, kernels.device_facts(device))
    assert launch["splits"] > 1
    assert_linear_matches(5, 35, features, basis, dtype, device, means, bias=basis, draws=1)


SIZES = [(1, 1, 1), (1, 1, 2), (2, 3, 1), (1, 5, 3), (3, 1, 7), (16, 32, 64), (17, 33, 65), (64, 64, 128), (61, 67, 31)]


@pytest.mark.parametrize("case", pairwise(size=SIZES, basis=[False, True], bias=[True, False]), ids=name_of)
def test_linear_of_every_size(case, device):
    rows, units, features = case["size"]
    draws = 8 if rows * units < 50 else 1
    assert_linear_matches(rows, units, features, case["basis"], torch.float32, device, bias=case["bias"], draws=draws)


@pytest.mark.parametrize(("rows", "units", "features"), [(0, 3, 5), (3, 0, 5), (3, 4, 1), (0, 0, 1)])
@pytest.mark.parametrize("basis", [False, True])
def test_nothing_to_multiply(rows, units, features, basis, device):
    """There are no samples or no units; or there is one feature, whose weight is 0, so only the bias remains."""
    x, weight = normal(rows, features, device=device), normal(units, features - basis, device=device)
    bias = normal(units, device=device)
    output = F.lcw_linear(x, weight, bias, basis)
    assert output.shape == (rows, units)
    assert torch.equal(overload(op.NAME)(weight[:0], basis), weight.new_empty(0, features))
    if features == 1:
        assert torch.equal(output, bias.expand(rows, units))
        assert torch.equal(F.lcw_linear(x, weight, None, basis), torch.zeros_like(output))
        assert torch.equal(F.lcw_weight(weight, basis), torch.zeros(units, 1, device=device))
        assert overload(op.ADJOINT)(weight.new_ones(units, 1), True).shape == (units, 0)


def test_no_features_leave_the_bias(device):
    x, weight, bias = normal(3, 0, device=device), normal(4, 0, device=device), normal(4, device=device)
    assert torch.equal(F.lcw_linear(x, weight, bias), bias.expand(3, 4))
    assert torch.equal(F.lcw_linear(x, weight), torch.zeros(3, 4, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_equal_features_leave_the_bias(dtype, device):
    """The proposition of the paper. It holds exactly if the mean of equal numbers is exact."""
    x = torch.full((3, 64), 5.0, dtype=dtype, device=device)
    weight, bias = normal(4, 64, dtype=dtype, device=device), normal(4, dtype=dtype, device=device)
    output = F.lcw_linear(x, weight, bias)
    if dtype.itemsize >= 4:
        assert torch.equal(output, bias.expand(3, 4))
    else:
        # 64 products of size 15 are summed twice in float32, and the result is rounded once.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(output, bias.expand(3, 4), rtol=eps, atol=2 * 64 * 15 * torch.finfo().eps)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("basis", [False, True])
def test_hostile_strides(name, basis, device):
    """Every layout of every argument gives the same bits as a contiguous argument."""
    values = {
        "x": normal(4, 9, device=device),
        "weight": normal(5, 9 - basis, device=device),
        "bias": normal(5, device=device),
        "grad_output": normal(4, 5, device=device),
    }

    def results(values):
        *arguments, grad_output = values.values()
        arguments = [argument.detach().requires_grad_() for argument in arguments]
        output = F.lcw_linear(*arguments, basis)
        weight = F.lcw_weight(arguments[1], basis)
        grad_weight = torch.autograd.grad(weight.square().sum(), arguments[1])
        return [output, weight, *torch.autograd.grad(output, arguments, grad_output), *grad_weight]

    expected = results(values)
    layouts = hostile_layouts(values[name])
    for layout_name, layout in layouts.items():
        actual = results(values | {name: layout})
        for a, b in zip(actual, expected, strict=True):
            # torch's own products in the backward pass may sum another layout in another order.
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, msg=f"{name} {layout_name}")
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("basis", [False, True])
def test_expanded_gradients(basis, device):
    weight = normal(3, 7 - basis, device=device).requires_grad_()
    output = F.lcw_weight(weight, basis)
    expanded = normal(1, 1, device=device).expand_as(output)
    actual = torch.autograd.grad(output, weight, expanded, retain_graph=True)[0]
    assert torch.equal(actual, torch.autograd.grad(output, weight, expanded.contiguous())[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize(("dtype", "at"), [(torch.float32, 2), (torch.float32, 80), (torch.bfloat16, 2)], ids=str)
def test_non_finite_values_stay_in_their_row(bad, basis, dtype, at, device):
    """A bad value among the first 64 columns, whose mean is subtracted from the weight, or behind them."""
    x, weight = normal(3, 90, dtype=dtype, device=device), normal(4, 90 - basis, dtype=dtype, device=device)
    clean_output, clean_weight = F.lcw_linear(x, weight, None, basis), F.lcw_weight(weight, basis)
    dirty = weight.clone()
    dirty[1, at] = bad
    output, constrained = F.lcw_linear(x, dirty, None, basis), F.lcw_weight(dirty, basis)
    assert not output[:, 1].isfinite().any()
    assert constrained[1].isfinite().sum() == 0
    assert torch.equal(output[:, [0, 2, 3]], clean_output[:, [0, 2, 3]])
    assert torch.equal(constrained[[0, 2, 3]], clean_weight[[0, 2, 3]])
    x[1, at] = bad
    output = F.lcw_linear(x, weight, None, basis)
    assert not output[1].isfinite().any()
    assert torch.equal(output[[0, 2]], clean_output[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_every_time(dtype, split, device):
    x, weight = normal(9, 600, dtype=dtype, device=device), normal(20, 600, dtype=dtype, device=device)
    assert torch.equal(F.lcw_linear(x, weight), F.lcw_linear(x, weight))
    assert torch.equal(F.lcw_weight(weight), F.lcw_weight(weight))


@pytest.mark.parametrize("basis", [False, True])
def test_gradients_match_the_reference(basis, device):
    judged = {}
    for _ in range(3):
        arguments = [normal(6, 21, device=device), normal(8, 21 - basis, device=device), normal(8, device=device)]
        grad_output = normal(6, 8, device=device)

        def gradients(convert, function, arguments=arguments, grad_output=grad_output):
            leaves = [convert(argument).requires_grad_() for argument in arguments]
            return torch.autograd.grad(function(*leaves), leaves, convert(grad_output))

        def in_eager_torch(x, weight, bias):
            return torch.nn.functional.linear(x, eager_weight(weight, basis), bias)

        actual = gradients(torch.clone, lambda *leaves: F.lcw_linear(*leaves, basis))
        eager = gradients(torch.clone, in_eager_torch)
        exact = gradients(torch.Tensor.double, in_eager_torch)
        for name, *triple in zip(("x", "weight", "bias"), actual, eager, exact, strict=True):
            judged.setdefault(name, []).append([tensor.flatten() for tensor in triple])
    for name, triples in judged.items():
        assert_as_exact_as_eager(name, *(torch.cat(column) for column in zip(*triples, strict=True)))


@pytest.mark.parametrize("basis", [False, True])
def test_gradcheck_and_gradgradcheck(basis, device):
    arguments = [
        normal(*shape, dtype=torch.float64, device=device).requires_grad_() for shape in ((2, 3), (2, 3 - basis), (2,))
    ]

    def linear(*arguments):
        return F.lcw_linear(*arguments, basis)

    def weight(weight):
        return F.lcw_weight(weight, basis)

    assert torch.autograd.gradcheck(linear, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(linear, arguments, fast_mode=True)
    assert torch.autograd.gradcheck(weight, arguments[1], check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(weight, arguments[1], fast_mode=True)


@pytest.mark.parametrize("basis", [False, True])
def test_opcheck(basis, device):
    x, weight, bias = normal(2, 5, device=device), normal(3, 5 - basis, device=device), normal(3, device=device)
    torch.library.opcheck(overload(op.NAME), (weight, basis))
    torch.library.opcheck(overload(op.ADJOINT), (normal(3, 5, device=device), basis))
    torch.library.opcheck(overload(op.LINEAR), (x, weight, bias, basis, False))
    torch.library.opcheck(overload(op.LINEAR), (x, weight, None, basis, False))


def test_vmap_over_weights(device):
    x, weights = normal(3, 7, device=device), normal(4, 5, 7, device=device)
    actual = torch.vmap(lambda weight: F.lcw_linear(x, F.lcw_weight(weight)))(weights)
    expected = torch.stack([F.lcw_linear(x, F.lcw_weight(weight)) for weight in weights])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_launches_fill_the_gpu():
    """Every column is in one part, no part is empty, and the GPU has room for all programs that share a unit."""
    device = kernels.Device(132, 227 * 1024, False)
    for rows, units, columns, itemsize in itertools.product(
        (1, 16, 33, 64), (1, 100, 4096, 10**6), (1, 63, 4095, 4096, 10**6, 3 * 2**30), (2, 4, 8)
    ):
        for multiple in {1, math.gcd(columns, 16 // itemsize)}:
            launch = kernels.choose_launch(rows, units, columns, multiple, itemsize, device)
            assert (launch["splits"] - 1) * launch["chunk"] < columns <= launch["splits"] * launch["chunk"]
            assert launch["chunk"] % launch["BLOCK_K"] == 0
            assert launch["BLOCK_M"] >= rows
            starts = max(1, launch["STARTS"])
            blocks = -(-units // (launch["BLOCK_N"] * starts)) * starts
            assert launch["splits"] == 1 or columns > 2**30 or blocks * launch["splits"] <= 2 * 132
    # In the largest usual layer one kernel keeps enough bytes of the weight in flight.
    assert kernels.choose_launch(32, 4096, 4096, 8, 2, device)["splits"] == 1
    assert kernels.choose_launch(8, 1024, 1024, 4, 4, device)["splits"] == 8


@pytest.mark.parametrize(
    ("columns", "features", "itemsize", "multiple", "starts"),
    [
        (4096, 4096, 2, 8, 0),
        # 1,000 numbers of 16 bits are 125 vectors of 16 bytes.
        (1000, 1000, 2, 8, 0),
        (1004, 1004, 2, 4, 0),
        (1002, 1002, 2, 2, 4),
        (4095, 4096, 2, 1, 8),
        (4098, 4099, 2, 1, 4),
        (4096, 4097, 2, 1, 1),
        # Programs that take a few steps do not need copies of x.
        (255, 256, 2, 1, 0),
        (1000, 1000, 4, 4, 0),
        (4095, 4096, 4, 1, 0),
        (1000, 1000, 8, 2, 0),
    ],
)
def test_rows_are_aligned_to_16_bytes_or_to_less(columns, features, itemsize, multiple, starts):
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    x, weight = (torch.empty(2, width, dtype=dtype) for width in (features, columns))
    assert kernels._common_multiple(x, weight) == multiple
    unaligned = torch.empty(1 + 2 * columns, dtype=dtype)[1:].view(2, columns)
    assert kernels._common_multiple(x, unaligned) == kernels._common_multiple(x[:, :columns], unaligned) == 1
    launch = kernels.choose_launch(32, 4096, columns, multiple, itemsize, kernels.Device(132, 227 * 1024, False))
    assert launch["STARTS"] == starts


def test_rows_that_are_not_loaded_one_by_one_need_fewer_warps():
    device = kernels.Device(132, 227 * 1024, False)
    warps = [kernels.choose_launch(32, 4096, n, m, 2, device)["num_warps"] for n, m in ((4096, 8), (4095, 1), (255, 1))]
    assert warps == [4, 4, 8]


def at_offset(tensor, offset):
    """The same numbers at an address of ``offset`` elements behind a multiple of 64 bytes, in memory full of NaN."""
    memory = torch.full((offset + tensor.numel() + 8,), math.nan, dtype=tensor.dtype, device=tensor.device)
    memory[offset : offset + tensor.numel()] = tensor.flatten()
    placed = memory[offset : offset + tensor.numel()].view(tensor.shape)
    assert placed.is_contiguous()
    assert placed.storage_offset() == offset
    return placed


ALIGNMENTS = {
    "features": [8, 24, 1000, 1001, 1026],
    "basis": [False, True],
    "dtype": DTYPES,
    "rows": [1, 8, 33],
    "units": [3, 40],
    "offsets": [(0, 0), (1, 0), (0, 1), (4, 8)],
    "shifts": [False, True],
}


@pytest.mark.parametrize("case", pairwise(**ALIGNMENTS), ids=name_of)
def test_rows_at_every_alignment(case, split, monkeypatch, device):
    """Short and long rows at any address. The columns are split, and 16-bit x is shifted for short rows too."""
    if case["shifts"]:
        monkeypatch.setattr(kernels, "MOST_SINGLE_STEPS", 0)
    dtype, features, basis = case["dtype"], case["features"], case["basis"]
    x = at_offset(normal(case["rows"], features, dtype=dtype, device=device), case["offsets"][0])
    weight = at_offset(normal(case["units"], features - basis, dtype=dtype, device=device), case["offsets"][1])
    eager = torch.nn.functional.linear(x, eager_weight(weight, basis))
    exact = rounded(wide(x) @ (wide(weight) @ dense_basis(features - basis, basis)).T, device)
    assert_as_exact_as_eager("output", F.lcw_linear(x, weight, None, basis), eager, exact)


@pytest.mark.parametrize("offset", range(8))
def test_shifted_rows_at_every_address(offset, device, monkeypatch):
    """Rows of few columns: some have no whole vector of 16 bytes."""
    monkeypatch.setattr(kernels, "MOST_SINGLE_STEPS", 0)
    judged, basis, units = [], offset % 2 == 1, 9
    for columns in (1 + offset, 16 + offset):
        x = normal(2, columns + basis, dtype=torch.float16, device=device)
        weight = at_offset(normal(units, columns, dtype=torch.float16, device=device), offset)
        assert kernels.choose_launch(2, units, columns, 1, 2, kernels.device_facts(device))["STARTS"] > 0
        actual = F.lcw_linear(x, weight, None, basis)
        eager = torch.nn.functional.linear(x, eager_weight(weight, basis))
        exact = rounded(wide(x) @ (wide(weight) @ dense_basis(columns, basis)).T, device)
        judged.append([tensor.flatten() for tensor in (actual, eager, exact)])
        # A row sees no number of another row, however close in memory.
        weight[7] = math.nan
        output = F.lcw_linear(x, weight, None, basis)
        others = [unit for unit in range(units) if unit != 7]
        assert output[:, 7].isnan().all()
        assert torch.equal(output[:, others], actual[:, others])
    assert_as_exact_as_eager("output", *(torch.cat(column) for column in zip(*judged, strict=True)))
