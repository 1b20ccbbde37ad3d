"""Train a house classifier: ``python -m fewstep.eval.tools.train_house --data digits --out assets/house-digits``.

The weights depend on the seed alone on one machine and one torch version; another CPU may round
differently, which is why the shipped file is pinned by hash instead of being rebuilt on use.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.eval.features.house import (
    WEIGHTS_NAME,
    HouseClassifier,
    HouseDigits,
    HouseFashion,
    accuracy,
    parameter_count,
)
from fewstep.eval.protocol.datasets import digits, fashion_mnist
from fewstep.files import atomic_path, commit, file_sha256


@dataclass(frozen=True)
class Plan:
    """One data set's network, length and augmentation.

    `shift` is in pixels (fractional, bilinear), `noise` an upper standard deviation in levels of 255.
    """

    network: type[HouseClassifier]
    epochs: int
    batch_size: int
    shift: float
    noise: float
    learning_rate: float = 3e-3
    flip: bool = False


PLANS = {
    "digits": Plan(HouseDigits, epochs=120, batch_size=64, shift=0.75, noise=24.0),
    "fashion-mnist": Plan(HouseFashion, epochs=6, batch_size=128, shift=1.0, noise=16.0, flip=True),
}


def split_digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits cut into 80 % for training and 20 % held out, per class, by `seed`."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    held: list[Tensor] = []
    for label in range(10):
        members = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(members), generator=generator)
        held.append(members[order[: round(0.2 * len(members))]])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return images[~mask], labels[~mask], images[mask], labels[mask]


def augment(images: Tensor, plan: Plan, generator: torch.Generator) -> Tensor:
    """Images (N, 1, H, W) in [0, 255] under random sub-pixel shifts, flips where allowed, and noise."""
    count, _, height, width = images.shape
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * plan.shift
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    matrix[:, 0, 2], matrix[:, 1, 2] = shift[:, 0] * 2 / width, shift[:, 1] * 2 / height
    if plan.flip:
        matrix[:, 0, 0] = (torch.rand(count, generator=generator) < 0.5).float() * 2 - 1
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    level = torch.rand(count, 1, 1, 1, generator=generator) * plan.noise
    return (moved + level * torch.randn(images.shape, generator=generator)).clamp(0, 255)


def train(name: str, seed: int = 0, epochs: int | None = None) -> tuple[HouseClassifier, float]:
    """Train the classifier of data set `name`; returns it with its accuracy on held-out images."""
    plan = PLANS[name]
    if name == "digits":
        images, labels, held_images, held_labels = split_digits(seed)
    else:
        images, labels = fashion_mnist("train")
        held_images, held_labels = fashion_mnist("test")
    epochs = epochs or plan.epochs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = plan.network()
    generator = torch.Generator().manual_seed(seed + 1)
    steps = epochs * math.ceil(len(images) / plan.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(plan.batch_size):
            logits = network.logits(augment(images[rows].float(), plan, generator))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    return network, accuracy(network, held_images, held_labels)


def card(name: str, network: HouseClassifier, held_out: float, digest: str, command: str) -> str:
    """README text of the asset folder."""
    source = {
        "digits": "scikit-learn's digits (1,797 images of 8x8; UCI optical digits, BSD-licensed in "
        "scikit-learn), 80 % of each class; the rest is the held-out set",
        "fashion-mnist": "Fashion-MNIST (Zalando Research, MIT licence), the 60,000 training images; "
        "the 10,000 test images are the held-out set",
    }[name]
    rows = (
        f"# {network.name}\n",
        "A small convolutional classifier. fewstep's evaluation uses its 64 penultimate values (before the",
        "activation) as features and its logits for class accuracy. It says nothing about natural images.\n",
        "| | |",
        "|---|---|",
        f"| file | `{WEIGHTS_NAME}`, safetensors, fp32, {parameter_count(network):,} parameters |",
        f"| sha256 | `{digest}` |",
        f"| trained on | {source} |",
        f"| held-out accuracy | {100 * held_out:.2f} % (measured, one seed) |",
        f"| made by | `{command}` |",
        f"| commit | {commit()} (the state this command was run on) |",
        f"| torch | {torch.__version__}, CPU, {torch.get_num_threads()} threads |",
        "| licence | Apache-2.0 |",
        "\nThe digest is pinned in `eval/features/house.py`. Training again elsewhere gives an equally good but not",
        "bit-identical network; a new one means new reference statistics and incomparable numbers.",
    )
    return "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.tools.train_house", description=__doc__)
    parser.add_argument("--data", choices=sorted(PLANS), default="digits")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and card")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    network, held_out = train(options.data, options.seed)
    target = options.out / WEIGHTS_NAME
    with atomic_path(target) as temporary:
        save_file(network.state_dict(), temporary)
    digest = file_sha256(target)
    out = options.out.as_posix() if not options.out.is_absolute() else options.out.name
    command = f"python -m fewstep.eval.tools.train_house --data {options.data} --out {out} --seed {options.seed}"
    (options.out / "README.md").write_text(card(options.data, network, held_out, digest, command))
    print(f"{network.name}: held-out accuracy {100 * held_out:.2f} %, {parameter_count(network):,} parameters")
    print(f"{target}: sha256 {digest}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
