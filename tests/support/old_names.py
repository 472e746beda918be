"""Names that modules and their contents had before the code was rearranged. All of them still import."""

# Old name of a module -> its new name. The file of the old name replaces itself by the new module.
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
    "lcw_ops.train.arguments": "lcw_ops.jobs.arguments",
    "lcw_ops.train.checkpoints": "lcw_ops.jobs.checkpoints",
    "lcw_ops.train.job": "lcw_ops.jobs.train",
    "lcw_ops.train.loop": "lcw_ops.jobs.loop",
    "lcw_ops.train.schedule": "lcw_ops.jobs.schedule",
    "lcw_ops.train.settings": "lcw_ops.jobs.settings",
}

# A package that only holds its old modules: it is not lcw_ops.jobs under another name.
OLD_PACKAGES = ("lcw_ops.train",)
