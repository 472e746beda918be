"""The contract of an op: what every public function must do on every backend.

test_contract.py has the table of all functions, ``OPS``. One entry there gives a new function every check below:

    "remove_row_mean": Op(
        ours=lambda x: F.remove_row_mean(x, 0.5),
        plain=lambda x: x - 0.5 * x.mean(-1, keepdim=True),
        draw=lambda size, dtype: ({"x": normal(*size, dtype=dtype) + 10}, normal(*size, dtype=dtype)),
        **ROWS,
    ),

- ``ours``: the public function, called with tensors by name. An entry fixes the options that are not tensors; other
  options are another entry.
- ``plain``: the same in eager torch. By the rule of support/numerics.py, ``ours`` may err twice as much.
- ``exact``: the exact result and its gradients. If it is left out, it is ``plain`` in float64.
- ``draw``: the arguments and a gradient of the result, for a size and a dtype. Draw inputs that the method is meant
  for.
- ``sizes``, ``one``, ``empty``, ``double``: the sizes that ``draw`` takes. ``LAYER`` and ``ROWS`` of the table have
  them for layers and for functions of rows.
  Draw with ``normal``, or move the tensors to ``DEVICE``.

The other fields of ``Op`` describe exceptions. The first word of the entry's key is the function's name, and a public
function without an entry fails a test. An entry runs on "reference" and on every backend that can run it on ``DEVICE``,
the device of LCW_OPS_TEST_DEVICE. A check is a function of (op, backend) whose name begins with ``check_``, so a new
check here applies to all entries.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from support.guards import between_guards, between_nans
from support.numerics import assert_as_exact_as_eager, hostile_layouts, threads
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lcw_ops

NARROW = (torch.float32, torch.bfloat16, torch.float16)
Arguments = dict[str, Tensor]
DEVICE = torch.device(os.environ.get("LCW_OPS_TEST_DEVICE", "cpu"))
# Results with fewer numbers than POOLED are judged over several draws: a single number has one rounding error, and
# eager torch's may happen to be 0.
POOLED, MOST_DRAWS = 64, 8


class Op(NamedTuple):
    """How to call one public function, and the facts that the checks need.

    Args:
        ours: the public function, called with arguments by name. It does not write to them.
        plain: the formula in eager torch. In the test's dtype its error is the yardstick; in float64 it is exact.
        draw: (size, dtype) -> the arguments by name, and a gradient for the result.
        sizes: ordinary sizes.
        one: the size in which every dimension is 1.
        empty: sizes in which a dimension is 0.
        exact: (arguments, grad_output) -> the result as "output", and every gradient by name, in float64.
        constants: the arguments that have no gradient.
        dtypes: the dtypes in which results and gradients are checked.
        differentiable: False for a function without a derivative.
        autocast: "narrow" for a function that autocast runs in 16 bits, "unchanged" for the others.
        graphs: the largest number of graphs that torch.compile makes for ``sizes`` with dynamic shapes.
        double: the size for the check of the double backward.
    """

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    draw: Callable[[tuple, torch.dtype], tuple[Arguments, Tensor]]
    sizes: tuple[tuple, ...]
    one: tuple
    empty: tuple[tuple, ...]
    double: tuple
    exact: Callable[[Arguments, Tensor], Arguments] | None = None
    constants: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = NARROW
    differentiable: bool = True
    autocast: str = "unchanged"
    graphs: int = 2


# ---- Parts of the checks ---------------------------------------------------------------------------------------------


def results(
    op: Op, function: Callable, arguments: Arguments, grad_output: Tensor, create_graph: bool = False
) -> Arguments:
    """The function's result and every gradient, by name. ``create_graph`` makes the gradients differentiable too."""
    if not op.differentiable:
        return {"output": function(**arguments)}
    leaves = {n: t.detach().requires_grad_() for n, t in arguments.items() if n not in op.constants}
    output = function(**{**arguments, **leaves})
    # In a recurrence without steps, plain torch does not use every argument. A missing gradient becomes 0, and the
    # rule judges it.
    gradients = torch.autograd.grad(
        output, leaves.values(), grad_output, create_graph=create_graph, materialize_grads=True
    )
    return {"output": output.detach(), **{n: t.detach() for n, t in zip(leaves, gradients, strict=True)}}


