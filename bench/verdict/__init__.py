"""The measurements behind ``Profile.verdict()``: ``python -m lcw_ops.bench.verdict.run``."""
