"""Input mean normalization against its formula, torch's BatchNorm and finite differences."""

import copy
import pickle
from functools import partial

import pytest
import torch

from lcw_ops import nn
from lcw_ops.nn import hypersphere

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 2**-52
SHAPES = [(6, 4), (6, 4, 5), (3, 4, 2, 5), (2, 4, 2, 3, 2), (1, 4), (1, 1), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_mean_norm_is_its_formula(shape):
    layer = nn.InputMeanNorm(shape[1], momentum=0.25, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) + 3
    dims = [0, *range(2, len(shape))]
    # 24 numbers below 8 are summed in two orders.
    tolerance = 2 * 24 * 8 * EPS
    torch.testing.assert_close(layer(x), x - x.mean(dims, keepdim=True), rtol=0, atol=tolerance)
    per_channel = (-1, *(1,) * (len(shape) - 2))
    torch.testing.assert_close(layer.running_mean, 0.25 * x.mean(dims), rtol=0, atol=tolerance)
    expected = x - layer.running_mean.view(per_channel)
    assert torch.equal(layer.eval()(x), expected)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_input_mean_norm_derivatives(training, shape):
    layer = nn.InputMeanNorm(shape[1], dtype=torch.float64).train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    grad_output = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layer(x), x, grad_output)
    dims = [0, *range(2, len(shape))]
    expected = grad_output - grad_output.mean(dims, keepdim=True) if training else grad_output
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2 * 24 * 8 * EPS)


def test_running_means_decay():
    decaying, average = nn.InputMeanNorm(3, dtype=torch.float64), nn.InputMeanNorm(3, None, dtype=torch.float64)
    batches = torch.randn(50, 8, 3, dtype=torch.float64) + torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    for batch in batches:
        decaying(batch), average(batch)
    weights = 0.01 * 0.99 ** torch.arange(49, -1, -1, dtype=torch.float64)
    # 50 steps of a few roundings of numbers below 8.
    tolerance = 50 * 4 * 8 * EPS
    torch.testing.assert_close(decaying.running_mean, weights @ batches.mean(1), rtol=0, atol=tolerance)
    torch.testing.assert_close(average.running_mean, batches.mean((0, 1)), rtol=0, atol=tolerance)
    as_torch = torch.nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    for batch in batches:
        as_torch(batch)
    torch.testing.assert_close(average.running_mean, as_torch.running_mean, rtol=0, atol=tolerance)
    for layer in (decaying, average):
        assert layer.num_batches_tracked == 50
        assert layer.num_batches_tracked.dtype == torch.int64
        before = layer.running_mean.clone()
        layer.eval()(batches[0] + 100)
        assert torch.equal(layer.running_mean, before)
        for reset in (layer.reset_running_stats, layer.reset_parameters):
            layer.train()(batches[0])
            reset()
            assert not layer.running_mean.any()
            assert layer.num_batches_tracked == 0
    assert not list(decaying.parameters())


