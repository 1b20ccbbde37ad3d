"""What a damaged, edited or forged checkpoint does: it is refused by name, never silently different."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import names, tiny, train

from fewstep.config import UserError
from fewstep.files import crc32_of
from fewstep.train import resume
from fewstep.train.state import FORMAT, _checksum, checkpoints, is_sound, read_state
from fewstep.train.trainer import Trainer

SHORT = ("before.0.steps=6", "train.steps=12", "train.checkpoint_every=6", "train.keep=3", "optim.default.decay=constant")
STEP = "step-00000012"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 + 12 steps whose newest checkpoint, of step 12, stands in the middle of its last stage."""
    run = tmp_path_factory.mktemp("short") / "run"
    train(run, *SHORT)
    shutil.rmtree(run / "checkpoints" / "step-00000018")
    return run


@pytest.fixture
def copied(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "run"))


def opened(run: Path) -> Trainer:
    trainer = Trainer(tiny(*SHORT), run, cpu=True)
    trainer.resume()
    return trainer


def edited(run: Path, change: Callable[[dict[str, Any]], None], forge: bool) -> None:
    """Change state.json; `forge` makes its checksums right again."""
    path = run / "checkpoints" / STEP / "state.json"
    state = json.loads(path.read_text())
    change(state)
    if forge:
        for name in state["files"] if isinstance(state.get("files"), dict) else ():
            file = path.parent / name
            if file.is_file():
                state["files"][name] = [file.stat().st_size, crc32_of(file)]
        state["crc32"] = _checksum({k: v for k, v in state.items() if k != "crc32"})
    path.write_text(json.dumps(state))


def test_every_flipped_bit_of_state_json_is_noticed(copied: Path):
    path = copied / "checkpoints" / STEP / "state.json"
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(8 * len(whole), (200,), generator=draw).tolist()
    silent = []
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            read_state(path.parent)
        except UserError:
            continue
        silent.append(place)
    # White space, and the last digit of a number that two texts round to, may change: the state is the same.
    for place in silent:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        assert json.loads(data) == json.loads(whole), place


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        inside = state
        for key in keys[:-1]:
            inside = inside[key]
        inside[keys[-1]] = value

    return change


FORGED = {
    "done": put("progress", "done", value=13),
    "done negative": put("progress", "done", value=-5),
    "done half": put("progress", "done", value=2.5),
    "done true": put("progress", "done", value=True),
    "skipped text": put("progress", "skipped", value="x"),
    "no moments": put("progress", "optim", value={}),
    "moments of nobody": put("progress", "optim", value={"student": {}}),
    "other updates": put("progress", "optim", "student", "updates", value=5),
    "ema null": put("progress", "ema", value=None),
    "ema gone": put("progress", "ema", value={}),
    "ema text": put("progress", "ema", "ema_0.9", value="3"),
    "meter number": put("progress", "meter", value=[1]),
    "meter text": put("progress", "meter", value={"loss": ["a"]}),
    "origins list": put("origins", value=[]),
    "origins number": put("origins", value={"data": 1}),
    "no files": put("files", value={}),
    "files list": put("files", value=[]),
    "file outside": put("files", "../../secret", value=[1, 2]),
    "unknown field": put("progress", "extra", value=1),
    "field gone": lambda state: state["progress"].pop("meter"),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("forge", [False, True])
def test_edited_counters_are_refused(copied: Path, name: str, forge: bool):
    edited(copied, FORGED[name], forge)
    with pytest.raises(UserError, match=r"checkpoints/step-00000012[/:]"):
        opened(copied)
    shutil.rmtree(copied / "checkpoints" / STEP)
    assert opened(copied).progress.done == 6


def test_another_format_is_named_as_such(copied: Path):
    edited(copied, put("format", value=FORMAT + 1), forge=True)
    with pytest.raises(UserError, match=rf"has format {FORMAT + 1}, this fewstep reads {FORMAT}; continue the run with"):
        opened(copied)


def moments(run: Path) -> Path:
    return run / "checkpoints" / STEP / "optim-student.pt"


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def other_moments(kind: str, path: Path) -> None:
    held = torch.load(path, weights_only=True)
    first = held["state"][0]
    if kind == "larger":
        first["exp_avg"] = torch.zeros(1).expand(1 << 34)  # 64 GiB once it is copied
        torch.save(held, path)
    elif kind == "other shape":
        first["exp_avg"] = (
            first["exp_avg"].flatten()[:0].reshape(0) if first["exp_avg"].ndim == 0 else torch.zeros(2, 400)
        )
        torch.save(held, path)
    elif kind == "one element":
        first["exp_avg"] = first["exp_avg"].flatten()[:1].clone()
        torch.save(held, path)
    elif kind == "no number":
        first["step"] = torch.tensor(float("nan"))
        torch.save(held, path)
    elif kind == "groups":
        torch.save({**held, "param_groups": held["param_groups"] * 2}, path)
    elif kind == "no group":
        torch.save({**held, "param_groups": []}, path)
    elif kind == "steps":
        for state in held["state"].values():
            state["step"] += 1
        torch.save(held, path)
    elif kind == "empty":
        torch.save({}, path)
    elif kind == "list":
        torch.save([1], path)
    elif kind == "not torch's":
        path.write_bytes(b"moments")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "torch pickle":
        torch.save(Code(), path)


KINDS = (
    "one element",
    "no number",
    "larger",
    "other shape",
    "groups",
    "no group",
    "steps",
    "empty",
    "list",
    "not torch's",
    "pickle",
    "torch pickle",
)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_another_kind_are_refused_and_run_no_code(copied: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(copied)
    other_moments(kind, moments(copied))
    edited(copied, lambda state: None, forge=True)
    with pytest.raises(UserError) as caught:
        opened(copied)
    assert str(caught.value).startswith(str(moments(copied)))
    assert "weights_only" not in str(caught.value)
    assert not (copied / "ran").exists()


def test_a_run_that_diverges_keeps_its_last_sound_checkpoint(tmp_path: Path):
    """Every later checkpoint has weights or updates that are not finite; none pushes the sound one out."""
    run = tmp_path / "run"
    train(run, *SHORT, "train.keep=2")
    trainer = Trainer(tiny(*SHORT, "train.steps=24", "train.checkpoint_every=1", "train.keep=2"), run, cpu=True)
    trainer.resume()
    with torch.no_grad():
        next(trainer.roles.student.parameters()).fill_(float("inf"))
    with pytest.raises(UserError, match="in a row had non-finite gradients"):
        trainer.fit()
    *sound, last = checkpoints(run / "checkpoints")
    assert [p.name for p in sound] == ["step-00000012", "step-00000018"]
    assert all(is_sound(p) for p in sound)
    assert last.name > "step-00000020"
    assert not is_sound(last)


def test_other_settings_go_on_from_a_checkpoint(copied: Path, tmp_path: Path):
    """The same settings give the same run; others begin at the same weights, moments and step."""
    reference = train(Path(shutil.copytree(copied, tmp_path / "reference")), *SHORT)
    same = Trainer(tiny(*SHORT), None, cpu=True)
    same.go_on_from(resume.newest_of(copied))
    same.fit()
    for a, b in zip(reference.product.parameters(), same.product.parameters(), strict=True):
        assert torch.equal(a, b)
    slower = Trainer(tiny(*SHORT, "optim.student.lr=1e-9", "train.clip=1.0"), tmp_path / "slower", cpu=True)
    slower.go_on_from(resume.newest_of(copied / "checkpoints" / STEP))
    before = [p.clone() for p in slower.roles.student.parameters()]
    assert slower.progress.done == 12
    assert slower.loop.optim["student"].updates == 6
    slower.fit()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, slower.roles.student.parameters(), strict=True))
    assert names(tmp_path / "slower" / "checkpoints") == ["step-00000018"]


