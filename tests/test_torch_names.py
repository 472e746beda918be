"""Every private name of torch that the package relies on exists and works, and stands in lcw_ops/_torch.py alone."""

import copy
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from lcw_ops import _torch

ROOT = Path(__file__).parents[1]

# Operators in torch's schema list, torch's documented check, and documented attributes of modules and tensors.
EXEMPT = re.compile(r"torch\.(_(foreach_\w+|amp_foreach_\w+|check\b|weight_norm\b)|ops\.)")
PRIVATE = re.compile(
    r"torch\.(\w+\.)*_[a-z]\w*(\.\w+)*|torch\._C\b|forward_ad\._\w+|from torch(\.\w+)*\._\w+|_dynamo_marked"
)


def seen(predicate):
    """An empty list, and a function that appends the predicate's result to the list wherever torch.func runs it."""
    found = []

    def function(x):
        found.append(predicate())
        return x * 2

    return found, function


@pytest.mark.parametrize("name", ["add.Tensor", "clone.default"])
def test_call_kernel(name):
    """One operator with a kernel of the device, and one with a kernel for every device. The mode sees neither call."""
    overload = getattr(getattr(torch.ops.aten, name.partition(".")[0]), name.partition(".")[2])
    seen = []

    class Mode(_torch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    arguments = [torch.ones(3)] * (1 + (name == "add.Tensor"))
    with Mode():
        result = _torch.call_kernel(overload, "cpu", *arguments)
    assert torch.equal(result, sum(arguments))
    assert overload not in seen


def test_in_functorch():
    assert not _torch.in_functorch()
    for transform in (torch.vmap, torch.func.grad, lambda function: lambda x: torch.func.jvp(function, (x,), (x,))):
        found, function = seen(_torch.in_functorch)
        transform(function)(torch.tensor(1.0) if transform is torch.func.grad else torch.ones(2))
        assert found == [True]
    assert not _torch.in_functorch()


def test_is_functorch_wrapped():
    assert not _torch.is_functorch_wrapped(torch.ones(2))
    wrapped = []
    torch.vmap(lambda x: wrapped.append(_torch.is_functorch_wrapped(x)) or x)(torch.ones(2))
    assert wrapped == [True]


def test_is_computed():
    leaf = torch.ones(2, 3, requires_grad=True)
    assert not any(map(_torch.is_computed, (leaf, leaf[:1], leaf.T[1:].view(2, 2), leaf.detach(), torch.ones(2))))
    assert all(map(_torch.is_computed, (leaf * 1, (leaf * 1)[:1], leaf.clone().T)))


def test_in_forward_mode():
    assert not _torch.in_forward_mode()
    with forward_ad.dual_level():
        assert _torch.in_forward_mode()
        with torch.no_grad():
            assert _torch.in_forward_mode()
    assert not _torch.in_forward_mode()
    found, function = seen(_torch.in_forward_mode)
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert found == [True]


def test_has_dtensor_without_importing_its_module():
    source = (
        "import torch, lcw_ops; from lcw_ops import _torch; x = torch.ones(2, 3)\n"
        "lcw_ops.functional.lcw_linear(x, x); assert not _torch.is_dtensor_loaded() and not _torch.has_dtensor(x)\n"
        "import torch.distributed.tensor, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "mesh = dist.device_mesh.init_device_mesh('cpu', (1,)); spread = dist.tensor.distribute_tensor(x, mesh)\n"
        "assert _torch.is_dtensor_loaded() and not _torch.has_dtensor(x, None, 1) and _torch.has_dtensor(x, spread)\n"
    )
    assert subprocess.run([sys.executable, "-c", source], timeout=120).returncode == 0


def test_modes_and_overrides_are_seen():
    assert not _torch.is_function_mode_active()
    assert not _torch.may_be_overridden(torch.ones(2), None, torch.nn.Parameter(torch.ones(2)), 1.0)
    with torch.overrides.BaseTorchFunctionMode():
        assert _torch.is_function_mode_active()
        assert _torch.may_be_overridden(1.0)

    class Subclass(Tensor):
        pass

    assert _torch.may_be_overridden(1.0, torch.ones(2).as_subclass(Subclass))
    assert _torch.count_dispatch_modes() == 0
    with FakeTensorMode():
        assert _torch.count_dispatch_modes() == 1


def test_calls_without_function_modes():
    with torch.overrides.BaseTorchFunctionMode():
        with _torch.without_function_modes():
            assert not _torch.may_be_overridden(torch.ones(2))
        assert _torch.may_be_overridden(torch.ones(2))


def test_hand_over():
    class Counting(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), kwargs=None):
            return function, len(arguments)

    def function(x, y):
        raise AssertionError("the subclass takes the call over")

    arguments = (torch.ones(2).as_subclass(Counting), 1.0)
    assert _torch.is_overridden(*arguments)
    assert _torch.hand_over(function, *arguments) == (function, 2)
    assert not _torch.is_overridden(torch.ones(2), 1.0)


