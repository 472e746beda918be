"""The timeline of a pass: valid JSON, bars inside the bars of their callers, a limit of its size."""

import json

import pytest
import torch
from torch import nn

from lcw_ops.profile import trace

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x):
        return x + self.act(self.linear(x))


def bars(path):
    return json.loads(path.read_text())["traceEvents"]


def test_bars_lie_inside_those_of_their_callers(tmp_path):
    model = nn.Sequential(*[Block() for _ in range(3)])
    x, before = torch.randn(4, 6), {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert trace(model, x, tmp_path / "a.json") == 0
    events = bars(tmp_path / "a.json")
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    names = [event["name"] for event in events]
    middle = names.index("backward")
    assert names[0] == "forward"
    assert names[1:middle] == [name for k in range(3) for name in (f"{k}", f"{k}.linear", f"{k}.act")]
    # Backward, from the last module to the first.
    assert names[middle + 1 :] == [name for k in (2, 1, 0) for name in (f"{k}.act", f"{k}.linear")]

    def end(event):
        return event["ts"] + event["dur"]

    by_name = {event["name"]: event for event in events[:middle]}
    for k in range(3):
        inner, outer = by_name[f"{k}.linear"], by_name[f"{k}"]
        assert outer["ts"] <= inner["ts"] <= end(inner) <= end(outer) <= end(by_name["forward"])
    backward = events[middle]
    for event in events[middle + 1 :]:
        assert backward["ts"] <= event["ts"]
        assert end(event) <= end(backward) + 1e-3
    assert all(event["dur"] >= 0 for event in events)
    # The model was left as it was.
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_shortest_bars_are_left_out_of_a_small_file(tmp_path):
    model = nn.Sequential(*[Block() for _ in range(30)])
    left_out = trace(model, torch.randn(4, 6), tmp_path / "a.json", most_bytes=4000)
    assert 0 < left_out < 152
    assert (tmp_path / "a.json").stat().st_size <= 4000
    events = bars(tmp_path / "a.json")
    assert len(events) + left_out == 2 + 30 * 5
    assert {"forward", "backward"} <= {event["name"] for event in events}


def test_errors_leave_no_hook_and_no_file(tmp_path):
    model = nn.Sequential(Block(), nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="shapes"):
        trace(model, torch.randn(4, 6), tmp_path / "a.json")
    assert not any(module._forward_hooks for module in model.modules())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="most_bytes"):
        trace(model, torch.randn(4, 6), tmp_path / "a.json", most_bytes=10)


def test_a_given_loss_a_frozen_model_and_hostile_names(tmp_path):
    model = nn.ModuleDict({'a"</script>\n': nn.Linear(6, 6)})
    model.forward = lambda x: next(iter(model.values()))(x)
    trace(model, torch.randn(4, 6), tmp_path / "a.json", torch.zeros(4, 6), nn.functional.mse_loss)
    assert [event["name"] for event in bars(tmp_path / "a.json")].count('a"</script>\n') == 2
    frozen = nn.Sequential(nn.Linear(6, 6)).requires_grad_(False)
    trace(frozen, torch.randn(4, 6), tmp_path / "b.json")
    assert [event["name"] for event in bars(tmp_path / "b.json")] == ["forward", "0", "backward", "0"]
