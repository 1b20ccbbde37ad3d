"""A LoRA set of a student that was trained whole, of each layer's difference the best of a rank (Eckart, Young 1936)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.config import UserError
from fewstep.networks.adapters import Adapted, fresh_name, network_of


@dataclass(frozen=True)
class Kept:
    """Shares of the squared difference student - base that a LoRA set keeps.

    layers: of the layers that it adapts. whole: of all weights; norms, biases and embeddings have no adapter.
    """

    layers: float
    whole: float


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A (rank, n), B (m, rank), squared singular values kept) of a matrix (m, n); B A is nearest to it of this rank.

    Both sides carry the root of a singular value; a rank above the matrix's own is filled with zeros.
    """
    u, s, v = torch.linalg.svd(difference.float(), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    a, b = (
        difference.new_zeros(rank, difference.shape[1]).float(),
        difference.new_zeros(difference.shape[0], rank).float(),
    )
    a[:r], b[:, :r] = root[:, None] * v[:r], u[:, :r] * root
    return a, b, float(s[:r].double().square().sum())


@torch.no_grad()
def extracted(base: nn.Module, student: nn.Module, rank: int) -> tuple[Adapted, Kept]:
    """The student as an adapter on the base, and how much of their difference it keeps.

    Args:
        base: the denoiser that the student began as; it carries the adapter then.
        student: of the same network, trained whole.

    Raises UserError for networks of other weights, and where nothing that an adapter reaches has changed.
    """
    one, other = network_of(base), network_of(student)
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    strange = sorted(ours.keys() ^ theirs.keys()) or [k for k in ours if ours[k].shape != theirs[k].shape]
    if strange:
        raise UserError(
            f"the student has other weights than its teacher ({strange[0]}), so no adapter on it is the student"
        )
    gaps = {k: (theirs[k].double() - ours[k].double()).float() for k in ours}
    layers = {n: m for n, m in one.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    names = [
        n
        for n, m in layers.items()
        if getattr(m, "groups", 1) == 1 and bool(gaps.get(f"{n}.weight", torch.zeros(1)).any())
    ]
    if not names:
        raise UserError("no layer that an adapter reaches differs from the teacher's; train the student first")
    adapted = Adapted(base, fresh_name(base), rank=rank, alpha=float(rank), targets=names)
    kept = 0.0
    for name in names:
        weight = gaps[f"{name}.weight"]
        a, b, energy = factors(weight.flatten(1), rank)
        kept += energy
        own = {side: adapted.own[f"{name}.lora_{side}.weight".replace(".", "/")] for side in "AB"}
        own["A"].copy_(a.reshape(own["A"].shape))
        own["B"].copy_(b.reshape(own["B"].shape))
    energies = {k: float(v.double().square().sum()) for k, v in gaps.items()}
    reached = sum(energies[f"{n}.weight"] for n in names)
    return adapted, Kept(kept / reached, kept / sum(energies.values()))
