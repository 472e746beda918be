"""optim.SGD and optim.AdamW with in_backward=True: the bits of backward() and step(), without the gradient of a weight.

The ranges of layers are made small, so that small nets have several of them. What must be refused is refused before any
parameter or state changes.
"""

import copy
import functools
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from support.optimizers import KINDS, PAIRS, assert_same_bits
from support.recurrence import make_filter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lcw_ops
from lcw_ops import functional as F
from lcw_ops import optim
from lcw_ops.nn import LCWLinear, OrthogonalFilterMLP
from lcw_ops.ops.orthogonal_filter import in_backward

pytestmark = pytest.mark.usefixtures("one_thread", "small_ranges")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SGD_OPTIONS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    "on momentum": {"lr": 0.1, "momentum": 0.9, "activate": "momentum"},
}
ADAMW_OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.2},
    "maximize": {"maximize": True, "betas": (0.5, 0.7), "eps": 1e-3},
}
OPTIONS = [(optim.SGD, options) for options in SGD_OPTIONS.values()]
OPTIONS += [(optim.AdamW, options) for options in ADAMW_OPTIONS.values()]
OPTION_IDS = [f"SGD {name}" for name in SGD_OPTIONS] + [f"AdamW {name}" for name in ADAMW_OPTIONS]

LAYERS, WIDTH, SEGMENT = 50, 8, 4
refused = functools.partial(pytest.raises, RuntimeError)


@pytest.fixture
def small_ranges(monkeypatch):
    monkeypatch.setattr(in_backward, "RANGE_BYTES", 4000)


def make_net(dtype=torch.float32, layers=LAYERS, width=WIDTH, **options):
    torch.manual_seed(0)
    options = {"segment": SEGMENT, "beta": nn.Parameter(torch.tensor(0.02))} | options
    return OrthogonalFilterMLP(5, width, layers, 3, dtype=dtype, **options)


def compute_loss(net, step=0, rows=6):
    generator = torch.Generator().manual_seed(step)
    dtype = net.weight.dtype
    x, y = (torch.randn(rows, size, generator=generator).to(dtype) for size in (5, 3))
    return (net(x) - y).float().pow(2).mean()


