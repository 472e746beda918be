"""Facts about descent on an objective F with activated gradients f(g): how far a step may go, and where it leads.

K = alpha beta is the slope of f at 0, and L the Lipschitz constant of F's gradient. F falls for rates below 2 / (L K).
A coordinate moves by at most the rate times the bound of f. Near a stationary point, activated descent is plain descent
at K times the rate. So the tests also run the plain optimizer at that rate: an effect that both have is not a merit of
the activation. All facts are derived.
"""

import functools
import itertools
import math

import pytest
import torch

import lcw_ops
from lcw_ops import optim
from lcw_ops.reference import sgd_step
from lcw_ops.reference.gradient_activation import KINDS

pytestmark = pytest.mark.usefixtures("made_on_device", "one_thread")

EPS = torch.finfo(torch.float64).eps
ALPHA, BETA = 0.1, 20.0
GAIN = ALPHA * BETA
BOUND = {"arctan": ALPHA * math.pi / 2, "tanh": ALPHA}


class ReferenceSGD(torch.optim.SGD):
    """The formulas of lcw_ops.reference with an optimizer's methods."""

    def __init__(self, params, gradient_activation, alpha, beta, activate="gradient", **options):
        super().__init__(params, **options)
        self.activation = {"kind": gradient_activation, "alpha": alpha, "beta": beta, "activate": activate}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            numbers = [group[name] for name in ("lr", "momentum", "weight_decay")]
            for param in group["params"]:
                buffer = self.state[param].get("momentum_buffer")
                moved, buffer = sgd_step(param.detach(), param.grad, buffer, *numbers, **self.activation)
                param.copy_(moved)
                if group["momentum"]:
                    self.state[param]["momentum_buffer"] = buffer


def hooked_sgd(params, gradient_activation, alpha, beta, **options):
    optimizer = torch.optim.SGD(params, **options)
    lcw_ops.activate_gradients(optimizer, gradient_activation, alpha, beta)
    return optimizer


# Three ways to make the same step. The hook cannot activate the momentum; the other two can.
WAYS = {"optim.SGD": optim.SGD, "activate_gradients": hooked_sgd, "reference": ReferenceSGD}
WITH_PLACES = {name: WAYS[name] for name in ("optim.SGD", "reference")}
way = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)


def activated(make, kind="arctan"):
    return functools.partial(make, gradient_activation=kind, alpha=ALPHA, beta=BETA)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu")


def on_device(tensor):
    return tensor.to(torch.get_default_device())


def descend(make, w, gradient, steps, **options):
    """The places w, w_1, ..., w_steps. ``gradient`` is a function of the place, or a list with one for each step."""
    param = w.clone().requires_grad_()
    optimizer = make([param], **options)
    places = [w]
    for step in range(steps):
        param.grad = (gradient(param.detach()) if callable(gradient) else gradient[step]).clone()
        optimizer.step()
        places.append(param.detach().clone())
    return places


# ---- 1. Descent below 2 / (L K) -------------------------------------------------------------------------------------


def quadratic():
    root = on_device(normal(6, 6))
    hessian = root @ root.T
    return (lambda w: 0.5 * w @ hessian @ w), (lambda w: hessian @ w), torch.linalg.eigvalsh(hessian)[-1].item()


def log_cosh():
    # Second derivative 1 - tanh^2 <= 1.
    return (lambda w: w.cosh().log().sum()), torch.tanh, 1.0


@way
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [quadratic, log_cosh])
@pytest.mark.parametrize("share", [0.1, 0.9, 1.9])
def test_descent_is_guaranteed_below_two_over_lk(make, kind, problem, share):
    function, gradient, smoothness = problem()
    lr = share / (smoothness * GAIN)
    for seed in range(5):
        # Tiny gradients, where f(g) = K g, and large ones, where f is far below this line.
        w = on_device(normal(6, seed=seed) * 10.0 ** (seed - 3))
        places = descend(activated(make, kind), w, gradient, 3, lr=lr)
        for before, after in itertools.pairwise(places):
            g, step = gradient(before), (before - after) / lr
            promised = function(before) - lr * (1 - smoothness * lr * GAIN / 2) * (g @ step)
            assert function(after) <= promised + 16 * EPS * (function(before) + before.square().sum() * smoothness)


@way
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_on_the_rate_is_that_of_plain_descent_at_the_rate_times_k(make, kind):
    """At curvature 1 and where f is linear, activated descent lowers F at rates below 2 / K, and raises F above.

    Plain descent does the same at K times these rates.
    """
    w = torch.tensor([1e-9], dtype=torch.float64)
    for share, falls in ((1.98, True), (2.02, False)):
        for optimizer, lr in ((activated(make, kind), share / GAIN), (torch.optim.SGD, share)):
            places = descend(optimizer, w, lambda w: w, 50, lr=lr)
            sizes = torch.cat(places).abs().tolist()
            assert sizes == sorted(sizes, reverse=falls)
            assert sizes[0] != sizes[-1]


