"""Weights of one part of a pipeline: safetensors only, whole and complete; for a pickle the command that converts it."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fewstep.config import UserError
from fewstep.files import read_json, regular
from fewstep.networks.hub import mend
from fewstep.networks.shards import check_index
from fewstep.networks.wrapped import keeping, rivals, unwrap, why, wrapping


class NotFinite(UserError):
    """Weights that hold NaN or infinity."""


PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def shell(code: str) -> str:
    """Python code as a command line."""
    return f'python -c "{code}"' if not set(code) & set('"$`\\!') else f"python -c {shlex.quote(code)}"


def rename(file: Path, to: Path) -> str:
    """The command that writes a pickled state dict as safetensors, its names as they are."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load({str(file)!r}, map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        "save_file({k: v.clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}, "
        f"{str(to)!r}, metadata={{'format': 'pt'}})"
    )
    return shell(code)


def variant_of(file: Path, library: str) -> str | None:
    """Of a file named as its library names weights: fp16 or the like, "" for none; None for another name."""
    theirs = "model" if file.suffix == ".safetensors" else "pytorch_model"
    base = "diffusion_pytorch_model" if library == "diffusers" else theirs
    found = re.fullmatch(rf"{base}(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:bin|safetensors)", file.name)
    return (found[1] or found[2] or "") if found else None


def plain_of(files: Sequence[Path], library: str) -> Sequence[Path]:
    """Those of a part's files that are of no variant; all where each is of one."""
    return [f for f in files if variant_of(f, library) == ""] or files


def conversion(file: Path, library: str, kind: str) -> str:
    """The command that turns weights of a part into plain safetensors beside them: from a pickle or from a variant.

    Args:
        library: where model_index.json says that the class is: diffusers, transformers, or a pipeline's module.
        kind: the class.
    """
    import diffusers

    where = str(file.parent)
    source = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    code = f"from {source} import {kind} as M; "
    variant = variant_of(file, library)
    if variant is not None:
        more = f", variant={variant!r}" if variant else ""
        safe = file.suffix == ".safetensors"
        code += f"M.from_pretrained({where!r}, use_safetensors={safe}{more})"
    elif library == "diffusers" and hasattr(getattr(diffusers, kind, None), "from_single_file"):
        # Takes the layout of the original repositories and diffusers' own.
        code += f"M.from_single_file({str(file)!r}, config={where!r})"
    else:
        base = "diffusion_pytorch_model" if library == "diffusers" else "model"
        return rename(file, file.with_name(f"{base}.safetensors"))
    return shell(f"{code}.save_pretrained({where!r})")


def refuse_pickles(sub: Path, said: str, library: str, kind: str) -> None:
    """UserError with the conversion command when the weights of a part are pickled and nothing else."""
    if any(sub.glob("*.safetensors")):
        return
    found = [p for p in sub.iterdir() if p.suffix in PICKLES] if sub.is_dir() else []
    # Trainers leave their own state beside the weights.
    found = [p for p in found if not p.name.startswith(("training_args", "optimizer", "scheduler", "random"))]
    if found:
        first = min(found, key=lambda p: ("model" not in p.name, p.name))
        raise UserError(
            f"{said}: {sub.name}/ has no .safetensors file; {first.name} is a pickle: convert it with safetensors "
            f"first:\n  {conversion(first, library, kind)}"
        )


def refuse_variants(sub: Path, said: str, library: str, kind: str) -> None:
    """UserError with a command when the weights of a part are there in half precision alone, under another name.

    A pipeline that is not told of the variant does not find them, and an export is opened without being told.
    """
    found = {p: variant_of(p, library) for p in sorted(sub.glob("*.safetensors"))}
    only = [p for p, variant in found.items() if variant]
    if only and "" not in found.values():
        raise UserError(
            f"{said}: {sub.name}/ has {only[0].name} and no plain weights, which an exported pipeline looks for; write "
            f"them:\n  {conversion(only[0], library, kind)}"
        )


_PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "gguf": "gguf", "quanto": "optimum.quanto"}
"""What a method of quantisation is imported as."""


