"""Small real data for the commands that train: scikit-learn's bundled digits, a user's ``.npz``, or images.

Nothing is downloaded. The inputs x are standardised with the training set's mean and standard deviation. The split into
training and test set is stratified by class and seeded: the same seed gives the same arrays on every machine.
"""

import stat
from pathlib import Path

import numpy as np
import torch

from lcw_ops._checks import describe
from lcw_ops.jobs import images
from lcw_ops.jobs.dataset import TEST_SHARE, Dataset, split  # noqa: F401 - TEST_SHARE is part of this module

SPLIT_KEYS = ("x_train", "y_train", "x_test", "y_test")
WHOLE_KEYS = ("x", "y")

# The largest magnitude that x may have. In float64, sums of squares of such values are far from overflow.
LARGEST_VALUE = float(np.finfo(np.float32).max)


def load(source: str, seed: int = 0) -> Dataset:
    """The data set of that name, "digits" or "mnist5k", or the one in a folder or ``.npz`` file of that path.

    See :func:`load_digits`, :func:`load_npz`, and :mod:`lcw_ops.jobs.images` for the other two.
    """
    if source == "digits":
        return load_digits(seed)
    if source == "mnist5k":
        return images.load_mnist5k(seed)
    return images.load_folder(source) if Path(source).is_dir() else load_npz(source, seed)


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
    return _dataset("digits", *split(digits.data, digits.target, seed))


def load_npz(path: str | Path, seed: int = 0) -> Dataset:
    """A ``.npz`` file with x_train, y_train, x_test, y_test, or with x, y, of which one fifth becomes the test set.

    x is (samples, ...), of any real type, with values in the range of float32; it is flattened to (samples, features).
    y is (samples,), of an integer type: class indices from 0, with at least two classes. Pickled objects are never
    loaded.

    Raises:
        ValueError: the file cannot be read, a key is missing, or an array has the wrong shape, type or values.
    """
    arrays = _read_npz(path)
    if "x_train" in arrays:
        x_train, y_train, x_test, y_test = (arrays[key] for key in SPLIT_KEYS)
        _check_pair(path, "x_train", x_train, "y_train", y_train)
        _check_pair(path, "x_test", x_test, "y_test", y_test, classes=int(y_train.max()) + 1)
        if x_train.shape[1:] != x_test.shape[1:]:
            came = f"has samples of shape {x_test.shape[1:]}"
            raise ValueError(describe(path, "x_test", came, f"{x_train.shape[1:]}, as in x_train"))
    else:
        _check_pair(path, "x", arrays["x"], "y", arrays["y"])
        if len(np.unique(arrays["y"])) == len(arrays["y"]):
            expected = "one for training and one for testing"
            raise ValueError(describe(path, "y", "has no class of two samples", expected, "Add samples."))
        x_train, y_train, x_test, y_test = split(arrays["x"], arrays["y"], seed)
    dataset = _dataset(Path(path).name, x_train, y_train, x_test, y_test)
    if not dataset.x_train.any():
        came = "is the same in all training samples"
        raise ValueError(describe(path, "every feature", came, "one that tells them apart"))
    if not dataset.x_test.isfinite().all():
        came = "exceeds the range of float32 when standardised with the mean and deviation of the training samples"
        remedy = "Remove outliers, or split the samples at random."
        raise ValueError(describe(path, "a feature of the test samples", came, "a number nearer to them", remedy))
    return dataset


def _read_npz(path) -> dict[str, np.ndarray]:
    """The arrays of ``SPLIT_KEYS``, or else of ``WHOLE_KEYS``; ValueError if neither can be read."""
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is not a file")
        # numpy would leave the file of a damaged archive open.
        with open(path, "rb") as file:
            start = file.read(6)
            if start == b"\x93NUMPY":
                raise ValueError("it holds one bare array")
            if not start.startswith(b"PK"):
                raise ValueError("it is not a zip archive" if start else "it is empty")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                keys = next((keys for keys in (SPLIT_KEYS, WHOLE_KEYS) if set(keys) <= set(archive.files)), None)
                if keys is not None:
                    return {key: _read_array(archive, key) for key in keys}
                found = ", ".join(archive.files) or "(none)"
    # A damaged archive raises almost anything, depending on which byte is wrong.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        came = f"cannot be read as an .npz file ({reason.splitlines()[0]})"
        expected = "one that numpy.savez(path, x=..., y=...) wrote"
        raise ValueError(describe(path, "the file", came, expected)) from error
    expected = f"{', '.join(SPLIT_KEYS)}, or {' and '.join(WHOLE_KEYS)}"
    raise ValueError(describe(path, "the file", f"has the arrays {found}", expected, "Name them so."))


