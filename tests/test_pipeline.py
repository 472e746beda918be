"""OrthogonalFilterMLP.stages: the modules are together the whole net, in one process and in a pipeline over processes.

Run as a script, this file is one of four processes (gloo), which form two pipelines of two stages and one of four. The
folder's name is the depth of the net.
"""

import copy
import io
import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.processes import run_ranks
from torch import nn
from torch.nn.utils import parametrize, prune

from lcw_ops.nn import OrthogonalFilterMLP

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 4
SIZES = (2, 4)
TIMEOUT = 300
SAMPLES, MICROBATCHES = 8, 4
SCHEDULES = ("ScheduleGPipe", "Schedule1F1B")
# These give every process two stages. The second computes the gradients of inputs before those of parameters.
LOOPED_SCHEDULES = ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
# With torch 2.10, zero-bubble schedules read an attribute that no autograd.Function has. 2.11 and 2.12 were not tried.
HAS_ZERO_BUBBLE = torch.__version__ >= (2, 13)

DEPTH = 7
# The arguments of the net, made anew for every test: a net may hold a given parameter.
OPTIONS = {
    "dense": lambda: {},
    "permutation": lambda: {"filter": "permutation"},
    "identity, alpha 1": lambda: {"filter": "identity", "alpha": 1.0},
    "a filter per layer": lambda: {"filter": torch.linalg.qr(torch.randn(DEPTH, 6, 6)).Q},
    "numbers": lambda: {"alpha": 0.75, "beta": 0.5},
    "scales per layer": lambda: {"alpha": torch.rand(DEPTH), "beta": torch.rand(DEPTH)},
    "trained per layer": lambda: {"alpha": nn.Parameter(torch.rand(DEPTH)), "beta": nn.Parameter(torch.rand(DEPTH))},
    "a shared tensor": lambda: {"alpha": torch.tensor(0.9), "beta": torch.tensor([0.3])},
    "trained and shared": lambda: {"alpha": nn.Parameter(torch.tensor(0.9)), "beta": nn.Parameter(torch.tensor([0.3]))},
    "relu, segment": lambda: {"activation": "relu", "segment": 2},
    "sigmoid": lambda: {"activation": "sigmoid"},
    "auto": lambda: {"solver": "auto"},
    "float64": lambda: {"dtype": torch.float64},
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "float16, permutation": lambda: {"dtype": torch.float16, "filter": "permutation"},
}


def make_mlp(depth=DEPTH, width=6, seed=0, **options):
    torch.manual_seed(seed)
    mlp = OrthogonalFilterMLP(5, width, depth, 3, **options)
    nn.init.normal_(mlp.bias)
    return mlp


def make_net(name):
    torch.manual_seed(0)
    return make_mlp(**OPTIONS[name]())


def run(module, x):
    """The output and x's gradient. Gradients of parameters are left where they are."""
    x = x.detach().requires_grad_()
    output = module(x)
    output.float().square().sum().backward()
    return output.detach(), x.grad


def gradients(net, stages):
    """Pairs of the net's gradient and that of the stages, by name."""
    for name in ("weight", "bias", "alpha", "beta"):
        whole = getattr(net, name)
        if isinstance(whole, nn.Parameter):
            parts = [getattr(stage, name) for stage in stages]
            yield name, whole, parts


