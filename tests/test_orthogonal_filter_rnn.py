"""OrthogonalFilterRNN runs side by side with torch.nn.RNN wherever the two are meant to behave alike."""

import copy
import inspect
import io
import math

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lcw_ops import nn
from lcw_ops.profile import profile

pytestmark = pytest.mark.usefixtures("kernel_under_test", "made_on_device")


def make_ours(batch_first=False, **options):
    return nn.OrthogonalFilterRNN(3, 8, length=7, batch_first=batch_first, **options)


def make_theirs(batch_first=False, **options):
    return torch.nn.RNN(3, 8, batch_first=batch_first, **options)


BOTH = pytest.mark.parametrize("make", [make_ours, make_theirs])
SHAPES = pytest.mark.parametrize(("shape", "batch_first"), [((7, 4, 3), False), ((4, 7, 3), True), ((7, 3), False)])


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


# ---- Memory of the results -------------------------------------------------------------------------------------------

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize("mode", [*MODES])
@pytest.mark.parametrize("solver", ["sequential", "parallel"])
@SHAPES
def test_h_n_is_its_own_memory(shape, batch_first, solver, mode, run):
    rnn = make_ours(batch_first, solver=solver)
    torch.compiler.reset()
    call = torch.compile(rnn, fullgraph=True, backend="aot_eager") if run == "compiled" else rnn
    with MODES[mode]():
        output, h_n = call(torch.randn(shape))
        assert memory(output) != memory(h_n)
        assert h_n.untyped_storage().nbytes() == h_n.numel() * h_n.itemsize
        before = output.clone()
        h_n.detach().zero_()
        assert torch.equal(output, before)


def test_a_saved_h_n_is_small():
    _, h_n = nn.OrthogonalFilterRNN(1, 20, length=10_000)(torch.randn(10_000, 1, 1))
    sizes = []
    for tensor in (h_n, h_n.detach().clone()):
        file = io.BytesIO()
        torch.save(tensor.detach(), file)
        sizes.append(file.tell())
    assert sizes[0] == sizes[1] < 10_000


@BOTH
@SHAPES
def test_h_n_may_be_edited_before_backward(shape, batch_first, make):
    """An edit after the loss does not change the gradients if the loss saved no result."""
    rnn, x = make(batch_first), torch.randn(shape)

    def gradients(edit):
        output, h_n = rnn(x)
        loss = output.sum() + h_n.sum()
        edit(h_n)
        return torch.autograd.grad(loss, [*rnn.parameters()])

    expected = gradients(lambda h_n: None)
    for edit in (lambda h_n: h_n.detach().zero_(), lambda h_n: h_n.zero_(), lambda h_n: h_n.data.fill_(math.nan)):
        for actual, exact in zip(gradients(edit), expected, strict=True):
            assert torch.equal(actual, exact)


def test_an_output_edited_before_backward_raises_and_its_clone_does_not():
    """The table in the class's docstring names this difference from torch.nn.RNN."""
    rnn = make_ours()
    output, _ = rnn(torch.randn(7, 4, 3))
    loss = output.sum()
    output.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    output = rnn(torch.randn(7, 4, 3))[0].clone()
    loss = output.sum()
    output.detach().zero_()
    loss.backward()


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@BOTH
def test_outputs_may_be_edited_without_a_graph(make, mode):
    rnn, x = make(), torch.randn(7, 4, 3)
    with MODES[mode]():
        (output, h_n), (again, _) = rnn(x), rnn(x)
        output.zero_()
        assert torch.equal(h_n[0], again[-1])


# ---- The constructor -------------------------------------------------------------------------------------------------


