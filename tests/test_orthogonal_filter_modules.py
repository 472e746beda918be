"""OrthogonalFilterMLP and OrthogonalFilterRNN: what they have in common with torch.nn's modules, and what is new."""

import copy
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcw_ops import nn
from lcw_ops.nn.orthogonal_filter import make_filter
from lcw_ops.ops import backends

KINDS = ["haar", "cyclic", "permutation", "identity"]

pytestmark = pytest.mark.usefixtures("kernel_under_test", "made_on_device")


def as_matrix(filter, width):
    return torch.eye(width, dtype=torch.float64)[filter] if filter.dtype == torch.int64 else filter.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 17, 64])
def test_every_filter_is_orthogonal_to_its_rounding(kind, width):
    matrix = as_matrix(make_filter(kind, width), width)
    # Rows are rounded to float32 once: each of N products is off by at most 2 x 2^-24 of its size.
    tolerance = 2 * math.sqrt(width) * 2**-23
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=tolerance)


def test_haar_filter_has_no_preferred_sign():
    """A QR decomposition fixes the signs of R's diagonal, which would bias the trace. Haar has E[trace] = 0."""
    traces = torch.stack([make_filter("haar", 4, torch.float64).trace() for _ in range(2000)])
    # Var[trace] = 1 for Haar on O(N), so the mean of 2000 has the standard error 0.022. The limit is five such errors.
    assert abs(traces.mean()) < 0.12
    assert traces.var().item() == pytest.approx(1.0, abs=0.2)


