"""Users' old files still load: the modules, optimizers and results that an earlier version pickled.

tests/pickles/make.py wrote them once. A pickle names each class by the module that defines it, so these tests fail if a
class moves and its old module no longer exports it.
"""

import importlib
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from pickles import make
from support.numerics import assert_as_exact_as_eager

import lcw_ops
from lcw_ops.nn._derived import DerivedWeight

RESULTS = torch.load(make.RESULTS, weights_only=True)
MODULES = sorted(path.stem for path in make.HERE.glob("*.pt") if path != make.RESULTS)
OPTIMIZERS = sorted(name for name, result in RESULTS.items() if "parameters" in result)

# The most roundings in a forward pass: sums of at most 50 terms in each of at most 9 layers.
ROUNDINGS = 50 * 9


def references(path: Path) -> set[tuple[str, str]]:
    """The (module, name) of everything that the file takes from lcw_ops."""
    found = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if module.split(".")[0] == "lcw_ops":
                found.add((module, name))
            return super().find_class(module, name)

    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            Unpickler(file).load()
    else:
        as_module = type("pickle", (), {"Unpickler": Unpickler, "load": pickle.load, "__name__": "pickle"})
        torch.load(path, pickle_module=as_module, weights_only=False)
    return found


def load(name: str) -> object:
    path = make.HERE / f"{name}.pkl"
    if path.exists():
        return pickle.loads(path.read_bytes())
    return torch.load(make.HERE / f"{name}.pt", weights_only=False)


def test_every_public_class_has_a_file():
    classes = {name for name in lcw_ops.nn.__all__ + lcw_ops.optim.__all__ if isinstance(_public(name), type)}
    assert classes <= {name.partition("-")[0] for name in MODULES + OPTIMIZERS}


def _public(name: str) -> object:
    return getattr(lcw_ops.nn, name, None) or getattr(lcw_ops.optim, name)


@pytest.mark.parametrize(
    "path", sorted([*make.HERE.glob("*.pt"), *make.HERE.glob("*.pkl")]), ids=lambda path: path.name
)
def test_names_in_the_file_lead_to_the_class_of_today(path):
    for module, name in references(path):
        found = getattr(importlib.import_module(module), name)
        # The class must not be a copy, which isinstance would not recognise.
        assert found is getattr(importlib.import_module(found.__module__), found.__name__), f"{module}.{name}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(("GraphModule", "Sequential"))])
def test_file_loads_with_an_allow_list_of_its_class(name):
    """torch compares the Python module and the name of each allowed class with those in the file."""
    own = getattr(lcw_ops.nn, name.partition("-")[0])
    # A file may also name these classes. Those that torch does not allow by itself, a user has to allow as well.
    others = [set, torch.nn.Identity, torch.nn.Linear, torch.nn.Tanh, DerivedWeight]
    with torch.serialization.safe_globals([own, *others]):
        module = torch.load(make.HERE / f"{name}.pt", weights_only=True)
    assert type(module) is own


