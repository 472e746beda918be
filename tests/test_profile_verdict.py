"""The verdict: one fault of each kind in a known layer, silence on healthy models, and every proposed line executed."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from support.profiles import measure, row
from torch import nn

import lcw_ops
from lcw_ops.profile import profile, read, scale_learning_rate
from lcw_ops.profile.remedies import judge
from lcw_ops.profile.result import json_ready
from lcw_ops.profile.verdict import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

GAINS = {nn.Tanh: 5 / 3, nn.ReLU: math.sqrt(2), nn.GELU: 1.53}
WIDTH, CLASSES = 24, 5


def chain(activation=nn.Tanh, depth=8):
    """A plain network whose initial weights suit its activation: layers "0", "2", ..., and the head."""
    children = []
    for _ in range(depth):
        layer = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(layer.weight, 0, GAINS[activation] / math.sqrt(WIDTH))
        nn.init.zeros_(layer.bias)
        children += [layer, activation()]
    return nn.Sequential(*children, nn.Linear(WIDTH, CLASSES))


def batch():
    return torch.randn(64, WIDTH), torch.randint(CLASSES, (64,))


def sgd(model, rate=0.02):
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9)


def examined(model, inputs=None, targets=None, **options):
    x, y = batch()
    x, y = x if inputs is None else inputs, y if targets is None else targets
    return measure(model, x, y, optimizer=sgd(model), jacobian=False, **options)


def findings(result, kind):
    return [one for one in result.verdict() if one.kind == kind]


# ---- Faults ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vanishing(model):
    for place in range(6, 17, 2):
        model[place].weight.mul_(0.1)


@torch.no_grad()
def exploding(model):
    for place in range(6, 17, 2):
        model[place].weight.mul_(10.0)


@torch.no_grad()
def non_finite(model):
    model[6].weight[0, 0] = math.nan


@torch.no_grad()
def dying(model):
    model[6].bias.fill_(-30.0)


@torch.no_grad()
def saturation(model):
    model[6].weight.mul_(100.0)


@torch.no_grad()
def activation_shift(model):
    model[6].bias.fill_(40.0)


@torch.no_grad()
def ill_conditioned(model):
    model[6].weight.mul_(torch.logspace(-2, 2, WIDTH)[:, None])


def frozen(model):
    model[6].requires_grad_(False)


FAULTS = {
    "vanishing": (vanishing, nn.Tanh),
    "exploding": (exploding, nn.ReLU),
    "non-finite": (non_finite, nn.Tanh),
    "dying": (dying, nn.ReLU),
    "saturation": (saturation, nn.Tanh),
    "activation shift": (activation_shift, nn.ReLU),
    "ill-conditioned": (ill_conditioned, nn.GELU),
    "frozen": (frozen, nn.Tanh),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_named_in_its_layer(kind):
    inject, activation = FAULTS[kind]
    model = chain(activation)
    inject(model)
    result = examined(model)
    first = findings(result, kind)[0]
    # The layer itself, its activation, or the next layer.
    assert first.first_name in ("6", "7", "8")
    assert row(result, first.first_name) == first.first <= first.last
    assert first.last_name == result.columns["name"][first.last]
    threshold = KINDS[kind].threshold
    assert first.figure < threshold if kind == "vanishing" else first.figure > threshold
    assert not result.verdict().is_healthy


@pytest.mark.parametrize(("factor", "kind"), [(100.0, "learning rate too large"), (1e-4, "learning rate too small")])
def test_a_learning_rate_is_named_in_the_layers_that_have_it(factor, kind):
    model = chain(nn.ReLU)
    optimizer = sgd(model)
    scale_learning_rate(optimizer, factor, model[6], model[8])
    result = measure(model, *batch(), optimizer=optimizer, jacobian=False)
    names = [name for one in findings(result, kind) for name in (one.first_name, one.last_name)]
    assert names
    assert set(names) <= {"6", "8"}


class LeavesOut(nn.Sequential):
    def forward(self, x):
        for name, child in self.named_children():
            x = x if name == "6" else child(x)
        return x


def test_a_layer_that_is_not_called_is_unused():
    result = examined(LeavesOut(*chain(nn.ReLU)))
    (found,) = result.verdict()
    assert (found.kind, found.first_name, found.last_name, found.figure) == ("unused", "6", "6", 1)
    assert found.change == ""


def test_gradients_below_float16_are_named():
    model = chain(nn.ReLU)
    with torch.no_grad():
        model[4].weight.mul_(2500), model[4].bias.mul_(2500), model[6].weight.div_(2500)
    x, y = batch()
    loss = lambda output, target: nn.functional.cross_entropy(output.float(), target)  # noqa: E731
    result = measure(model.half(), x.half(), y, loss, jacobian=False)
    (found,) = findings(result, "underflow")
    assert found.first_name in ("4", "5")
    assert not findings(measure(chain(nn.ReLU).half(), x.half(), y, loss, jacobian=False), "underflow")


# ---- Healthy --------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def residual_block():
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)


HEALTHY = {
    "tanh": lambda: (chain(nn.Tanh), (64, WIDTH)),
    "relu": lambda: (chain(nn.ReLU), (64, WIDTH)),
    "gelu": lambda: (chain(nn.GELU), (64, WIDTH)),
    "recurrent": lambda: (Recurrent(), (64, 5, 8)),
    "transformer": lambda: (
        nn.Sequential(residual_block(), residual_block(), nn.Flatten(), nn.Linear(80, CLASSES)),
        (64, 5, 16),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, CLASSES),
        ),
        (64, 1, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_finding(name):
    model, shape = HEALTHY[name]()
    result = examined(model, torch.randn(shape))
    assert list(result.verdict()) == []
    assert result.verdict().is_healthy
    assert "nothing is wrong" in result.table().partition("\n")[0]


def test_a_healthy_16_bit_model_has_no_finding():
    x, y = batch()
    loss = lambda output, target: nn.functional.cross_entropy(output.float(), target)  # noqa: E731
    model = chain(nn.Tanh).bfloat16()
    result = measure(model, x.bfloat16(), y, loss, optimizer=sgd(model), jacobian=False)
    assert list(result.verdict()) == []


# ---- What is not judged ---------------------------------------------------------------------------------------------


def test_a_kind_without_its_figure_is_not_judged_and_says_why():
    x, y = batch()
    verdict = measure(chain(), x, y, jacobian=False).verdict()
    assert "optimizer" in verdict.not_judged["learning rate too large"]
    assert "float16" in verdict.not_judged["underflow"]
    assert set(verdict.judged).isdisjoint(verdict.not_judged)
    assert {*verdict.judged, *verdict.not_judged} == {*KINDS}
    assert "Not judged" in str(verdict)


def test_a_missing_column_is_not_judged():
    result = examined(chain())
    for column in ("dead", "gradient_norm"):
        del result.columns[column]
        result.missing.pop(column, None)
    not_judged = judge(result).not_judged
    assert "column dead" in not_judged["dying"]
    assert "column gradient_norm" in not_judged["vanishing"]


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        self.first(x)
        raise KeyError("in the middle")


def test_a_model_that_fails_is_judged_by_its_rows_so_far():
    with pytest.warns(RuntimeWarning):
        verdict = examined(Fails()).verdict()
    assert verdict.not_judged["unused"] == "the model failed"
    assert "vanishing" in verdict.not_judged


def test_a_model_that_fails_is_not_healthy(tmp_path):
    with pytest.warns(RuntimeWarning):
        result = examined(Fails())
    verdict = result.verdict()
    assert not verdict.is_healthy
    assert "in the middle" in verdict.headline
    assert "nothing is wrong" not in str(verdict)
    result.to_json(tmp_path / "p.json")
    result.to_html(tmp_path / "p.html")
    assert str(read(tmp_path / "p.json").verdict()) == str(verdict)
    assert "Nothing is wrong" not in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize("try_remedies", [False, True])
def test_a_profile_from_json_has_the_same_verdict(try_remedies, tmp_path):
    model = nn.Sequential()
    # Names that look like numbers in JSON.
    for name in ("nan", "inf", "2", "</script>", "last"):
        model.add_module(name, nn.Sequential(nn.Linear(64, 64), nn.Tanh()))
    with torch.no_grad():
        model[0][0].weight.mul_(1000)
        model[3][0].weight.mul_(1000)
    model[4].requires_grad_(False)
    x, y = torch.randn(16, 64), torch.randint(64, (16,))
    result = profile(model, x, y, repeats=1, matmul_rate=1.0, jacobian=False, try_remedies=try_remedies)
    result.to_json(tmp_path / "p.json")
    again = read(tmp_path / "p.json")
    assert again.modules == result.modules
    assert "model.get_submodule('</script>.0')" in str(again.verdict())
    assert ("Tried: " in str(again.verdict())) == try_remedies
    assert str(again.verdict()) == str(result.verdict())
    assert json_ready(again.verdict().summary()) == json_ready(result.verdict().summary())


def test_no_factor_is_proposed_for_a_step_of_zero():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    options = {"repeats": 1, "matmul_rate": 1.0, "jacobian": False}
    verdict = profile(model, torch.randn(16, 8), torch.randint(8, (16,)), optimizer=optimizer, **options).verdict()
    finding = next(one for one in verdict if one.kind == "learning rate too small")
    assert finding.figure == 0
    assert finding.change == ""


def test_an_old_profile_without_modules_is_judged():
    model = chain()
    non_finite(model)
    vanishing(model)
    result = examined(model)
    state = {key: value for key, value in vars(result).items() if key not in ("modules", "tried")}
    old = object.__new__(type(result))
    old.__setstate__(state)
    assert [one.kind for one in old.verdict()] == [one.kind for one in result.verdict()]
    for kind in FAULTS:
        assert isinstance(judge(old, [kind]).summary(), dict)


# ---- Figures on made-up columns -------------------------------------------------------------------------------------


def with_column(column, values):
    """A profile of as many rows as values, in which a column has these."""
    result = examined(chain(depth=math.ceil(len(values) / 2)))
    columns = {name: array[: len(values)] for name, array in result.columns.items()}
    missing = {name: array[: len(values)].copy() for name, array in result.missing.items()}
    columns[column], missing[column] = np.array(values, float), np.zeros(len(values), np.uint16)
    return dataclasses.replace(result, columns=columns, missing=missing, modules=result.modules[: len(values)])


@pytest.mark.parametrize(
    ("kind", "norms", "expected"),
    [
        # The rows whose modules shrink the gradient: row i makes the step from its own gradient to that of row i - 1.
        ("vanishing", [1e-6, 1e-6, 1e-4, 1e-2, 1.0, 1.0], (2, 4, 1e-6)),
        # A branch with a small gradient is no obstacle: the gradient before it is large again.
        ("vanishing", [1.0, 1.0, 1e-9, 1.0, 1.0, 1.0], None),
        ("vanishing", [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], (0, 5, 0.0)),
        # A slow and even decline is one range.
        ("vanishing", list(10.0 ** np.linspace(-5, 0, 200)), (1, 199, 1e-5)),
        ("exploding", [1e6, 1e6, 1e4, 1e2, 1.0, 1.0], (2, 4, 1e6)),
        ("exploding", [1.0, 1.0, 1e9, 1.0, 1.0, 1.0], (3, 3, 1e9)),
        ("exploding", [1.0, 1.0, 1e-9, 1.0, 1.0, 1.0], None),
    ],
)
def test_the_range_of_a_gradients_change(kind, norms, expected):
    found = KINDS[kind].find(with_column("gradient_norm", norms))
    if expected is None:
        assert found == []
    else:
        ((first, last, figure),) = found
        assert (first, last) == expected[:2]
        assert figure == pytest.approx(expected[2], rel=1e-9)


def test_runs_of_rows_are_ranges_and_the_worst_come_first():
    found = KINDS["ill-conditioned"].find(with_column("gradient_condition", [1, 20, 30, 1, 90, 1, 1, 1]))
    assert found == [(4, 4, 90.0), (1, 2, 30.0)]
    # Many runs are one range.
    found = KINDS["ill-conditioned"].find(with_column("gradient_condition", [1, 20, 30, 1, 90, 1, 16, 1, 17, 1]))
    assert found == [(1, 8, 90.0)]


def test_the_first_infinity_forward_is_the_cause():
    assert KINDS["non-finite"].find(with_column("state_rms", [1, 1, math.inf, math.nan])) == [(2, 2, 2.0)]
    assert KINDS["non-finite"].find(with_column("gradient_norm", [math.nan, math.nan, 1, 1])) == [(1, 1, 2.0)]


# ---- The condition of a gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_gradient_condition_is_that_of_float64(kind):
    model = nn.Linear(7, 5) if kind is nn.Linear else nn.Conv2d(3, 5, 3)
    x = torch.randn(11, 7) if kind is nn.Linear else torch.randn(11, 3, 6, 6)
    with torch.no_grad():
        model.weight[2] = 0
    result = measure(model, x, loss=lambda output: output.square().mean())
    model.double()
    (gradient,) = torch.autograd.grad(model(x.double()).square().mean(), model.weight)
    expected = []
    for dim in (0, 1):
        sizes = gradient.transpose(0, dim).flatten(1).square().mean(1).sqrt()
        expected.append(sizes.square().mean().sqrt() / sizes.log().mean().exp())
    assert result.columns["gradient_condition"][0] == pytest.approx(max(expected).item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradient_condition_does_not_depend_on_the_scale_and_leaves_out_dead_units(scale):
    model = nn.Linear(4, 3)
    weights = torch.tensor([scale, 100 * scale, 0.0])
    result = measure(model, torch.ones(2, 4), loss=lambda output: (output * weights).sum())
    expected = math.sqrt((1 + 100**2) / 2) / 10
    assert result.columns["gradient_condition"][0] == pytest.approx(expected, rel=1e-5)


def test_gradient_condition_without_a_gradient_has_a_reason():
    result = measure(
        nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), torch.ones(2, 4), loss=lambda output: 0 * output.sum()
    )
    assert "zero" in result.reason("gradient_condition", 0)
    assert "dimensions" in result.reason("gradient_condition", 1)


# ---- Remedies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
def test_the_proposed_line_runs_and_is_tried(kind):
    inject, activation = FAULTS[kind]
    model = chain(activation)
    inject(model)
    x, y = batch()
    optimizer = sgd(model)
    result = measure(model, x, y, optimizer=optimizer, jacobian=False, try_remedies=True)
    finding = next(one for one in result.verdict() if one.kind == kind)
    assert finding.change
    assert finding.outcome.error is None
    assert math.isfinite(finding.outcome.loss_after)
    if kind == "ill-conditioned":
        # Activated gradients differ less; the weights are the same.
        assert finding.outcome.figure < finding.figure / 2
    else:
        # LCW does not change the layer whose own bias is the cause.
        assert finding.outcome.remaining <= (kind == "activation shift")
    # The same line on the user's own objects.
    names = {"model": model, "inputs": x, "optimizer": optimizer, "lcw_ops": lcw_ops, "torch": torch}
    exec(finding.change, names)
    output = names["model"](names["inputs"])
    nn.functional.cross_entropy(output, y).backward()
    names["optimizer"].step()


@pytest.mark.parametrize(("factor", "kind"), [(100.0, "learning rate too large"), (1e-4, "learning rate too small")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_the_line_for_a_learning_rate_mends_it(factor, kind, everywhere):
    model = chain(nn.ReLU)
    optimizer = sgd(model)
    scale_learning_rate(optimizer, factor, *(model if everywhere else [model[6]]))
    result = measure(model, *batch(), optimizer=optimizer, jacobian=False, try_remedies=True)
    found = findings(result, kind)
    assert found
    assert all(one.outcome.error is None and not one.outcome.remains for one in found)


def test_the_line_for_16_bits_mends_them():
    model = chain(nn.ReLU)
    with torch.no_grad():
        model[4].weight.mul_(2500), model[4].bias.mul_(2500), model[6].weight.div_(2500)
    x, y = batch()
    loss = lambda output, target: nn.functional.cross_entropy(output.float(), target)  # noqa: E731
    result = measure(model.half(), x.half(), y, loss, jacobian=False, try_remedies=True)
    (found,) = findings(result, "underflow")
    names = {"model": model, "inputs": x.half()}
    exec(found.change, names)
    loss(names["model"](names["inputs"]), y).backward()
    assert model[0].weight.grad.dtype is torch.bfloat16


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_trying_leaves_model_optimizer_gradients_and_random_state_bit_for_bit():
    torch.manual_seed(0)
    model = chain(nn.ReLU)
    model.insert(1, nn.BatchNorm1d(WIDTH))
    dying_layer = model[7]
    with torch.no_grad():
        dying_layer.bias.fill_(-30.0)
    x, y = batch()
    optimizer = sgd(model)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    before, grads = state_of(model), [parameter.grad.clone() for parameter in model.parameters()]
    kept, inputs = copy.deepcopy(optimizer.state_dict()), x.clone()
    modules, random_state = list(model.modules()), torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002

    result = measure(model, x, y, optimizer=optimizer, jacobian=False, try_remedies=True)
    assert any(one.outcome is not None for one in result.verdict())

    assert torch.equal(torch.get_rng_state(), random_state)
    assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002
    assert list(model.modules()) == modules
    assert torch.equal(x, inputs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for parameter, gradient in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, gradient)
    now = optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"]
    for key, state in kept["state"].items():
        assert torch.equal(now["state"][key]["momentum_buffer"], state["momentum_buffer"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # The profile holds neither model nor batch: it can be pickled without them.
    assert len(pickle.dumps(result)) < 100_000


def test_a_model_that_cannot_be_copied_is_judged_without_outcomes():
    model = chain()
    non_finite(model)
    model.register_buffer("in_a_graph", model[0].weight * 2)
    (found, *_) = examined(model, try_remedies=True).verdict()
    assert "deepcopy" in found.outcome.error
    assert found.change


def test_without_an_optimizer_a_line_that_needs_one_is_not_tried():
    model = chain(nn.GELU)
    ill_conditioned(model)
    x, y = batch()
    result = measure(model, x, y, jacobian=False, try_remedies=True)
    for one in result.verdict():
        if "optimizer" in one.change:
            assert "optimizer" in one.outcome.error


def test_scale_learning_rate_divides_groups_and_keeps_state():
    model = chain(depth=2)
    optimizer = torch.optim.Adam(
        [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": model[4].parameters()}], 0.1
    )
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.step()
    states = {id(parameter): optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()}
    scale_learning_rate(optimizer, 0.5, model[0], model[4])
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for place, expected in ((0, 0.05), (2, 0.1), (4, 0.05)):
        for parameter in model[place].parameters():
            assert rates[id(parameter)] == expected
            assert optimizer.state[parameter]["exp_avg"] is states[id(parameter)]
    assert len(rates) == 6
    optimizer.step()


# ---- Ways out -------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_in_table_and_is_in_json(tmp_path):
    model = chain()
    vanishing(model)
    result = examined(model)
    assert result.table().startswith("Verdict: ")
    result.to_json(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["verdict"]["findings"][0]["kind"] == "vanishing"
    result.plot(tmp_path / "p.svg")
    # Letters are drawn as curves, with the text in a comment beside them.
    assert "anishing gradient" in (tmp_path / "p.svg").read_text()


def test_every_kind_has_words_for_its_figure():
    for kind in KINDS.values():
        assert kind.words.format(figure=0.5, threshold=kind.threshold)


def test_a_profile_by_default_tries_nothing():
    model = chain()
    non_finite(model)
    x, y = batch()
    assert all(one.outcome is None for one in profile(model, x, y, repeats=1, matmul_rate=1.0).verdict())