def test_cyclic_and_identity_filters_match_their_names():
    h = torch.arange(5.0)
    assert torch.equal(h[make_filter("cyclic", 5)], torch.tensor([4.0, 0, 1, 2, 3]))
    assert torch.equal(h[make_filter("identity", 5)], h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_qr_factor_is_accepted_and_a_random_matrix_is_not(dtype):
    width = 48
    q = torch.linalg.qr(torch.randn(width, width, dtype=dtype)).Q
    assert torch.equal(make_filter(q, width, dtype), q)
    almost = q.clone()
    almost[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"not orthogonal: \|O O\^T - I\| reaches 0\.\d+.*torch.linalg.qr"):
        make_filter(almost, width, dtype)


class LargestFloat64(TorchDispatchMode):
    """The bytes of the largest float64 tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.mark.parametrize("layer", [0, 511, 512, 799])
@pytest.mark.parametrize("value", [2.0, math.nan])
def test_filters_of_many_layers_are_checked_part_by_part(layer, value):
    """A wrong matrix is found in any part, without a float64 copy of all (6.6 GB for 50,000 matrices of width 128)."""
    filters = torch.linalg.qr(torch.randn(45, 45, dtype=torch.float64)).Q.float().repeat(800, 1, 1)
    with LargestFloat64() as largest:
        make_filter(filters, 45)
    assert 0 < largest.bytes <= 8 * 2**20 < filters.numel() * 8
    filters[layer, 7, 3] = value
    with pytest.raises(ValueError, match="not orthogonal"):
        make_filter(filters, 45)


def test_one_filter_per_layer():
    q = torch.linalg.qr(torch.randn(6, 5, 5, dtype=torch.float64)).Q.float()
    model = nn.OrthogonalFilterMLP(3, 5, 6, 2, filter=q)
    assert model(torch.randn(4, 3)).shape == (4, 2)


@pytest.mark.parametrize(
    ("filter", "error", "message"),
    [
        ("random", ValueError, "filter is 'random'; expected one of 'haar'"),
        (3, TypeError, "filter is a int"),
        (torch.ones(4, 4), ValueError, "not orthogonal"),
        (torch.full((4, 4), torch.nan), ValueError, "not orthogonal"),
        (torch.eye(3), ValueError, "filter has shape"),
        (torch.tensor([0, 1, 1, 2]), ValueError, "; expected a permutation of 0..3"),
        (torch.tensor([0, 1, 2]), ValueError, "; expected a permutation of 0..3"),
        (torch.eye(4, dtype=torch.int32), TypeError, "filter is torch.int32"),
        (torch.eye(4).bfloat16(), TypeError, "a matrix in 16 bits is not orthogonal"),
        (torch.eye(4).expand(2, 4, 4), ValueError, r"filter has shape \(2, 4, 4\); expected \(4, 4\) or \(3, 4, 4\)"),
    ],
)
def test_an_invalid_filter_says_why(filter, error, message):
    with pytest.raises(error, match=message):
        nn.OrthogonalFilterMLP(2, 4, 3, 2, filter=filter)


def written_out(model, x):
    """The formula of the class docstring, layer by layer, in float64."""
    double = copy.deepcopy(model).double()
    matrix = as_matrix(model.filter, model.width)
    h = double.input_layer(x.double())
    beta = 1 / model.depth if model.beta is None else model.beta
    alpha = 1 - beta if model.alpha is None else model.alpha
    activation = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}
    for weight, bias in zip(double.weight, double.bias, strict=True):
        branch = activation[model.activation](torch.nn.functional.linear(h, weight, bias))
        h = alpha * h @ matrix.T + beta * branch
    return double.output_layer(h)


@pytest.mark.parametrize("filter", KINDS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
def test_mlp_is_its_formula(filter, activation):
    model = nn.OrthogonalFilterMLP(7, 12, 30, 3, filter, activation=activation)
    x = torch.randn(5, 7)
    torch.testing.assert_close(model(x).double(), written_out(model, x), rtol=1e-5, atol=1e-5)


def test_the_kernel_of_the_device_is_what_runs_here(device):
    """LCW_OPS_TEST_DEVICE=cuda proves nothing about the kernel if the modules run on the CPU or on the reference."""
    model = nn.OrthogonalFilterMLP(3, 8, 4, 2)
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers(), model(torch.randn(5, 3)))}
    assert places == {device.type}
    assert backends.requested() == ("cuda" if device.type == "cuda" else "cpp")


def test_mlp_takes_any_leading_shape():
    model = nn.OrthogonalFilterMLP(7, 8, 4, 3)
    x = torch.randn(2, 5, 7)
    assert torch.equal(model(x), model(x.reshape(10, 7)).reshape(2, 5, 3))
    assert model(x[0, 0]).shape == (3,)
    assert model(x[:0]).shape == (0, 5, 3)


def test_mlp_alpha_and_beta_may_be_tensors_or_parameters():
    beta = torch.nn.Parameter(torch.full((4,), 0.25))
    model = nn.OrthogonalFilterMLP(3, 8, 4, 2, beta=beta, alpha=torch.full((4,), 0.75))
    assert "beta" in dict(model.named_parameters())
    assert "alpha" in dict(model.named_buffers())
    model(torch.randn(5, 3)).sum().backward()
    assert model.beta.grad.shape == (4,)
    fixed = nn.OrthogonalFilterMLP(3, 8, 4, 2, beta=0.25, alpha=0.75)
    fixed.load_state_dict({k: v for k, v in model.state_dict().items() if k not in ("alpha", "beta")})
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), fixed(x))


@pytest.mark.parametrize(("activation", "variance"), [("tanh", 1.0), ("relu", 2.0), ("sigmoid", 1.0)])
def test_initial_weights_have_the_variance_of_the_formula(activation, variance):
    model = nn.OrthogonalFilterMLP(3, 64, 50, 2, activation=activation)
    count = model.weight.numel()
    # The variance of a sample variance of n Gaussians is 2 / n: the tolerance is five standard errors.
    assert model.weight.var().item() * 64 == pytest.approx(variance, rel=5 * math.sqrt(2 / count))
    assert not model.bias.any()


def test_mlp_state_dict_round_trip_includes_the_filter(tmp_path):
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    assert set(model.state_dict()) == {
        "weight",
        "bias",
        "filter",
        "input_layer.weight",
        "input_layer.bias",
        "output_layer.weight",
        "output_layer.bias",
    }
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(4, 3)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("filter", KINDS)
def test_state_dicts_of_every_precision_come_back(filter, dtype):
    """A float64 module's filter was once rounded to float32. Loading accepts such a filter as orthogonal."""
    model = nn.OrthogonalFilterRNN(3, 48, filter=filter, length=5).to(dtype)
    other = nn.OrthogonalFilterRNN(3, 48, filter=filter, length=5).to(dtype)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.filter, model.filter)
    x = torch.randn(5, 2, 3, dtype=dtype)
    assert torch.equal(other(x)[0], model(x)[0])


