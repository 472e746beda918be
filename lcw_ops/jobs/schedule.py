"""Schedules of the learning rate. This module does not import torch: the command line's help reads the names."""

# name -> (steps done, steps of the whole training) -> share of the full rate. "falling" refines the minimum that the
# large steps of the first half found. Only "constant" does not depend on the number of steps to come.
SCHEDULES = {
    "falling": lambda done, steps: min(1.0, 2 * (1 - done / steps)),
    "constant": lambda done, steps: 1.0,
}
