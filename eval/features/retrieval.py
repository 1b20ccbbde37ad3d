"""Does a picture show its caption? A small contrastive model of pictures and captions, and the share it finds again."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.eval.errors import InputError
from fewstep.eval.features.base import as_pixels, state_sha256
from fewstep.eval.metrics.estimate import Estimate
from fewstep.files import atomic_path, expanded, parse_json

WEIGHTS_NAME = "model.safetensors"


class Contrastive(nn.Module):
    """Two towers into one space: a convolutional one for pictures, a linear one for text features.

    Args:
        size: side of a picture.
        text: width of the text features.
        width: channels of the first convolution; it doubles with every halving of the side.
        dim: of the common space.
    """

    def __init__(self, size: int, text: int, width: int = 24, dim: int = 64) -> None:
        super().__init__()
        if size % 8:
            raise ValueError(f"size must be a multiple of 8, not {size}")
        self.size = size
        layers: list[nn.Module] = []
        for first, second in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [
                nn.Conv2d(first, second, 3, padding=1),
                nn.GroupNorm(8, second),
                nn.SiLU(),
                nn.AvgPool2d(2),
            ]
        self.picture = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, dim))
        self.text = nn.Linear(text, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def images(self, images: Tensor) -> Tensor:
        """(N, 1 or 3, size, size) in [0, 255] -> unit vectors (N, dim)."""
        pixels = as_pixels(images, channels=3, size=self.size).to(self.text.weight.device)
        return functional.normalize(self.picture(pixels / 127.5 - 1), dim=1)

    def texts(self, features: Tensor) -> Tensor:
        """Text features (N, text) -> unit vectors (N, dim)."""
        return functional.normalize(self.text(features), dim=1)


def contrastive_loss(pictures: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy of matching rows (arXiv 2103.00020, fig. 3); unit vectors (N, d) each."""
    logits = scale * pictures @ texts.T
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def retrieval_accuracy(scores: Tensor, own: Tensor, among: int = 100, seed: int = 0) -> Estimate:
    """Share of pictures whose own caption scores above `among` - 1 others, drawn anew for each picture.

    Args:
        scores: (N, M), of each picture for each of M distinct captions.
        own: int64 (N,), the caption that each picture was asked for.
        among: captions that compete, 2..M. A tie is a miss, so that a model that tells nothing apart scores 0.

    The standard error is over pictures. Raises ValueError for shapes, indices or scores that make no sense.
    """
    if scores.ndim != 2 or own.shape != scores.shape[:1] or not len(scores):
        raise ValueError(f"scores, own: shapes {tuple(scores.shape)} and {tuple(own.shape)} do not match")
    count = scores.shape[1]
    if not 2 <= among <= count:
        raise ValueError(f"among must lie in 2..{count}, the number of captions, not {among}")
    if own.min() < 0 or own.max() >= count:
        raise ValueError(f"own: expected 0..{count - 1}, got {int(own.min())}..{int(own.max())}")
    if not torch.isfinite(scores).all():
        raise ValueError("scores: values that are not finite")
    generator = torch.Generator().manual_seed(seed)
    hits = 0
    for row, mine in zip(scores.cpu(), own.tolist(), strict=True):
        others = torch.randperm(count - 1, generator=generator)[: among - 1]
        others = others + (others >= mine)  # numbers without `mine`
        hits += int((row[mine] > row[others]).all())
    share = hits / len(scores)
    return Estimate(value=share, standard_error=math.sqrt(share * (1 - share) / len(scores)))


@dataclass(frozen=True)
class Retrieval:
    """A trained model with the captions that it knows and their text features (M, text)."""

    network: Contrastive
    captions: tuple[str, ...]
    features: Tensor

    @property
    def sha256(self) -> str:
        """Of the weights and the captions."""
        content = json.dumps([state_sha256(self.network), self.captions])
        return hashlib.sha256(content.encode()).hexdigest()

    @torch.no_grad()
    def accuracy(self, images: Tensor, own: Tensor, among: int = 100, seed: int = 0) -> Estimate:
        """`retrieval_accuracy` of pictures (N, 3, size, size) in [0, 255] for captions by number (N,)."""
        pictures = torch.cat([self.network.images(part) for part in images.split(64)])
        return retrieval_accuracy(pictures @ self.network.texts(self.features).T, own, among, seed)

    def save(self, folder: Path) -> Path:
        """Write folder/model.safetensors."""
        state = {f"network.{k}": v.contiguous() for k, v in self.network.state_dict().items()}
        told = {"captions": json.dumps(self.captions), "size": str(self.network.size)}
        target = folder / WEIGHTS_NAME
        with atomic_path(target) as temporary:
            save_file(state | {"features": self.features.contiguous()}, temporary, metadata=told)
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Retrieval:
        """A model that `save` wrote. FileNotFoundError or ValueError says what is wrong with the folder."""
        path = expanded(folder) / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no retrieval model; train it with `fewstep train-retrieval`")
        try:
            with safe_open(path, framework="pt") as archive:
                told = archive.metadata() or {}
                tensors = {k: archive.get_tensor(k) for k in archive.keys()}  # noqa: SIM118
            features = tensors.pop("features")
            state = {k.removeprefix("network."): v for k, v in tensors.items()}
            width, dim = state["picture.0.weight"].shape[0], state["text.weight"].shape[0]
            network = Contrastive(int(told["size"]), features.shape[1], width, dim)
            network.load_state_dict(state)
            captions = tuple(parse_json(told["captions"], "captions"))
        except Exception as error:  # safetensors has error types of its own
            raise InputError(f"{path}: not a retrieval model: {error}") from None
        return cls(network.requires_grad_(False).eval(), captions, features)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 255] moved, scaled, mirrored, dimmed, blurred and under noise.

    Samples are softer than drawings: a model that has only seen sharp ones would judge sharpness.
    """
    n, side = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    matrix = torch.zeros(n, 2, 3)
    zoom = uniform(0.9, 1.1)
    matrix[:, 0, 0] = zoom * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    matrix[:, 1, 1] = zoom
    matrix[:, :, 2] = uniform(-4 / side, 4 / side, 2)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    x = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, uniform(0, 1, 1, 1, 1))
    x = 255 - (255 - x) * uniform(0.8, 1.2, 3, 1, 1)
    return (x + uniform(0, 25, 1, 1, 1) * torch.randn(x.shape, generator=generator)).clamp(0, 255)


def train(
    images: Tensor, features: Tensor, steps: int = 600, batch: int = 64, seed: int = 0, width: int = 24
) -> Contrastive:
    """Train on pictures (N, 3, S, S) in [0, 255] and the text features (N, d) of their captions."""
    if len(images) != len(features) or len(images) < 2:
        raise ValueError(f"images, features: {len(images)} and {len(features)} rows; expected two or more pairs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Contrastive(images.shape[-1], features.shape[1], width)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:batch]
        pictures = network.images(augmented(images[rows].float(), generator))
        texts = network.texts(features[rows])
        loss = contrastive_loss(pictures, texts, network.scale.exp().clamp_max(50))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False).eval()