@pytest.mark.parametrize("n", [1, 2, 3, DEPTH])
@pytest.mark.parametrize("name", OPTIONS)
def test_stages_are_together_the_whole_net_to_the_last_bit(name, n):
    mlp, twin = make_net(name), make_net(name)
    x = torch.randn(2, 4, 5).to(mlp.weight.dtype)
    output, grad_x = run(twin, x)
    stages = mlp.stages(n)
    assert len(stages) == n
    actual, actual_grad_x = run(nn.Sequential(*stages), x)
    assert torch.equal(actual, output)
    assert torch.equal(actual_grad_x, grad_x)
    for layer in ("input_layer", "output_layer"):
        for one, other in zip(getattr(mlp, layer).parameters(), getattr(twin, layer).parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    for key, whole, parts in gradients(twin, stages):
        if name == "trained and shared" and key in ("alpha", "beta"):
            assert all(part is getattr(mlp, key) for part in parts)
            terms = per_layer(make_net(name), key)
            run(terms, x)
            # Two sums of DEPTH terms, in any order.
            allowed = 2 * DEPTH * torch.finfo(torch.float32).eps * getattr(terms, key).grad.abs().sum()
            assert (parts[0].grad - whole.grad).abs().max() <= allowed
        else:
            assert torch.equal(torch.cat([part.grad for part in parts]), whole.grad), key
            assert getattr(mlp, key).grad is None, "the whole net's gradient is its own"


def per_layer(mlp, name):
    """The net with one value per layer in place of a shared scale: the gradient has the terms of the shared one's."""
    values = getattr(mlp, name).detach().reshape(-1).expand(mlp.depth).clone()
    setattr(mlp, name, nn.Parameter(values))
    return mlp


@pytest.mark.parametrize("n", [1, 2, 3, 5, DEPTH])
def test_every_layer_is_in_one_stage_and_memory_is_shared(n):
    mlp = make_mlp(filter=torch.linalg.qr(torch.randn(DEPTH, 6, 6)).Q, beta=nn.Parameter(torch.rand(DEPTH)))
    stages = mlp.stages(n)
    assert [stage.start for stage in stages] == [0, *(stage.stop for stage in stages[:-1])]
    assert stages[-1].stop == DEPTH
    depths = [stage.depth for stage in stages]
    assert max(depths) - min(depths) <= 1
    for stage in stages:
        for name in ("weight", "bias", "beta", "filter"):
            own, part = getattr(stage, name), getattr(mlp, name)[stage.start : stage.stop]
            assert own.data_ptr() == part.data_ptr()
            assert torch.equal(own, part)
    assert [stage.input_layer is mlp.input_layer for stage in stages] == [True] + [False] * (n - 1)
    assert [stage.output_layer is mlp.output_layer for stage in stages] == [False] * (n - 1) + [True]


def test_the_default_beta_is_that_of_the_whole_net():
    assert [(stage.beta, stage.alpha) for stage in make_mlp().stages(3)] == [(1 / DEPTH, None)] * 3


def test_optimizer_steps_on_the_stages_train_the_whole_net():
    name = "trained per layer"
    mlp, twin = make_net(name), make_net(name)
    stages = nn.Sequential(*mlp.stages(3))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (stages, twin)]
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip((stages, twin), optimizers, strict=True):
            optimizer.zero_grad()
            run(net, x)
            optimizer.step()
    for (key, one), other in zip(mlp.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), key
    assert not torch.equal(mlp.weight, make_net(name).weight)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["a filter per layer", "trained per layer", "trained and shared", "bfloat16"])
