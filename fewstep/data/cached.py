"""Embeddings that go without their encoder: a folder of prompts with their rows, and which encoder made them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import pad

from fewstep.config import REGISTRY, Absent, Count, UserError, part, plain
from fewstep.data.encoders import Embedding, Encode
from fewstep.data.shards import Shards, Sparse, read_index, sha256_of, sparse
from fewstep.data.text import TOKENS, Text
from fewstep.files import LOCK, expanded, read_json, whole_folder

NAME = "prompts.json"
KIND = "folder of embedded prompts"
MADE = "fewstep cache-text RECIPE --out FOLDER"
AGAIN = "copy the folder again"
FACTORED = ("text", "text2")
LEFT, RIGHT = "_left", "_right"


def write_embedded(text: Text, data: Any, folder: Path, rank: int | None = None) -> None:
    """Copy the embeddings of an opened data set out of the cache, with what a `cached` encoder has to know of them.

    Args:
        data: the data set's spec, with the encoder that made them; the folder names it without its place on this machine.
        rank: keep so many directions of the tokens of each prompt, in float16: `factors`. Left out: the very bytes.

    UserError for a folder that is something else's, and for embeddings that came out of such a folder themselves.
    """
    spec, source = data.encoder, text.shards
    if isinstance(spec, CachedEncoder):
        raise UserError(f"--out {folder}: data.encoder {spec.path} is such a folder already; copy it")
    encoder = {k: v for k, v in plain(spec).items() if k not in ("path", "batch", "store") and v is not None}
    here = expanded(spec.path).exists()
    told = {
        "encoder": encoder | {"path": Path(spec.path).name if here else spec.path},
        "zeros": bool(getattr(spec, "zeros_for_empty", bool)()),
        "prompts": [*text.prompts, data.negative],
    }
    with whole_folder(folder, KIND, KIND) as aside:
        if rank is None:
            for name in ("index.json", *(source.path(int(n)).name for n in source.done)):
                shutil.copyfile(source.folder / name, aside / name)
        else:
            _write_factors(source, aside, rank)
            (aside / LOCK).unlink(missing_ok=True)
        (aside / NAME).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")


def factors(tokens: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left (n, rank), right (rank, d)) in float16, whose product is the nearest of that rank to tokens (n, d).

    By the singular value decomposition (Eckart and Young 1936), each singular value shared evenly between the two.
    """
    u, s, v = torch.linalg.svd(tokens.double(), full_matrices=False)
    root, lacks = s[:rank].sqrt(), max(0, rank - len(s))
    left, right = u[:, :rank] * root, root[:, None] * v[:rank]
    return pad(left, (0, lacks)).half(), pad(right, (0, 0, 0, lacks)).half()


def _write_factors(source: Shards, folder: Path, rank: int) -> None:
    """All rows of a folder of shards with factors in place of tokens, `KEY` as `KEY_left` and `KEY_right`."""
    to = Shards(folder, {**source.made_with, "rank": rank}, len(source), len(source))
    parts: dict[str, list[Any]] = {}
    for i in range(len(source)):
        for key, value in source.take(torch.tensor([i])).items():
            if key in FACTORED and value.ndim == 3:
                left, right = factors(value[0], rank)
                parts.setdefault(f"{key}{LEFT}", []).append(sparse(left))
                parts.setdefault(f"{key}{RIGHT}", []).append(right)
            else:
                parts.setdefault(key, []).append(sparse(value[0]) if key in TOKENS else value[0])
    to.write(range(len(source)), {k: v if isinstance(v[0], Sparse) else torch.stack(v) for k, v in parts.items()})


