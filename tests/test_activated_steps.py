"""SGD and AdamW steps that activate the gradient (f(g) = alpha atan(beta g), or tanh or log), on every backend.

numpy computes the exact results, in float64 or, for float64, in long double. In float32 and float64, 20 steps may have
twice eager torch's error (tests/support/numerics.py). In bfloat16 and float16 every step is judged alone: it writes the
exact result of its inputs, rounded once.
"""

import itertools
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.numerics import as_exact, assert_by_the_rule, needs_more_digits, threads
from torch._subclasses.fake_tensor import FakeTensorMode

from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim.adamw import _step_with_own_counts

DEVICE_TYPE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu")).type
BACKENDS = [name for name in backends.BACKENDS if backends.missing_reason(ops.SGD_STEP, name, DEVICE_TYPE) is None]
KINDS = ("arctan", "tanh", "log")
PLACES = ("gradient", "momentum")
DIGITS = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((3, 7), (65,), (1,), (2, 3, 5), (0,), (200,))
STEPS = 20
SGD_OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov, "maximize": maximize}
    for momentum, dampening, nesterov in ((0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True))
    for decay, maximize in itertools.product((0.0, 0.05), (False, True))
]
ADAMW_OPTIONS = [
    {"weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    for decay, amsgrad, maximize in itertools.product((0.0, 0.05), (False, True), (False, True))
]
ALPHA, BETA, LR = 0.1, 20.0, 0.05
BETA1, BETA2, EPS = 0.9, 0.99, 1e-6


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# ---- The steps in numpy and in eager torch ---------------------------------------------------------------------------


def in_numpy(kind, x):
    x = BETA * x
    return ALPHA * (
        np.arctan(x) if kind == "arctan" else np.tanh(x) if kind == "tanh" else np.sign(x) * np.log1p(np.abs(x))
    )


def in_torch(kind, x):
    x = BETA * x
    return ALPHA * (x.atan() if kind == "arctan" else x.tanh() if kind == "tanh" else x.sign() * x.abs().log1p())


def sgd(f, state, g, is_first, activate, kind, momentum, dampening, weight_decay, nesterov, maximize):
    """One step by the formula, with numpy arrays or tensors. It changes ``state``."""
    g = -g if maximize else g
    d = f(kind, g) if activate == "gradient" else g
    d = d + weight_decay * state.w
    step = d
    if momentum:
        state.v = d if is_first else momentum * state.v + (1 - dampening) * d
        step = d + momentum * state.v if nesterov else state.v
    if activate == "momentum":
        step = f(kind, step)
    state.w = state.w - LR * step


def adamw(f, state, g, count, kind, weight_decay, amsgrad, maximize):
    library = torch if isinstance(g, torch.Tensor) else np
    g = f(kind, -g if maximize else g)
    state.w = state.w * (1 - LR * weight_decay)
    state.m = BETA1 * state.m + (1 - BETA1) * g
    state.v = BETA2 * state.v + (1 - BETA2) * g * g
    if amsgrad:
        state.largest = library.maximum(state.largest, state.v)
    root = library.sqrt(state.largest if amsgrad else state.v) / (1 - BETA2**count) ** 0.5
    state.w = state.w - LR / (1 - BETA1**count) * state.m / (root + EPS)


# ---- The steps under test --------------------------------------------------------------------------------------------


def step_sgd(backend, params, grads, buffers, is_first, activate, kind, **options):
    named = [options[name] for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")]
    buffers = buffers if options["momentum"] else []
    ops.sgd_step_(backend, params, grads, buffers, LR, *named, is_first, activate, kind, ALPHA, BETA)


def step_adamw(backend, params, grads, m, v, largest, counts, kind, weight_decay, amsgrad, maximize):
    largest = largest if amsgrad else []
    numbers = (LR, BETA1, BETA2, weight_decay, EPS, amsgrad, maximize, kind, ALPHA, BETA)
    ops.adamw_step_(backend, params, grads, m, v, largest, counts, *numbers)


def gradients(dtype, device):
    """Draw magnitudes from far below 1 / BETA, where f bends, to far above it."""
    return [
        (torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.empty(shape).uniform_(-3, 0.5)).to(device, dtype)
        for shape in SHAPES
    ]


def normal(dtype, device):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in SHAPES]


def zeros(dtype, device):
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in SHAPES]


def poisoned(dtype, device):
    return [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape in SHAPES]


def states(params, convert):
    return [SimpleNamespace(w=convert(w), v=0 * convert(w), m=0 * convert(w), largest=0 * convert(w)) for w in params]


