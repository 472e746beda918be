"""Small models in the layouts of ordinary deep networks, made from configuration: nothing is downloaded.

``MODELS`` has one entry per model; calling it gives an :class:`Entry` for the profiler's tests.
"""

from zoo import attention, convolutional, hosts, plain, recurrent
from zoo.entry import Entry

MODELS = {**convolutional.MODELS, **attention.MODELS, **recurrent.MODELS, **plain.MODELS}
# These import the library transformers or are deep: they take seconds each.
SLOW_MODELS = {**hosts.MODELS, **plain.SLOW_MODELS}

__all__ = ["MODELS", "SLOW_MODELS", "Entry"]
