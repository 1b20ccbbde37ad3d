"""House classifiers: small networks trained by a shipped command and pinned by hash."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import as_pixels
from fewstep.files import file_sha256

WEIGHTS_NAME = "model.safetensors"


class HouseClassifier(nn.Module):
    """A two-stage convolutional classifier whose 64 pre-activation penultimate values are the features.

    Subclasses fix `name`, `size`, `widths`, `folder` and `pinned`. Smooth activations and average pooling
    keep the features smooth in the image.
    """

    name = ""
    size = 0
    classes = 10
    dim = 64
    widths = (0, 0, 0)
    folder = ""
    pinned = ""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = self.widths
        self.trunk = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(first, second, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(second, third, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(third * (self.size // 4) ** 2, self.dim),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(self.dim, self.classes))
        self.sha256 = ""

    @property
    def input_size(self) -> int:
        return self.size

    def _features(self, images: Tensor) -> Tensor:
        pixels = as_pixels(images, channels=1, size=self.size).to(self.trunk[0].weight.device)
        return self.trunk(pixels / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1 or 3, size, size) in [0, 255] -> (N, 64) fp32."""
        return self._features(images)

    def logits(self, images: Tensor) -> Tensor:
        """(N, 1 or 3, size, size) in [0, 255] -> (N, classes) fp32."""
        return self.head(self._features(images))

    def from_features(self, features: Tensor) -> Tensor:
        """Logits from features already at hand: (N, 64) -> (N, classes)."""
        return self.head(features)

    @classmethod
    def load(cls, path: str | Path | None = None) -> HouseClassifier:
        """The pinned network shipped with fewstep, or the one at `path` (a folder or a .safetensors file).

        Raises:
            FileNotFoundError: no weights there.
            ValueError: weights of another network, or shipped weights whose sha256 is not the pinned one.
        """
        source = Path(path) if path is not None else Path(str(resources.files("fewstep.assets"))) / cls.folder
        if source.is_dir() or source.suffix != ".safetensors":
            source = source / WEIGHTS_NAME
        if not source.is_file():
            raise FileNotFoundError(
                f"{source}: no weights of {cls.name}; make them with "
                f"`python -m fewstep.eval.tools.train_house --data {cls.name.removeprefix('house-')}`"
            )
        digest = file_sha256(source)
        if path is None and digest != cls.pinned:
            raise InputError(f"{source}: sha256 {digest} is not the pinned {cls.pinned}; the file was changed")
        network = cls()
        expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        state = load_file(source)
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise InputError(f"{source}: not weights of {cls.name}; names or shapes differ at {wrong}")
        network.load_state_dict(state)
        network.sha256 = digest
        return network.requires_grad_(False).eval()


class HouseDigits(HouseClassifier):
    """Classifier of scikit-learn's 8x8 digits (pixel values 0..16 scaled to [0, 255])."""

    name = "house-digits"
    size = 8
    widths = (24, 40, 64)
    folder = "house-digits"
    pinned = "8f2e7547ffd075c9103f02f4c8d2495c80b772e1aa235dd089e3422f79d95842"


class HouseFashion(HouseClassifier):
    """Classifier of the 28x28 Fashion-MNIST images."""

    name = "house-fashion-mnist"
    size = 28
    widths = (16, 32, 32)
    folder = "house-fashion-mnist"
    pinned = "2582b8ab153acf97fd4b324cda204c362498374f59c9305c1c73d32e051ad1a8"


def house_digits(path: str | Path | None = None) -> HouseDigits:
    """The pinned digits classifier: 64 features, ten classes, 8x8 images."""
    return HouseDigits.load(path)  # type: ignore[return-value]


def house_fashion(path: str | Path | None = None) -> HouseFashion:
    """The pinned Fashion-MNIST classifier: 64 features, ten classes, 28x28 images."""
    return HouseFashion.load(path)  # type: ignore[return-value]


def parameter_count(network: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def accuracy(network: HouseClassifier, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """Share of `images` classified as their label, in [0, 1]."""
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    hits = sum(int((network.logits(chunk).argmax(dim=1).cpu() == label).sum()) for chunk, label in pairs)
    return hits / len(labels)