@pytest.mark.parametrize("momentum", [0, 1])
def test_extreme_momenta(momentum):
    layer, x = nn.InputMeanNorm(2, momentum), torch.randn(5, 2)
    layer(x)
    assert torch.equal(layer.running_mean, momentum * x.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_averaged_in_float32(dtype):
    """The sum of 50,000 numbers near 1000 overflows float16. In bfloat16 it stops growing."""
    x = (torch.randn(50_000, 2) + 1000).to(dtype)
    exact_mean = x.double().mean(0)
    for layer in (nn.InputMeanNorm(2, 1.0), nn.InputMeanNorm(2, 1.0, dtype=dtype), nn.InputMeanNorm(2, 1.0).to(dtype)):
        assert layer.running_mean.dtype == torch.float32
        output = layer(x)
        assert output.dtype == dtype
        exact = x.double() - exact_mean
        # The mean is rounded in float32, then once to dtype.
        allowed = 8 * 1000 * 2**-23 + torch.finfo(dtype).eps * exact.abs()
        assert ((output.double() - exact).abs() <= allowed).all()
        assert (layer.running_mean.double() - exact_mean).abs().max() <= 8 * 1000 * 2**-23
        with torch.no_grad():
            assert ((layer.eval()(x).double() - exact).abs() <= allowed).all()


def test_a_running_mean_of_a_16_bit_model_still_moves():
    """In bfloat16, 1 % of a small difference is less than half an ulp."""
    model = torch.nn.Sequential(nn.InputMeanNorm(1)).bfloat16()
    model[0].running_mean.fill_(1.0)
    for _ in range(700):
        model(torch.full((2, 1), 1.25, dtype=torch.bfloat16))
    # 0.25 x 0.99^700 = 2.2e-4, and 700 roundings.
    assert abs(model[0].running_mean.item() - 1.25) < 2.2e-4 + 700 * 2**-24
    assert model.double()[0].running_mean.dtype == torch.float64


def test_a_submodule_of_a_subclass_is_converted_too():
    class WithScale(nn.InputMeanNorm):
        def __init__(self):
            super().__init__(4)
            self.scale = torch.nn.Linear(4, 4)

    layer = WithScale().bfloat16()
    assert (layer.scale.weight.dtype, layer.running_mean.dtype) == (torch.bfloat16, torch.float32)


def test_input_mean_norm_keeps_the_memory_format():
    layer = nn.InputMeanNorm(4)
    for dtype in (torch.float32, torch.bfloat16):
        for x, layout in [
            (torch.randn(2, 4, 3, 5), torch.channels_last),
            (torch.randn(2, 4, 3, 5, 2), torch.channels_last_3d),
        ]:
            x = x.to(dtype)
            for training in (True, False):
                layer.train(training)
                assert layer(x.to(memory_format=layout)).is_contiguous(memory_format=layout)
                assert layer(x).is_contiguous()
                # The same numbers, summed in another order: 60 below 5.
                moved = layer(x.to(memory_format=layout))
                layer.running_mean.fill_(0.5)
                atol = 2 * 60 * 5 * 2**-23 + (0 if dtype == torch.float32 else 5 * 2**-8)
                if training:
                    torch.testing.assert_close(moved, layer(x), rtol=0, atol=atol)
    transposed = torch.randn(5, 4, 6).mT[:, :4]
    expected = transposed - transposed.mean((0, 2), keepdim=True)
    torch.testing.assert_close(layer.train()(transposed), expected, rtol=0, atol=2 * 20 * 5 * 2**-23)


def test_an_empty_batch_moves_no_statistics():
    for momentum in (0.01, None):
        layer = nn.InputMeanNorm(4, momentum)
        layer(torch.randn(3, 4, 2))
        before = copy.deepcopy(layer.state_dict())
        for shape in ((0, 4), (0, 4, 2), (3, 4, 0)):
            x = torch.randn(shape, requires_grad=True)
            output = layer(x)
            assert output.shape == shape
            output.sum().backward()
            assert x.grad.shape == shape
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_input_mean_norm_has_torchs_representation():
    assert repr(nn.InputMeanNorm(3)) == "InputMeanNorm(3, momentum=0.01)"


def test_skip_init():
    before = torch.get_rng_state()
    skipped = torch.nn.utils.skip_init(nn.InputMeanNorm, 3, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    made = nn.InputMeanNorm(3, dtype=torch.float64)
    assert {k: (v.shape, v.dtype, v.device) for k, v in skipped.state_dict().items()} == {
        k: (v.shape, v.dtype, v.device) for k, v in made.state_dict().items()
    }


def test_input_mean_norm_has_state():
    layer, x = nn.InputMeanNorm(4), torch.randn(3, 4, 2)
    layer(x), layer(2 * x)
    assert list(layer.state_dict()) == ["running_mean", "num_batches_tracked"]
    loaded = nn.InputMeanNorm(4, device="meta").to_empty(device="cpu")
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.num_batches_tracked == 2
        assert torch.equal(other.eval()(x), copy.deepcopy(layer).eval()(x))
        other.train()(x)
        assert layer.num_batches_tracked == 2
    assert nn.InputMeanNorm(4, device="meta")(x.to("meta")).is_meta


def test_input_mean_norm_under_func():
    layer, x = nn.InputMeanNorm(4, dtype=torch.float64), torch.randn(3, 5, 4, 2, dtype=torch.float64)
    buffers = {name: buffer.expand(3, *buffer.shape).clone() for name, buffer in layer.named_buffers()}
    call = partial(torch.func.functional_call, layer)
    output = torch.vmap(call)(buffers, (x,))
    assert torch.equal(output, torch.stack([copy.deepcopy(layer)(sample) for sample in x]))
    torch.testing.assert_close(buffers["running_mean"], 0.01 * x.mean((1, 3)), rtol=0, atol=8 * EPS)

    def loss(x, buffers):
        return call(buffers, (x,)).pow(3).sum()

    one = {name: buffer[0] for name, buffer in buffers.items()}
    gradient = torch.func.grad(loss)(x[0], one)
    squares = 3 * (x[0] - x[0].mean((0, 2), keepdim=True)).square()
    torch.testing.assert_close(gradient, squares - squares.mean((0, 2), keepdim=True), rtol=0, atol=200 * EPS)


def test_a_refused_input_moves_no_statistics():
    layer = nn.InputMeanNorm(4)
    with pytest.raises(ValueError, match="input has shape"):
        layer(torch.randn(2, 3))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nn.InputMeanNorm(4, momentum=1.5), ValueError, "InputMeanNorm: momentum is 1.5; expected 0 to 1"),
        (lambda: nn.InputMeanNorm(4, momentum=-0.1), ValueError, "InputMeanNorm: momentum is -0.1"),
        (lambda: nn.InputMeanNorm(4, momentum="0.1"), TypeError, "InputMeanNorm: momentum is a str"),
        (
            lambda: nn.InputMeanNorm(4)(torch.randn(2, 5, 4)),
            ValueError,
            r"InputMeanNorm: input has shape \(2, 5, 4\); expected \(N, 4, \*\)",
        ),
        (lambda: nn.InputMeanNorm(4)(torch.randn(4)), ValueError, r"input has shape \(4,\)"),
        (
            lambda: nn.InputMeanNorm(4)(torch.randn(2, 4).double()),
            TypeError,
            "input is torch.float64; expected float32, b",
        ),
        (
            lambda: nn.InputMeanNorm(4).double()(torch.randn(2, 4)),
            TypeError,
            "expected torch.float64, because running_mean",
        ),
        (lambda: nn.InputMeanNorm(4)(torch.ones(2, 4, dtype=torch.int64)), TypeError, "input is torch.int64"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_layer_keeps_its_old_address():
    """Older pickles name the layer as lcw_ops.nn.hypersphere.InputMeanNorm."""
    assert hypersphere.InputMeanNorm is nn.InputMeanNorm


# ---- update_means ---------------------------------------------------------------------------------------------------


def mean_nets(dtype=torch.float64, momentum=0.01):
    return torch.nn.Sequential(
        nn.InputMeanNorm(4, momentum, dtype=dtype),
        torch.nn.Conv1d(4, 3, 2),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.BatchNorm1d(3),
        nn.InputMeanNorm(3, None, dtype=dtype),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 2),
    ).to(dtype)


def batches_of(sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 4, 5, generator=generator, dtype=torch.float64).to(dtype) * 2 + 3 for size in sizes]


