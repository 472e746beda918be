"""F.gradient_activation_ on every backend: values, memory layouts, errors that change nothing, torch's transforms.

The rule of all backends holds: the error against float64 is at most twice that of plain eager torch in the same dtype
plus one unit in the last place of the result's scale. The relative error of every element has a bound too.
"""

import math
import os
import random
import re
import time
import warnings

import pytest
import torch
from support.numerics import assert_as_exact_as_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops import backends
from lcw_ops.ops.gradient_activation import FOREACH_TENSORS, find_shared

NAME = "gradient_activation_"
KINDS = ("arctan", "tanh", "log")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# In ulp of f / alpha: the bounds in the kernel's docstring, plus the roundings of the products with alpha and beta. A
# CUDA GPU errs more, because it divides and exponentiates approximately in float32.
MAX_ULP = {"cpu": 4.0, "cuda": 6.0}


# Without a GPU the triton tests run in Triton's interpreter, in their own run of pytest (support/triton_process.py).
DEVICE_TYPE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu")).type
BACKENDS = [name for name in backends.BACKENDS if backends.missing_reason(NAME, name, DEVICE_TYPE) is None]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with lcw_ops.use_backend(request.param):
        yield request.param


def exact(gradient, kind, alpha, beta):
    x = beta * gradient.double()
    function = {"arctan": torch.atan, "tanh": torch.tanh, "log": lambda x: x.sign() * torch.log1p(x.abs())}[kind]
    return alpha * function(x)


def eager(gradient, kind, alpha, beta):
    x = beta * gradient
    function = {"arctan": torch.atan, "tanh": torch.tanh, "log": lambda x: x.sign() * torch.log1p(x.abs())}[kind]
    return alpha * function(x)


def assert_as_good_as_eager(result, gradient, kind, alpha, beta):
    wanted = exact(gradient, kind, alpha, beta)
    assert result.dtype == gradient.dtype
    if gradient.dtype == torch.float64:
        # Here eager torch is the exact result itself, so its error would seem to be zero.
        torch.testing.assert_close(
            result, wanted, rtol=(MAX_ULP[DEVICE_TYPE] + 1) * torch.finfo(torch.float64).eps, atol=0
        )
    else:
        assert_as_exact_as_eager(NAME, result, eager(gradient, kind, alpha, beta), wanted)


def random_gradients(shape, dtype, device):
    """Ten powers of ten around 1 / beta, where the function bends, with both signs."""
    magnitude = 10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(-7, 3)
    return (magnitude * torch.randn(shape, dtype=torch.float64).sign()).to(device, dtype)


