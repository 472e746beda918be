"""How far one call travels: how many functions of this package it runs, and how often it changes the file."""

import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lcw_ops
from lcw_ops import functional as F

PACKAGE = Path(lcw_ops.__file__).resolve().parent


def count_trip(call) -> tuple[int, int]:
    """The number of calls of this package's Python functions, and how many have another file than the call before."""
    files = []

    def note(frame, event, _):
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_absolute() and path.resolve().is_relative_to(PACKAGE):
                files.append(path)

    # The first call imports modules and fills caches, so it is not counted.
    call()
    before, before_in_threads = sys.getprofile(), threading.getprofile()
    # On a CPU autograd runs a small graph in the thread that calls backward. Calls in another thread would count too.
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(before_in_threads)
    return len(files), sum(one != other for one, other in pairwise(files))


def parameter(*shape):
    return torch.randn(shape, device="cpu", requires_grad=True)


X, WEIGHT, ANGLES, UNITS = parameter(2, 4), parameter(3, 4), parameter(3, 3), parameter(3)

# The call, and the most calls of this package's functions: with a backward pass, and without gradients.
TRIPS = {
    "lcw_linear": (lambda: F.lcw_linear(X, WEIGHT, UNITS), 12, 7),
    "lcw_weight": (lambda: F.lcw_weight(WEIGHT), 17, 11),
    "gmp_linear": (lambda: F.gmp_linear(X, ANGLES, UNITS, UNITS), 13, 7),
    "hypersphere_direction": (lambda: F.hypersphere_direction(ANGLES), 11, 9),
    "weight_norm_linear": (lambda: F.weight_norm_linear(X, WEIGHT, UNITS, UNITS), 14, 9),
    "normalize_scale": (lambda: F.normalize_scale(WEIGHT, UNITS), 13, 11),
}


@pytest.mark.parametrize("name", TRIPS)
def test_a_small_call_takes_a_short_way(name):
    call, most_of_step, most_of_inference = TRIPS[name]
    with lcw_ops.use_backend("cpp"):
        assert 4 <= count_trip(lambda: call().sum().backward())[0] <= most_of_step
        with torch.no_grad():
            assert 4 <= count_trip(call)[0] <= most_of_inference


def test_the_recurrence_takes_a_short_way():
    """Forward and backward, with default arguments."""
    h0, weight, bias = (torch.randn(shape, device="cpu", requires_grad=True) for shape in ((1, 4), (3, 4, 4), (3, 4)))
    filter = torch.eye(4, device="cpu")
    with lcw_ops.use_backend("cpp"):
        calls, changes = count_trip(lambda: F.orthogonal_filter(h0, weight, bias, filter).sum().backward())
    # Fewer than ten would mean that the counter does not see the calls, or that backward did not run.
    assert 10 <= calls <= 26
    assert changes <= 8