def changed(filter, index, value):
    filter = filter.clone()
    filter[index] = value
    return filter


@pytest.mark.parametrize(
    ("made_with", "change", "message"),
    [
        ("haar", lambda q: changed(q, (0, 0), 2.0), "not orthogonal"),
        ("haar", lambda q: changed(q, (3, 4), torch.nan), "not orthogonal"),
        ("haar", lambda q: q.bfloat16(), "because a matrix in 16 bits"),
        ("haar", lambda q: q[:, :4], r"has shape \(8, 4\); expected \(8, 8\)"),
        ("haar", lambda q: torch.arange(8), "a filter of the state dict's kind"),
        ("cyclic", lambda p: changed(p, 0, p[1]), r"expected a permutation of 0\.\.7"),
        ("cyclic", lambda p: p + 1, r"expected a permutation of 0\.\.7"),
        # Without the check torch would round these to integers.
        ("cyclic", lambda p: p.float() + 0.5, "a filter of the state dict's kind"),
        ("cyclic", lambda p: torch.eye(8), "a filter of the state dict's kind"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_an_invalid_filter_is_refused_like_a_size_mismatch(made_with, change, message, assign):
    """The error names the filter beside the other mismatches. The filter stays as it was; everything else is loaded."""

    def network():
        return torch.nn.Sequential(
            torch.nn.Linear(3, 3), nn.OrthogonalFilterMLP(3, 8, 6, 2, filter=made_with), torch.nn.Linear(2, 2)
        )

    state = copy.deepcopy(network().state_dict())
    state["1.filter"] = change(state["1.filter"])
    state["2.weight"] = torch.zeros(5, 5)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight") as caught:
        model.load_state_dict(state, assign=assign)
    assert caught.match(rf"OrthogonalFilterMLP: the state dict's 1\.filter.*{message}")
    assert "Missing key" not in str(caught.value)
    assert "Unexpected key" not in str(caught.value)
    assert f"filter='{made_with}'" in repr(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if name in ("1.filter", "2.weight") else state)[name]), name


@pytest.mark.parametrize("loaded", KINDS)
@pytest.mark.parametrize("made_with", KINDS)
def test_repr_names_the_filter_that_was_loaded(made_with, loaded):
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2, filter=made_with)
    state = {**model.state_dict(), "filter": make_filter(loaded, 8)}
    if (made_with == "haar") != (loaded == "haar"):
        with pytest.raises(RuntimeError, match="a filter of the state dict's kind"):
            model.load_state_dict(state)
        assert f"filter='{made_with}'" in repr(model)
        return
    model.load_state_dict(state)
    # A matrix does not tell how it was drawn.
    assert f"filter='{'tensor' if loaded == 'haar' else loaded}'" in repr(model)
    model.load_state_dict(model.state_dict())
    assert f"filter='{'tensor' if loaded == 'haar' else loaded}'" in repr(model)


def test_loading_its_own_filter_keeps_its_name():
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    model.load_state_dict(model.state_dict())
    assert "filter='haar'" in repr(model)
    model.load_state_dict({"weight": torch.zeros(6, 8, 8)}, strict=False)
    assert "filter='haar'" in repr(model)


def test_a_meta_module_takes_its_filter_from_a_state_dict():
    source = nn.OrthogonalFilterMLP(3, 8, 6, 2, filter="permutation")
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2, filter="cyclic", device="meta")
    model.load_state_dict(source.state_dict(), assign=True)
    assert "filter='permutation'" in repr(model)
    x = torch.randn(4, 3)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
