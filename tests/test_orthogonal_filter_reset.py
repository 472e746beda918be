"""The recurrent modules are made without memory (meta, fake tensors) and initialised later, as in sharded training."""

import copy
import io
import math
import types

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lcw_ops
import lcw_ops.distributed
from lcw_ops import nn
from lcw_ops.nn.orthogonal_filter import make_filter

KINDS = ["haar", "cyclic", "permutation", "identity"]

Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q.float()
P = torch.arange(8).roll(3)
FILTERS = [*KINDS, pytest.param(Q, id="matrix"), pytest.param(P, id="indices")]
SCALES = {
    "numbers": lambda: {"beta": 0.25, "alpha": 0.5},
    "buffers": lambda: {"beta": torch.tensor([0.25]), "alpha": torch.tensor(0.5)},
    "parameters": lambda: {"beta": torch.nn.Parameter(torch.tensor(0.25)), "alpha": torch.tensor([0.5])},
}


def mlp(filter="haar", scales="numbers", **options):
    return nn.OrthogonalFilterMLP(3, 8, 6, 2, filter=filter, **SCALES[scales](), **options)


def rnn(filter="haar", scales="numbers", **options):
    return nn.OrthogonalFilterRNN(3, 8, filter=filter, **SCALES[scales](), **options)


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def make_by_argument(make, **options):
    return make(device="meta", **options)


def make_in_context(make, **options):
    with torch.device("meta"):
        return make(**options)


