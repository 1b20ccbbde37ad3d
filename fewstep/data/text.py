"""Prompts as conditions: embeddings computed once, kept on disk, the encoder dropped from memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.algebra.condition import joined, moved, nulled, zeros_like
from fewstep.config import Absent, Count, UserError, part
from fewstep.data.shards import Shards, longer, sha256_of
from fewstep.files import expanded, lines_of, read_json, text_of
from fewstep.networks import hub
from fewstep.networks.folder import read_latents, resolve
from fewstep.networks.weights import load_text_model

Encode = Callable[[Sequence[str]], dict[str, Tensor]]


_STORE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def default_cache() -> Path:
    """Where embeddings are kept: $FEWSTEP_CACHE, or fewstep/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or expanded("~") / ".cache"
    return Path(os.environ.get("FEWSTEP_CACHE") or Path(base) / "fewstep") / "text"


def _folder(path: str, inside: str) -> Path:
    root = resolve(path)
    if not root.is_dir():
        raise Absent(f"encoder {path}: no such folder{hub.hint(path)}")
    if not (root / inside).exists():
        raise UserError(
            f"encoder {path}: {inside} is missing; a folder that save_pretrained wrote has it. Save the pipeline whole, "
            f"or name another folder with the encoder{hub.mend(root)}"
        )
    return root


_MAY_LACK: dict[str, tuple[str, ...]] = {
    "StableDiffusionXLPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3"),
}
"""Parts that encode_prompt does without where they are null."""


def _there(entry: Any) -> bool:
    """Whether an entry of model_index.json names a part; [null, null] stands for none."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _text_parts(path: str) -> tuple[Path, dict[str, Any]]:
    """A pipeline folder and its index, all text encoders and tokenizers there. UserError naming one that is not."""
    root = _folder(path, "model_index.json")
    index = read_json(root / "model_index.json")
    for name in ("text_encoder", *_of_text(index)):
        entry = index.get(name)
        if _there(entry):
            _folder(path, name)
        elif name not in _MAY_LACK.get(str(index.get("_class_name")), ()):
            raise UserError(
                f"encoder {path}: model_index.json has no {name} ({json.dumps(entry)}), so this folder cannot encode "
                "prompts; name one that has it, such as the original pipeline"
            )
    return root, index


def _of_text(index: Mapping[str, Any]) -> list[str]:
    """The entries of an index that are text encoders and tokenizers; Krea 2's list of layers is neither."""
    named = [k for k in index if k.startswith(("text_encoder", "tokenizer"))]
    return [
        k for k in named if not isinstance(index[k], list) or (len(index[k]) == 2 and not isinstance(index[k][0], int))
    ]


@part("encoder", "pipeline")
class PipelineEncoder:
    """The text encoders of a diffusers pipeline folder, called as the pipeline itself calls them."""

    path: str
    """The folder, usually the teacher's."""
    length: Count | None = None
    """Tokens, where the pipeline lets one choose (SD3, Flux, PixArt, SANA); its default when left out."""
    store: Literal["fp32", "fp16", "bf16"] = "fp32"
    """In the cache on disk."""

    def files(self) -> list[Path]:
        """Encoders, tokenizers and the pipeline's index."""
        root, _ = _text_parts(self.path)
        files = [p for d in root.glob("t*") if d.name.startswith(("text_encoder", "tokenizer")) for p in d.rglob("*")]
        return [*(p for p in files if p.is_file()), root / "model_index.json"]

    def key(self) -> str:
        root, _ = _text_parts(self.path)
        return sha256_of(self.files(), root) + f"-{self.length}"

    def zeros_for_empty(self) -> bool:
        """Whether the pipeline guides away from zeros where no negative prompt is given; SDXL's does by default."""
        _, told = _text_parts(self.path)
        return told.get("_class_name") in _ZEROS and bool(told.get("force_zeros_for_empty_prompt", True))

    def open(self) -> Encode:
        import inspect

        from diffusers import DiffusionPipeline

        root, told = _text_parts(self.path)
        said = f"encoder {self.path}"
        if told.get("_class_name") not in _OUTPUTS:
            raise UserError(
                f"{root / 'model_index.json'}: _class_name {told.get('_class_name')!r} is not known as an encoder; "
                f"known: {', '.join(_OUTPUTS)}. Use an encoder of your own, `sentence`"
            )
        unused = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")
        given: dict[str, Any] = {k: None for k in unused if k in told}
        for name in _of_text(told):
            if not _there(told[name]):
                given[name] = None
            elif name.startswith("text_encoder"):
                given[name] = load_text_model(root / name, said, _class_of(root, told[name]))
        try:
            pipe: Any = DiffusionPipeline.from_pretrained(root, use_safetensors=True, **given)
        except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{said}: cannot be loaded: {error}") from None
        takes = inspect.signature(pipe.encode_prompt).parameters
        options: dict[str, Any] = {"device": torch.device("cpu"), "do_classifier_free_guidance": False}
        options["num_images_per_prompt"] = options["num_videos_per_prompt"] = 1
        # The default of encode_prompt may be another than that of the call (Wan 226 and 512, Qwen-Image 1024 and 512).
        called = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
        if called is not None:
            options["max_sequence_length"] = called.default
        if self.length is not None:
            if "max_sequence_length" not in takes:
                raise UserError(f"encoder.length: {type(pipe).__name__} has a fixed number of tokens")
            options["max_sequence_length"] = self.length
        options = {k: v for k, v in options.items() if k in takes}
        extra = _time_ids(root, type(pipe).__name__)

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            out = pipe.encode_prompt(prompt=list(prompts), **options)
            named = _named(type(pipe).__name__, out)
            return named | {k: v.repeat(len(prompts), 1) for k, v in extra.items()}

        return encode


