"""The index of a part that is saved in shards: whether it says truly which file holds which tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.config import UserError
from fewstep.files import read_json
from fewstep.networks.hub import mend
from fewstep.networks.wrapped import index_files

MUST = 'it must hold {"metadata": {}, "weight_map": {TENSOR: SHARD, ...}}'
"""What an index is."""


def check_index(sub: Path, said: str, files: Sequence[Path], variant: str = "", single_first: bool = False) -> None:
    """UserError for shards without index, for an index that is none, and for a tensor in another shard than it says.

    Libraries read every shard whole, so that a tensor in two of them is the last one's, whatever the index says.

    Args:
        sub: the folder.
        said: what messages begin with.
        files: those of its safetensors files that are read.
        variant: fp16 or the like, "" for none; the indexes of others are not looked at.
        single_first: whether a file that is no shard is read in place of them, as transformers does.
    """
    indexes = [i for i in index_files(sub) if _variant(i) == variant]
    names = {i.name.partition(".safetensors.index")[0] for i in indexes}
    alone = {f.stem for f in files}
    for index in indexes:
        if not (single_first and index.name.partition(".safetensors.index")[0] in alone):
            _check(index, sub, said)
    for file in files:
        shard = re.fullmatch(r"(.+)-\d+-of-(\d+)", file.stem)
        if shard and not {shard[1], shard[1].partition(".")[0]} & (names | alone):
            raise UserError(
                f"{said}: {sub.name}/{file.name} is one of {int(shard[2])} shards, and "
                f"{shard[1]}.safetensors.index.json, which says what each of them holds, is missing; copy it from the "
                f"original folder{mend(sub)}"
            )


def _variant(index: Path) -> str:
    """Of NAME.safetensors.index.VARIANT.json, or NAME.VARIANT.safetensors.index.json as older ones are named."""
    stem, _, rest = index.name.partition(".safetensors.index")
    return rest.removesuffix(".json").strip(".") or stem.partition(".")[2]


def _check(index: Path, sub: Path, said: str) -> None:
    from safetensors import safe_open

    again = f"copy it from the original folder{mend(sub)}"
    try:
        told = read_json(index)
    except UserError as error:
        raise UserError(f"{said}: {error}; {MUST}: {again}") from None
    held = told.get("weight_map")
    if not isinstance(held, dict) or not held or not all(isinstance(f, str) for f in held.values()):
        raise UserError(f"{said}: {sub.name}/{index.name}: weight_map names no shard of any tensor; {MUST}: {again}")
    if not isinstance(told.get("metadata"), dict):
        raise UserError(f"{said}: {sub.name}/{index.name}: lacks metadata; {MUST}: {again}")
    for name in sorted(set(held.values())):
        shard = sub / name
        if shard.parent != sub or not shard.is_file():
            tensor = next(k for k, f in held.items() if f == name)
            raise UserError(
                f"{said}: {sub.name}/{index.name} says that {tensor} is in {name}, which is not in {sub.name}/; {again}"
            )
        if shard.suffix != ".safetensors":
            continue
        with safe_open(shard, framework="pt") as opened:
            other = next((k for k in opened.keys() if held.get(k, name) != name), None)  # noqa: SIM118  not a dict
        if other is not None:
            raise UserError(
                f"{said}: {sub.name}/{name} holds {other}, which {index.name} says is in {held[other]}; the shards are "
                f"of two saves: copy them and the index from one folder{mend(sub)}"
            )
