"""The recurrence over depth: an MLP of up to 50,000 layers.

    h_l = alpha O h_{l-1} + beta act(W_l h_{l-1} + b_l)

A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. O is fixed and random; everything else
is trained.
"""

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops._checks import describe
from lcw_ops.nn.orthogonal_filter.base import _OrthogonalFilter, check_sizes


class OrthogonalFilterMLP(_OrthogonalFilter):
    """A deep network that trains at 50,000 layers: h_0 = W_in x + b_in, ``depth`` steps, y = W_out h + b_out.

    Shapes:
        input (*, in_features) -> output (*, out_features).

    Args:
        in_features: size of one sample.
        width: N, units per layer.
        depth: L, number of layers.
        out_features: size of one output.
        filter: O, see :func:`make_filter`; a buffer, never trained. "haar" and "permutation" are random: on several
            ranks draw them with one seed, or broadcast the state dict. The ranks of a sharded module agree in
            :meth:`reset_parameters`.
        beta: weight of the nonlinear branch, a number or (depth,) tensor; default 1 / depth. With a constant beta the
            gradient vanishes like (1 - beta)^depth.
        alpha: weight of the filter branch; default 1 - beta.
        activation: "tanh", "relu", "sigmoid" or "identity".
        segment: every ``segment``-th state is kept for backward, see :func:`lcw_ops.functional.orthogonal_filter`.
        solver, tolerance, window: "sequential", or "parallel" over depth; see the same function.

    Attributes:
        input_layer, output_layer: ``nn.Linear``.
        weight: (depth, width, width), with std 1/sqrt(width), for ReLU sqrt(2/width).
        bias: (depth, width), zero.
        filter: buffer, in float32 at least.

    Gradients of weight carry the factor beta: use Adam with eps <= 1e-12, or SGD with a rate that grows with depth. The
    module does not see its optimizer and cannot warn. At 50,000 layers of width 32 the entries' median is 5e-8 before
    the first step (digits, batch 64) and falls with the loss: Adam's default eps of 1e-8 is not small beside them.

    Raises:
        ValueError, TypeError: a size below 1, a filter that is not orthogonal, non-finite alpha or beta.

    Source:
        A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int,
        filter: str | Tensor = "haar",
        *,
        beta: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        activation: str = "tanh",
        segment: int | None = None,
        device=None,
        dtype=None,
        solver: str = "sequential",
        tolerance: float | None = None,
        window: int | None = None,
    ) -> None:
        check_sizes(self, in_features=in_features, width=width, depth=depth, out_features=out_features)
        beta = 1.0 / depth if beta is None else beta
        super().__init__(
            width, depth, filter, alpha, beta, activation, segment, device, dtype, solver, tolerance, window
        )
        options = {"device": device, "dtype": dtype}
        self.in_features, self.width, self.depth, self.out_features = in_features, width, depth, out_features
        self.input_layer = nn.Linear(in_features, width, **options)
        self.weight = nn.Parameter(torch.empty(depth, width, width, **options))
        self.bias = nn.Parameter(torch.empty(depth, width, **options))
        self.output_layer = nn.Linear(width, out_features, **options)
        # Not reset_parameters: it would draw the linear layers a second time, and seeded models would change.
        self._init_recurrent(self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Draw parameters and filter as the constructor did, and set alpha and beta to their initial values.

        A filter that was given as a tensor stays. The constructor itself does not call this method.

        If a parameter is a ``DTensor`` (FSDP2, tensor parallelism), all ranks of its mesh have to call this, and the
        filter is that of the mesh's first rank. Otherwise ranks share a filter only if they call this with one seed.

        Raises:
            ValueError: a filter, alpha or beta that was given as a tensor is uninitialised memory since ``to_empty``;
                load or set it first. Or input_layer or output_layer has no ``reset_parameters``. In both cases nothing
                is written.
        """
        for name in ("input_layer", "output_layer"):
            layer = getattr(self, name)
            if not callable(getattr(layer, "reset_parameters", None)):
                came = f"is a {type(layer).__name__}, and reset_parameters cannot initialise {name}"
                expected = "a layer with reset_parameters"
                remedy = "Give it one, or call reset_parameters before the layer is replaced."
                raise ValueError(describe(type(self).__name__, name, came, expected, remedy))
        self._reset_fixed()
        self.input_layer.reset_parameters()
        self.output_layer.reset_parameters()
        self._init_recurrent(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        h0 = self._apply_input_layer(x).reshape(-1, self.width)
        h = F.orthogonal_filter(
            h0,
            self.weight,
            self.bias,
            self.filter,
            self.alpha,
            self.beta,
            activation=self.activation,
            segment=self.segment,
            solver=self.solver,
            tolerance=self.tolerance,
            window=self.window,
        )
        return self.output_layer(h).reshape(x.shape[:-1] + (self.out_features,))  # noqa: RUF005

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.depth}, {self._scales_repr()}"
