"""Layouts with attention: torch's own modules, ViT, Swin, DETR, language models with tied embeddings, prompts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, registry

MODELS, model = registry()

INTEGERS = {"input -> output": "the first input is torch.int64"}


@model
def multihead_attention() -> Entry:
    x = torch.randn(2, 5, 8)
    return Entry(nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x), rows=("out_proj", "MultiheadAttention"))


@model
def transformer_encoder() -> Entry:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    rows = ("layers.0.self_attn", "layers.0.self_attn.out_proj", "layers.1.norm2")
    return Entry(nn.TransformerEncoder(layer, 2), torch.randn(3, 7, 16), rows=rows)


@model
def transformer() -> Entry:
    """torch's default: time first."""
    net = nn.Transformer(16, 4, 1, 1, 32)
    inputs = torch.randn(7, 3, 16), torch.randn(5, 3, 16)
    return Entry(net, inputs, rows=("decoder.layers.0.multihead_attn", "encoder.layers.0.self_attn"))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


@model
def vit() -> Entry:
    return Entry(ViT(), torch.randn(2, 3, 8, 8), rows=("patch", "encoder.layers.1.self_attn", "ViT"))


class WindowAttention(nn.Module):
    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.relative_position_bias = nn.Parameter(torch.randn(heads, window**2, window**2))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        side = self.window
        windows = x.view(batch, height // side, side, width // side, side, channels).transpose(2, 3)
        tokens = self.qkv(windows.reshape(-1, side**2, channels)).unflatten(2, (3, self.heads, -1))
        query, key, value = tokens.permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / query.shape[-1] ** 0.5 + self.relative_position_bias
        mixed = self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return mixed.view(batch, height // side, width // side, side, side, channels).transpose(2, 3).reshape(x.shape)


class SwinBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), WindowAttention(channels, 2, 2)
        self.norm2, self.mlp = nn.LayerNorm(channels), nn.Sequential(nn.Linear(channels, 16), nn.GELU())
        self.out = nn.Linear(16, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x.roll((1, 1), (1, 2))))
        return x + self.out(self.mlp(self.norm2(x)))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block1 = nn.Conv2d(3, 8, 2, 2), SwinBlock(8)
        self.merge, self.block2 = nn.Linear(32, 8, bias=False), SwinBlock(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.patch(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.head(self.block2(self.merge(x)).mean((1, 2)))


@model
def swin() -> Entry:
    return Entry(Swin(), torch.randn(2, 3, 16, 16), rows=("block1.attn", "block2", "merge"))


class Detr(nn.Module):
    """Learned queries go into a transformer as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.queries = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(6, 16))
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.classes, self.boxes = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        memory = self.backbone(images).flatten(2).mT
        found = self.transformer(memory, self.queries.expand(len(images), -1, -1))
        return {"logits": self.classes(found), "boxes": self.boxes(found).sigmoid()}


@model
def detr() -> Entry:
    # The default loss reads the first output only.
    return Entry(Detr(), torch.randn(2, 3, 16, 16), rows=("transformer.decoder.layers.0.multihead_attn", "Detr"))


class TiedLanguageModel(nn.Module):
    """A causal language model whose head shares the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, 16), nn.Embedding(9, 16)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


@model
def tied_embeddings() -> Entry:
    return Entry(TiedLanguageModel(), torch.randint(20, (2, 9)), absent=INTEGERS, rows=("embedding", "head"))


class Prompted(nn.Module):
    """Learned prompts in a ParameterList before a frozen encoder, and a matrix that is read by F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ParameterList(torch.randn(2, 8) for _ in range(2))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).requires_grad_(False)
        self.adapters = nn.ParameterDict({"down": torch.randn(3, 8)})
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        prompts = torch.cat([*self.prompts]).expand(len(x), -1, -1)
        x = self.encoder(torch.cat([prompts, x], 1)).mean(1)
        return F.linear(F.linear(x, self.adapters["down"]), self.head.weight, self.head.bias)


@model
def prompts() -> Entry:
    return Entry(Prompted(), torch.randn(3, 5, 8), rows=("prompts", "adapters", "head", "encoder.self_attn"))
