"""What a method needs of its student is told with the roles, before anything is built: file, key, what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewstep.algebra.process import EDM, Flow
from fewstep.commands.check_recipe import check
from fewstep.config import REGISTRY, RecipeError
from fewstep.data.base import conditions_of
from fewstep.methods.joint import Joint, Share
from fewstep.methods.method import Needs
from fewstep.networks.declared import declared_inputs, declared_process
from fewstep.networks.routed import ExpertsSpec
from fewstep.networks.specs import Copy, Lora, MLPSpec, UNet2DSpec
from fewstep.recipe.store import load
from fewstep.train.build import build_roles
from fewstep.train.trainer import Trainer

TOYS = {
    "meanflow": "toy/meanflow", "imm": "toy/imm", "self_e": "toy/self-e", "reflow": "toy/reflow",
    "shortcut": "toy/shortcut", "mdt": "toy/mdt", "scfm": "toy/scfm", "twinflow": "toy/twinflow",
    "freeflow": "toy/freeflow",
}  # fmt: skip
"""Methods of the flow process alone, with a recipe whose student is built from scratch."""
INPUTS = {
    "boot": ["s"], "freeflow": ["s"], "meanflow": ["s"], "self_e": ["s"], "shortcut": ["s"], "twinflow": ["mirror", "s"],
}  # fmt: skip


def refused(name: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(name, settings)
    return str(caught.value)


def plain_methods() -> dict[str, Any]:
    return {name: method() for name, method in REGISTRY["method"].items() if name != "joint"}


def test_which_methods_ask_for_what():
    needs = {name: method.needs() for name, method in plain_methods().items()}
    assert {name for name, n in needs.items() if n.process} == set(TOYS)
    assert {name: sorted(n.inputs) for name, n in needs.items() if n.inputs} == INPUTS


@pytest.mark.parametrize("method", sorted(TOYS))
def test_another_process_is_refused_with_file_and_key(method: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    trig = "process: {name: trig}"
    path.write_text(f"extends: {TOYS[method]}\nabout: mine\nteacher: {{{trig}}}\nstudent:\n  {trig}\n")
    message = f"{path}:5: student.process: method {method} needs flow or shifted_flow, not trig"
    assert refused(str(path)) == message


def test_a_process_built_on_flow_will_do():
    shifted = "{name: shifted_flow, shift: 3.0}"
    recipe = load("toy/imm", [f"student.process={shifted}", f"teacher.process={shifted}"])
    assert recipe.student.process.shift == 3.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", sorted(INPUTS))
def test_missing_inputs_are_refused_with_file_and_key(method: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    name = {**TOYS, "boot": "toy/boot"}[method]
    for have in ([], ["w"]):
        text = ", ".join(have)
        path.write_text(f"extends: {name}\nabout: mine\nstudent: {{inputs: [{text}]}}\n")
        wanted = ", ".join(INPUTS[method])
        assert refused(str(path)) == f"{path}:3: student.inputs: method {method} needs [{wanted}], not [{text}]"
    # One of two is not enough.
    if method == "twinflow":
        assert refused(name, "student.inputs=[s]").endswith("needs [mirror, s], not [s]")


def test_which_methods_choose_among_conditions():
    every = {"none", "classes", "text", "image", "points"}
    needs = {name: set(method.needs().conditions) for name, method in plain_methods().items()}
    assert {name: kinds for name, kinds in needs.items() if kinds != every} == {
        "self_e": {"classes", "text"},
        "std": {"none", "classes"},
    }
    shares = (Share(method=REGISTRY["method"][name]()) for name in ("self_e", "std"))
    assert Joint(methods=tuple(shares)).needs().conditions == {"classes"}


def test_data_without_the_conditions_that_a_method_needs_are_refused():
    assert refused("toy/self-e", "data.conditional=false").endswith(
        "data: method self_e needs data whose conditions are classes or text, not none"
    )
    prompts = "data={name: prompts, path: p.txt, shape: [1, 8, 8], encoder: {name: sentence, path: e, length: 7}}"
    assert refused("digits-std", prompts).endswith(
        "data: method std needs data whose conditions are none or classes, not text"
    )
    load("toy/std", ["data.conditional=true"])


def test_conditions_that_only_files_tell_are_refused_when_the_roles_are_built():
    recipe = load("toy/self-e", ["data={name: images, path: there}"])
    with pytest.raises(
        RecipeError, match=r"^data: method self_e needs data whose conditions are classes or text, not none$"
    ):
        build_roles(recipe, load("toy/std").data.open())


@pytest.mark.parametrize(
    ("data", "declared", "opened"),
    [
        ("{name: digits}", "classes", "classes"),
        ("{name: ring}", "none", "none"),
        ("{name: ring, conditional: true}", "classes", "classes"),
        ("{name: images, path: p}", None, None),
        ("{name: latents, path: p, vae: v}", None, None),
        ("{name: captions, path: p, size: 8}", "none", None),
        ("{name: webdataset, shards: p, size: 8, classes: 3}", "classes", None),
    ],
)
def test_data_say_what_stands_beside_a_sample(data: str, declared: str | None, opened: str | None):
    spec = load("toy/dmd2", [f"data={data}"]).data
    assert spec.conditions == declared
    if opened is not None:
        assert conditions_of(spec.open()) == opened


def test_the_key_is_that_of_the_role_which_decides():
    bad = "teacher.process={name: edm}"
    assert refused("digits-imm", bad) == (
        f"argument {bad!r}: teacher.process: method imm needs flow or shifted_flow, not edm"
    )
    experts = "student={name: experts, of: {name: copy, of: teacher, inputs: [s]}}"
    assert "teacher.process: method imm" in refused("digits-imm", bad, experts)
    fixed = "student={name: unet2d}"
    assert refused("digits-imm", fixed) == (
        f"argument {fixed!r}: student: method imm needs flow or shifted_flow, not edm"
    )
    copied = "student={name: copy, of: teacher}"
    assert refused("digits-shortcut", copied) == (
        f"argument {copied!r}: student.inputs: method shortcut needs [s], not []"
    )


def test_a_stage_before_is_checked_too():
    message = refused("toy/slimflow", "student.process={name: trig}", "teacher.process={name: trig}")
    assert "student.process: method reflow needs flow or shifted_flow, not trig" in message


def test_processes_that_differ_are_refused_before_building():
    assert refused("toy/dmd2", "student.process={name: trig}") == (
        "dmd2.yaml:3: teacher.process: Flow(name='flow') differs from the student's, Trig(name='trig'); use the same"
    )


def test_what_only_the_teacher_s_folder_says_is_refused_by_check_and_by_building(tmp_path: Path):
    setting = "teacher.process=null"
    recipe = load("digits-imm", [setting])
    told = "teacher.process: method imm needs flow or shifted_flow, not edm"
    with pytest.raises(RecipeError) as caught:
        check("digits-imm", [setting])
    assert str(caught.value) == f"argument {setting!r}: {told}"
    with pytest.raises(RecipeError) as caught:
        build_roles(recipe, recipe.data.open())  # type: ignore[attr-defined]
    assert str(caught.value) == told


def test_declared_by_spec():
    specs = {
        "teacher": MLPSpec(process=EDM(), prediction="x0", inputs=("w",)),
        "student": Copy(inputs=("s",)),
    }
    assert declared_process(specs["student"], "student", specs) == (EDM(), "teacher.process")
    assert declared_inputs(specs["student"], "student", specs) == (frozenset({"s", "w"}), "student.inputs")
    lora = Lora(of="student")
    assert declared_inputs(lora, "critic", specs) == (frozenset({"s", "w"}), "student.inputs")
    experts = ExpertsSpec(of=MLPSpec(inputs=("s",)))
    assert declared_process(experts, "student", {}) == (Flow(), "student.of.process")
    assert declared_inputs(experts, "student", {}) == (frozenset({"s"}), "student.of.inputs")
    assert declared_process(UNet2DSpec(sigma_data=0.3), "student", {}) == (EDM(sigma_data=0.3), "student")
    # A copy of itself, or of nobody, is for building to explain.
    circle = {"student": Copy(of="critic"), "critic": Copy(of="student")}
    assert declared_process(circle["student"], "student", circle)[0] is None
    assert declared_process(Copy(of="nobody"), "student", {})[0] is None


def test_joint_asks_for_what_its_methods_ask():
    methods = plain_methods()
    joint = Joint(methods=(Share(method=methods["dmd2"]), Share(method=methods["self_e"])))
    assert (joint.needs().process, joint.needs().inputs) == ("flow", frozenset({"s"}))


def test_a_process_that_does_not_exist_cannot_be_needed():
    with pytest.raises(ValueError, match="process 'flwo' is not one of flow, "):
        Needs(frozenset(), process="flwo")


def test_shared_noise_asks_for_the_critic_s_trunk():
    told = refused("digits-dmd2", "method.gan.shares_noise=true")
    assert told.startswith("digits-dmd2.yaml:7: discriminator.trunk: 'teacher' will not do where gan.shares_noise judges")
    load("digits-dmd2", ["method.gan.shares_noise=true", "discriminator.trunk=critic"])
    joint = "method.methods.0.method.gan.shares_noise=true"
    assert "discriminator.trunk: 'teacher' will not do" in refused("digits-joint", joint)


JOINT = "method={name: joint, methods: [{method: {name: denoise}}, {method: %s}]}"
FADING = "{name: fading_beta, over: 4}"


def test_a_method_within_a_joint_one_is_looked_into():
    told = refused("toy/pso", JOINT % "{name: pso, steps: [1.0, 0.5]}")
    assert "method.methods.1.method.reference: the student is no adapter" in told
    told = refused("toy/dmd2", JOINT % "{name: dmd2, gan: null, lean: {}}", "before=[]", "copy={}")
    assert "method.methods.1.method.lean: takes the teacher with a share of the critic's adapter" in told


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("toy/dmd2", "method.simulate.times"),
        ("toy/dmd2", "before.0.method.pairing.times"),
        ("toy/meanflow", "method.times"),
        ("toy/freeflow", "method.times"),
        ("toy/dmd2", "method.methods.1.method.simulate.times"),
    ],
)
def test_a_law_that_changes_is_refused_where_levels_are_drawn_without_the_step(recipe: str, key: str):
    settings = [f"{key}={FADING}"]
    if "simulate" in key:
        settings = ["method.gan=null", f"method.simulate={{least: 1, most: 2, times: {FADING}}}"]
    if "methods" in key:
        settings = [JOINT % f"{{name: dmd2, gan: null, simulate: {{least: 1, most: 2, times: {FADING}}}}}"]
    if "pairing" in key:
        settings = [f"before.0.method={{name: consistency, pairing: {{name: ect, times: {FADING}}}}}"]
    assert f"{key}: fading_beta changes with the step, which these levels are drawn without" in refused(recipe, *settings)


def test_a_law_that_changes_trains_where_the_step_is_known():
    small = ["student.width=8", "student.depth=2", "evaluate=null", "train.batch=8", "train.sample_every=0"]
    inner = f"times: {FADING}, critic: {{times: {FADING}}}"
    dmd2 = f"method={{name: dmd2, gan: null, {inner}, off_trajectory: {{times: {FADING}}}}}"
    before = f"before=[{{steps: 1, method: {{name: denoise, times: {FADING}}}}}]"
    phased = f"method={{name: phased_dmd, steps: [1.0, 0.5], {inner}}}"
    for method in (dmd2, phased):
        trainer = Trainer(load("toy/dmd2", [*small, before, method, "train.steps=2", "train.guard=off"]), cpu=True)
        trainer.fit()
        assert trainer.progress.done == 3