def test_everything_after_the_sizes_is_given_by_name():
    parameters = inspect.signature(nn.OrthogonalFilterRNN).parameters
    by_position = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert by_position == ["input_size", "hidden_size"]
    assert {"bias", "batch_first", "length"} <= set(parameters)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2,), {}, "3 arguments by position; expected two.*num_layers.*batch_first=True"),
        ((True,), {}, "3 arguments by position"),
        ((2, "tanh"), {}, "4 arguments by position"),
        ((), {"num_layers": 1}, "num_layers.*run several of these modules"),
        ((), {"bidirectional": False}, "bidirectional.*flipped"),
        ((), {"dropout": 0.1}, r"dropout.*torch\.nn\.Dropout"),
        ((), {"nonlinearity": "relu"}, "nonlinearity.*activation="),
        ((), {"proj_size": 4}, r"proj_size.*torch\.nn\.Linear"),
        ((), {"num_layers": 2, "foo": 1}, "num_layers"),
        ((), {"foo": 1}, "unexpected keyword argument 'foo'"),
        ((), {"input_size": 4}, "multiple values for argument 'input_size'"),
        *(
            ((), {name: flag}, f"{name} is {flag!r}; expected True or False")
            for name in ("batch_first", "bias")
            for flag in (1, 0, "yes", None, torch.tensor(True, device="cpu"))
        ),
    ],
)
def test_arguments_of_torchs_rnn_say_what_to_do(arguments, options, message):
    with pytest.raises(
        TypeError, match=f"OrthogonalFilterRNN.*{message}" if "tensor" not in message else "batch_first|bias"
    ):
        nn.OrthogonalFilterRNN(3, 5, *arguments, length=7, **options)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((2,), {}), ((), {"num_layers": 2}), ((), {"bias": 1}), ((), {"batch_first": None}), ((), {"beta": 0.5})],
    ids=str,
)
def test_an_error_of_a_subclass_has_its_name(arguments, options):
    class Encoder(nn.OrthogonalFilterRNN):
        pass

    with pytest.raises((TypeError, ValueError), match=r"^Encoder: "):
        Encoder(3, 5, *arguments, length=7, **options)


def test_a_subclass_may_add_arguments():
    class Classifier(nn.OrthogonalFilterRNN):
        def __init__(self, features, width, classes, num_layers=1):
            super().__init__(features, width, length=7)
            self.num_layers, self.head = num_layers, torch.nn.Linear(width, classes)

        def forward(self, input):
            return self.head(super().forward(input)[1])

    assert Classifier(3, 8, 2, num_layers=1)(torch.randn(7, 4, 3)).shape == (1, 4, 2)


def test_alpha_and_beta_of_the_mlp_are_given_by_name():
    """lcw_ops.functional takes them in the other order."""
    with pytest.raises(TypeError, match="positional"):
        nn.OrthogonalFilterMLP(3, 8, 6, 2, "haar", 0.9, 0.1)


@pytest.mark.parametrize(
    ("activation", "mode"), [("tanh", "RNN_TANH"), ("relu", "RNN_RELU"), ("sigmoid", "RNN_SIGMOID")]
)
def test_attributes_that_generic_code_reads(activation, mode):
    ours = make_ours(batch_first=True, activation=activation)
    theirs = make_theirs(batch_first=True, nonlinearity="tanh" if activation == "sigmoid" else activation)
    for name in ("input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size"):
        assert (getattr(ours, name), type(getattr(ours, name))) == (getattr(theirs, name), type(getattr(theirs, name)))
    assert (ours.mode, ours.nonlinearity) == (mode, activation)
    if activation != "sigmoid":
        assert (ours.mode, ours.nonlinearity) == (theirs.mode, theirs.nonlinearity)
    assert [len(weights) for weights in ours.all_weights] == [3]
    assert {id(weight) for weight in ours.all_weights[0]} == {id(weight) for weight in ours.parameters()}
    assert ours.flatten_parameters() is theirs.flatten_parameters() is None


