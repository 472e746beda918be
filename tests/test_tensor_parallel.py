"""ColwiseParallel and RowwiseParallel, and the functions of the linear layers on DTensors: as in one process.

Run as a script, this file is one of four processes (gloo), which form a mesh of four, and one of two by two. Tests of
single calls use a mesh of one process, this one.
"""

import copy
import os
import re
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.utils import parametrize, prune

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import nn as lcw
from lcw_ops.distributed import ColwiseParallel, RowwiseParallel

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 4
SIZES = (2, 4)
TIMEOUT = 240
STEPS = 3

# Five hidden units: over two ranks 3 and 2, over four ranks 2, 2, 1 and none.
INPUTS, HIDDEN, OUTPUTS = 6, 5, 3
UP = {
    "lcw": lambda: lcw.LCWLinear(INPUTS, HIDDEN),
    "lcw basis": lambda: lcw.LCWLinear(INPUTS, HIDDEN, basis=True),
    "weight norm": lambda: lcw.WeightNormLinear(INPUTS, HIDDEN),
    "gmp": lambda: lcw.GmPLinear(INPUTS, HIDDEN),
    "gmp relu, no bias": lambda: lcw.GmPLinear(INPUTS, HIDDEN, "relu", bias=False),
    "plain": lambda: nn.Linear(INPUTS, HIDDEN),
}
DOWN = {
    "lcw": lambda: lcw.LCWLinear(HIDDEN, OUTPUTS),
    "weight norm": lambda: lcw.WeightNormLinear(HIDDEN, OUTPUTS),
    "lcw, no bias": lambda: lcw.LCWLinear(HIDDEN, OUTPUTS, bias=False),
    "plain": lambda: nn.Linear(HIDDEN, OUTPUTS),
}
BLOCKS = [(up, down, torch.float64) for up in UP for down in DOWN if (up, down) != ("plain", "plain")]
BLOCKS += [(up, down, torch.float32) for up, down in zip(UP, [*DOWN, "lcw", "weight norm"], strict=True)]


def make_block(up, down, dtype):
    """An MLP block between plain layers, which the plan leaves alone or gives to torch's styles."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, INPUTS), nn.Tanh(), UP[up](), nn.Tanh(), DOWN[down](), nn.Linear(OUTPUTS, 2))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.to(dtype)


PLAN = {"2": lambda: ColwiseParallel(use_local_output=False), "4": lambda: RowwiseParallel()}


def train(block, dtype):
    """Losses, outputs, first gradients and last parameters of a few steps of SGD, as plain tensors."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    found = {}
    for step in range(STEPS):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        output = block(x)
        loss = output.square().mean()
        loss.backward()
        found[f"output {step}"], found[f"loss {step}"] = output.detach(), loss.detach()
        for name, parameter in block.named_parameters():
            found[f"{name}.grad {step}"] = whole(parameter.grad)
        optimizer.step()
    for name, parameter in block.named_parameters():
        found[name] = whole(parameter)
    for index in (2, 4):
        found[f"{index}.applied weight"] = whole(
            block[index].effective_weight() if hasattr(block[index], "radius") else block[index].weight
        )
    with torch.no_grad():
        found["eval"] = block.eval()(x)
    return found


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_as_exact(found, eager, exact, operations):
    """At most twice eager's error, plus the rounding of a sum of so many products of the result's scale."""
    assert found.keys() == exact.keys()
    for name, right in exact.items():
        actual = found[name]
        assert actual.dtype == eager[name].dtype, name
        assert actual.shape == right.shape, name
        assert actual.isfinite().all(), name
        if not right.numel():
            continue
        allowed = 2 * (eager[name].double() - right).abs().max()
        allowed += operations * torch.finfo(actual.dtype).eps * max(right.abs().max(), 1.0)
        error = (actual.double() - right).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