# ---- 2. The step of a coordinate ------------------------------------------------------------------------------------

HUGE = (1.0, -1e3, 1e30, -1e300, math.inf)


@way
@pytest.mark.parametrize("kind", BOUND)
def test_a_step_moves_a_coordinate_by_at_most_the_rate_times_the_bound(make, kind):
    g = torch.tensor(HUGE, dtype=torch.float64)
    w = torch.linspace(-1, 1, len(HUGE), dtype=torch.float64)
    _, moved = descend(activated(make, kind), w, [g], 1, lr=0.5)
    limit = 0.5 * BOUND[kind]
    # f errs by at most 4 ulp. The product with the rate and the difference are rounded.
    rounding = 8 * EPS * limit + EPS * w.abs().max()
    steps = (moved - w).abs()
    assert (steps <= limit + rounding).all()
    # Large gradients reach the bound. The smallest of them is 1e3: beta g is 20000, where pi/2 - atan is 1 / 20000.
    assert (steps[2:] >= limit - rounding).all()
    assert (steps[1:] >= limit * (1 - 1e-4)).all()
    # The plain optimizer at the rate times K has no such bound.
    _, plain = descend(torch.optim.SGD, w, [g], 1, lr=0.5 * GAIN)
    assert (plain - w).abs()[1] > 1e3 * limit


@way
def test_log_has_no_bound_but_restricts(make):
    g = torch.tensor([1e300], dtype=torch.float64)
    w = torch.zeros_like(g)
    _, moved = descend(activated(make, "log"), w, [g], 1, lr=0.5)
    assert moved.item() == pytest.approx(-0.5 * ALPHA * math.log(BETA * 1e300), rel=8 * EPS)


@pytest.mark.parametrize("make", WITH_PLACES.values(), ids=WITH_PLACES)
@pytest.mark.parametrize("kind", BOUND)
def test_activated_momentum_bounds_every_step(make, kind):
    """The activation comes last: with any momentum and weight decay, a step stays within the bound."""
    gradients = [1e6 * on_device(normal(50, seed=seed).abs()) for seed in range(20)]
    w = on_device(normal(50))
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    places = descend(activated(make, kind), w, gradients, 20, activate="momentum", **options)
    limit = 0.5 * BOUND[kind]
    for before, after in itertools.pairwise(places):
        steps = (after - before).abs()
        assert (steps <= limit + 8 * EPS * limit + EPS * before.abs().max()).all()
        assert (steps >= 0.999 * limit).all()


@way
@pytest.mark.parametrize("kind", BOUND)
def test_momentum_of_activated_gradients_gathers_to_the_bound_over_one_minus_mu(make, kind):
    gradients = [torch.full((3,), 1e30, dtype=torch.float64)] * 200
    w = torch.zeros(3, dtype=torch.float64)
    places = descend(activated(make, kind), w, gradients, 200, lr=0.5, momentum=0.9)
    steps = [(before - after).max().item() for before, after in itertools.pairwise(places)]
    limit = 0.5 * BOUND[kind] / (1 - 0.9)
    assert steps[0] == pytest.approx(0.1 * limit, rel=1e-12)
    assert all(step <= limit * (1 + 1e-12) for step in steps)
    # 0.9^200 = 7e-10 of the way is left.
    assert steps[-1] == pytest.approx(limit, rel=1e-8)


# ---- 3. Near a stationary point -------------------------------------------------------------------------------------


