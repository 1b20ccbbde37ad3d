"""Text encoders: those of a pipeline, called as the pipeline itself calls them, or any text model of transformers."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.config import Absent, Count, UserError, part
from fewstep.data.shards import sha256_of
from fewstep.files import read_json
from fewstep.networks import hub
from fewstep.networks.folder import read_latents, resolve
from fewstep.networks.weights import load_text_model

Embedding = Mapping[str, Tensor | Sequence[Tensor]]
"""Conditions of a batch of prompts, row by row; a list where rows have different lengths."""
Encode = Callable[[Sequence[str]], Embedding]
Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    dtype: Dtype | None = None
    """It computes in; that of its files when left out."""
    batch: Count = 32
    """Prompts at once."""
    store: Dtype | None = None
    """In the cache on disk; as it computes them when left out."""

    def files(self) -> list[Path]:
        """Encoders, tokenizers and the pipeline's index."""
        root, _ = _text_parts(self.path)
        files = [p for d in root.glob("t*") if d.name.startswith(("text_encoder", "tokenizer")) for p in d.rglob("*")]
        return [*(p for p in files if p.is_file()), root / "model_index.json"]

    def key(self) -> str:
        root, told = _text_parts(self.path)
        cleaned = told.get("_class_name") in _CLEANING and cleans()
        return sha256_of(self.files(), root) + f"-{self.length}-{self.dtype}" + "-cleaned" * cleaned

    def zeros_for_empty(self) -> bool:
        """Whether the pipeline guides away from zeros where no negative prompt is given; SDXL's does by default."""
        _, told = _text_parts(self.path)
        return told.get("_class_name") in _ZEROS and bool(told.get("force_zeros_for_empty_prompt", True))

    def open(self, device: torch.device | str = "cpu") -> Encode:
        """The encoders alone, on a device and in eval mode."""
        import diffusers

        root, told = _text_parts(self.path)
        said = f"encoder {self.path}"
        if told.get("_class_name") not in OUTPUTS:
            raise UserError(
                f"{root / 'model_index.json'}: _class_name {told.get('_class_name')!r} is not known as an encoder; "
                f"known: {', '.join(OUTPUTS)}. Use an encoder of your own, `sentence`"
            )
        asked = inspect.signature(getattr(diffusers, told["_class_name"]).__init__).parameters
        unused = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder", "watermarker")
        given: dict[str, Any] = {k: None for k in unused if k in told or k in asked}
        for name in _of_text(told):
            if not _there(told[name]):
                given[name] = None
            elif name.startswith("text_encoder"):
                cls = _class_of(root, told[name])
                given[name] = load_text_model(root / name, said, cls, dtype=DTYPES.get(self.dtype or ""), device=device)
        try:
            pipe: Any = diffusers.DiffusionPipeline.from_pretrained(root, use_safetensors=True, **given)
        except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{said}: cannot be loaded: {error}") from None
        options = call_options(type(pipe))
        if self.length is not None:
            if "max_sequence_length" not in options:
                raise UserError(f"encoder.length: {type(pipe).__name__} has a fixed number of tokens")
            options["max_sequence_length"] = self.length
        options["device"] = torch.device(device)
        extra = _time_ids(root, type(pipe).__name__)

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Embedding:
            out = pipe.encode_prompt(prompt=list(prompts), **options)
            named = _named(type(pipe).__name__, out)
            return {**named, **{k: v.repeat(len(prompts), 1) for k, v in extra.items()}}

        return encode


def call_options(kind: type) -> dict[str, Any]:
    """What a pipeline's call hands to its own encode_prompt beside the prompts, for one picture and no guidance.

    The defaults of the two differ: 226 and 512 tokens (Wan), without and with an instruction before the prompt (SANA).
    """
    takes: Any = inspect.signature(kind.encode_prompt).parameters  # type: ignore[attr-defined]
    called: Any = inspect.signature(kind.__call__).parameters
    texts = ("prompt", "negative", "pooled")
    options = {
        k: p.default for k, p in called.items() if k in takes and p.default is not p.empty and not k.startswith(texts)
    }
    options |= {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "num_videos_per_prompt": 1}
    options |= {"prompt_2": None, "prompt_3": None}  # the first prompt then; SD3 has no default for them
    if options.get("clean_caption"):
        options["clean_caption"] = cleans()
    return {k: v for k, v in options.items() if k in takes}


def cleans() -> bool:
    """Whether the packages are here by which PixArt's and IF's pipelines clean a prompt; else they take it as it is."""
    return all(importlib.util.find_spec(name) is not None for name in ("bs4", "ftfy"))