def test_a_copy_computes_the_same_and_holds_its_own_layers_alone(name, way):
    mlp = make_net(name)
    stages = nn.Sequential(*mlp.stages(3))
    x = torch.randn(4, 5).to(mlp.weight.dtype)
    output, _ = run(stages, x)
    before = [stage.weight.grad.clone() for stage in stages]
    if way == "deepcopy":
        copied = copy.deepcopy(stages)
        assert all(torch.equal(stage.weight.grad, grad) for stage, grad in zip(copied, before, strict=True))
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(stages))
    else:
        file = io.BytesIO()
        torch.save(stages, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(copied(x), output)
    for stage, own in zip(stages, copied, strict=True):
        assert own.weight.untyped_storage().nbytes() == stage.weight.numel() * stage.weight.element_size()
        assert own.weight.requires_grad
        assert own.weight.is_leaf
    if name == "trained and shared":
        assert copied[0].alpha is copied[2].alpha
    with torch.no_grad():
        copied[1].weight.zero_()
    assert torch.equal(stages(x), output), "the copy's memory is its own"


def test_a_copy_with_its_optimizer_stays_tied_to_it():
    (stage, _) = make_mlp().stages(2)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    copied, optimizer = copy.deepcopy((stage, optimizer))
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert params == {id(param) for param in copied.parameters()}


def test_state_dicts_load_into_the_whole_net_and_are_checked():
    mlp, other = make_mlp(filter="permutation"), make_mlp(filter="permutation", seed=1)
    for stage, source in zip(mlp.stages(3), other.stages(3), strict=True):
        stage.load_state_dict(source.state_dict())
    assert torch.equal(mlp.weight, other.weight)
    assert torch.equal(mlp.input_layer.weight, other.input_layer.weight)
    assert torch.equal(mlp.filter, other.filter)
    stage = mlp.stages(2)[1]
    with pytest.raises(RuntimeError, match="permutation"):
        stage.load_state_dict({**stage.state_dict(), "filter": torch.zeros(6, dtype=torch.int64)})


def test_frozen_parameters_and_the_mode_are_kept():
    mlp = make_mlp().eval()
    mlp.weight.requires_grad_(False)
    for stage in mlp.stages(2):
        assert not stage.training
        assert not stage.weight.requires_grad
        assert stage.bias.requires_grad


def test_a_net_without_bias():
    mlp = make_mlp()
    mlp.bias = None
    x = torch.randn(4, 5)
    assert torch.equal(nn.Sequential(*mlp.stages(3))(x), mlp(x))


def test_no_samples_and_a_single_one():
    mlp = make_mlp()
    stages = nn.Sequential(*mlp.stages(3))
    assert stages(torch.randn(0, 5)).shape == (0, 3)
    x = torch.randn(5)
    assert torch.equal(stages(x), mlp(x))


def test_a_nan_passes_through_every_stage():
    stages = nn.Sequential(*make_mlp().stages(3))
    output = stages(torch.tensor([[1.0] * 5, [float("nan")] * 5]))
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


def test_autocast():
    mlp = make_mlp()
    stages = nn.Sequential(*mlp.stages(3))
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stages(x), mlp(x))


def test_a_stage_in_16_bits_keeps_its_filter_exact():
    stage = make_mlp().stages(2)[0].to(torch.bfloat16)
    assert stage.weight.dtype == torch.bfloat16
    assert stage.filter.dtype == torch.float32


def test_a_stage_on_meta_gets_memory_of_its_own():
    with torch.device("meta"):
        stage = make_mlp().stages(4)[1].to_empty(device="cpu")
    source = make_mlp().stages(4)[1]
    stage.load_state_dict(source.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(stage(x), source(x))


@pytest.mark.parametrize(
    ("n", "kind", "message"),
    [
        (0, ValueError, rf"^OrthogonalFilterMLP\.stages: n is 0; expected 1 to {DEPTH}"),
        (-1, ValueError, "n is -1"),
        (DEPTH + 1, ValueError, rf"n is {DEPTH + 1}; expected 1 to {DEPTH}, the number of layers"),
        (2.0, TypeError, r"n is 2\.0; expected an int\.$"),
        (None, TypeError, r"n is None; expected an int\.$"),
        (True, TypeError, "n is True"),
    ],
)
def test_a_wrong_number_of_stages_is_refused(n, kind, message):
    with pytest.raises(kind, match=message):
        make_mlp().stages(n)


def test_computed_parameters_are_refused():
    mlp = make_mlp()
    parametrize.register_parametrization(mlp, "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight is computed from other tensors"):
        mlp.stages(2)
    mlp = make_mlp()
    prune.l1_unstructured(mlp, "bias", 0.5)
    with pytest.raises(ValueError, match="bias is computed from other tensors"):
        mlp.stages(2)


def test_a_net_with_a_forward_of_its_own_is_refused():
    class Doubled(OrthogonalFilterMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"^OrthogonalFilterMLP\.stages: the net is a Doubled.*forward of its own"):
        Doubled(5, 6, DEPTH, 3).stages(2)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,)])
