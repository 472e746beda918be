"""The profiler on ordinary models: figures against independent float64 computations, reasons, and kinds of inputs."""

import csv
import dataclasses
import gc
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.profiles import figure, measure, row
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lcw_ops.distributed import DepthParallel
from lcw_ops.nn import (
    GmPLinear,
    LCWLinear,
    OrthogonalFilterMLP,
    OrthogonalFilterRNN,
    WeightNormLinear,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def square_loss(output):
    return output.square().sum()


def norm(*tensors):
    wide = [tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in tensors]
    return math.hypot(*(tensor.abs().square().sum().sqrt().item() for tensor in wide))


# --- the Jacobian


def largest_singular_value(function, point):
    jacobian = torch.autograd.functional.jacobian(function, point)
    return torch.linalg.svdvals(jacobian.reshape(-1, point.numel()))[0].item()


def test_attention_without_dropout_has_a_jacobian():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 6, 16)
    result = measure(layer, x)
    expected = largest_singular_value(layer.double(), x[:1].double())
    assert result.jacobians["input -> output"].largest == pytest.approx(expected, rel=1e-3)
    assert torch.backends.mkldnn.enabled


def test_the_second_derivative_of_an_lstm_is_that_of_plain_operators():
    lstm, x = nn.LSTM(5, 9, batch_first=True), torch.randn(3, 8, 5)
    result = measure(lstm, x)
    expected = largest_singular_value(lambda x: lstm.double()(x)[0], x[:1].double())
    assert result.jacobians["input -> output"].largest == pytest.approx(expected, rel=1e-3)


class LossFirst(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.square().mean(), y


@dataclasses.dataclass
class Output:
    step: int
    logits: torch.Tensor


class Dataclass(nn.Linear):
    def forward(self, x):
        return Output(3, super().forward(x))


@pytest.mark.parametrize("kind", [LossFirst, Dataclass])
def test_the_first_output_with_samples_has_the_jacobian(kind):
    layer = kind(6, 80)
    result = measure(layer, torch.randn(4, 6))
    assert result.absent == {}
    values = torch.linalg.svdvals(layer.weight.double())
    spectrum = result.jacobians["input -> output"]
    assert (spectrum.largest, spectrum.smallest) == pytest.approx((values[0].item(), values[-1].item()), rel=1e-3)
    assert figure(result, "gradient_norm", kind.__name__) == pytest.approx(1.0, rel=1e-5)


def test_a_model_that_returns_its_loss_is_differentiated_by_it():
    class Loss(nn.Linear):
        def forward(self, x):
            return super().forward(x).square().mean()

    layer, x = Loss(3, 2), torch.randn(5, 3)
    result = measure(layer, x)
    loss = functional.linear(x, layer.weight, layer.bias).square().mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert figure(result, "weight_gradient_norm", "Loss") == pytest.approx(norm(layer.weight.grad), rel=1e-5)


# --- rows


class Queries(nn.Module):
    """Learned queries are the attention's input, and a linear layer is read without a call."""

    def __init__(self):
        super().__init__()
        self.queries, self.attention = nn.Parameter(torch.randn(5, 8)), nn.MultiheadAttention(8, 2, batch_first=True)
        self.read, self.unused = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        mixed, _ = self.attention(self.queries.expand(len(x), -1, -1), x, x)
        return functional.linear(mixed, self.read.weight, self.read.bias)


def test_attention_and_what_is_read_without_a_call_have_rows():
    model, x = Queries(), torch.randn(3, 7, 8)
    result = measure(model, x, loss=square_loss)
    assert list(result.columns["name"]) == ["attention.out_proj", "attention", "read", "unused", "Queries"]
    assert list(result.columns["parameters"]) == [72, 216, 27, 18, 40]
    square_loss(model(x)).backward()
    for name, parameters in {
        "attention.out_proj": [model.attention.out_proj.weight],
        "attention": [model.attention.in_proj_weight],
        "read": [model.read.weight],
        "Queries": [model.queries],
    }.items():
        expected = norm(*(parameter.grad for parameter in parameters))
        assert figure(result, "weight_gradient_norm", name) == pytest.approx(expected, rel=1e-5)
    assert "its parent reads" in result.reason("state_rms", row(result, "read"))
    assert "not called" in result.reason("state_rms", row(result, "unused"))
    assert "does not depend" in result.reason("weight_gradient_norm", row(result, "unused"))
    mixed, _ = model.attention(model.queries.expand(3, -1, -1), x, x)
    assert figure(result, "state_rms", "attention") == pytest.approx(mixed.square().mean().sqrt().item(), rel=1e-5)


def test_a_block_has_a_row_if_its_output_is_its_own():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.passes = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Identity())

        def forward(self, x):
            return x + self.passes(self.branch(x)).view(-1, 4)

    result = measure(nn.Sequential(Residual(), Residual()), torch.randn(6, 4))
    leaves = ["branch.0", "branch.1", "passes.0"]
    assert list(result.columns["name"]) == [f"{i}.{name}" for i in (0, 1) for name in leaves][:3] + ["0"] + [
        f"1.{name}" for name in leaves
    ] + ["1"]
    assert result.columns["parameters"].sum() == 2 * 20
    assert figure(result, "gradient_norm", "1") == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_layer_is_one_row(name):
    layer = getattr(parametrizations, name)(nn.Linear(6, 6)).eval()
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2)), torch.randn(4, 6)
    result = measure(model, x, loss=square_loss)
    assert list(result.columns["name"]) == ["0", "1", "2"]
    square_loss(model(x)).backward()
    own = [parameter for parameter in layer.parameters() if parameter.dim() > 1]
    assert figure(result, "parameters", "0") == sum(parameter.numel() for parameter in layer.parameters())
    expected = norm(*(parameter.grad for parameter in own))
    assert figure(result, "weight_gradient_norm", "0") == pytest.approx(expected, rel=1e-4)
    cosine = functional.cosine_similarity(layer.weight.double(), x.double().mean(0), dim=1)
    angle = torch.rad2deg(cosine.asin()).square().mean().sqrt().item()
    assert figure(result, "shift_angle", "0") == pytest.approx(angle, rel=1e-4)