_ZEROS = ("StableDiffusionXLPipeline",)
"""Pipelines that read `force_zeros_for_empty_prompt`, true when left out."""
_CLEANING = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "IFPipeline", "IFSuperResolutionPipeline")
"""Pipelines whose call cleans prompts by default."""
_RAGGED = ("ZImagePipeline", "QwenImagePipeline")
"""Pipelines that give a prompt the length of its words, or of the longest in the call."""
HIDING = (
    "PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "SanaSprintPipeline", "SanaVideoPipeline",
    "Lumina2Pipeline", "Krea2Pipeline", "HunyuanVideoPipeline",
)  # fmt: skip
"""Pipelines whose network never sees what the mask marks as padding. Chroma's adds its mask to the scores, 1 or 0."""


OUTPUTS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("text", ""),
    "LatentConsistencyModelPipeline": ("text", ""),
    "StableDiffusionXLPipeline": ("text", "", "pooled", ""),
    "StableDiffusion3Pipeline": ("text", "", "pooled", ""),
    "FluxPipeline": ("text", "pooled", ""),
    "PixArtAlphaPipeline": ("text", "mask", "", ""),
    "PixArtSigmaPipeline": ("text", "mask", "", ""),
    "IFPipeline": ("text", ""),
    "IFSuperResolutionPipeline": ("text", ""),
    "SanaPipeline": ("text", "mask", "", ""),
    "SanaSprintPipeline": ("text", "mask"),
    "ZImagePipeline": ("text", ""),
    "QwenImagePipeline": ("text", "mask"),
    "ChromaPipeline": ("text", "", "mask", "", "", ""),
    "Flux2Pipeline": ("text", ""),
    "Flux2KleinPipeline": ("text", ""),
    "WanPipeline": ("text", ""),
    "AnyFlowPipeline": ("text", ""),
    "Lumina2Pipeline": ("text", "mask", "", ""),
    "AuraFlowPipeline": ("text", "", "", ""),
    "OvisImagePipeline": ("text", "", "", ""),
    "Krea2Pipeline": ("text", "mask"),
    "HunyuanVideoPipeline": ("text", "pooled", "mask"),
    "SanaVideoPipeline": ("text", "mask", "", ""),
}
"""What encode_prompt returns, by condition key; "" is not used."""


def _named(pipeline: str, out: Sequence[Any]) -> Embedding:
    """What encode_prompt returned, by key; padding that the network does not see is zero."""
    named = {k: v for k, v in zip(OUTPUTS[pipeline], out, strict=True) if k and v is not None}
    text, mask = named["text"], named.get("mask")
    if pipeline in _RAGGED:
        if mask is not None:  # Qwen-Image's, whose rows are as long as the longest of them
            text = [row[: int(m.sum())] for row, m in zip(text, mask, strict=True)]
        return {"text": [*text], "mask": [row.new_ones(len(row), dtype=torch.long) for row in text]}
    if pipeline in HIDING and mask is not None:
        hidden = ~mask.bool()
        named["text"] = text.masked_fill(hidden.reshape(*hidden.shape, *(1,) * (text.ndim - 2)), 0)
    return named


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
    dtype: Dtype | None = None
    """It computes in; that of its files when left out."""
    batch: Count = 32
    """Prompts at once."""
    store: Dtype | None = None
    """In the cache on disk; as it computes them when left out."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys is empty; name at least one of text, mask, pooled")

    def files(self) -> list[Path]:
        """Model and tokenizer."""
        root = _folder(self.path, "config.json")
        return [p for p in root.iterdir() if p.suffix in (".json", ".txt", ".safetensors", ".model")]

    def key(self) -> str:
        chosen = "" if len(self.keys) == 3 else "-" + "-".join(sorted(self.keys))
        return sha256_of(self.files(), _folder(self.path, "config.json")) + f"-{self.length}-{self.dtype}{chosen}"

    def open(self, device: torch.device | str = "cpu") -> Encode:
        """The model on a device, in eval mode."""
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
        model: Any = load_text_model(
            root, f"encoder {self.path}", AutoModel, ("pooler.",), DTYPES.get(self.dtype or ""), device
        )

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Embedding:
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(device)
            states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            mask = tokens["attention_mask"].float()
            pooled = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            whole = {"text": states, "mask": mask, "pooled": pooled.to(states.dtype)}
            return {k: v for k, v in whole.items() if k in self.keys}

        return encode