def test_a_state_is_not_a_view(shape):
    # Zero-bubble schedules call detach_ on it, which torch refuses for a view.
    state = make_mlp().stages(2)[0](torch.randn(shape))
    assert state.shape == (*shape[:-1], 6)
    state.detach_()


@pytest.mark.parametrize("x", [torch.randn(4, 12), torch.randn(4, 5), torch.randn(4, 6, dtype=torch.float64)])
def test_a_wrong_state_is_refused_by_a_later_stage(x):
    with pytest.raises((ValueError, TypeError), match=r"orthogonal_filter: \w+ (has shape|is torch)"):
        make_mlp().stages(2)[1](x)


# ---- Over processes


def make_case(depth, case):
    mlp = make_mlp(depth, width=4, filter="permutation", dtype=torch.float32)
    if case == "trained":
        del mlp.alpha, mlp.beta
        mlp.alpha = nn.Parameter(torch.tensor(1 - 1 / depth))
        mlp.beta = nn.Parameter(torch.tensor(1 / depth))
    generator = torch.Generator().manual_seed(1)
    return mlp, *(torch.randn(SAMPLES, size, generator=generator) for size in (5, 3))


CASES = ("fixed", "trained")


def compute_loss(output, target):
    return (output - target).square().mean()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "20"
    folder.mkdir()
    return run_ranks(__file__, folder, [0] * PROCESSES, TIMEOUT)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_computes_what_one_process_does(found, case, size, schedule):
    assert_as_one_process(found, 20, case, size, schedule)


def test_a_pipeline_of_fifty_thousand_layers_computes_what_one_process_does(tmp_path):
    folder = tmp_path / "50000"
    folder.mkdir()
    results = run_ranks(__file__, folder, [0] * PROCESSES, TIMEOUT)
    for case in CASES:
        for size in SIZES:
            for schedule in SCHEDULES:
                assert_as_one_process(results, 50_000, case, size, schedule)


