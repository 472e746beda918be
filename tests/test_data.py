"""The digits and .npz files: split, standardised, reproducible; and every way in which a file can be wrong."""

import builtins

import numpy as np
import pytest
import torch

from lcw_ops import data


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {"x": generator.normal(size=(50, 2, 3)), "y": np.arange(50) % 5}


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_digits_are_standardised_split_and_stratified():
    digits = data.load("digits")
    assert (digits.features, digits.classes) == (64, 10)
    assert len(digits.x_train) + len(digits.x_test) == 1797
    assert (digits.x_train.dtype, digits.y_train.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(digits.x_train.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    std = digits.x_train.std(0, correction=0)
    torch.testing.assert_close(std[std > 0], torch.ones(int((std > 0).sum())), atol=1e-4, rtol=0)
    shares = torch.bincount(digits.y_test) / (torch.bincount(digits.y_train) + torch.bincount(digits.y_test))
    assert ((shares - data.TEST_SHARE).abs() < 0.01).all()


def test_the_seed_decides_the_split():
    first, again, other = data.load("digits", 1), data.load("digits", 1), data.load("digits", 2)
    assert torch.equal(first.x_test, again.x_test)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.x_test, other.x_test)


def test_no_sample_is_in_both_parts(tmp_path):
    path = save(tmp_path / "a.npz", x=np.arange(40.0).reshape(40, 1), y=np.arange(40) % 2)
    loaded = data.load_npz(path)
    values = torch.cat([loaded.x_train, loaded.x_test]).flatten()
    assert len(values.unique()) == 40


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    def no_sklearn(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(ImportError, match=r"pip install lcw-ops\[profile\]"):
        data.load_digits()


def test_npz_whole_and_split(tmp_path, arrays):
    whole = data.load(str(save(tmp_path / "whole.npz", **arrays)))
    assert (whole.features, whole.classes, len(whole.x_test)) == (6, 5, 10)
    halves = {"x_train": arrays["x"][:30], "y_train": arrays["y"][:30], "x_test": arrays["x"][30:]}
    split = data.load_npz(save(tmp_path / "split.npz", **halves, y_test=arrays["y"][30:]))
    assert (len(split.x_train), len(split.x_test)) == (30, 20)
    assert torch.equal(split.y_test, torch.arange(30, 50) % 5)


def test_images_of_integers_with_a_constant_pixel(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 4), dtype=np.uint8)
    x[:, 0] = 7
    loaded = data.load_npz(save(tmp_path / "a.npz", x=x, y=np.arange(20, dtype=np.uint8) % 2))
    assert loaded.x_train.isfinite().all()
    assert not loaded.x_train[:, 0].any()


def test_constant_features_of_any_size_say_nothing(tmp_path):
    """The mean of 0.1 over 1000 samples is not 0.1: their deviation is 1e-17, and dividing by it would make noise."""
    x = np.random.default_rng(0).normal(size=(1000, 6))
    x[:, :5] = 0.1, 1e6 + 0.1, -1e-30, 1 / 3, 0.0
    keys = {"x_train": x, "y_train": np.arange(1000) % 2, "y_test": np.arange(1000) % 2}
    loaded = data.load_npz(save(tmp_path / "a.npz", **keys, x_test=x * (1 + 1e-9)))
    for part in (loaded.x_train, loaded.x_test):
        assert (part[:, :5].abs() < 2e-3).all()
        assert part[:, 5].std() == pytest.approx(1, abs=0.01)


def test_a_small_test_set_is_right(tmp_path, arrays):
    """Its labels are classes of the training set, and not fewer than its own samples."""
    parts = {"x_train": arrays["x"], "y_train": arrays["y"], "x_test": arrays["x"][3:5], "y_test": arrays["y"][3:5]}
    loaded = data.load_npz(save(tmp_path / "a.npz", **parts))
    assert loaded.y_test.tolist() == [3, 4]
    assert loaded.classes == 5
    parts["y_test"] = np.array([3, 5])
    with pytest.raises(ValueError, match=r"y_test runs from 3 to 5, expected classes of the training set.* 0 to 4"):
        data.load_npz(save(tmp_path / "b.npz", **parts))


WRONG = {
    "missing key": (lambda a: {"x": a["x"]}, "expected x_train"),
    "text": (lambda a: {**a, "x": np.full((50, 2), "a")}, "expected real numbers"),
    "complex": (lambda a: {**a, "x": a["x"] * 1j}, "expected real numbers"),
    "vector": (lambda a: {**a, "x": a["x"][:, 0, 0]}, "expected \\(samples, features\\)"),
    "empty": (lambda a: {"x": a["x"][:0], "y": a["y"][:0]}, "none of them 0"),
    "NaN": (lambda a: {**a, "x": np.where(a["x"] > 2, np.nan, a["x"]) * np.nan}, "NaN or inf"),
    "real labels": (lambda a: {**a, "y": a["y"] + 0.5}, "expected integers"),
    "label shape": (lambda a: {**a, "y": a["y"][:, None]}, "one label per sample"),
    "too few labels": (lambda a: {**a, "y": a["y"][:49]}, "one label per sample"),
    "negative label": (lambda a: {**a, "y": a["y"] - 1}, "from -1"),
    "identifiers": (lambda a: {**a, "y": a["y"] + 10**9}, "fewer classes"),
    "one sample": (lambda a: {"x": a["x"][:1], "y": a["y"][:1]}, "at least 2"),
    "pickled": (lambda a: {**a, "x": np.array([[object()]])}, "cannot be read"),
    "test shape": (
        lambda a: {"x_train": a["x"], "y_train": a["y"], "x_test": a["x"][:, :1], "y_test": a["y"]},
        "give both the same",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_named(case, tmp_path, arrays):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        data.load_npz(save(tmp_path / "wrong.npz", **change(arrays)))


def test_unreadable_files(tmp_path, arrays):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "bare.npy", arrays["x"])
    whole = save(tmp_path / "whole.npz", **arrays).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[200:260] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for name in ("text.npz", "empty.npz", "bare.npy", "cut.npz", "damaged.npz", "absent.npz", "."):
        with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
            data.load_npz(tmp_path / name)
