"""The profiler: where a very deep network's signal, gradient, time and memory go, layer by layer.

``profile(model, inputs)`` for any module; ``main_job`` is what ``lcw-ops profile`` runs.
"""

from lcw_ops.profile.bounds import spectral_norm_bound
from lcw_ops.profile.jacobian import JacobianSpectrum, function_spectrum, lanczos_spectrum
from lcw_ops.profile.profiler import profile
from lcw_ops.profile.result import Profile, Solves, Timing

__all__ = [
    "JacobianSpectrum",
    "Profile",
    "Solves",
    "Timing",
    "function_spectrum",
    "lanczos_spectrum",
    "profile",
    "spectral_norm_bound",
]