def test_while_exporting_arguments_take_calls_over_and_modes_do_not():
    class Subclass(Tensor):
        pass

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.plain = torch.nn.Parameter(torch.ones(2)), torch.ones(2)

        def forward(self, x):
            arguments = ((x, self.weight, self.plain, 1.0, None), (x, own))
            found.append([_torch.is_overridden(*given) for given in arguments])
            with torch.overrides.BaseTorchFunctionMode():
                found.append([_torch.is_overridden(*given) for given in arguments])
            return x * 2

    own, found = torch.ones(2).as_subclass(Subclass), []
    torch.export.export(Module(), (torch.ones(2),), strict=False)
    assert found
    assert all(answers == [False, True] for answers in found)


def test_views_and_zeros_without_memory():
    base = torch.ones(4)
    assert _torch.is_view(base[:2])
    assert not _torch.is_view(base)
    assert _torch.is_zeros_without_memory(torch._efficientzerotensor(3))
    assert not _torch.is_zeros_without_memory(torch.zeros(3))


def test_fake_tensors_have_no_values():
    real = torch.ones(2)
    assert not _torch.is_fake(real)
    assert _torch.has_values(real)
    assert not _torch.has_values(torch.ones(2, device="meta"))
    with FakeTensorMode():
        assert _torch.is_fake(torch.ones(2))
        assert not _torch.has_values(real)


