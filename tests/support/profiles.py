"""Profiles in tests: one repeat, an assumed matmul rate, and figures by the name of their row."""

import numpy as np

from lcw_ops.profile import machine, profile
from lcw_ops.profile.result import COLUMNS, Profile, Timing


def measure(model, inputs, *args, **options):
    return profile(model, inputs, *args, **{"repeats": 1, "matmul_rate": 1e10, **options})


def row(result, name):
    return list(result.columns["name"]).index(name)


def figure(result, column, name):
    """The figure; there must be no reason for its absence."""
    assert result.reason(column, row(result, name)) is None
    return result.columns[column][row(result, name)]


def made_profile(rows, names=None, **columns):
    """A profile of these columns without a model. The other columns are missing, for a reason that it gives."""
    result = Profile(
        name="a made net",
        loss=0.5,
        samples=8,
        columns={"name": np.array([f"layers.{row}" for row in range(rows)] if names is None else names)},
        jacobians={},
        timing=Timing(0.001, 0.002, 3, rows, 1e6, 2e6, 1e10),
        peak_memory_bytes=10**9,
        backend="cpp",
        machine=machine.describe(),
        reasons=["it was not made"],
    )
    for name in [*COLUMNS, *(name for name in columns if name not in COLUMNS)]:
        if name != "name":
            result.columns[name] = np.array(columns.get(name, [np.nan] * rows), np.float64)
            result.missing[name] = np.full(rows, name not in columns, np.uint16)
    return result
