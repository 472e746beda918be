"""The recurrence over time: an Elman network with the interface of ``torch.nn.RNN``.

    h_t = alpha O h_{t-1} + beta act(W h_{t-1} + U x_t + b),    W = ``weight_hh``, U = ``weight_ih``

A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245. O is fixed and, by default, random.
The weights and biases are trained; alpha and beta are trained only if each is given as an ``nn.Parameter``.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lcw_ops import functional as F
from lcw_ops._checks import describe
from lcw_ops.nn.orthogonal_filter.base import _OrthogonalFilter, check_sizes
from lcw_ops.nn.orthogonal_filter.sequence import _finish_sequence, _start_sequence, run_packed


def _refuse_arguments_of_rnn(init: Callable) -> Callable:
    """Wrap the constructor: if an argument is one of ``torch.nn.RNN`` only, a TypeError says what to use instead."""

    @functools.wraps(init)
    def checked(self, *args, **kwargs) -> None:
        owner = type(self).__name__
        if len(args) > 2:
            came = f"has {len(args)} arguments by position"
            expected = "two, input_size and hidden_size (torch.nn.RNN's third is num_layers, and this is one layer)"
            remedy = "Give the others by name, for instance batch_first=True."
            raise TypeError(describe(owner, "the call", came, expected, remedy))
        for name, remedy in _INSTEAD_OF.items():
            if name in kwargs:
                expected = "no such argument"
                raise TypeError(describe(owner, name, "is an argument of torch.nn.RNN only", expected, remedy))
        init(self, *args, **kwargs)

    return checked


_INSTEAD_OF = {
    "num_layers": "This is one layer: run several of these modules, each on the output of the one before.",
    "bidirectional": "Run a second module on the input flipped over time, input.flip(0), and flip its output back.",
    "dropout": "Apply torch.nn.Dropout to the output.",
    "nonlinearity": 'Give activation="tanh", "relu", "sigmoid" or "identity".',
    "proj_size": "Apply torch.nn.Linear(hidden_size, proj_size) to the output.",
}


class OrthogonalFilterRNN(_OrthogonalFilter):
    """An Elman network that remembers 10,000 steps: h_t = alpha O h_{t-1} + beta act(W h_{t-1} + U x_t + b).

    Called like ``torch.nn.RNN``: ``output, h_n = rnn(input, hx)``.

    Shapes:
        input (T, B, input_size), T >= 1, or (T, input_size) without a batch; hx (1, B, N) or (1, N), default zero;
        output (T, B, N) or (T, N), h_n (1, B, N) or (1, N).
        A ``PackedSequence`` gives a packed output, and h_n (1, B, N) holds the last state of every sequence. hx and
        h_n are in the order of the sequences before they were sorted.

    Args:
        input_size: size of x_t.
        hidden_size: N.
        bias: whether the recurrence has a bias b.
        batch_first: whether input and output are (batch, time, features) instead of (time, batch, features).
        filter, alpha, activation, segment, solver, tolerance, window: as in :class:`OrthogonalFilterMLP`.
        beta: weight of the nonlinear branch. Give it, or give ``length``.
        length: number of steps to remember, which sets beta = 1 / length.

    The parameters are weight_ih (N, input_size), weight_hh (N, N) and bias (N,) or None. ``filter`` is a buffer.

    The gradient of every step carries the factor beta. :class:`OrthogonalFilterMLP` says which eps Adam then needs.

    Raises:
        ValueError: neither or both of beta and length, or as in :class:`OrthogonalFilterMLP`. In a call: wrong
            shapes or dtypes, an empty sequence, a ``PackedSequence`` whose sizes contradict each other, or one
            that would be exported.
        TypeError: arguments that only ``torch.nn.RNN`` has, a third argument by position, a bias or batch_first that
            is not a bool. In a call: an input or hx that is not a tensor, or on another device than the parameters.

    Source:
        A. Ceni, "Random Orthogonal Additive Filters", IEEE TNNLS 2025, arXiv 2210.01245.

    Differences from ``torch.nn.RNN``:

    ======================  ================================  ==========================================================
    subject                 ``torch.nn.RNN``                  here
    ======================  ================================  ==========================================================
    arguments by position   all                               input_size and hidden_size
    num_layers              several in one module             TypeError: run several modules; the attribute is 1
    bidirectional           both directions in one module     TypeError: run a second module on the flipped input; the
                                                              attribute is False
    dropout                 between layers                    TypeError: apply ``nn.Dropout``; the attribute is 0.0
    nonlinearity            "tanh", "relu"                    TypeError: ``activation=``, also "sigmoid" and "identity"
    proj_size               LSTM only                         TypeError: apply ``nn.Linear``; the attribute is 0
    parameters              ``weight_ih_l0``, ..., two        ``weight_ih``, ``weight_hh``, one ``bias``; the state dict
                            biases                            has the filter too
    attribute ``bias``      bool                              the parameter, or None
    attribute ``mode``      RNN_TANH, RNN_RELU                also RNN_SIGMOID, RNN_IDENTITY
    initial values          all uniform, +-1/sqrt(N)          normal: ``weight_ih`` with std 1/sqrt(input_size),
                                                              ``weight_hh`` as in the MLP; ``bias`` zero
    errors in a call        RuntimeError; wrong dtype of the  shapes and dtypes: ValueError; another device, or not a
                            input: ValueError                 tensor: TypeError
    autocast                output and h_n in its dtype       both in float32: rounded to 16 bits, a state that is
                                                              carried on as hx would lose steps of size beta
    output edited in place  allowed on a CPU, on a GPU        backward raises an error where it reads these states, as
    before backward         backward raises an error          the CPU's kernel does, for instance after
                                                              ``torch.nn.functional.dropout(output, inplace=True)``; a
                                                              packed output may be edited. Edit ``output.clone()``: a
                                                              copy in every call takes 3 to 5 % of forward + backward on
                                                              two CPU cores (T = 784 and 10,000), so none is made
    PackedSequence          yes                               yes: one run per stretch of time in which no sequence ends
    exporting a             ``torch.jit.trace`` keeps its     ValueError: the lengths would become constants; export
    PackedSequence          lengths as inputs                 with padded input
    TorchScript             ``torch.jit.script`` and          ``torch.jit.trace`` only
                            ``torch.jit.trace``
    ======================  ================================  ==========================================================
    """

    # Attributes of torch.nn.RNN that generic code reads.
    num_layers = 1
    bidirectional = False
    dropout = 0.0
    proj_size = 0

    @_refuse_arguments_of_rnn
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        batch_first: bool = False,
        filter: str | Tensor = "haar",
        beta: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        activation: str = "tanh",
        length: int | None = None,
        segment: int | None = None,
        device=None,
        dtype=None,
        solver: str = "sequential",
        tolerance: float | None = None,
        window: int | None = None,
    ) -> None:
        check_sizes(self, input_size=input_size, hidden_size=hidden_size)
        for name, flag in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(flag, bool):
                raise TypeError(describe(type(self).__name__, name, f"is {flag!r}", "True or False"))
        if (beta is None) == (length is None):
            came, expected = f"is {beta} and length is {length}", "exactly one of them"
            remedy = "length=T for sequences of T steps sets beta = 1/T."
            raise ValueError(describe(type(self).__name__, "beta", came, expected, remedy))
        if length is not None:
            check_sizes(self, length=length)
            beta = 1.0 / length
        super().__init__(
            hidden_size, None, filter, alpha, beta, activation, segment, device, dtype, solver, tolerance, window
        )
        options = {"device": device, "dtype": dtype}
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, **options))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size, **options))
        self.register_parameter("bias", nn.Parameter(torch.empty(hidden_size, **options)) if bias else None)
        # A subclass may override reset_parameters, as with torch's modules. The filter is not drawn a second time.
        self._is_being_made = True
        self.reset_parameters()
        del self._is_being_made

    @property
    def nonlinearity(self) -> str:
        return self.activation

    @property
    def mode(self) -> str:
        return f"RNN_{self.activation.upper()}"

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        return [[self.weight_ih, self.weight_hh, *([] if self.bias is None else [self.bias])]]

    def flatten_parameters(self) -> None:
        """Do nothing. torch.nn.RNN lays its parameters out for cuDNN, which is not used here."""

    def reset_parameters(self) -> None:
        """See :meth:`OrthogonalFilterMLP.reset_parameters`. Here the constructor calls it, after drawing the filter."""
        self._reset_fixed()
        nn.init.normal_(self.weight_ih, std=1.0 / math.sqrt(self.input_size))
        self._init_recurrent(self.weight_hh, self.bias)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        options = {
            "activation": self.activation,
            "segment": self.segment,
            "solver": self.solver,
            "tolerance": self.tolerance,
            "window": self.window,
        }
        recurrence = self.weight_hh, self.bias, self.filter, self.alpha, self.beta
        if isinstance(input, PackedSequence):
            return run_packed(input, hx, self.weight_ih, *recurrence, **options)
        h0, drive = _start_sequence(input, hx, self.weight_ih, self.batch_first)
        states = F.orthogonal_filter(h0, *recurrence, inputs=drive, return_states=True, **options)
        return _finish_sequence(states, input, self.batch_first)

    def extra_repr(self) -> str:
        flags = (", bias=False" if self.bias is None else "") + (", batch_first=True" if self.batch_first else "")
        return f"{self.input_size}, {self.hidden_size}{flags}, {self._scales_repr()}"
