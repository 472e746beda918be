"""Input mean normalization, which deep nets with GmP layers need. W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912."""

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
