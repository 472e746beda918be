"""A classification task in memory, and the split of its samples."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

# One sample in five of every class is held out.
TEST_SHARE = 0.2


@dataclass
class Dataset:
    """A classification task, split: x_* (samples, features), standardised float32; y_* (samples,), int64 classes."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    @property
    def features(self) -> int:
        return self.x_train.shape[1]

    def to(self, device) -> "Dataset":
        moved = (tensor.to(device) for tensor in (self.x_train, self.y_train, self.x_test, self.y_test))
        return Dataset(self.name, *moved, self.classes)


def split(x: np.ndarray, y: np.ndarray, seed: int):
    """Hold out TEST_SHARE of every class for the test set, drawn by ``seed``.

    A class of one or two samples stays in training. If no class has three, one sample of a class of two is held out.
    """
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(x), dtype=bool)
    for label in np.unique(y):
        members = generator.permutation(np.flatnonzero(y == label))
        held_out[members[: round(TEST_SHARE * len(members))]] = True
    if not held_out.any():
        _, classes, counts = np.unique(y, return_inverse=True, return_counts=True)
        held_out[generator.choice(np.flatnonzero(counts[classes] > 1))] = True
    return x[~held_out], y[~held_out], x[held_out], y[held_out]
