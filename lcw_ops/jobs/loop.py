"""One step of training, and the state on which the next step depends. Adam runs on shuffled batches.

No sample is drawn twice in an epoch. The state is a flat dictionary of tensors. A new process with the same number of
threads continues from this state with the same bits.
"""

import torch
from torch import Tensor, nn

from lcw_ops.jobs.data import Dataset
from lcw_ops.jobs.schedule import SCHEDULES

# With L layers, the gradients of all weights have the factor beta = 1/L: Adam's usual eps of 1e-8 would exceed them.
ADAM_EPS = 1e-12

# How often the whole test set is classified: before the first step, after the last step, and in between.
EVALUATIONS = 7


class Training:
    """A training that is carried out step by step. ``state()`` and ``restore()`` may be called between two steps.

    Args:
        model: trained in place, on the device of the data.
        steps: number of steps of the whole training.
        batch: samples per step, at most the training set's number.
        seed: decides the order of samples.
        betas: Adam's.
        label_smoothing: of the cross entropy that is minimised.
        schedule: a name in ``SCHEDULES``. "falling": the full rate for half of the steps, then a rate that falls
            linearly to 0.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        steps: int,
        batch: int,
        lr: float,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.999),
        label_smoothing: float = 0.0,
        schedule: str = "falling",
    ) -> None:
        self.model, self.dataset, self.steps, self.batch, self.lr = model, dataset, steps, batch, lr
        self.rate_share = SCHEDULES[schedule]
        self.objective = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.done = 0
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas, eps=ADAM_EPS, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        # The samples that this epoch has not used yet.
        self.order = torch.empty(0, dtype=torch.int64)

    def step(self) -> float:
        """Make one step. Returns the cross entropy of its batch without smoothing: 0 is perfect."""
        x, y = self.dataset.x_train, self.dataset.y_train
        if len(self.order) < self.batch:
            self.order = torch.randperm(len(x), generator=self.generator)
        batch, self.order = self.order[: self.batch].to(x.device), self.order[self.batch :]
        # The rate follows from the step count alone: a schedule object would be one more state to save.
        self.optimizer.param_groups[0]["lr"] = self.lr * self.rate_share(self.done, self.steps)
        logits = self.model(x[batch])
        self.objective(logits, y[batch]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return nn.functional.cross_entropy(logits.detach(), y[batch]).item()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on. The tensors of model and optimizer are not copied."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {f"adam.{name}.{moment}": tensor for moment, tensor in moments.items()}
        tensors["done"] = torch.tensor(self.done)
        # Copy this slice: torch.save would write the order of the whole epoch, of which it is a part.
        tensors["order"] = self.order.clone()
        tensors["order_generator"] = self.generator.get_state()
        tensors["generator"] = torch.get_rng_state()
        if self.dataset.x_train.is_cuda:
            tensors["cuda_generator"] = torch.cuda.get_rng_state(self.dataset.x_train.device)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from where ``state()`` was taken. The optimizer's tensors are used as they are, not copied."""
        self.model.load_state_dict(_below("model.", tensors))
        for name, parameter in self.model.named_parameters():
            moments = _below(f"adam.{name}.", tensors)
            self.optimizer.state[parameter] = {key: moment.to(parameter.device) for key, moment in moments.items()}
        self.done, self.order = int(tensors["done"]), tensors["order"]
        self.generator.set_state(tensors["order_generator"])
        torch.set_rng_state(tensors["generator"])
        if self.dataset.x_train.is_cuda:
            torch.cuda.set_rng_state(tensors["cuda_generator"], self.dataset.x_train.device)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def evaluation_steps(steps: int) -> set[int]:
    """The numbers of steps after which the test set is classified; 0 is before the first step."""
    return {round(i * steps / (EVALUATIONS - 1)) for i in range(EVALUATIONS)}


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset, batch: int | None = None) -> float:
    """The share of the test set that is classified correctly. ``batch``: samples at a time, by default all."""
    batch = batch or len(dataset.x_test)
    batches = zip(dataset.x_test.split(batch), dataset.y_test.split(batch), strict=True)
    correct = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
    return correct / len(dataset.y_test)
