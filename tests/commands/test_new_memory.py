"""`fewstep new --memory`: the first way whose plan fits, the recipe that it writes, and what fits nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_families import TODAY, make_today
from tiny_new import stand_in_for_text
from tiny_pipelines import FAMILIES, make_pipeline

from fewstep.commands import new_memory
from fewstep.commands.check_recipe import check
from fewstep.commands.new import Wish, new
from fewstep.commands.new_memory import BATCH, GIB, SETS, SHARE, WHOLE, Fit, memory_of
from fewstep.commands.new_pipeline import look
from fewstep.commands.plan import plan
from fewstep.commands.plan_configs import Sizes
from fewstep.config import UserError, load_yaml
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

MIB = 2**20


def test_memory_is_read():
    assert memory_of("24G") == memory_of("24 GiB") == memory_of("24gb") == 24 * GIB
    assert memory_of("1.5M") == 1.5 * MIB
    for wrong in ("24", "0G", "much", "-1G"):
        with pytest.raises(UserError, match=f"--memory {wrong}: expected"):
            memory_of(wrong)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red square\ntwo green dots\n")
    return tmp_path


def written(folder: Path, memory: str, lora: bool = False) -> dict[str, Any]:
    wish = Wish(
        Path("mine.yaml"), 2, teacher=str(folder), lora=lora, prompts=Path("prompts.txt"), force=True, memory=memory
    )
    list(new(wish))
    return load_yaml(Path("mine.yaml")).data


@pytest.mark.parametrize(
    "name",
    ["z_image", *(pytest.param(n, marks=pytest.mark.long) for n in ("sd15", "sd3", "flux", "sana", "wan", "chroma"))],
)
def test_what_is_written_fits_checks_and_trains(here: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    folder = make_today(here / "T", name) if name in TODAY else make_pipeline(here / "T", name)
    shape = list((TODAY if name in TODAY else FAMILIES)[name].shape)
    room = 64 * MIB
    monkeypatch.setattr("fewstep.commands.new_pipeline.Family.shape", property(lambda _: tuple(shape)))
    data = written(folder, "64M")
    found = plan(load("mine.yaml"), ways=False, sizes=Sizes())
    assert found.total <= SHARE * room
    assert data["train"]["batch"] // data["train"]["accumulate"] == found.micro_batch > 1
    assert data["student"]["name"] == "copy"
    stand_in_for_text(monkeypatch, look(str(folder)).wrapper)
    told, missing = check("mine.yaml", [])
    assert missing == []
    assert "will not export" not in "\n".join(told)
    small = ("train.steps=1", "train.batch=2", "train.accumulate=1", "train.precision=fp32", "train.sample_every=0")
    Trainer(load("mine.yaml", list(small)), None, cpu=True).fit()


def test_ways_are_tried_from_whole_networks_to_sets(here: Path, monkeypatch: pytest.MonkeyPatch):
    """By plans of given sizes, for tiny networks have no room between the ways."""
    folder = make_pipeline(here / "T", "sd3")
    sizes = {str(way): (6 - i) * GIB for i, way in enumerate((*WHOLE, *SETS))}

    tried: list[str] = []
    bent = BATCH
    """From where the samples take more than the second one said."""

    def planned(lines: Any) -> Any:
        text = "\n".join(line for line, _ in lines)
        micro = BATCH // int(re.search(r"accumulate: (\d+)", text)[1])  # type: ignore[index]
        way = Fit("name: lora" in text, "bf16" if "dtype: bf16" in text else "fp32", "offload: true" in text)
        tried.append(f"{way} at {micro}")
        return SimpleNamespace(total=sizes[str(way)] + (micro - 1) * GIB // 8 + (GIB // 4 if micro > bent else 0))

    monkeypatch.setattr(new_memory, "_planned", planned)
    data = written(folder, "6G")  # .9 of it are 5.4: the second way has 5
    assert tried == [f"{WHOLE[0]} at 1", *(f"{WHOLE[1]} at {micro}" for micro in (1, 2, 4))]
    assert (data["student"]["name"], data["teacher"]["dtype"]) == ("copy", "bf16")
    assert "offload" not in data["train"]
    assert data["train"]["accumulate"] == 8  # an eighth each, room for .4: three more
    assert written(folder, "5G")["train"]["offload"] is True
    data = written(folder, "2.75G")  # 2.475: three more samples
    assert (data["student"]["name"], data["teacher"]["dtype"], data["train"]["accumulate"]) == ("lora", "bf16", 8)
    assert "2.38 GiB by `fewstep plan --weights none`, an estimate" in Path("mine.yaml").read_text()
    bent = 2  # what is written was planned itself, and four samples do not fit
    data = written(folder, "2.75G")
    assert data["train"]["accumulate"] == 16
    assert "2.12 GiB by `fewstep plan --weights none`, an estimate" in Path("mine.yaml").read_text()
    bent = BATCH
    tried.clear()
    written(folder, "6G", lora=True)
    assert {way.partition(" at ")[0] for way in tried} == {str(SETS[0])}
    with pytest.raises(
        UserError,
        match=r"--memory 2G: LoRA sets on one frozen base, teacher in bf16, .* by `fewstep plan` still takes 2 GiB",
    ):
        written(folder, "2G")
    tried.clear()
    with pytest.raises(UserError, match=r"teacher in bf16: its weights alone take [\d.e-]+ GiB, and a tenth"):
        written(folder, "0.001M")
    assert tried == []


def test_memory_is_for_pipelines(here: Path):
    (here / "pictures").mkdir()
    with pytest.raises(UserError, match="--memory is for a pipeline"):
        list(new(Wish(Path("mine.yaml"), 2, data=here / "pictures", memory="24G")))