def test_shared_parameters_are_counted_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    result = measure(nn.Sequential(first, second, first), torch.randn(3, 4))
    assert list(result.columns["parameters"]) == [20, 4, 0]


# --- the units' dimension


def shift(output, unit_dim):
    return output.double().movedim(unit_dim, -1).flatten(0, -2).mean(0).square().mean().sqrt().item()


def test_units_are_last_after_linear_layers_and_channels_after_convolutions():
    """The sizes are equal, so only the module tells."""
    x = torch.randn(16, 6, 6, 6) + torch.arange(6.0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Identity(), nn.Conv2d(6, 6, 1), nn.Identity(), nn.ReLU())
    result = measure(model, x)
    states = [x]
    for layer in model:
        states.append(layer(states[-1]))
    expected = [shift(state, dim) for state, dim in zip(states[1:], (-1, -1, -1, 1, 1, 1), strict=True)]
    np.testing.assert_allclose(result.columns["activation_shift"], expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 20), (16, 3, 20)])
def test_channels_of_a_convolution_with_and_without_a_batch(shape):
    layer, x = nn.Conv1d(3, 6, 3), torch.randn(shape) + 3
    result = measure(nn.Sequential(layer, nn.Identity()), x)
    np.testing.assert_allclose(result.columns["activation_shift"], shift(layer(x), -2), rtol=1e-4)


