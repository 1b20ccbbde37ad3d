"""What is said about an export before anything is trained: by run, by plan and by recipes check, as the exporter says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pictures import write
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.commands.plan import plan
from fewstep.config import UserError
from fewstep.export import forecast
from fewstep.export.choose import export
from fewstep.export.forecast import about, outlined, warning, weightless
from fewstep.networks.adapters import Adapted, own_state
from fewstep.recipe.store import load
from fewstep.train.product import Product, product_of
from fewstep.train.trainer import Trainer

MLP = "will not export to a stock pipeline: no stock diffusers pipeline runs a MLP student"
MODULE = "{name: module, factory: a:b, arguments: {x: x}, prediction: v, time_input: t, process: {name: flow}}"
SHORT = ["before=[]", "copy={}", "train.steps=1", "train.batch=6", "train.sample_every=0", "evaluate=null"]


def built(name: str, *settings: str) -> Product:
    trainer = Trainer(load(name, settings), None, cpu=True)
    return product_of(trainer.recipe, trainer.product, trainer.data, "student")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("digits-dmd2", "train.batch=64"),
        ("digits-pcm", "train.batch=64"),
        ("digits-icd", "train.batch=64"),
        ("digits-tdd", "train.batch=64"),
        ("digits-dmd2-4step", "method.steps=[1.0, 0.123456789]"),
        ("digits-dmd2", "student={name: lora, of: teacher, rank: 2}"),
        ("digits-multi-student", "train.batch=64"),
        ("digits-phased-dmd", "train.batch=64"),
        ("digits-slimflow", "train.batch=64"),
        ("digits-teacher", "train.batch=64"),
        ("toy/dmd2", "train.batch=64"),
    ],
)
def test_what_is_foretold_is_what_the_exporter_does(name: str, setting: str, tmp_path: Path):
    product = built(name, setting)
    told = warning(lambda: product)
    assert about(load(name, [setting]))[2] == told
    if not told:
        assert export(product, tmp_path / "out").folder.is_dir()
        return
    with pytest.raises(UserError) as caught:
        export(product, tmp_path / "out")
    assert told == f"will not export to a stock pipeline: {caught.value}"


def test_asking_copies_no_weight_and_changes_none():
    product = built("digits-dmd2", "student={name: lora, of: teacher, rank: 2}")
    net: Any = product.net
    assert isinstance(net, Adapted)
    before = {k: v.clone() for k, v in net.base.state_dict().items()}
    bare: Any = weightless(net)
    assert {t.device.type for t in (*bare.parameters(), *bare.buffers())} == {"meta"}
    assert {k: v.shape for k, v in bare.state_dict().items()} == {k: v.shape for k, v in own_state(net.base).items()}
    assert warning(lambda: product) == ""
    after = net.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_what_cannot_be_asked_is_said_and_does_not_stop_a_run():
    def broken() -> Product:
        raise TypeError("cannot be copied\nat all")

    assert warning(broken) == "whether it will export is not checked: cannot be copied"
    lost = load("digits-dmd2", ["teacher.path=nowhere"])
    assert about(lost)[2].startswith("not checked: teacher nowhere: no such folder")
    with pytest.raises(UserError, match="known only once it is built"):
        outlined(load("digits-dmd2", [f"teacher={MODULE}"]))


def test_a_student_is_asked_about_on_the_site_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for c in range(1, 11):
        write(tmp_path / str(c), x_png=Image.new("L", (8, 8)))
    sites: list[Any] = []

    def kept(_: Any, site: Any) -> Any:
        sites.append(site)
        raise UserError("stop")

    monkeypatch.setattr(forecast, "bare_student", kept)
    data = f"data={{name: images, path: {tmp_path}, grey: true}}"
    for name in ("digits-dmd2", "digits-teacher"):
        with pytest.raises(UserError, match="stop"):
            outlined(load(name, [data, "evaluate=null"]))
    assert [site.renumbered[:29] for site in sites] == 2 * ["class folder 1 has label 0, a"]


def test_run_plan_and_check_say_it_in_one_line(tmp_path: Path):
    def lines(*command: str, ended: int = 0) -> list[str]:
        done = CliRunner().invoke(app, [*command])
        assert done.exit_code == ended, done.output
        return done.output.splitlines()

    checked = lines("recipes", "check", "toy/dmd2")
    assert checked[-1] == f"toy/dmd2: export: {MLP}"
    assert checked[-2].startswith("toy/dmd2: schedule: training and evaluation agree")
    good = lines("recipes", "check", "digits-dmd2")
    assert good[-1].startswith("digits-dmd2: schedule: training, evaluation and CMStochasticIterativeScheduler")
    lost = lines("recipes", "check", "digits-dmd2", "teacher.path=nowhere", ended=3)
    assert lost[-2] == "digits-dmd2: schedule and export: not known without the student"
    assert lost[-1].startswith("digits-dmd2: not checked: teacher nowhere: no such folder")
    out = lines("run", "toy/dmd2", *SHORT, "train.log_every=1", "--out", str(tmp_path / "run"))
    said, trained = out.index(f"note: this run {MLP}"), next(i for i, x in enumerate(out) if "step 1/1" in x)
    assert said < trained
    assert out[-1] == f"not exported: {MLP.partition(': ')[2]}"
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "run")]).exception
    assert isinstance(refused, UserError)
    assert str(refused) == f"{tmp_path / 'run'}: {out[-1]}"
    assert plan(load("toy/dmd2", SHORT), ways=False).export == MLP
    assert plan(load("digits-dmd2", SHORT), ways=False).export == ""
