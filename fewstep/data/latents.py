"""Latents computed once by a VAE and kept on disk; a cache is bound to the VAE that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.draws import Draws
from fewstep.config import Absent, UserError, part
from fewstep.data.base import Conditions, EncoderPart, Share
from fewstep.data.conditions import TextConditions
from fewstep.data.reader import split
from fewstep.data.shards import Shards, read_index, sha256_of
from fewstep.data.text import Text, embed
from fewstep.eval.protocol.images import to_pixels
from fewstep.eval.protocol.real import RealPictures, tensor_digest
from fewstep.files import expanded, read_json
from fewstep.networks import hub
from fewstep.networks.folder import read_latents, resolve
from fewstep.networks.weights import load_part, refuse_pickles


def vae_hash(path: str) -> str:
    """sha256 over a VAE folder's config and weights. Raises UserError naming what is missing."""
    return sha256_of(vae_files(path), vae_folder(path))


def vae_files(path: str) -> list[Path]:
    """Config and weights of a VAE folder. Raises UserError naming what is missing."""
    root = vae_folder(path)
    return [root / "config.json", *root.glob("*.safetensors")]


def vae_folder(path: str) -> Path:
    """A folder with a VAE: itself, or vae/ of a pipeline."""
    root = resolve(path)
    for found in (root / "vae", root):
        if (found / "config.json").is_file():
            if any(found.glob("*.safetensors")):
                return found
            kind = str(read_json(found / "config.json").get("_class_name", "AutoencoderKL"))
            refuse_pickles(found, f"vae {path}", "diffusers", kind)
    if not root.is_dir():
        raise Absent(f"vae {path}: no such folder{hub.hint(path)}")
    told = "no config.json with .safetensors weights in it or in its vae/; name a VAE or a pipeline folder"
    raise UserError(f"vae {path}: {told}{hub.mend(root)}")


class Encoder:
    """Pictures in [-1, 1] to mean and deviation of x, both (b, c, h, w) in float32, of a video's VAE (b, c, 1, h, w).

    What makes x of a code is the VAE's own (`fewstep.networks.folder.Latents`). Deviation is zero for an encoder without
    one (AutoencoderDC); a picture is a video of one frame.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        root = vae_folder(path)
        latents = read_latents(root / "config.json")
        assert latents is not None
        kind = str(read_json(root / "config.json").get("_class_name", "AutoencoderKL"))
        self.vae: Any = load_part(root, f"vae {path}", kind)
        self.vae.to(device)
        self.device = device
        self.latents = latents.of_weights(self.vae)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.device)
        out = self.vae.encode(x.unsqueeze(2) if self.latents.frames else x)
        if hasattr(out, "latent_dist"):
            mean, deviation = out.latent_dist.mean, out.latent_dist.std
        else:
            mean, deviation = out.latent, torch.zeros_like(out.latent)
        return self.latents.encode(mean).float().cpu(), self.latents.spread(deviation).float().cpu()


@part("data", "latents")
class Latents:
    """A folder of `fewstep cache-latents`, with the captions or classes of the pictures."""

    path: str
    """The folder."""
    vae: str
    """The VAE or the pipeline that decodes them; one that did not make the cache is refused."""
    encoder: EncoderPart | None = None
    """Text encoder for the captions."""
    sample: bool = True
    """Draw from the VAE's posterior anew each time; False takes its mean."""
    negative: str = ""
    """Prompt that guidance moves away from."""
    zeros: bool | None = None
    """Guidance moves away from zeros in its place; left out: as the encoder's folder says (SDXL's do)."""
    text_cache: str | None = None
    """Folder of the embeddings; the user's cache folder when left out."""
    held_out: Share = 0.0
    """Share of the latents, spread evenly, that is never trained on: evaluation against `data` takes these."""
    renumber: bool = field(default=False, repr=False)
    """True: the labels of class folders 1, 2, ... or with a gap are meant by their order, as `renumber` of `images` says
    of the pictures; a teacher with classes refuses them otherwise."""

    @property
    def conditions(self) -> Conditions | None:
        return None if self.encoder is None else "text"

    def files(self) -> list[Path]:
        """The index, which holds the checksums of all shards."""
        return [expanded(self.path) / "index.json"]

    def outline(self) -> tuple[tuple[int, ...], int]:
        """As `open` has them; of the shards one row is read and none is checked."""
        root = expanded(self.path)
        if not root.is_dir():
            raise Absent(f"latents {root}: no such folder")
        told = read_index(root)
        first = Shards(root, {}, told["count"]).take(torch.tensor([0]))
        return tuple(first["mean"].shape[1:]), 0 if self.encoder else int(told["made_with"]["classes"])

    def renumbered(self) -> str:
        """As the pictures' own was when they were encoded; nothing where `renumber` says that it is meant."""
        told = {} if self.encoder or self.renumber else read_index(expanded(self.path))["made_with"]
        return str(told.get("renumbered", ""))

    def open(self) -> LatentData:
        root = expanded(self.path)
        told = read_index(root)
        remedy = f"make it again with `fewstep cache-latents RECIPE --vae {self.vae} --out NEW`, or name its own VAE"
        shards = Shards(root, {"vae": vae_hash(self.vae)}, told["count"], remedy=remedy)
        shards.check()
        captions, text = told["made_with"].get("captions"), None
        if self.encoder is not None:
            if captions is None:
                raise UserError(f"{root}: was made from pictures without captions; leave out data.encoder")
            text = embed(self.encoder, captions, negative=self.negative, zeros=self.zeros, cache=self.text_cache)
        data = LatentData(shards, int(told["made_with"]["classes"]), text, self)
        data.renumbered = self.renumbered()
        return data


