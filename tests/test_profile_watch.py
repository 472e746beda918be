"""The watch over training against independent float64 sums: accumulation, autocast, a GradScaler, every optimizer."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lcw_ops.nn import OrthogonalFilterMLP
from lcw_ops.profile import watch
from lcw_ops.profile import watch as watch_function
from lcw_ops.profile.watch import MOST_OBSERVATIONS, Watch

pytestmark = pytest.mark.usefixtures("one_thread")


def net(layers=3, width=6):
    return nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())])


def hooks_of(model, optimizer):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_modules = sum(len(getattr(module, name)) for module in model.modules() for name in names)
    return of_modules + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def train(model, optimizer, steps=1, samples=4, width=6):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(samples, width)).square().mean().backward()
        optimizer.step()


def oracle(model, batches, loss_of, scale=1.0):
    """{name: (state rms, gradient norm)} and the summed gradients of the weights, in float64 by retained gradients."""
    states, gradients, numel = {}, {}, {}
    copy = net(len(model) // 2).double()
    copy.load_state_dict(model.state_dict())
    for batch in batches:
        x, outputs = batch.double(), {}
        for name, module in copy.named_children():
            x = module(x)
            x.retain_grad()
            outputs[name] = x
        loss_of(x).backward()
        for name, output in outputs.items():
            states[name] = states.get(name, 0) + output.detach().square().sum().item()
            numel[name] = numel.get(name, 0) + output.numel()
            gradients[name] = gradients.get(name, 0) + output.grad.square().sum().item()
    rows = {name: (math.sqrt(states[name] / numel[name]), math.sqrt(gradients[name])) for name in states}
    weights = {
        name: math.sqrt(sum(parameter.grad.square().sum().item() for parameter in module.parameters()))
        for name, module in copy.named_children()
    }
    return rows, weights


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("zeroed", [True, False])
def test_figures_of_accumulated_and_scaled_gradients(scaled, batches, zeroed):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    data = [torch.randn(5 - k, 6) for k in range(batches)]

    def loss_of(output):
        return output.square().mean() / batches

    rows, weights = oracle(model, data, loss_of)
    before = {name: [each.detach().clone() for each in module.parameters()] for name, module in model.named_children()}
    with watch(model, optimizer, every=100, scaler=scaler if scaled else None) as watched:
        for batch in data:
            scaler.scale(loss_of(model(batch))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=zeroed)
    assert watched.names == [str(place) for place in range(6)]
    assert watched.steps == [0]
    for row, (name, module) in enumerate(model.named_children()):
        assert watched.columns["state_rms"][0, row] == pytest.approx(rows[name][0], rel=1e-5)
        assert watched.columns["gradient_norm"][0, row] == pytest.approx(rows[name][1], rel=1e-5)
        assert watched.known["weight_gradient_norm"][0, row] == isinstance(module, nn.Linear)
        if isinstance(module, nn.Linear):
            assert watched.columns["weight_gradient_norm"][0, row] == pytest.approx(weights[name], rel=1e-5)
            pairs = [*zip(module.parameters(), before[name], strict=True)]
            change, size = (
                math.sqrt(sum(part.double().square().sum().item() for part in parts))
                for parts in ([now.detach() - old for now, old in pairs], [old for _, old in pairs])
            )
            assert watched.columns["update_ratio"][0, row] == pytest.approx(change / size, rel=1e-4)


def test_a_fused_optimizer_that_unscales_within_its_step():
    figures = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with watch(model, optimizer, scaler=scaler) as watched:
            scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        figures.append(watched.columns)
    for column in figures[0]:
        np.testing.assert_allclose(figures[1][column], figures[0][column], rtol=1e-4)


def test_a_step_that_the_scaler_leaves_out_is_not_part_of_the_next():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = torch.randn(4, 6)
    rows, _ = oracle(model, [data], lambda output: output.square().mean())
    with watch(model, optimizer, scaler=scaler) as watched:
        for factor in (math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(data).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert watched.steps == [0]
    found = watched.columns["gradient_norm"][0]
    np.testing.assert_allclose(found, [rows[name][1] for name in rows], rtol=1e-5)


def test_autocast_and_two_forward_passes_before_the_backward_pass():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = torch.randn(4, 6), torch.randn(4, 6)
    rows, _ = oracle(model, [first, second], lambda output: output.square().mean())
    with watch(model, optimizer) as watched:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [model(first), model(second)]
        sum(output.float().square().mean() for output in outputs).backward()
        optimizer.step()
    # bfloat16 has 8 bits; three layers and the way back add up a few roundings.
    np.testing.assert_allclose(watched.columns["state_rms"][0], [rows[name][0] for name in rows], rtol=0.02)
    np.testing.assert_allclose(watched.columns["gradient_norm"][0], [rows[name][1] for name in rows], rtol=0.05)


def test_every_nth_step_is_watched_and_close_removes_all_hooks():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    assert hooks_of(model, optimizer) == 0
    watched = watch(model, optimizer, every=4)
    train(model, optimizer)
    # Between watched steps only the two hooks of the optimizer are there.
    assert hooks_of(model, optimizer) == 2
    train(model, optimizer, 9)
    assert watched.steps == [0, 4, 8]
    watched.close()
    watched.close()
    assert hooks_of(model, optimizer) == 0
    train(model, optimizer, 9)
    assert watched.steps == [0, 4, 8]
    assert watched.columns["state_rms"].shape == (3, 6)
    with pytest.raises(RuntimeError, match="stop"), watch(model, optimizer, every=1):
        raise RuntimeError("stop")
    assert hooks_of(model, optimizer) == 0


def test_training_is_not_changed():
    results = []
    for watching in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(net(), nn.Dropout(0.5), nn.BatchNorm1d(6))
        optimizer = torch.optim.AdamW(model.parameters())
        handle = watch(model, optimizer, every=1) if watching else None
        train(model, optimizer, 5)
        if handle is not None:
            handle.close()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_optimizer_with_a_closure():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6)).square().mean()
        loss.backward()
        return loss

    with watch(model, optimizer) as watched:
        optimizer.step(closure)
    assert np.isfinite(watched.columns["weight_gradient_norm"][0, ::2]).all()
    assert (watched.columns["update_ratio"][0, ::2] > 0).all()


def test_layers_of_a_recurrence_have_rows():
    model = OrthogonalFilterMLP(6, 8, 20, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watched:
        train(model, optimizer)
    layers = [row for row, name in enumerate(watched.names) if "layer[" in name]
    assert len(layers) == 20
    own = [model.weight.grad.double(), model.bias.grad.double()]
    expected = torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in own]).norm(dim=0)
    np.testing.assert_allclose(watched.columns["weight_gradient_norm"][0, layers], expected.numpy(), rtol=1e-5)
    assert (watched.columns["update_ratio"][0, layers] > 0).all()


def test_scalars_and_not_finite_figures(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as watched:
        assert watched.scalars() == {}
        with pytest.raises(ValueError, match="no step"):
            watched.plot(tmp_path / "a.png")
        train(model, optimizer)
        scalars = watched.scalars()
        states = watched.columns["state_rms"][0]
        assert scalars["state_rms/max"] == states.max()
        assert scalars["state_rms/median"] == pytest.approx(np.median(states))
        assert scalars["state_rms/not_finite"] == 0
        assert watched.scalars(per_layer=True)["state_rms/3"] == states[3]
        assert "weight_gradient_norm/1" not in watched.scalars(per_layer=True)
        with torch.no_grad():
            model[2].weight[0, 0] = math.nan
        train(model, optimizer)
        assert watched.scalars()["state_rms/not_finite"] == 4
        assert math.isnan(watched.scalars(per_layer=True)["state_rms/2"])
    watched.plot(tmp_path / "a.png")
    watched.plot(tmp_path / "a.svg")
    assert "Not finite at step 1: rms of the output, 2" in (tmp_path / "a.svg").read_text()


def test_many_observations_are_thinned():
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as watched:
        train(model, optimizer, MOST_OBSERVATIONS + 3, samples=1, width=2)
    assert len(watched.steps) < MOST_OBSERVATIONS
    assert (watched.steps[:3], watched.steps[-1]) == ([0, 2, 4], MOST_OBSERVATIONS + 2)
    assert len(watched.columns["state_rms"]) == len(watched.steps)


def test_tied_frozen_and_unused_modules_and_tuples():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 6, batch_first=True)
            self.read_out = nn.Linear(6, 6)
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.read_out.weight
            self.unused = nn.Linear(6, 6)
            self.read_out.bias.requires_grad_(False)

        def forward(self, x):
            return self.tied(self.read_out(self.lstm(x[:, None])[0]))

    model = Model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watch(model, optimizer) as watched:
        train(model, optimizer)
    rows = {name: row for row, name in enumerate(watched.names)}
    known = {column: mask[0] for column, mask in watched.known.items()}
    assert known["state_rms"][rows["lstm"]]
    assert known["gradient_norm"][rows["lstm"]]
    assert not known["state_rms"][rows["unused"]]
    assert not known["weight_gradient_norm"][rows["unused"]]
    weight, bias = model.read_out.weight.grad.double(), model.tied.bias.grad.double()
    assert watched.columns["weight_gradient_norm"][0, rows["read_out"]] == pytest.approx(weight.norm().item(), rel=1e-5)
    assert watched.columns["weight_gradient_norm"][0, rows["tied"]] == pytest.approx(bias.norm().item(), rel=1e-5)


def test_a_compiled_model_keeps_the_figures_of_its_weights():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=2) as watched:
        train(torch.compile(model, backend="eager"), optimizer, 5)
    assert watched.steps == [0, 2, 4]
    assert watched.known["weight_gradient_norm"][:, ::2].all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1, None), TypeError),
        ((nn.Linear(1, 1), None), TypeError),
        ((nn.Linear(1, 1), "optimizer", 0), ValueError),
        ((nn.Linear(1, 1), "optimizer", 1.5), TypeError),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    model, optimizer, *every = arguments
    if optimizer is not None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match="watch:"):
        watch_function(model, optimizer, *every)


def test_a_watch_is_what_the_function_returns():
    model = net()
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as watched:
        assert isinstance(watched, Watch)
        assert not watched.closed
    assert watched.closed


def test_passes_without_gradients_do_not_count():
    class Part(nn.Module):
        """A model that runs a part of itself without gradients."""

        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            with torch.no_grad():
                state = self.frozen(x)
            return self.head(state)

    figures = []
    for validates in (False, True):
        torch.manual_seed(0)
        model, x = Part(), torch.randn(16, 8)
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        with watch(model, optimizer, every=1) as watched:
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                if validates:
                    with torch.no_grad():
                        model(1000 * x)
                    with torch.no_grad(), pytest.raises(RuntimeError):
                        model(x[:, :3])
                optimizer.step()
        figures.append(watched.columns["state_rms"])
    assert np.isfinite(figures[0]).all()
    np.testing.assert_array_equal(figures[0], figures[1])