def test_inputs_of_another_dtype_are_refused(dtype):
    message = rf"input is {dtype}; expected torch.float32, as the parameters are. Convert one of them"
    with pytest.raises(TypeError, match=f"OrthogonalFilterMLP: {message}"):
        nn.OrthogonalFilterMLP(3, 8, 6, 2)(torch.ones(4, 3, dtype=dtype))
    # torch.nn.RNN raises ValueError too.
    for network in (nn.OrthogonalFilterRNN(3, 8, length=5), torch.nn.RNN(3, 8)):
        with pytest.raises(ValueError, match=message if isinstance(network, nn.OrthogonalFilterRNN) else None):
            network(torch.ones(5, 4, 3, dtype=dtype))


class Failing(torch.nn.Linear):
    def forward(self, x):
        raise torch.OutOfMemoryError("out of memory in here")


def test_a_replaced_layers_own_error_is_not_blamed_on_the_input():
    mlp = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    mlp.input_layer = Failing(6, 8)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory in here"):
        mlp(torch.randn(5, 6))
    mlp.input_layer = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh())
    assert mlp(torch.randn(5, 6)).shape == (5, 2)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        mlp(torch.randn(5, 3))


WRONG_INPUTS = [
    (torch.zeros(5, 4), ValueError, r"input has shape \(5, 4\); expected \(\*, 3\)"),
    (
        torch.zeros(5, 3, dtype=torch.float64),
        TypeError,
        "input is torch.float64; expected torch.float32, as the parameters are",
    ),
]


@pytest.mark.parametrize(("x", "error", "message"), WRONG_INPUTS, ids=["shape", "dtype"])
def test_a_wrong_input_keeps_the_linear_layers_error_as_its_cause(x, error, message):
    with pytest.raises(error, match=f"OrthogonalFilterMLP: {message}") as refusal:
        nn.OrthogonalFilterMLP(3, 8, 6, 2)(x.to(torch.empty(0).device))
    assert isinstance(refusal.value.__cause__, RuntimeError)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("x", "error", "message"), WRONG_INPUTS, ids=["shape", "dtype"])
def test_a_compiled_network_names_a_wrong_input(x, error, message, before):
    torch.compiler.reset()
    mlp = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    compiled, right = torch.compile(mlp, backend="aot_eager"), torch.randn(5, 3)
    if before:
        torch.testing.assert_close(compiled(right), mlp(right))
    with pytest.raises(error, match=f"OrthogonalFilterMLP: {message}"):
        compiled(x.to(right.device))
    torch.testing.assert_close(compiled(right), mlp(right))