def test_what_cannot_be_gone_on_from_is_named(copied: Path, tmp_path: Path):
    assert resume.newest_of(copied / STEP) == copied / "checkpoints" / STEP  # RUN/step-N
    with pytest.raises(UserError, match=r"is neither a run directory with a checkpoint nor one; the run has step"):
        resume.newest_of(copied / "step-00000099")
    with pytest.raises(UserError, match="is neither a run directory"):
        resume.newest_of(tmp_path)
    for change, words in (
        (("student.width=24",), "does not fit this recipe's network"),
        (("train.ema=[0.5]",), r"has the averages train\.ema=\[0\.9, 0\.99\], this recipe \[0\.5\]; leave them so"),
    ):
        trainer = Trainer(tiny(*SHORT, *change), None, cpu=True)
        with pytest.raises(UserError, match=words):
            trainer.go_on_from(resume.newest_of(copied))


def test_other_settings_are_those_of_the_optimiser(copied: Path):
    """Loading a state brings the group options that it was saved with; the recipe's are in force."""
    change = ("optim.default={lr: 1e-3, betas: [0.1, 0.2], weight_decay: 0.7, eps: 1e-5}", "optim.student={lr: 1e-3}")
    trainer = Trainer(tiny(*SHORT[:4], *change), None, cpu=True)
    trainer.go_on_from(resume.newest_of(copied))
    (group, *_) = trainer.loop.optim["critic+discriminator"].adam.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.1, 0.2), 0.7, 1e-5)


def test_a_checkpoint_stands_in_no_other_stages(copied: Path):
    from fewstep.recipe.store import dump

    (copied / "recipe.yaml").write_text(dump(tiny(*SHORT)))
    trainer = Trainer(tiny(*SHORT, "before.0.steps=2"), None, cpu=True)
    with pytest.raises(UserError, match=r"its stages are others \(6 steps of denoise, dmd2\)"):
        trainer.go_on_from(resume.newest_of(copied))


def test_a_finished_run_is_not_gone_on_from_to_do_nothing(copied: Path):
    trainer = Trainer(tiny(*SHORT, "train.steps=6"), None, cpu=True)
    with pytest.raises(UserError, match=r"stands at the end of the run, so nothing would be trained; raise train\.steps"):
        trainer.go_on_from(resume.newest_of(copied))


def test_a_run_without_a_reward_goes_on_with_one(copied: Path):
    """Roles that no stage trains stay as they were built; those that one trains cannot be missing."""
    from fewstep.recipe.store import dump

    (copied / "recipe.yaml").write_text(dump(tiny(*SHORT)))
    term = ("roles={reward: {name: ink}}", "method.reward={weight: 0.1}")
    trainer = Trainer(tiny(*SHORT, *term), None, cpu=True)
    trainer.go_on_from(resume.newest_of(copied))
    assert trainer.progress.done == 12
    trainer.fit()
    assert "reward_loss" in trainer.last_record
    roles = "roles={reward: {name: ink}, latent_reward: {name: reward-model}}"
    learned = tiny(*SHORT, roles, "method.reward={weight: 0.1, by: latent_reward}")
    told = resume.refuses(learned, tiny(*SHORT))
    assert told == "has no role latent_reward, which this recipe trains"
    # Of an adapter on another network the weights mean nothing.
    other = ("roles={base: {name: mlp}}", "student={name: lora, of: base}")
    assert resume.untrained(tiny(*SHORT, *term)) == {"reward"}
    assert resume.untrained(tiny(*SHORT, *other)) == set()