def expected_means(model, batches):
    """The means of the inputs of both layers over all samples, written out, with a batch's mean subtracted."""
    first, second = [], []
    for x in batches:
        first.append(x.double().transpose(1, 2).flatten(0, 1))
        h = torch.nn.functional.conv1d(x - x.mean((0, 2), keepdim=True), model[1].weight, model[1].bias).relu()
        norm = model[4]
        h = (h - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt()
        second.append((h * norm.weight[:, None] + norm.bias[:, None]).transpose(1, 2).flatten(0, 1))
    return torch.cat(first).mean(0), torch.cat(second).detach().mean(0)


@pytest.mark.parametrize("sizes", [(8,), (5, 1, 9), (3, 0, 4)], ids=str)
def test_update_means_gives_the_means_over_all_samples(sizes):
    """swa_utils.update_bn passes these layers by, and their momentum weighs the last batches more."""
    model, batches = mean_nets(), batches_of(sizes)
    for layer in (model[0], model[5]):
        layer.running_mean.fill_(7.0)
    torch.optim.swa_utils.update_bn([batch for batch in batches if len(batch) > 1], model)
    expected = expected_means(model, batches)
    statistics = copy.deepcopy(model[4].state_dict())
    state = torch.get_rng_state()
    assert nn.update_means(batches, model) is None
    # Dropout would draw, and batch norm would move its own statistics.
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(statistics[key], value) for key, value in model[4].state_dict().items())
    for layer, mean in zip((model[0], model[5]), expected, strict=True):
        # Sums of at most 75 numbers below 16.
        torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=2 * 75 * 16 * EPS)
        assert layer.num_batches_tracked == sum(size > 0 for size in sizes)