def refuse_quantised(sub: Path, said: str) -> None:
    """UserError for the weights of a part that were saved quantised, from which nothing is trained or merged here."""
    told = read_json(sub / "config.json").get("quantization_config") if (sub / "config.json").is_file() else None
    if not isinstance(told, dict):
        return
    method = str(told.get("quant_method", "another program"))
    package = _PACKAGES.get(method, "")
    absent = package and importlib.util.find_spec(package.partition(".")[0]) is None
    without = ", which is not installed" if absent else ""
    raise UserError(
        f"{said}: the weights in {sub.name}/ are quantised by {method}{without}, and nothing is trained from such; give "
        "the folder of plain weights that they were made of: `dtype: bf16` beside its path takes half the memory"
    )


def check_whole(sub: Path, said: str) -> list[Path]:
    """The safetensors files of a folder, in order. UserError naming one that is truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    files = sorted(sub.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(regular(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{said}: {sub.name}/{file.name} is truncated or damaged ({file.stat().st_size} bytes): {error}"
            ) from None
    return files


def load_part(sub: Path, said: str, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The diffusers model of a folder with config.json, in eval mode; from safetensors only, and complete.

    Args:
        said: what messages begin with, such as "teacher PATH".
        kind: its class.

    Raises UserError for pickles (with the conversion command), damage, an unknown class and weights that do not fit.
    """
    import diffusers

    refuse_quantised(sub, said)
    refuse_pickles(sub, said, "diffusers", kind)
    weights = check_whole(sub, said)
    if not weights:
        raise UserError(f"{said}: {sub.name}/ has no .safetensors file{mend(sub)}")
    variants = {w: variant_of(w, "diffusers") for w in weights}
    if not {"", "fp16", "bf16"} & {*variants.values()}:
        to = weights[0].with_name("diffusion_pytorch_model.safetensors")
        raise UserError(
            f"{said}: {sub.name}/ has {weights[0].name}, and no {to.name}, which diffusers looks for; rename it if it is "
            f"meant:\n  mv {shlex.quote(str(weights[0]))} {shlex.quote(str(to))}"
        )
    cls: Any = getattr(diffusers, kind, None)
    if not hasattr(cls, "from_pretrained"):
        raise UserError(f"{sub / 'config.json'}: diffusers has no class {kind!r}")
    variant = next(v for v in ("", "fp16", "bf16") if v in variants.values())
    read = [w for w in weights if variants[w] == variant]
    check_index(sub, said, read, variant)
    # Classes that keep parts in float32 whatever is asked for (Wan, Krea 2) are only read the other way.
    slim = {} if getattr(cls, "_keep_in_fp32_modules", None) else {"low_cpu_mem_usage": False}
    model, told = _loaded(cls, sub, said, torch_dtype=dtype, variant=variant or None, use_safetensors=True, **slim)
    _complete(told, sub, said, ("missing_keys", "unexpected_keys"), read)
    _finite(model, sub, said)
    return model.eval()