def make_by_default(make, **options):
    torch.set_default_device("meta")
    try:
        return make(**options)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("on_meta", [make_by_argument, make_in_context, make_by_default])
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("scales", ["numbers", "buffers"])
@pytest.mark.parametrize("filter", FILTERS)
def test_modules_are_made_on_meta(filter, scales, make, on_meta):
    """As with torch's own modules, no memory is allocated and no number is read; everything can be loaded later."""
    model = on_meta(make, filter=filter, scales=scales)
    assert all(tensor.is_meta for tensor in tensors_of(model).values())
    # There is nothing to initialise, so nothing is refused either.
    model.reset_parameters()
    with lcw_ops.use_backend("reference"):
        output = model(torch.zeros(5, 4, 3, device="meta"))
    assert (output if make is mlp else output[0]).shape == (5, 4, 2 if make is mlp else 8)
    source = make(filter=filter, scales=scales)
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(5, 4, 3)
    for actual, expected in zip(model(x), source(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("make", [mlp, rnn])
def test_a_parameter_given_as_a_scale_is_kept(make):
    with torch.device("meta"):
        model = make(scales="parameters")
    assert model.beta.is_meta
    beta = torch.nn.Parameter(torch.tensor(0.5))
    with torch.device("meta"):
        model = nn.OrthogonalFilterMLP(3, 8, 6, 2, beta=beta)
    assert model.beta is beta


# Under FakeTensorMode torch accepts real tensors only with allow_non_fake_inputs.
@pytest.mark.parametrize(("filter", "allow_real"), [(KINDS[0], False), *((filter, True) for filter in (*KINDS, Q, P))])
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("scales", [*SCALES])
def test_modules_are_made_and_run_with_fake_tensors(filter, scales, make, allow_real):
    with FakeTensorMode(allow_non_fake_inputs=allow_real):
        model = make(filter=filter, scales=scales)
        model.reset_parameters()
        output = model(torch.zeros(5, 4, 3))
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors_of(model).values())
    assert (output if make is mlp else output[0]).shape == (5, 4, 2 if make is mlp else 8)


def test_tensors_on_meta_are_refused_for_wrong_shapes():
    with pytest.raises(ValueError, match="filter has shape"):
        mlp(torch.empty(7, 7, device="meta"), device="meta")
    with pytest.raises(ValueError, match=r"expected a permutation of 0\.\.7"):
        mlp(torch.empty(7, dtype=torch.int64, device="meta"), device="meta")
    with pytest.raises(ValueError, match="beta has shape"):
        nn.OrthogonalFilterMLP(3, 8, 6, 2, beta=torch.ones(5, device="meta"), device="meta")


def emptied(model):
    """The model in new memory, which conftest fills with NaN (integers with their largest number)."""
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("from_meta", [False, True])
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("scales", [*SCALES])
@pytest.mark.parametrize("filter", KINDS)
def test_reset_parameters_gives_the_constructors_values(filter, scales, make, from_meta):
    """The same seed gives every parameter and buffer the same bits, written into the existing tensors."""
    torch.manual_seed(7)
    made = make(filter, scales)
    model = emptied(make(filter, scales, device="meta") if from_meta else make(filter, scales))
    before = tensors_of(model)
    assert not torch.equal(model.filter, made.filter)
    torch.manual_seed(7)
    model.reset_parameters()
    for name, tensor in tensors_of(model).items():
        assert tensor is before[name]
        assert torch.equal(tensor, tensors_of(made)[name]), name
    assert repr(model) == repr(made)
    x = torch.randn(5, 4, 3)
    for actual, expected in zip(model(x), made(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reset_parameters_keeps_the_filters_precision(dtype):
    model = mlp("haar", "buffers").to(dtype)
    emptied(model).reset_parameters()
    assert model.filter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(model.filter.dtype).eps
    product = model.filter.double() @ model.filter.double().T
    torch.testing.assert_close(product, torch.eye(8, dtype=torch.float64), rtol=0, atol=2 * math.sqrt(8) * eps)
    assert (model.alpha, model.beta) == (0.5, 0.25)


def test_reset_parameters_draws_another_filter_each_time():
    model = mlp("haar")
    first = model.filter.clone()
    model.reset_parameters()
    assert not torch.equal(model.filter, first)


def test_reset_parameters_draws_the_constructors_kind_after_any_load():
    model = mlp("permutation")
    model.load_state_dict(mlp("cyclic").state_dict())
    assert "filter='cyclic'" in repr(model)
    torch.manual_seed(3)
    model.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(model.filter, make_filter("permutation", 8))
    assert "filter='permutation'" in repr(model)


def unchanged(model):
    return model


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CLONES = [unchanged, copy.deepcopy, reloaded]


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("filter", FILTERS[-2:])
def test_reset_parameters_keeps_a_given_filter_that_was_not_lost(filter, make, clone):
    model = torch.nn.Sequential(make(filter, "buffers"))
    for step in (
        unchanged,
        lambda model: model.double().float(),
        lambda model: model.bfloat16(),
        lambda model: model.share_memory(),
        lambda model: model.requires_grad_(False),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    ):
        step(model)
        model = clone(model)
        weight = next(model.parameters()).clone()
        model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
        assert not torch.equal(next(model.parameters()), weight)
        assert torch.equal(model[0].filter, filter)
        assert (model[0].alpha, model[0].beta) == (0.5, 0.25)


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("from_meta", [False, True])
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("filter", FILTERS[-2:])
def test_reset_parameters_refuses_a_given_filter_whose_memory_is_gone(filter, make, from_meta, clone):
    model = emptied(make_in_context(make, filter=filter) if from_meta else make(filter))
    # Uninitialised memory may hold the old values by chance. They do not count, because nothing has written them.
    model.filter.data.copy_(filter)
    model = clone(model)
    weight = next(model.parameters()).clone()
    with pytest.raises(
        ValueError, match=r"filter was given.*to_empty.*cannot restore filter.*state dict.*module\.filter = tensor"
    ):
        model.reset_parameters()
    assert torch.equal(next(model.parameters()).nan_to_num(), weight.nan_to_num())
    # A conversion to another device or dtype does not restore the filter.
    with pytest.raises(ValueError, match="cannot restore filter"):
        model.double().float().reset_parameters()


def fill_in_place(model, source):
    model.filter.copy_(source.filter)


def replace_filter(model, source):
    model.filter = source.filter.clone()


def load(model, source):
    model.load_state_dict(source.state_dict())


def load_assigned(model, source):
    model.load_state_dict(source.state_dict(), assign=True)


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("supply", [fill_in_place, replace_filter, load, load_assigned])
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("filter", FILTERS[-2:])
def test_a_filter_that_was_supplied_again_is_kept(filter, make, supply, clone):
    source = make(filter)
    model = emptied(make_in_context(make, filter=filter))
    supply(model, source)
    model = clone(model)
    model.reset_parameters()
    assert torch.equal(model.filter, source.filter)
    x = torch.randn(5, 4, 3)
    model.load_state_dict(source.state_dict())
    for actual, expected in zip(model(x), source(x), strict=True):
        assert torch.equal(actual, expected)


def replace_memory(model, source):
    model.filter.data = source.filter.clone()


def load_in_inference_mode(model, source):
    with torch.inference_mode():
        model.load_state_dict(source.state_dict())


@pytest.mark.parametrize("supply", [replace_memory, load, load_assigned, load_in_inference_mode])
@pytest.mark.parametrize("emptied_in_inference_mode", [False, True])
@pytest.mark.parametrize("make", [mlp, rnn])
def test_a_filter_counts_as_supplied_in_inference_mode_and_through_data(make, emptied_in_inference_mode, supply):
    """Tensors made in inference mode have no version counter."""
    source = make(Q)
    with torch.inference_mode(emptied_in_inference_mode):
        model = emptied(make(Q))
        supply(model, source)
        model.reset_parameters()
    assert torch.equal(model.filter, Q)


def write_through_data(filter):
    filter.data.copy_(Q)


def broadcast(filter):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        filter.data.copy_(Q)
        dist.broadcast(filter, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("write", [write_through_data, broadcast])
def test_the_messages_advice_keeps_a_write_that_autograd_does_not_see(write):
    model = emptied(mlp(Q))
    write(model.filter)
    with pytest.raises(ValueError, match="autograd does not see") as refusal:
        model.reset_parameters()
    (advice,) = (part for part in str(refusal.value).split(", ") if "clone()" in part)
    exec(advice.split(" keeps")[0], {"module": model})
    model.reset_parameters()
    assert torch.equal(model.filter, Q)


@pytest.mark.parametrize("clone", [False, True])
def test_the_messages_advice_works_for_parameters(clone):
    with torch.device("meta"):
        model = mlp("haar", "parameters")
    emptied(model)
    model.alpha = torch.tensor([0.5])
    model.beta.data.fill_(0.25)
    with pytest.raises(ValueError, match="cannot restore beta") as refusal:
        model.reset_parameters()
    (advice,) = (
        part.split("set them first: ")[-1].split(" keeps")[0].split(". A write")[0]
        for part in str(refusal.value).split("if there was one, ")
        if ("clone()" in part) == clone
    )
    exec(advice, {"module": model, "torch": torch, "tensor": torch.tensor(0.25)})
    model.reset_parameters()
    assert isinstance(model.beta, torch.nn.Parameter)
    assert (model.alpha, model.beta) == (0.5, 0.25)


def test_a_refused_state_dict_leaves_a_lost_filter_lost():
    model = emptied(mlp(Q))
    # Uninitialised memory may hold the old values by chance.
    model.filter.data.copy_(Q)
    for state in (
        {**mlp(Q).state_dict(), "filter": torch.zeros(8, 8)},
        {**mlp(Q).state_dict(), "filter": torch.linalg.qr(torch.randn(7, 7)).Q},
    ):
        with pytest.raises(RuntimeError, match="filter"):
            model.load_state_dict(state)
        with pytest.raises(ValueError, match="cannot restore filter"):
            model.reset_parameters()
    without = {name: tensor for name, tensor in mlp(Q).state_dict().items() if name != "filter"}
    model.load_state_dict(without, strict=False)
    with pytest.raises(ValueError, match="cannot restore filter"):
        model.reset_parameters()


@pytest.mark.parametrize("make", [mlp, rnn])
def test_a_copy_of_a_parametrized_module_knows_whether_its_filter_is_lost(make):
    """torch's parametrization makes a subclass that copies without __getstate__ and __setstate__."""
    healthy, lost, filled = make(Q), emptied(make(Q)), emptied(make(Q))
    lost.filter.data.copy_(Q)
    filled.filter.copy_(Q)
    for model in (healthy, lost, filled):
        model.other = torch.nn.Linear(2, 2)
        torch.nn.utils.parametrize.register_parametrization(
            model, "weight" if make is mlp else "weight_hh", torch.nn.Tanh()
        )
    x = torch.randn(5, 4, 3)
    for actual, expected in zip(copy.deepcopy(healthy)(x), healthy(x), strict=True):
        assert torch.equal(actual, expected)
    for model in (healthy, filled):
        copied = copy.deepcopy(copy.deepcopy(model))
        copied._reset_fixed()
        assert torch.equal(copied.filter, Q)
        assert copied.filter.data_ptr() != model.filter.data_ptr()
        assert copied.other is not model.other
    copied = copy.deepcopy(copy.deepcopy(lost))
    with pytest.raises(ValueError, match="cannot restore filter"):
        copied.reset_parameters()
    copied.filter.copy_(Q)
    copied._reset_fixed()
    # A module that occurs twice is copied once.
    first, second = copy.deepcopy([lost, lost])
    assert first is second


def test_a_subclass_copies_by_its_own_state():
    class WithCache(nn.OrthogonalFilterMLP):
        def __getstate__(self):
            return {**super().__getstate__(), "cache": None}

    model = WithCache(3, 8, 6, 2)
    model.cache = (i for i in range(3))
    assert isinstance(model.cache, types.GeneratorType)
    assert copy.deepcopy(model).cache is None


# ---- Subclasses and replaced layers ----------------------------------------------------------------------------------


def test_the_rnns_constructor_calls_reset_parameters_as_torchs_do():
    class WithoutMemory(nn.OrthogonalFilterRNN):
        def reset_parameters(self):
            super().reset_parameters()
            torch.nn.init.zeros_(self.weight_hh)

    class OfItsOwn(nn.OrthogonalFilterRNN):
        def reset_parameters(self):
            for parameter in self.parameters():
                torch.nn.init.ones_(parameter)

    torch.manual_seed(7)
    plain = rnn("haar")
    torch.manual_seed(7)
    model = WithoutMemory(3, 8, **SCALES["numbers"]())
    assert not model.weight_hh.any()
    for name in ("filter", "weight_ih", "bias"):
        assert torch.equal(getattr(model, name), getattr(plain, name)), name
    torch.manual_seed(7)
    model.reset_parameters()
    assert not model.weight_hh.any()
    for name in ("filter", "weight_ih", "bias"):
        assert torch.equal(getattr(model, name), getattr(plain, name)), name
    torch.manual_seed(7)
    model = OfItsOwn(3, 8, **SCALES["numbers"]())
    assert (model.weight_hh == 1).all()
    assert torch.equal(model.filter, plain.filter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [mlp, rnn])
def test_the_constructor_draws_the_filter_once_and_first(make, kind):
    """The order of the random numbers is fixed, so that a seed gives the same model in every version."""
    torch.manual_seed(7)
    model = make(kind)
    torch.manual_seed(7)
    assert torch.equal(model.filter, make_filter(kind, 8))
    if make is mlp:
        input_layer, output_layer = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)
        assert torch.equal(model.input_layer.weight, input_layer.weight)
        assert torch.equal(model.output_layer.bias, output_layer.bias)
        assert torch.equal(model.weight, torch.randn(6, 8, 8) * (1 / math.sqrt(8)))
    else:
        assert torch.equal(model.weight_ih, torch.randn(8, 3) * (1 / math.sqrt(3)))
        assert torch.equal(model.weight_hh, torch.randn(8, 8) * (1 / math.sqrt(8)))


class Adapted(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.low_rank = base, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.base(x) + self.low_rank


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["input_layer", "output_layer"])
@pytest.mark.parametrize("kind", ["identity", "adapted", "quantized"])
def test_reset_parameters_writes_nothing_where_a_layer_cannot_be_reset(kind, name):
    model = mlp("haar", "buffers")
    if kind == "quantized":
        model = torch.ao.quantization.quantize_dynamic(
            model.eval(), {name: torch.ao.quantization.default_dynamic_qconfig}
        )
    else:
        setattr(model, name, torch.nn.Identity() if kind == "identity" else Adapted(getattr(model, name)))
    before = {key: tensor.clone() for key, tensor in tensors_of(model).items()}
    expected = rf"OrthogonalFilterMLP: {name} is a \w+, which has no method reset_parameters; expected a layer with"
    with pytest.raises(ValueError, match=expected):
        model.reset_parameters()
    for key, tensor in tensors_of(model).items():
        assert torch.equal(tensor, before[key]), key


def test_layers_that_can_be_reset_are():
    model = mlp("haar")
    model.output_layer = torch.nn.LayerNorm(8)
    torch.nn.init.zeros_(model.output_layer.weight)
    model.reset_parameters()
    assert (model.output_layer.weight == 1).all()


@pytest.mark.parametrize("garbage", [torch.full((8, 8), math.nan), torch.zeros(8, 8)])
def test_reset_parameters_refuses_a_given_filter_that_was_overwritten(garbage):
    model = mlp(Q)
    model.filter = garbage
    with pytest.raises(
        ValueError, match=r"filter is not orthogonal.*reset_parameters cannot draw a filter that was given"
    ):
        model.reset_parameters()


def test_reset_parameters_refuses_scales_that_never_had_values():
    with torch.device("meta"):
        model = mlp("haar", "parameters")
    emptied(model)
    with pytest.raises(ValueError, match=r"cannot restore alpha and beta.*module\.alpha = tensor"):
        model.reset_parameters()
    with torch.no_grad():
        model.alpha.fill_(0.5)
        model.beta.fill_(0.25)
    model.reset_parameters()
    assert (model.alpha, model.beta) == (0.5, 0.25)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [mlp, rnn])
@pytest.mark.parametrize("filter", KINDS)
def test_emptied_modules_take_a_state_dict(filter, make, assign):
    source = make(filter, "buffers")
    model = emptied(make_in_context(make, filter=filter, scales="buffers"))
    model.load_state_dict(source.state_dict(), assign=assign)
    # A matrix does not tell how it was drawn.
    assert f"filter='{'tensor' if filter == 'haar' else filter}'" in repr(model)
    x = torch.randn(5, 4, 3)
    for actual, expected in zip(model(x), source(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("filter", ["permutation", pytest.param(Q, id="matrix")])
def test_modules_pickled_before_filters_were_drawn_again(filter):
    model = mlp(filter, "buffers")
    state = {name: value for name, value in vars(model).items() if name not in ("_drawn_filter", "_initial_scales")}
    old = nn.OrthogonalFilterMLP.__new__(nn.OrthogonalFilterMLP)
    old.__setstate__(copy.deepcopy(state))
    if isinstance(filter, torch.Tensor):
        old.reset_parameters()
        assert torch.equal(old.filter, filter)
        with pytest.raises(ValueError, match="cannot restore filter"):
            emptied(old).reset_parameters()
    else:
        torch.manual_seed(7)
        made = mlp(filter, "buffers")
        torch.manual_seed(7)
        emptied(old).reset_parameters()
        for name, tensor in old.state_dict().items():
            assert torch.equal(tensor, made.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mlp, rnn])
def test_fully_sharded_modules_are_initialised_from_meta(make):
    """FSDP2 shards on meta; then to_empty and reset_parameters of every module are called."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_in_context(make, filter="haar")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        for module in model.modules():
            module.reset_parameters()
        output = model(torch.randn(5, 4, 3))
        (output if make is mlp else output[0]).sum().backward()
        assert all(parameter.grad.full_tensor().isfinite().all() for parameter in model.parameters())
        product = model.filter @ model.filter.T
        torch.testing.assert_close(product, torch.eye(8), rtol=0, atol=2 * math.sqrt(8) * 2**-23)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("filter", ["haar", pytest.param(Q, id="matrix")])
def test_an_emptied_depth_parallel_module_is_loaded(filter):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, x = mlp(filter, "buffers"), torch.randn(5, 3)
        model = lcw_ops.distributed.DepthParallel(plain)
        assert model._drawn_filter == plain._drawn_filter
        expected = model(x)
        assert not hasattr(emptied(model), "reset_parameters")
        model.load_full_state_dict(plain.state_dict())
        assert torch.equal(model(x), expected)
    finally:
        dist.destroy_process_group()