def _whole(row: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A row of a folder with the products, in float32, of what is stored as factors."""
    left, right = ({k.removesuffix(end): v for k, v in row.items() if k.endswith(end)} for end in (LEFT, RIGHT))
    if alone := left.keys() ^ right.keys():
        raise UserError(f"{folder}: its rows have one factor of {min(alone)} and not the other; {AGAIN}")
    out = {k: v for k, v in row.items() if not k.endswith((LEFT, RIGHT))}
    return out | {k: v.float() @ right[k].float() for k, v in left.items()}


def with_encoder(data: Any, folder: str) -> Any:
    """A data set's spec whose cached prompts are joined by others, which the encoder in a folder embeds."""
    if not isinstance(data.encoder, CachedEncoder):
        raise UserError(f"--encoder {folder}: these data have an encoder of their own, {data.encoder.name}; leave it out")
    return replace(data, encoder=replace(data.encoder, encoder=folder))


@part("encoder", "cached")
class CachedEncoder:
    """Prompts that were embedded before: a folder that `fewstep cache-text --out` wrote, in place of their encoder."""

    path: str
    """The folder; `assets:NAME` is one that ships."""
    encoder: str | None = None
    """Folder of the encoder that made them, for other prompts; no other encoder will do."""
    batch: Count = 32
    """Prompts at once."""
    store: ClassVar[None] = None

    def files(self) -> list[Path]:
        """Index, prompts and rows. UserError naming one that is missing, or prompts that do not go with the rows."""
        shards = self._shards()
        found = [shards.folder / "index.json", shards.folder / NAME, *(shards.path(int(n)) for n in shards.done)]
        for path in found:
            if not path.is_file():
                raise UserError(f"{path}: is missing; {AGAIN}")
        return found

    def key(self) -> str:
        return sha256_of(self.files(), self._root())

    def zeros_for_empty(self) -> bool:
        """As the folder of their encoder has it."""
        return bool(self._told()["zeros"])

    @property
    def length(self) -> int | None:
        """Tokens of a prompt, where their encoder was told."""
        length = self._told()["encoder"].get("length")
        return length if isinstance(length, int) else None

    def open(self, device: torch.device | str = "cpu") -> Encode:
        """Rows by prompt as they are stored, on the CPU; `encoder` is loaded for a prompt that has none.

        UserError for a folder that is not whole, and for such a prompt without an encoder, or with another one.
        """
        told, shards = self._told(), self._shards()
        shards.check()
        number = {prompt: i for i, prompt in reversed([*enumerate(told["prompts"])])}
        loaded: list[Encode] = []

        def stored(i: int) -> dict[str, Tensor]:
            return _whole({k: v[0] for k, v in shards.take(torch.tensor([i])).items()}, shards.folder)

        def row(prompt: str) -> dict[str, Tensor]:
            if prompt in number:
                return stored(number[prompt])
            if not loaded:
                loaded.append(self._maker(told, prompt).open(device))
            like = stored(0)
            return {k: v[0].to("cpu", like[k].dtype) for k, v in loaded[0]([prompt]).items()}

        def encode(prompts: Sequence[str]) -> Embedding:
            rows = [row(p) for p in prompts]  # one by one: a batch's would be as long as the longest
            return {key: [r[key] for r in rows] for key in rows[0]}

        return encode

    def _maker(self, told: dict[str, Any], prompt: str) -> Any:
        """The encoder that made the rows. UserError where it is not named, or is another one."""
        spec, origin = told["encoder"], str(read_index(self._root())["made_with"].get("encoder"))
        options = "".join(f", {k} {json.dumps(v)}" for k, v in spec.items() if k not in ("name", "path"))
        made_by = f"{spec.get('path')} ({spec['name']}{options}, sha256 {origin[:16]}…)"
        if self.encoder is None:
            raise UserError(
                f"encoder {self.path}: has no embedding of {prompt[:60]!r}, only those of its {len(told['prompts']) - 1} "
                f"prompts, in {NAME}; any other needs the encoder that made them, {made_by}: name its folder, `fewstep "
                "sample --encoder FOLDER`, or data.encoder.encoder=FOLDER in a recipe"
            )
        kind: TypeAdapter[Any] = TypeAdapter(REGISTRY["encoder"][spec["name"]])
        try:
            made = kind.validate_json(json.dumps({**spec, "path": self.encoder}))
        except ValidationError as error:
            raise UserError(f"{self._root() / NAME}: encoder: {error.errors()[0]['msg']}; {AGAIN}") from None
        if made.key() != origin:
            raise UserError(
                f"encoder {self.path}: was made by {made_by}, and {self.encoder} is not that one (sha256 "
                f"{made.key()[:16]}…), so their embeddings do not go together"
            )
        return made

    def _root(self) -> Path:
        root = expanded(self.path)
        if not root.is_dir():
            raise Absent(f"encoder {self.path}: no such folder; `{MADE}` writes one")
        return root

    def _told(self) -> dict[str, Any]:
        """What prompts.json says. UserError naming the file and what of it is not as it was written."""
        file = self._root() / NAME
        if not file.is_file():
            raise UserError(f"{file}: is missing; `{MADE}` writes it beside the embeddings")
        told = read_json(file)
        for key, kind, what in (("encoder", dict, "keys"), ("zeros", bool, "true or false"), ("prompts", list, "a list")):
            if not isinstance(told.get(key), kind):
                shown = json.dumps(told[key])[:60] if key in told else "missing"
                raise UserError(f"{file}: {key} is {shown}, expected {what}; {AGAIN}")
        if not all(isinstance(p, str) for p in told["prompts"]) or told["encoder"].get("name") not in REGISTRY["encoder"]:
            raise UserError(f"{file}: prompts are not all texts, or encoder.name is not known; {AGAIN}")
        return told

    def _shards(self) -> Shards:
        root, prompts = self._root(), self._told()["prompts"]
        count = read_index(root)["count"]
        if count != len(prompts):
            raise UserError(f"{root / NAME}: has {len(prompts)} prompts, and index.json {count} rows; {AGAIN}")
        return Shards(root, {}, count, remedy=AGAIN)