# ---- Over processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(__file__, tmp_path_factory.mktemp("gloo"), [0] * PROCESSES, TIMEOUT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("up", "down", "dtype"), BLOCKS)
def test_a_block_trains_as_in_one_process(found, up, down, dtype, size):
    eager = train(make_block(up, down, dtype), dtype)
    exact = train(make_block(up, down, dtype).double(), torch.float64)
    assert exact["2.applied weight"].abs().max() > 0
    for rank in range(PROCESSES):
        # A step chains six layers' sums of at most eight products, forward and backward.
        assert_as_exact(found[rank][up, down, dtype, size], eager, exact, 2 * 6 * 8 * STEPS)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree_to_the_last_bit(found, size):
    for up, down, dtype in BLOCKS:
        first = found[0][up, down, dtype, size]
        for rank in range(1, size):
            for name, tensor in found[rank][up, down, dtype, size].items():
                assert torch.equal(tensor, first[name]), (up, down, name)


def make_function_cases():
    """Every function with its arguments: x, the rows, and the vectors of one number per unit."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(3, 5, 7)
    return {
        "lcw_linear": (lambda x, w, b: F.lcw_linear(x, w, b), [x, draw(5, 7), draw(5)]),
        "lcw_linear, basis": (lambda x, w, b: F.lcw_linear(x, w, b, True), [x, draw(5, 6), draw(5)]),
        "weight_norm_linear": (F.weight_norm_linear, [x, draw(5, 7), draw(5), draw(5)]),
        "weight_norm_linear, (n, 1)": (lambda x, w, g: F.weight_norm_linear(x, w, g), [x, draw(5, 7), draw(5, 1)]),
        "gmp_linear": (lambda *given: F.gmp_linear(*given, "relu"), [x, draw(5, 6), draw(5), draw(5)]),
        "lcw_weight": (F.lcw_weight, [None, draw(5, 7)]),
        "lcw_weight, filters": (F.lcw_weight, [None, draw(5, 3, 2)]),
        "lcw_weight, basis": (lambda w: F.lcw_weight(w, True), [None, draw(5, 6)]),
        "normalize_scale": (F.normalize_scale, [None, draw(5, 7), draw(5)]),
        "hypersphere_direction": (F.hypersphere_direction, [None, draw(5, 6)]),
        "hypersphere_angles": (F.hypersphere_angles, [None, draw(5, 6)]),
    }


# Placements of x, rows, vectors and the result on a mesh of two by two.
SAME, UNITS = (Replicate(), Replicate(), Replicate(), Replicate()), (Replicate(), Shard(0), Shard(0), Shard(2))
SAMPLES, STEPS_OF_X = (Shard(0), Replicate(), Replicate(), Shard(0)), (Shard(1), Replicate(), Replicate(), Shard(1))
FAN_IN = (Shard(2), Shard(1), Replicate(), Partial())
MESHES = {
    "samples, units": (SAMPLES, UNITS),
    "units, samples": (UNITS, STEPS_OF_X),
    "samples, samples": (SAMPLES, STEPS_OF_X),
    "units, units": (UNITS, UNITS),
    "same, units": (SAME, UNITS),
    "samples, fan-in": (SAMPLES, FAN_IN),
    "fan-in, units": (FAN_IN, UNITS),
    "fan-in, fan-in": (FAN_IN, FAN_IN),
    "units, fan-in": (UNITS, FAN_IN),
}
NEED_WHOLE_ROWS = (
    "lcw_linear, basis",
    "gmp_linear",
    "lcw_weight, basis",
    "hypersphere_direction",
    "hypersphere_angles",
)


def takes(name, mesh):
    return not ("fan-in" in mesh and name in NEED_WHOLE_ROWS)


def run_function(function, arguments):
    leaves = [tensor.detach().requires_grad_() for tensor in arguments if tensor is not None]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(6)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    if isinstance(output, DTensor):
        grad_output = distribute_tensor(grad_output, output.device_mesh, [Replicate()] * output.device_mesh.ndim)
        output.redistribute(placements=grad_output.placements).backward(grad_output)
    else:
        output.backward(grad_output)
    return {"output": whole(output), **{str(i): whole(leaf.grad) for i, leaf in enumerate(leaves)}}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", make_function_cases())
def test_a_function_on_a_mesh_of_two_by_two(found, name, mesh):
    function, arguments = make_function_cases()[name]
    right = run_function(function, arguments)
    for rank in range(PROCESSES):
        result = found[rank].get((name, mesh))
        assert (result is not None) == takes(name, mesh)
        if result is None:
            assert "needs whole rows" in found[rank][name, mesh, "error"]
        else:
            # Sums of at most 15 samples, 7 inputs and as many sums for the norm.
            assert_as_exact(result, right, right, 4 * 15 * 7)


def second_derivatives(function, arguments):
    """The gradients of a loss that holds the gradients of another."""
    leaves = [tensor.detach().requires_grad_() for tensor in arguments if tensor is not None]

    def total(tensor, power):
        if isinstance(tensor, DTensor):
            tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
        return tensor.pow(power).sum()

    gradients = torch.autograd.grad(total(function(*leaves), 3), leaves, create_graph=True)
    results = torch.autograd.grad(sum(total(gradient, 2) for gradient in gradients), leaves)
    return {str(i): whole(result) for i, result in enumerate(results)}


# Older versions have another backward pass of from_local, with which this is not tested.
HAS_SECOND_DERIVATIVES = torch.__version__ >= (2, 13)


@pytest.mark.skipif(not HAS_SECOND_DERIVATIVES, reason="second derivatives through DTensors need torch 2.13")
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", make_function_cases())
def test_second_derivatives_on_a_mesh_of_two_by_two(found, name, mesh):
    if not takes(name, mesh):
        return
    function, arguments = make_function_cases()[name]
    right = second_derivatives(function, arguments)
    for rank in range(PROCESSES):
        # As above, for a chain of three passes, whose sums may cancel to their largest term's rounding.
        largest = max(tensor.abs().max() for tensor in right.values())
        for key, tensor in right.items():
            error = (found[rank][name, mesh, "second"][key] - tensor).abs().max()
            assert error <= 3 * 4 * 15 * 7 * torch.finfo(torch.float64).eps * largest


def extreme_rows():
    """Rows of weight norm whose squares overflow or underflow in float32, a zero row, and rows with NaN and inf."""
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(7))
    rows = rows * torch.tensor([1e30, 1e-30, 0.0, 1.0, 1.0, 1.0])[:, None]
    rows[3, 4], rows[4, 0] = float("nan"), float("inf")
    return rows, torch.arange(1.0, 7.0)


def test_rows_of_any_length_that_are_split_over_ranks(found):
    rows, scale = extreme_rows()
    right = F.normalize_scale(rows, scale)
    for rank in range(PROCESSES):
        actual = found[rank]["extreme rows"]
        exact = F.normalize_scale(rows.double(), scale.double())
        finite = [0, 1, 2, 5]
        allowed = 2 * (right[finite] - exact[finite]).abs().max() + torch.finfo(torch.float32).eps * 6
        assert (actual[finite] - exact[finite]).abs().max() <= allowed
        assert (actual[2] == 0).all()
        assert torch.equal(actual[3].isnan(), right[3].isnan())
        assert actual[4, 0].isnan()
        assert right[4, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lcw", "weight norm"])
def test_a_split_layer_in_16_bits(found, name, dtype):
    layer, x = make_16_bits(name, dtype)
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    eager = layer(x).detach()
    for rank in range(PROCESSES):
        actual = found[rank]["16 bits", name, dtype]
        assert actual.dtype == dtype
        # Each of four ranks rounds its part, and the parts' sums are rounded three times.
        allowed = (
            2 * (eager.double() - exact).abs().max()
            + 7 * torch.finfo(dtype).eps * (x.double().abs() @ layer.weight.double().abs().T).max()
        )
        assert (actual.double() - exact).abs().max() <= allowed


def make_16_bits(name, dtype):
    torch.manual_seed(1)
    layer = {"lcw": lcw.LCWLinear, "weight norm": lcw.WeightNormLinear}[name](8, 4, bias=False)
    return layer.to(dtype), torch.randn(3, 8).to(dtype)


def test_state_dicts_hold_the_whole_layer(found):
    for rank in range(PROCESSES):
        for kind in UP:
            layer = make_block(kind, "plain", torch.float64)[2]
            state = found[rank]["state", kind]
            assert state.keys() == layer.state_dict().keys()
            for name, tensor in layer.state_dict().items():
                assert torch.equal(state[name], tensor)


def test_the_weight_of_a_split_layer_is_the_applied_one(found):
    for rank in range(PROCESSES):
        assert found[rank]["applied"] <= 1e-14
        assert found[rank]["gradient flows"]


@pytest.mark.parametrize("way", ["assigned", "folded"])
def test_a_rank_without_columns(found, way):
    layer, weight = make_narrow()
    right = {"assigned": weight, "folded": layer.weight.detach()}[way]
    for rank in range(PROCESSES):
        # A sum of two squares, a root and a division.
        error = (found[rank]["narrow", way] - right).abs().max()
        assert error <= 8 * torch.finfo(torch.float64).eps * right.abs().max()


def make_narrow():
    """A layer of two inputs, so that half of the ranks hold no column; and a weight for it."""
    torch.manual_seed(3)
    layer = lcw.WeightNormLinear(2, 3, dtype=torch.float64)
    return layer, torch.randn(3, 2, dtype=torch.float64)


# ---- A mesh of one process


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_styles_have_torchs_arguments():
    for style in (ColwiseParallel, RowwiseParallel):
        assert issubclass(style, ParallelStyle)
        made = style(input_layouts=Shard(0), output_layouts=Shard(1), use_local_output=False)
        assert repr(made) == (
            f"{style.__name__}(input_layouts={Shard(0)}, output_layouts={Shard(1)}, use_local_output=False)"
        )


def test_one_plan_serves_plain_layers_and_ours(mesh):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.up, self.down = lcw.GmPLinear(4, 6), lcw.WeightNormLinear(6, 4)
            self.plain_up, self.plain_down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, ids):
            h = self.embedding(ids)
            return self.plain_down(self.plain_up(self.down(self.up(h).relu())).relu())

    model, ids = Model(), torch.tensor([[1, 2], [3, 4]])
    right = model(ids)
    plan = {
        "embedding": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "plain_up": ColwiseParallel(),
        "plain_down": RowwiseParallel(),
    }
    actual = parallelize_module(model, mesh, plan)(ids)
    assert type(actual) is torch.Tensor
    assert torch.allclose(actual, right, rtol=0, atol=1e-6)
    assert isinstance(model.plain_up.weight, DTensor)
    assert model.embedding.weight.placements == (Shard(1),)


def test_every_tensor_of_a_layer_is_split_by_units(mesh):
    layers = [make() for make in UP.values()] + [lcw.GmPLinear(1, 4), lcw.LCWLinear(3, 4, bias=False)]
    for layer in layers:
        names = layer.state_dict().keys()
        layer.register_buffer("extra", torch.zeros(layer.out_features), persistent=False)
        if isinstance(layer, nn.Linear):
            continue
        made = parallelize_module(layer, mesh, ColwiseParallel())
        assert made is layer
        assert layer.state_dict().keys() == names
        for tensor in (*layer.parameters(), *layer.buffers()):
            assert tensor.placements == (Shard(0),)


def test_rowwise_splits_the_rows_and_replicates_the_rest(mesh):
    layer = parallelize_module(lcw.WeightNormLinear(1, 4), mesh, RowwiseParallel())
    placements = {name: tensor.placements[0] for name, tensor in layer.named_parameters()}
    assert placements == {"weight_v": Shard(1), "weight_g": Replicate(), "bias": Replicate()}


def test_frozen_parameters_stay_frozen(mesh):
    layer = lcw.LCWLinear(4, 3)
    layer.weight_u.requires_grad_(False)
    parallelize_module(layer, mesh, RowwiseParallel())
    assert not layer.weight_u.requires_grad
    assert layer.bias.requires_grad


def test_a_pruned_layer_stays_pruned(mesh):
    for style in (ColwiseParallel, RowwiseParallel):
        layer = lcw.LCWLinear(4, 4)
        prune.l1_unstructured(layer, "weight_u", 0.5)
        x = torch.randn(3, 4)
        right = layer(x)
        actual = parallelize_module(layer, mesh, style())(x)
        assert torch.allclose(actual, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("style", "make", "kind", "message"),
    [
        (RowwiseParallel, lambda: lcw.GmPLinear(4, 3), ValueError, "is a GmPLinear.*sines.*Use ColwiseParallel"),
        (RowwiseParallel, lambda: lcw.LCWLinear(4, 3, basis=True), ValueError, "basis=True.*or the centred form"),
        (RowwiseParallel, lambda: lcw.LCWConv1d(4, 3, 1), TypeError, "is a LCWConv1d; expected a linear layer"),
        (ColwiseParallel, lambda: lcw.GmPConv2d(4, 3, 1), TypeError, "is a GmPConv2d"),
        (ColwiseParallel, lambda: nn.LayerNorm(4), TypeError, "is a LayerNorm"),
        (ColwiseParallel, lambda: with_parametrization(), ValueError, "with a parametrization"),
        (RowwiseParallel, lambda: with_parametrization(), ValueError, "with a parametrization"),
        (ColwiseParallel, lambda: plain_with_weight_norm(), ValueError, "is a ParametrizedLinear with a param"),
        (RowwiseParallel, lambda: plain_with_weight_norm(), ValueError, "is a ParametrizedLinear with a param"),
    ],
)
def test_a_layer_that_cannot_be_split_is_refused_by_name(mesh, style, make, kind, message):
    layer = make()
    before = {name: type(tensor) for name, tensor in layer.named_parameters()}
    with pytest.raises(kind, match=f"^{style.__name__}: the module .*{message}"):
        parallelize_module(layer, mesh, style())
    assert {name: type(tensor) for name, tensor in layer.named_parameters()} == before


def with_parametrization():
    layer = lcw.LCWLinear(4, 3)
    parametrize.register_parametrization(layer, "weight_u", nn.Identity())
    return layer


def plain_with_weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


def make_tied(kind):
    torch.manual_seed(2)
    net = nn.Sequential(kind(4, 4), nn.Tanh(), kind(4, 4))
    name = next(net[0].named_parameters())[0]
    setattr(net[2], name, getattr(net[0], name))
    return net, name


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
@pytest.mark.parametrize("kind", [lcw.LCWLinear, lcw.WeightNormLinear])
def test_a_shared_parameter_stays_shared(mesh, kind, style):
    net, name = make_tied(kind)
    twin = copy.deepcopy(net)
    parallelize_module(net, mesh, {"0": style(), "2": style()})
    assert getattr(net[0], name) is getattr(net[2], name)
    assert net[0].bias is not net[2].bias
    x = torch.randn(3, 4)
    for module in (net, twin):
        module(x).square().sum().backward()
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        # Sums of 3 samples and 4 units, in two layers.
        allowed = 4 * 12 * torch.finfo(torch.float32).eps * other.grad.abs().max()
        assert (whole(one.grad) - other.grad).abs().max() <= allowed


def test_a_shared_parameter_that_would_be_split_in_two_ways_is_refused(mesh):
    net, name = make_tied(lcw.LCWLinear)
    with pytest.raises(ValueError, match=f"^RowwiseParallel: the module shares {name} with a layer that was split as"):
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert not isinstance(net[2].bias, DTensor)


@pytest.mark.parametrize("name", ["input_layouts", "output_layouts"])
def test_layouts_of_another_type_are_refused(name):
    with pytest.raises(TypeError, match=f"^RowwiseParallel: {name} is a tuple; expected a Placement"):
        RowwiseParallel(**{name: (Shard(0),)})


def test_an_input_by_keyword_is_refused(mesh):
    layer = parallelize_module(lcw.LCWLinear(4, 3), mesh, ColwiseParallel())
    with pytest.raises(TypeError, match=r"^LCWLinear: input is not the first argument"):
        layer(input=torch.ones(2, 4))


def test_a_mesh_of_two_dimensions_is_refused(mesh):
    with pytest.raises(ValueError, match="ColwiseParallel: device_mesh has 2 dimensions; expected one"):
        ColwiseParallel()._apply(lcw.LCWLinear(4, 3), init_device_mesh("cpu", (1, 1)))


REFUSED = {
    "a plain x": (None, [Shard(0)], [Shard(0)]),
    "a plain weight": ([Replicate()], None, [Shard(0)]),
    "a plain vector": ([Replicate()], [Shard(0)], None),
    "split features, whole rows": ([Shard(1)], [Replicate()], [Replicate()]),
    "a whole vector": ([Replicate()], [Shard(0)], [Replicate()]),
    "whole rows, split vectors": ([Replicate()], [Replicate()], [Shard(0)]),
    "samples and units": ([Shard(0)], [Shard(0)], [Shard(0)]),
    "split rows, whole features": ([Replicate()], [Shard(1)], [Replicate()]),
    "split rows, split vectors": ([Shard(1)], [Shard(1)], [Shard(0)]),
    "partial": ([Partial()], [Replicate()], [Replicate()]),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", ["lcw_linear", "weight_norm_linear", "gmp_linear"])
def test_placements_without_a_rule_are_refused(mesh, function, name):
    of_x, of_rows, of_vectors = REFUSED[name]

    def place(tensor, placements):
        if placements is None:
            return tensor
        return DTensor.from_local(tensor, mesh, placements, run_check=False)

    x, rows, vector = torch.randn(2, 4), torch.randn(3, 4 - (function == "gmp_linear")), torch.randn(3)
    given = [place(x, of_x), place(rows, of_rows), place(vector, of_vectors)]
    if function == "gmp_linear":
        given.append(given[-1])
    kind = TypeError if "a plain" in name else ValueError
    with pytest.raises(kind) as error:
        getattr(F, function)(*given)
    assert re.match(
        rf"{function}: (\w+ is a plain tensor|the DTensors are placed x as \(.*\)); expected", str(error.value)
    )


def test_weights_without_a_rule_are_refused(mesh):
    rows, scale = (DTensor.from_local(torch.ones(3, *more), mesh, [Shard(0)]) for more in ((4,), ()))
    whole_scale = DTensor.from_local(torch.ones(3), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"normalize_scale: the DTensors are placed weight as .* scale as"):
        F.normalize_scale(rows, whole_scale)
    with pytest.raises(TypeError, match="normalize_scale: scale is a plain tensor"):
        F.normalize_scale(rows, torch.ones(3))
    split = rows.redistribute(placements=[Shard(1)])
    for call in (
        lambda: F.lcw_weight(split, True),
        lambda: F.hypersphere_direction(split),
        lambda: F.hypersphere_angles(split),
    ):
        with pytest.raises(ValueError, match="needs whole rows"):
            call()
    assert F.normalize_scale(rows, scale).placements == (Shard(0),)


def test_wrong_shapes_are_refused_as_for_plain_tensors(mesh):
    x, weight, bias = (DTensor.from_local(torch.ones(*shape), mesh, [Replicate()]) for shape in ((2, 5), (3, 4), (4,)))
    with pytest.raises(ValueError, match=r"lcw_linear: x has shape \(2, 5\)"):
        F.lcw_linear(x, weight)
    with pytest.raises(ValueError, match=r"lcw_linear: bias has shape \(4,\)"):
        F.lcw_linear(x[:, :4], weight, bias)


def test_tensors_on_different_meshes_are_refused(mesh):
    other = init_device_mesh("cpu", (1, 1))
    x = DTensor.from_local(torch.ones(2, 4), other, [Replicate()] * 2)
    with pytest.raises(ValueError, match="is on the mesh"):
        F.lcw_linear(x, DTensor.from_local(torch.ones(3, 4), mesh, [Replicate()]))


@pytest.mark.parametrize("kind", [kind for kind in UP if kind != "plain"])
def test_an_assigned_weight_is_applied(mesh, kind):
    layer = parallelize_module(UP[kind](), mesh, ColwiseParallel())
    weight = torch.randn(HIDDEN, INPUTS)
    weight -= weight.mean(1, keepdim=True)
    layer.weight = distribute_tensor(weight, mesh, [Shard(0)])
    if kind == "gmp relu, no bias":
        assert (layer.radius.full_tensor() >= 0).all()
    # The constraint rounds a few sums of six numbers.
    assert (layer.weight.full_tensor() - weight).abs().max() <= 6 * 6 * torch.finfo(torch.float32).eps
    with pytest.raises((RuntimeError, TypeError), match="DTensor"):
        layer.weight = weight


def test_clipping_and_adamw(mesh):
    for kind in ("lcw", "weight norm", "gmp"):
        layer = UP[kind]()
        twin = parallelize_module(copy.deepcopy(layer), mesh, ColwiseParallel())
        for net in (layer, twin):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
            net(torch.ones(3, INPUTS)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
        for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, whole(other))


def test_autocast(mesh):
    for layer, style in ((lcw.LCWLinear(4, 3), RowwiseParallel), (lcw.WeightNormLinear(4, 3), ColwiseParallel)):
        x = torch.randn(2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            right = layer(x)
            actual = parallelize_module(layer, mesh, style())(x)
        assert actual.dtype == torch.bfloat16
        assert (actual - right).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * right.abs().max()


# ---- The processes


def run_process(rank, folder):
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    meshes = {2: square["tp"], 4: init_device_mesh("cpu", (4,))}
    results = {}
    for up, down, dtype in BLOCKS:
        for size, mesh in meshes.items():
            block = make_block(up, down, dtype)
            parallelize_module(block, mesh, {name: make() for name, make in PLAN.items()})
            results[up, down, dtype, size] = train(block, dtype)
    for name, (function, arguments) in make_function_cases().items():
        for mesh_name, patterns in MESHES.items():
            given = [
                None
                if tensor is None
                else distribute_tensor(tensor, square, [pattern[min(i, 2)] for pattern in patterns])
                for i, tensor in enumerate(arguments)
            ]
            try:
                results[name, mesh_name] = run_function(function, given)
                if HAS_SECOND_DERIVATIVES:
                    results[name, mesh_name, "second"] = second_derivatives(function, given)
            except ValueError as error:
                results[name, mesh_name, "error"] = str(error)
    rows, scale = extreme_rows()
    four = meshes[4]
    split = distribute_tensor(rows, four, [Shard(1)]), distribute_tensor(scale, four, [Replicate()])
    results["extreme rows"] = F.normalize_scale(*split).full_tensor()
    for name in ("lcw", "weight norm"):
        for dtype in (torch.bfloat16, torch.float16):
            layer, x = make_16_bits(name, dtype)
            parallelize_module(layer, four, RowwiseParallel(input_layouts=Replicate()))
            results["16 bits", name, dtype] = layer(x).detach()
    for kind in UP:
        layer = parallelize_module(make_block(kind, "plain", torch.float64)[2], four, ColwiseParallel())
        state = layer.state_dict()
        layer.load_state_dict(state)
        results["state", kind] = {key: whole(tensor) for key, tensor in state.items()}
    layer, weight = make_narrow()
    parallelize_module(layer, four, RowwiseParallel())
    results["narrow", "folded"] = whole(lcw_ops.fold(layer).model.weight)
    layer.weight = distribute_tensor(weight, four, [Shard(1)])
    results["narrow", "assigned"] = whole(layer.weight)
    layer, twin = (make_block("plain", "weight norm", torch.float64)[4] for _ in range(2))
    parallelize_module(layer, four, RowwiseParallel())
    results["applied"] = (layer.weight.full_tensor() - twin.weight).abs().max().item()
    layer.weight.sum().full_tensor().backward()
    twin.weight.sum().backward()
    results["gradient flows"] = torch.allclose(
        layer.weight_v.grad.full_tensor(), twin.weight_v.grad, rtol=0, atol=1e-14
    )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), sys.argv[-1])
