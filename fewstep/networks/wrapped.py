"""Names that wrappers, averages and trainers leave on weights: what they are, and the code that writes the own ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fewstep.files import read_json

WRAPPERS = {
    "_orig_mod": "torch.compile puts it there",
    "module": "DataParallel and DistributedDataParallel put it there",
    "_fsdp_wrapped_module": "FSDP puts it there",
    "_checkpoint_wrapped_module": "torch's checkpoint wrapper puts it there",
    "_forward_module": "Lightning puts it there",
    "base_layer": "peft puts it there while an adapter is loaded; fuse that first if it is to count",
}
"""Parts of names that wrappers leave in front of those of weights, or within them."""
AVERAGES = ("ema", "ema_model", "model_ema")
"""What averages that stand beside the weights begin with."""


def why(mark: str) -> str:
    """Who leaves such parts in names."""
    return "; ".join(WRAPPERS[p] for p in mark.split(".") if p in WRAPPERS) or "some trainers save it so"


def wrapping(strange: Sequence[str], wanted: Sequence[str], *, plain: bool = False) -> tuple[str, str] | None:
    """(what stands in strange names beyond the wanted ones, code of the pairs (own name, k) of names ks); None: others.

    Looked for are the parts of `WRAPPERS` anywhere in a name, and one prefix of all names, whose tensors alone count
    then, unless there are also `plain` names that the network knows.
    """
    parts = tuple(w for w in WRAPPERS if any(w in k.split(".") for k in strange))
    bare = {_dropped(k, parts) for k in strange}
    if parts and wanted and bare >= set(wanted):
        code = f"[('.'.join(p for p in k.split('.') if p not in {parts}), k) for k in ks if '.lora_' not in k]"
        return ".".join(parts) + ".", code
    if not wanted:
        return None
    shortest = min(wanted, key=len)
    fronts = {k.removesuffix(shortest) for k in strange if k.endswith(f".{shortest}")}
    bare_by = {f: {k.removeprefix(f) for k in strange if k.startswith(f)} for f in fronts}
    front = min((f for f, names in bare_by.items() if names >= set(wanted)), key=len, default=None)
    if front is None:
        return None
    return front, f"[(k.removeprefix({front!r}), k) for k in ks]" if plain else _of_front(front)


def sets(keys: Iterable[str], expected: Iterable[str]) -> dict[str, dict[str, str]]:
    """{what stands in front of expected names or within them, "" for nothing: {expected name: key}}; others left out."""
    known, found = set(expected), dict[str, dict[str, str]]()
    for key in keys:
        words = key.split(".")
        wraps = [w for w in words if w in WRAPPERS]
        for kept, more in ((words, []), ([w for w in words if w not in WRAPPERS], wraps)):
            at = next((i for i in range(len(kept)) if ".".join(kept[i:]) in known), None)
            if at is not None:
                label = "".join(f"{w}." for w in (*kept[:at], *more))
                found.setdefault(label, {})[".".join(kept[at:])] = key
                break
    return found


def rivals(keys: Iterable[str], strange: Sequence[str], wanted: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of `sets` those that have tensors of the same names, two at least; {} where no name is there twice.

    A set counts when it has all that is wanted, or, where nothing is, when it is known as a wrapper's or an average.
    """
    expected = (set(keys) - set(strange)) | set(wanted)
    found = sets(keys, expected)
    need = set(wanted) or expected
    known = () if wanted else (*WRAPPERS, *AVERAGES)
    counts = {m: s for m, s in found.items() if not m or s.keys() >= need or m.split(".")[0] in known}
    return {m: s for m, s in counts.items() if any(s.keys() & other.keys() for n, other in counts.items() if n != m)}


def keeping(mark: str, found: Mapping[str, Mapping[str, str]]) -> str:
    """Code of the pairs (own name, k) of names ks that keeps one set of `rivals` and leaves the others out."""
    if mark and all(k.startswith(mark) for k in found[mark].values()):
        longer = tuple(m for m in found if m != mark and m.startswith(mark))
        return _of_front(mark, longer)
    others = {m: s for m, s in found.items() if m and m != mark}
    fronts = tuple(m for m, s in others.items() if all(k.startswith(m) for k in s.values()))
    inside = {w for m in others if m not in fronts for w in m.split(".") if w in WRAPPERS}
    own = tuple(w for w in mark.split(".") if w in WRAPPERS)
    name = f"'.'.join(p for p in k.split('.') if p not in {own})" if own else "k"
    more = f" and not {inside} & {{*k.split('.')}}" if inside else ""
    return f"[({name}, k) for k in ks if not k.startswith({fronts}){more}]"


def unwrap(files: Sequence[Path], pairs: str) -> str:
    """Code that writes safetensors files in place with `pairs` as the names of what they hold, and their indexes.

    Their headers stay; a file of which nothing would be left is not touched, and the index no longer names it.
    """
    code = (
        "from safetensors import safe_open; from safetensors.torch import load_file, save_file; own = lambda ks: "
        f"{pairs}; held = {{f: own(list(safe_open(f, 'pt').keys())) for f in {[str(f) for f in files]!r}}}; "
        "[save_file({n: d[k] for n, k in held[f]}, f, metadata={'format': 'pt'} | (safe_open(f, 'pt').metadata() or {})) "
        "for f in held if held[f] for d in [load_file(f)]]"
    )
    indexes = [str(i) for i in index_files(files[0].parent) if {f.name for f in files} & {*shards_of(i)}]
    if not indexes:
        return code
    return (
        f"import json; from pathlib import Path; {code}; "
        "[i.write_text(json.dumps(j | {'weight_map': {n: Path(f).name for f in held if Path(f).name in "
        "j['weight_map'].values() for n, _ in held[f]}})) "
        f"for i in map(Path, {indexes!r}) for j in [json.loads(i.read_text())]]"
    )


def index_files(sub: Path) -> list[Path]:
    """Those that say which shard of a folder holds which tensor."""
    return sorted(sub.glob("*.safetensors.index*.json"))


def shards_of(index: Path) -> list[str]:
    """The files that an index names; none for one that names none."""
    told = read_json(index).get("weight_map")
    return [f for f in told.values() if isinstance(f, str)] if isinstance(told, dict) else []


def _of_front(front: str, longer: tuple[str, ...] = ()) -> str:
    more = f" and not k.startswith({longer})" if longer else ""
    return f"[(k[{len(front)}:], k) for k in ks if k.startswith({front!r}){more}]"


def _dropped(key: str, parts: Sequence[str]) -> str:
    return ".".join(p for p in key.split(".") if p not in parts)
