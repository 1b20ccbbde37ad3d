"""The two data sets the harness can evaluate on without a download, as pixels in [0, 255]."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.eval.errors import InputError

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (1797, 1, 8, 8) fp32, values 0..16 scaled to [0, 255]; labels (1797,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    return images, torch.from_numpy(bunch.target).long()


def fashion_mnist(split: str = "train", folder: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: images (60000 or 10000, 1, 28, 28) uint8 and labels.

    `folder` (or ``FEWSTEP_FASHION_MNIST``, or where the Debian package ``dataset-fashion-mnist`` puts it)
    holds the four idx files, gzipped or not, or is torchvision's root (FashionMNIST/raw below it).

    Raises:
        FileNotFoundError: the files are not there; the message says how to get them.
        ValueError: an unknown split, or a file that is not what its name says.
    """
    first, second = fashion_files(split, folder)
    images, labels = _read_idx(first, 3), _read_idx(second, 1)
    if len(images) != len(labels):
        raise InputError(f"{first.parent}: {len(images)} images but {len(labels)} labels")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


def fashion_files(split: str = "train", folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """The files of a split's images and labels, found and refused as `fashion_mnist` does."""
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    root = Path(folder or os.environ.get("FEWSTEP_FASHION_MNIST") or FASHION_FOLDER)
    return [_find(root, f"{prefixes[split]}-{name}-ubyte") for name in ("images-idx3", "labels-idx1")]


def _find(root: Path, name: str) -> Path:
    folders = (root, root / "FashionMNIST" / "raw", root / "raw")
    for path in (folder / file for folder in folders for file in (f"{name}.gz", name)):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{root / name}(.gz): no Fashion-MNIST there; `apt-get install dataset-fashion-mnist`, or set "
        "FEWSTEP_FASHION_MNIST to a folder with the four idx files"
    )


def _read_idx(path: Path, rank: int) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged ({error})") from None
    header = 4 + 4 * rank
    # idx: two zero bytes, type 8 (unsigned byte), the rank, then one big-endian length per dimension.
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, rank)):
        raise InputError(f"{path}: not an idx file of {rank}-dimensional bytes")
    shape = tuple(np.frombuffer(raw, ">u4", rank, 4).astype(int))
    if len(raw) - header != int(np.prod(shape)):
        raise InputError(f"{path}: {len(raw) - header} bytes of data, its header promises {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()