def test_the_defaults_are_arctan_with_alpha_0_1_and_beta_20(device):
    gradient = random_gradients(1000, torch.float32, device)
    result = gradient.clone()
    F.gradient_activation_([result])
    assert_as_good_as_eager(result, gradient, "arctan", 0.1, 20.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(kind, dtype, device):
    gradients = [random_gradients(size, dtype, device) for size in (1, 2, 1023, 1024, 1025, 3001)]
    for alpha, beta in ((0.1, 20.0), (1.0, 1.5)):
        results = [gradient.clone() for gradient in gradients]
        assert F.gradient_activation_(results, kind, alpha, beta) is None
        for result, gradient in zip(results, gradients, strict=True):
            assert_as_good_as_eager(result, gradient, kind, alpha, beta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_element_is_accurate(kind, dtype, device):
    """Relative accuracy from the smallest normal number to the largest that beta does not overflow."""
    tiny, large = (math.log10(limit) for limit in (torch.finfo(dtype).tiny * 10, torch.finfo(dtype).max / 100))
    whole_range = 10.0 ** torch.linspace(tiny, large, 20_000, dtype=torch.float64)
    bend = 10.0 ** torch.linspace(-4, 1, 20_000, dtype=torch.float64)
    gradient = torch.cat([whole_range, -bend]).to(device, dtype)
    wanted = exact(gradient, kind, 0.1, 20.0)
    result = gradient.clone()
    F.gradient_activation_([result], kind)
    relative = (result.double() - wanted).abs() / wanted.abs()
    # float64 is measured against float64, which has an error of its own.
    allowed = MAX_ULP[DEVICE_TYPE] + (dtype == torch.float64)
    assert relative.max().item() <= allowed * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_gradients_keep_their_digits(kind, device):
    result = torch.tensor([1e-20, -1e-30], device=device)
    F.gradient_activation_([result], kind, 0.1, 20.0)
    torch.testing.assert_close(result.cpu(), torch.tensor([2e-20, -2e-30]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(kind, dtype, device):
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype, device=device)
    F.gradient_activation_([values], kind, 0.25, 20.0)
    bound = {"arctan": 0.25 * math.pi / 2, "tanh": 0.25, "log": math.inf}[kind]
    wanted = torch.tensor([math.nan, bound, -bound, 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(values.cpu(), wanted, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_to_the_last_bit(kind, device):
    positive = random_gradients(2000, torch.float32, device).abs()
    negative = -positive
    F.gradient_activation_([positive, negative], kind)
    assert torch.equal(positive, -negative)


VIEWS = {
    "transposed": lambda base: base[:24, :30].t(),
    "columns": lambda base: base[:, 1::3],
    "rows": lambda base: base[::2],
    "inner block": lambda base: base[5:20, 7:11],
    "one column": lambda base: base[:, 3],
    "channels last": lambda base: base.view(-1)[:1200].view(2, 10, 6, 10).permute(0, 3, 1, 2),
    "one element": lambda base: base[3, 4],
    "size one dimensions": lambda base: base[:, None, :, None],
    "empty": lambda base: base[:0],
    "expanded to nothing": lambda base: base[:1].expand(0, 40),
    "conjugate of a real": lambda base: base.conj(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_views_that_are_negated_when_read(kind, device):
    """The memory of such a view has the opposite sign. The real parts beside the imaginary ones stay as they are."""
    numbers = torch.complex(*(random_gradients((4, 6), torch.float32, device) for _ in range(2)))
    plain = torch.ones(3, device=device)
    for view in (lambda z: z.conj().imag, lambda z: z.conj().imag.t()[1:, ::2], lambda z: z.conj().imag[:0]):
        base, others = numbers.clone(), plain.clone()
        target = view(base)
        assert target.is_neg()
        wanted = target.clone()
        assert not wanted.is_neg()
        F.gradient_activation_([wanted], kind)
        version = target._version
        F.gradient_activation_([others, target, torch.ones(2, device=device)], kind)
        assert torch.equal(target, wanted)
        assert target._version > version
        assert torch.equal(base.real, numbers.real)
        assert torch.equal(others, activated_alone(plain, kind))


def activated_alone(tensor, kind):
    result = tensor.clone()
    F.gradient_activation_([result], kind)
    return result


def test_negated_views_share_memory_as_others_do(device):
    base = torch.ones(6, dtype=torch.complex64, device=device)
    view = base.conj().imag
    with pytest.raises(ValueError, match=r"tensors\[\d\] and tensors\[\d\] share memory"):
        F.gradient_activation_([view, base.imag])
    with pytest.raises(TypeError, match=r"tensors\[1\] is torch.int64"):
        F.gradient_activation_([view, torch.ones(2, dtype=torch.int64)])
    assert torch.equal(base, torch.ones_like(base))


def test_negated_views_below_transforms_and_in_compiled_code(device):
    numbers = torch.complex(*(random_gradients((4, 3), torch.float32, device) for _ in range(2)))
    wanted = activated_alone(numbers.conj().imag.clone(), "tanh")

    def activated(tensor):
        F.gradient_activation_([tensor], "tanh")
        return tensor

    assert torch.equal(torch.vmap(activated)(numbers.clone().conj().imag), wanted)
    compiled = torch.compile(activated, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(numbers.clone().conj().imag), wanted)

    def loss(x):
        return (x * activated(numbers.clone().conj().imag)).sum()

    assert torch.equal(torch.func.grad(loss)(torch.ones(4, 3, device=device)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_without_memory_stay_zeros(kind, device):
    zeros = torch._efficientzerotensor(3, device=device)
    gradient = random_gradients(5, torch.float32, device)
    wanted = activated_alone(gradient, kind)
    F.gradient_activation_([zeros, gradient], kind)
    assert torch.equal(gradient, wanted)
    assert torch.equal(zeros.clone(), torch.zeros(3, device=device))
    F.gradient_activation_([zeros], kind)


def test_calls_that_are_recorded_keep_the_op_that_raises(backend, device):
    """A recorded program may run again on other tensors. It must raise if the kernel does not take them."""
    if backend == "reference":
        pytest.skip("plain torch, no op of ours")

    def activated(tensor):
        tensor = tensor.clone()
        F.gradient_activation_([tensor])
        return tensor

    x = torch.ones(3, device=device)
    program = make_fx(activated)(x)
    names = [str(node.target) for node in program.graph.nodes]
    assert f"lcw_ops.gradient_activation_.{backend}" in names
    assert not [name for name in names if "try_" in name]
    assert torch.equal(program(x), activated(x))
    with FlopCounterMode(display=False):
        assert torch.equal(activated(x), activated_alone(x, "arctan"))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(view, dtype, device):
    base = random_gradients((40, 40), dtype, device)
    untouched = base.clone()
    inside = torch.zeros_like(base, dtype=torch.bool)
    if VIEWS[view](inside).numel():
        VIEWS[view](inside).fill_(True)
    wanted = base.clone()
    F.gradient_activation_([wanted])
    F.gradient_activation_([VIEWS[view](base)])
    assert torch.equal(base, torch.where(inside, wanted, untouched))


def test_a_list_of_everything(device):
    gradients = [random_gradients((3, 5), dtype, device) for dtype in DTYPES]
    gradients += [
        torch.empty(0, 7, device=device),
        torch.tensor(0.5, device=device),
        torch.ones(9, 9, device=device).t(),
    ]
    results = tuple(gradient.clone() for gradient in gradients)
    F.gradient_activation_(results, "log")
    for result, gradient in zip(results, gradients, strict=True):
        if gradient.numel():
            assert_as_good_as_eager(result, gradient, "log", 0.1, 20.0)
    F.gradient_activation_([])
    F.gradient_activation_([torch.empty(0, device=device)])


BAD_ENTRIES = {
    "no gradient": (lambda: None, TypeError, "tensors[1] is a NoneType"),
    "integers": (lambda: torch.ones(3, dtype=torch.int64), TypeError, "tensors[1] is torch.int64"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), TypeError, "tensors[1] is torch.complex64"),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, "to_dense()"),
    "leaf": (lambda: torch.ones(3, requires_grad=True), ValueError, "tensors[1] requires a gradient"),
    "view of a leaf": (lambda: torch.ones(3, requires_grad=True)[:2], ValueError, "tensors[1] requires a gradient"),
    "recorded": (lambda: torch.ones(3, requires_grad=True) * 2, ValueError, "tensors[1] requires a gradient"),
    "expanded": (lambda: torch.ones(1).expand(4), ValueError, "share memory"),
    "overlapping": (lambda: torch.ones(8).as_strided((4, 3), (1, 2)), ValueError, "share memory"),
}


@pytest.mark.parametrize("entry", BAD_ENTRIES)
def test_a_bad_entry_changes_nothing(entry, device):
    make, error, message = BAD_ENTRIES[entry]
    good = torch.ones(4, device=device)
    with pytest.raises(error, match=re.escape(message)):
        F.gradient_activation_([good, make(), good.clone()])
    assert torch.equal(good, torch.ones_like(good))
    assert good._version == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kind": "sigmoid"}, ValueError),
        ({"alpha": 0.0}, ValueError),
        ({"alpha": math.nan}, ValueError),
        ({"beta": -1.0}, ValueError),
        ({"beta": math.inf}, ValueError),
        ({"beta": "20"}, TypeError),
    ],
    ids=str,
)
def test_bad_options_change_nothing(options, error, device):
    good = torch.ones(4, device=device)
    with pytest.raises(error, match=f"gradient_activation_: {next(iter(options))} is"):
        F.gradient_activation_([good], **options)
    assert torch.equal(good, torch.ones_like(good))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_tensor_computed_in_compiled_code_is_refused_twice_in_a_list(backend):
    """Torch 2.10 cannot compare the tensors by id() there."""

    def activated(x):
        gradient = x * 1
        F.gradient_activation_([gradient, x * 2, gradient])
        return gradient

    torch._dynamo.reset()
    with lcw_ops.use_backend(backend), pytest.raises(torch._dynamo.exc.Unsupported, match="in the list twice"):
        torch.compile(activated, fullgraph=True, backend="eager")(torch.ones(3))


def test_not_a_list(device):
    for tensors in (torch.ones(3, device=device), (tensor for tensor in [torch.ones(3)]), None):
        with pytest.raises(TypeError, match="expected a list of tensors"):
            F.gradient_activation_(tensors)


def test_the_same_tensor_twice(device):
    gradient = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="in the list twice"):
        F.gradient_activation_([gradient, torch.ones(2, device=device), gradient])
    assert torch.equal(gradient, torch.ones_like(gradient))


SHARED = {
    "another shape": lambda x: [x, x.view(4, 6)],
    "overlapping slices": lambda x: [x[:14], x[12:]],
    "an element of a whole": lambda x: [x[5], x],
    "a column and a row": lambda x: [x.view(4, 6)[:, 1], x.view(4, 6)[2]],
    "overlapping columns": lambda x: [x.view(4, 6)[:, :4], x.view(4, 6)[:, 3:]],
    "a column and every second element": lambda x: [x.view(4, 6)[:, 3], x[1::2]],
    "wrapped around": lambda x: [x[1:].unflatten(0, (1, 23))[:, :13], x.view(4, 6)[:, 0]],
    "another dtype": lambda x: [x[:12], x.view(torch.bfloat16)[23:]],
    "another storage": lambda x: [x, torch.from_dlpack(x)[3:4]],
    "third of three": lambda x: [x[::3], x[1::3], x[2:5]],
}


@pytest.mark.parametrize("views", SHARED)
def test_two_tensors_of_the_same_memory_change_nothing(views, device):
    base = torch.ones(24, device=device)
    shared = SHARED[views](base)
    others = [torch.ones(3, device=device) for _ in range(3)]
    tensors = [others[0], shared[-1], others[1], *shared[:-1], others[2]]
    with pytest.raises(ValueError, match=r"tensors\[\d\] and tensors\[\d\] share memory"):
        F.gradient_activation_(tensors)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in (base, *others))


DISJOINT = {
    "two slices": lambda x: [x[12:], x[:12]],
    "interleaved": lambda x: [x[1::2], x[::2]],
    "interleaved in four and two": lambda x: [x[::4], x[1::2]],
    "columns": lambda x: [x.view(4, 6)[:, 1:3], x.view(4, 6)[:, 3:], x.view(4, 6)[:, 0]],
    "transposed columns": lambda x: [x.view(4, 6)[:, 3:].t(), x.view(4, 6)[:, :3].t()],
    "channels last": lambda x: [x.view(2, 3, 4)[..., channel] for channel in range(4)],
    "middle dimension": lambda x: [x.view(2, 3, 4)[:, 1], x.view(2, 3, 4)[:, :1], x.view(2, 3, 4)[:, 2]],
    "in two dtypes": lambda x: [x.view(4, 6)[:, :2], x.view(torch.bfloat16).view(4, 12)[:, 4:]],
    "nothing of the same place": lambda x: [x[3:3], x[3:3].view(0, 2), x],
}


@pytest.mark.parametrize("views", DISJOINT)
def test_disjoint_views_of_the_same_memory(views, device):
    base = random_gradients(24, torch.float32, device)
    wanted = base.clone()
    for view in DISJOINT[views](wanted):
        F.gradient_activation_([view])
    F.gradient_activation_(DISJOINT[views](base))
    assert torch.equal(base, wanted)


def test_sharing_is_found_among_random_views(device):
    """Views that share memory, as a count of the views of each element shows, are always found.

    Disjoint views may be refused too; how many are is printed.
    """
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        base = torch.zeros(60, device=device)
        views = []
        for _ in range(generator.choice([2, 2, 3])):
            grid = base.view(generator.choice([(60,), (6, 10), (3, 4, 5)]))
            for dim, size in enumerate(grid.shape):
                start, stop = sorted(generator.sample(range(size + 1), 2))
                grid = grid.transpose(0, dim)[start : stop : generator.choice([1, 1, 2])].transpose(0, dim)
            views.append(grid)
        count = torch.zeros(60, device=device)
        for view in views:
            count.as_strided(view.shape, view.stride(), view.storage_offset()).add_(1)
        found = find_shared(views)
        refused += found is not None and count.max() < 2
        assert found is not None or count.max() < 2
    print(f"refused though disjoint: {refused} of 300")


def test_thousands_of_tensors_are_compared_in_no_time():
    """All pairs of 20,000 would be 2e8 comparisons. The address ranges of a matrix's columns all overlap."""
    for tensors in ([torch.ones(1) for _ in range(20_000)], list(torch.ones(2, 20_000).unbind(1))):
        start = time.perf_counter()
        assert find_shared(tensors) is None
        assert time.perf_counter() - start < 5


def test_tensors_without_memory_share_none():
    assert find_shared([torch.empty(3, device="meta"), torch.empty(3, device="meta")]) is None
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_shared([torch.empty(3), torch.empty(3)]) is None


def test_plain_torch_takes_the_list_in_few_calls(backend, device):
    """A loop over the tensors would spend more time on calls than on arithmetic."""
    if backend != "reference":
        pytest.skip("about the reference backend")
    gradients = [torch.ones(3, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16) * 64]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.gradient_activation_(gradients)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_foreach_atan_"] == 128 / FOREACH_TENSORS


def test_a_backend_that_cannot_run_raises_before_writing(device):
    gradient = torch.ones(3, device=device)
    other = "cuda" if device.type == "cpu" else "cpp"
    with lcw_ops.use_backend(other), pytest.raises(RuntimeError, match=f"gradient_activation_.*{other}"):
        F.gradient_activation_([gradient])
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_parameters_under_no_grad(device):
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    with torch.no_grad():
        F.gradient_activation_([parameter])
    torch.testing.assert_close(parameter.detach(), exact(torch.ones(3), "arctan", 0.1, 20.0).float().to(device))


def test_inference_tensors(device):
    with torch.inference_mode():
        gradient = torch.ones(3, device=device)
        F.gradient_activation_([gradient])
    with pytest.raises(ValueError, match="inference tensor"):
        F.gradient_activation_([gradient])


def test_autograd_notices_the_write(device):
    weight = torch.ones(3, device=device, requires_grad=True)
    saved = torch.ones(3, device=device)
    loss = (weight * saved).sum()
    F.gradient_activation_([saved])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_vmap(device):
    gradient = random_gradients((4, 5), torch.float32, device)

    def activated(row):
        row = row.clone()
        F.gradient_activation_([row], "tanh")
        return row

    wanted = gradient.clone()
    F.gradient_activation_([wanted], "tanh")
    assert torch.equal(torch.vmap(activated, in_dims=1, out_dims=1)(gradient), wanted)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def activated(first, second):
        results = [first.clone(), second.t().clone()]
        F.gradient_activation_(results, "log", 0.2, 10.0)
        return results

    gradients = [random_gradients((3, 5), torch.float32, device), random_gradients((7, 2), torch.bfloat16, device)]
    wanted = [gradients[0].clone(), gradients[1].t().clone()]
    F.gradient_activation_(wanted, "log", 0.2, 10.0)
    for result, one in zip(activated(*gradients), wanted, strict=True):
        assert torch.equal(result, one)


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("plain torch, no op of ours")
    overload = getattr(torch.ops.lcw_ops.gradient_activation_, backend)
    tensors = [torch.randn(5, 7, device=device), torch.randn(4, 6, device=device).t()]
    torch.library.opcheck(overload, (tensors, "arctan", 0.1, 20.0))
    if backend == "triton":
        # Without tensors, the dispatcher cannot tell which device's kernel to call.
        torch.library.opcheck(overload, ([], "arctan", 0.1, 20.0))


def test_cuda_graph(device):
    if DEVICE_TYPE != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    gradients = [
        random_gradients(2000, torch.float32, device),
        random_gradients((30, 40), torch.float32, device)[:, ::2],
    ]
    wanted = [gradient.clone() for gradient in gradients]
    F.gradient_activation_(wanted)
    start = [gradient.clone() for gradient in gradients]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.gradient_activation_(gradients)
    for gradient, value in zip(gradients, start, strict=True):
        gradient.copy_(value)
    graph.replay()
    for gradient, value in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient, value)


def test_more_elements_than_32_bits_count(device):
    size = 2**31 + 1025
    if DEVICE_TYPE != "cuda" or torch.cuda.mem_get_info()[0] < 16 * size:
        pytest.skip("needs a CUDA device with 32 GB free")
    gradient = torch.full((size,), 0.5, dtype=torch.bfloat16, device=device)
    F.gradient_activation_([gradient])
    wanted = torch.tensor([0.5], dtype=torch.bfloat16, device=device)
    F.gradient_activation_([wanted])
    assert bool((gradient == wanted).all())
