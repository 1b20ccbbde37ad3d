"""`pruned` as a part: a run's trained blocks for any subset of its intervals, and a stock class with fewer layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import TODAY
from tiny_pipelines import FAMILIES, build

from fewstep.algebra.process import Flow
from fewstep.algebra.sampling import Sampler
from fewstep.config import Absent, RecipeError, UserError
from fewstep.export.base import PARITY
from fewstep.export.choose import export
from fewstep.networks.adapters import frozen, own_state
from fewstep.networks.analytic import gaussian
from fewstep.networks.blocks import blocks_of, intervals_of, prune, replaced
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.dit import DiT
from fewstep.networks.parts import Site
from fewstep.networks.pruned import Pruned, place_of, weights_of
from fewstep.recipe.store import load
from fewstep.train.product import Product

SHAPE = (2, 4, 6)
RECIPE = """student: {name: pruned, of: teacher, intervals: [[0, 1], [3, 5]]}
train: {ema: [0.9, 0.99], product: ema}
"""


@pytest.fixture
def teacher() -> Denoiser:
    torch.manual_seed(0)
    net = DiT(SHAPE, width=8, heads=2, depth=7, classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Denoiser(net, Flow(), "velocity", "angle")


def site(teacher: torch.nn.Module) -> Site:
    return Site(SHAPE, 3, {"teacher": frozen(teacher)}, 0)


def test_any_subset_of_a_runs_intervals_is_a_model(teacher: Denoiser, tmp_path: Path):
    both = Pruned(intervals=((0, 1), (3, 5))).build(site(teacher))
    assert all(p.requires_grad for p in both.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for number, block in enumerate(replaced(both)):
            block.qkv.weight.fill_(number + 1.5)  # type: ignore[union-attr,operator]
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000007").mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        weights_of(str(run))
    (run / "checkpoints" / "step-00000007" / "state.json").write_text("{}")
    file = run / "checkpoints" / "step-00000007" / "ema_0.9.safetensors"
    save_file({k: v.contiguous() for k, v in own_state(both).items()}, file)
    assert Pruned(intervals=((3, 5),), run=str(run)).files() == [file]
    for chosen in (((3, 5),), ((0, 1),), ((0, 1), (3, 5))):
        one = Pruned(intervals=chosen, run=str(run)).build(site(teacher))
        assert intervals_of(one) == chosen
        values = [float(b.qkv.weight.detach()[0, 0]) for b in replaced(one)]  # type: ignore[union-attr,index]
        assert values == [{(0, 1): 1.5, (3, 5): 2.5}[pair] for pair in chosen]
        kept = [i for i in range(7) if not any(u < i <= v for u, v in chosen)]
        for i, block in zip(kept, blocks_of(one), strict=True):
            if not any(u <= i <= v for u, v in chosen):
                torch.testing.assert_close(block.state_dict(), blocks_of(teacher)[i].state_dict())
    with pytest.raises(UserError, match=r"was trained for the intervals \[\[0, 1\], \[3, 5\]\], not \[3, 4\]"):
        Pruned(intervals=((3, 4),), run=str(run)).build(site(teacher))
    wider = Denoiser(DiT(SHAPE, width=12, heads=2, depth=7, classes=3), Flow(), "velocity", "angle")
    with pytest.raises(UserError, match="is no block of this network"):
        Pruned(intervals=((3, 5),), run=str(run)).build(site(wider))
    (run / "recipe.yaml").write_text("student: {name: copy}")
    with pytest.raises(UserError, match="its student is not pruned"):
        weights_of(str(run))
    with pytest.raises(Absent, match="no such folder"):
        weights_of(str(tmp_path / "absent"))


def test_a_block_is_found_in_lists_of_two_kinds():
    lengths = {"transformer_blocks": 4, "single_transformer_blocks": 5}
    intervals = [(0, 2), (5, 6), (7, 8)]
    places = [place_of(pair, intervals, lengths) for pair in intervals]
    assert places == ["transformer_blocks.0", "single_transformer_blocks.1", "single_transformer_blocks.2"]


def test_what_has_no_such_blocks_is_refused(teacher: Denoiser):
    with pytest.raises(RecipeError, match=r"pruned\.intervals: \[5, 7\]: the blocks are 0\.\.6"):
        Pruned(intervals=((5, 7),)).build(site(teacher))
    with pytest.raises(RecipeError, match=r"pruned\.of: the teacher is analytic"):
        Pruned(intervals=((0, 1),)).build(site(gaussian(Flow(), 0.0, 1.0)))
    with pytest.raises(ValueError, match="intervals is empty"):
        Pruned(intervals=())
    recipe = load("digits-kd", ["student={name: pruned, of: teacher, intervals: [[0, 1]]}"])
    teachers: Any = recipe.teacher
    pixels = Site((1, 8, 8), 10, {"teacher": teachers.build(Site((1, 8, 8), 10, {}, 0))}, 0)
    with pytest.raises(RecipeError, match=r"pruned\.of: a UNet2DModel has no list of blocks"):
        recipe.student.build(pixels)


def deep(name: str, folder: Path) -> Path:
    """The tiny pipeline with five layers in every list."""
    pipe: Any = TODAY[name].build() if name in TODAY else build(name)
    keys = ("num_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers")
    more = {k: 5 for k in keys if k in pipe.transformer.config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = type(pipe.transformer).from_config({**pipe.transformer.config, **more})
        for p in model.parameters():
            p.data.normal_(0, 0.1)
    pipe.register_modules(transformer=model)
    pipe.save_pretrained(folder)
    return folder


RUNS = {
    "pixart": ((1, 3),),
    "sd3": ((0, 1), (2, 3)),
    "flux": ((0, 2), (6, 9)),
    "auraflow": ((0, 2), (6, 9)),
    "lumina2": ((1, 3),),
}


@pytest.mark.parametrize(("name", "intervals"), RUNS.items())
def test_a_pruned_transformer_leaves_in_its_stock_class(name: str, intervals: Any, tmp_path: Path):
    folder, family = deep(name, tmp_path / "deep"), FAMILIES.get(name) or TODAY[name]
    net = load_denoiser(str(folder), size=family.shape[1:], guidance=2.5 if name == "flux" else None)
    student = Pruned(intervals=intervals).build(Site(family.shape, 0, {"teacher": net}, 0))
    recipe = load("digits-dmd2", [f"teacher.path={folder}", "method.steps=[1.0, 0.5]"])
    product = Product(student, Sampler(steps=(1.0, 0.5)), family.shape, 0, "student", (2,), recipe, 7)
    done = export(product, tmp_path / "out")
    assert done.parity <= PARITY
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    gone = [sum(v - u for u, v in intervals if low <= u < low + 5) for low in (0, 5)]
    first, second = (
        ("num_mmdit_layers", "num_single_dit_layers") if name == "auraflow" else ("num_layers", "num_single_layers")
    )
    assert config[first] == 5 - gone[0]
    if name in ("flux", "auraflow"):
        assert config[second] == 5 - gone[1]
    else:
        assert second not in config
    if name == "sd3":  # the last block has no text stream behind it
        with pytest.raises(RecipeError, match=r"intervals: \[3, 4\]: block 4 has other weights than block 3"):
            Pruned(intervals=((3, 4),)).build(Site(family.shape, 0, {"teacher": copy.deepcopy(net)}, 0))


def test_a_number_under_an_unknown_key_is_refused_before_anything_changes():
    net: Any = Denoiser(TODAY["lumina2"].build().transformer, Flow(), "velocity", "angle")
    net.net.register_to_config(num_layers=7)
    with pytest.raises(ValueError, match="has 2 layers, and num_layers in its config is 7"):
        prune(net, ((0, 1),))
    assert len(blocks_of(net)) == 2