class ChannelsLast(nn.Module):
    """A convolution, then a linear layer over the channels, and back."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x)
        return x + self.linear(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)


def test_units_of_a_block_are_found_by_their_number():
    model, x = ChannelsLast(), torch.randn(4, 3, 5, 7) + 2
    result = measure(model, x)
    assert figure(result, "activation_shift", "ChannelsLast") == pytest.approx(shift(model(x), 1), rel=1e-4)
    assert figure(result, "activation_shift", "linear") == pytest.approx(
        shift(model.linear(model.conv(x).permute(0, 2, 3, 1)), -1), rel=1e-4
    )


@pytest.mark.parametrize("kind", [LCWLinear, GmPLinear, WeightNormLinear])
def test_the_angle_to_the_mean_input_of_our_layers(kind):
    layer, x = kind(6, 5), torch.randn(16, 6) + torch.arange(6.0)
    result = measure(layer, x)
    cosine = functional.cosine_similarity(layer.weight.double(), x.double().mean(0), dim=1)
    assert figure(result, "shift_angle", kind.__name__) == pytest.approx(
        torch.rad2deg(cosine.asin()).square().mean().sqrt().item(), rel=1e-4, abs=1e-4
    )


# --- FLOPs


def flops(model, inputs, **options):
    timing = measure(
        model, inputs, jacobian=False, loss=lambda out: (out[0] if isinstance(out, tuple) else out).sum(), **options
    ).timing
    assert timing.uncounted == ()
    return timing.forward_flops, timing.backward_flops


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_flops_of_recurrent_layers(kind):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    steps, samples, features, width = 5, 3, 8, 16
    layer = getattr(nn, kind)(features, width)
    forward, backward = flops(layer, torch.randn(steps, samples, features))
    of_input, of_state = (2 * steps * samples * gates * width * size for size in (features, width))
    assert forward == of_input + of_state
    # The first state requires no gradient: plain operators leave out one of the steps, the fused kernel computes it.
    least = of_input + of_state + of_state * (steps - 1) // steps
    assert least <= backward <= of_input + 2 * of_state


def test_flops_of_a_frozen_lstm_are_those_of_its_input():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 16)), torch.randn(5, 3, 8)
    model[1].requires_grad_(False)
    product = 2 * 5 * 3 * 4 * 16
    assert flops(model, x) == (2 * 15 * 64 + product * (8 + 16), 2 * 15 * 64 + product * (8 + 16))


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout, self.qkv = dropout, nn.Linear(32, 96)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_of_attention_do_not_depend_on_the_kernel(dropout):
    projection, attention = 2 * 4 * 16 * 32 * 96, 2 * 2 * 4 * 4 * 16 * 16 * 8
    # The input needs no gradient.
    assert flops(Attention(dropout), torch.randn(4, 16, 32)) == (projection + attention, projection + 2 * attention)


def test_flops_of_grouped_transposed_and_complex_products():
    x = torch.randn(2, 8, 10)
    depthwise = 2 * 2 * 10 * 8 * 3
    assert flops(nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=8)), x) == (depthwise, depthwise)
    transposed = 2 * 2 * 10 * 8 * 4 * 3
    assert flops(nn.Sequential(nn.ConvTranspose1d(8, 4, 3, 2)), x) == (transposed, transposed)
    layer = nn.Linear(10, 3, dtype=torch.complex64)
    timing = measure(layer, x.to(torch.complex64), jacobian=False).timing
    assert timing.forward_flops == 4 * 2 * 2 * 8 * 10 * 3


def test_what_has_no_formula_is_named():
    class Inverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))

        def forward(self, x):
            return (x * torch.linalg.inv(self.weight)).sum(-1)

    result = measure(Inverse(), torch.randn(5, 4, 4))
    assert "aten.linalg_inv_ex" in result.timing.uncounted
    table = " ".join(result.table().split())
    assert "forward rate not counted" in table
    assert "aten.linalg_inv_ex" in table
    assert "0.0 % of" not in table
    assert result.timing.summary()["uncounted"] == result.timing.uncounted


# --- checkpointing, freezing, complex numbers


class Checkpointed(nn.Module):
    """``use_reentrant``: as in torch; None: without checkpoints. One module is called in two segments."""

    def __init__(self):
        super().__init__()
        self.use_reentrant = None
        self.first, self.shared = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.deep = OrthogonalFilterMLP(6, 8, 5, 6)

    def forward(self, x):
        x = self.first(x)
        for block in (self.shared, self.deep, self.shared):
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_row(use_reentrant):
    model, x = Checkpointed(), torch.randn(8, 6)
    plain = measure(model, x, loss=square_loss)
    model.use_reentrant = use_reentrant
    result = measure(model, x, loss=square_loss)
    assert list(result.columns["name"]) == list(plain.columns["name"])
    for column, values in plain.columns.items():
        if column != "name":
            np.testing.assert_allclose(result.columns[column], values, rtol=1e-5, err_msg=column)
            assert (result.missing[column] > 0).tolist() == (plain.missing[column] > 0).tolist()
    assert result.timing.repeats == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reentrant_checkpointing_neither_runs_hooks_nor_touches_gradients():
    model, ran = Checkpointed(), []
    model.use_reentrant = True
    kept = torch.ones(6, 6)
    model.first.weight.grad = kept
    model.first.weight.register_post_accumulate_grad_hook(ran.append)
    measure(model, torch.randn(8, 6))
    assert model.first.weight.grad is kept
    assert torch.equal(kept, torch.ones(6, 6))
    assert ran == []
    model(torch.randn(2, 6)).sum().backward()
    assert len(ran) == 1


def test_no_gradient_of_a_frozen_recurrence_is_not_a_gradient_of_zero(tmp_path):
    model = OrthogonalFilterMLP(6, 8, 5, 3).requires_grad_(False)
    model.output_layer.requires_grad_()
    result = measure(model, torch.randn(8, 6))
    for column in ("gradient_norm", "gradient_lower", "gradient_upper"):
        assert "nothing that is trained comes before it" in result.reason(column, row(result, "layer[3]"))
    assert "frozen" in result.reason("weight_gradient_norm", row(result, "layer[3]"))
    assert figure(result, "gradient_norm", "output_layer") == pytest.approx(1.0, rel=1e-5)
    result.to_json(tmp_path / "profile.json")
    missing = json.loads((tmp_path / "profile.json").read_text())["missing"]
    assert missing["gradient_norm"] == {result.reason("gradient_norm", 0): [[0, 5]]}


def test_a_layer_under_no_grad_says_so():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                wanted = self.teacher(x)
            return self.student(x) - wanted

    result = measure(Teacher(), torch.randn(5, 4))
    assert result.reason("gradient_norm", row(result, "teacher")) == "it was computed under torch.no_grad()"


def test_norms_of_complex_numbers_have_both_parts():
    layer, x = nn.Linear(6, 5, dtype=torch.complex64), torch.randn(8, 6, dtype=torch.complex64)

    def loss(output):
        return output.imag.square().sum()

    result = measure(layer, x, loss=loss)
    output = layer(x)
    output.retain_grad()
    loss(output).backward()
    assert figure(result, "state_rms", "Linear") == pytest.approx(norm(output) / math.sqrt(40), rel=1e-5)
    assert figure(result, "gradient_norm", "Linear") == pytest.approx(norm(output.grad), rel=1e-5)
    assert figure(result, "weight_gradient_norm", "Linear") == pytest.approx(norm(layer.weight.grad), rel=1e-5)
    assert figure(result, "activation_shift", "Linear") == pytest.approx(norm(output.mean(0)) / math.sqrt(5), rel=1e-5)
    assert "complex64" in result.absent["input -> output"]


class LastState(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[1][0]


def test_the_gradient_of_a_layer_that_is_read_by_its_last_state():
    result = measure(LastState(nn.GRU(4, 8)), torch.randn(7, 3, 4), loss=lambda h_n: h_n.sum())
    # dE/dh_n is 1 in all its entries.
    assert figure(result, "gradient_norm", "rnn") == pytest.approx(math.sqrt(3 * 8), rel=1e-6)


# --- what is not finite, memory


def test_the_first_layer_that_is_not_finite_is_named(tmp_path):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    model[2].weight.data[0, 0] = math.nan
    result = measure(model, torch.randn(8, 6))
    assert result.not_finite == "the output of 2, row 3 of 5, is NaN (its parameters are not finite)"
    table = " ".join(result.table().split())
    assert result.not_finite in table
    assert table.split("2 nan")[0].endswith("0.0 ") or "2 nan" in table
    result.to_csv(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # A measured NaN is written, a missing figure is empty.
    assert (rows[2]["state_rms"], rows[2]["gain_upper"]) == ("nan", "")
    assert rows[0]["gradient_norm"] == "nan"

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.last(Exploding.apply(self.second(self.first(x))))

    assert measure(Explodes(), torch.randn(8, 6)).not_finite == (
        "the output's gradient of second, row 2 of 3, is infinite"
    )


def test_the_peak_of_memory_is_that_of_this_run():
    lifetime = torch.ones(2**25)
    held = lifetime.nbytes
    del lifetime
    gc.collect()
    before = measure(nn.Linear(4, 4), torch.randn(2, 4))
    # Two results of 32 MB are alive at once.
    after = measure(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), torch.randn(2**21, 4), jacobian=False)
    if before.peak_memory_bytes is None:
        assert "earlier peak" in before.absent["peak memory"]
        return
    assert after.peak_memory_bytes - before.peak_memory_bytes > 50e6
    from lcw_ops.profile import machine

    assert machine.peak_memory_bytes() >= before.peak_memory_bytes + held / 2


# --- inputs


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return super().forward(input=x) * scale + shift


class FromDict(nn.Linear):
    def forward(self, batch):
        return super().forward(batch["image"])


@pytest.mark.parametrize(
    ("kind", "arguments", "factor"),
    [
        (Scaled, {"inputs": {"x": torch.ones(4, 6), "scale": 3.0}}, 3.0),
        (Scaled, {"inputs": torch.ones(4, 6), "kwargs": {"scale": 2.0}}, 2.0),
        (Scaled, {"inputs": {"x": torch.ones(4, 6)}, "kwargs": {"scale": 2.0, "shift": 0.0}}, 2.0),
        (Scaled, {"inputs": (), "kwargs": {"x": torch.ones(4, 6)}}, 1.0),
        (FromDict, {"inputs": {"image": torch.ones(4, 6)}}, 1.0),
    ],
)
def test_arguments_by_name(kind, arguments, factor):
    layer = kind(6, 3)
    result = measure(layer, **arguments)
    expected = factor * functional.linear(torch.ones(4, 6), layer.weight, layer.bias)
    assert figure(result, "state_rms", kind.__name__) == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-5)
    assert result.samples == 4
    assert result.absent == {}


def test_a_module_that_takes_its_input_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(input=x)

    result = measure(ByName(), torch.randn(4, 6) + 1)
    assert figure(result, "shift_angle", "fc") > 0


def test_a_model_that_writes_to_its_input_finds_it_unchanged_in_every_pass():
    class Writes(nn.Linear):
        def forward(self, x):
            x += 1
            return super().forward(x)

    x = torch.zeros(4, 6)
    measure(Writes(6, 3), x, repeats=3)
    assert not x.any()


@pytest.mark.parametrize("kind", ["embedded", "bare", "ours"])
def test_samples_of_a_sequence_with_the_time_first(kind):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn, self.head = nn.Embedding(10, 6), nn.LSTM(6, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.rnn(self.embedding(tokens))[0][-1])

    model, x = {
        "embedded": lambda: (Classifier(), torch.randint(10, (9, 4))),
        "bare": lambda: (nn.GRU(6, 8), torch.randn(9, 4, 6)),
        "ours": lambda: (LastState(OrthogonalFilterRNN(6, 8, length=9)), torch.randn(9, 4, 6)),
    }[kind]()
    result = measure(model, x)
    assert result.samples == 4
    if kind == "embedded":
        assert "int64" in result.absent["input -> output"]
        return

    def first_output(sample):
        output = model.double()(torch.cat([sample, x[:, 1:].double()], 1))
        return output[0][:, 0] if kind == "bare" else output[0]

    expected = largest_singular_value(first_output, x[:, :1].double())
    assert result.jacobians["input -> output"].largest == pytest.approx(expected, rel=1e-3)


def test_a_batch_first_input_that_the_model_transposes_has_its_samples_first():
    class Transposes(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 8)

        def forward(self, x):
            return self.rnn(x.transpose(0, 1))[0][-1]

    assert measure(Transposes(), torch.randn(4, 9, 6)).samples == 4


def test_a_lazy_model_stays_lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    result = measure(model, torch.randn(5, 6))
    assert list(result.columns["parameters"]) == [28, 8, 10]
    assert all(isinstance(layer, nn.modules.lazy.LazyModuleMixin) for layer in model)
    assert model[0].has_uninitialized_params()


class Nothing(nn.Sequential):
    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_refusals():
    with pytest.raises(TypeError, match=r"model is a ScriptModule.*expected a torch.nn.Module that runs in Python"):
        measure(torch.jit.script(nn.Sequential(nn.Linear(6, 3))), torch.randn(5, 6))
    with pytest.raises(ValueError, match="the model's weight is on meta and has no values; expected tensors with"):
        measure(nn.Linear(6, 3, device="meta"), torch.randn(5, 6))
    with pytest.raises(TypeError, match="kwargs is a list; expected a dict"):
        measure(nn.Linear(6, 3), torch.randn(5, 6), kwargs=[1])
    with pytest.raises(ValueError, match="the model has neither; expected calls of its modules or parameters"):
        measure(Nothing(nn.Tanh()), torch.randn(5, 6))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_part_has_a_row_with_the_reason():
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 3)))
    result = measure(model, torch.randn(5, 6))
    assert result.reason("state_rms", row(result, "1")) == "a ScriptModule takes no hooks"
    assert result.columns["parameters"].sum() == 42 + 21


def test_integers_into_a_frozen_model_give_states_and_reasons():
    result = measure(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).requires_grad_(False), torch.randint(9, (5, 3)))
    assert np.isfinite(result.columns["state_rms"]).all()
    assert "requires no gradient" in result.reason("gradient_norm", 0)
    assert "frozen" in result.reason("weight_gradient_norm", 0)


# --- wrappers


class Chain(nn.Sequential):
    """A class with its own forward: torch does not compile nn.Sequential in place."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def small():
    torch.manual_seed(3)
    return Chain(nn.Linear(6, 6), nn.Tanh(), Chain(nn.Linear(6, 3)))