_ZEROS = ("StableDiffusionXLPipeline",)
"""Pipelines that read `force_zeros_for_empty_prompt`, true when left out."""


_OUTPUTS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("text", ""),
    "StableDiffusionXLPipeline": ("text", "", "pooled", ""),
    "StableDiffusion3Pipeline": ("text", "", "pooled", ""),
    "FluxPipeline": ("text", "pooled", ""),
    "PixArtAlphaPipeline": ("text", "mask", "", ""),
    "PixArtSigmaPipeline": ("text", "mask", "", ""),
    "IFPipeline": ("text", ""),
    "SanaPipeline": ("text", "mask", "", ""),
    "SanaSprintPipeline": ("text", "mask"),
    "ZImagePipeline": ("text", ""),
    "QwenImagePipeline": ("text", "mask"),
    "ChromaPipeline": ("text", "", "mask", "", "", ""),
    "Flux2Pipeline": ("text", ""),
    "Flux2KleinPipeline": ("text", ""),
    "WanPipeline": ("text", ""),
    "Lumina2Pipeline": ("text", "mask", "", ""),
    "AuraFlowPipeline": ("text", "", "", ""),
    "OvisImagePipeline": ("text", "", "", ""),
    "Krea2Pipeline": ("text", "mask"),
    "HunyuanVideoPipeline": ("text", "pooled", "mask"),
    "SanaVideoPipeline": ("text", "mask", "", ""),
}
"""What encode_prompt returns, by condition key; "" is not used."""


def _named(pipeline: str, out: Sequence[Any]) -> dict[str, Tensor]:
    """What encode_prompt returned; rows of different lengths (Z-Image) as one tensor and its mask."""
    named: dict[str, Any] = {k: v for k, v in zip(_OUTPUTS[pipeline], out, strict=True) if k}
    text = named["text"]
    if isinstance(text, list):
        most = max(map(len, text))
        named = {"text": torch.stack([longer(row, most) for row in text])}
        named["mask"] = torch.stack([longer(row.new_ones(len(row)), most) for row in text])
    elif "mask" in named and named["mask"] is None:  # Qwen-Image's, where no row is padded
        named["mask"] = torch.ones(text.shape[:2], dtype=torch.long)
    return {k: v for k, v in named.items() if v is not None}


def _class_of(root: Path, entry: Sequence[Any]) -> Any:
    """The class of a text encoder, by its entry in model_index.json."""
    try:
        import transformers
    except ImportError:
        raise UserError("encoder pipeline: needs transformers: pip install 'fewstep[text]'") from None

    cls = getattr(transformers, str(entry[-1]), None)
    if entry[0] != "transformers" or not hasattr(cls, "from_pretrained"):
        raise UserError(f"{root / 'model_index.json'}: text encoder {list(entry)} is no class of transformers")
    return cls


def _time_ids(root: Path, pipeline: str) -> dict[str, Tensor]:
    """SDXL's size conditions at the size the UNet was made for, without a crop."""
    if pipeline != "StableDiffusionXLPipeline":
        return {}
    side = read_json(root / "unet" / "config.json").get("sample_size")
    size = [side, side] if isinstance(side, int) else side
    latents = read_latents(root / "vae" / "config.json")
    if latents is None or not isinstance(size, list):
        lacking = "vae/config.json is missing" if latents is None else "unet/config.json has no sample_size"
        raise UserError(f"encoder {root}: {lacking}, on which SDXL's size conditions depend; copy it from the original")
    high, wide = (float(n * latents.pixels) for n in size)
    return {"time_ids": torch.tensor([[high, wide, 0.0, 0.0, high, wide]])}


