"""The parts of a pipeline beside its network, VAE and text encoders: their weights looked at without building them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from fewstep.config import UserError
from fewstep.networks.weights import NotFinite, check_whole, not_finite, plain_of, refuse_wrapped
from fewstep.networks.wrapped import WRAPPERS


def examine(sub: Path, said: str, library: str = "diffusers") -> int:
    """Read every tensor that a library loads from a part's folder, one at a time; returns how many there are.

    They would otherwise be met by whatever first decodes a sample or embeds a prompt, after the training.

    Raises:
        NotFinite: one holds NaN or infinity.
        UserError: all names have what a wrapper left in them, so that none would be found; or a damaged file.
    """
    count, names = 0, []
    files = plain_of(check_whole(sub, said), library)
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
    # A name may hold such a part of its own; in front of all of them nothing but a wrapper puts one.
    fronts = {name.partition(".")[0] for name in names}
    if len(fronts) == 1 and fronts <= {*WRAPPERS}:
        refuse_wrapped(sorted(names), [name.partition(".")[2] for name in names], sub, said, files)
    return count
