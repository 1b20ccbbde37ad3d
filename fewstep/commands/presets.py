"""`fewstep eval --list-presets`: the protocols that ship, and what each needs of its user."""

from __future__ import annotations

from fewstep.commands.report import say
from fewstep.eval.protocol.preset import Preset, load_preset, preset_names


def list_presets() -> None:
    """Print every preset: its name, what it is, number and size, features, reference, files that it needs."""
    for name in preset_names():
        for line in lines_of(load_preset(name)):
            say(line)


def lines_of(preset: Preset) -> list[str]:
    """A preset in two lines, and one more for files that it needs."""
    size = "vectors" if preset.vectors else "any size" if preset.size is None else f"{preset.size} x {preset.size}"
    sets = f" x {preset.repetitions}" if preset.repetitions > 1 else ""
    facts = [f"{preset.number:,}{sets} samples", size, f"on {preset.extractor}", f"against {preset.reference.name}"]
    facts = facts if preset.reference.kind != "none" else [facts[0], "writes images for another package's evaluator"]
    files = [preset.conditions.file, preset.reference.file, preset.extractor_file]
    files += [preset.clip.file] if preset.clip else []
    needed = [file.name for file in files if file is not None]
    lines = [f"{preset.name}: {preset.title}", f"  {', '.join(facts)}: {', '.join(preset.metrics)}".rstrip(": ")]
    return lines + ([f"  needs {', '.join(needed)}"] if needed else [])