def test_is_traced():
    assert not _torch.is_traced()
    found, function = seen(_torch.is_traced)
    make_fx(function)(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert found == [True, True]
    compiled = torch.compile(lambda x: x * 2 if _torch.is_traced() else x * 3, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]


def test_is_exporting():
    assert not _torch.is_exporting()
    assert not _torch.is_in_onnx_export()

    class Module(torch.nn.Module):
        def forward(self, x):
            return x * 2 if _torch.is_exporting() else x * 3

    for strict in (False, True):
        exported = torch.export.export(Module(), (torch.ones(2),), strict=strict)
        assert exported.module()(torch.ones(2)).tolist() == [2.0, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Module(), torch.ones(2), check_trace=False)
    assert traced(torch.ones(2)).tolist() == [2.0, 2.0]
    compiled = torch.compile(Module(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("loaded", ["exporter", "torchscript_exporter", None])
def test_torchs_exporters_to_onnx_are_asked_only_if_one_is_loaded(loaded, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for name in ("exporter", "torchscript_exporter"):
        monkeypatch.delitem(sys.modules, f"torch.onnx._internal.{name}", raising=False)
    if loaded is not None:
        monkeypatch.setitem(sys.modules, f"torch.onnx._internal.{loaded}", torch)
    assert _torch.is_in_onnx_export() == (loaded is not None)


def test_unrecorded():
    traced_within = []

    def function(x):
        traced_within.append(_torch.unrecorded(torch.jit.is_tracing))
        traced_within.append(torch.jit.is_tracing())
        return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert traced_within == [False, True]


def test_constant_when_traced():
    calls = []

    @_torch.constant_when_traced
    def rows_limit(name):
        # torch.compile could not trace this.
        calls.append(str(id(name)))
        return 3

    compiled = torch.compile(
        lambda x: x * 2 if x.shape[0] > rows_limit("cpp") else x * 3, backend="eager", fullgraph=True, dynamic=True
    )
    assert compiled(torch.ones(5)).tolist() == [2.0] * 5
    assert compiled(torch.ones(2)).tolist() == [3.0] * 2
    assert calls


def test_never_traced():
    @_torch.never_traced
    def untraced(x):
        assert not torch.compiler.is_compiling()
        return x * 2

    assert torch.compile(lambda x: untraced(x) + 1, backend="eager")(torch.ones(2)).tolist() == [3.0, 3.0]


def test_dispatch_keys_and_overloads():
    assert isinstance(torch.ops.aten.add.Tensor, _torch.OpOverload)
    assert torch.ops.aten.add.Tensor.has_kernel_for_dispatch_key(_torch.DispatchKey.CPU)
    for key in ("CUDA", "CompositeExplicitAutograd", "Negative", "ZeroTensor", "AutogradNestedTensor"):
        assert hasattr(_torch.DispatchKey, key)


def test_cast_and_constant():
    assert _torch.cast(torch.ones(2), torch.float64).dtype == torch.float64
    x = torch.ones(2)
    assert _torch.cast(x, torch.float32) is x
    assert _torch.constant(0.5, dtype=torch.float64).tolist() == [0.5]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)], ids=str)
def test_a_state_for_a_scan_requires_a_gradient_if_an_argument_does(shape, monkeypatch):
    """With every torch that is older than 2.13."""
    monkeypatch.setattr(_torch, "_SCAN_DROPS_GRADIENTS", True)
    state, argument = torch.ones(2, 3), torch.full(shape, torch.inf)
    ready = _torch.ready_for_scan(state, None, argument, 1.0)
    assert torch.equal(ready, state)
    assert not ready.requires_grad
    ready = _torch.ready_for_scan(state, None, argument.requires_grad_(), 1.0)
    assert torch.equal(ready, state)
    assert ready.requires_grad


def test_give_own_class():
    """torch's properties, its refusal to pickle and its deep copy are there again, in a new class."""
    module = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3))
    shared, weight = copy.deepcopy(module), module.weight
    assert type(shared) is type(module)
    _torch.give_own_class(module)
    copied = copy.deepcopy(module)
    assert len({type(module), type(shared), type(copied)}) == 3
    for each in (module, shared, copied):
        assert torch.nn.utils.parametrize.type_before_parametrizations(each) is torch.nn.Linear
        assert type(each).__name__ == "ParametrizedLinear"
        assert torch.equal(each.weight, weight)
        with pytest.raises(RuntimeError, match="state_dict"):
            pickle.dumps(each)


def test_refresh_recurrent_weights():
    layer = torch.nn.GRU(3, 4)
    layer._parameters["weight_hh_l0"] = torch.nn.Parameter(torch.ones(12, 4))
    _torch.refresh_recurrent_weights(layer)
    assert layer._flat_weights[1] is layer.weight_hh_l0
    _torch.refresh_recurrent_weights(torch.nn.Linear(3, 4))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_has_torchs_init_group(kind):
    class Own(kind):
        def _init_group(self, *args):
            return super()._init_group(*args)

    class Wrapped(kind):
        _init_group = torch.compiler.disable(Own._init_group)

    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = kind(params)
    assert _torch.has_torchs_init_group(optimizer)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert _torch.has_torchs_init_group(optimizer)
    assert id(kind._init_group) in _torch.torchs_init_groups
    assert not _torch.has_torchs_init_group(Own(params))
    assert not _torch.has_torchs_init_group(Wrapped(params))
    optimizer._init_group = optimizer._init_group.__func__
    assert not _torch.has_torchs_init_group(optimizer)


