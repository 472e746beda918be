"""Input mean normalization, which deep nets with GmP layers need. W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lcw_ops._checks import FLOATING, check_non_negative, check_shape, describe


class InputMeanNorm(nn.Module):
    """Subtracts every channel's mean, over the batch and all positions: ``y = x - E x``. Nothing is learned.

    In a deep GmP net, put it before a GmP layer, after the previous ReLU and before pooling. In training the mean is
    the batch's, and gradients flow through it. In eval mode it is the running mean. Each process of a distributed run
    takes the mean of its own batch.

    The input is (N, C, *), for N samples and C channels, of rank 2 or more. The output has the input's shape, dtype and
    memory format. An empty batch comes back empty and changes no statistics. A batch with one value per channel gives
    zeros.

    Args:
        num_features: C.
        momentum: the share of the new mean in the running mean, 0 to 1. None averages all batches, as in
            ``nn.BatchNorm2d``.
        device, dtype: of the running mean. Its dtype is at least float32: a 16-bit mean's small steps would round to 0.

    The buffers are running_mean (C,) and num_batches_tracked (), as in ``nn.BatchNorm2d``. 16-bit inputs are averaged
    and shifted in float32 and rounded once.

    Raises:
        ValueError: a momentum outside [0, 1]; an input of another shape.
        TypeError: an input that is not floating, or float64 with a float32 running mean, or the reverse.

    Source: the authors' code of GmP, with decay 0.99 of the running mean.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if momentum is not None:
            check_non_negative("InputMeanNorm", "momentum", momentum)
            if momentum > 1:
                expected = "0 to 1, or None for the average of all batches"
                raise ValueError(describe("InputMeanNorm", "momentum", f"is {momentum}", expected))
        self.num_features = num_features
        self.momentum = momentum
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.int64))

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        if self.training and input.numel() > 0:
            positions = [dim for dim in range(input.dim()) if dim != 1]
            mean = input.mean(positions, keepdim=True, dtype=self.running_mean.dtype)
            self._track(mean.detach().flatten())
        else:
            mean = self.running_mean.view(-1, *(1,) * (input.dim() - 2))
        return (input - mean).to(input.dtype)

    def _track(self, mean: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share: float | Tensor | None = self.momentum
        if share is None:
            # Divide on the device: reading the count would make the host wait.
            share = self.num_batches_tracked.to(mean.dtype).reciprocal()
        self.running_mean.add_((mean - self.running_mean) * share)

    def _check(self, input: Tensor) -> None:
        right = input.dim() >= 2 and input.shape[1] == self.num_features
        check_shape("InputMeanNorm", "input", input, right, f"(N, {self.num_features}, *), channels in dim 1")
        kept = self.running_mean.dtype
        if input.dtype not in FLOATING or torch.promote_types(input.dtype, torch.float32) != kept:
            fitting = "float32, bfloat16 or float16" if kept == torch.float32 else kept
            expected = f"{fitting}, because running_mean is {kept}"
            raise TypeError(
                describe("InputMeanNorm", "input", f"is {input.dtype}", expected, "Convert one of the two.")
            )

    def _apply(self, fn, recurse=True):
        running_mean = self.running_mean
        super()._apply(fn, recurse)
        if self.running_mean.dtype in (torch.bfloat16, torch.float16):
            self.running_mean = running_mean.to(dtype=torch.float32, device=self.running_mean.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"


@torch.no_grad()
def update_means(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Compute the running mean of every :class:`InputMeanNorm` of a model again, from one pass over some data.

    ``torch.optim.swa_utils.update_bn`` does this for batch norm and passes these layers by. So call this too after
    averaging weights, or whenever the weights were changed outside of training. If the model also has batch norm, call
    ``update_bn`` first.

    Each layer's mean becomes the mean of its input over all samples and positions of the loader, whatever the sizes of
    the batches. As in training, a layer subtracts the mean of the batch at hand, and the next layers see the result;
    so batches of the size used in training are right. All other modules run in eval mode: no dropout, and no other
    statistics change.

    Args:
        loader: gives batches, each a tensor or a list or tuple that begins with one. It is the model's only argument.
        model: its training flags are restored at the end. A model without InputMeanNorm is left alone. A layer that the
            model does not call keeps its statistics.
        device: where to move each batch first. None leaves it where it is.

    The sums are in float64, in float32 on a device without it. ``num_batches_tracked`` becomes the number of batches.

    Raises:
        ValueError: no samples reach any of the layers, as with an empty loader; or a mean is not finite. An error of
            the loader or of the model is passed on. After an error the model is as it was.
        TypeError: a batch of another type, such as a dict.
    """
    layers = [module for module in model.modules() if isinstance(module, InputMeanNorm)]
    if not layers:
        return
    before = [(layer, layer.running_mean.clone(), layer.num_batches_tracked.clone()) for layer in layers]
    training = [(module, module.training) for module in model.modules()]
    sums: dict[nn.Module, Tensor] = {}
    values: dict[nn.Module, int] = {}
    batches: dict[nn.Module, int] = {}

    def add(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x: Tensor = arguments[0] if arguments else keywords["input"]
        if x.dim() < 2 or x.numel() == 0:
            return
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        batch_sum = x.sum([dim for dim in range(x.dim()) if dim != 1], dtype=dtype)
        sums[layer] = sums[layer] + batch_sum if layer in sums else batch_sum
        values[layer] = values.get(layer, 0) + x.numel() // x.shape[1]
        batches[layer] = batches.get(layer, 0) + 1

    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.training = True
        for batch in loader:
            x = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
            if not isinstance(x, Tensor):
                begins = "" if x is batch else f" that begins with a {type(x).__name__}"
                came = f"has given a batch that is a {type(batch).__name__}{begins}"
                expected = "batches that are a tensor, or a list or tuple that begins with one"
                raise TypeError(describe("update_means", "loader", came, expected))
            model(x if device is None else x.to(device))
        if not sums:
            came = "has given no sample to an InputMeanNorm of the model"
            remedy = "Compile the model after the call, if it is compiled."
            raise ValueError(describe("update_means", "loader", came, "at least one batch with samples", remedy))
        means = {layer: total / values[layer] for layer, total in sums.items()}
        if not all(mean.isfinite().all() for mean in means.values()):
            came = "has given an InputMeanNorm of the model inputs whose mean is NaN or infinite"
            raise ValueError(describe("update_means", "loader", came, "batches on which the model's values are finite"))
    except BaseException:
        for layer, running_mean, tracked in before:
            layer.running_mean.copy_(running_mean)
            layer.num_batches_tracked.copy_(tracked)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
    for layer, running_mean, tracked in before:
        layer.running_mean.copy_(means.get(layer, running_mean))
        layer.num_batches_tracked.copy_(tracked)
        if layer in batches:
            layer.num_batches_tracked.fill_(batches[layer])