class LatentData(TextConditions):
    """Latents by number, on average the posterior's samples."""

    renumbered = ""
    """As `fewstep.data.base.renumbered` tells it."""

    def __init__(self, shards: Shards, classes: int, text: Text | None, spec: Latents) -> None:
        self.shards, self.text, self.sample, self.vae = shards, text, spec.sample, spec.vae
        self.rows, self.held = split(len(shards), spec.held_out, f"data {spec.path}")
        self.classes = 0 if text is not None else classes
        first = shards.take(torch.tensor([0]))
        self.shape: tuple[int, ...] = tuple(first["mean"].shape[1:])

    def __len__(self) -> int:
        return len(self.shards)

    def _condition(self, k: Tensor, rows: dict[str, Tensor]) -> Any:
        if self.text is not None:
            return self.text.take(k)
        return rows["label"].to(k.device) if self.classes else None

    def condition(self, k: Tensor) -> Any:
        """The conditions of latents by number."""
        return self._condition(k, self.shards.take(k) if self.classes else {})

    def batch(self, draws: Draws) -> tuple[Tensor, Any]:
        k = draws.integers(len(self.rows))
        if len(self.held):
            k = self.rows.to(k.device)[k]
        rows = self.shards.take(k)
        x = rows["mean"].to(draws.device, torch.float32)
        if self.sample:
            x = x + rows["std"].to(x) * draws.normal_like(x)
        return x, self._condition(k, rows)

    def all(self) -> tuple[Tensor, Tensor | None]:
        rows = self.shards.take(torch.arange(len(self.shards)))
        return rows["mean"].float(), rows["label"] if self.classes else None

    def reference(self) -> RealPictures:
        """What samples are compared with, decoded by the VAE: the latents that are held out, or all of them."""
        chosen = self.held if len(self.held) else self.rows
        vae = decoder(self.vae)

        def means(rows: Sequence[int]) -> Tensor:
            return self.shards.take(chosen[torch.tensor(rows)])["mean"].float()

        kept = "held out of training" if len(self.held) else "which it was trained on"
        return RealPictures(
            name="data",
            about=f"the run's latents, {kept}, decoded by their VAE",
            count=len(chosen),
            read=lambda rows: torch.cat([to_pixels(vae(z)) for z in means(rows).split(8)]),
            digest=lambda rows: vae_hash(self.vae) + tensor_digest(means(rows)),
        )


def decoder(path: str, device: torch.device | str = "cpu") -> nn.Module:
    """x to pictures in [-1, 1], by the VAE that a cache names; frames of a video stand side by side."""
    return _Decoder(Encoder(path, device))


class _Decoder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.vae, self.latents = encoder.vae, encoder.latents

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        out = self.vae.decode(self.latents.decode(z.float()), return_dict=False)[0]
        return out.permute(0, 1, 3, 2, 4).flatten(3) if out.ndim == 5 else out
