"""Shipped recipes and the messages of broken ones. Every message is checked to the letter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from fewstep.config import REGISTRY, RecipeError, UserError, plain
from fewstep.recipe.diff import differences
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import find, read, shipped
from fewstep.recipe.store import dump, load, load_run
from fewstep.recipe.training import Train

GOOD = """\
about: a test
data: {name: ring}
teacher: {name: ring}
student: {name: mlp, width: 8}
critic: {name: copy, of: student}
method:
  name: dmd2
  gan: null
optim:
  default: {lr: 1e-3}
train:
  steps: 40
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def problems(folder: Path, text: str, *settings: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(RecipeError) as caught:
        load(write(folder, text), settings)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def toy(*settings: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load("toy/dmd2", settings)
    return str(caught.value).splitlines()


def test_shipped_recipes_are_those_that_are_promised():
    assert {"digits-teacher", "digits-dmd2", "digits-dmd2-4step", "toy/dmd2"} <= set(shipped())


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipe_validates_and_round_trips(name: str, tmp_path: Path):
    recipe = load(name)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    again = load_run(tmp_path)
    assert again == recipe
    assert plain(again) == plain(recipe)
    assert dump(again) == dump(recipe)
    assert differences(recipe, again, all_keys=True) == []


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_is_measured_by_what_fits_its_data(name: str):
    recipe = load(name)
    fitting = {
        "ring": "energy",
        "digits": "fd-house-digits",
        "fashion-mnist": "fd-house-fashion-mnist",
        "captions": "fd-effnet-lite0",
        "degraded": "paired-house-digits",
        "helices": "chains",
        "voxel-digits": "voxels",
    }
    if recipe.evaluate is not None and recipe.evaluate.against:
        fitting["prompts"] = "fd"  # which has no pictures of its own
    metric = None if recipe.evaluate is None else recipe.evaluate.metric
    if recipe.data.name == "prompts" and recipe.evaluate is not None:  # type: ignore[attr-defined]
        assert (metric, recipe.evaluate.against) == ("fd", "pictures")  # prompts bring none of their own
        return
    if name in ("digits-bold-lora", "digits-std-i2i"):
        assert metric is None  # bolder strokes, and what begins with a picture, are no samples of the digits
        return
    assert metric == fitting.get(recipe.data.name)  # type: ignore[attr-defined]


def test_four_steps_are_trained_as_one_is():
    found = differences(load("digits-dmd2"), load("digits-dmd2-4step"))
    assert found == ["method.steps: [1.0] -> [1.0, 0.75, 0.5, 0.25]"]


def test_a_dumped_recipe_spells_every_default(tmp_path: Path):
    data = yaml.safe_load(dump(load(write(tmp_path, GOOD))))
    assert set(data) == {f.name for f in dataclasses.fields(Recipe)}
    assert data["optim"]["default"]["betas"] == [0.9, 0.999]
    assert data["method"]["critic"]["steps"] == 5
    assert data["train"]["keep"] == 2


def test_numbers_are_read_as_people_write_them(tmp_path: Path):
    for written, lr in (
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("5.e-3", 5e-3),
        (".5", 0.5),
        ("1", 1.0),
        ("+2e+0", 2.0),
    ):
        recipe = load(write(tmp_path, GOOD), [f"optim.default.lr={written}"])
        assert recipe.optim["default"].lr == lr
        assert type(recipe.optim["default"].lr) is float
    assert load(write(tmp_path, GOOD), ["train.steps=1_000"]).train.steps == 1000
    # YAML 1.1 would read these as true, a date and 90.
    for text in ("on", "yes", "2020-01-01", "1:30"):
        assert load(write(tmp_path, GOOD), [f"about={text}"]).about == text


def test_settings_reach_every_depth_and_leave_the_rest(tmp_path: Path):
    base = load(write(tmp_path, GOOD))
    new = load(
        write(tmp_path, GOOD),
        [
            "train.steps=7",
            "method.steps=[1.0, 0.5]",
            "method.steps.1=0.25",
            "optim.student={lr: 2e-3}",
            "train.steps=8",
        ],
    )
    assert new.train.steps == 8
    assert new.method.steps == (1.0, 0.25)
    assert new.optimizer("student").lr == 2e-3
    assert new.optimizer("critic").lr == 1e-3
    assert differences(base, new, all_keys=True) == [
        "method.steps: [1.0] -> [1.0, 0.25]",
        "optim.student: None -> {'lr': 0.002, 'rule': 'adamw', 'betas': [0.9, 0.999], 'eps': 1e-08, 'weight_decay': 0.0, "
        "'warmup': 0, 'decay': 'constant', 'bits': 32}",
        "train.steps: 40 -> 8",
    ]
    # A changed length may be continued, changed mathematics may not.
    assert [d.partition(":")[0] for d in differences(base, new)] == ["method.steps", "optim.student"]


def test_extends_one_level_and_replaces_a_part_whose_name_changes(tmp_path: Path):
    write(tmp_path, GOOD.replace("name: ring}\nteacher", "name: ring, std: 0.2}\nteacher"), "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nabout: child\nmethod: {steps: [1.0, 0.5]}\nteacher: {std: 0.2}\n")
    recipe = load(child)
    assert recipe.about == "child"
    assert recipe.method.steps == (1.0, 0.5)
    assert recipe.method.gan is None
    assert recipe.data.std == recipe.teacher.std == 0.2
    text = f"extends: {tmp_path}/base.yaml\nmethod: {{name: denoise}}\nteacher: {{std: 0.2}}\n"
    other = write(tmp_path, text, "other.yaml")
    method = load(other).method
    assert method.name == "denoise"  # and gan of dmd2 is not carried over, which would be an unknown key
    grandchild = write(tmp_path, "extends: mine.yaml\nabout: too deep\n", "grandchild.yaml")
    with pytest.raises(RecipeError, match=r"grandchild\.yaml:1: extends: mine\.yaml extends another recipe; only one"):
        load(grandchild)
    with pytest.raises(RecipeError, match=r"lost\.yaml:1: extends: recipe 'toy/dmd22' is not shipped; did you mean"):
        load(write(tmp_path, "extends: toy/dmd22\n", "lost.yaml"))


def test_problems_of_an_extended_recipe_name_the_file_they_stand_in(tmp_path: Path):
    write(tmp_path, GOOD.replace("steps: 40", "steps: forty"), "base.yaml")
    assert problems(tmp_path, "extends: base.yaml\nmethod: {gan_wight: 1}\n") == [
        "mine.yaml:2: method.gan_wight: unknown key; did you mean 'gan.weight'?",
        "base.yaml:12: train.steps: expected int, got 'forty'",
    ]


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path):
    text = """\
about: 3
data: {name: rings}
teacher: {name: ring, st: 0.2}
student: {name: mlp, width: 8.0}
critc: {name: copy}
method:
  name: dmd2
  steps: 1.0
  critic: {steps: two}
  times: {name: levels}
  gan: {shares_noise: 1}
optim:
  default: {lr: "1e-3", decay: cosin}
train:
  step: 40
  batch: 4
  batch: 5
"""
    assert problems(tmp_path, text) == [
        "mine.yaml:1: about: expected text, got 3",
        f"mine.yaml:2: data.name: 'rings' is not one of {', '.join(REGISTRY['data'])}; did you mean 'ring'?",
        "mine.yaml:3: teacher.st: unknown key; did you mean 'std'?",
        "mine.yaml:4: student.width: expected int, got 8.0",
        "mine.yaml:5: critc: unknown key; did you mean 'critic'?",
        "mine.yaml:8: method.steps: expected a list, got 1.0",
        "mine.yaml:9: method.critic.steps: expected int, got 'two'",
        "mine.yaml:10: method.times.at: required key is missing",
        "mine.yaml:11: method.gan.shares_noise: expected true or false, got 1",
        "mine.yaml:13: optim.default.lr: expected float, got '1e-3'",
        "mine.yaml:13: optim.default.decay: 'cosin' is not one of constant, linear, cosine; did you mean 'cosine'?",
        "mine.yaml:15: train.step: unknown key; did you mean 'steps'?",
        "mine.yaml:17: train.batch: key stands twice (first in line 16)",
    ]


def test_missing_keys_are_named(tmp_path: Path):
    assert problems(tmp_path, "train: {steps: 3}\n") == [
        f"mine.yaml:1: {key}: required key is missing" for key in ("about", "data", "student", "method", "optim")
    ]
    assert problems(tmp_path, GOOD.replace("{lr: 1e-3}", "{warmup: 3}")) == [
        "mine.yaml:10: optim.default.lr: required key is missing"
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps=3.0", "train.steps: expected int, got 3.0"),
        ("train.steps=1e2", "train.steps: expected int, got 100.0"),
        ("train.steps=true", "train.steps: expected int, got True"),
        ("train.steps=", "train.steps: expected int, got None"),
        ("train.steps=1:30", "train.steps: expected int, got '1:30'"),
        ("train.stpes=3", "train.stpes: unknown key; did you mean 'steps'?"),
        ("optim.default.lrr=1", "optim.default.lrr: unknown key; did you mean 'lr'?"),
        ("before.0.stpes=1", "before.0.stpes: unknown key; did you mean 'steps'?"),
        ("method.times={name: uniform, lo: 0.1}", "method.times.lo: unknown key; did you mean 'low'?"),
        ("data={name: ring, sdt: 1.0}", "data.sdt: unknown key; did you mean 'std'?"),
        (
            "train.zzzzz=1",
            f"train.zzzzz: unknown key; allowed: {', '.join(f.name for f in dataclasses.fields(Train))}",
        ),
        (
            "method.name=denoize",
            f"method.name: 'denoize' is not one of {', '.join(REGISTRY['method'])}; did you mean 'denoise'?",
        ),
        ("optim.default.lr=.nan", "optim.default.lr: expected float, got '.nan'"),
        ("optim.default.lr=1e999", "optim.default.lr: a finite number, got inf"),
        ("optim.default.lr=0", "optim.default.lr: lr must be positive, not 0.0"),
        ("optim.default.betas=[0.9]", "optim.default.betas.1: required key is missing"),
        ("optim.default.betas=[0.9, 1.0]", "optim.default.betas: betas must lie in [0, 1), not [0.9, 1.0]"),
        ("optim={}", "optim: optim has no entry for student and no default"),
        ("optim={student: {lr: 1e-3}}", "optim: optim has no entry for critic and no default"),
        ("method.steps=[0.5, 1.0]",
         "method.steps: steps [0.5, 1.0] must decrease strictly: the first level is the noisiest"),
        ("method.steps=[1.0, 1.0]",
         "method.steps: steps [1.0, 1.0] must decrease strictly: the first level is the noisiest"),
        ("method.steps=[1.5]", "method.steps: steps [1.5] must lie in (0, 1], the levels of the process grid"),
        ("method.steps=[1.0, 0.0]",
         "method.steps: steps [1.0, 0.0] must lie in (0, 1], the levels of the process grid"),
        ("method.steps=[]", "method.steps: steps is empty; give at least one level, such as [1.0]"),
        ("copy={critic: nobody}", "copy: role 'nobody' is not in this recipe; it has critic, student, teacher"),
        ("before.0.steps=0", "before.0.steps: steps must be at least 1, not 0"),
        ("before.0.rates={student: 0}", "before.0.rates.student: must be positive, not 0.0"),
        ("before.0.rates={critic: 0.1}", "before.0.rates.critic: method denoise trains student"),
        (
            "before.0.rates={studnet: 0.1}",
            "before.0.rates.studnet: method denoise trains student; did you mean 'student'?",
        ),
        ("train.batch=0", "train.batch: batch must be at least 1, not 0"),
        ("train.accumulate=5", "train.accumulate: accumulate 5 must divide batch 384"),
        ("train.ema=[0.9, 0.9]", "train.ema: ema decays must differ, not [0.9, 0.9]"),
        ("train.ema=[1.0]", "train.ema: ema decays must lie in [0, 1), not [1.0]"),
        ("train.precision=fp16", "train.precision: 'fp16' is not one of fp32, bf16; did you mean 'bf16'?"),
        ("evaluate.samples=1", "evaluate.samples: samples must be at least 2, not 1"),
        ("evaluate.teacher_steps=[0]", "evaluate.teacher_steps: teacher_steps must be at least 1, not [0]"),
        ("student.prediction=epsilon", "student.prediction: prediction 'epsilon' is not one of x0, eps, v, velocity, "
         "psi, score, edm, cm, trig"),
        ("student.prediction=cm", "student.prediction: prediction 'cm' needs the process edm, not flow"),
        ("student.width=0", "student.width: greater than 0, got 0"),
        ("train=null", "train: an object, got None"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_blamed_on_the_argument(setting: str, message: str):
    assert toy(setting) == [f"argument {setting!r}: {message}"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "expected key=value, such as train.steps=200"),
        ("=3", "expected key=value, such as train.steps=200"),
        ("about=[1", "'[1' is not a YAML value"),
        ("about=!secret x", "'!secret x' is not a YAML value"),
        ("about.x=3", "about has no keys"),
        ("before.7.steps=1", "before.7 has no keys"),
        ("before.3=1", "the list has 1 entries"),
    ],
)
def test_a_setting_that_fits_nowhere(setting: str, message: str):
    assert toy("train.steps=5", setting) == [f"argument {setting!r}: {message}"]


def test_a_role_that_is_not_there_is_blamed_on_its_own_key(tmp_path: Path):
    assert toy("optim.critc.lr=1e-3") == [
        "argument 'optim.critc.lr=1e-3': optim.critc: no such role; did you mean 'critic'?"
    ]
    assert problems(tmp_path, GOOD.replace("lr: 1e-3}", "lr: 1e-3}\n  zebra: {lr: 1}")) == [
        "mine.yaml:11: optim.zebra: no such role; it has critic, student, teacher"
    ]


def test_a_role_that_the_method_needs_is_asked_for(tmp_path: Path):
    assert problems(tmp_path, GOOD, "critic=null") == ["mine.yaml:6: method: method dmd2 needs the role critic"]
    assert problems(tmp_path, GOOD, "critic=null", "teacher=null") == [
        "mine.yaml:6: method: method dmd2 needs the roles critic, teacher"
    ]
    assert problems(tmp_path, GOOD.replace("  gan: null\n", "")) == [
        "mine.yaml:6: method: method dmd2 needs the role discriminator"
    ]
    assert problems(tmp_path, GOOD + "roles: {student: {name: mlp}}\n") == [
        "mine.yaml:13: roles: 'student' has a meaning of its own; choose another name"
    ]
    kept = load(write(tmp_path, GOOD + "roles: {target: {name: copy, of: student}}\ncopy: {target: student}\n"))
    assert kept.role_names() == ["teacher", "student", "target", "critic"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about: [1\nb: 2\n", "mine.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("about: a\n\tb: 2\n", "mine.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("about: !!python/object:os.system x\n", "mine.yaml:1: not valid YAML: could not determine a constructor for "
         "the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("about: a\x00b\n", "mine.yaml:1: not valid YAML: special characters are not allowed"),
        ("- a\n- b\n", "mine.yaml:1: a recipe is a mapping of keys to values"),
        ("", "mine.yaml:1: a recipe is a mapping of keys to values"),
    ],
)  # fmt: skip
def test_text_that_is_no_recipe(tmp_path: Path, text: str, message: str):
    assert problems(tmp_path, text) == [message]


def test_recipes_that_cannot_be_found_or_read(tmp_path: Path):
    for name, message in (
        ("digit-dmd2", "recipe 'digit-dmd2' is not shipped; did you mean 'digits-dmd2'?"),
        ("qqqqqqqq", "recipe 'qqqqqqqq' is not shipped; see `fewstep recipes ls`"),
        ("nowhere/x.yaml", "nowhere/x.yaml: no such recipe file"),
    ):
        with pytest.raises(RecipeError) as caught:
            find(name)
        assert str(caught.value) == message
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"about: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml: cannot be read: 'utf-8' codec can't decode"):
        read(str(path))
    with pytest.raises(UserError, match=r"is not a run directory \(recipe\.yaml is missing\)$"):
        load_run(tmp_path)


def test_roles_that_do_not_fit_each_other_are_refused_before_training():
    from fewstep.train.build import build_roles

    def refused(*settings: str) -> str:
        recipe = load("toy/dmd2", settings)
        with pytest.raises(RecipeError) as caught:
            build_roles(recipe, recipe.data.open())
        return str(caught.value)

    assert refused("student={name: copy}", "critic={name: copy}").startswith("copy.of: the teacher is analytic and")
    assert refused("discriminator={taps: [mid, top]}") == ("discriminator: taps ['top'] are unknown to MLP; allowed: mid")
    assert refused("discriminator={trunk: teacher}") == (
        "discriminator: an analytic teacher has no features; put the discriminator on the critic"
    )
    assert refused("student={name: dit}") == "network dit is for images; the data has shape [2]"
