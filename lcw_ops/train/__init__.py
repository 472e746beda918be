"""Moved to lcw_ops.jobs.

``job`` is ``lcw_ops.jobs.train``. It has another name there, so this package is not replaced by the new one.
"""