def test_autocast_takes_inputs_that_it_casts(device):
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    rnn = nn.OrthogonalFilterRNN(3, 8, length=5)
    with torch.autocast(device.type, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert model(torch.ones(4, 3, dtype=dtype)).shape == (4, 2)
            assert rnn(torch.ones(5, 4, 3, dtype=dtype))[0].shape == (5, 4, 8)
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(TypeError, match=f"input is {dtype}"):
                model(torch.ones(4, 3, dtype=dtype))
            with pytest.raises(ValueError, match=f"input is {dtype}"):
                rnn(torch.ones(5, 4, 3, dtype=dtype))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_modules_copy_and_pickle(clone):
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2, filter="permutation")
    model(torch.randn(4, 3))
    x = torch.randn(4, 3)
    assert torch.equal(clone(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_modules_keep_a_float32_filter(dtype):
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    filter = model.filter.clone()
    model.to(dtype)
    assert model.weight.dtype == dtype
    assert torch.equal(model.filter, filter)
    assert model(torch.randn(4, 3, dtype=dtype)).dtype == dtype
    assert nn.OrthogonalFilterMLP(3, 8, 6, 2, dtype=dtype).filter.dtype == torch.float32


def test_sixteen_bit_modules_keep_exact_scales():
    """alpha = 1 - 2e-5 would become 1 in bfloat16, for buffers and for trained parameters alike."""
    alpha = torch.full((6,), 1 - 2e-5)
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2, alpha=alpha, beta=torch.nn.Parameter(1 - alpha)).bfloat16()
    assert torch.equal(model.alpha, alpha)
    assert torch.equal(model.beta, 1 - alpha)
    assert isinstance(model.beta, torch.nn.Parameter)
    assert model.alpha.data_ptr() != alpha.data_ptr()


def test_a_double_module_can_be_made_a_sixteen_bit_one():
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2).double().bfloat16()
    assert model(torch.randn(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_double_modules_stay_orthogonal():
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2).double()
    assert model(torch.randn(4, 3).double()).dtype == torch.float64


def test_modules_with_a_named_filter_can_be_built_on_the_meta_device():
    """A named filter needs no check, and nothing is computed on meta."""
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2, filter="cyclic", device="meta")
    assert model.weight.is_meta
    assert model.filter.is_meta


@pytest.mark.parametrize("filter", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_rnn_is_its_formula(filter, batch_first):
    rnn = nn.OrthogonalFilterRNN(3, 10, batch_first=batch_first, filter=filter, length=15)
    x = torch.randn(15, 4, 3)
    h_0 = torch.randn(1, 4, 10)
    output, h_n = rnn(x.transpose(0, 1) if batch_first else x, h_0)
    matrix = as_matrix(rnn.filter, 10)
    double = copy.deepcopy(rnn).double()
    h, states = h_0[0].double(), []
    for x_t in x.double():
        pre = h @ double.weight_hh.T + x_t @ double.weight_ih.T + double.bias
        h = (1 - 1 / 15) * h @ matrix.T + torch.tanh(pre) / 15
        states.append(h)
    expected = torch.stack(states, dim=1 if batch_first else 0)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h_n.double(), h.unsqueeze(0), rtol=1e-5, atol=1e-6)


def test_rnn_has_the_calling_convention_of_torch():
    ours = nn.OrthogonalFilterRNN(3, 10, length=7)
    theirs = torch.nn.RNN(3, 10)
    for x in (torch.randn(7, 4, 3), torch.randn(7, 3)):
        for h_0 in (None, torch.randn(1, *x.shape[1:-1], 10)):
            assert [t.shape for t in ours(x, h_0)] == [t.shape for t in theirs(x, h_0)]


def test_rnn_without_a_batch_is_a_batch_of_one():
    rnn = nn.OrthogonalFilterRNN(3, 10, length=7)
    x, h_0 = torch.randn(7, 3), torch.randn(1, 10)
    output, h_n = rnn(x, h_0)
    batched, batched_h_n = rnn(x.unsqueeze(1), h_0.unsqueeze(1))
    assert torch.equal(output, batched.squeeze(1))
    assert torch.equal(h_n, batched_h_n.squeeze(1))


def test_rnn_trains_every_parameter_and_never_the_filter():
    rnn = nn.OrthogonalFilterRNN(3, 10, length=7)
    assert set(dict(rnn.named_parameters())) == {"weight_ih", "weight_hh", "bias"}
    output, h_n = rnn(torch.randn(7, 4, 3))
    (output.sum() + h_n.square().sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in rnn.parameters())
    assert rnn.filter.grad is None


