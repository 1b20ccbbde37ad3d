"""The parts of a pipeline beside its network, VAE and text encoders: their weights looked at without building them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from fewstep.config import UserError
from fewstep.networks.weights import NotFinite, check_whole, not_finite, unwrap, wrapping


def examine(sub: Path, said: str) -> int:
    """Read every tensor of a part's folder, one at a time; returns how many there are.

    They would otherwise be met by whatever first decodes a sample or embeds a prompt, after the training.

    Raises:
        NotFinite: one holds NaN or infinity.
        UserError: all names have what a wrapper left in front of them, so that none would be found; or a damaged file.
    """
    count, names = 0, []
    files = check_whole(sub, said)
    for file in files:
        try:
            with safe_open(file, framework="pt") as archive:
                for name in archive.keys():  # noqa: SIM118
                    count += 1
                    names.append(name)
                    if found := not_finite([(name, archive.get_tensor(name))]):
                        raise NotFinite(
                            f"{said}: the weights in {sub.name}/ hold NaN or infinity in {found}; save them again in "
                            "float32 from weights that are finite"
                        )
        except (SafetensorError, OSError) as error:
            raise UserError(f"{said}: {sub.name}/{file.name}: cannot be read: {error}") from None
    if wrapped := wrapping(names, []):
        front, pairs = wrapped
        raise UserError(
            f"{said}: all weights in {sub.name}/ have {front!r} in front of their names, so that none of them would be "
            f"found; write them without it:\n  {unwrap(files, pairs)}"
        )
    return count