def digits_of(dtype):
    return lambda tensor: as_exact(tensor.cpu())


@pytest.mark.parametrize("activate", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DIGITS, ids=str)
def test_sgd_over_20_steps(dtype, kind, activate, backend, device):
    needs_more_digits(dtype)
    for options in SGD_OPTIONS:
        params, buffers = normal(dtype, device), poisoned(dtype, device)
        exact, eager = states(params, digits_of(dtype)), states(params, lambda tensor: tensor.cpu().clone())
        for count in range(STEPS):
            grads = gradients(dtype, device)
            kept = [grad.clone() for grad in grads]
            step_sgd(backend, params, grads, buffers, count == 0, activate, kind, **options)
            for state, one, grad in zip(exact, eager, grads, strict=True):
                sgd(in_numpy, state, digits_of(dtype)(grad), count == 0, activate, kind, **options)
                sgd(in_torch, one, grad.cpu(), count == 0, activate, kind, **options)
            assert all(map(torch.equal, grads, kept))
        assert_by_the_rule("w", [p.cpu() for p in params], [one.w for one in eager], [state.w for state in exact])
        if options["momentum"]:
            assert_by_the_rule("v", [b.cpu() for b in buffers], [one.v for one in eager], [state.v for state in exact])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DIGITS, ids=str)
def test_adamw_over_20_steps(dtype, kind, backend, device):
    needs_more_digits(dtype)
    for options in ADAMW_OPTIONS:
        params, m, v, largest = normal(dtype, device), *(zeros(dtype, device) for _ in range(3))
        # The parameters have different step counts.
        counts = [torch.tensor(float(index), device=device) for index in range(len(SHAPES))]
        exact, eager = states(params, digits_of(dtype)), states(params, lambda tensor: tensor.cpu().clone())
        for _ in range(STEPS):
            grads = gradients(dtype, device)
            kept = [grad.clone() for grad in grads]
            torch._foreach_add_(counts, 1)
            step_adamw(backend, params, grads, m, v, largest, counts, kind, **options)
            for state, one, grad, count in zip(exact, eager, grads, counts, strict=True):
                adamw(in_numpy, state, digits_of(dtype)(grad), count.item(), kind, **options)
                adamw(in_torch, one, grad.cpu(), count.item(), kind, **options)
            assert all(map(torch.equal, grads, kept))
        for name, tensors in (
            ("w", params),
            ("m", m),
            ("v", v),
            *((("largest", largest),) if options["amsgrad"] else ()),
        ):
            rows = [[getattr(state, name) for state in of] for of in (eager, exact)]
            assert_by_the_rule(name, [tensor.cpu() for tensor in tensors], *rows)


def assert_rounded_once(name, results, exact, scale):
    """Allow half an ulp of the 16-bit dtype, plus eight float32 roundings of ``scale``, the size of the sum's terms."""
    for result, wanted, terms in zip(results, exact, scale, strict=True):
        result = result.cpu()
        wanted = torch.from_numpy(np.asarray(wanted))
        nearest = wanted.abs().to(result.dtype)
        ulp = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).double() - nearest.double()
        allowed = 0.5 * ulp + 8 * torch.finfo(torch.float32).eps * torch.from_numpy(np.asarray(terms))
        error = (result.double() - wanted).abs()
        assert (error <= allowed).all(), f"{name}: the error is {(error - allowed).max()} more than one rounding"