@pytest.mark.parametrize("schedule", LOOPED_SCHEDULES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_with_two_stages_per_process_computes_what_one_process_does(found, case, size, schedule):
    if schedule.endswith("ZeroBubble") and not HAS_ZERO_BUBBLE:
        pytest.skip("the zero-bubble schedules of this torch take no autograd.Function")
    for half in range(2):
        results = [{(case, size, schedule): found[rank][case, size, schedule][half]} for rank in range(PROCESSES)]
        assert_as_one_process(results, 20, case, size, schedule)


def assert_as_one_process(found, depth, case, size, schedule):
    mlp, samples, targets = make_case(depth, case)
    outputs, losses = [], []
    for x, target in zip(samples.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True):
        outputs.append(mlp(x))
        losses.append(compute_loss(outputs[-1], target))
        losses[-1].backward()
    right = {name: parameter.grad / MICROBATCHES for name, parameter in mlp.named_parameters()}
    assert right["weight"].abs().max() > 0
    terms = {name: sum_of_terms(depth, case, name) for name in ("alpha", "beta") if case == "trained"}
    for rank in range(PROCESSES):
        result = found[rank][case, size, schedule]
        start, stop = result["layers"]
        expected = {"weight", "bias"} | ({"alpha", "beta"} if case == "trained" else set())
        if start == 0:
            expected |= {"input_layer.weight", "input_layer.bias"}
        if stop == depth:
            expected |= {"output_layer.weight", "output_layer.bias"}
            assert torch.equal(result["output"], torch.cat(outputs))
            assert torch.equal(result["losses"], torch.stack(losses))
        assert result["gradients"].keys() == expected
        for name, gradient in result["gradients"].items():
            if name in ("alpha", "beta"):
                # The sum over the stages has another order than that of one process. Both add up one term per layer and
                # microbatch.
                count = depth * MICROBATCHES
                allowed = 2 * count * torch.finfo(torch.float32).eps * terms[name]
                assert (gradient - right[name]).abs() <= allowed, name
            else:
                own = right[name][start:stop] if name in ("weight", "bias") else right[name]
                assert torch.equal(gradient, own), name


def sum_of_terms(depth, case, name):
    """The sum over layers of the absolute gradients of a scale per layer, for all microbatches."""
    mlp, samples, targets = make_case(depth, case)
    per_layer(mlp, name)
    total = 0.0
    for x, target in zip(samples.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True):
        loss = compute_loss(mlp(x), target)
        (gradient,) = torch.autograd.grad(loss, getattr(mlp, name))
        total += gradient.abs().sum() / MICROBATCHES
    return total


def run_pipeline(group, size, rank, depth, case, schedule):
    import torch.distributed as dist
    from torch.distributed import pipelining

    mlp, samples, targets = make_case(depth, case)
    module = mlp.stages(size)[rank]
    stage = pipelining.PipelineStage(module, rank, size, torch.device("cpu"), group=group)
    losses = []
    pipeline = getattr(pipelining, schedule)(stage, MICROBATCHES, loss_fn=compute_loss)
    given = (samples,) if rank == 0 else ()
    last = {"target": targets, "losses": losses} if rank == size - 1 else {}
    output = pipeline.step(*given, **last)
    result = {"layers": (module.start, module.stop)}
    if last:
        result.update(output=output.detach(), losses=torch.stack(losses).detach())
    for name in ("alpha", "beta"):
        if case == "trained":
            parameter = getattr(module, name)
            dist.all_reduce(parameter.grad, group=group)
    result["gradients"] = {name: parameter.grad for name, parameter in module.named_parameters()}
    return result


def run_looped_pipeline(group, size, rank, depth, case, schedule):
    import torch.distributed as dist
    from torch.distributed import pipelining

    mlp, samples, targets = make_case(depth, case)
    indices = [rank, rank + size]
    modules = [mlp.stages(2 * size)[index] for index in indices]
    stages = [
        pipelining.PipelineStage(module, index, 2 * size, torch.device("cpu"), group=group)
        for module, index in zip(modules, indices, strict=True)
    ]
    # torch would divide the gradient of a shared scale once for each of the two stages.
    pipeline = getattr(pipelining, schedule)(stages, MICROBATCHES, loss_fn=compute_loss, scale_grads=False)
    losses = []
    given = (samples,) if rank == 0 else ()
    last = {"target": targets, "losses": losses} if rank == size - 1 else {}
    output = pipeline.step(*given, **last)
    results = [{"layers": (module.start, module.stop)} for module in modules]
    if last:
        results[1].update(output=output.detach(), losses=torch.stack(losses).detach())
    for name in ("alpha", "beta"):
        if case == "trained":
            dist.all_reduce(getattr(modules[0], name).grad, group=group)
    for module, result in zip(modules, results, strict=True):
        result["gradients"] = {name: parameter.grad / MICROBATCHES for name, parameter in module.named_parameters()}
    return results


def run_process(rank, folder):
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT))
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    results = {}
    depth = int(Path(folder).name)
    for case in CASES:
        for size, group in ((2, pairs[rank // 2]), (4, None)):
            for schedule in SCHEDULES:
                results[case, size, schedule] = run_pipeline(group, size, rank % size, depth, case, schedule)
            if depth < 1000:
                for schedule in LOOPED_SCHEDULES if HAS_ZERO_BUBBLE else LOOPED_SCHEDULES[:1]:
                    results[case, size, schedule] = run_looped_pipeline(group, size, rank % size, depth, case, schedule)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), sys.argv[-1])
