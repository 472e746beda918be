"""Imports: the bare package brings no torch, and its ops are registered as soon as both are imported."""

import ast
import copy
import importlib
import inspect
import io
import json
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from support.old_names import MOVED, OLD_PACKAGES

import lcw_ops
from lcw_ops import _names
from lcw_ops._after_import import _finder, after_import

ROOT = Path(__file__).parent.parent
PUBLIC = sorted(lcw_ops.__all__)


def run(code, *options):
    """Run code in a fresh interpreter, where our warnings are errors. The code's last line of output is JSON."""
    command = [sys.executable, "-W", "error::RuntimeWarning", *options, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Inside an import, such a warning becomes a line on stderr instead of an error.
    assert "lcw_ops: not ready" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_import_brings_no_module_that_torch_does_not():
    """No Triton, compiler, plotting or machine-learning library, and no part of torch that torch itself leaves out."""
    extra, initialized = run(
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import lcw_ops\n"
        "from lcw_ops import functional, init, nn, optim, reference\n"
        "nn.utils.parametrizations.zero_sum, nn.utils.parametrizations.hypersphere\n"
        "lcw_ops.activate_gradients, lcw_ops.register_gradient_hook, lcw_ops.use_backend, lcw_ops.BackendError\n"
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    assert [name for name in extra if not name.startswith("lcw_ops")] == []
    assert not any(name.startswith(("lcw_ops.profile", "lcw_ops.distributed", "lcw_ops.jobs")) for name in extra)
    assert not initialized


def test_the_bare_package_needs_no_torch():
    """torch need not even be installed. The parts that need it raise when they are used."""
    loaded, names, error = run(
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "import lcw_ops\n"
        "loaded = sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'lcw_ops'))\n"
        "try: lcw_ops.nn\n"
        "except ImportError as raised: error = raised.name\n"
        "print(json.dumps([loaded, dir(lcw_ops), error]))"
    )
    assert loaded == ["lcw_ops", "lcw_ops._after_import", "torch"]
    assert set(PUBLIC) <= set(names)
    assert error.split(".")[0] == "torch"


@pytest.mark.parametrize(
    "imports",
    [
        "import lcw_ops, torch",
        "import torch, lcw_ops",
        "import lcw_ops.reference, torch",
        "import importlib.util, lcw_ops; importlib.util.find_spec('torch'); import lcw_ops.init, torch",
    ],
)
def test_the_ops_are_registered_once_torch_is_imported(imports):
    loader, found = run(
        f"{imports}\n"
        "import json\n"
        "x, weight = torch.randn(2, 3), torch.ones(4, 3)\n"
        "schema = str(torch.ops.lcw_ops.lcw_linear.cpp._schema)\n"
        "print(json.dumps([[type(torch.__loader__).__name__, torch.__spec__.loader is torch.__loader__], schema]))"
    )
    assert loader == ["SourceFileLoader", True]
    assert found.startswith("lcw_ops::lcw_linear.cpp(Tensor x, Tensor weight")


def test_every_way_to_a_part_of_the_package(tmp_path):
    """The ways are attributes, `import *`, a reload, a pickle in a spawned process and help(), in one interpreter."""
    script = tmp_path / "user.py"
    script.write_text(
        "import importlib, json, multiprocessing, pickle, pydoc\n"
        "import lcw_ops\n"
        "def kind(layer): return type(layer).__name__\n"
        "if __name__ == '__main__':\n"
        "    layer = lcw_ops.nn.LCWLinear(3, 2)\n"
        "    again = pickle.loads(pickle.dumps([layer, lcw_ops.use_backend, lcw_ops.BackendError('x')]))\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: spawned = pool.map(kind, [layer])[0]\n"
        "    before = lcw_ops.nn, lcw_ops.use_backend\n"
        "    importlib.reload(lcw_ops)\n"
        "    same = before == (lcw_ops.nn, lcw_ops.use_backend)\n"
        "    from lcw_ops import *\n"
        "    stars = [name for name in lcw_ops.__all__ if globals()[name] is not getattr(lcw_ops, name)]\n"
        "    from lcw_ops.profile import profile as function\n"
        "    kinds = [type(function).__name__, type(lcw_ops.profile).__name__]\n"
        "    text = pydoc.render_doc(lcw_ops, renderer=pydoc.plaintext)\n"
        "    print(json.dumps([kind(again[0]), spawned, same, stars, kinds, 'activate_gradients(' in text]))\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == ["LCWLinear", "LCWLinear", True, [], ["function", "module"], True]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_unknown_ones_are_not(name):
    assert getattr(lcw_ops, name) is getattr(lcw_ops, name)
    assert name in dir(lcw_ops)
    with pytest.raises(AttributeError, match=f"module 'lcw_ops' has no attribute '{name}s_'"):
        getattr(lcw_ops, f"{name}s_")


def test_dir_has_public_names_submodules_and_dunders():
    names = run(
        "import json, sys, lcw_ops\n"
        "before = dir(lcw_ops)\n"
        "import lcw_ops.jobs.data\n"
        "print(json.dumps([before, sorted(set(dir(lcw_ops)) - set(before))]))"
    )
    public = [name for name in names[0] if not name.startswith("_")]
    assert public == sorted({*PUBLIC, "gradient_hooks", "ops"})
    assert {"__version__", "__all__", "__doc__", "__path__"} <= set(names[0])
    assert all(name.startswith("__") for name in set(names[0]) - set(public))
    assert names[1] == ["jobs"]


def test_type_checkers_see_every_name_that_is_loaded_late():
    (block,) = (node for node in ast.parse(inspect.getsource(lcw_ops)).body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name for imported in block.body for alias in imported.names}
    assert seen == {*PUBLIC, "gradient_hooks", "ops"}


# One thread imports torch, and with it the ops. Meanwhile another one uses a part of the package.
TWO_THREADS = """
import json, sys, threading, time
import lcw_ops
failures = []

def run(code):
    try: exec(code, {"lcw_ops": lcw_ops})
    except BaseException as error: failures.append(repr(error))

importing, using = (threading.Thread(target=run, args=[code]) for code in ("import torch", sys.argv[1]))
importing.start()
while sys.argv[2] not in sys.modules: time.sleep(0.001)
using.start()
for thread in (importing, using): thread.join(100)
import torch, torch.utils.flop_counter
counted = torch.ops.lcw_ops.lcw_linear in torch.utils.flop_counter.flop_registry
print(json.dumps([failures, str(torch.ops.lcw_ops.lcw_linear.cpp), counted]))
"""


@pytest.mark.parametrize("options", [[], ["-W", "error::RuntimeWarning"]], ids=["", "warnings are errors"])
@pytest.mark.parametrize(
    ("use", "once"),
    [
        # The second thread holds the module's import lock and waits for torch when the first one wants this lock.
        ("lcw_ops.use_backend", "torch"),
        ("import lcw_ops.reference", "torch"),
        ("import lcw_ops._torch", "torch"),
        # The first thread is already importing the ops.
        ("import lcw_ops.nn, lcw_ops.init", "lcw_ops._checks"),
        ("import torch.utils.flop_counter", "lcw_ops.ops"),
    ],
)
def test_a_thread_imports_torch_while_another_uses_the_package(use, once, options):
    command = [sys.executable, *options, "-c", TWO_THREADS, use, once]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [[], "lcw_ops.lcw_linear.cpp", True]


def test_a_compiled_function_may_be_the_first_to_use_a_part():
    assert run(
        "import json, lcw_ops, torch\n"
        "x, weight = torch.randn(2, 3), torch.randn(4, 3)\n"
        "function = lambda x: lcw_ops.functional.lcw_linear(x, weight)\n"
        "result = torch.compile(function, fullgraph=True, backend='eager')(x)\n"
        "print(json.dumps(torch.equal(result, function(x))))"
    )


def test_the_command_line_knows_the_names_that_the_library_knows():
    reference = importlib.import_module("lcw_ops.reference.orthogonal_filter")
    assert tuple(reference.ACTIVATIONS) == _names.ACTIVATIONS
    for filter in _names.FILTERS:
        lcw_ops.nn.OrthogonalFilterMLP(2, 3, 2, 2, filter=filter)


# --- the hook


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``make(source)`` writes a module and returns its name. Everything is removed afterwards."""
    names = []

    def make(source="value = 1\n"):
        name = f"waited_for_{tmp_path.name.replace('-', '_')}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield make
    sys.meta_path[:] = finders
    for name in names:
        _finder.functions.pop(name, None)
        sys.modules.pop(name, None)


def test_the_function_runs_after_the_import_now_later_and_again(module):
    calls = []
    name = module("value = [1]\n")
    after_import(name, lambda: calls.append(sys.modules[name].value))
    spec = importlib.util.find_spec(name)
    assert calls == []
    assert spec.loader.get_source(name) == copy.copy(spec).loader.get_source(name) == "value = [1]\n"
    assert copy.copy(spec.loader).get_source(name) == "value = [1]\n"
    imported = importlib.import_module(name)
    assert calls == [[1]]
    assert type(imported.__loader__).__name__ == "SourceFileLoader"
    assert imported.__spec__.loader is imported.__loader__
    assert inspect.getsource(imported) == "value = [1]\n"
    importlib.reload(imported)
    assert len(calls) == 2
    del sys.modules[name]
    importlib.import_module(name)
    assert len(calls) == 3
    after_import(name, lambda: calls.append("now"))
    assert calls[3:] == ["now"]
    assert sys.meta_path.count(_finder) == 1


def test_a_failing_function_does_not_fail_the_import(module):
    name = module()

    def fail():
        raise ValueError("no luck")

    after_import(name, fail)
    with pytest.warns(RuntimeWarning, match=f"setup failed after the import of {name}: ValueError: no luck"):
        assert importlib.import_module(name).value == 1
    with pytest.raises(ValueError, match="no luck"):
        after_import(name, fail)


def test_a_failing_function_does_not_fail_the_import_where_warnings_are_errors(module, capsys, monkeypatch):
    def fail():
        raise ValueError("no luck")

    names = [module(), module()]
    for name in names:
        after_import(name, fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(names[0]).value == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"RuntimeWarning: lcw_ops: setup failed after the import of {names[0]}: ValueError")
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        assert importlib.import_module(names[1]).value == 1


def test_a_module_that_fails_is_not_announced(module):
    calls = []
    name = module("raise OSError('broken')\n")
    after_import(name, lambda: calls.append(1))
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            importlib.import_module(name)
    assert calls == []


def test_a_module_that_does_not_exist_is_not_found(module, tmp_path):
    name = module()
    (tmp_path / f"{name}.py").unlink()
    importlib.invalidate_caches()
    after_import(name, lambda: pytest.fail("called without a module"))
    assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


class OtherHook:
    """Another package's hook of the same module, made as well-known libraries make theirs."""

    def __init__(self, name):
        self.name, self.searching, self.executed = name, False, 0

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        execute = spec.loader.exec_module
        hook = self

        class Loader:
            def create_module(self, spec):
                return None

            def exec_module(self, module):
                hook.executed += 1
                execute(module)

        spec.loader = Loader()
        return spec


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_another_hook_of_the_same_module(ours_first, module):
    calls = []
    name = module()
    other = OtherHook(name)
    after_import(name, lambda: calls.append(1))
    sys.meta_path.remove(_finder)
    sys.meta_path[:0] = [_finder, other] if ours_first else [other, _finder]
    assert importlib.import_module(name).value == 1
    assert (calls, other.executed) == ([1], 1)


def test_many_threads_import_once(module):
    calls = []
    name = module("import time; time.sleep(0.05); value = 1\n")
    after_import(name, lambda: calls.append(1))
    results = []

    def work():
        importlib.util.find_spec(name)
        results.append(importlib.import_module(name).value)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1] * 8
    assert calls == [1]


def test_a_folder_without_an_init_file_is_a_package_too(module, tmp_path):
    name = module()
    (tmp_path / f"{name}.py").unlink()
    (tmp_path / name).mkdir()
    importlib.invalidate_caches()
    after_import(name, lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(importlib.import_module(name).__path__) == [str(tmp_path / name)]


def test_modules_that_have_moved_import_under_their_old_names():
    """Old and new name give the same module, whichever comes first."""
    for first, second in ((0, 1), (1, 0)):
        same = run(
            "import importlib, json\n"
            f"order, moved = {(first, second)}, {MOVED}\n"
            "pairs = [[importlib.import_module(pair[place]) for place in order] for pair in moved.items()]\n"
            "print(json.dumps([one is other for one, other in pairs]))"
        )
        assert same == [True] * len(MOVED)


@pytest.mark.parametrize("old", [*MOVED, *OLD_PACKAGES])
def test_tools_find_the_old_name_of_a_module(old):
    """Tools do not see import hooks. So an old name is a file, which imports everything from the new module."""
    spec = importlib.util.find_spec(old)
    assert (ROOT / spec.origin).is_file()
    if old not in MOVED:
        return
    tree = ast.parse((ROOT / f"{old.replace('.', '/')}.py").read_text())
    assert ast.get_docstring(tree) == f"Moved to {MOVED[old]}."
    stars = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert stars == [MOVED[old]]


def test_old_modules_are_attributes_of_their_package():
    """Before the move, `import lcw_ops` was enough to use these modules."""
    names = [
        "lcw_ops.ops._backends",
        "lcw_ops.ops._library",
        "lcw_ops.ops._precision",
        "lcw_ops.ops.orthogonal_filter_crossover",
        "lcw_ops.ops.orthogonal_filter_graph",
        "lcw_ops.ops.parallel_depth_crossover",
        "lcw_ops.ops.parallel_depth_frame",
        "lcw_ops.ops.parallel_depth_solver",
        "lcw_ops.profile.files",
        "lcw_ops.reference.checks",
    ]
    found = run(
        "import json, operator, lcw_ops\n"
        f"print(json.dumps([operator.attrgetter(name[8:])(lcw_ops).__name__ for name in {names}]))"
    )
    assert found == [MOVED[name] for name in names]


def test_modules_of_an_old_package_can_be_imported_from_it():
    found = run(
        "import json\n"
        "from lcw_ops.train import arguments, checkpoints, job, loop, schedule, settings\n"
        "import lcw_ops.train\n"
        "same = lcw_ops.train.job is job\n"
        "print(json.dumps([same, job.__name__, arguments.__name__, loop.__name__, settings.__name__]))"
    )
    jobs = "lcw_ops.jobs"
    assert found == [True, f"{jobs}.train", f"{jobs}.arguments", f"{jobs}.loop", f"{jobs}.settings"]


RECURRENCE = "lcw_ops.reference.orthogonal_filter"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (
            "lcw_ops.ops.hypersphere",
            "lcw_ops.ops.weight_norm",
            "NORMALIZE WEIGHT_NORM_LINEAR NormalizeScale WeightNormLinear normalize_scale weight_norm_linear",
        ),
        (
            "lcw_ops.kernels.hypersphere",
            "lcw_ops.kernels.weight_norm",
            "normalize_kernel normalize_scale normalize_scale_backward weight_norm_linear weight_norm_linear_backward",
        ),
        ("lcw_ops.profile.plot", "lcw_ops.jobs.picture", "ACCURACY_COLOUR findings gradient_fate plot_report"),
        ("lcw_ops.nn.orthogonal_filter", "lcw_ops._names", "FILTERS"),
        ("lcw_ops.ops.orthogonal_filter", "lcw_ops.ops.orthogonal_filter.crossover", "fastest_kernel"),
        (
            "lcw_ops.ops.orthogonal_filter",
            RECURRENCE,
            "ACTIVATIONS count_steps orthogonal_filter_backward orthogonal_filter_jvp",
        ),
        ("lcw_ops.ops.parallel_depth", "lcw_ops.ops.parallel_depth.crossover", "Call device_key largest_c_faster"),
        ("lcw_ops.ops.parallel_depth", RECURRENCE, "count_steps orthogonal_filter_backward"),
    ],
)
def test_names_that_have_moved_can_be_imported_from_their_old_module(old, new, names):
    if ".kernels." in old:
        pytest.importorskip("triton")
    if ".plot" in old:
        pytest.importorskip("matplotlib")
    module = importlib.import_module(old)
    for name in names.split():
        assert getattr(module, name) is getattr(importlib.import_module(new), name)
        assert name not in vars(module)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'no_such_name'"):
        _ = module.no_such_name


# Threads that start at the same moment and import one module each.
AT_ONCE = """
import json, sys, threading
sys.setswitchinterval(1e-5)
failures, ready = [], threading.Barrier(len(sys.argv) - 1)

def run(name):
    ready.wait()
    try: exec(f"import {name}")
    except BaseException as error: failures.append([name, repr(error)])

threads = [threading.Thread(target=run, args=[name]) for name in sys.argv[1:]]
for thread in threads: thread.start()
for thread in threads: thread.join(100)
import lcw_ops.gradient_hooks, lcw_ops.optim.hooks
print(json.dumps([failures, lcw_ops.gradient_hooks is lcw_ops.optim.hooks]))
"""


@pytest.mark.parametrize(
    "names",
    [
        ("lcw_ops", "lcw_ops.gradient_hooks"),
        ("lcw_ops.gradient_hooks", "lcw_ops.gradient_hooks", "lcw_ops.optim"),
    ],
)
def test_threads_import_old_names_at_once(names):
    for _ in range(3):
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", AT_ONCE, *names]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout) == [[], True]


@pytest.mark.parametrize(
    "name",
    [
        "lcw_ops.data.Dataset",
        "lcw_ops.gradient_hooks.ActivatedGradients",
        "lcw_ops.gradient_hooks.GradientHooks",
        "lcw_ops.gradient_hooks._GradientHook",
        "lcw_ops.gradient_hooks._keep_group_settings",
        "lcw_ops.gradient_hooks.activate_gradients",
        "lcw_ops.gradient_hooks.register_gradient_hook",
        "lcw_ops.profile.main_job.History",
        "lcw_ops.profile.main_job.Report",
        "lcw_ops.profile.main_job.Settings",
        "lcw_ops.profile.progress.PlainProgress",
        "lcw_ops.train.checkpoints.DamagedError",
        "lcw_ops.train.job.Log",
        "lcw_ops.train.loop.Training",
        "lcw_ops.train.settings.ProfileSettings",
        "lcw_ops.train.settings.TrainSettings",
    ],
)
def test_pickles_that_name_a_module_that_has_moved_still_load(name):
    """A pickle from before the move names the old module; module and name must lead to today's class."""
    module, _, attribute = name.rpartition(".")
    loaded = pickle.loads(f"c{module}\n{attribute}\n.".encode())
    assert loaded is getattr(importlib.import_module(MOVED[module]), attribute)
