"""Exporters and tracers: torch.export, ONNX, torch.jit.trace, torch.fx, quantization, Tensor subclasses.

An exported program must run without this package, give the numbers and gradients of the float64 reference, and hold one
node for the recurrence at any depth.
"""

import copy
import importlib.util
import inspect
import logging
import pickle
import subprocess
import sys
import time
import warnings
from collections import Counter

import pytest
import torch
from support.numerics import assert_as_exact_as_eager
from torch import Tensor
from torch.export import Dim

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import nn, reference

STEPS, ROWS, WIDTH = 5, 3, 4

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (lcw-ops[hosts])")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.trace:DeprecationWarning",
    "ignore:.*torch.compile.*inside torch.export",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:Exporting a model while it is in training mode",
    "ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def _quiet():
    """Disable logging: torch's compiler and exporters log thousands of records, which pytest would keep."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Recurrence(torch.nn.Module):
    """F.orthogonal_filter as a module: the filter is a buffer, every other tensor but the input h0 a parameter."""

    def __init__(self, arguments: dict, **options) -> None:
        super().__init__()
        self.names, self.options = list(arguments), options
        for name, argument in arguments.items():
            if isinstance(argument, Tensor) and name != "filter":
                setattr(self, name, torch.nn.Parameter(argument.clone()))
            elif isinstance(argument, Tensor):
                self.register_buffer(name, argument.clone())
            else:
                setattr(self, name, argument)

    def forward(self, h0: Tensor) -> Tensor:
        return F.orthogonal_filter(h0, **{name: getattr(self, name) for name in self.names}, **self.options)


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64)).Q


def make_arguments(**changes) -> dict:
    """Float64 arguments: one weight and bias per layer, a shared filter, the default scales."""
    arguments = {
        "weight": torch.randn(STEPS, WIDTH, WIDTH, dtype=torch.float64),
        "bias": torch.randn(STEPS, WIDTH, dtype=torch.float64),
        "filter": orthogonal(WIDTH, WIDTH),
    }
    return {**arguments, **changes}


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


FORMS = {
    "per layer": lambda: (make_arguments(), {}),
    "shared weight and bias": lambda: (
        make_arguments(weight=double(WIDTH, WIDTH), bias=double(WIDTH), inputs=double(STEPS, ROWS, WIDTH)),
        {"return_states": True},
    ),
    "no bias, relu": lambda: (make_arguments(bias=None), {"activation": "relu"}),
    "permutation, sigmoid": lambda: (
        make_arguments(filter=torch.randperm(WIDTH)),
        {"activation": "sigmoid", "return_states": True},
    ),
    "filter per layer, identity": lambda: (
        make_arguments(filter=orthogonal(STEPS, WIDTH, WIDTH)),
        {"activation": "identity"},
    ),
    "numbers": lambda: (make_arguments(alpha=0.7, beta=0.4), {}),
    "scales trained": lambda: (make_arguments(alpha=double(()), beta=double(1)), {"return_states": True}),
    "scales per step": lambda: (make_arguments(alpha=double(STEPS), beta=double(STEPS)), {}),
    "one step": lambda: (make_arguments(weight=double(1, WIDTH, WIDTH), bias=double(1, WIDTH)), {}),
    "only scales per step": lambda: (make_arguments(weight=double(WIDTH, WIDTH), bias=None, alpha=double(STEPS)), {}),
    "parallel": lambda: (make_arguments(), {"solver": "parallel", "window": 8, "tolerance": 1e-3}),
    "auto": lambda: (make_arguments(), {"solver": "auto"}),
}


def convert(arguments: dict, dtype: torch.dtype) -> dict:
    """Convert the arguments to ``dtype``, but filter and scales to the state's dtype."""
    state = torch.promote_types(dtype, torch.float32)

    def to(name, argument):
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            return argument
        return argument.to(state if name in ("filter", "alpha", "beta") else dtype)

    return {name: to(name, argument) for name, argument in arguments.items()}