def _read_array(archive, key: str) -> np.ndarray:
    # numpy's own message for Python objects advises an option that is unsafe for files from other people.
    unreadable = f"{key} is damaged or holds Python objects, which are never loaded"
    try:
        array = archive[key]
    except ValueError as error:
        raise ValueError(unreadable) from error
    # numpy returns bytes for an entry that does not begin with an array's header.
    if not isinstance(array, np.ndarray):
        raise ValueError(unreadable)
    return array


def _check_pair(path, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray, classes: int | None = None) -> None:
    """Raise ValueError unless x and y are samples and labels. ``classes``: the training set's number of classes."""
    if x.dtype.kind not in "fiu":
        remedy = "Convert it, to float32 for example."
        raise ValueError(describe(path, x_name, f"is {x.dtype}", "real numbers", remedy))
    if x.ndim < 2 or x.size == 0:
        expected = "(samples, features), none of them 0"
        raise ValueError(describe(path, x_name, f"has shape {x.shape}", expected, "Reshape or refill it."))
    unusable = len(x) - int(np.isfinite(x).reshape(len(x), -1).all(1).sum())
    if unusable:
        came = f"has NaN or inf in {unusable} of {len(x)} samples"
        raise ValueError(describe(path, x_name, came, "finite numbers", "Remove or fill these samples first."))
    # The maximum of abs would be wrong: the abs of the least int64 is negative.
    largest = max(float(x.max()), -float(x.min()))
    if largest > LARGEST_VALUE:
        came, expected = f"has a value of size {largest:.3g}", f"at most {LARGEST_VALUE:.3g}, float32's largest"
        raise ValueError(describe(path, x_name, came, expected, "Scale the feature, or remove the sample."))
    if y.dtype.kind not in "iu":
        remedy = "Convert it, to int64 for example."
        raise ValueError(describe(path, y_name, f"is {y.dtype}", "integers, class indices from 0", remedy))
    if y.shape != (len(x),):
        expected = f"({len(x)},), one label per sample of {x_name}"
        raise ValueError(describe(path, y_name, f"has shape {y.shape}", expected, "Reshape it."))
    if classes is not None:
        # The network has outputs only for the classes that it is trained on.
        if y.min() < 0 or y.max() >= classes:
            expected = f"classes of the training set, which has 0 to {classes - 1}"
            came = f"runs from {y.min()} to {y.max()}"
            raise ValueError(describe(path, y_name, came, expected, "Remove the other samples."))
    # With more classes than samples, y is a column of identifiers, and would need an output layer of that size.
    elif y.min() < 0 or y.max() >= len(x):
        came = f"runs from {y.min()} to {y.max()}"
        expected = f"class indices from 0 and fewer classes than the {len(x)} samples"
        remedy = "Number the classes, as numpy.unique(y, return_inverse=True) does."
        raise ValueError(describe(path, y_name, came, expected, remedy))
    elif y.min() == y.max():
        came, remedy = f"has the class {y.min()} alone", "Add samples of another one."
        raise ValueError(describe(path, y_name, came, "at least 2 classes", remedy))


def _dataset(name: str, x_train, y_train, x_test, y_test) -> Dataset:
    x_train, x_test = (x.reshape(len(x), -1).astype(np.float64) for x in (x_train, x_test))
    # A value too large for float32 becomes inf, which load_npz refuses.
    with np.errstate(over="ignore"):
        # Scale every feature first, because the squares of deviations of 1e-200 would vanish. A power of two as the
        # factor causes no rounding.
        _, exponents = np.frexp(np.abs(x_train).max(0))
        x_train, x_test = np.ldexp(x_train, -exponents), np.ldexp(x_test, -exponents)
        mean, std = x_train.mean(0), x_train.std(0)
        # A feature that never changes carries no information. Its computed deviation is 0, or the rounding of its mean.
        # A division by this deviation would give NaN or noise.
        constant = (x_train.max(0) == x_train.min(0)) | (std <= len(x_train) * np.finfo(np.float64).eps * np.abs(mean))
        mean[constant], std[constant] = x_train[0, constant], 1.0
        x_train, x_test = (torch.from_numpy(((x - mean) / std).astype(np.float32)) for x in (x_train, x_test))
    classes = int(y_train.max()) + 1
    y_train, y_test = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
    return Dataset(name, x_train, y_train, x_test, y_test, classes)
