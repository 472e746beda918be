"""Old names of modules that have moved: pickles and users' code still use them.

A pickle stores the module of each class. ``import lcw_ops.train.job`` gives the module ``lcw_ops.jobs.train`` itself,
so a class is the same object under either name.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec

# Old name -> the name since version 0.2.
MOVED = {
    "lcw_ops.data": "lcw_ops.jobs.data",
    "lcw_ops.gradient_hooks": "lcw_ops.optim.hooks",
    "lcw_ops.ops._backends": "lcw_ops.ops.backends",
    "lcw_ops.ops._library": "lcw_ops.ops.library",
    "lcw_ops.ops._precision": "lcw_ops.ops.precision",
    "lcw_ops.ops.orthogonal_filter_crossover": "lcw_ops.ops.orthogonal_filter.crossover",
    "lcw_ops.ops.orthogonal_filter_graph": "lcw_ops.ops.orthogonal_filter.graph",
    "lcw_ops.ops.parallel_depth_crossover": "lcw_ops.ops.parallel_depth.crossover",
    "lcw_ops.ops.parallel_depth_frame": "lcw_ops.ops.parallel_depth.frame",
    "lcw_ops.ops.parallel_depth_solver": "lcw_ops.ops.parallel_depth.solver",
    "lcw_ops.profile.files": "lcw_ops._files",
    "lcw_ops.profile.main_job": "lcw_ops.jobs.profile",
    "lcw_ops.profile.progress": "lcw_ops.jobs.progress",
    "lcw_ops.reference.checks": "lcw_ops._checks",
    "lcw_ops.train": "lcw_ops.jobs",
    "lcw_ops.train.arguments": "lcw_ops.jobs.arguments",
    "lcw_ops.train.checkpoints": "lcw_ops.jobs.checkpoints",
    "lcw_ops.train.job": "lcw_ops.jobs.train",
    "lcw_ops.train.loop": "lcw_ops.jobs.loop",
    "lcw_ops.train.schedule": "lcw_ops.jobs.schedule",
    "lcw_ops.train.settings": "lcw_ops.jobs.settings",
}


class _Finder:
    """An entry of ``sys.meta_path``, and the loader of the modules that it finds."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        # The import statement then returns the entry in sys.modules.
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


_finder = _Finder()


def install() -> None:
    """Let the import statement find the old names. A second call changes nothing."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