def targets(program: torch.export.ExportedProgram) -> Counter:
    """How often the nodes of all graphs call each target."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return Counter(str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function")


def count_nodes(program: torch.export.ExportedProgram) -> int:
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return sum(len(graph.graph.nodes) for graph in graphs)


def assert_plain(program: torch.export.ExportedProgram, sizes_known: bool = True) -> None:
    """Assert that the graphs hold nothing but scan and torch's operators from tensors to tensors."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"):
        name = str(node.target)
        if name in ("scan", "<built-in function getitem>") or (not sizes_known and "sym_size" in name):
            continue
        assert name.startswith("aten."), f"{name} is not an operator of torch"
        assert isinstance(node.meta["val"], Tensor), f"{name} does not return a tensor"


def gradients(module: torch.nn.Module, arguments: tuple, output_of=lambda output: output) -> dict[str, Tensor]:
    output = output_of(module(*arguments))
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return {
        "output": output.detach(),
        **dict(zip(names, torch.autograd.grad(output, parameters, weights), strict=True)),
    }


def reference_gradients(module: Recurrence, h0: Tensor) -> dict[str, Tensor]:
    """Like ``gradients``, but computed by the reference step by step."""
    options = {name: option for name, option in module.options.items() if name in ("activation", "return_states")}

    class Plain(Recurrence):
        def forward(self, h0):
            return reference.orthogonal_filter(h0, **{name: getattr(self, name) for name in self.names}, **options)

    return gradients(Plain({name: getattr(module, name) for name in module.names}), (h0,))


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "strict"), [*((form, False) for form in FORMS), ("shared weight and bias", True), ("scales trained", True)]
)
def test_every_form_exports_to_a_scan_with_right_values_and_gradients(form, strict):
    arguments, options = FORMS[form]()
    h0, module = double(ROWS, WIDTH), Recurrence(arguments, **options)
    program = torch.export.export(module, (h0,), strict=strict)
    assert_plain(program)
    assert targets(program)["scan"] == 1
    assert len(program.graph.nodes) < 50
    expected, actual = reference_gradients(module, h0), gradients(program.module(), (h0,))
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(program.run_decompositions().module()(h0), actual["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["per layer", "shared weight and bias", "scales per step"])
def test_every_dtype_exports_with_a_state_in_float32_at_least(form, dtype):
    arguments, options = FORMS[form]()
    arguments = convert(arguments, dtype)
    h0 = double(ROWS, WIDTH).to(dtype)
    module = Recurrence(arguments, **options)
    program = torch.export.export(module, (h0,))
    assert_plain(program)
    exact = reference_gradients(Recurrence(convert(arguments, torch.float64), **options), h0.double())
    eager, actual = reference_gradients(module, h0), gradients(program.module(), (h0,))
    for name in exact:
        assert actual[name].dtype == eager[name].dtype
        assert_as_exact_as_eager(name, actual[name], eager[name], exact[name])


def test_gradients_do_not_depend_on_whether_the_first_state_requires_a_gradient():
    """Before torch 2.13, scan drops the gradients that pass between steps if the first state requires no gradient."""
    module = nn.OrthogonalFilterMLP(3, WIDTH, 20, 2, dtype=torch.float64)
    module.input_layer.requires_grad_(False)
    x = double(ROWS, 3)
    exported = torch.export.export(module, (x,)).module()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            expected = torch.autograd.grad(module(x).square().sum(), parameter)[0]
            actual = torch.autograd.grad(exported(x).square().sum(), exported.get_parameter(name))[0]
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "filter": "permutation"}, {"bias": False}], ids=str)
def test_an_rnn_exports_for_any_length_and_batch(options, strict):
    rnn = nn.OrthogonalFilterRNN(3, WIDTH, length=20, dtype=torch.float64, **options)
    # The example has as many samples as units: sizes that are equal by chance must not become one size.
    example, others = double(6, WIDTH, 3), (double(6, WIDTH, 3), double(9, 5, 3), double(30, 2, 3))
    program = torch.export.export(rnn, (example,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},), strict=strict)
    assert_plain(program, sizes_known=False)
    assert len(program.graph.nodes) < 50
    for x in others:
        for index in (0, 1):
            expected = gradients(rnn, (x,), lambda result, index=index: result[index])
            actual = gradients(program.module(), (x,), lambda result, index=index: result[index])
            assert actual.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("strict", [False, True])