def source_files():
    files = [*(ROOT / "lcw_ops").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    links = (ROOT / "lcw_ops" / "kernels", ROOT / "lcw_ops" / "bench")
    return sorted(file for file in files if not any(file.is_relative_to(link) for link in links))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_stand_in_one_file(path):
    if path == ROOT / "lcw_ops" / "_torch.py":
        return
    code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
    found = [match.group() for match in PRIVATE.finditer(code) if not EXEMPT.match(match.group())]
    assert not found, f"{path.name} uses {found}; give them a plain name in lcw_ops/_torch.py"


def test_the_hooks_of_a_module():
    layer = torch.nn.Linear(2, 2)
    kinds = _torch.hooks_of_module(layer)
    assert all(not hooks for hooks in kinds.values())
    # Every attribute of a module that holds hooks is known.
    assert {name for name in vars(layer) if "hook" in name} == set(kinds)
    layer.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    filled = {name for name, hooks in _torch.hooks_of_module(layer).items() if hooks}
    assert filled == {"_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}


def test_a_hook_is_bound_to_another_module():
    seen, first, second = [], torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    first.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    (key,) = first._load_state_dict_pre_hooks
    bound = _torch.bind_hook(first._load_state_dict_pre_hooks[key], second)
    second._load_state_dict_pre_hooks[key] = bound
    second.load_state_dict(first.state_dict())
    assert seen == [second]

    def plain(*_) -> None:
        pass

    assert _torch.bind_hook(plain, second) is plain


def test_the_memory_of_tensors_is_told_apart():
    x = torch.ones(4)
    first = _torch.storage_reference(x)
    assert first.cdata == _torch.storage_reference(x[2:].view(1, 2)).cdata
    assert first.cdata != _torch.storage_reference(torch.ones(4)).cdata
    address = first.cdata
    del x
    # While the reference lives, no other memory has its key.
    assert all(_torch.storage_reference(torch.ones(4)).cdata != address for _ in range(100))
    assert _torch.storage_reference(torch.eye(2).to_sparse()) is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_is_reentrant_checkpoint(use_reentrant):
    x = torch.ones(2, requires_grad=True)
    node = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=use_reentrant).grad_fn
    assert _torch.is_reentrant_checkpoint(node) == use_reentrant


def test_is_compiled_in_place():
    layer = torch.nn.Linear(2, 2)
    assert not _torch.is_compiled_in_place(layer)
    layer.compile()
    assert _torch.is_compiled_in_place(layer)


def test_a_dispatch_mode_sees_operators_without_the_compiler():
    code = (
        "import sys, torch\n"
        "from lcw_ops import _torch\n"
        "class Mode(_torch.DispatchMode):\n"
        "    seen = []\n"
        "    def __torch_dispatch__(self, func, types, args=(), kwargs=None):\n"
        "        self.seen.append(str(func))\n"
        "        return func(*args, **(kwargs or {}))\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "with Mode():\n"
        "    torch.ones(2).sin()\n"
        "assert 'aten.sin.default' in Mode.seen\n"
        "assert before or 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_classes_of_layers():
    assert issubclass(torch.nn.Conv2d, _torch.Convolution)
    assert issubclass(torch.nn.ConvTranspose2d, _torch.Convolution)
    assert issubclass(torch.nn.BatchNorm1d, _torch.BatchNormalization)
    assert issubclass(torch.nn.InstanceNorm1d, _torch.BatchNormalization)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2), dim=None)
    assert isinstance(normed.parametrizations.weight[0], _torch.WeightNormParametrization)
    assert normed.parametrizations.weight[0].dim == -1
    for kind in (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d):
        assert issubclass(kind, _torch.ConvTranspose)
    assert not issubclass(torch.nn.Conv1d, _torch.ConvTranspose)


