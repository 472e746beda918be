"""The C++ kernel of activated gradients: its error over all numbers, the memory it touches, threads, refusals."""

import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.guards import between_guards, writable_between_guards
from support.numerics import needs_more_digits, threads
from support.pairwise import pairwise

import lcw_ops
from lcw_ops import functional as F
from lcw_ops.ops import backends
from lcw_ops.ops import gradient_activation as ops

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        backends.missing_reason(ops.NAME, "cpp", "cpu") is not None, reason="the C++ extension is not built"
    ),
]

KINDS = ("arctan", "tanh", "log")
# The bounds in csrc/cpu/gradient_functions.h, in units in the last place of the result.
MAX_ULP = {"arctan": 2.0, "tanh": 3.0, "log": 2.0}
EXACT = {"arctan": np.arctan, "tanh": np.tanh, "log": lambda x: np.copysign(np.log1p(np.abs(x)), x)}
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOUND = {"arctan": np.pi / 2, "tanh": 1.0, "log": np.inf}


def activate(tensor, kind, alpha=1.0, beta=1.0):
    result = tensor.clone()
    torch.ops.lcw_ops.gradient_activation_.cpp([result], kind, alpha, beta)
    return result


def every_exponent(dtype, each):
    """Every exponent, that of the denormal numbers too, with random fractions and with the smallest and the largest."""
    bits, count, integer = (23, 255, torch.int32) if dtype == torch.float32 else (52, 2047, torch.int64)
    exponents = torch.arange(count)[:, None]
    fractions = torch.randint(0, 2**bits, (len(exponents), each))
    fractions[:, 0], fractions[:, 1] = 0, 2**bits - 1
    return (exponents << bits | fractions).to(integer).view(dtype).flatten()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_units_in_the_last_place_over_all_numbers(kind, dtype):
    needs_more_digits(dtype)
    # Errors are largest at the bends, so the samples are denser there.
    bend = 10.0 ** torch.empty(200_000, dtype=torch.float64).uniform_(-4, 2)
    x = torch.cat([every_exponent(dtype, 2000 if dtype == torch.float32 else 250), bend.to(dtype)])
    assert x.isfinite().all()
    assert x.min() == 0
    assert x.max() == torch.finfo(dtype).max
    result = activate(x, kind)
    exact = EXACT[kind](x.numpy().astype(np.longdouble))
    ulp = np.spacing(exact.astype(NUMPY[dtype])).astype(np.longdouble)
    error = np.abs(result.numpy().astype(np.longdouble) - exact) / ulp
    assert error.max() <= MAX_ULP[kind], f"{error.max()} at {x[error.argmax()]}"
    assert torch.equal(activate(-x, kind), -result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_rounded_once(kind, dtype):
    x = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
    # Every NaN, whatever its bits, stays one: rounding must not turn it into an infinity or a number.
    assert activate(x[x.isnan()], kind).isnan().all()
    x = x[x.isfinite()]
    exact = EXACT[kind](x.double().numpy())
    nearest = torch.from_numpy(exact).abs().to(dtype)
    ulp = torch.nextafter(nearest, torch.full_like(x, torch.inf)).double() - nearest.double()
    error = (activate(x, kind).double() - torch.from_numpy(exact)).abs()
    # Half an ulp, plus float32's own error, which may move a value across the midpoint of two numbers.
    allowed = 0.5 * ulp + MAX_ULP[kind] * torch.finfo(torch.float32).eps * torch.from_numpy(exact).abs()
    assert (error <= allowed).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_ordinary_number(kind, dtype):
    """At every place in a vector, NaN of either sign stays NaN, an infinity becomes f's limit, zero keeps its sign."""
    values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
    bound = torch.tensor(BOUND[kind], dtype=torch.float64).to(dtype)
    for shift in range(17):
        x = torch.cat([torch.ones(shift, dtype=dtype), values])
        result = activate(x, kind)[shift:]
        assert result[:2].isnan().all()
        assert torch.equal(result[2:4], torch.stack([bound, -bound]))
        assert torch.equal(result[4:].signbit(), torch.tensor([False, True]))
        assert (result[4:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_has_the_same_bits_wherever_it_lies(kind, dtype):
    """The element may start, continue or end a vector, a tensor or a list, on one thread or on three."""
    x = (torch.randn(70_001, dtype=torch.float64) * 10.0 ** torch.empty(70_001).uniform_(-4, 2)).to(dtype)
    with threads(1):
        wanted = activate(x, kind, 0.1, 20.0)
    for count in (1, 3, 7, 8, 9, 31, 63, 64, 65, 127, 1000):
        for start in (0, 1, 5, 64):
            part = slice(start, start + count)
            assert torch.equal(activate(x[part], kind, 0.1, 20.0), wanted[part])
    sizes = [1, 0, 2, 10_000, 63, 64, 0, 65, 17_011, 1, 8, 30_000, 0]
    sizes.append(len(x) - sum(sizes))
    for count in (1, 2, 3, 7):
        with threads(count):
            assert torch.equal(activate(x, kind, 0.1, 20.0), wanted)
            parts = [part.clone() for part in x.split(sizes)]
            torch.ops.lcw_ops.gradient_activation_.cpp(parts, kind, 0.1, 20.0)
            assert torch.equal(torch.cat(parts), wanted)


def test_a_thousand_tensors_of_every_dtype():
    """The threads divide a list as one range of elements. No element is left out, and none is activated twice."""
    every = list(itertools.product(range(250), DTYPES))
    gradients = [torch.randn(size, dtype=dtype) for size, dtype in (every[place] for place in torch.randperm(1000))]
    wanted = [activate(gradient, "tanh", 0.3, 4.5) for gradient in gradients]
    with threads(3):
        F.gradient_activation_(gradients, "tanh", 0.3, 4.5)
    assert all(torch.equal(gradient, one) for gradient, one in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_around_a_tensor_is_written(dtype):
    """Starts and sizes vary around those of a vector. The elements around the tensor are 0.5, which f would change."""
    base = torch.full((200,), 0.5, dtype=dtype)
    inside = activate(base, "arctan")[0]
    for start in range(0, 40, 3):
        for count in (*range(1, 20), 31, 33, 63, 65, 100):
            whole = base.clone()
            torch.ops.lcw_ops.gradient_activation_.cpp([whole[start : start + count]], "arctan", 1.0, 1.0)
            assert (whole[start : start + count] == inside).all()
            assert (whole[:start] == 0.5).all()
            assert (whole[start + count :] == 0.5).all()


# ---- Arguments that the kernel refuses -------------------------------------------------------------------------------


def _refused():
    x = torch.ones(24)
    return {
        "gaps": [torch.ones(3), x[::2]],
        "overlap": [torch.ones(3), x.as_strided((4, 3), (1, 2))],
        "expanded": [torch.ones(3), x[:1].expand(4)],
        "twice": [x, torch.ones(3), x],
        "a view": [torch.ones(3), x, x.view(4, 6)],
        "neighbours that meet": [x[12:], x[:13]],
        "integers": [x, torch.ones(3, dtype=torch.int32)],
        "complex": [x, torch.ones(3, dtype=torch.complex64)],
        "another device": [x, torch.ones(3, device="meta")],
    }


@pytest.mark.parametrize("case", _refused())
def test_the_op_refuses_before_the_first_write(case):
    tensors = _refused()[case]
    with pytest.raises((RuntimeError, ValueError), match=r"call lcw_ops\.functional"):
        torch.ops.lcw_ops.gradient_activation_.cpp(tensors, "arctan", 0.1, 20.0)
    assert all((tensor == 1).all() for tensor in tensors if tensor.device.type == "cpu")


@pytest.mark.parametrize("case", [*_refused(), "negated", "zeros without memory", "sparse", "nested"])
def test_the_op_answers_before_the_first_write(case):
    x = torch.ones(3)
    more = {
        "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        "zeros without memory": lambda: torch._efficientzerotensor(3),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    }
    tensors = _refused()[case] if case in _refused() else [x, more[case]()]
    assert torch.ops.lcw_ops.try_gradient_activation_.cpp(tensors, "arctan", 0.1, 20.0) is False
    dense = [tensor for tensor in tensors if tensor.device.type == "cpu" and case not in more]
    assert all((tensor == 1).all() for tensor in [*dense, x])


def test_the_op_answers_that_it_took_the_tensors():
    x = torch.ones(3)
    assert torch.ops.lcw_ops.try_gradient_activation_.cpp([x], "arctan", 0.1, 20.0) is True
    assert torch.equal(x, activate(torch.ones(3), "arctan", 0.1, 20.0))


def test_a_mistake_is_an_error_in_both_forms():
    """Another layout in memory would not mend these arguments."""
    x = torch.ones(3)
    for op in (torch.ops.lcw_ops.gradient_activation_, torch.ops.lcw_ops.try_gradient_activation_):
        with pytest.raises(RuntimeError, match="kind is sigmoid; expected arctan, tanh or log"):
            op.cpp([x], "sigmoid", 0.1, 20.0)
    numbers = (0.1, 0.0, 0.0, 0.0, False, False, False, False, "tanh", 0.1, 20.0)
    for op in (torch.ops.lcw_ops.activated_sgd_step_, torch.ops.lcw_ops.try_activated_sgd_step_):
        with pytest.raises(RuntimeError, match="has 2 tensors; expected 1"):
            op.cpp([x], [x.clone(), x.clone()], [], *numbers)
    assert (x == 1).all()


def test_an_error_inside_a_kernel_is_no_refusal(monkeypatch):
    """The words of an error decide nothing, not even "; call ", which once stood for a refusal."""

    def fail(*_):
        raise RuntimeError("out of memory; call somebody")

    x = torch.ones(3)
    for name in (ops.NAME, ops.SGD_STEP):
        monkeypatch.setattr(getattr(torch.ops.lcw_ops, ops.TRY + name), "cpp", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        F.gradient_activation_([x])
    with pytest.raises(RuntimeError, match="out of memory"):
        ops.sgd_step_("cpp", [x], [x.clone()], [], 0.1, 0, 0, 0, False, False, False, "gradient", "tanh", 0.1, 20.0)
    assert (x == 1).all()


DECISION = re.compile(
    r"\b(in|not in|==|!=)\s+(str|repr)\(\w+\)"
    r"|(str|repr)\((error|err|e|exc|exception)\)\s*(\.(startswith|endswith|find|count|index)\(|==|!=)"
    r"|\b(error|err|e|exc|exception)\.args\b|re\.(search|match|fullmatch)\([^)]*str\((error|err|e|exc|exception)\)"
)


def test_no_decision_depends_on_a_message():
    for bad in ('if "; call " not in str(error):', "if str(e).startswith('x'):", "error.args[0] == 'x'"):
        assert DECISION.search(bad)
    for good in ('raise E(f"{str(error).splitlines()[0]}")', "reason = str(error).partition('x')[0]"):
        assert not DECISION.search(good)
    root = Path(lcw_ops.__file__).parent
    sources = [
        path for folder in (root, root.parent / "kernels", root.parent / "bench") for path in folder.rglob("*.py")
    ]
    assert len(sources) > 50
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if DECISION.search(line)
    ]
    assert not found


def test_an_unknown_kind_is_refused_by_the_op():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="expected arctan, tanh or log"):
        torch.ops.lcw_ops.gradient_activation_.cpp([x], "sigmoid", 0.1, 20.0)
    assert (x == 1).all()


def test_tensors_of_two_devices():
    """The meta device's kernel takes a list with a meta tensor and does nothing. Other tensors need activation too."""
    for order in (1, -1):
        x = torch.ones(3)
        F.gradient_activation_([x, torch.ones(2, device="meta")][::order])
        assert torch.equal(x, activate(torch.ones(3), "arctan", 0.1, 20.0))


# ---- From Python to the kernel ---------------------------------------------------------------------------------------


def test_a_plain_list_is_not_looked_through_in_python(monkeypatch):
    """Every step may have a thousand gradients, so Python does not repeat the kernel's checks."""

    def looked_through(*arguments):
        raise AssertionError("looked through in Python")

    monkeypatch.setattr(
        sys.modules["lcw_ops.functional.gradient_activation"], "_check_gradient_activation", looked_through
    )
    monkeypatch.setattr(ops, "is_dense", looked_through)
    x = torch.ones(3, 4).t()
    F.gradient_activation_([x, torch.nn.Parameter(torch.ones(3), requires_grad=False), torch.ones(0)])
    assert torch.equal(x, activate(torch.ones(4, 3), "arctan", 0.1, 20.0))
    with torch.no_grad():
        F.gradient_activation_([torch.nn.Parameter(torch.ones(3))])


def test_a_request_for_another_backend_is_met():
    with lcw_ops.use_backend("reference"), torch.profiler.profile() as profile:
        F.gradient_activation_([torch.ones(3)])
    assert any("foreach" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("inference", [False, True])
def test_versions_are_counted_in_inference_mode_too(inference):
    x = torch.ones(3)
    before = x._version
    with torch.inference_mode(inference):
        F.gradient_activation_([x])
        if inference:
            F.gradient_activation_([x, torch.ones(3)])
    assert x._version > before


# ---- Regressions and guarded memory ----------------------------------------------------------------------------------


GUARDED = pairwise(
    count=(1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000),
    kind=KINDS,
    # Options of SGD. AdamW is called with fixed ones.
    nesterov=(True, False),
    maximize=(False, True),
    is_first=(False, True),
    on_momentum=(False, True),
)


@pytest.mark.parametrize("flush", ["front", "back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_arguments_is_touched(flush, dtype):
    """Too wide a vector would touch memory that is not mapped. A step's gradient is mapped read-only."""
    for count, kind, *options in (case.values() for case in GUARDED):
        x = torch.randn(count).to(dtype)
        guarded = writable_between_guards(x, flush)
        torch.ops.lcw_ops.gradient_activation_.cpp([guarded], kind, 0.1, 20.0)
        assert torch.equal(guarded, activate(x, kind, 0.1, 20.0))
        w, v, m, s = (writable_between_guards(torch.rand(count).to(dtype), flush) for _ in range(4))
        gradient, step = between_guards(x, flush), torch.tensor(3.0)
        numbers = (0.1, 0.9, 0.0, 0.01, *options, kind, 0.1, 20.0)
        torch.ops.lcw_ops.activated_sgd_step_.cpp([w], [gradient], [v], *numbers)
        numbers = (0.1, 0.9, 0.99, 0.01, 1e-8, True, False, kind, 0.1, 20.0)
        torch.ops.lcw_ops.activated_adamw_step_.cpp([w], [gradient], [v], [m], [s], [step], *numbers)
        assert all(tensor.isfinite().all() for tensor in (w, v, m, s))


@pytest.mark.parametrize("value", [1e39, 1e-50])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_numbers_that_float32_does_not_hold_are_refused(name, value):
    """Such numbers would turn a gradient of 0 into NaN, or every gradient into 0."""
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"gradient_activation_: {name} is .*expected a number from 1\.2e-38"):
        F.gradient_activation_([x], **{name: value})
    assert (x == 0).all()


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match=r"gradient_activation_: tensors\[1\] is a nested tensor"):
        F.gradient_activation_([torch.ones(2), nested])


def test_parameters_over_the_same_memory_are_stepped_one_after_another():
    p = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    other = p.view(1000, 300)
    grads = [torch.full_like(p, 0.3), torch.full_like(other, -0.2)]
    expected = p.clone().double()
    for gradient in (0.3, -0.2):
        expected -= 0.5 * 0.1 * math.atan(20.0 * gradient)
    ops.sgd_step_(
        "cpp", [p, other], grads, [], 0.5, 0.0, 0.0, 0.0, False, False, False, "gradient", "arctan", 0.1, 20.0
    )
    # Two steps, each with two roundings and the error of f.
    assert (p.double() - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()