@pytest.mark.parametrize("name", MODULES)
def test_module_gives_the_stored_result(name):
    result, module = RESULTS[name], load(name)
    assert_as_exact_as_eager(name, make.apply(load(name), result["x"]), result["eager"], result["exact"])
    # In float64 the result may differ from the stored numbers only by the roundings of a forward pass.
    exact = make.apply(module.double(), result["x"].double())
    allowed = ROUNDINGS * torch.finfo(torch.float64).eps * result["exact"].abs().max()
    assert (exact - result["exact"]).abs().max() <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_module_can_be_saved_again(name, tmp_path):
    result, module = RESULTS[name], load(name)
    torch.save(module, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    # Every torch.fx.GraphModule has its own class.
    assert type(again) is type(module) or isinstance(module, torch.fx.GraphModule)
    assert torch.equal(make.apply(again, result["x"]), make.apply(load(name), result["x"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_continues_from_its_state(name):
    parameters = make.next_step(load(name))
    for parameter, expected in zip(parameters, RESULTS[name]["parameters"], strict=True):
        # A step has about 12 roundings, all of numbers no larger than an entry of the parameter. The entries of a
        # parameter are of similar size, so the largest one stands for all.
        allowed = 12 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (parameter - expected).abs().max() <= allowed


def test_optimizer_and_handle_come_back_together():
    optimizer, handle = load("ActivatedGradients")
    assert handle.optimizer() is optimizer
    before = [parameter.detach().clone() for parameter in make.parameters_of(optimizer)]
    handle.remove()
    make.give_gradients(optimizer)
    gradients = [parameter.grad.clone() for parameter in make.parameters_of(optimizer)]
    optimizer.step()
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in make.parameters_of(optimizer))))
    assert not any(map(torch.equal, before, make.parameters_of(optimizer)))


def test_handle_of_hooks_can_be_removed():
    load("GradientHooks").remove()


def test_profile_has_its_numbers():
    profile, result = load("Profile"), RESULTS["Profile"]
    assert isinstance(profile, lcw_ops.profile.Profile)
    assert profile.loss == result["loss"]
    # Newer versions tell more.
    assert set(result["summary"]) <= set(profile.summary())
    columns = {name: column.tolist() for name, column in profile.columns.items()}
    # Compare as text, in which NaN equals NaN.
    assert str(columns) == str(result["columns"])
    assert str(len(profile)) in profile.table()


def test_error_and_settings_have_their_attributes():
    assert str(load("BackendError")) == "no such backend"
    assert (load("TrainSettings").depth, load("TrainSettings").schedule) == (7, "constant")
    assert (load("ProfileSettings").solver, load("ProfileSettings").window) == ("parallel", 9)
    load("TrainSettings").check()
    load("ProfileSettings").check()
    dataset = load("Dataset")
    assert torch.equal(dataset.x_train, make.numbers(4, 2))
    assert (dataset.features, dataset.classes) == (2, 2)


def test_network_of_the_train_command_gives_the_stored_result():
    expected = RESULTS["FeatureRNN"]["output"]
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (load("FeatureRNN")(make.numbers(3, 5)) - expected).abs().max() <= allowed


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < RESULTS["versions"]["torch"].partition("+")[0],
    reason="torch loads no programs of later versions",
)
def test_exported_program_gives_the_stored_result():
    result = RESULTS["exported"]
    program = torch.export.load(make.HERE / "exported.pt2")
    called = {str(node.target) for node in program.graph.nodes if "lcw_ops" in str(node.target)}
    assert called == {
        "lcw_ops.gmp_linear.cpp",
        "lcw_ops.lcw_linear.cpp",
        "lcw_ops.orthogonal_filter.cpp",
        "lcw_ops.weight_norm_linear.cpp",
    }
    with torch.no_grad():
        output = program.module()(result["x"])
    assert_as_exact_as_eager("exported", output, result["eager"], result["exact"])


def test_train_continues_from_the_checkpoint(tmp_path):
    shutil.copytree(make.HERE / "train", tmp_path / "train")
    assert make.train(tmp_path / "train", tmp_path / "train" / "data.npz", make.TRAIN_STEPS[1], "--resume") == 0
    losses = make.losses_of(tmp_path / "train")
    # Losses are about 1. The first new one depends on the restored weights, the second one on Adam's moments too. A
    # rounding changes a step of Adam most where the gradient is small, but there the step matters least to the loss.
    # A tolerance of a hundred roundings is therefore plenty.
    expected = pytest.approx(RESULTS["train"]["losses"], rel=0, abs=100 * torch.finfo(torch.float32).eps)
    assert losses == expected


def test_model_of_the_train_command_loads():
    state = torch.load(make.HERE / "train" / "out" / "model.pt", weights_only=True)
    depth, width, _ = state["weight"].shape
    network = lcw_ops.nn.OrthogonalFilterMLP(5, width, depth, 3, "permutation")
    assert not any(network.load_state_dict(state))