def train(net, optimizer, steps=3, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        compute_loss(net, step).backward()
        if optimizer.in_backward:
            assert all(param.grad is None for param in net.parameters())
        optimizer.step()


def snapshot(optimizer):
    """Copies of the parameters and of all states."""
    params = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    # Backward makes the states in another order.
    return params, sorted(copy.deepcopy(optimizer.state_dict()["state"]).items())


def assert_same(optimizer, other):
    """The same bits in parameters and states."""
    for one, two in zip(*(tree_leaves(snapshot(each)) for each in (optimizer, other)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    keys = [{key: state.keys() for key, state in each.state_dict()["state"].items()} for each in (optimizer, other)]
    assert keys[0] == keys[1]


class unchanged:
    """A context in which an optimizer's parameters and states must stay as they are."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __enter__(self):
        self.before = snapshot(self.optimizer)

    def __exit__(self, *_):
        for one, two in zip(*map(tree_leaves, (self.before, snapshot(self.optimizer))), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def make_pair(kind=optim.AdamW, dtype=torch.float32, net_options=None, **options):
    """A net whose optimizer steps in step(), and an equal net whose optimizer steps in backward."""
    nets = [make_net(dtype, **(net_options or {})) for _ in range(2)]
    return nets, [
        kind(net.parameters(), in_backward=flag, **options) for net, flag in zip(nets, (False, True), strict=True)
    ]


def make_one(**options):
    net = make_net()
    return net, optim.AdamW(net.parameters(), in_backward=True, **options)


# ---- The same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [(activation, dtype) for activation in (None, "arctan") for dtype in DTYPES]
    + [(activation, torch.float32) for activation in KINDS[1:]],
    ids=str,
)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=OPTION_IDS)
def test_three_steps_have_the_bits_of_backward_and_step(kind, options, activation, dtype):
    nets, optimizers = make_pair(kind, dtype, **options, gradient_activation=activation)
    for net, optimizer in zip(nets, optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            train(net, optimizer, 1, step)
            scheduler.step()
    assert_same(*optimizers)


@pytest.mark.parametrize(
    ("kind", "options", "flags", "dtype"),
    [
        (kind, options, flags, dtype)
        for kind, options in OPTIONS
        for flags in ({"foreach": True}, {"fused": True}, {"foreach": False})
        for dtype in DTYPES
        # torch 2.13's fused SGD leaves some elements of 16-bit tensors to chance.
        if "activate" not in options and not (kind is optim.SGD and "fused" in flags and dtype.itemsize == 2)
    ],
    ids=str,
)
def test_torchs_implementations_give_the_bits_of_torchs_optimizers(kind, options, dtype, flags):
    """The layers have an odd number of elements, so ranges would end inside a vector if they were not aligned."""
    torchs = PAIRS[kind.__name__][1]
    nets = [make_net(dtype, 400, 5, segment=3) for _ in range(2)]
    ours = kind(nets[0].parameters(), **options, **flags, gradient_activation=None, in_backward=True)
    theirs = torchs(nets[1].parameters(), **options, **flags)
    theirs.in_backward = False
    train(nets[0], ours)
    train(nets[1], theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own scales", "shared scales"])
@pytest.mark.parametrize("filter", ["dense", "permutation", "per_layer"])
@pytest.mark.parametrize("return_states", [False, True], ids=["last state", "all states"])
def test_every_gradient_of_the_recurrence_has_the_same_bits(return_states, filter, shared, threads):
    torch.set_num_threads(threads)
    layers, rows, width = 37, 5, 7
    torch.manual_seed(0)
    weight, matrix = torch.randn(layers, width, width) / 3, make_filter(filter, layers, width)
    others = {
        "h0": torch.randn(rows, width),
        "bias": torch.randn(width) if shared else torch.randn(layers, width),
        "alpha": torch.tensor([0.97]) if shared else torch.rand(layers),
        "beta": torch.tensor([0.03]) if shared else torch.rand(layers),
        "inputs": torch.randn(layers, rows, width),
    }
    gradient = torch.randn(layers + 1, rows, width) if return_states else torch.randn(rows, width)
    results = []
    for flag in (False, True):
        param = nn.Parameter(weight.clone())
        optimizer = optim.AdamW([param], in_backward=flag)
        own = {name: tensor.clone().requires_grad_() for name, tensor in others.items()}
        output = F.orthogonal_filter(
            weight=param, filter=matrix, **own, activation="relu", return_states=return_states, segment=2
        )
        output.backward(gradient)
        optimizer.step()
        results.append([output, param, *(tensor.grad for tensor in own.values())])
    assert_same_bits(*results)
    assert not torch.equal(results[1][1], weight)


@pytest.mark.parametrize(
    "net_options",
    [{"layers": 1}, {"width": 1}, {"layers": 3, "segment": 100}, {"solver": "parallel"}, {"segment": None}],
    ids=str,
)
def test_nets_of_every_form(net_options):
    nets, optimizers = make_pair(net_options=net_options)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer)
    assert_same(*optimizers)


@pytest.mark.parametrize(("layers", "rows", "width"), [(0, 3, 4), (6, 0, 4), (6, 3, 0)])
def test_empty_recurrences(layers, rows, width):
    results = []
    for flag in (False, True):
        weight = nn.Parameter(torch.ones(layers, width, width))
        optimizer = optim.AdamW([weight], in_backward=flag)
        h0 = torch.ones(rows, width, requires_grad=True)
        F.orthogonal_filter(h0, weight, None, torch.arange(width), segment=2).sum().backward()
        optimizer.step()
        results.append([weight, h0.grad, *optimizer.state[weight].values()])
    assert_same_bits(*results)


@pytest.mark.parametrize("dims", [(0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_a_weight_with_another_order_of_its_memory(kind, fused, dims):
    """torch's fused steps go through memory in order, and take it that a gradient has its parameter's order."""
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        back = [dims.index(dim) for dim in range(3)]
        weight = nn.Parameter(torch.randn(50, 8, 8).permute(dims).contiguous().permute(back))
        assert not weight.is_contiguous()
        optimizer = kind([weight], lr=0.1, fused=fused, gradient_activation=None, in_backward=flag)
        for _ in range(2):
            F.orthogonal_filter(torch.randn(6, 8), weight, None, torch.arange(8), segment=4).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([weight])
    assert_same_bits(*results)


def test_the_reference_backend():
    nets, optimizers = make_pair(optim.SGD, momentum=0.9)
    with lcw_ops.use_backend("reference"):
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer)
    assert_same(*optimizers)


def test_a_compiled_net():
    nets, optimizers = make_pair()
    for net, optimizer in zip(nets, optimizers, strict=True):
        net.compile(backend="aot_eager", fullgraph=True)
        train(net, optimizer)
    assert_same(*optimizers)


def test_other_layers_and_several_groups_with_options_of_their_own():
    optimizers = []
    for flag in (False, True):
        torch.manual_seed(0)
        net, layer = make_net(), LCWLinear(5, 5)
        groups = [
            {"params": [net.weight, net.bias, *layer.parameters()], "lr": 0.1},
            {"params": [net.beta], "gradient_activation": None},
        ]
        optimizer = optim.SGD(groups, lr=0.01, momentum=0.5, in_backward=flag)
        optimizer.add_param_group({"params": [*net.input_layer.parameters(), *net.output_layer.parameters()]})
        for step in range(3):
            torch.manual_seed(step)
            net(layer(torch.randn(4, 5))).square().sum().backward()
            assert not flag or all(param.grad is None for param in (*net.parameters(), *layer.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["weight_decay"] = 0.1
        optimizers.append(optimizer)
    assert_same(*optimizers)


def divide(nets, is_apart):
    """The parameters of the nets whose names are apart, and the others."""
    named = [pair for net in nets for pair in net.named_parameters()]
    return [[param for name, param in named if is_apart(name) == apart] for apart in (True, False)]


@pytest.mark.parametrize("split", ["by net", "weight apart", "input layer apart"])
def test_two_optimizers_step_in_one_pass(split):
    ours = []
    for flag in (False, True):
        nets = make_net(), make_net(layers=20)
        groups = {
            "by net": [[*net.parameters()] for net in nets],
            "weight apart": divide(nets, lambda name: name == "weight"),
            "input layer apart": divide(nets, lambda name: "input" in name),
        }[split]
        optimizers = [optim.SGD(group, lr=0.1, momentum=0.9, in_backward=flag) for group in groups]
        for step in range(2):
            (compute_loss(nets[0], step) + compute_loss(nets[1], step)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        ours.append(optimizers)
    for pair in zip(*ours, strict=True):
        assert_same(*pair)


def test_nan_gradients():
    nets, optimizers = make_pair(optim.AdamW, amsgrad=True)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 1)
        (compute_loss(net) * torch.nan).backward()
        optimizer.step()
    for one, two in zip(*(snapshot(optimizer)[0] for optimizer in optimizers), strict=True):
        assert one.isnan().all()
        assert two.isnan().all()


def test_max_grad_value_clips_as_clip_grad_value_does():
    nets, optimizers = make_pair()
    largest = 1e-4
    optimizers[1].max_grad_value = largest
    for step in range(3):
        compute_loss(nets[0], step).backward()
        gradients = torch.cat([param.grad.flatten().abs() for param in nets[0].parameters()])
        assert gradients.min() < largest < gradients.max()
        torch.nn.utils.clip_grad_value_(nets[0].parameters(), largest)
        optimizers[0].step()
        optimizers[0].zero_grad()
        train(nets[1], optimizers[1], 1, step)
    assert_same(*optimizers)


def test_hooks_on_gradients_act_before_the_step():
    nets, optimizers = make_pair()
    for net, optimizer in zip(nets, optimizers, strict=True):
        for param in net.parameters():
            param.register_hook(lambda gradient: gradient * 3 - 1e-3)
        train(net, optimizer)
    assert_same(*optimizers)


def test_checkpoints_without_reentry():
    nets, optimizers = make_pair()
    for net, optimizer in zip(nets, optimizers, strict=True):
        for _ in range(2):
            checkpoint(compute_loss, net, use_reentrant=False).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*optimizers)


def test_forward_and_backward_passes_of_several_threads():
    """The uses of weights are known to all threads: a forward pass adds one while a backward pass goes through them."""
    interval, is_over = sys.getswitchinterval(), threading.Event()

    def add_uses(net):
        while not is_over.is_set():
            graphs = [compute_loss(net) for _ in range(20)]
            del graphs

    # The optimizers own the weights as long as they live.
    others = [make_one() for _ in range(2)]
    adding = [threading.Thread(target=add_uses, args=(net,)) for net, _ in others]
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda _: [in_backward.check_uses() for _ in range(30_000)] and None)
    sys.setswitchinterval(1e-6)
    try:
        for thread in adding:
            thread.start()
        leaf.exp().backward()
    finally:
        is_over.set()
        for thread in adding:
            thread.join()
        sys.setswitchinterval(interval)
    assert leaf.grad is not None


# ---- The gradient that never exists ----------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """The most elements of a result of an operator that is not a view of tensors known before."""

    def __init__(self, known):
        super().__init__()
        self.known, self.elements = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("activation", [None, "arctan"])
def test_no_result_is_as_large_as_a_tenth_of_the_weight(activation, monkeypatch):
    monkeypatch.setattr(in_backward, "RANGE_BYTES", 20_000)
    found = []
    nets, optimizers = make_pair(net_options={"layers": 400, "width": 16}, gradient_activation=activation)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 1)
        optimizer.zero_grad()
        known = [net.weight, *(value for value in optimizer.state[net.weight].values())]
        with LargestResult(known) as largest:
            compute_loss(net, 1).backward()
        found.append(largest.elements / net.weight.numel())
        optimizer.step()
    assert found[0] == 1
    assert found[1] < 0.1


# ---- One backward pass for each step ---------------------------------------------------------------------------------


def test_a_second_backward_pass_before_step_is_refused():
    net, optimizer = make_one()
    first, second = compute_loss(net), make_net().input_layer(torch.ones(5)).sum() * net.output_layer.bias.sum()
    first.backward()
    with unchanged(optimizer), refused(match=r"in an earlier backward pass.*Call step\(\)"):
        second.backward()
    with unchanged(optimizer), refused(match="in an earlier backward pass"):
        compute_loss(net).backward()
    assert all(param.grad is None for param in net.parameters())
    optimizer.zero_grad()
    optimizer.step()
    train(net, optimizer, 1)


def test_a_closure_has_one_backward_pass():
    nets, optimizers = make_pair()
    for net, optimizer in zip(nets, optimizers, strict=True):

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = compute_loss(net)
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure) > 0
            optimizer.step(closure)
    assert_same(*optimizers)
    closure()
    with unchanged(optimizers[1]), refused(match="in an earlier backward pass"):
        optimizers[1].step(closure)


def test_step_runs_its_hooks():
    net, optimizer = make_one()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    compute_loss(net).backward()
    assert not calls
    with unchanged(optimizer):
        assert optimizer.step() is None
    assert calls == ["before", "after"]


def test_a_gradient_set_by_hand_is_refused_at_step():
    net, optimizer = make_one()
    net.bias.grad = torch.ones_like(net.bias)
    with unchanged(optimizer), refused(match="with a gradient, which no hook has taken"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def second_use(net):
    return compute_loss(net) + net.weight.square().sum()


def used_by_two_recurrences(net):
    return compute_loss(net) + compute_loss(net, 1)


def changed_after_forward(net):
    loss = compute_loss(net)
    with torch.no_grad():
        net.weight += 0
    return loss


def hooked_after_forward(net):
    loss = compute_loss(net)
    net.weight.register_hook(lambda gradient: None)
    return loss


def with_a_post_hook(net):
    # The layer that is stepped last has the hook.
    net.input_layer.bias.register_post_accumulate_grad_hook(lambda param: None)
    return compute_loss(net)


def with_a_gradient(net):
    net.weight.grad = torch.ones_like(net.weight)
    return compute_loss(net)


@pytest.mark.parametrize(
    ("make_loss", "keywords", "match"),
    [
        (compute_loss, {"retain_graph": True}, "keeps the graph"),
        (compute_loss, {"create_graph": True}, "keeps the graph|second derivatives"),
        (second_use, {}, "is used more than once"),
        (used_by_two_recurrences, {}, "is used more than once"),
        (changed_after_forward, {}, "was changed in place after the forward pass"),
        (hooked_after_forward, {}, "got a hook of register_hook"),
        (with_a_post_hook, {}, "another hook of register_post_accumulate_grad_hook"),
        (with_a_gradient, {}, "has a gradient"),
        (lambda net: checkpoint(compute_loss_of(net), torch.ones(2, 5, requires_grad=True)), {}, "reentrant"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint", "ignore:Using backward")
def test_refused_before_anything_is_written(make_loss, keywords, match):
    net, optimizer = make_one()
    train(net, optimizer, 1)
    loss = make_loss(net)
    with unchanged(optimizer), refused(match=match):
        loss.backward(**keywords)
    for param in net.parameters():
        param._backward_hooks = None
        param._post_accumulate_grad_hooks.popitem() if len(param._post_accumulate_grad_hooks) > 1 else None
    optimizer.zero_grad()
    # Nothing has been stepped, so the next pass may come before step().
    train(net, optimizer, 1)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_a_reentrant_checkpoint_behind_a_layer_is_named():
    """Autograd meets the checkpoint only after it has passed the layer, which has been stepped."""
    net, layer = make_net(), nn.Linear(3, 2)
    optimizer = optim.AdamW([*net.parameters(), *layer.parameters()], in_backward=True)
    before = net.weight.clone()
    loss = layer(checkpoint(net, torch.ones(2, 5, requires_grad=True), use_reentrant=True)).sum()
    with refused(match="use_reentrant=False"):
        loss.backward()
    assert torch.equal(net.weight, before)
    assert optimizer.state.keys() == set(layer.parameters())


def compute_loss_of(net):
    return lambda x: net(x).square().sum()


def test_other_uses_outside_of_the_pass_are_allowed():
    net, optimizer = make_one()
    kept = net.weight.square().sum(), compute_loss(net, 3)
    with torch.no_grad():
        compute_loss(net)
    compute_loss(net)
    train(net, optimizer, 2)
    # The kept graph has other weights.
    with unchanged(optimizer), refused(match="in.?place"):
        kept[1].backward()


def test_autograd_grad_steps_nothing():
    net, optimizer = make_one()
    x = torch.randn(2, 5, requires_grad=True)
    other = make_net()
    with unchanged(optimizer):
        (gradient,) = torch.autograd.grad(net(x).sum(), x, retain_graph=True)
        own = torch.autograd.grad(net(x).sum(), [net.beta, net.bias, net.input_layer.weight])
        with refused(match="to not have been used in the graph"):
            torch.autograd.grad(net(x).sum(), net.weight)
        with refused(match="second derivatives"):
            torch.autograd.grad(net(x).sum(), x, create_graph=True)
        net(x).sum().backward(inputs=[x])
    assert torch.equal(x.grad, gradient)
    assert torch.equal(gradient, torch.autograd.grad(other(x).sum(), x)[0])
    assert_same_bits(own, torch.autograd.grad(other(x).sum(), [other.beta, other.bias, other.input_layer.weight]))
    train(net, optimizer, 1)


def test_frozen_parameters_stay():
    nets, optimizers = make_pair()
    for net, optimizer in zip(nets, optimizers, strict=True):
        for name in ("weight", "bias"):
            train(net, optimizer, 1)
            getattr(net, name).requires_grad_(False)
        optimizer.zero_grad()
        loss = compute_loss(net)
        net.beta.requires_grad_(False)
        loss.backward()
        optimizer.step()
        net.requires_grad_()
        train(net, optimizer, 1)
    assert_same(*optimizers)


def test_a_weight_frozen_after_forward_stays():
    net, optimizer = make_one()
    loss, before = compute_loss(net), net.weight.clone()
    net.weight.requires_grad_(False)
    loss.backward()
    assert torch.equal(net.weight, before)
    assert net.weight not in optimizer.state


def test_a_frozen_parameter_can_be_trained_later():
    nets = [make_net(), make_net()]
    optimizers = []
    for net, flag in zip(nets, (False, True), strict=True):
        net.requires_grad_(False)
        optimizers.append(optim.AdamW(net.parameters(), in_backward=flag))
        assert not any(param.requires_grad for param in net.parameters())
        net.requires_grad_()
        train(net, optimizers[-1])
    assert_same(*optimizers)


# ---- Errors in the middle --------------------------------------------------------------------------------------------


def test_an_error_between_the_ranges_of_a_weight(monkeypatch):
    net, optimizer = make_one()
    train(net, optimizer, 1)
    saved = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    calls, run = [], in_backward._backward

    def fail(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise MemoryError
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(in_backward, "_backward", fail)
        with pytest.raises(MemoryError):
            compute_loss(net, 1).backward()
    assert not torch.equal(net.weight, saved[0]["weight"])
    for act in (optimizer.step, lambda: compute_loss(net).backward()):
        with refused(match="was interrupted.*load_state_dict"):
            act()
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    other, others = make_one()
    train(other, others, 2)
    train(net, optimizer, 1, 1)
    assert_same(optimizer, others)


def test_an_error_of_the_first_range_leaves_all_as_it_was():
    net, optimizer = make_one()
    train(net, optimizer, 1)
    optimizer.state[net.weight]["exp_avg"] = torch.ones(LAYERS + 1, WIDTH, WIDTH)
    before = net.weight.clone()
    with pytest.raises(ValueError, match="exp_avg"):
        compute_loss(net).backward()
    assert torch.equal(before, net.weight)
    assert [key for key in optimizer.state if key.dim() == 3] == [net.weight]


def test_an_error_after_some_parameters_is_said():
    net, optimizer = make_one()
    x = torch.ones(2, 5, requires_grad=True)
    x.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x).sum().backward()
    with refused(match=r"If the earlier pass raised, step\(\) goes on"):
        compute_loss(net).backward()
    optimizer.step()
    train(net, optimizer, 1)


# ---- The optimizer's life --------------------------------------------------------------------------------------------


def test_hooks_vanish_with_the_optimizer():
    net, optimizer = make_one()
    known = set(in_backward.owners)
    assert set(map(id, net.parameters())) <= known
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert not known & set(in_backward.owners)
    assert not any(param._post_accumulate_grad_hooks for param in net.parameters())
    compute_loss(net).backward()
    assert all(param.grad is not None for param in net.parameters())


def test_the_optimizer_dies_before_backward():
    net, optimizer = make_one()
    loss = compute_loss(net)
    before = net.weight.clone()
    del optimizer
    gc.collect()
    with refused(match="has died"):
        loss.backward()
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"]
)
def test_copies_step_their_own_parameters(copied):
    net, optimizer = make_one(max_grad_value=1e-3)
    train(net, optimizer, 1)
    other, others = copied((net, optimizer))
    assert others.in_backward
    assert others.max_grad_value == 1e-3
    with unchanged(optimizer):
        train(other, others, 1, 1)
    train(net, optimizer, 1, 1)
    assert_same(optimizer, others)


def test_a_shallow_copy_is_refused():
    _, optimizer = make_one()
    with pytest.raises(ValueError, match="another optimizer steps during backward"):
        copy.copy(optimizer)


def test_state_dicts_have_torchs_keys_and_load_into_either_form():
    nets, optimizers = make_pair(gradient_activation=None)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer)
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for optimizer, state in zip(optimizers, reversed(states), strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 2, 3)
    assert_same(*optimizers)
    torch.optim.AdamW(nets[1].parameters()).load_state_dict(states[1])


def test_in_backward_is_the_constructors_alone():
    _, optimizer = make_one()
    assert not any("in_backward" in group for group in optimizer.param_groups)
    assert optim.SGD([nn.Parameter(torch.ones(1))]).__getstate__().keys() == {"defaults", "state", "param_groups"}


# ---- Refused arguments and hosts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_grad_value": 1.0}, ValueError, "in_backward is False"),
        ({"max_grad_value": 0.0, "in_backward": True}, ValueError, "> 0"),
        ({"max_grad_value": torch.tensor(1.0), "in_backward": True}, TypeError, "max_grad_value"),
        ({"differentiable": True, "gradient_activation": None, "in_backward": True}, ValueError, "differentiable=True"),
    ],
    ids=str,
)
def test_refused_options(kind, options, error, match):
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=match):
        kind([param], **options)
    assert not param._post_accumulate_grad_hooks


def test_refused_parameters():
    net, optimizer = make_one()
    own, graded = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    graded.grad = torch.ones(2)
    for params, match in (([own, net.bias], "another optimizer"), ([own, graded], "has a gradient already")):
        with pytest.raises(ValueError, match=match):
            optim.SGD(params, in_backward=True)
        assert not own._post_accumulate_grad_hooks
    with pytest.raises(ValueError, match="has a gradient already"):
        optimizer.add_param_group({"params": [own, graded]})
    assert len(optimizer.param_groups) == 1
    train(net, optimizer, 1)


def test_other_ways_to_activate_are_refused():
    net, optimizer = make_one(gradient_activation=None)
    with pytest.raises(ValueError, match="in_backward=True"):
        lcw_ops.activate_gradients(optimizer)
    with pytest.raises(ValueError, match="in_backward=True"):
        lcw_ops.convert(net, "lcw", optimizer=optimizer)
    handle = lcw_ops.register_gradient_hook(net)
    with unchanged(optimizer), refused(match="another hook"):
        compute_loss(net).backward()
    handle.remove()
    train(net, optimizer, 1)


@pytest.mark.parametrize("options", [{}, {"gradient_activation": None, "fused": True}], ids=str)
def test_grad_scaler_is_refused(options):
    net, optimizer = make_one(**options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(compute_loss(net)).backward()
    for act in (scaler.unscale_, scaler.step):
        with refused(match="scaled gradients"):
            act(optimizer)
    optimizer.step()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.scale(compute_loss(net)).backward()
    disabled.unscale_(optimizer)
    disabled.step(optimizer)
    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    scaler.scale((plain.param_groups[0]["params"][0] * 3).sum()).backward()
    scaler.unscale_(plain)
    assert plain.param_groups[0]["params"][0].grad == 3


@pytest.fixture
def process_group():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["optimizer first", "optimizer last"])
def test_data_parallelism_is_refused(process_group, order):
    net = make_net()
    optimizer = optim.AdamW(net.parameters(), in_backward=True) if order == "optimizer first" else None
    parallel = DistributedDataParallel(net)
    optimizer = optimizer or optim.AdamW(net.parameters(), in_backward=True)
    with unchanged(optimizer), pytest.raises(ValueError, match="DistributedDataParallel"):
        parallel(torch.ones(2, 5)).sum().backward()


def test_dtensors_are_refused(process_group):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    param = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(4), mesh))
    with pytest.raises(TypeError, match="DTensor"):
        optim.SGD([param], in_backward=True)


def test_processes_without_data_parallelism_train(process_group):
    from lcw_ops.distributed import DepthParallel

    parallel = DepthParallel(make_net(beta=0.02))
    optimizer = optim.AdamW(parallel.parameters(), in_backward=True)
    before = parallel.weight.clone()
    parallel(torch.ones(2, 5)).sum().backward()
    assert parallel.weight.grad is None
    assert (parallel.weight != before).float().mean() > 0.9
    optimizer.step()