def load_text_model(
    sub: Path,
    said: str,
    cls: Any,
    unused: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A transformers model of a folder in eval mode; errors as `load_part`.

    Args:
        cls: its class, or an Auto class.
        unused: first letters of weights that may be missing, as the caller does not use what they compute.
        dtype: that of most of its saved weights when left out. It is not made in another on the way.
        device: the weights of an accelerator are read onto it one by one, past main memory.
    """
    refuse_quantised(sub, said)
    refuse_pickles(sub, said, "transformers", cls.__name__)
    refuse_variants(sub, said, "transformers", cls.__name__)
    files = check_whole(sub, said)
    loaded = plain_of(files, "transformers")
    check_index(sub, said, loaded, single_first=True)
    # Left out it asks on the terminal whether a folder's own code may run.
    own = {"trust_remote_code": False} if cls.__name__.startswith("Auto") else {}
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}
    precision = {_dtype_option(): saved_dtype(files) if dtype is None else dtype}
    model, told = _loaded(cls, sub, said, use_safetensors=True, low_cpu_mem_usage=True, **precision, **placed, **own)
    lacks = [k for k in told["missing_keys"] if not k.startswith(unused)]
    _complete(told | {"missing_keys": lacks}, sub, said, ("missing_keys",), loaded)
    _finite(model, sub, said)
    return model.eval()


def saved_dtype(files: Sequence[Path]) -> torch.dtype:
    """The dtype of most values in a text model's safetensors files; float32 for one that is not computed in."""
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for file in plain_of(files, "transformers"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                held = opened.get_slice(name)
                counts[held.get_dtype()] += prod(held.get_shape())
    most = max(counts, key=lambda name: counts[name], default="")
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(most, torch.float32)


def _dtype_option() -> str:
    """The option of `from_pretrained` by the name that the installed transformers takes, renamed in 4.56."""
    major, minor = version("transformers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (4, 56) else "torch_dtype"


def _loaded(cls: Any, sub: Path, said: str, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return cls.from_pretrained(sub, output_loading_info=True, **options)
    except (
        AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise UserError(f"{said}: the weights in {sub.name}/ cannot be loaded: {error}") from None


def _complete(told: Any, sub: Path, said: str, kinds: tuple[str, ...], files: Sequence[Path]) -> None:
    # diffusers and transformers only warn and leave what the file lacks at random.
    words = {"missing_keys": "lack", "unexpected_keys": "hold the unknown"}
    strange, wanted = sorted(told["unexpected_keys"]), sorted(told["missing_keys"])
    for kind in kinds:
        if not told[kind]:
            continue
        if strange:
            refuse_wrapped(strange, wanted, sub, said, files)
        raise UserError(
            f"{said}: the weights in {sub.name}/ {words[kind]} {sorted(told[kind])[0]} ({len(told[kind])} in all); "
            f"they are of another network than {sub.name}/config.json says"
        )


def refuse_wrapped(strange: list[str], wanted: list[str], sub: Path, said: str, files: Sequence[Path]) -> None:
    """UserError with the command for weights that are named as inside a wrapper; with several for several sets."""
    keys = [k for f in files for k in names_in(f)]
    if found := rivals(keys, strange, wanted):
        _refuse_rivals(found, max(map(len, found.values())), f"{said}: the weights in {sub.name}/", files)
    wrapped = wrapping(strange, wanted, plain=bool(set(keys) - set(strange)))
    if wrapped is None:
        return
    mark, pairs = wrapped
    first = next(k for k in strange if mark.split(".")[0] in k.split("."))
    raise UserError(
        f"{said}: the weights in {sub.name}/ are named as inside a wrapper, with {mark!r} in {first}; {why(mark)}. "
        f"Write them under their own names:\n  {shell(unwrap(files, pairs))}"
    )


def _refuse_rivals(found: dict[str, dict[str, str]], whole: int, said: str, files: Sequence[Path]) -> NoReturn:
    marks = sorted(found)
    name = min(n for n in found[marks[0]] if any(n in found[m] for m in marks[1:]))
    keys = [found[m][name] for m in marks if name in found[m]]
    commands = []
    for m in marks:
        if len(found[m]) == whole:
            kept = f"those with {m!r}" if m else "those under their own names"
            commands.append(f"  # keeps {kept}\n  {shell(unwrap(files, keeping(m, found)))}")
    lines = "\n".join(commands)
    raise UserError(
        f"{said} are there {len(marks)} times: {name} as {' and as '.join(keys)}, and no key says which counts. Keep one "
        f"(its command leaves the others out of the file, so copy that first):\n{lines}"
    )


def names_in(file: Path) -> list[str]:
    """Of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The first tensor that holds NaN or infinity, with how many of its values do, in words; None when all are finite."""
    for name, t in tensors:
        if not t.is_floating_point():
            continue
        fine = torch.isfinite(t.float() if t.itemsize == 1 else t)  # torch does not ask it of float8
        if not bool(fine.all()):
            count = int((~fine).sum())
            return f"{name} ({count} of {t.numel()} values)"
    return None


def _finite(model: nn.Module, sub: Path, said: str) -> None:
    found = not_finite([*model.named_parameters(), *model.named_buffers()])
    if found:
        dtype = next(model.parameters()).dtype
        half = "; or they do not fit into float16: use bf16" if dtype is torch.float16 else ""
        raise NotFinite(
            f"{said}: the weights in {sub.name}/ hold NaN or infinity in {found}; a save in half precision may have "
            f"overflowed, or training diverged: save them again in float32 from weights that are finite{half}"
        )