@pytest.mark.parametrize("activate", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sgd_in_16_bits_rounds_once(dtype, kind, activate, backend, device):
    for options in SGD_OPTIONS:
        params, buffers = normal(dtype, device), poisoned(dtype, device)
        for count in range(3):
            before = states(params, digits_of(dtype))
            for state, buffer in zip(before, buffers, strict=True):
                state.v = digits_of(dtype)(buffer)
            old = [np.abs(state.w) for state in before]
            grads = gradients(dtype, device)
            step_sgd(backend, params, grads, buffers, count == 0, activate, kind, **options)
            terms = []
            for state, grad in zip(before, grads, strict=True):
                g = digits_of(dtype)(grad)
                carried = np.abs(state.v) if options["momentum"] and count else 0
                terms.append(np.abs(g) + np.abs(in_numpy(kind, g)) + np.abs(state.w) + carried)
                sgd(in_numpy, state, g, count == 0, activate, kind, **options)
            # f amplifies the rounding of its argument, by at most its slope at 0.
            slope = ALPHA * BETA if activate == "momentum" else 1
            weights = [w + LR * slope * term for w, term in zip(old, terms, strict=True)]
            assert_rounded_once("w", params, [state.w for state in before], weights)
            if options["momentum"]:
                assert_rounded_once("v", buffers, [state.v for state in before], terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_adamw_in_16_bits_rounds_once(dtype, kind, backend, device):
    for options in ADAMW_OPTIONS:
        params, m, v, largest = normal(dtype, device), *(zeros(dtype, device) for _ in range(3))
        counts = [torch.tensor(0.0, device=device) for _ in SHAPES]
        for _ in range(3):
            before = states(params, digits_of(dtype))
            for state, *moments in zip(before, m, v, largest, strict=True):
                state.m, state.v, state.largest = map(digits_of(dtype), moments)
            old = [(np.abs(state.w), np.abs(state.m)) for state in before]
            grads = gradients(dtype, device)
            torch._foreach_add_(counts, 1)
            step_adamw(backend, params, grads, m, v, largest, counts, kind, **options)
            first, weights = [], []
            for state, grad, count, (w, average) in zip(before, grads, counts, old, strict=True):
                g = digits_of(dtype)(grad)
                adamw(in_numpy, state, g, count.item(), kind, **options)
                first.append(average + np.abs(in_numpy(kind, g)))
                root = np.sqrt(state.largest if options["amsgrad"] else state.v) / (1 - BETA2 ** count.item()) ** 0.5
                weights.append(w + LR / (1 - BETA1 ** count.item()) * first[-1] / (root + EPS))
            assert_rounded_once("w", params, [state.w for state in before], weights)
            assert_rounded_once("m", m, [state.m for state in before], first)
            assert_rounded_once("v", v, [state.v for state in before], [state.v for state in before])
            if options["amsgrad"]:
                largest_exact = [state.largest for state in before]
                assert_rounded_once("largest", largest, largest_exact, largest_exact)


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def padded(tensor):
    """A copy in the middle of memory full of NaN, with gaps between the elements."""
    base = tensor.new_full([2 * size + 3 for size in tensor.shape], torch.nan)
    inside = base[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
    return inside.copy_(tensor)


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "gaps": padded,
    "a slice": lambda t: torch.cat([t, t])[: len(t)],
}
SHAPE = (4, 3, 5, 6)


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, grad_layout, backend, device):
    w, g, v, m, s = (torch.rand(SHAPE, device=device) for _ in range(5))
    if grad_layout == "expanded":
        g = g[:1, :, :1].expand(SHAPE)
    others = [torch.rand(5, device=device) for _ in range(2)]
    for step in ("sgd", "adamw"):
        results = []
        for lay, lay_grad in ((LAYOUTS["contiguous"],) * 2, (LAYOUTS[layout], LAYOUTS.get(grad_layout, lambda t: t))):
            params, grads = [others[0].clone(), lay(w)], [others[1], lay_grad(g)]
            # The states m and s have layouts of their own, whatever those of the parameter and the gradient are.
            moments = [
                [others[0].clone(), lay_as(t)] for t, lay_as in ((v, lay), (m, LAYOUTS["transposed"]), (s, padded))
            ]
            if step == "sgd":
                step_sgd(backend, params, grads, moments[0], False, "gradient", "tanh", **SGD_OPTIONS[7])
            else:
                counts = [torch.tensor(2.0, device=device) for _ in range(2)]
                step_adamw(backend, params, grads, *moments, counts, "tanh", 0.05, True, False)
            for tensor in (params[1], moments[2][1]):
                base = tensor if tensor._base is None else tensor._base
                if base.isnan().any():
                    assert base.isnan().sum() == base.numel() - tensor.numel()
            assert torch.equal(grads[1], g)
            results.append([*params, *(tensor for moment in moments for tensor in moment)])
        assert all(tensor.isfinite().all() for tensor in results[0])
        assert all(map(torch.equal, *results))
        assert not torch.equal(results[0][1], w)


@pytest.mark.parametrize("dtypes", [DIGITS, NARROW], ids=str)
def test_a_list_of_two_dtypes_that_shares_gradients(dtypes, backend, device):
    params = [torch.rand(70, dtype=dtype, device=device) for dtype in dtypes for _ in range(20)]
    shared = {dtype: torch.randn(70, dtype=torch.float64).to(device, dtype) for dtype in dtypes}
    grads = [shared[param.dtype] for param in params]
    wanted, buffers = [param.clone() for param in params], [torch.zeros_like(param) for param in params]
    for param, grad in zip(wanted, grads, strict=True):
        buffer = [torch.zeros_like(param)]
        step_sgd(backend, [param], [grad], buffer, False, "momentum", "log", **SGD_OPTIONS[7])
    step_sgd(backend, params, grads, buffers, False, "momentum", "log", **SGD_OPTIONS[7])
    assert all(map(torch.equal, params, wanted))


def test_no_parameters(backend):
    step_sgd(backend, [], [], [], True, "gradient", "arctan", **SGD_OPTIONS[4])
    step_adamw(backend, [], [], [], [], [], [], "arctan", 0.0, True, False)


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DIGITS, *NARROW], ids=str)
def test_nan_stays_and_infinity_is_a_bounded_step(dtype, backend, device):
    grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=dtype, device=device)
    param, buffer = torch.zeros_like(grad), torch.full_like(grad, torch.nan)
    step_sgd(backend, [param], [grad], [buffer], True, "gradient", "tanh", **SGD_OPTIONS[4])
    bound = torch.tensor([torch.nan, -LR * ALPHA, LR * ALPHA, 0.0], dtype=torch.float64)
    torch.testing.assert_close(param.cpu().double(), bound, equal_nan=True, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_nan_in_either_average_stays_with_amsgrad(backend, device):
    v = torch.tensor([torch.nan, 1.0, 1.0], device=device)
    largest = torch.tensor([1.0, torch.nan, 2.0], device=device)
    param, grad, m = (torch.ones(3, device=device) for _ in range(3))
    step_adamw(backend, [param], [grad], [m], [v], [largest], [torch.ones((), device=device)], "tanh", 0.0, True, False)
    for tensor in (param, largest):
        assert tensor.isnan().tolist() == [True, True, False]


def test_infinite_parameters_without_decay(backend, device):
    """Without weight decay, the step does not add 0 times infinity."""
    param, grad = torch.full((9,), torch.inf, device=device), torch.ones(9, device=device)
    step_sgd(backend, [param], [grad], [], False, "gradient", "tanh", **SGD_OPTIONS[0])
    assert param.isposinf().all()


# ---- Autograd, threads, refusals -------------------------------------------------------------------------------------


def test_autograd_notices_every_write(backend, device):
    w, g, v, m, s = (torch.rand(3, device=device) for _ in range(5))
    leaf = torch.ones(3, device=device, requires_grad=True)

    def loss_of(tensor):
        return (leaf * tensor).sum()

    written = {"sgd": (w, v), "adamw": (w, v, m, s)}
    for step, tensors in written.items():
        losses = [loss_of(tensor) for tensor in tensors]
        of_grad = loss_of(g)
        if step == "sgd":
            step_sgd(backend, [w], [g], [v], False, "gradient", "tanh", **SGD_OPTIONS[4])
        else:
            step_adamw(backend, [w], [g], [v], [m], [s], [torch.ones((), device=device)], "tanh", 0.0, True, False)
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        of_grad.backward()


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="only the CPU has threads")
@pytest.mark.parametrize("backend", ["cpp"])
def test_same_bits_on_any_number_of_threads(backend):
    shapes = [1, 0, 30_001, 5, 64, 100_003, 65, 0, 16]
    results = []
    for count in (1, 2, 3, 7):
        generator = torch.Generator().manual_seed(1)
        w, g, v, m, s = ([torch.rand(size, generator=generator) for size in shapes] for _ in range(5))
        with threads(count):
            step_sgd(backend, w, g, v, False, "momentum", "log", **SGD_OPTIONS[7])
            counts = [torch.tensor(float(index + 1)) for index in range(len(shapes))]
            step_adamw(backend, w, g, v, m, s, counts, "arctan", 0.01, True, False)
        results.append([*w, *v, *m, *s])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def _wrong_sgd(x):
    return {
        "more gradients": ([x], [x.clone(), x.clone()], []),
        "fewer elements": ([x], [torch.ones(3)], []),
        "another dtype": ([x], [x.double()], []),
        "other strides": ([x.view(4, 6)], [torch.ones(6, 4).t()], []),
        "gaps": ([x[::2]], [torch.ones(12)], []),
        "integers": ([torch.ones(3, dtype=torch.int64)], [torch.ones(3, dtype=torch.int64)], []),
        "buffers without momentum": ([x], [x.clone()], [x.clone()]),
    }


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="about the C++ kernel")
@pytest.mark.parametrize("case", _wrong_sgd(torch.ones(24)))
def test_the_op_refuses_unsafe_arguments(case):
    good, x = torch.ones(3), torch.ones(24)
    params, grads, buffers = _wrong_sgd(x)[case]
    arguments = ([good, *params], [good.clone(), *grads], buffers)
    numbers = (0.1, 0.0, 0.0, 0.0, False, False, False, False, "tanh", 0.1, 20.0)
    with pytest.raises(RuntimeError, match=r"activated_sgd_step_: .*; call lcw_ops.optim"):
        torch.ops.lcw_ops.activated_sgd_step_.cpp(*arguments, *numbers)
    assert (good == 1).all()
    assert (x == 1).all()
    if case in ("another dtype", "other strides", "fewer elements", "gaps", "integers"):
        assert torch.ops.lcw_ops.try_activated_sgd_step_.cpp(*arguments, *numbers) is False
        assert (good == 1).all()
        assert (x == 1).all()


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="about the C++ kernel")
@pytest.mark.parametrize("step", [torch.ones(2), torch.ones((), dtype=torch.int64), torch.ones(0)], ids=str)
def test_the_op_refuses_a_count_that_is_not_a_single_float(step):
    x = [torch.ones(3) for _ in range(4)]
    with pytest.raises(RuntimeError, match="count of steps"):
        torch.ops.lcw_ops.activated_adamw_step_.cpp(
            *([one] for one in x), [], [step], 0.1, 0.9, 0.99, 0.0, 1e-8, False, False, "tanh", 0.1, 20.0
        )
    assert all((one == 1).all() for one in x)


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("plain torch, not an op of ours")
    w, g, v, m, s = ([torch.rand(5, 3, device=device), torch.rand(4, device=device)] for _ in range(5))
    numbers = (0.1, 0.9, 0.0, 0.01, True, False, False, True, "tanh", 0.1, 20.0)
    torch.library.opcheck(getattr(torch.ops.lcw_ops.activated_sgd_step_, backend), (w, g, v, *numbers))
    numbers = (0.1, 0.9, 0.99, 0.01, 1e-8, True, False, "tanh", 0.1, 20.0)
    counts = [torch.ones((), device=device) for _ in w]
    torch.library.opcheck(getattr(torch.ops.lcw_ops.activated_adamw_step_, backend), (w, g, v, m, s, counts, *numbers))


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_compile_fullgraph(step, backend, device):
    def run(w, g, v, m, s, count):
        if step == "sgd":
            step_sgd(
                backend,
                [w, w.new_ones(3)],
                [g, g.new_ones(3)],
                [v, v.new_ones(3)],
                False,
                "gradient",
                "log",
                **SGD_OPTIONS[7],
            )
        else:
            step_adamw(backend, [w], [g], [m], [v], [s], [count], "log", 0.05, True, False)

    if step == "adamw" and backend == "reference":
        pytest.skip("plain torch reads the count of steps, which a graph cannot do")
    tensors = [torch.rand(5, 3, device=device) for _ in range(5)]
    tensors[1] = tensors[1].t().contiguous().t()
    results = [[tensor.clone() for tensor in tensors] for _ in range(2)]
    run(*results[0], torch.ones((), device=device))
    torch.compile(run, fullgraph=True, backend="aot_eager")(*results[1], torch.ones((), device=device))
    assert all(map(torch.equal, *results))


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def adamw_on_fake_gpu(backend, count_device, in_optimizer=False):
    """A step of two fake parameters, one of whose counts is on ``count_device``. Needs no GPU."""
    with FakeTensorMode():
        lists = [[torch.zeros(3, device="cuda") for _ in range(2)] for _ in range(4)]
        steps = [torch.ones((), device=device) for device in ("cuda", count_device)]
        step = _step_with_own_counts if in_optimizer else ops.adamw_step_
        step(
            backend, *lists, [], steps, lr=LR, beta1=BETA1, beta2=BETA2, weight_decay=0.0, eps=EPS, amsgrad=False,
            maximize=False, kind="tanh", alpha=ALPHA, beta=BETA,
        )  # fmt: skip


@pytest.mark.parametrize("in_optimizer", [False, True])
@pytest.mark.parametrize("on", backends.BACKENDS[1:])
def test_a_graph_takes_no_count_from_the_cpu(on, in_optimizer, monkeypatch):
    launched = []
    monkeypatch.setattr(ops, "_step_in_place", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(ops, "_by_dtype", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a count on the CPU while a CUDA graph is captured; expected .* on cuda:0"):
        adamw_on_fake_gpu(on, "cpu", in_optimizer=in_optimizer)
    assert not launched
    adamw_on_fake_gpu(on, "cuda", in_optimizer=in_optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    adamw_on_fake_gpu(on, "cpu", in_optimizer=in_optimizer)
    assert len(launched) == 2
