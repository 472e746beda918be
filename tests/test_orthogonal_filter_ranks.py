"""The recurrent modules sharded over two ranks by FSDP2: reset_parameters gives all ranks one filter.

Run as a script, this file is one of the two processes (gloo). It stores the values that it drew, and the tests compare
those of the two.
"""

import os
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lcw_ops import nn
from lcw_ops.nn.orthogonal_filter import make_filter

RANKS = 2
# In seconds, several times as long as all cases take.
TIMEOUT = 120
DEPTH = 5

# Sizes are odd: rank 0 has more rows than rank 1, so the two draw different amounts of random numbers.
MAKE = {
    "mlp": lambda **options: nn.OrthogonalFilterMLP(3, 7, DEPTH, 2, **options),
    "rnn": lambda **options: nn.OrthogonalFilterRNN(3, 7, length=DEPTH, **options),
}
KINDS = ["haar", "permutation"]
SEEDS = {"one seed": lambda rank: 3, "a seed per rank": lambda rank: 3 + rank}


def scales():
    """alpha is a parameter, which FSDP2 will shard, and beta a buffer. Every rank passes the same full values."""
    return {"alpha": torch.nn.Parameter(torch.linspace(0.5, 0.75, DEPTH)), "beta": torch.linspace(0.25, 0.5, DEPTH)}


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def two_modules(make, mesh, **options):
    model = torch.nn.Sequential(make(**options), make(**options))
    for module in model:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def reset(model):
    model.to_empty(device="cpu")
    for module in model:
        module.reset_parameters()


def main(rank, folder):
    # torch warns about the random operators of DTensor on a CPU, and some versions about the views of parameters that
    # FSDP2 makes.
    warnings.simplefilter("ignore")
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT))
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for name, make in MAKE.items():
        for kind in KINDS:
            for seed, of_rank in SEEDS.items():
                with torch.device("meta"):
                    model = two_modules(make, mesh, filter=kind)
                torch.manual_seed(of_rank(rank))
                reset(model)
                found[name, kind, seed] = [module.filter for module in model]
    model = two_modules(MAKE["mlp"], mesh, **scales())
    reset(model)
    found["scales"] = [{name: full(getattr(module, name)) for name in ("alpha", "beta")} for module in model]
    # alpha and beta are given as tensors on the meta device, so they have no first values to restore: reset_parameters
    # refuses the module until a sharded state dict is loaded.
    with torch.device("meta"):
        model = two_modules(MAKE["mlp"], mesh, **scales())
    model.to_empty(device="cpu")
    try:
        model[0].reset_parameters()
    except ValueError as error:
        found["refused"] = str(error)
    source = two_modules(MAKE["mlp"], mesh, **scales())
    model.load_state_dict(source.state_dict())
    for module in model:
        module.reset_parameters()
    found["loaded"] = [{name: full(getattr(module, name)) for name in ("alpha", "beta")} for module in model]
    # Make every buffer a DTensor, as torch.distributed.tensor.distribute_module does.
    mlp = MAKE["mlp"]()
    for name, tensor in [*mlp.named_parameters(), *mlp.named_buffers()]:
        owner, _, last = name.rpartition(".")
        distributed = distribute_tensor(tensor.detach(), mesh, [Replicate()])
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        setattr(mlp.get_submodule(owner), last, torch.nn.Parameter(distributed) if is_parameter else distributed)
    torch.manual_seed(rank)
    mlp.reset_parameters()
    found["replicated"] = mlp.filter.to_local().clone()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), [0] * RANKS, TIMEOUT)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKE)
def test_ranks_of_a_sharded_module_have_one_filter(found, name, kind, seed):
    of_first, of_second = (found[rank][name, kind, seed] for rank in range(RANKS))
    for mine, theirs in zip(of_first, of_second, strict=True):
        assert torch.equal(mine, theirs)
    # Two modules, two filters.
    assert not torch.equal(*of_first)
    for filter in of_first:
        if kind == "permutation":
            assert torch.equal(filter.sort().values, torch.arange(7))
        else:
            product = filter.double() @ filter.double().T
            # The filter was rounded to float32. An element of the product sums 7 terms, whose roundings add up to about
            # sqrt(7) * 2**-23. Twice that is allowed.
            torch.testing.assert_close(product, torch.eye(7, dtype=torch.float64), rtol=0, atol=2 * 7**0.5 * 2**-23)
    # The first filter is that of rank 0's seed.
    torch.manual_seed(SEEDS[seed](0))
    assert torch.equal(of_first[0], make_filter(kind, 7))


@pytest.mark.parametrize("case", ["scales", "loaded"])
def test_scales_of_a_sharded_module_get_their_first_values_or_stay_as_loaded(found, case):
    for rank in range(RANKS):
        assert "cannot restore alpha and beta" in found[rank]["refused"]
        for module in found[rank][case]:
            for name, expected in scales().items():
                assert torch.equal(module[name], expected), name


def test_a_filter_that_is_a_distributed_tensor_is_drawn(found):
    torch.manual_seed(0)
    expected = make_filter("haar", 7)
    for rank in range(RANKS):
        assert torch.equal(found[rank]["replicated"], expected)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
