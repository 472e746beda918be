"""Names that users choose from. Nothing is imported here, so that the command line's help needs no torch."""

# How a module's orthogonal filter is made.
FILTERS = ("haar", "cyclic", "permutation", "identity")

# How the recurrence is solved.
SOLVERS = ("sequential", "parallel", "auto")

# The recurrence's activations; lcw_ops/reference/orthogonal_filter.py holds their functions.
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