def test_rnn_parameter_count_is_the_papers():
    """Elman net with scalar input and 10 classes: N^2 + 12 N + 10."""
    width = 20
    rnn, head = nn.OrthogonalFilterRNN(1, width, length=784), torch.nn.Linear(width, 10)
    count = sum(parameter.numel() for parameter in [*rnn.parameters(), *head.parameters()])
    assert count == width**2 + 12 * width + 10


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.OrthogonalFilterMLP(3, 8, -1, 2), ValueError, "depth is -1; expected at least 1"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 0, 2), ValueError, "depth is 0"),
        (lambda: nn.OrthogonalFilterMLP(3, 0, 2, 2), ValueError, "width is 0"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2.0, 2), TypeError, "depth is a float; expected an int"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, beta=math.nan), ValueError, "beta is nan; expected finite numbers"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, alpha=math.inf), ValueError, "alpha is inf"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, activation="gelu"), ValueError, "activation is 'gelu'"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, segment=0), ValueError, "segment is 0"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, segment=2.5), TypeError, "segment is 2.5; expected an int"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, beta="a"), TypeError, "beta is a str"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, beta=torch.ones(3)), ValueError, r"beta has shape \(3,\)"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2, beta=torch.ones(2, 1)), ValueError, r"beta has shape \(2, 1\)"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2)(torch.randn(5, 4)), ValueError, r"expected \(\*, 3\)"),
        (lambda: nn.OrthogonalFilterMLP(3, 8, 2, 2)([1.0, 2.0, 3.0]), TypeError, "input is a list; expected a tensor"),
        (
            lambda: nn.OrthogonalFilterRNN(3, 8, length=5)(torch.randn(5, 2, 3), [torch.zeros(1, 2, 8)]),
            TypeError,
            "hx is a list; expected a tensor",
        ),
        (lambda: nn.OrthogonalFilterRNN(3, 8), ValueError, "expected exactly one of them.*length=T"),
        (lambda: nn.OrthogonalFilterRNN(3, 8, beta=0.1, length=5), ValueError, "expected exactly one of them"),
        (lambda: nn.OrthogonalFilterRNN(3, 8, length=0), ValueError, "length is 0"),
        (lambda: nn.OrthogonalFilterRNN(3, 8, length=5)(torch.randn(5, 2, 4)), ValueError, "input has shape"),
        (
            lambda: nn.OrthogonalFilterRNN(3, 8, length=5)(torch.randn(5, 2, 3), torch.zeros(1, 3, 8)),
            ValueError,
            r"hx has shape \(1, 3, 8\); expected \(1, 2, 8\)",
        ),
    ],
)
def test_bad_construction_says_what_to_do(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_repr_names_what_matters():
    mlp = repr(nn.OrthogonalFilterMLP(3, 8, 4, 2, filter="cyclic", segment=2))
    assert "width=8, depth=4, filter='cyclic', beta=0.25, activation='tanh', segment=2" in mlp
    rnn = repr(nn.OrthogonalFilterRNN(3, 8, batch_first=True, length=10))
    assert rnn == "OrthogonalFilterRNN(3, 8, batch_first=True, filter='haar', beta=0.1, activation='tanh')"


def test_mlp_compiles_into_one_graph():
    model = nn.OrthogonalFilterMLP(3, 8, 6, 2)
    x = torch.randn(4, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_deep_net_keeps_its_gradient_and_a_plain_one_loses_it():
    """The method's purpose. ``ratio`` is the gradient norm at the first of 2,000 layers divided by that at the last."""
    depth, width = 2000, 32

    def ratio(**scales):
        model = nn.OrthogonalFilterMLP(8, width, depth, 4, **scales)
        loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 8)), torch.randint(4, (16,)))
        loss.backward()
        first, last = model.bias.grad[0].norm(), model.bias.grad[-1].norm()
        return (first / last).item()

    kept, lost = ratio(), ratio(filter="identity", alpha=0.0, beta=1.0)
    print(f"gradient at layer 1 over layer {depth}: orthogonal filter {kept:.3g}, plain {lost:.3g}")
    # The net's Jacobian has singular values in [exp(-c (1 + s)), exp(c (s - 1))], which is [0.05, 2.8] with
    # c = beta depth = 1 and s = max ||W_l||_2 <= 2.
    assert 0.05 < kept < 2.8
    assert lost < 1e-6