@way
@pytest.mark.parametrize(("kind", "order"), [("arctan", 2), ("tanh", 2), ("log", 1)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_small_gradients_are_plain_descent_at_the_rate_times_k(make, kind, order, momentum):
    _, gradient, smoothness = quadratic()
    lr = 0.5 / (smoothness * GAIN)
    w = on_device(normal(6))
    w *= 1e-8 / (BETA * gradient(w).abs().max())
    ours = descend(activated(make, kind), w, gradient, 100, lr=lr, momentum=momentum)[-1]
    plain = descend(torch.optim.SGD, w, gradient, 100, lr=lr * GAIN, momentum=momentum)[-1]
    same_rate = descend(torch.optim.SGD, w, gradient, 100, lr=lr, momentum=momentum)[-1]
    # The first terms of f(g) are K g (1 - (beta g)^2 / 3) for the bounded kinds and K g (1 - beta |g| / 2) for log.
    # beta |g| is at most 1e-8 at the start, and with momentum less than 10 times that in each of the 100 steps.
    allowed = 100 * (1e-7**order + 8 * EPS) * w.abs().max()
    assert (ours - plain).abs().max() <= allowed
    assert (ours - same_rate).abs().max() > 5 * allowed


@pytest.mark.parametrize("make", WITH_PLACES.values(), ids=WITH_PLACES)
@pytest.mark.parametrize(("place", "decay"), [("gradient", 0.01 / GAIN), ("momentum", 0.01)])
def test_weight_decay_beside_a_rate_times_k(make, place, decay):
    """Weight decay that is added after f is K times weaker than that of the plain optimizer at the rate times K."""
    _, gradient, smoothness = quadratic()
    lr = 0.5 / (smoothness * GAIN)
    w = on_device(normal(6))
    w *= 1e-6 / (BETA * gradient(w).abs().max())
    options = {"momentum": 0.9, "weight_decay": 0.01}
    ours = descend(activated(make), w, gradient, 100, lr=lr, activate=place, **options)[-1]
    plain = descend(torch.optim.SGD, w, gradient, 100, lr=lr * GAIN, momentum=0.9, weight_decay=decay)[-1]
    other = descend(torch.optim.SGD, w, gradient, 100, lr=lr * GAIN, momentum=0.9, weight_decay=GAIN * decay)[-1]
    assert (ours - plain).abs().max() <= 1e-8 * w.abs().max()
    assert (ours - other).abs().max() > 1e-6 * w.abs().max()


# The steps in which y grows from START to END on the saddle F = (x^2 - mu y^2) / 2, at the rate 0.1, for three mu. A
# plain step multiplies y by 1 + 0.1 mu, an activated one by 1 + 0.1 K mu as long as beta mu y is small. These six
# numbers of steps belong to a growth of y between 0.9996 and 1.0006 million, and to no other.
MU = (1.0, 0.1, 0.01)
START, END = 1e-8, 1e-2
PLAIN_STEPS, ACTIVATED_STEPS = [145, 1389, 13823], [76, 698, 6915]


def steps_to_escape(make, lr, mu=MU, start=START, end=END):
    mu = torch.tensor(mu, dtype=torch.float64)
    place = torch.stack([torch.full_like(mu, 1e-3), torch.full_like(mu, start)]).requires_grad_()
    optimizer = make([place], lr=lr)
    place.grad = torch.empty_like(place)
    x, y = place.detach()
    escaped = torch.zeros_like(mu)
    step = 0
    while not escaped.all():
        place.grad[0].copy_(x)
        torch.mul(y, -mu, out=place.grad[1])
        optimizer.step()
        step += 1
        escaped[(y >= end) & (escaped == 0)] = step
    assert x.abs().max() < 1e-3
    return escaped.int().tolist()


@way
def test_saddle_escape_takes_the_predicted_steps_and_so_does_the_rate_times_k(make):
    growth = math.log(END / START)
    assert [math.ceil(growth / math.log1p(0.1 * mu)) for mu in MU] == PLAIN_STEPS
    assert [math.ceil(growth / math.log1p(0.1 * GAIN * mu)) for mu in MU] == ACTIVATED_STEPS
    assert steps_to_escape(activated(make), lr=0.1) == ACTIVATED_STEPS


@pytest.mark.parametrize(("lr", "steps"), [(0.1, PLAIN_STEPS), (0.1 * GAIN, ACTIVATED_STEPS)])
def test_saddle_escape_of_plain_descent(lr, steps):
    """At the rate times K, plain descent needs not one step more than activated descent."""
    assert steps_to_escape(torch.optim.SGD, lr) == steps


@pytest.mark.parametrize("growth", [0.9995e6, 1.0007e6])
def test_no_other_growth_gives_these_steps(growth):
    found = [[math.ceil(math.log(growth) / math.log1p(rate * mu)) for mu in MU] for rate in (0.1, 0.1 * GAIN)]
    assert found != [PLAIN_STEPS, ACTIVATED_STEPS]


@way
def test_far_from_the_saddle_the_bound_makes_it_slower_than_the_rate_times_k(make):
    far = {"mu": (1.0,), "start": 1e-6, "end": 1.0}
    assert steps_to_escape(activated(make), 0.1, **far) == [129]
    assert steps_to_escape(torch.optim.SGD, 0.1, **far) == [145]
    assert steps_to_escape(torch.optim.SGD, 0.1 * GAIN, **far) == [76]


@way
@pytest.mark.parametrize("kind", KINDS)
def test_a_steep_wall_and_a_flat_floor_where_no_rate_replaces_the_activation(make, kind):
    """From x = 3, activated descent reaches the flat floor of F = x^4 / 4.

    The plain optimizer diverges at the same rate, and at the rate times K.
    """
    w = torch.tensor([3.0], dtype=torch.float64)
    places = torch.cat(descend(activated(make, kind), w, lambda w: w**3, 200, lr=0.5))
    assert (places.diff() < 0).all()
    assert 0 < places[-1] < 0.2
    for lr in (0.5, 0.5 * GAIN):
        assert not descend(torch.optim.SGD, w, lambda w: w**3, 20, lr=lr)[-1].isfinite()
