"""The parts of a pipeline beside its network, VAE and text encoders: their weights looked at without building them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from fewstep.config import UserError
from fewstep.networks.weights import NotFinite, check_whole, not_finite, shell, variant_of
from fewstep.networks.wrapped import WRAPPERS, unwrap, why, wrapping


def examine(sub: Path, said: str, library: str = "diffusers") -> int:
    """Read every tensor that a library loads from a part's folder, one at a time; returns how many there are.

    They would otherwise be met by whatever first decodes a sample or embeds a prompt, after the training.

    Raises:
        NotFinite: one holds NaN or infinity.
        UserError: all names have what a wrapper left in them, so that none would be found; or a damaged file.
    """
    count, names = 0, []
    every = check_whole(sub, said)
    files = [f for f in every if variant_of(f, library) == ""] or every
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
    if len(fronts) == 1 and fronts <= {*WRAPPERS} and (wrapped := wrapping(names, [n.partition(".")[2] for n in names])):
        mark, pairs = wrapped
        first = names[0]
        raise UserError(
            f"{said}: the weights in {sub.name}/ are named as inside a wrapper, with {mark!r} in {first}; {why(mark)}. "
            f"Write them under their own names:\n  {shell(unwrap(files, pairs))}"
        )
    return count
