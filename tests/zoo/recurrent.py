"""Recurrent layouts: torch's LSTM and GRU, learned first states, packed sequences, RWKV, Mamba, our own networks."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lcw_ops.nn import OrthogonalFilterMLP, OrthogonalFilterRNN
from zoo.attention import INTEGERS
from zoo.entry import Entry, registry

MODELS, model = registry()


class LSTMClassifier(nn.Module):
    """Reads h_n only."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(x)
        return self.head(torch.cat([h_n[-2], h_n[-1]], -1))


@model
def lstm_classifier() -> Entry:
    return Entry(LSTMClassifier(), torch.randn(3, 7, 6), rows=("lstm", "head"))


class GRUClassifier(nn.Module):
    """Integer inputs, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(11, 6), nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(tokens))[0][-1])


@model
def gru_classifier() -> Entry:
    return Entry(GRUClassifier(), torch.randint(11, (7, 3)), absent=INTEGERS, rows=("embedding", "gru"))


class LearnedFirstState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h0, self.rnn = nn.Parameter(torch.randn(1, 1, 8)), nn.RNN(4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x, self.h0.expand(1, len(x), 8).contiguous())[0]


@model
def learned_first_state() -> Entry:
    return Entry(LearnedFirstState(), torch.randn(3, 5, 4), rows=("rnn", "LearnedFirstState"))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.gru(pack_padded_sequence(x, lengths, batch_first=True))[1][0])


@model
def packed_sequences() -> Entry:
    return Entry(Packed(), {"x": torch.randn(3, 5, 4), "lengths": torch.tensor([5, 3, 2])}, rows=("gru",))


class RWKV(nn.Module):
    """Time mixing with a learned decay, and channel mixing, after RWKV's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm1, self.norm2 = nn.Embedding(13, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.decay = nn.Parameter(torch.rand(3, 8)), nn.Parameter(torch.randn(8))
        self.key, self.value, self.receptance, self.output = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm1(x)
        before = nn.functional.pad(y, (0, 0, 1, -1))
        key, value, receptance = (
            layer(y * mix + before * (1 - mix))
            for layer, mix in zip((self.key, self.value, self.receptance), self.mix, strict=True)
        )
        state, outputs = torch.zeros_like(key[:, 0]), []
        for step in range(tokens.shape[1]):
            state = state * torch.exp(-self.decay.exp()) + key[:, step].exp() * value[:, step]
            outputs.append(state)
        x = x + self.output(receptance.sigmoid() * torch.stack(outputs, 1))
        return self.head(x + self.down(self.up(self.norm2(x)).relu().square()))


@model
def rwkv() -> Entry:
    return Entry(RWKV(), torch.randint(13, (2, 6)), absent=INTEGERS, rows=("receptance", "RWKV"))


class MambaBlock(nn.Module):
    """The selective state space layer: gate, causal depthwise convolution, scan."""

    def __init__(self, width: int = 8, states: int = 4) -> None:
        super().__init__()
        self.norm, self.in_proj = nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.x_proj, self.dt_proj = nn.Linear(width, 1 + 2 * states, bias=False), nn.Linear(1, width)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.D, self.out_proj = nn.Parameter(torch.ones(width)), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        states, length = self.A_log.shape[1], x.shape[1]
        y, gate = self.in_proj(self.norm(x)).chunk(2, -1)
        y = nn.functional.silu(self.conv1d(y.mT)[..., :length].mT)
        dt, b, c = self.x_proj(y).split([1, states, states], -1)
        dt = nn.functional.softplus(self.dt_proj(dt))
        decay = torch.exp(dt[..., None] * -self.A_log.exp())
        drive = (dt * y)[..., None] * b[:, :, None]
        state, outputs = torch.zeros_like(drive[:, 0]), []
        for step in range(length):
            state = decay[:, step] * state + drive[:, step]
            outputs.append((state * c[:, step, None]).sum(-1))
        return x + self.out_proj((torch.stack(outputs, 1) + self.D * y) * nn.functional.silu(gate))


@model
def mamba() -> Entry:
    model = nn.Sequential(MambaBlock(), MambaBlock(), nn.Linear(8, 3))
    return Entry(model, torch.randn(2, 6, 8), rows=("0.dt_proj", "1"))


@model
def orthogonal_filter_mlp() -> Entry:
    return Entry(OrthogonalFilterMLP(6, 8, 12, 3), torch.randn(4, 6), rows=("input_layer", "layer[12]"))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = OrthogonalFilterRNN(4, 8, length=7), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][0])


@model
def orthogonal_filter_rnn() -> Entry:
    return Entry(Reader(), torch.randn(7, 3, 4), rows=("rnn.layer[1]", "head"))


@model
def orthogonal_filter_stages() -> Entry:
    stages = OrthogonalFilterMLP(6, 8, 12, 3).stages(3)
    return Entry(nn.Sequential(*stages), torch.randn(4, 6), rows=("0", "1", "2"))


class FrozenRecurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep, self.head = OrthogonalFilterMLP(6, 8, 12, 5).requires_grad_(False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(x))


@model
def frozen_recurrence() -> Entry:
    return Entry(FrozenRecurrence(), torch.randn(4, 6), rows=("deep.layer[12]", "head"))