def test_is_swapping_tensors():
    seen = []

    class Asking(torch.nn.Module):
        @property
        def weight(self):
            return torch.zeros(1)

        def __setattr__(self, name, value):
            if name == "weight":
                seen.append(_torch.is_swapping_tensors())
            else:
                super().__setattr__(name, value)

        def forward(self):
            return None

    module = Asking()
    module.weight = torch.ones(1)
    torch.func.functional_call(module, {"weight": torch.ones(1)}, ())
    assert seen[0] is False
    assert seen[1:]
    assert all(seen[1:])


# ---- Backward passes -------------------------------------------------------------------------------------------------


class Observed(torch.autograd.Function):
    """The identity. Its backward pass calls a function."""

    @staticmethod
    def forward(ctx, x, observe):
        ctx.observe = observe
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.observe()
        return gradient, None


def observe_backward(observe, x, run):
    """The results of ``observe`` in the backward passes of the identity of x that ``run`` makes from it."""
    found = []
    run(Observed.apply(x, lambda: found.append(observe())))
    return found


@pytest.mark.parametrize(
    ("keywords", "kept"), [({}, False), ({"retain_graph": True}, True), ({"create_graph": True}, True)], ids=str
)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_keeps_graph(keywords, kept):
    x = torch.ones((), requires_grad=True)
    assert observe_backward(_torch.keeps_graph, x, lambda y: y.backward(**keywords)) == [kept]


def test_current_backward():
    x = torch.ones((), requires_grad=True)
    assert _torch.current_backward() == -1
    found = []
    inner = Observed.apply(x, lambda: found.append(_torch.current_backward()))
    Observed.apply(inner, lambda: found.append(_torch.current_backward())).backward()
    found += observe_backward(_torch.current_backward, x, torch.Tensor.backward)
    assert found[0] == found[1] != found[2] != -1


def test_will_run_in_backward():
    x, other = (torch.ones((), requires_grad=True) for _ in range(2))
    nodes = [_torch.gradient_accumulator(leaf) for leaf in (x, other)]

    def observe():
        return [_torch.will_run_in_backward(node) for node in nodes]

    middle = x * 1
    assert observe_backward(observe, middle, torch.Tensor.backward) == [[True, False]]
    assert observe_backward(observe, x * 1, lambda y: (y + other).backward()) == [[True, True]]
    assert observe_backward(observe, x * 1, lambda y: (y + other).backward(inputs=[other])) == []
    middle = x * 1
    assert observe_backward(observe, middle, lambda y: torch.autograd.grad(y + other, middle)) == [[False, False]]


def test_is_nested_backward():
    assert not _torch.is_nested_backward()
    x = torch.ones((), requires_grad=True)
    assert observe_backward(_torch.is_nested_backward, x, torch.Tensor.backward) == [False]

    def inside():
        return observe_backward(_torch.is_nested_backward, torch.ones((), requires_grad=True), torch.Tensor.backward)

    def with_gradients():
        with torch.enable_grad():
            return inside()

    assert observe_backward(with_gradients, x, torch.Tensor.backward) == [[True]]


def test_has_gradient_hooks():
    x = torch.ones((), requires_grad=True)
    assert not _torch.has_gradient_hooks(x)
    handle = x.register_hook(lambda _: None)
    assert _torch.has_gradient_hooks(x)
    handle.remove()
    assert not _torch.has_gradient_hooks(x)


def test_wrap_unscale(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", torch.amp.GradScaler.unscale_)
    _torch.wrap_unscale(lambda unscale: lambda scaler, optimizer: calls.append(optimizer) or unscale(scaler, optimizer))
    param = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([param])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(param * 2).backward()
    scaler.step(optimizer)
    assert calls == [optimizer]
    assert param.grad == 2
