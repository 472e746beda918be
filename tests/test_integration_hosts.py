"""Models that others wrote: convert, train, fold, export. Those of transformers come from configurations, in small."""

import copy
import importlib.util
import logging
import math
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from support.numerics import assert_as_exact_as_eager
from torch import Tensor, nn

import lcw_ops
from lcw_ops.conversion import building

STEPS = 20

KINDS = ("lcw", "gmp", "weight_norm")

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="not installed: transformers (lcw-ops[hosts])")
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (lcw-ops[hosts])")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _quiet():
    """torch's exporters log thousands of records, which pytest would keep."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# ---- Hosts: each function returns a model and its keyword arguments --------------------------------------------------


class Classifier(nn.Module):
    """The last state of an nn.LSTM, classified by two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(tokens))
        return self.head(torch.relu(self.hidden(states[:, -1])))


def lstm() -> tuple[nn.Module, dict]:
    return Classifier(), {"tokens": torch.randint(0, 30, (6, 7))}


def encoder() -> tuple[nn.Module, dict]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(4, 6, 16)}


def _transformer_sizes(**more) -> dict:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return {**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **more}


def bert() -> tuple[nn.Module, dict]:
    import transformers

    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **_transformer_sizes())
    tokens = torch.randint(0, 50, (4, 8))
    return transformers.BertForMaskedLM(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def gpt2() -> tuple[nn.Module, dict]:
    import transformers

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "use_cache": False}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        **sizes, **dropout, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (4, 8))}


def vit() -> tuple[nn.Module, dict]:
    import transformers

    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **_transformer_sizes())
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16)}


def resnet() -> tuple[nn.Module, dict]:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}


def convnext() -> tuple[nn.Module, dict]:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5)
    return transformers.ConvNextForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}


def hifigan() -> tuple[nn.Module, dict]:
    import transformers

    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=4,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    vocoder = transformers.SpeechT5HifiGan(config)
    vocoder.apply_weight_norm()
    return vocoder, {"spectrogram": torch.randn(2, 6, 4)}


OF_TORCH = (lstm, encoder)
OF_TRANSFORMERS = (bert, gpt2, vit, resnet, convnext, hifigan)
HOSTS = [*OF_TORCH, *(pytest.param(host, marks=needs_transformers) for host in OF_TRANSFORMERS)]


def output_of(result) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits


def take_all(name: str, module: nn.Module) -> bool:
    return True


def to_double(inputs: dict) -> dict:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def train(model: nn.Module, inputs: dict, steps: int = STEPS) -> float:
    """Fit fixed targets that are drawn at random; the last loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = torch.randn(output_of(model(**inputs)).shape, generator=generator)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = torch.tensor(math.nan)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (output_of(model(**inputs)) - target).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def converted(host: Callable, kind: str) -> tuple[nn.Module, dict, lcw_ops.conversion.Report]:
    model, inputs = host()
    report = lcw_ops.convert(model, kind, filter=take_all, inputs=inputs)
    return report.model, inputs, report


# ---- Convert, train, fold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_convert_train_fold(host, kind):
    """The folded model's error against the float64 twin is at most twice the unfolded model's."""
    model, inputs, report = converted(host, kind)
    assert report.changed
    assert report.output_change.value < (2 if kind == "lcw" else 1e-5)
    before = train(model, inputs, steps=1)
    after = train(model, inputs)
    assert after < before
    model.eval()
    folded_report = lcw_ops.fold(model, inputs=inputs)
    folded = folded_report.model
    assert len(folded_report.changed) == len(report.changed)
    assert not any(isinstance(module, building.OURS) for module in folded.modules())
    assert not lcw_ops.fold(folded).changed
    with torch.no_grad():
        actual, unfolded = output_of(folded(**inputs)), output_of(model(**inputs))
        exact = output_of(copy.deepcopy(model).double()(**to_double(inputs)))
    assert_as_exact_as_eager("folded", actual, unfolded, exact)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_left(host):
    model, _ = host()
    report = lcw_ops.convert(model, "lcw", dry_run=True)
    left = {entry.type: entry.reason for entry in report.left}
    expected = {
        lstm: {"LSTM": "parameters, not layers"},
        encoder: {"MultiheadAttention": "input projections"},
        bert: {"Linear": "tied: bert.embeddings.word_embeddings.weight and cls.predictions.decoder.weight"},
        gpt2: {"Conv1D": "not an nn.Linear: its weight is stored transposed"},
        hifigan: {"ConvTranspose1d": "units of a transposed convolution"},
    }
    for kind, reason in expected.get(host, {}).items():
        assert reason in left[kind]
    if host in (resnet, convnext):
        assert not left


SEEDS = 5


def pairs_of_tokens(seed: int) -> Iterator[tuple[dict, Tensor]]:
    """20 batches, and one to judge by: a token's label is the mean of itself and the token before it."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS + 1):
        tokens = torch.randint(0, 50, (256 if step == STEPS else 32, 8), generator=generator)
        yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, (tokens + tokens.roll(1, 1)) // 2