def test_bias_false_omits_the_bias():
    rnn = make_ours(bias=False)
    assert set(rnn.state_dict()) == {"weight_ih", "weight_hh", "filter"}
    assert rnn.bias is None
    assert [len(weights) for weights in rnn.all_weights] == [2] == [len(w) for w in make_theirs(bias=False).all_weights]
    assert repr(rnn).startswith("OrthogonalFilterRNN(3, 8, bias=False, filter")
    with_bias = make_ours()
    with_bias.load_state_dict({**rnn.state_dict(), "bias": torch.zeros(8)})
    x, hx = torch.randn(7, 4, 3), torch.randn(1, 4, 8)
    for actual, expected in zip(rnn(x, hx), with_bias(x, hx), strict=True):
        torch.testing.assert_close(actual, expected)
    rnn.reset_parameters()
    rnn(x)[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    assert torch.equal(copy.deepcopy(rnn)(x)[1], rnn(x)[1])


# ---- A call ----------------------------------------------------------------------------------------------------------


@BOTH
@SHAPES
def test_hx_is_the_first_state(shape, batch_first, make):
    rnn, x = make(batch_first), torch.randn(shape)
    batch = shape[:-1][0 if batch_first else 1 :][:1] if len(shape) == 3 else ()
    hx = torch.randn(1, *batch, 8)
    by_name, by_position = rnn(x, hx=hx), rnn(x, hx)
    for actual, expected in zip(by_name, by_position, strict=True):
        assert torch.equal(actual, expected)
    # Run half of the sequence, then the rest from its last state.
    time = 1 if batch_first else 0
    first, rest = x.split([3, 4], dim=time)
    output, h_n = rnn(first, hx=hx)
    more, end = rnn(rest, hx=h_n)
    torch.testing.assert_close(torch.cat([output, more], time), by_name[0])
    torch.testing.assert_close(end, by_name[1])


@BOTH
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch_gives_an_empty_result(make, batch_first):
    x = torch.randn((0, 7, 3) if batch_first else (7, 0, 3))
    output, h_n = make(batch_first)(x)
    assert output.shape == ((0, 7, 8) if batch_first else (7, 0, 8))
    assert h_n.shape == (1, 0, 8)


@pytest.mark.parametrize(
    ("batch_first", "shape", "hx_shape", "message"),
    [
        (False, (0, 4, 3), None, r"input has shape \(0, 4, 3\); expected a sequence length larger than 0"),
        (True, (4, 0, 3), None, r"input has shape \(4, 0, 3\); expected a sequence length larger than 0"),
        (True, (0, 3), None, r"input has shape \(0, 3\); expected a sequence length larger than 0"),
        (False, (7, 4, 2), None, r"input has shape \(7, 4, 2\); expected \(T, B, 3\) or \(T, 3\)"),
        (True, (7, 4, 2), None, r"input has shape \(7, 4, 2\); expected \(B, T, 3\) or \(T, 3\)"),
        (False, (3,), None, r"input has shape \(3,\)"),
        (False, (1, 7, 4, 3), None, r"input has shape \(1, 7, 4, 3\)"),
        (False, (7, 3), (1, 1, 8), r"hx has shape \(1, 1, 8\); expected \(1, 8\) for an input without a batch"),
        (False, (7, 3), (8,), r"hx has shape \(8,\); expected \(1, 8\) for an input without"),
        (False, (7, 1, 3), (1, 8), r"hx has shape \(1, 8\); expected \(1, 1, 8\)"),
        (False, (7, 4, 3), (1, 3, 8), r"hx has shape \(1, 3, 8\); expected \(1, 4, 8\)"),
        (True, (7, 4, 3), (1, 4, 8), r"hx has shape \(1, 4, 8\); expected \(1, 7, 8\)"),
        (False, (7, 4, 3), (2, 4, 8), r"hx has shape \(2, 4, 8\); expected \(1, 4, 8\)"),
        (False, (7, 4, 3), (1, 4, 7), r"hx has shape \(1, 4, 7\); expected \(1, 4, 8\)"),
        (False, (7, 3), (2, 8), r"hx has shape \(2, 8\); expected \(1, 8\)"),
    ],
)
def test_shapes_that_torchs_rnn_refuses(batch_first, shape, hx_shape, message):
    x, hx = torch.randn(shape), None if hx_shape is None else torch.randn(hx_shape)
    with pytest.raises((RuntimeError, ValueError)):
        make_theirs(batch_first)(x, hx)
    with pytest.raises(ValueError, match=f"OrthogonalFilterRNN: {message}"):
        make_ours(batch_first)(x, hx)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_wrong_dtypes_are_value_errors(dtype):
    x = torch.ones(7, 4, 3)
    packed = pack_padded_sequence(x.to(dtype), [7, 5, 5, 1])
    for input in (x.to(dtype), packed):
        with pytest.raises(ValueError):  # noqa: PT011 (torch words it differently from release to release)
            make_theirs()(input)
        with pytest.raises(
            ValueError, match=rf"input is {dtype}; expected torch\.float32, as the parameters are\. Convert"
        ):
            make_ours()(input)
    with pytest.raises(ValueError, match=rf"hx is {dtype}; expected torch\.float32, as the parameters are\. Convert"):
        make_ours()(x, torch.ones(1, 4, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("input", "hx"), [([[1.0]], None), (None, None), ("x", None), ("tensor", [1]), ("tensor", 0.0)]
)
def test_an_argument_that_is_not_a_tensor_is_a_type_error(input, hx):
    name = "hx" if input == "tensor" else "input"
    with pytest.raises(TypeError, match=f"OrthogonalFilterRNN: {name} is a .*; expected a tensor"):
        make_ours()(torch.randn(7, 4, 3) if input == "tensor" else input, hx)


def test_the_first_state_is_called_hx_as_torchs_is():
    for rnn in (make_ours(), make_theirs()):
        with pytest.raises(TypeError, match="unexpected keyword argument 'h_0'"):
            rnn(torch.randn(7, 4, 3), h_0=torch.zeros(1, 4, 8))


@pytest.mark.parametrize("name", ["input", "hx"])
def test_another_device_is_named_in_the_rnns_words(name, device):
    x, hx = torch.randn(7, 4, 3), torch.zeros(1, 4, 8)
    packed = pack_padded_sequence(x, [7, 5, 5, 1])
    if name == "input":
        x, packed = x.to("meta"), PackedSequence(packed.data.to("meta"), packed.batch_sizes)
    else:
        hx = hx.to("meta")
    for input in (x, packed):
        with pytest.raises(TypeError, match=f"OrthogonalFilterRNN: {name} is on meta; expected {device.type}"):
            make_ours()(input, hx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_under_autocast_the_states_stay_in_float32(packed, dtype, device):
    """On a CPU torch.nn.RNN rounds its states. Here h_n, passed on as hx, loses none of its small steps."""
    rnn, x = make_ours(), torch.randn(7, 4, 3)
    with torch.autocast(device.type, torch.bfloat16):
        input = x.to(dtype)
        output, h_n = rnn(pack_padded_sequence(input, [7, 5, 5, 1]) if packed else input)
        assert (output.data.dtype, h_n.dtype) == (torch.float32, torch.float32)
        assert rnn(input, hx=h_n[:, :4])[0].dtype == torch.float32


# ---- Packed sequences ------------------------------------------------------------------------------------------------

LENGTHS = {
    "sorted": ([7, 7, 5, 2, 1], True),
    "unsorted": ([2, 7, 1, 7, 5], False),
    "sorted, not enforced": ([7, 4, 4], False),
    "one": ([4], True),
    "equal": ([5, 5, 5], True),
    "single steps": ([1, 1, 1], False),
}


@pytest.mark.parametrize("options", [{}, {"solver": "parallel"}, {"bias": False}, {"segment": 2}], ids=str)
@pytest.mark.parametrize("filter", ["haar", "permutation"])
@pytest.mark.parametrize(("batch_first", "given_state"), [(False, False), (True, True)])
@pytest.mark.parametrize("case", [*LENGTHS])
def test_packed_sequences_equal_their_sequences_alone(case, batch_first, given_state, filter, options):
    """Outputs, last states and every gradient equal those of one call per sequence, in float64."""
    lengths, enforce_sorted = LENGTHS[case]
    longest, batch = max(lengths), len(lengths)
    rnn = make_ours(batch_first, filter=filter, **options).double()
    # The padding is full of NaN, so that any operation that reads it is caught.
    within = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    padded = torch.randn(batch, longest, 3, dtype=torch.float64).where(within.unsqueeze(2), math.nan).requires_grad_()
    hx = torch.randn(1, batch, 8, dtype=torch.float64).requires_grad_() if given_state else None
    packed = pack_padded_sequence(
        padded if batch_first else padded.transpose(0, 1), lengths, batch_first, enforce_sorted
    )
    output, h_n = rnn(packed, hx)

    theirs, their_h_n = make_theirs(batch_first).double()(packed, hx)
    assert type(output) is PackedSequence
    assert h_n.shape == their_h_n.shape
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        actual, expected = getattr(output, name), getattr(theirs, name)
        assert (actual is None and expected is None) or torch.equal(actual, expected)

    outputs, _ = pad_packed_sequence(output, batch_first=True)
    alone = [rnn(padded[i, :length], None if hx is None else hx[:, i]) for i, length in enumerate(lengths)]
    for i, (expected, last) in enumerate(alone):
        torch.testing.assert_close(outputs[i, : lengths[i]], expected)
        torch.testing.assert_close(h_n[:, i], last)
    grad_outputs, grad_h_n = torch.randn_like(outputs), torch.randn_like(h_n)
    leaves = [padded, *rnn.parameters(), *([] if hx is None else [hx])]
    actual = torch.autograd.grad([outputs, h_n], leaves, [grad_outputs, grad_h_n])
    expected = torch.autograd.grad(
        [tensor for pair in alone for tensor in pair],
        leaves,
        [grad for i, length in enumerate(lengths) for grad in (grad_outputs[i, :length], grad_h_n[:, i])],
    )
    assert not actual[0][~within].any()
    for gradient, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_sequences_in_sixteen_bits_are_rounded_once(dtype):
    """Sequences of many lengths are computed in many pieces. Between them the state stays in float32."""
    rnn, lengths = nn.OrthogonalFilterRNN(3, 8, length=500).to(dtype), list(range(400, 0, -50))
    x, hx = torch.randn(400, len(lengths), 3, dtype=dtype), torch.ones(1, len(lengths), 8, dtype=dtype)
    output, h_n = rnn(pack_padded_sequence(x, lengths), hx)
    padded, _ = pad_packed_sequence(output)
    whole, _ = rnn(x, hx)
    assert (padded.dtype, h_n.dtype) == (dtype, dtype)
    for i, length in enumerate(lengths):
        # Both are the same float32 numbers up to the order of the sums, rounded to 16 bits: at most one step apart.
        torch.testing.assert_close(padded[:length, i], whole[:length, i], rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(h_n[0, i], padded[length - 1, i])


def test_packed_results_are_their_own_memory():
    rnn, packed = make_ours(), pack_padded_sequence(torch.randn(7, 3, 3), [7, 4, 4])
    output, h_n = rnn(packed)
    assert memory(output.data) != memory(h_n)
    loss = output.data.sum() + h_n.sum()
    output.data.zero_()
    h_n.detach().zero_()
    loss.backward()
    assert all(parameter.grad.any() for parameter in rnn.parameters())


def test_padding_that_would_overflow_is_not_computed():
    """In 400 steps the sequence of 1 step would reach infinity, and 0 * infinity is NaN in the weight's gradient."""
    rnn = nn.OrthogonalFilterRNN(3, 8, filter="identity", alpha=0.5, beta=0.5, activation="relu")
    with torch.no_grad():
        rnn.weight_ih.fill_(1.0)
        rnn.weight_hh.copy_(10 * torch.eye(8))
    x = torch.zeros(400, 2, 3)
    x[:, 1] = 1.0
    assert not rnn(x)[0].isfinite().all()
    output, _ = rnn(pack_padded_sequence(x, [400, 1]))
    output.data.sum().backward()
    assert output.data.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())


@pytest.mark.parametrize(
    ("packed", "hx", "message"),
    [
        (([7, 4, 4], 3), (1, 4, 8), r"hx has shape \(1, 4, 8\); expected \(1, 3, 8\)"),
        (([7, 4, 4], 3), (1, 2, 8), r"hx has shape \(1, 2, 8\); expected \(1, 3, 8\)"),
        (([7, 4, 4], 3), (1, 8), r"hx has shape \(1, 8\); expected \(1, 3, 8\)"),
        (([7, 4, 4], 2), None, r"data has shape \(15, 2\); expected \(\*, 3\)"),
    ],
)
def test_packed_sequences_that_do_not_fit(packed, hx, message):
    lengths, features = packed
    # Try both orders: a state of the wrong size must not be sorted into one of the right size.
    for order in (lengths, lengths[::-1]):
        input = pack_padded_sequence(torch.randn(7, 3, features), order, enforce_sorted=False)
        with pytest.raises(ValueError, match=f"OrthogonalFilterRNN.*{message}"):
            make_ours()(input, None if hx is None else torch.randn(hx))


@pytest.mark.parametrize("batch_sizes", [[2, 3], [3, 2, 0], [5, 1], [], [4], [-1, 6]])
def test_batch_sizes_that_contradict_the_data(batch_sizes):
    input = PackedSequence(torch.randn(5, 3), torch.tensor(batch_sizes, dtype=torch.int64, device="cpu"))
    with pytest.raises(ValueError, match=r"batch_sizes.*pack_padded_sequence"):
        make_ours()(input)


@pytest.mark.parametrize("packed", [False, True])
def test_an_output_edited_by_dropout_in_place(packed):
    """Dropout, the most common edit in place, makes backward raise an error. A packed output may be edited."""
    rnn, x = make_ours(), torch.randn(7, 4, 3)
    output, _ = rnn(pack_padded_sequence(x, [7, 5, 5, 1]) if packed else x)
    edited = torch.nn.functional.dropout(output.data if packed else output, inplace=True)
    if packed:
        edited.sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        edited.sum().backward()


class LastState(torch.nn.Module):
    def __init__(self, rnn, lengths=None):
        super().__init__()
        self.rnn, self.lengths = rnn, lengths

    def forward(self, x):
        hx = torch.ones(1, x.shape[1], 8)
        _, h_n = self.rnn(x if self.lengths is None else pack_padded_sequence(x, self.lengths), hx=hx)
        return h_n


@pytest.mark.parametrize("bias", [False, True])
def test_the_profiler_follows_hx_and_takes_packed_sequences(bias):
    rnn, x = make_ours(bias=bias), torch.randn(7, 4, 3)
    options = {"loss": lambda h_n: h_n.sum(), "repeats": 1, "matmul_rate": 1.0}
    columns = profile(LastState(rnn), x, **options).columns
    states, _ = rnn(x, torch.ones(1, 4, 8))
    assert columns["name"].tolist() == [f"rnn.layer[{step}]" for step in range(1, 8)]
    assert columns["state_rms"].tolist() == pytest.approx(states.square().mean((1, 2)).sqrt().tolist())
    # The sequences end at different steps, so the whole call is one row.
    packed = profile(LastState(rnn, [7, 5, 5, 1]), x, **options).columns
    output, h_n = rnn(pack_padded_sequence(x, [7, 5, 5, 1]), torch.ones(1, 4, 8))
    assert packed["name"].tolist() == ["rnn"]
    assert packed["state_rms"][0] == pytest.approx(output.data.square().mean().sqrt().item())
    # dE/dh_n is 1 everywhere.
    assert packed["gradient_norm"][0] == pytest.approx(h_n.numel() ** 0.5)


class Packing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = make_ours()

    def forward(self, data, batch_sizes):
        return self.rnn(PackedSequence(data, batch_sizes))[1]


EXPORTERS = {
    "trace": lambda model, arguments: torch.jit.trace(model, arguments),
    "export": lambda model, arguments: torch.export.export(model, arguments),
    "strict export": lambda model, arguments: torch.export.export(model, arguments, strict=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_packed_sequence_is_not_exported(exporter):
    """The sequences' lengths would become constants, and the program would be silently wrong for other lengths."""
    arguments = torch.randn(5, 3), torch.tensor([3, 2], device="cpu")
    model = Packing().eval()
    assert model(*arguments).shape == (1, 3, 8)
    message = r"lengths of a PackedSequence would become constants.*padded input"
    with pytest.raises(Exception, match=message) as refusal:
        EXPORTERS[exporter](model, arguments)
    # Dynamo wraps the error in an error of its own.
    assert isinstance(refusal.value, ValueError) or exporter == "strict export"


def test_a_recorded_graph_says_that_it_was_recorded_for_tensors():
    rnn = make_ours()
    traced, packed = torch.fx.symbolic_trace(rnn), pack_padded_sequence(torch.randn(7, 3, 3), [7, 4, 4])
    with pytest.raises(
        TypeError,
        match=r"input is a PackedSequence; expected a tensor, because this graph was recorded for tensors\. Call",
    ):
        traced(packed)
    assert isinstance(rnn(packed)[0], PackedSequence)
