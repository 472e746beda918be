"""The calls of the package's ops below autograd and torch's transforms."""

from torch.utils._python_dispatch import TorchDispatchMode


class OpCalls(TorchDispatchMode):
    """``calls`` holds the op and the result of every call inside the ``with`` block."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "lcw_ops":
            self.calls.append((function, result))
        return result