def digits(seed: int) -> Iterator[tuple[dict, Tensor]]:
    """20 batches of scikit-learn's images of digits, enlarged, and one batch to judge by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    images = nn.functional.interpolate(images.unsqueeze(1), size=32).expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for index in [*order[: 32 * STEPS].split(32), order[-256:]]:
        yield {"pixel_values": images[index]}, labels[index]


def loss_on_new_data(model: nn.Module, data: Iterable[tuple[dict, Tensor]]) -> float:
    """Train on all batches but the last, and judge by that one, with its own statistics in batch norm."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    *batches, (inputs, labels) = data
    model.train()

    def loss_of(inputs: dict, labels: Tensor) -> Tensor:
        scores = output_of(model(**inputs))
        return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())

    for batch in batches:
        optimizer.zero_grad()
        loss_of(*batch).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(inputs, labels))


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("host", "data"), [(bert, pairs_of_tokens), (resnet, digits)])
def test_no_worse_after_twenty_steps(host, data, kind):
    """The mean loss on new data exceeds the plain model's by at most two standard errors.

    Both models of a seed start from the same values and see the same data, so the differences are paired. Their
    standard error can be far below what the seed does to the plain model, and that counts as noise too: the standard
    error of the difference of two means of plain models, each over as many seeds.
    """
    plain_losses, losses = [], []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        plain, _ = host()
        if host is resnet:
            plain.classifier[-1] = nn.Linear(16, 10)
        other = copy.deepcopy(plain)
        lcw_ops.convert(other, kind, inputs=next(data(seed))[0])
        plain_losses.append(loss_on_new_data(plain, data(seed)))
        losses.append(loss_on_new_data(other, data(seed)))
    # Something has been learned: a model that knows nothing has the loss log(classes).
    assert statistics.mean(plain_losses) < math.log(10 if host is resnet else 50) - 0.2
    differences = [ours - plain for ours, plain in zip(losses, plain_losses, strict=True)]
    paired = statistics.stdev(differences) / math.sqrt(SEEDS)
    spread = statistics.stdev(plain_losses) * math.sqrt(2 / SEEDS)
    margin = 2 * max(paired, spread)
    assert statistics.mean(differences) <= margin, f"plain {plain_losses}, {kind} {losses}, margin {margin:.3g}"


# ---- Export ----------------------------------------------------------------------------------------------------------


class OutputOnly(nn.Module):
    """The host, with tensors as its arguments and its output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return output_of(self.model(**dict(zip(self.names, tensors, strict=True))))


def trained_and_folded(host: Callable, kind: str) -> tuple[nn.Module, tuple[Tensor, ...], Tensor, Tensor]:
    """The folded model, its inputs, its output, and the float64 twin's."""
    model, inputs, _ = converted(host, kind)
    train(model, inputs, steps=2)
    folded = OutputOnly(lcw_ops.fold(model.eval()).model, list(inputs)).eval()
    with torch.no_grad():
        twin = OutputOnly(copy.deepcopy(folded.model).double(), list(inputs))
        exact = twin(*to_double(inputs).values())
        return folded, tuple(inputs.values()), folded(*inputs.values()), exact


_LOAD = """
import sys
sys.modules["lcw_ops"] = None
import torch
program = torch.export.load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
with torch.no_grad():
    torch.testing.assert_close(program.module()(*inputs), expected)
"""


