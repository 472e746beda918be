"""SGD with activated gradients, drop-in for torch.optim.SGD.

M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv 2107.04228;
the authors' code activates either the gradient or the step that momentum gives.
"""

import functools
import operator
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lcw_ops import _checks as checks
from lcw_ops import _torch
from lcw_ops.ops import gradient_activation as ops
from lcw_ops.optim._activated import ActivatedOptimizer, Gathered
from lcw_ops.reference.gradient_activation import PLACES


class SGD(ActivatedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` that activates the gradient, or the momentum, inside its step: each tensor is read once. With
    ``in_backward=True`` it steps every parameter during the backward pass, before the other gradients are known: no
    norm can clip them, and a GradScaler is refused at its ``step``, when the scaled gradients have been used.
    ``max_grad_value`` clips each element.

    With a parameter w, its gradient g and f(g) = alpha atan(beta g), alpha tanh(beta g) or
    alpha sign(g) log1p(beta |g|):

    - activate="gradient": ``d = f(g) + weight_decay * w``, then momentum and step as in torch;
    - activate="momentum": ``d = g + weight_decay * w``, then momentum as in torch, which gives a step s, and
      ``w -= lr * f(s)``.

    Near a stationary point f(g) is about alpha * beta * g, so compare with plain SGD at ``lr * alpha * beta`` too.
    16-bit parameters are stepped in float32 and rounded once. A gradient is activated in its own dtype. If it, the
    parameter and the momentum buffer differ in dtype, the step works on copies, in float64 if one of them is float64,
    otherwise in float32. The buffer gets the dtype that torch gives it: the first gradient's or, with weight decay,
    the one to which gradient and parameter promote.

    All options but ``in_backward`` and ``max_grad_value`` may differ from group to group. ``state_dict`` has torch's
    keys and loads into torch.optim.SGD; torch's loads into this one, and each group keeps its activation. A parameter
    that a group lists twice is stepped once. DTensor parameters (FSDP2) are stepped shard by shard. GradScaler first
    unscales and looks for overflow. With a tensor lr on a GPU, the step waits for its value.

    With ``in_backward=True``, ``step()`` only marks the end of a step: it runs the step hooks, and the next backward
    pass may step again. Results have the bits of backward() followed by step().

    - The weights (L, N, N) of a recurrence (``nn.OrthogonalFilterMLP``, ``F.orthogonal_filter``) are stepped inside its
      backward pass, in ranges of layers of about 32 MB. Their whole gradient never exists. A learned alpha, beta or
      bias that all layers share costs a second pass over the layers.
    - Every other parameter is stepped when autograd has its gradient. So are these weights where they are not a leaf of
      the graph, are not contiguous, have hooks of ``register_hook``, or run in ``torch.compile``, in the parallel
      solver or on the reference backend, and the 16-bit weights of SGD without activation.
    - lr and the other options are read in the backward pass. Hooks of ``register_hook`` see the gradients, step hooks
      do not. ``torch.autograd.grad`` steps nothing; it does not find a weight that is stepped in ranges.
      ``backward(inputs=...)`` steps the parameters that it names, but not such a weight.
    - These raise before a parameter of this optimizer changes: a second backward pass before ``step()`` (accumulation),
      a weight of a recurrence that is used twice, ``retain_graph``, ``create_graph``, a hook of
      ``register_post_accumulate_grad_hook`` on a parameter. A reentrant checkpoint raises when the pass reaches it:
      layers behind it have then been stepped.
    - If an error interrupts a backward pass, some parameters have been stepped. If it comes between the ranges of a
      weight, step and backward raise until ``load_state_dict`` has been called.
    - DDP, FSDP and DTensors are refused, since gradients are reduced later; so is :func:`lcw_ops.activate_gradients`.
      Copies and pickles keep in_backward; state_dicts do not have it.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        foreach, fused: as in torch, for groups without activation. Groups with activation always use our op.
        differentiable: as in torch. True needs gradient_activation=None.
        gradient_activation: "arctan", "tanh" or "log". None takes torch's step, bit for bit.
        alpha, beta: numbers > 0 that are normal in float32.
        activate: "gradient" or "momentum".
        in_backward: step each parameter during ``loss.backward()``, as soon as its gradient is there, and free the
            gradient: ``.grad`` stays None. See above.
        max_grad_value: for in_backward: clip each element of a gradient to +-max_grad_value before it is activated, as
            torch.nn.utils.clip_grad_value_ does. None does not clip.

    Raises:
        ValueError: options out of range; max_grad_value without in_backward; with in_backward: differentiable=True, a
            parameter with a gradient, or one that another such optimizer has.
        TypeError: alpha, beta or max_grad_value is not a number; with in_backward: a parameter that is a DTensor.

    Other errors are torch's. The docstring of ``step`` lists the errors of a step.

    Source: M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv
    2107.04228.
    """

    _torch_optimizer = torch.optim.SGD
    _op = ops.SGD_STEP
    _takes_sparse = True
    _options = (*ActivatedOptimizer._options, "activate")
    _watched = operator.itemgetter(*_options, "differentiable")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        gradient_activation: str | None = "arctan",
        alpha: float = 0.1,
        beta: float = 20.0,
        activate: str = "gradient",
        in_backward: bool = False,
        max_grad_value: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        options = {"gradient_activation": gradient_activation, "alpha": alpha, "beta": beta, "activate": activate}
        self._add_options(in_backward, max_grad_value, **options)

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        checks.check_choice(self._name(), "activate", group["activate"], PLACES)

    def _steps_elementwise(self, group: dict, param: Tensor) -> bool:
        # On 16-bit tensors torch's steps round the last elements of a tensor otherwise than the elements before them,
        # and the fused one of torch 2.13 leaves some of them out.
        return param.dtype in (torch.float32, torch.float64) or group["gradient_activation"] is not None

    @_torch.never_traced
    def load_state_dict(self, state_dict: dict) -> None:
        """Load as torch does, but keep a momentum buffer's dtype where the gradients have a dtype of their own.

        torch rounds every state to the parameter's dtype, which could make the float32 buffer of a float16 parameter
        infinite. The buffer keeps a floating dtype whose numbers the parameter's cannot hold, if the parameter's
        ``grad_dtype`` is not its dtype and its group is activated. Everything else is as in torch.
        """
        loaded: dict = {}

        def keep_wide_buffers(_) -> None:
            ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
            owners = ((param, group) for group in self.param_groups for param in group["params"])
            for saved_id, (param, group) in zip(ids, owners, strict=True):
                buffer = loaded["state"].get(saved_id, {}).get("momentum_buffer")
                if group["gradient_activation"] is not None and _is_wide_buffer(buffer, param):
                    self.state[param]["momentum_buffer"] = buffer.to(param.device)

        # The user's hooks may change the state_dict. Read it after them, and write before hooks that run later.
        before = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        after = self.register_load_state_dict_post_hook(keep_wide_buffers, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _gather(self, index: int, group: dict, params: list[Tensor], grads: list[Tensor]) -> Gathered:
        buffers: list = []
        method = getattr(self._init_group, "__func__", None)
        if id(method) not in _torch.torchs_init_groups and not _torch.has_torchs_init_group(self):
            group = self._call_init_group(group, params, grads, buffers)
        else:
            if group["fused"]:
                # torch's own check of devices and dtypes, which it makes at the first step.
                self._init_group({**group, "params": params}, [], [], [])
            if group["momentum"] != 0:
                buffers = [self.state[param].get("momentum_buffer") for param in params]
        step = functools.partial(
            ops.sgd_step_,
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            is_first=False,
            activate=group["activate"],
            kind=group["gradient_activation"],
            alpha=float(group["alpha"]),
            beta=float(group["beta"]),
        )
        if not any(map(operator.is_, buffers, repeat(None))):
            return Gathered({"momentum_buffer": buffers}, (), [step] * len(params))
        first_step = functools.partial(step, is_first=True)
        steps = [first_step if buffer is None else step for buffer in buffers]
        decays = float(group["weight_decay"]) != 0
        buffers = [
            torch.empty_like(param, dtype=_dtype_of_buffer(param, grad, decays)) if buffer is None else buffer
            for param, grad, buffer in zip(params, grads, buffers, strict=True)
        ]
        # The op writes a first buffer without reading it. The buffer becomes state only afterwards.
        keep = functools.partial(self._keep_buffers, list(params), list(buffers))
        return Gathered({"momentum_buffer": buffers}, (), steps, (keep,))

    def _check_dtypes(
        self, index: int, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]
    ) -> None:
        """Refuse buffers that are not floating point. Any floating dtype will do, as in torch's step.

        A buffer has the dtype of the first gradient, or the one that ``load_state_dict`` left.
        """
        super()._check_dtypes(index, params, grads, states)
        buffers = states["momentum_buffer"]
        for param, buffer in zip(params, buffers, strict=bool(buffers)):
            if buffer.dtype not in checks.FLOATING:
                raise TypeError(
                    f"{self._where(index, param, 'momentum_buffer')} is {buffer.dtype}; expected float32, float64, "
                    "bfloat16 or float16. Convert it: optimizer.load_state_dict(optimizer.state_dict())."
                )

    def _keep_buffers(self, params: list[Tensor], buffers: list[Tensor]) -> None:
        for param, buffer in zip(params, buffers, strict=True):
            self.state[param]["momentum_buffer"] = buffer


def _is_wide_buffer(buffer: object, param: Tensor) -> bool:
    """Whether the parameter's dtype cannot hold the buffer's numbers, and its gradients may come in another dtype."""
    return (
        isinstance(buffer, Tensor)
        and buffer.is_floating_point()
        and buffer.dtype is not param.dtype
        and getattr(param, "grad_dtype", param.dtype) is not param.dtype
        and torch.promote_types(buffer.dtype, param.dtype) is not param.dtype
    )


def _dtype_of_buffer(param: Tensor, grad: Tensor, decays: bool) -> torch.dtype:
    """The dtype of torch's buffer, a clone of the first gradient to which the decay has been added."""
    if grad.dtype not in checks.FLOATING:
        return param.dtype
    return torch.promote_types(param.dtype, grad.dtype) if decays else grad.dtype