@pytest.mark.parametrize("kind", ["tensors", "lists", "tuples", "one-shot", "device"])
def test_update_means_takes_the_loaders_of_update_bn(kind):
    model, batches = mean_nets(), batches_of((5, 3))
    nn.update_means(batches, model)
    expected = [model[0].running_mean.clone(), model[5].running_mean.clone()]
    model[0].reset_running_stats()
    targets = torch.zeros(3)
    loader = {
        "tensors": batches,
        "lists": [[batch, targets] for batch in batches],
        "tuples": [(batch, targets) for batch in batches],
        "one-shot": iter(batches),
        "device": batches,
    }[kind]
    nn.update_means(loader, model, *(["cpu"] if kind == "device" else []))
    assert torch.equal(model[0].running_mean, expected[0])
    assert torch.equal(model[5].running_mean, expected[1])
    dataset = torch.utils.data.TensorDataset(torch.cat(batches), torch.zeros(8))
    nn.update_means(torch.utils.data.DataLoader(dataset, batch_size=3), model)
    torch.testing.assert_close(model[0].running_mean, expected[0], rtol=0, atol=2 * 40 * 16 * EPS)


@pytest.mark.parametrize("error", [False, True])
def test_update_means_restores_flags_momenta_and_hooks(error):
    model = mean_nets(momentum=0.3)
    model[1].eval()
    model[5].eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    batches = batches_of((5, 3))
    if error:
        with pytest.raises(RuntimeError):
            nn.update_means([*batches, torch.randn(2, 4, 9, dtype=torch.float64)], model)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    else:
        nn.update_means(batches, model)
        assert not torch.equal(before["0.running_mean"], model[0].running_mean)
    assert [module.training for module in model.modules()] == flags
    assert (model[0].momentum, model[5].momentum) == (0.3, None)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_update_means_after_averaging_weights():
    """The averaged model's own means, where the training's are those of other weights."""
    model, batches = mean_nets(torch.float32), batches_of((16, 16), torch.float32)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for batch in batches:
            model(batch * 3 - 10)
            model[1].weight.add_(1.0)
            averaged.update_parameters(model)
    nn.update_means(batches, averaged)
    ours = averaged.module
    expected = expected_means(copy.deepcopy(ours).double(), [batch.double() for batch in batches])
    for layer, mean in zip((ours[0], ours[5]), expected, strict=True):
        assert layer.running_mean.dtype == torch.float32
        # Each input has been rounded by a few layers of float32, from numbers below 64.
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0, atol=20 * 64 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_means_sums_16_bits_without_loss(dtype):
    layer = torch.nn.Sequential(nn.InputMeanNorm(2, dtype=dtype))
    x = torch.full((3000, 2), 1.0078125, dtype=dtype)
    nn.update_means([x, x, -x[:1]], layer)
    expected = 1.0078125 * 5999 / 6001
    torch.testing.assert_close(layer[0].running_mean, torch.full((2,), expected), rtol=2**-23, atol=0)


def test_update_means_of_a_layer_that_is_called_twice_or_never():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = nn.InputMeanNorm(2), nn.InputMeanNorm(2)

        def forward(self, x):
            self.norm(input=x + 2)
            return self.norm(x)

    model = Twice()
    model.unused.running_mean.fill_(5.0)
    nn.update_means([torch.zeros(3, 2), torch.ones(5, 2)], model)
    torch.testing.assert_close(model.norm.running_mean, torch.full((2,), 1 + 5 / 8))
    assert model.norm.num_batches_tracked == 4
    assert torch.equal(model.unused.running_mean, torch.full((2,), 5.0))
    plain = torch.nn.Linear(2, 2)
    nn.update_means(iter(()), plain)
    assert plain.training


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "update_means: loader has given no sample to an InputMeanNorm"),
        ([torch.zeros(0, 4, 5, dtype=torch.float64)], "no sample"),
        ([torch.full((2, 4, 5), float("nan"), dtype=torch.float64)], "NaN or infinite"),
        ([torch.full((2, 4, 5), float("inf"), dtype=torch.float64)], "NaN or infinite"),
        ([torch.zeros(4, dtype=torch.float64)], "InputMeanNorm: input has shape"),
    ],
)
def test_update_means_refuses(batches, words):
    model = mean_nets()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        nn.update_means(batches, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
