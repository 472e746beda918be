"""The profiler: ``profile(model, inputs)`` measures signal, gradient, time and memory of any module, layer by layer.

It only measures. The command ``lcw-ops profile``, which trains a network too, is in ``lcw_ops/jobs/profile.py``.
"""

from lcw_ops import _old_names
from lcw_ops.profile.bounds import spectral_norm_bound
from lcw_ops.profile.compare import Comparison, compare
from lcw_ops.profile.jacobian import JacobianSpectrum, function_spectrum, lanczos_spectrum
from lcw_ops.profile.profiler import profile
from lcw_ops.profile.reading import read
from lcw_ops.profile.remedies import scale_learning_rate
from lcw_ops.profile.result import Profile, Solves, Timing
from lcw_ops.profile.trace import trace
from lcw_ops.profile.verdict import Finding, Outcome, Verdict
from lcw_ops.profile.watch import Watch, watch

__all__ = [
    "Comparison",
    "Finding",
    "JacobianSpectrum",
    "Outcome",
    "Profile",
    "Solves",
    "Timing",
    "Verdict",
    "Watch",
    "compare",
    "function_spectrum",
    "lanczos_spectrum",
    "profile",
    "read",
    "scale_learning_rate",
    "spectral_norm_bound",
    "trace",
    "watch",
]

_old_names.keep(globals(), {}, submodules=("files",))