@part("encoder", "sentence")
class SentenceEncoder:
    """Any text model of transformers: its last hidden states as tokens, their mean as the pooled embedding."""

    path: str
    """Folder with the model and its tokenizer."""
    length: Count = 32
    """Tokens; longer prompts are cut."""
    keys: tuple[Literal["text", "mask", "pooled"], ...] = ("text", "mask", "pooled")
    """What becomes the condition; UNets take `text` alone, padding and all."""
    store: Literal["fp32", "fp16", "bf16"] = "fp32"
    """In the cache on disk."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys is empty; name at least one of text, mask, pooled")

    def files(self) -> list[Path]:
        """Model and tokenizer."""
        root = _folder(self.path, "config.json")
        return [p for p in root.iterdir() if p.suffix in (".json", ".txt", ".safetensors", ".model")]

    def key(self) -> str:
        chosen = "" if len(self.keys) == 3 else "-" + "-".join(sorted(self.keys))
        return sha256_of(self.files(), _folder(self.path, "config.json")) + f"-{self.length}{chosen}"

    def open(self) -> Encode:
        root = _folder(self.path, "config.json")
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise UserError("encoder sentence: needs transformers: pip install 'fewstep[text]'") from None
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"encoder {self.path}: its tokenizer cannot be loaded: {error}") from None
        # Its states alone are used, not what a pooler makes of them.
        model: Any = load_text_model(root, f"encoder {self.path}", AutoModel, unused=("pooler.",))

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            mask = tokens["attention_mask"].to(states.dtype)
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            whole = {"text": states, "mask": mask, "pooled": pooled}
            return {k: v for k, v in whole.items() if k in self.keys}

        return encode


class Text:
    """Embeddings of a list of prompts, row by row, and what guidance puts in their place.

    Args:
        shards: rows of all prompts.
        empty: one row (1, ...) for each key that guidance takes away.
        prompts: the words of the rows.
    """

    def __init__(self, shards: Shards, empty: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.shards, self.empty, self.prompts = shards, dict(empty), tuple(prompts)

    def __len__(self) -> int:
        return len(self.shards) - 1

    def take(self, k: Tensor) -> dict[str, Tensor]:
        """The conditions of prompts by number, int64 (b,), on k's device in float32.

        With a mask they are as long as what guidance puts in their place, or longer.
        """
        rows = self.shards.take(k)
        for tokens, mask in (("text", "mask"), ("text2", "mask2")):
            least = self.empty[tokens].shape[1] if {tokens, mask} <= {*self.empty} else 0
            for key in (tokens, mask):
                if least and rows[key].shape[1] < least:
                    rows[key] = longer(rows[key].transpose(0, 1), least).transpose(0, 1)
        return moved(rows, k.device, torch.float32)

    def null(self, cond: Any) -> Any:
        return nulled(cond, self.empty)


def embed(
    encoder: Any,
    prompts: Sequence[str],
    *,
    negative: str = "",
    zeros: bool | None = None,
    cache: str | None = None,
    batch: int = 32,
) -> Text:
    """The embeddings of prompts from the cache; what it lacks is computed, then the encoder is let go.

    Args:
        encoder: an encoder part.
        negative: prompt that guidance moves away from.
        zeros: guidance moves away from zeros in its place, as SDXL's `force_zeros_for_empty_prompt` has it; None: as
            the encoder's folder says, where `negative` is empty.
        cache: folder for the cache; `default_cache()` when left out.

    A cache is of one encoder's files, one list of prompts and one negative: its name is their hash. Of several
    processes one fills it while the others wait.
    """
    if not prompts:
        raise UserError("prompts: there are none")
    facts = {"encoder": encoder.key(), "prompts": _digest([*prompts, negative]), "store": encoder.store}
    root = expanded(cache) if cache else default_cache()
    shards = Shards(root / _digest([json.dumps(facts)])[:32], facts, len(prompts) + 1, remedy="delete this folder")
    rows = [*prompts, negative]
    with shards.claimed() as todo:
        encode = encoder.open() if todo else None
        for span in todo:
            assert encode is not None
            parts = [encode(rows[i : min(i + batch, span.stop)]) for i in range(span.start, span.stop, batch)]
            shards.write(span, moved(reduce(joined, parts), None, _STORE[encoder.store]))
        del encode
    shards.check()
    last = moved(shards.take(torch.tensor([len(prompts)])), None, torch.float32)
    empty = {k: v for k, v in last.items() if k in ("text", "mask", "text2", "mask2", "pooled")}
    if zeros is None:
        zeros = not negative and bool(getattr(encoder, "zeros_for_empty", bool)())
    return Text(shards, empty | (zeros_like(last) if zeros else {}), prompts)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are left out. Raises UserError naming the file."""
    try:
        lines = lines_of(text_of(path.read_bytes(), path))
    except OSError as error:
        raise UserError(f"prompts {path}: cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"prompts {error}") from None
    prompts = [text for line in lines if (text := line.strip(" \t\r"))]
    if not prompts:
        raise UserError(f"prompts {path}: holds no prompt; write one a line")
    return prompts
