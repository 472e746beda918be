"""Small real data for the main job: scikit-learn's bundled digits, or a user's ``.npz``; nothing is downloaded.

x is standardised with the training set's own mean and standard deviation; the split is stratified and seeded, so that
the same seed gives the same arrays on every machine.
"""

import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# One sample in five of every class is held out.
TEST_SHARE = 0.2

SPLIT_KEYS = ("x_train", "y_train", "x_test", "y_test")
WHOLE_KEYS = ("x", "y")


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


def load(source: str, seed: int = 0) -> Dataset:
    """The digits for "digits", else the ``.npz`` file of that path; see :func:`load_digits`, :func:`load_npz`."""
    return load_digits(seed) if source == "digits" else load_npz(source, seed)


def load_digits(seed: int = 0) -> Dataset:
    """1797 real 8x8 images of handwritten digits, bundled with scikit-learn: x has 64 features, y 10 classes.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits data comes with scikit-learn, which is not installed: pip install lcw-ops[profile], "
            "or give an .npz file of your own"
        ) from error
    digits = datasets.load_digits()
    return _dataset("digits", *_split(digits.data, digits.target, seed))


def load_npz(path: str | Path, seed: int = 0) -> Dataset:
    """A ``.npz`` file with x_train, y_train, x_test, y_test, or with x, y, of which one fifth becomes the test set.

    x is (samples, ...) of any real type, flattened to (samples, features); y is (samples,) of an integer type, class
    indices from 0. Pickled objects are never loaded.

    Raises:
        ValueError: the file cannot be read, a key is missing, or an array has the wrong shape, type or values.
    """
    arrays = _read_npz(path)
    if all(key in arrays for key in SPLIT_KEYS):
        x_train, y_train, x_test, y_test = (arrays[key] for key in SPLIT_KEYS)
        _check_pair(path, "x_train", x_train, "y_train", y_train)
        _check_pair(path, "x_test", x_test, "y_test", y_test, classes=int(y_train.max()) + 1)
        if x_train.shape[1:] != x_test.shape[1:]:
            raise ValueError(
                f"{path}: a sample has shape {x_train.shape[1:]} in x_train and {x_test.shape[1:]} in x_test; "
                "give both the same"
            )
    elif all(key in arrays for key in WHOLE_KEYS):
        _check_pair(path, "x", arrays["x"], "y", arrays["y"])
        if len(arrays["x"]) < 2:
            raise ValueError(f"{path}: x has one sample, expected at least 2 to split into a training and a test set")
        x_train, y_train, x_test, y_test = _split(arrays["x"], arrays["y"], seed)
    else:
        raise ValueError(
            f"{path}: has the arrays {', '.join(sorted(arrays)) or '(none)'}, expected {', '.join(SPLIT_KEYS)}, "
            f"or {' and '.join(WHOLE_KEYS)}"
        )
    return _dataset(Path(path).name, x_train, y_train, x_test, y_test)


def _read_npz(path) -> dict[str, np.ndarray]:
    # A damaged archive shows up as any of these, depending on which byte is wrong.
    unreadable = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it holds one bare array; write it with numpy.savez(path, x=..., y=...)")
        with archive:
            return {key: archive[key] for key in archive.files if key in SPLIT_KEYS + WHOLE_KEYS}
    except unreadable as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as an .npz file: {reason}") from error


def _check_pair(path, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray, classes: int | None = None) -> None:
    """ValueError unless x and y are samples and their labels; ``classes``: of the training set, where that is known."""
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {x_name} is {x.dtype}, expected real numbers")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{path}: {x_name} has shape {x.shape}, expected (samples, features), none of them 0")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: {x_name} contains NaN or inf; remove or fill these samples first")
    if y.dtype.kind not in "iu":
        raise ValueError(f"{path}: {y_name} is {y.dtype}, expected integers: class indices from 0")
    if y.shape != (len(x),):
        raise ValueError(
            f"{path}: {y_name} has shape {y.shape}, expected ({len(x)},), one label per sample of {x_name}"
        )
    if classes is not None:
        # A network is made for the classes that it is trained on.
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(
                f"{path}: {y_name} runs from {y.min()} to {y.max()}, expected classes of the training set, which has 0 "
                f"to {classes - 1}"
            )
    # More classes than samples is a column of identifiers, and would ask for an output layer of that size.
    elif y.min() < 0 or y.max() >= len(x):
        raise ValueError(
            f"{path}: {y_name} runs from {y.min()} to {y.max()}, expected class indices from 0 and fewer classes than "
            f"the {len(x)} samples"
        )


def _split(x: np.ndarray, y: np.ndarray, seed: int):
    """A share of every class goes to the test set, drawn by ``seed``; a class of one sample is for training."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(x), dtype=bool)
    for label in np.unique(y):
        members = generator.permutation(np.flatnonzero(y == label))
        held_out[members[: round(TEST_SHARE * len(members))]] = True
    if not held_out.any():
        held_out[generator.integers(len(x))] = True
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def _dataset(name: str, x_train, y_train, x_test, y_test) -> Dataset:
    x_train, x_test = (x.reshape(len(x), -1).astype(np.float64) for x in (x_train, x_test))
    mean, std = x_train.mean(0), x_train.std(0)
    # A pixel that never changes has nothing to say. Its computed deviation is 0, or the rounding of its mean: dividing
    # by either would make NaN or noise of it.
    constant = (x_train.max(0) == x_train.min(0)) | (std <= len(x_train) * np.finfo(np.float64).eps * np.abs(mean))
    std[constant] = 1.0
    x_train, x_test = (torch.from_numpy(((x - mean) / std).astype(np.float32)) for x in (x_train, x_test))
    classes = int(y_train.max()) + 1
    y_train, y_test = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
    return Dataset(name, x_train, y_train, x_test, y_test, classes)
