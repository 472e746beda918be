"""The recurrence over depth: an MLP of up to 50,000 layers.

    h_l = alpha O h_{l-1} + beta act(W_l h_{l-1} + b_l)

A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. O is fixed and, by default, random.
The weights and biases are trained; alpha and beta are trained only if each is given as an ``nn.Parameter``.
"""

import torch
from torch import Tensor, nn

from lcw_ops import functional as F
from lcw_ops._checks import describe
from lcw_ops.nn.orthogonal_filter.base import _OrthogonalFilter, check_sizes
from lcw_ops.nn.orthogonal_filter.stages import make_stages


class OrthogonalFilterMLP(_OrthogonalFilter):
    """A deep network that can be trained with 50,000 layers.

    h_0 = W_in x + b_in, then h_l = alpha O h_{l-1} + beta act(W_l h_{l-1} + b_l) for l = 1 to ``depth``, and
    y = W_out h_depth + b_out.

    Shapes:
        input (*, in_features) -> output (*, out_features).

    Args:
        in_features: size of one sample.
        width: N, units per layer.
        depth: L, number of layers.
        out_features: size of one output.
        filter: O, see ``make_filter``; a buffer, never trained. "haar" and "permutation" are random. If there are
            several ranks, draw the filter with the same seed on each, or broadcast the state dict. For a sharded
            module, :meth:`reset_parameters` gives every rank the same filter.
        beta: weight of the nonlinear branch, a number or (depth,) tensor; default 1 / depth. If beta does not fall with
            depth, the gradient vanishes like (1 - beta)^depth.
        alpha: weight of the filter branch; default 1 - beta.
        activation: "tanh", "relu", "sigmoid" or "identity".
        segment: every ``segment``-th state is kept for backward, see :func:`lcw_ops.functional.orthogonal_filter`.
        solver: "sequential", "parallel" over depth, or "auto"; see :func:`lcw_ops.functional.orthogonal_filter`.
        tolerance, window: options of the parallel solver; see the same function.

    Attributes:
        input_layer, output_layer: ``nn.Linear``.
        weight: (depth, width, width), drawn with std 1/sqrt(width), for ReLU sqrt(2/width).
        bias: (depth, width), initially zero.
        filter: buffer, in float32 at least.

    Gradients of weight carry the factor beta: use Adam with eps <= 1e-12, or SGD with a rate that grows with depth. The
    module does not see its optimizer and cannot warn. With 50,000 layers of width 32 (scikit-learn's digits, batch 64),
    half of the entries of weight's gradient are below 5e-8 in size before the first step, and they shrink as the loss
    falls. Adam's default eps of 1e-8 is not small beside them.

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
        filter is that of the mesh's first rank. Otherwise ranks share a filter only if all of them set the same seed
        before the call.

        Raises:
            ValueError: ``to_empty`` has left a filter, alpha or beta that was given as a tensor uninitialised (load or
                set it before the call); or a layer that replaces input_layer or output_layer has no
                ``reset_parameters``. In both cases nothing is written.
        """
        for name in ("input_layer", "output_layer"):
            layer = getattr(self, name)
            if not callable(getattr(layer, "reset_parameters", None)):
                came = f"is a {type(layer).__name__}, which has no method reset_parameters"
                expected = "a layer with this method"
                remedy = "Add the method to the layer, or call the module's own before you replace the layer."
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

    def stages(self, n: int) -> list[nn.Module]:
        """Cut the net into n modules that, one after the other, compute what it computes.

        They are made for pipelines: give each to a process or device, for instance as the submodule of a
        ``torch.distributed.pipelining.PipelineStage``. The first has the input layer, the last the output layer, and
        the numbers of layers differ by at most one. alpha and beta are those of the whole net: the default beta stays
        1 / depth of the whole. Solver, segment, activation and the other options are the net's.

        Args:
            n: the number of stages, from 1 to ``depth``.

        Returns:
            Modules in order: the first takes (*, in_features), each later one the states (*, width) of the one before,
            and the last gives (*, out_features). States of a 16-bit net are float32 between stages. With the sequential
            solver the results are the whole net's to the last bit.

        The stages share memory with the net. Their parameters ``weight`` and ``bias``, and alpha and beta per layer,
        are views of the net's, so an optimizer's step on the stages changes the net, and the other way round. ``.grad``
        belongs to the stage's own parameter: a backward pass through the stages leaves the net's ``.grad`` as it is.
        The layers input_layer and output_layer are the same modules in both. So is a trained alpha or beta that all
        layers share: every stage has the same parameter object. Within a process its gradient is the sum over its
        stages. In a pipeline over processes, all-reduce that gradient before the optimizer's step, or the processes'
        values drift apart. A schedule that gives a process several stages needs ``scale_grads=False`` then: torch would
        divide this gradient by the number of microbatches once per stage.

        Hooks on the net itself do not run, because the net's ``forward`` does not.

        Convert and move the net before you cut it: ``net.to(...)`` gives the net other memory. A copy
        (``copy.deepcopy``) or pickle of a stage holds its own layers alone, so a process can keep a copy of its stage
        and free the net. ``torch.save(stage.state_dict())`` writes the memory of the whole net, as for any view; copy
        the stage first. A stage has no ``reset_parameters``; after ``to_empty``, load a state dict.

        Raises:
            TypeError: n is not an int.
            ValueError: n is below 1 or above ``depth``; a parameter is a DTensor, or is computed from others (a
                parametrization or pruning); or the net is of a subclass with a ``forward`` of its own.
        """
        if getattr(self.forward, "__func__", None) is not OrthogonalFilterMLP.forward:
            came = f"is a {type(self).__name__}, which has a forward of its own"
            expected = "a net that computes what OrthogonalFilterMLP does"
            raise ValueError(describe("OrthogonalFilterMLP.stages", "the net", came, expected))
        return make_stages(self, n)

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.depth}, {self._scales_repr()}"
