"""Every recipe of published settings takes a step on tiny folders of its own names, and says whether it will export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import SanaTransformer2DModel
from tiny_pipelines import build, make_pipeline, vae
from torch import Tensor

import fewstep.data.latents
import fewstep.data.pictures
from fewstep.algebra.condition import nulled, rows
from fewstep.config import RecipeError, UserError
from fewstep.data.latents import vae_hash
from fewstep.data.shards import Shards
from fewstep.export.choose import export, parts_of
from fewstep.export.forecast import about, warning
from fewstep.networks.adapters import own_parameters
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.product import product_of
from fewstep.train.trainer import Trainer

PAPER = sorted(n for n in shipped() if n.startswith("paper/"))
FOLDERS = {
    "stable-diffusion-v1-5": ("sd15", (4, 8, 12)),
    "stable-diffusion-xl-base-1.0": ("sdxl", (4, 8, 12)),
    "flux-dev": ("flux", (4, 6, 8)),
    "dit-xl-2-256": ("dit", (4, 8, 8)),
    "sana-sprint-teacher": ("sana", (5, 8, 8)),
}
REFUSED = {"paper/meanflow-dit-xl", "paper/phased-dmd-flow", "paper/sana-sprint"}
COUNT = 7


class Embedded:
    """The rows that `embed` would give, random ones in the shapes that the network takes."""

    def __init__(self, encoder: Any, prompts: Sequence[str], **_: Any) -> None:
        scale = 3.5 if encoder.path == "flux-dev" else None
        net: Any = load_denoiser(encoder.path, guidance=scale).net
        self.rows = net.example(len(prompts), torch.Generator().manual_seed(3))
        self.rows.pop("guidance", None)

    def __len__(self) -> int:
        return len(self.rows["text"])

    def take(self, k: Tensor) -> Any:
        return rows(self.rows, k)

    def null(self, cond: Any) -> Any:
        return nulled(cond, {k: v[:1] for k, v in self.rows.items() if k in ("text", "mask", "pooled")})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with what the recipes name."""
    root = tmp_path_factory.mktemp("paper")
    (root / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(COUNT)))
    for name, (family, shape) in FOLDERS.items():
        if family == "sana":
            deep(root / name)
        else:
            make_pipeline(root / name, family)
        g = torch.Generator().manual_seed(len(name))
        facts = {
            "vae": vae_hash(str(root / name)),
            "classes": 1000 if family == "dit" else 0,
            "captions": None if family == "dit" else [f"picture {i}" for i in range(COUNT)],
        }
        cache = Shards(root / "cached" / name, facts, COUNT)
        z = torch.randn(COUNT, *shape, generator=g)
        tensors = {"mean": z, "std": 0.1 * torch.ones_like(z)}
        if family == "dit":
            tensors["label"] = torch.randint(1000, (COUNT,), generator=g)
        cache.write(range(COUNT), tensors)
    return root


def deep(folder: Path) -> None:
    """SANA of 20 blocks, as many as SANA-Sprint 1.6B has, so that its taps are the recipe's own."""
    pipe = build("sana")
    config = dict(pipe.transformer.config) | {"num_layers": 20}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.register_modules(transformer=SanaTransformer2DModel.from_config(config))
        for p in pipe.transformer.parameters():
            # Twenty blocks that bend more would be too steep for finite differences to confirm their tangent.
            p.data.add_(0.01 * torch.randn_like(p))
    pipe.save_pretrained(folder)
    vae(5, scaling_factor=0.41407).save_pretrained(folder / "vae")


def shortened(name: str, *settings: str) -> Recipe:
    """The recipe itself but for sizes and CAME: three samples, a step of every stage, latents of the tiny folders."""
    teacher = load(name).teacher.path  # type: ignore[union-attr]
    data = load(name).data.name  # type: ignore[attr-defined]
    shape = list(FOLDERS[teacher][1])
    where = f"data.shape={shape}" if data == "prompts" else f"data.path=cached/{teacher}"
    # Without guidance its critic is the teacher at first, so that the first step has no direction.
    steps = 2 if name == "paper/phased-dmd-flow" else 1
    recipe = load(name, ["train.batch=3", "train.accumulate=1", f"train.steps={steps}", where, *settings])
    # CAME is of a package that the suite does without.
    optim = {role: replace(o, warmup=0, rule="adamw") for role, o in recipe.optim.items()}
    return replace(recipe, optim=optim, before=tuple(replace(stage, steps=steps) for stage in recipe.before))


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(place)
    for module in (fewstep.data.latents, fewstep.data.pictures):
        monkeypatch.setattr(module, "embed", Embedded)
    AcceleratorState._reset_state(True)  # a process has one precision otherwise, and these have bf16
    yield place
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("name", PAPER)
def test_a_published_recipe_takes_a_step_and_tells_its_export(name: str, here: Path):
    recipe = shortened(name)
    trainer = Trainer(recipe, None, cpu=True)
    own = own_parameters(trainer.roles.student)
    before = [p.detach().clone() for p in own]
    trainer.fit()
    assert trainer.progress.done == trainer.total_steps
    assert trainer.progress.skipped == 0
    assert all(bool(torch.isfinite(p).all()) for p in own)
    assert any(not torch.equal(p, old) for p, old in zip(own, before, strict=True))
    product = product_of(recipe, trainer.product, trainer.data, "student")
    _, parts, told = about(recipe)
    assert told == warning(lambda: product)
    if name in REFUSED:
        with pytest.raises(UserError) as caught:
            export(product, here / "out")
        assert told == f"will not export to a stock pipeline: {caught.value}"
    else:
        assert told == ""
        assert parts is not None
        assert parts.scheduler == parts_of(product).scheduler


def test_a_tap_that_the_network_lacks_is_refused(here: Path):
    recipe = shortened("paper/sana-sprint", "discriminator.taps=[block2, block20]")
    with pytest.raises(RecipeError, match="tap 'block20' is unknown to this SanaTransformer2DModel"):
        Trainer(recipe, None, cpu=True)