@pytest.mark.parametrize("host", HOSTS)
def test_export_after_fold_runs_without_this_package(host, tmp_path):
    kind = KINDS[[*OF_TORCH, *OF_TRANSFORMERS].index(host) % 3]
    folded, inputs, output, exact = trained_and_folded(host, kind)
    with torch.no_grad():
        program = torch.export.export(folded, inputs)
        assert_as_exact_as_eager("exported", program.module()(*inputs), output, exact)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("lcw_ops" in name for name in names)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((inputs, output), tmp_path / "case.pt")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "case.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Recurrences(nn.Module):
    """Both recurrences, of 300 steps: more than torch.jit.trace would unroll."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = lcw_ops.nn.OrthogonalFilterMLP(4, 6, 300, 3)
        self.rnn = lcw_ops.nn.OrthogonalFilterRNN(3, 5, length=300, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.deep(x))[0]


def test_folded_recurrences_export_as_scans(tmp_path):
    model = Recurrences().eval()
    x = torch.randn(2, 300, 4)
    folded = lcw_ops.fold(model).model
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        program = torch.export.export(folded, (x,))
        assert_as_exact_as_eager("exported", program.module()(x), folded(x), exact)
        assert len(program.graph.nodes) < 100
        torch.export.save(program, tmp_path / "model.pt2")
        torch.save(((x,), folded(x)), tmp_path / "case.pt")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "case.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_onnx
@pytest.mark.parametrize("host", HOSTS)
def test_onnx_after_fold(host, tmp_path):
    import onnxruntime

    kind = KINDS[([*OF_TORCH, *OF_TRANSFORMERS].index(host) + 1) % 3]
    folded, inputs, output, exact = trained_and_folded(host, kind)
    path = tmp_path / "model.onnx"
    torch.onnx.export(folded, inputs, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    (result,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=False)})
    # onnxruntime sums in an order of its own, as a second eager implementation would.
    eager_error = float((output.double() - exact).abs().max())
    ulp = torch.finfo(torch.float32).eps * float(exact.abs().max())
    error = float((torch.from_numpy(result).double() - exact).abs().max())
    assert error <= 4 * (eager_error + ulp), f"error {error:.3g}, torch's {eager_error:.3g}"


# ---- Saving and loading ----------------------------------------------------------------------------------------------


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
def test_save_load_convert_load(kind, tmp_path):
    """Load the plain model, convert it the same way, then load the converted state dict."""
    import transformers

    model, inputs = bert()
    model.save_pretrained(tmp_path / "plain")
    lcw_ops.convert(model, kind)
    train(model, inputs, steps=2)
    torch.save(model.state_dict(), tmp_path / "converted.pt")
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "plain")
    lcw_ops.convert(loaded, kind)
    loaded.load_state_dict(torch.load(tmp_path / "converted.pt"))
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, rtol=0, atol=0)


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
def test_fold_save_load(kind, tmp_path):
    """The other order that works: the folded model is a plain one for transformers."""
    import transformers

    model, inputs = bert()
    lcw_ops.convert(model, kind)
    train(model, inputs, steps=2)
    folded = lcw_ops.fold(model.eval()).model
    folded.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, folded(**inputs).logits, rtol=0, atol=0)
    lcw_ops.convert(loaded, kind)
    assert type(loaded.cls.predictions.transform.dense) is type(model.cls.predictions.transform.dense)


@needs_transformers
def test_a_converted_checkpoint_does_not_load_into_a_plain_model(tmp_path):
    """transformers draws what a checkpoint lacks anew, with a warning alone, so the order matters."""
    import transformers

    model, _ = bert()
    lcw_ops.convert(model, "lcw")
    model.save_pretrained(tmp_path)
    _, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any(key.endswith("query.weight") for key in info["missing_keys"])
    assert any(key.endswith("query.weight_u") for key in info["unexpected_keys"])
    plain, _ = bert()
    with pytest.raises(RuntimeError, match="weight_u"):
        plain.load_state_dict(model.state_dict())


def test_no_library_is_needed_for_torchs_hosts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for host in OF_TORCH:
            model, inputs, report = converted(host, "weight_norm")
            assert report.output_change.value < 1e-6
            assert output_of(model(**inputs)).isfinite().all()