def tangents(function: Callable, arguments: Arguments, directions: Arguments) -> Arguments:
    """The derivative along ``directions`` by torch's two forward modes; arguments without a direction are constants."""
    constants = {name: tensor for name, tensor in arguments.items() if name not in directions}

    def of_the_moving(moving):
        return function(**constants, **moving)

    moving = {name: arguments[name] for name in directions}
    _, transformed = torch.func.jvp(of_the_moving, (moving,), (directions,))
    found = {"torch.func.jvp": transformed}
    for mode, context in (("duals", torch.enable_grad), ("duals under no_grad", torch.no_grad)):
        with context(), forward_ad.dual_level():
            output = of_the_moving({n: forward_ad.make_dual(t, directions[n]) for n, t in moving.items()})
            tangent = forward_ad.unpack_dual(output).tangent
            found[mode] = torch.zeros_like(transformed) if tangent is None else tangent
    return found


def exact_results(op: Op, arguments: Arguments, grad_output: Tensor) -> Arguments:
    if op.exact is not None:
        return op.exact(arguments, grad_output)
    return results(op, op.plain, in_float64(arguments), grad_output.double())


def in_float64(arguments: Arguments) -> Arguments:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}


def draws(op: Op, size: tuple, dtype: torch.dtype, most: int = MOST_DRAWS) -> list[tuple[Arguments, Tensor]]:
    """Draw the arguments of so many calls that luck does not decide the verdict."""
    first = op.draw(size, dtype)
    smallest = min(tensor.numel() for tensor in (*first[0].values(), first[1]))
    count = 1 if not smallest else min(most, 2 + POOLED // smallest)
    return [first, *(op.draw(size, dtype) for _ in range(count - 1))]


def assert_right(what: str, op: Op, calls: list, found: list[Arguments]) -> None:
    """Judge the results ``found`` of these calls by the rule of support/numerics.py."""
    eager = [results(op, op.plain, *call) for call in calls]
    exact = [exact_results(op, *call) for call in calls]
    for name in exact[0]:
        for one, call in zip(found, calls, strict=True):
            assert one[name].dtype == (call[1] if name == "output" else call[0][name]).dtype, f"{what}: {name}"
            assert one[name].isfinite().all(), f"{what}: {name} is not finite"
        assert_as_exact_as_eager(
            f"{what}: {name}", *(torch.stack([one[name] for one in each]) for each in (found, eager, exact))
        )


def assert_same_bits(what: str, one: Arguments, other: Arguments) -> None:
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{what}: {name}"


def replaced(call: tuple[Arguments, Tensor], name: str, tensor: Tensor) -> tuple[Arguments, Tensor]:
    arguments, grad_output = call
    return (arguments, tensor) if name == "grad_output" else ({**arguments, name: tensor}, grad_output)


# ---- Values and memory -----------------------------------------------------------------------------------------------


def check_values(op: Op, backend: str) -> None:
    """The result and every gradient in every dtype, with NaN in all memory that torch.empty returns."""
    assert torch.empty(9).isnan().all(), "conftest.py poisons uninitialised memory"
    for dtype in op.dtypes:
        for size in op.sizes:
            calls = draws(op, size, dtype)
            assert_right(f"{size}, {dtype}", op, calls, [results(op, op.ours, *call) for call in calls])


def check_size_1(op: Op, backend: str) -> None:
    calls = draws(op, op.one, torch.float32)
    assert_right("size 1", op, calls, [results(op, op.ours, *call) for call in calls])


def in_dtype(function: Callable, dtype: torch.dtype) -> Callable:
    """The function on arguments rounded to ``dtype``; their gradients have the arguments' own dtype."""
    return lambda **arguments: function(**{name: tensor.to(dtype) for name, tensor in arguments.items()})


def check_empty(op: Op, backend: str) -> None:
    """Shapes are those of eager torch, and sums without terms are 0."""
    for size in op.empty:
        call = op.draw(size, torch.float32)
        assert any(tensor.numel() == 0 for tensor in (*call[0].values(), call[1])), size
        found, eager = (results(op, function, *call) for function in (op.ours, op.plain))
        for name, tensor in eager.items():
            assert found[name].shape == tensor.shape, f"{size}: {name}"
            torch.testing.assert_close(
                found[name], tensor, msg=lambda text, size=size, name=name: f"{size}: {name}: {text}"
            )


def check_layouts(op: Op, backend: str) -> None:
    """Every memory layout of every argument and of the gradient, one at a time."""
    for size, dtype in itertools.product(op.sizes, op.dtypes[:2]):
        calls = draws(op, size, dtype, most=4)
        names = (*calls[0][0], *(("grad_output",) if op.differentiable else ()))
        for name in names:
            tensors = [call[1] if name == "grad_output" else call[0][name] for call in calls]
            for layout in hostile_layouts(tensors[0]):
                laid_out = [hostile_layouts(tensor)[layout] for tensor in tensors]
                given = [replaced(call, name, tensor) for call, tensor in zip(calls, laid_out, strict=True)]
                found = [results(op, op.ours, *call) for call in given]
                assert_right(f"{size}, {dtype}: {name} {layout}", op, calls, found)


def check_expanded(op: Op, backend: str) -> None:
    """Every argument and the gradient with strides of 0."""
    arguments, grad_output = op.draw(op.sizes[0], torch.float32)
    for name, tensor in {**arguments, "grad_output": grad_output}.items():
        if tensor.is_floating_point() and tensor.dim():
            call = replaced((arguments, grad_output), name, tensor[:1].expand(tensor.shape))
            copy = replaced((arguments, grad_output), name, tensor[:1].expand(tensor.shape).contiguous())
            assert_right(f"{name} expanded", op, [copy] * 2, [results(op, op.ours, *call)] * 2)


def check_guards(op: Op, backend: str) -> None:
    """The op reads only its arguments and does not write to them: otherwise this process would crash.

    A GPU's memory cannot be protected. There the arguments lie between NaN, which a result must not have.
    """
    guarded = between_guards if DEVICE.type == "cpu" else between_nans
    for dtype in op.dtypes:
        for size in (op.one, *op.sizes):
            call = op.draw(size, dtype)
            for flush in ("front", "back"):
                arguments = {name: guarded(tensor, flush) for name, tensor in call[0].items()}
                found = results(op, op.ours, arguments, guarded(call[1], flush))
                assert all(tensor.isfinite().all() for tensor in found.values()), (size, dtype, flush)


def check_arguments_are_left_alone(op: Op, backend: str) -> None:
    arguments, grad_output = op.draw(op.sizes[0], torch.float32)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    versions = {name: tensor._version for name, tensor in arguments.items()}
    results(op, op.ours, arguments, grad_output)
    assert_same_bits("after the call", arguments, before)
    assert {name: tensor._version for name, tensor in arguments.items()} == versions


def check_same_bits(op: Op, backend: str) -> None:
    """The same call twice gives the same bits, for every number of threads."""
    for size in op.sizes:
        call = op.draw(size, torch.float32)
        for count in (1, 2, 3) if DEVICE.type == "cpu" else (1,):
            with threads(count):
                first, second = (results(op, op.ours, *call) for _ in range(2))
            assert_same_bits(f"{size}, {count} threads", first, second)


# ---- torch's transforms ----------------------------------------------------------------------------------------------


def check_vmap(op: Op, backend: str) -> None:
    """vmap over each argument alone and over all at once gives a loop's numbers. The mapped dimension is the second."""
    calls = [op.draw(op.sizes[0], torch.float32)[0] for _ in range(3)]
    names = list(calls[0])
    for chosen in (*([name] for name in names), names):
        each = [{name: (call if name in chosen else calls[0])[name] for name in names} for call in calls]
        dims = {name: min(1, calls[0][name].dim()) if name in chosen else None for name in names}
        stacked = {
            name: calls[0][name] if dims[name] is None else torch.stack([call[name] for call in calls], dims[name])
            for name in names
        }
        mapped = torch.vmap(
            lambda *tensors: op.ours(**dict(zip(names, tensors, strict=True))), in_dims=tuple(dims[n] for n in names)
        )(*(stacked[name] for name in names))
        eager = torch.stack([op.plain(**call) for call in each])
        exact = torch.stack([op.plain(**in_float64(call)) for call in each])
        assert_as_exact_as_eager(f"vmap over {chosen}", mapped, eager, exact)


class _Recorder(TorchDispatchMode):
    """Records the calls of the package's ops below autograd, with copies of the arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lcw_ops":
            copied = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
            self.calls.append((function, *copied))
        return function(*args, **(kwargs or {}))


def check_opcheck(op: Op, backend: str) -> None:
    """torch.library.opcheck of every op that the function and its derivatives call."""
    recorder = _Recorder()
    for size in (op.sizes[0], *op.empty):
        call = op.draw(size, torch.float32)
        with recorder:
            results(op, op.ours, *call)
    assert recorder.calls or backend == "reference", "a compiled backend calls the package's ops"
    for function, args, kwargs in recorder.calls:
        torch.library.opcheck(function, args, kwargs)


def check_backend(op: Op, backend: str) -> None:
    """Forward and backward run the requested backend's kernels and no others."""
    with _Recorder() as recorder:
        results(op, op.ours, *op.draw(op.sizes[0], torch.float32))
    overloads = {function._overloadname for function, *_ in recorder.calls}
    assert overloads == {backend} or (not overloads and backend == "reference")


def check_compile(op: Op, backend: str) -> None:
    """torch.compile makes at most ``op.graphs`` graphs for all sizes, forward and backward, without a graph break."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(op.ours, fullgraph=True, dynamic=True, backend=counted)
    for size in op.sizes:
        calls = draws(op, size, torch.float32, most=3)
        assert_right(f"compiled, {size}", op, calls, [results(op, compiled, *call) for call in calls])
    assert 1 <= len(graphs) <= op.graphs


def check_autocast(op: Op, backend: str) -> None:
    """The op runs in 16 bits, with float32 gradients of float32 arguments; or autocast does not change it.

    Backward runs outside autocast, as torch advises. Inside, autocast would round the products of the backend
    "reference", which is plain torch, to 16 bits.
    """

    def ours(**arguments):
        with torch.autocast(DEVICE.type, narrow):
            return op.ours(**arguments)

    calls = draws(op, op.sizes[0], torch.float32, most=4)
    for narrow in (torch.bfloat16, torch.float16):
        if op.autocast == "unchanged":
            assert_same_bits(str(narrow), results(op, ours, *calls[0]), results(op, op.ours, *calls[0]))
            continue
        calls = [(arguments, grad_output.to(narrow)) for arguments, grad_output in calls]
        found = [results(op, ours, *call) for call in calls]
        # The yardstick is eager torch on 16-bit arguments. It computes in 16 bits, so autocast would not round more.
        eager = [results(op, in_dtype(op.plain, narrow), *call) for call in calls]
        exact = [exact_results(op, *call) for call in calls]
        for name in exact[0]:
            wanted = narrow if name == "output" else torch.float32
            assert all(one[name].dtype == wanted for one in found), name
            each = [torch.stack([one[name] for one in some]) for some in (found, eager, exact)]
            assert_as_exact_as_eager(f"{narrow}: {name}", each[0].to(narrow), each[1].to(narrow), each[2])


def check_fake_tensors(op: Op, backend: str) -> None:
    """Fake tensors give the real shapes, dtypes and strides of the result and of every gradient."""
    for size in (*op.sizes, op.one, *op.empty):
        call = op.draw(size, torch.float32)
        real = results(op, op.ours, *call)
        with FakeTensorMode() as mode:
            arguments = {name: mode.from_tensor(tensor) for name, tensor in call[0].items()}
            fake = results(op, op.ours, arguments, mode.from_tensor(call[1]))
        for name, tensor in real.items():
            what = f"{size}: {name}"
            assert fake[name].shape == tensor.shape, what
            assert fake[name].dtype == tensor.dtype, what
            if tensor.numel():
                assert fake[name].stride() == tensor.stride(), what


def check_gradients_with_a_graph(op: Op, backend: str) -> None:
    """Gradients with create_graph=True obey the rule, and agree in float64 with gradients without it.

    With create_graph=True an op may compute its gradients in another way. check_double_backward only compares the
    derivatives of these gradients with their finite differences, so it does not see if the gradients are wrong.
    """
    if not op.differentiable:
        return
    for dtype in op.dtypes:
        for size in (op.one, *op.sizes, *op.empty) if dtype == torch.float32 else op.sizes:
            calls = draws(op, size, dtype)
            found = [results(op, op.ours, *call, create_graph=True) for call in calls]
            assert_right(f"{size}, {dtype}", op, calls, found)
    for size in (op.one, *op.sizes):
        call = op.draw(size, torch.float64)
        with_graph, without = (results(op, op.ours, *call, create_graph=graph) for graph in (True, False))
        for name, tensor in without.items():
            torch.testing.assert_close(
                with_graph[name], tensor, msg=lambda text, size=size, name=name: f"{size}: {name}: {text}"
            )


def check_forward_mode(op: Op, backend: str) -> None:
    """Forward mode gives the derivatives along each argument alone and along all at once.

    A function that is not differentiable may raise an error, but may not give a wrong derivative.
    """
    refusals = () if op.differentiable else (NotImplementedError, ValueError)
    for size, dtype in itertools.product(op.sizes, op.dtypes):
        calls = [arguments for arguments, _ in draws(op, size, dtype, most=4)]
        names = [name for name in calls[0] if name not in op.constants]
        for chosen in (*([name] for name in names), names):
            found, eager, exact = [], [], []
            for call in calls:
                along = {n: normal(*call[n].shape, dtype=call[n].dtype) for n in chosen}
                with contextlib.suppress(*refusals):
                    found.append(tangents(op.ours, call, along))
                    eager.append(tangents(op.plain, call, along)["torch.func.jvp"])
                    exact.append(tangents(op.plain, in_float64(call), in_float64(along))["torch.func.jvp"])
            assert len(found) == len(calls) or not (found or op.differentiable), "only some calls were refused"
            for mode in found[0] if found else ():
                what = f"{size}, {dtype}, along {chosen}, {mode}"
                assert all(one[mode].dtype == dtype for one in found), what
                stacked = [torch.stack(each) for each in ([one[mode] for one in found], eager, exact)]
                assert_as_exact_as_eager(what, *stacked)


def check_double_backward(op: Op, backend: str) -> None:
    """First and second derivatives agree with finite differences in float64."""
    if not op.differentiable:
        return
    arguments, _ = op.draw(op.double, torch.float64)
    constants = {name: arguments.pop(name) for name in op.constants}
    leaves = [tensor.detach().requires_grad_() for tensor in arguments.values()]

    def function(*tensors):
        return op.ours(**dict(zip(arguments, tensors, strict=True)), **constants)

    assert torch.autograd.gradcheck(function, leaves)
    # The second derivative with respect to an argument in which the function is linear is 0, unless sin follows.
    assert torch.autograd.gradgradcheck(lambda *tensors: function(*tensors).sin(), leaves)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run(check: str, op: Op, backend: str) -> None:
    """Run one check of one op. The backend is requested explicitly, so a fallback is an error."""
    with lcw_ops.use_backend(backend):
        CHECKS[check](op, backend)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on DEVICE, drawn in float64 and rounded to ``dtype``, so that every dtype has the same numbers."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def scaled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight whose products with ``normal`` numbers are about 1."""
    return (torch.randn(shape, dtype=torch.float64) / math.sqrt(max(shape[-1], 1))).to(DEVICE, dtype)
