"""LCW, weight-norm and GmP layers in programs: torch.export, ONNX, torch.jit.trace, torch.fx.

An exported program consists of torch's own operators, so it runs in a process without this package.
"""

import copy
import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from support.constrained_layers import every_layer
from support.numerics import assert_as_exact_as_eager
from torch.export import Dim

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import nn
from lcw_ops._layer_kinds import is_linear

EPS = 2**-23
# The 2d convolutions stand for all convolutions where an export takes seconds.
LAYERS = [index for index, (layer, x) in enumerate(every_layer()) if x.dim() in (2, 4)]

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (lcw-ops[hosts])")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:Exporting a model while it is in training mode",
)


@pytest.fixture(autouse=True)
def _quiet():
    """Disable logging: torch's compiler and exporters log thousands of records, which pytest would keep."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def operators(program) -> set[str]:
    """Every operator in the program's graph."""
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def assert_plain(program) -> None:
    names = operators(program)
    assert names
    assert all(name.startswith("aten.") and "assert" not in name for name in names), names
    for node in program.graph.nodes:
        if node.op == "call_function" and "sym_size" not in str(node.target):
            assert isinstance(node.meta["val"], torch.Tensor), node.target


@pytest.mark.parametrize(
    ("index", "strict"),
    [*((index, False) for index in range(len(every_layer()))), *((index, True) for index in LAYERS)],
)
def test_every_layer_exports_as_torchs_operators_with_its_gradients(index, strict):
    layer, x = every_layer()[index]
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=strict)
    assert_plain(program)
    other = torch.randn(7, *x.shape[1:])
    module = program.module()
    actual, expected = module(other), layer(other)
    # At most 2 x 18 products below 5 x 10 are summed in two orders.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * 18 * 50 * EPS)
    grad_output = torch.randn_like(expected)
    gradients = dict(
        zip(
            dict(layer.named_parameters()),
            torch.autograd.grad(expected, [*layer.parameters()], grad_output),
            strict=True,
        )
    )
    actual.backward(grad_output)
    for name, parameter in module.named_parameters():
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_exports(dtype):
    for layer, x in every_layer(dtype=dtype):
        layer.eval()
        program = torch.export.export(layer, (x.to(dtype),))
        assert_plain(program)
        with torch.no_grad():
            actual = program.module()(x.to(dtype))
            exact = copy.deepcopy(layer).double()(x.to(dtype).double())
            with lcw_ops.use_backend("reference"):
                eager = layer(x.to(dtype))
        assert actual.dtype == dtype
        if dtype != torch.float64:
            assert_as_exact_as_eager(type(layer).__name__, actual, eager, exact)


def test_a_layer_whose_weight_is_kept_exports_its_parameters():
    """In eval mode without gradients a kept weight would become a constant of the program."""
    for layer, x in every_layer():
        layer.eval()
        with torch.no_grad():
            layer(x)
            program = torch.export.export(layer, (x,))
            names = {spec.target for spec in program.graph_signature.input_specs if spec.target}
            assert names == set(layer.state_dict()) - {"angles"} | ({"angles"} & set(dict(layer.named_parameters())))
            assert not program.constants


def test_a_request_for_a_backend_wins():
    layer, x = nn.LCWLinear(6, 5), torch.randn(4, 6)
    with lcw_ops.use_backend("cpp"):
        program = torch.export.export(layer, (x,))
    assert any("lcw_ops" in name for name in operators(program))


def test_compiled_programs_keep_the_fused_ops():
    for layer, x in ((nn.LCWLinear(6, 5), torch.randn(4, 6)), (nn.WeightNormLinear(6, 5), torch.randn(4, 6))):
        graphs = []

        def keep(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph

        torch.compiler.reset()
        torch.compile(layer, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep), fullgraph=True)(x)
        assert any("lcw_ops" in str(node.target) for graph in graphs for node in graph.graph.nodes)


LOADER = """
import sys, torch
program = torch.export.load(sys.argv[1])
torch.save([module(x) for module, x in [(program.module(), torch.load(sys.argv[2]))]], sys.argv[3])
assert not any(name.startswith("lcw_ops") for name in sys.modules)
"""


def test_a_loaded_program_runs_without_this_package(tmp_path):
    class All(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = torch.nn.ModuleList(layer for layer, _ in every_layer() if is_linear(layer))
            self.convolutions = torch.nn.ModuleList(layer for layer, _ in every_layer() if not is_linear(layer))

        def forward(self, x):
            y = x.flatten(1)[:, :4, None]
            images = {1: x[:, :4], 2: x[:, :4, :, None].expand(-1, -1, -1, 5), 3: x[:, :4, :, None, None]}
            images[3] = images[3].expand(-1, -1, -1, 5, 5)
            outputs = [layer(x[:, :, 0]).sum(1) for layer in self.linears]
            outputs += [layer(images[len(layer.kernel_size)]).flatten(1).sum(1) for layer in self.convolutions]
            return torch.stack(outputs) + y.sum() * 0

    model, x = All().eval(), torch.randn(3, 6, 5)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save(x, tmp_path / "x.pt")
    paths = [str(tmp_path / name) for name in ("model.pt2", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", LOADER, *paths], check=True)
    actual, expected = torch.load(tmp_path / "y.pt")[0], model(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=6 * 125 * 2 * 18 * 50 * EPS)


@needs_onnx
@pytest.mark.parametrize("index", LAYERS)
def test_onnxruntime_gives_torchs_numbers(index, tmp_path):
    import onnxruntime

    layer, x = every_layer()[index]
    program = torch.onnx.export(layer.eval(), (x,), dynamo=True, dynamic_shapes=({0: Dim.DYNAMIC},), verbose=False)
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for rows in (2, 5):
        other = torch.randn(rows, *x.shape[1:])
        actual = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(actual, layer(other), rtol=0, atol=2 * 18 * 50 * EPS)


def test_a_trace_has_the_values_and_gradients_of_the_layer():
    for layer, x in every_layer():
        traced = torch.jit.trace(layer, x)
        expected = layer(x)
        torch.testing.assert_close(traced(x), expected, rtol=0, atol=2 * 18 * 50 * EPS)
        gradients = torch.autograd.grad(traced(x).sum(), [*traced.parameters()])
        for actual, gradient in zip(gradients, torch.autograd.grad(expected.sum(), [*layer.parameters()]), strict=True):
            torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("make", "function"),
    [
        (lambda: nn.LCWLinear(6, 5), F.lcw_linear),
        (lambda: nn.LCWLinear(6, 5, basis=True), F.lcw_linear),
        (lambda: nn.WeightNormLinear(6, 5), F.weight_norm_linear),
        (lambda: nn.GmPLinear(6, 5, activation="relu"), F.gmp_linear),
    ],
)
def test_fx_records_one_call(make, function):
    layer, x = make(), torch.randn(4, 6)
    traced = torch.fx.symbolic_trace(layer)
    calls = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert calls == [function]
    assert torch.equal(traced(x), layer(x))


def test_fx_traces_code_that_reads_the_weight():
    class Tied(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.nn.functional.linear(x, self.layer.weight, self.layer.bias)

    relu = nn.GmPLinear(6, 5, activation="relu")
    torch.fx.symbolic_trace(Tied(relu))
    for layer, x in every_layer():
        traced = torch.fx.symbolic_trace(Tied(layer) if is_linear(layer) else layer)
        for _ in range(2):
            torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=2 * 18 * 50 * EPS)
            with torch.no_grad():
                next(layer.parameters()).mul_(-1.5)