def check_wrapped(wrapped, x):
    plain = measure(small(), x, loss=square_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch compiles a part whose input is not a leaf with this warning, without the profiler too.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        result = measure(wrapped, x, loss=square_loss)
    assert list(result.columns["name"]) == list(plain.columns["name"]) == ["0", "1", "2.0"]
    for column in ("parameters", "state_rms", "gradient_norm", "weight_gradient_norm"):
        np.testing.assert_allclose(result.columns[column], plain.columns[column], rtol=1e-5, err_msg=column)
    assert result.absent == {}
    assert result.timing.forward_flops == plain.timing.forward_flops
    return result


@pytest.mark.parametrize("kind", ["whole", "part", "in place"])
def test_a_compiled_model_is_watched_uncompiled_and_timed_compiled(kind):
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    model, x = small(), torch.randn(5, 6)
    if kind == "whole":
        model = torch.compile(model, backend=backend)
    elif kind == "part":
        model[2] = torch.compile(model[2], backend=backend)
    else:
        model.compile(backend=backend)
    check_wrapped(model, x)
    assert len(calls) == 1
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel():
    wrapped, x = nn.parallel.DistributedDataParallel(small()), torch.randn(5, 6)
    check_wrapped(wrapped, x)
    # It can go on training.
    for _ in range(2):
        wrapped(x).sum().backward()


@pytest.mark.usefixtures("process_group")
def test_fully_sharded_parameters():
    from torch.distributed.fsdp import fully_shard

    model, x = small(), torch.randn(5, 6)
    fully_shard(model[2])
    fully_shard(model)
    result = check_wrapped(model, x)
    assert np.isfinite(result.columns["shift_angle"][[0, 2]]).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("process_group")
def test_layers_over_one_rank():
    torch.manual_seed(4)
    mlp, x = OrthogonalFilterMLP(6, 8, 9, 3), torch.randn(5, 6)
    mlp.bias.data.normal_()
    plain, result = (measure(model, x, loss=square_loss) for model in (mlp, DepthParallel(mlp)))
    assert list(result.columns["name"]) == list(plain.columns["name"])
    for column, values in plain.columns.items():
        if column != "name":
            np.testing.assert_allclose(result.columns[column], values, rtol=1e-4, atol=1e-6, err_msg=column)
    assert result.jacobians["h_0 -> h_L"].largest == pytest.approx(plain.jacobians["h_0 -> h_L"].largest, rel=1e-4)
    frozen = measure(DepthParallel(mlp).requires_grad_(False), torch.randint(3, (5, 6)).float(), loss=None)
    assert frozen.columns["parameters"].sum() == sum(parameter.numel() for parameter in mlp.parameters())


def profile_a_rank(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}/ranks", rank=rank, world_size=2)
    torch.manual_seed(4)
    mlp, x = OrthogonalFilterMLP(6, 8, 9, 3), torch.randn(5, 6)
    result = measure(DepthParallel(mlp), x, loss=square_loss)
    results.put((rank, {name: column.tolist() for name, column in result.columns.items()}))
    dist.destroy_process_group()


def test_layers_over_two_ranks_are_those_of_one_process(tmp_path):
    torch.manual_seed(4)
    mlp, x = OrthogonalFilterMLP(6, 8, 9, 3), torch.randn(5, 6)
    plain = measure(mlp, x, loss=square_loss)
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=profile_a_rank, args=(rank, tmp_path, results)) for rank in (0, 1)]
    try:
        for process in ranks:
            process.start()
        found = dict(results.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
    names = found[0]["name"][:-1] + found[1]["name"][1:]
    assert names == list(plain.columns["name"])
    for column in ("state_rms", "gradient_norm", "weight_gradient_norm", "activation_shift", "gain_upper"):
        spread = np.array(found[0][column][:-1] + found[1][column][1:])
        np.testing.assert_allclose(spread, plain.columns[column], rtol=1e-4, atol=1e-6, err_msg=column)


# --- failures


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.block(self.first(x))


def test_a_model_that_fails_midway_shows_the_rows_before():
    with pytest.warns(RuntimeWarning, match=r"the model failed.*\(in block\.1\)"):
        result = measure(Fails(), torch.randn(5, 6))
    assert "mat1 and mat2" in result.failure
    assert result.failure.endswith("(in block.1)")
    assert list(result.columns["name"]) == ["first", "block.0", "block.1"]
    assert np.isfinite(result.columns["state_rms"][:2]).all()
    assert result.reason("state_rms", 2) == "the module was not called in this pass"
    assert result.reason("gradient_norm", 0) == "the model failed before the backward pass"
    assert set(result.absent) == {"loss", "FLOPs", "time", "peak memory", "input -> output"}
    assert result.failure in " ".join(result.table().split())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure(nn.Linear(2, 2), torch.randn(5, 6))


def test_a_backward_pass_that_fails_leaves_the_states():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no way back")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(Broken.apply(self.first(x)))

    result = measure(Model(), torch.randn(5, 6))
    assert np.isfinite(result.columns["state_rms"]).all()
    assert figure(result, "gradient_norm", "last") == pytest.approx(1.0, rel=1e-5)
    assert "no way back" in result.reason("gradient_norm", 0)
    assert "no way back" in result.absent["backward pass"]
    assert "no way back" in result.absent["time"]
