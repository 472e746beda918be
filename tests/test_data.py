"""The digits and .npz files: split, standardised, reproducible; and every way in which a file can be wrong."""

import builtins
import os
import zipfile

import numpy as np
import pytest
import torch

from lcw_ops import cli
from lcw_ops.jobs import data

# A warning of numpy would be one line more than a command may print.
pytestmark = pytest.mark.filterwarnings("error")


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
    for default in (data.load("digits"), data.load_digits()):
        assert torch.equal(default.x_test, data.load("digits", 0).x_test)


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


def test_constant_features_of_any_size_are_almost_zero(tmp_path):
    """The rounded mean of 1000 times 0.1 is not 0.1. The deviation is 1e-17, and dividing by it would make noise."""
    x = np.random.default_rng(0).normal(size=(1000, 6))
    x[:, :5] = 0.1, 1e6 + 0.1, -1e-30, 1 / 3, 0.0
    keys = {"x_train": x, "y_train": np.arange(1000) % 2, "y_test": np.arange(1000) % 2}
    loaded = data.load_npz(save(tmp_path / "a.npz", **keys, x_test=x * (1 + 1e-9)))
    for part in (loaded.x_train, loaded.x_test):
        assert (part[:, :5].abs() < 2e-3).all()
        assert part[:, 5].std() == pytest.approx(1, abs=0.01)