def test_an_mlp_exports_for_any_batch_and_with_leading_dimensions(strict):
    mlp = nn.OrthogonalFilterMLP(3, WIDTH, 30, 2, dtype=torch.float64)
    for example, others in (
        (double(WIDTH, 3), (double(7, 3), double(2, 3))),
        (double(2, WIDTH, 3), (double(4, 3, 3),)),
    ):
        dynamic = (dict.fromkeys(range(example.dim() - 1), Dim.DYNAMIC),)
        program = torch.export.export(mlp, (example,), dynamic_shapes=dynamic, strict=strict)
        for x in (example, *others):
            expected, actual = gradients(mlp, (x,)), gradients(program.module(), (x,))
            assert len(actual) == 1 + 6
            for name, gradient in expected.items():
                torch.testing.assert_close(actual[name], gradient)


def test_the_state_keeps_float32_under_autocast():
    """This holds for exports and for requests of the reference: bfloat16 matmuls would be wrong in the third digit."""
    module, h0 = Recurrence(convert(FORMS["per layer"]()[0], torch.float32)), torch.randn(ROWS, WIDTH)
    expected = module(h0)
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(module, (h0,))
        with lcw_ops.use_backend("reference"):
            torch.testing.assert_close(module(h0), expected)
    assert targets(program)["scan"] == 1
    torch.testing.assert_close(program.module()(h0), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_the_state_keeps_float32_under_an_autocast_that_the_program_itself_enters(strict):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrence = Recurrence(convert(make_arguments(), torch.float32))

        def forward(self, h0):
            with torch.autocast("cpu", torch.bfloat16):
                return self.recurrence(h0)

    module, h0 = Mixed(), torch.randn(ROWS, WIDTH)
    program = torch.export.export(module, (h0,), strict=strict)
    exact = copy.deepcopy(module.recurrence).double()(h0.double())
    # In bfloat16 the error would be 5e-3 and more.
    torch.testing.assert_close(program.module()(h0), exact.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["per layer", "shared weight and bias", "scales trained", "scales per step"])
def test_plain_tensor_attributes_export(form, strict):
    """Unlike parameters and buffers, torch.export keeps such tensors as they are, with their data."""
    arguments, options = FORMS[form]()

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = list(arguments)
            for name, argument in arguments.items():
                setattr(self, name, argument)

        def forward(self, h0):
            return F.orthogonal_filter(h0, **{name: getattr(self, name) for name in self.plain}, **options)

    module, h0 = Plain(), double(ROWS, WIDTH)
    program = torch.export.export(module, (h0,), strict=strict)
    assert_plain(program)
    assert targets(program)["scan"] == 1
    torch.testing.assert_close(program.module()(h0), module(h0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("return_states", [False, True])
def test_zero_steps_export(return_states):
    arguments = make_arguments(weight=double(0, WIDTH, WIDTH), bias=None, alpha=0.5, beta=0.5)
    module, h0 = Recurrence(arguments, return_states=return_states), double(ROWS, WIDTH)
    program = torch.export.export(module, (h0,))
    assert_plain(program)
    torch.testing.assert_close(program.module()(h0), h0[None] if return_states else h0, rtol=0, atol=0)


def test_a_request_for_a_backend_wins_over_the_scan():
    module, h0 = Recurrence(convert(FORMS["per layer"]()[0], torch.float32)), torch.randn(ROWS, WIDTH)
    with lcw_ops.use_backend("reference"):
        unrolled = targets(torch.export.export(module, (h0,)))
    assert "scan" not in unrolled
    assert unrolled["aten.tanh.default"] == STEPS
    with lcw_ops.use_backend("cpp"), torch.no_grad():
        fused = targets(torch.export.export(module, (h0,)))
    assert fused["lcw_ops.orthogonal_filter.cpp"] == 1


def test_a_request_that_would_lose_gradients_is_refused():
    module, h0 = Recurrence(convert(make_arguments(), torch.float32)), torch.randn(ROWS, WIDTH)
    way_out = r"backend 'cpp' was requested while exporting.*Export without the request.*torch\.no_grad"
    with lcw_ops.use_backend("cpp"):
        for export in (torch.export.export, torch.jit.trace):
            with pytest.raises(ValueError, match=way_out):
                export(module, (h0,))
        with pytest.raises(Exception, match=way_out):
            torch.export.export(module, (h0,), strict=True)
        torch.export.export(copy.deepcopy(module).requires_grad_(False), (h0,))
        torch.compile(module, backend="eager", fullgraph=True)(h0).sum().backward()
    assert module.weight.grad is not None


def test_compiled_programs_keep_the_fused_op():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    module, h0 = Recurrence(convert(FORMS["per layer"]()[0], torch.float32)), torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        torch.compile(module, backend=keep, fullgraph=True)(h0)
    (graph,) = graphs
    nodes = [node for inner in graph.modules() for node in getattr(getattr(inner, "graph", None), "nodes", ())]
    assert any("lcw_ops" in str(node.target) for node in nodes)
    assert not any("scan" in str(node.target) for node in nodes)


def test_a_wrong_call_is_refused_while_exporting():
    module = Recurrence(convert(make_arguments(), torch.float32))
    with pytest.raises(Exception, match=r"h0 has shape \(3, 5\)|weight has shape"):
        torch.export.export(module, (torch.randn(3, 5),))


LOADER = """
import sys, torch
program = torch.export.load(sys.argv[1])
assert not any(name.split(".")[0] == "lcw_ops" for name in sys.modules)
with torch.no_grad():
    torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_50_000_layers_are_a_small_file_that_runs_without_this_package(tmp_path):
    mlp = nn.OrthogonalFilterMLP(3, 2, 50_000, 2)
    x = torch.randn(5, 3)
    before = time.perf_counter()
    program = torch.export.export(mlp, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert time.perf_counter() - before < 10
    assert count_nodes(program) < 50
    assert_plain(program, sizes_known=False)
    torch.export.save(program, tmp_path / "mlp.pt2")
    torch.save(x[:4], tmp_path / "x.pt")
    weights = sum(tensor.nbytes for tensor in mlp.state_dict().values())
    assert (tmp_path / "mlp.pt2").stat().st_size < weights + 2**17
    paths = [str(tmp_path / name) for name in ("mlp.pt2", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", LOADER, *paths], check=True)
    actual = torch.load(tmp_path / "y.pt")
    exact = copy.deepcopy(mlp).double()(x[:4].double()).detach()
    with lcw_ops.use_backend("reference"), torch.no_grad():
        eager = mlp(x[:4])
    assert_as_exact_as_eager("output", actual, eager, exact)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def run_onnx(path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    results = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [torch.from_numpy(result) for result in results]


@needs_onnx
def test_50_000_layers_are_one_scan_in_onnx(tmp_path):
    mlp = nn.OrthogonalFilterMLP(3, 2, 50_000, 2).eval()
    x = torch.randn(5, 3)
    program = torch.onnx.export(mlp, (x,), dynamo=True, dynamic_shapes=({0: Dim.DYNAMIC},), verbose=False)
    operators = Counter(node.op_type for node in program.model.graph)
    assert operators["Scan"] == 1
    assert operators.total() < 20
    program.save(tmp_path / "mlp.onnx")
    for rows in (5, 1, 9):
        x = torch.randn(rows, 3)
        (actual,) = run_onnx(tmp_path / "mlp.onnx", (x,))
        exact = copy.deepcopy(mlp).double()(x.double()).detach()
        with lcw_ops.use_backend("reference"), torch.no_grad():
            eager = mlp(x)
        assert_as_exact_as_eager("output", actual, eager, exact)


ONNX_MODULES = {
    "mlp, permutation, float64": lambda: nn.OrthogonalFilterMLP(
        3, WIDTH, 20, 2, filter="permutation", dtype=torch.float64
    ),
    "mlp, float16": lambda: nn.OrthogonalFilterMLP(3, WIDTH, 20, 2, dtype=torch.float16),
    "mlp, filter and scales per layer": lambda: nn.OrthogonalFilterMLP(
        3, WIDTH, 20, 2, filter=orthogonal(20, WIDTH, WIDTH), alpha=torch.rand(20), beta=torch.rand(20)
    ),
    "mlp, parallel": lambda: nn.OrthogonalFilterMLP(3, WIDTH, 20, 2, solver="parallel", activation="relu"),
    "rnn": lambda: nn.OrthogonalFilterRNN(3, WIDTH, length=20),
    "rnn, permutation": lambda: nn.OrthogonalFilterRNN(
        3, WIDTH, length=20, filter="permutation", bias=False, batch_first=True, activation="sigmoid"
    ),
}


@needs_onnx
@pytest.mark.parametrize("name", ONNX_MODULES)
def test_onnxruntime_gives_torchs_numbers(name, tmp_path):
    module = ONNX_MODULES[name]().eval()
    dtype = next(module.parameters()).dtype
    dims = 2 if name.startswith("mlp") else 3
    example = torch.randn(*(6, 4)[: dims - 1], 3, dtype=dtype)
    dynamic = (dict.fromkeys(range(dims - 1), Dim.DYNAMIC),)
    program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert Counter(node.op_type for node in program.model.graph)["Scan"] == 1
    program.save(tmp_path / "module.onnx")
    for x in (example, torch.randn(*(9, 2)[: dims - 1], 3, dtype=dtype)):
        with torch.no_grad():
            expected = module(x)
        results = run_onnx(tmp_path / "module.onnx", (x,))
        for actual, tensor in zip(results, expected if dims == 3 else (expected,), strict=True):
            # The first state and the result are rounded. onnxruntime's tanh has float32's precision in float64 too.
            digits = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            scale = max(1.0, tensor.abs().max().item())
            torch.testing.assert_close(actual, tensor, rtol=0, atol=4 * digits * scale)


@needs_onnx
def test_the_scales_keep_all_digits_of_float64_in_onnx(tmp_path):
    """alpha = 1 - 1/50,000 in float32 would be off by 1.6e-8 per layer, 8e-4 in all."""
    module = Recurrence(make_arguments(weight=torch.zeros(1000, 1, 1).double(), bias=None, filter=torch.arange(1)))
    module.alpha, module.beta, module.names = 1 - 1 / 50_000, 1 / 50_000, [*module.names, "alpha", "beta"]
    module.options["activation"] = "identity"
    h0 = torch.ones(2, 1, dtype=torch.float64)
    torch.onnx.export(module, (h0,), dynamo=True, verbose=False).save(tmp_path / "module.onnx")
    (actual,) = run_onnx(tmp_path / "module.onnx", (h0,))
    torch.testing.assert_close(actual, h0 * (1 - 1 / 50_000) ** 1000, rtol=1e-12, atol=0)


@needs_onnx
def test_the_torchscript_exporter_unrolls_up_to_256_steps(tmp_path):
    mlp, x = nn.OrthogonalFilterMLP(3, WIDTH, 40, 2).eval(), torch.randn(5, 3)
    path = str(tmp_path / "mlp.onnx")
    torch.onnx.export(mlp, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    for rows in (5, 8):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(run_onnx(path, (x,))[0], mlp(x).detach())
    deep = nn.OrthogonalFilterMLP(3, WIDTH, 257, 2).eval()
    with pytest.raises(ValueError, match=r"257 steps.*torch.export"):
        torch.onnx.export(deep, (x,), path, dynamo=False)


# ---- torch.jit.trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 256])
@pytest.mark.parametrize("options", [{}, {"filter": "permutation", "solver": "parallel"}], ids=str)
def test_a_trace_has_the_values_and_gradients_of_the_module(steps, options):
    mlp = nn.OrthogonalFilterMLP(3, WIDTH, steps, 2, dtype=torch.float64, **options)
    rnn = nn.OrthogonalFilterRNN(3, WIDTH, length=steps, dtype=torch.float64, **options)
    for module, example, other, output_of in (
        (mlp, double(5, 3), double(8, 3), lambda result: result),
        (rnn, double(steps, 2, 3), double(steps, 6, 3), lambda result: torch.cat(result)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(module, (example,))
        for x in (example, other):
            expected, actual = gradients(module, (x,), output_of), gradients(traced, (x,), output_of)
            assert actual.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("kind", ["mlp", "rnn"])
def test_a_trace_of_256_steps_has_the_values_of_the_module(kind):
    module, x = {
        "mlp": (nn.OrthogonalFilterMLP(3, WIDTH, 256, 2), torch.randn(5, 3)),
        "rnn": (nn.OrthogonalFilterRNN(3, WIDTH, length=256), torch.randn(256, 2, 3)),
    }[kind]
    torch.testing.assert_close(torch.jit.trace(module, (x,), check_trace=False)(x), module(x))


def test_a_trace_of_more_than_256_steps_is_refused():
    for module, x in (
        (nn.OrthogonalFilterMLP(3, WIDTH, 257, 2), torch.randn(5, 3)),
        (nn.OrthogonalFilterRNN(3, WIDTH, length=257), torch.randn(257, 2, 3)),
    ):
        with pytest.raises(ValueError, match=r"257 steps.*at most 256 steps\. Use torch\.export\.export"):
            torch.jit.trace(module, (x,))


# ---- torch.fx and the protocol ---------------------------------------------------------------------------------------


def test_fx_records_one_call_for_an_mlp():
    mlp = nn.OrthogonalFilterMLP(3, WIDTH, 10, 2, alpha=torch.nn.Parameter(torch.tensor(0.9)), dtype=torch.float64)
    traced = torch.fx.symbolic_trace(mlp)
    assert [node.target for node in traced.graph.nodes].count(F.orthogonal_filter) == 1
    read = {node.target for node in traced.graph.nodes if node.op == "get_attr"}
    assert read == {"weight", "bias", "filter", "alpha"}
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for shape in ((5, 3), (3,), (2, 4, 3), (0, 3)):
            x = double(*shape)
            expected, actual = gradients(mlp, (x,)), gradients(module, (x,))
            assert actual.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_fx_records_one_call_for_an_rnn(batch_first):
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.OrthogonalFilterRNN(3, WIDTH, length=10, batch_first=batch_first, dtype=torch.float64)

        def forward(self, x):
            output, h_n = self.rnn(x)
            return output.sum() + h_n.square().sum()

    class IntoTheLayers(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    model = Reader()
    traced = torch.fx.GraphModule(model, IntoTheLayers().trace(model))
    assert [node.target for node in traced.graph.nodes].count(F.orthogonal_filter) == 1
    for shape in ((5, 2, 3), (7, 1, 3), (6, 3)):
        x = double(*shape)
        expected, actual = gradients(model, (x,)), gradients(traced, (x,))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    rnn = model.rnn
    alone, x, hx = torch.fx.symbolic_trace(rnn), double(5, 3), double(1, WIDTH)
    for actual, expected in zip(copy.deepcopy(alone)(x, hx), rnn(x, hx), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Logging(Tensor):
    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def logged(tensor: Tensor) -> Logging:
    return tensor.as_subclass(Logging)


CALLS = {
    "orthogonal_filter": lambda wrap: F.orthogonal_filter(
        torch.ones(2, 3), torch.ones(4, 3, 3), None, filter=wrap(torch.eye(3))
    ),
    "lcw_weight": lambda wrap: F.lcw_weight(wrap(torch.ones(2, 3))),
    "lcw_linear": lambda wrap: F.lcw_linear(torch.ones(2, 3), wrap(torch.rand(4, 3))),
    "activation_shift": lambda wrap: F.activation_shift(torch.ones(2, 3), wrap(torch.rand(4, 3)))[0],
    "hypersphere_direction": lambda wrap: F.hypersphere_direction(wrap(torch.ones(2, 3))),
    "hypersphere_angles": lambda wrap: F.hypersphere_angles(wrap(torch.ones(2, 3))),
    "normalize_scale": lambda wrap: F.normalize_scale(torch.ones(2, 3), scale=wrap(torch.ones(2))),
    "gmp_linear": lambda wrap: F.gmp_linear(
        torch.ones(2, 3), torch.ones(4, 2), torch.ones(4), location=wrap(torch.ones(4))
    ),
    "weight_norm_linear": lambda wrap: F.weight_norm_linear(torch.ones(2, 3), torch.ones(4, 3), wrap(torch.ones(4))),
}


@pytest.mark.parametrize("name", CALLS)
def test_tensor_subclasses_see_one_call_of_every_function(name):
    Logging.calls.clear()
    torch.manual_seed(1)
    result = CALLS[name](logged)
    assert Logging.calls.count(getattr(F, name)) == 1
    assert type(result) is Logging
    torch.manual_seed(1)
    torch.testing.assert_close(result.as_subclass(Tensor), CALLS[name](lambda tensor: tensor), rtol=0, atol=0)


def test_tensor_subclasses_see_one_call_of_gradient_activation():
    plain, tensors = torch.ones(3), [torch.ones(3), logged(torch.ones(3))]
    Logging.calls.clear()
    F.gradient_activation_(tensors)
    assert Logging.calls.count(F.gradient_activation_) == 1
    F.gradient_activation_([plain])
    for tensor in tensors:
        torch.testing.assert_close(tensor.as_subclass(Tensor), plain, rtol=0, atol=0)


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_module_call():
    mlp = nn.OrthogonalFilterMLP(3, WIDTH, 5, 2)
    with Seen() as seen:
        mlp(torch.randn(2, 3))
    assert seen.functions.count(F.orthogonal_filter) == 1


@pytest.mark.parametrize("tensors", [[torch.ones(3)], (torch.ones(3), torch.ones(2, 2))], ids=len)
def test_a_function_mode_sees_one_call_of_gradient_activation(tensors):
    expected, given = [tensor.clone() for tensor in tensors], type(tensors)(tensor.clone() for tensor in tensors)
    F.gradient_activation_(expected, "tanh", 0.2, 3.0)
    with Seen() as seen:
        F.gradient_activation_(given, "tanh", 0.2, 3.0)
    assert seen.functions.count(F.gradient_activation_) == 1
    for actual, tensor in zip(given, expected, strict=True):
        torch.testing.assert_close(actual, tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function", [lambda a, b: F.gradient_activation_(a), lambda a, b: F.gradient_activation_([a], beta=b)]
)
def test_fx_records_one_call_of_gradient_activation(function):
    traced = torch.fx.symbolic_trace(function)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [F.gradient_activation_]


def test_overridable_functions_keep_their_signature():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert list(inspect.signature(F.lcw_linear).parameters) == ["x", "weight", "bias", "basis"]
    torch.testing.assert_close(F.lcw_linear(weight=weight, x=x), F.lcw_linear(x, weight, None, False), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"lcw_linear\(\) missing 1 required positional argument: 'weight'"):
        F.lcw_linear(x)
    assert pickle.loads(pickle.dumps(F.lcw_linear)) is F.lcw_linear


def test_a_call_imports_neither_exporters_nor_the_compiler():
    code = (
        "import sys, torch, lcw_ops\n"
        "before = set(sys.modules)\n"
        "lcw_ops.nn.OrthogonalFilterMLP(3, 4, 5, 2)(torch.randn(2, 3)).sum().backward()\n"
        "heavy = ('torch.onnx', 'torch._dynamo', 'triton')\n"
        "new = {name for name in set(sys.modules) - before if name.startswith(heavy)}\n"
        "assert not new, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Input and output layers that users replace ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_of_the_linear_layers():
    mlp, x = nn.OrthogonalFilterMLP(3, WIDTH, 10, 2).eval(), torch.randn(5, 3)
    quantized = torch.ao.quantization.quantize_dynamic(mlp, {torch.nn.Linear})
    assert callable(quantized.input_layer.weight)
    expected = mlp(x)
    # Two layers are rounded to 8 bits.
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=2 * 2**-7 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_a_dynamically_quantized_net_is_profiled():
    """The output layer of a quantized net passes no gradient back."""
    mlp, x = nn.OrthogonalFilterMLP(3, WIDTH, 10, 2).eval(), torch.randn(5, 3)
    quantized = torch.ao.quantization.quantize_dynamic(mlp, {torch.nn.Linear})
    plain, report = (lcw_ops.profile.profile(model, x, jacobian=False) for model in (mlp, quantized))
    # The first and last rows are the input and output layers. The states between depend on one layer of 8 bits.
    assert report.columns["name"].tolist() == plain.columns["name"].tolist()
    expected, actual = plain.columns["state_rms"][1:-1], report.columns["state_rms"][1:-1]
    assert actual.shape == (10,)
    assert abs(actual - expected).max() <= 2**-7 * expected.max()
    assert set(report.reasons_of("gradient_norm")) == {
        "it requires no gradient: nothing that is trained comes before it",
        "the loss does not depend on it",
    }
    assert "the output does not depend on the input" in lcw_ops.profile.profile(quantized, x).absent["input -> output"]


class Wrapped(torch.nn.Module):
    """Like an adapter, it takes any dtype and casts by itself. The dtypes of its weight and its output differ."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x.to(self.inner.weight.dtype))


def test_an_input_layer_that_casts_by_itself_decides_what_it_takes():
    mlp = nn.OrthogonalFilterMLP(3, WIDTH, 10, 2)
    mlp.input_layer = Wrapped(mlp.input_layer)
    x = torch.randn(5, 3)
    torch.testing.assert_close(mlp(x.double()), mlp(x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), TypeError, r"OrthogonalFilterMLP: input is torch\.float64"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, r"OrthogonalFilterMLP: input is torch\.int64"),
        (torch.zeros(2, 4), ValueError, r"OrthogonalFilterMLP: input has shape \(2, 4\); expected \(\*, 3\)"),
        (torch.zeros(()), ValueError, r"OrthogonalFilterMLP: input has shape \(\)"),
        ([1.0], TypeError, "OrthogonalFilterMLP: input is a list"),
    ],
    ids=str,
)
def test_the_module_refuses_in_its_own_words_an_input_that_its_input_layer_refuses(x, error, message):
    with pytest.raises(error, match=message):
        nn.OrthogonalFilterMLP(3, WIDTH, 5, 2)(x)


def test_the_profile_of_a_replaced_layer_uses_its_own_forward():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp, x = nn.OrthogonalFilterMLP(3, WIDTH, 5, 2, dtype=torch.float64), double(4, 3)
    replaced = copy.deepcopy(mlp)
    replaced.output_layer.__class__ = Doubled
    plain, doubled = (
        lcw_ops.profile.profile(model, x).jacobians["input -> output"].largest for model in (mlp, replaced)
    )
    torch.testing.assert_close(doubled, 2 * plain)


class Activated(torch.nn.Module):
    def forward(self, gradient):
        activated = gradient.clone()
        F.gradient_activation_([activated], "tanh", 0.5, 3.0)
        return activated


def test_activated_gradients_are_traced_and_exported():
    """torch.jit.trace would drop a call that returns nothing, so it is given torch's own operators to record."""
    gradient = torch.randn(4, 3)
    exported = torch.export.export(Activated(), (gradient,))
    assert not [node for node in exported.graph.nodes if "lcw_ops" in str(node.target)]
    for program in (torch.jit.trace(Activated(), gradient), exported.module()):
        other = torch.randn(4, 3)
        torch.testing.assert_close(program(other), 0.5 * torch.tanh(3.0 * other))


def test_a_request_for_a_backend_holds_for_activated_gradients():
    with lcw_ops.use_backend("cpp"):
        exported = targets(torch.export.export(Activated(), (torch.randn(4, 3),)))
    assert [name for name in exported if "lcw_ops" in name] == ["lcw_ops.gradient_activation_.cpp"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("solver", ["sequential", "parallel", "auto"])
def test_a_request_for_the_reference_keeps_every_gradient(solver, strict):
    mlp, x = nn.OrthogonalFilterMLP(3, 8, 20, 2, solver=solver), torch.randn(4, 3)
    with lcw_ops.use_backend("reference"):
        module = torch.export.export(mlp, (x,), strict=strict).module()
    torch.testing.assert_close(module(x), mlp(x))
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_an_export_names_an_input_of_a_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=f"OrthogonalFilterMLP: input is {dtype}"):
        torch.export.export(nn.OrthogonalFilterMLP(3, 8, 20, 2), (torch.ones(4, 3).to(dtype),))


class PlainSubclass(torch.Tensor):
    """A subclass that overrides no call."""


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LCWLinear(3, 5),
        lambda: nn.GmPLinear(3, 5),
        lambda: nn.WeightNormLinear(3, 5),
        lambda: nn.OrthogonalFilterMLP(3, 8, 20, 2),
    ],
)
def test_compiled_modules_take_subclasses(make, fullgraph):
    torch._dynamo.reset()
    module, x = make(), torch.randn(4, 3)
    compiled = torch.compile(module, backend="eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x.as_subclass(PlainSubclass)).as_subclass(Tensor), module(x))


def test_compiled_modules_take_dynamic_shapes():
    torch._dynamo.reset()
    mlp = nn.OrthogonalFilterMLP(3, 8, 20, 2)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(compiled(x), mlp(x))
