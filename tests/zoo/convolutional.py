"""Convolutional layouts: residual and dense blocks, channels last, skip connections, vocoder, autoencoder."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo.entry import Entry, registry

MODELS, model = registry()


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1, self.layer2 = BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))).flatten(1))


@model
def resnet() -> Entry:
    return Entry(ResNet(), torch.randn(4, 3, 8, 8), rows=("layer1.conv1", "layer2.downsample.0", "fc"))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels)
        self.gamma = nn.Parameter(1e-1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2)


@model
def convnext() -> Entry:
    stem, head = nn.Conv2d(3, 8, 2, 2), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return Entry(nn.Sequential(stem, ConvNeXtBlock(8), head), torch.randn(4, 3, 12, 12), rows=("1", "1.norm", "2.2"))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)
        self.middle, self.up = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        return self.out(torch.cat([skip, self.up(self.middle(self.pool(skip)).relu())], 1))


@model
def unet() -> Entry:
    return Entry(UNet(), torch.randn(2, 1, 8, 8), rows=("up", "out"))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4 + 2 * i, 2, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return x


@model
def densenet() -> Entry:
    return Entry(nn.Sequential(DenseBlock(), nn.Conv1d(10, 3, 1)), torch.randn(3, 4, 9), rows=("0", "0.layers.2"))


@model
def vocoder() -> Entry:
    layers = [weight_norm(nn.Conv1d(8, 16, 7, padding=3)), nn.LeakyReLU(0.1)]
    layers += [weight_norm(nn.ConvTranspose1d(16, 8, 8, 4, 2), dim=1), nn.LeakyReLU(0.1)]
    return Entry(
        nn.Sequential(*layers, weight_norm(nn.Conv1d(8, 1, 7, padding=3)), nn.Tanh()),
        torch.randn(2, 8, 12),
        rows=("0", "2", "4"),
    )


class Autoencoder(nn.Module):
    """Returns the reconstruction, mean and log variance, and draws a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ELU(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp()), mean, log_variance


@model
def variational_autoencoder() -> Entry:
    return Entry(Autoencoder(), torch.randn(6, 12), rows=("encoder.2", "decoder.0"))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.tokens = nn.LayerNorm(8), nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.norm2, self.channels = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


@model
def mixer() -> Entry:
    return Entry(Mixer(), torch.randn(3, 3, 8, 8), rows=("tokens.0", "channels.2"))