def test_a_small_test_set_is_accepted(tmp_path, arrays):
    """Test labels are classes of the training set. They may exceed the number of test samples."""
    parts = {"x_train": arrays["x"], "y_train": arrays["y"], "x_test": arrays["x"][3:5], "y_test": arrays["y"][3:5]}
    loaded = data.load_npz(save(tmp_path / "a.npz", **parts))
    assert loaded.y_test.tolist() == [3, 4]
    assert loaded.classes == 5
    parts["y_test"] = np.array([3, 5])
    with pytest.raises(ValueError, match=r"y_test runs from 3 to 5; expected classes of the training set.* 0 to 4"):
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
    "bool": (lambda a: {**a, "x": a["x"] > 0}, "x is bool; expected real numbers"),
    "date": (lambda a: {**a, "x": a["x"].astype("datetime64[s]")}, "expected real numbers"),
    "scalar": (lambda a: {**a, "x": np.float64(1)}, "expected \\(samples, features\\)"),
    "no features": (lambda a: {**a, "x": a["x"][:, :0]}, "none of them 0"),
    "inf": (lambda a: {**a, "x": np.where(a["x"] == a["x"].max(), np.inf, a["x"])}, "NaN or inf in 1 of 50 samples"),
    "1e300": (lambda a: {**a, "x": a["x"] * 1e300}, r"a value of size \d.*e\+300; expected at most 3.4e\+38"),
    "-1e300": (lambda a: {**a, "x": -1e300 * (a["x"] == a["x"].max())}, r"a value of size 1e\+300"),
    "1e300 in a constant": (lambda a: {**a, "x": np.full((50, 2), 1e300)}, r"a value of size 1e\+300"),
    "beyond float64": (
        lambda a: {**a, "x": np.full((50, 2), np.longdouble("1e400"))},
        "NaN or inf|a value of size inf",
    ),
    "nothing varies": (lambda a: {**a, "x": np.full((50, 2), 7)}, "every feature is the same in all training samples"),
    "bool labels": (lambda a: {**a, "y": a["y"] > 2}, "y is bool; expected integers"),
    "text labels": (lambda a: {**a, "y": a["y"].astype(str)}, "expected integers"),
    "labels as floats": (lambda a: {**a, "y": a["y"].astype(np.float64)}, "y is float64; expected integers"),
    "huge labels": (lambda a: {**a, "y": a["y"].astype(np.uint64) + np.uint64(2**63)}, "from 9223372036854775808"),
    "one class": (lambda a: {**a, "y": a["y"] * 0 + 3}, "y has the class 3 alone; expected at least 2 classes"),
    "one sample": (lambda a: {"x": a["x"][:1], "y": a["y"][:1]}, "at least 2"),
    "a class each": (
        lambda a: {"x": a["x"], "y": np.arange(50)},
        "y has no class of two samples; expected one for training",
    ),
    "pickled": (lambda a: {**a, "x": np.array([[object()]])}, "x is damaged or holds Python objects"),
    "huge integers": (lambda a: {**a, "x": np.array([[2**70]] * 50)}, "x is damaged or holds Python objects"),
    "other names": (lambda a: {"data": a["x"], "labels": a["y"]}, "has the arrays data, labels; expected x_train"),
    "far test samples": (
        lambda a: {"x_train": 1e-9 * a["x"], "y_train": a["y"], "x_test": 1e38 * a["x"], "y_test": a["y"]},
        "a feature of the test samples exceeds the range of float32 when standardised",
    ),
    "test NaN": (
        lambda a: {"x_train": a["x"], "y_train": a["y"], "x_test": a["x"] * np.nan, "y_test": a["y"]},
        "x_test has NaN",
    ),
    "test 1e300": (
        lambda a: {"x_train": a["x"], "y_train": a["y"], "x_test": a["x"] * 1e300, "y_test": a["y"]},
        "x_test has a value of size",
    ),
    "test shape": (
        lambda a: {"x_train": a["x"], "y_train": a["y"], "x_test": a["x"][:, :1], "y_test": a["y"]},
        r"x_test has samples of shape \(1, 3\); expected \(2, 3\), as in x_train",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_named(case, tmp_path, arrays):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        data.load_npz(save(tmp_path / "wrong.npz", **change(arrays)))


def saved_text(path, arrays):
    path.write_text("x,y\n1,2\n")


def saved_pickle(path, arrays):
    np.array([{"x": arrays["x"]}], dtype=object).dump(path)


def saved_empty(path, arrays):
    path.touch()


def saved_bare(path, arrays):
    with open(path, "wb") as file:
        np.save(file, arrays["x"])


def saved_half(path, arrays):
    whole = save(path, **arrays).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def saved_damaged(path, arrays):
    damaged = bytearray(save(path, **arrays).read_bytes())
    damaged[200:260] = bytes(60)
    path.write_bytes(damaged)


def saved_other_zip(path, arrays):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", "no array")
        archive.writestr("y.npy", "no array")


def saved_too_large(path, arrays):
    """A header that announces more data than any memory holds."""
    with zipfile.ZipFile(path, "w") as archive:
        for key in data.WHOLE_KEYS:
            with archive.open(f"{key}.npy", "w") as file:
                header = {"descr": "<f8", "fortran_order": False, "shape": (2**50, 2)}
                np.lib.format.write_array_header_1_0(file, header)


def saved_folder(path, arrays):
    path.mkdir()


def saved_pipe(path, arrays):
    os.mkfifo(path)


def saved_nothing(path, arrays):
    pass


UNREADABLE = {
    saved_text: "it is not a zip archive",
    saved_pickle: "it is not a zip archive",
    saved_empty: "it is empty",
    saved_bare: "it holds one bare array",
    saved_half: "File is not a zip file",
    saved_damaged: "",
    saved_other_zip: "x is damaged or holds Python objects",
    saved_too_large: "",
    saved_folder: "it is not a file",
    saved_pipe: "it is not a file",
    saved_nothing: "No such file or directory",
}


@pytest.mark.parametrize("save_as", UNREADABLE)
def test_unreadable_files(save_as, tmp_path, arrays):
    path = tmp_path / "wrong.npz"
    save_as(path, arrays)
    with pytest.raises(ValueError, match=r"the file cannot be read as an \.npz file \(") as raised:
        data.load_npz(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert UNREADABLE[save_as] in message
    assert message.endswith("; expected one that numpy.savez(path, x=..., y=...) wrote.")
    assert "pickle" not in message


@pytest.mark.parametrize("command", ["profile", "train"])
@pytest.mark.parametrize("case", [*WRONG, *UNREADABLE], ids=lambda case: getattr(case, "__name__", case))
def test_the_commands_report_a_bad_file_in_one_line(command, case, tmp_path, arrays, capsys):
    path, out = tmp_path / "wrong.npz", tmp_path / "out"
    if case in WRONG:
        save(path, **WRONG[case][0](arrays))
    else:
        case(path, arrays)
    assert cli.main([command, "--data", str(path), "--batch", "8", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"lcw-ops {command}: {path}: ")
    assert "allow_pickle" not in line
    assert not out.exists()


@pytest.mark.parametrize("scale", [1e-307, 1e-200, 1e-20, 1.0, 1e20, 1e37])
def test_a_spread_of_any_size_is_standardised(scale, tmp_path, arrays):
    """The square of 1e-200 is 0 in float64. Such a feature must not be taken for a constant."""
    reference, scaled = (
        data.load_npz(save(tmp_path / f"{name}.npz", x=arrays["x"] * factor, y=arrays["y"]))
        for name, factor in (("reference", 1.0), ("scaled", scale))
    )
    assert reference.x_train.std() == pytest.approx(1, abs=0.01)
    # The scaling rounds every value once more, by half an ulp of float64. Then both are rounded to float32.
    allowed = 2 * torch.finfo(torch.float32).eps * reference.x_train.abs().max()
    torch.testing.assert_close(scaled.x_train, reference.x_train, rtol=0, atol=allowed.item())
    torch.testing.assert_close(scaled.x_test, reference.x_test, rtol=0, atol=allowed.item())


def test_large_constants_are_zero(tmp_path, arrays):
    """The mean of such constants is rounded by 1e14 and more."""
    x = arrays["x"].reshape(50, 6).copy()
    x[:, :3] = 1e30 + 1e20, -3e38, 0.1
    loaded = data.load_npz(save(tmp_path / "a.npz", x=x, y=arrays["y"]))
    assert not loaded.x_train[:, :3].any()
    assert not loaded.x_test[:, :3].any()
    assert loaded.x_train[:, 3:].std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "f2", np.longdouble, ">i8", "u8", "i1"])
def test_every_type_of_real_numbers(dtype, tmp_path, arrays):
    x = (10 * np.abs(arrays["x"])).round().astype(dtype)
    loaded = data.load_npz(save(tmp_path / "a.npz", x=x, y=arrays["y"].astype(">u2")))
    expected = data.load_npz(save(tmp_path / "b.npz", x=x.astype(np.float64), y=arrays["y"]))
    assert torch.equal(loaded.x_train, expected.x_train)
    assert torch.equal(loaded.y_test, expected.y_test)


def test_the_least_integer_is_within_range(tmp_path, arrays):
    """The absolute value of the least integer is negative in int64."""
    x = np.full((50, 1), np.iinfo(np.int64).min)
    x[::2] = 5
    loaded = data.load_npz(save(tmp_path / "a.npz", x=x, y=arrays["y"]))
    assert loaded.x_train.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_float32_is_within_range(sign, tmp_path, arrays):
    x = arrays["x"].reshape(50, 6).copy()
    x[0, 0] = sign * float(np.finfo(np.float32).max)
    parts = {"x_train": x, "y_train": arrays["y"], "x_test": arrays["x"].reshape(50, 6), "y_test": arrays["y"]}
    loaded = data.load_npz(save(tmp_path / "a.npz", **parts))
    assert loaded.x_train.std(0, correction=0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 1], [2, 0, 1, 0, 2], [0, 0]])
def test_a_few_samples_leave_every_class_in_the_training_set(labels, tmp_path):
    for seed in range(8):
        x = np.random.default_rng(0).normal(size=(len(labels), 2))
        if len(set(labels)) == 1:
            with pytest.raises(ValueError, match="alone"):
                data.load_npz(save(tmp_path / "a.npz", x=x, y=np.array(labels)), seed)
            continue
        loaded = data.load_npz(save(tmp_path / "a.npz", x=x, y=np.array(labels)), seed)
        assert len(loaded.y_test) == 1
        assert set(loaded.y_train.tolist()) == set(labels)
