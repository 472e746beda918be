"""Drop-in modules: the constructor arguments of their ``torch.nn`` namesakes."""

from lcw_ops.nn.orthogonal_filter import OrthogonalFilterMLP, OrthogonalFilterRNN

__all__ = ["OrthogonalFilterMLP", "OrthogonalFilterRNN"]
