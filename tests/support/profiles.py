"""Profiles in tests: one repeat, an assumed matmul rate, and figures by the name of their row."""

from lcw_ops.profile import profile


def measure(model, inputs, *args, **options):
    return profile(model, inputs, *args, **{"repeats": 1, "matmul_rate": 1e10, **options})


def row(result, name):
    return list(result.columns["name"]).index(name)


def figure(result, column, name):
    """The figure; there must be no reason for its absence."""
    assert result.reason(column, row(result, name)) is None
    return result.columns[column][row(result, name)]
