"""Files and counts that nobody in good faith writes: one line that names them, before memory is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_teacher import edit_json, make_teacher

from fewstep.commands.options import check_sheet, parse_classes, parse_steps
from fewstep.commands.report import read_results
from fewstep.config import RecipeError, UserError
from fewstep.data.shards import read_index
from fewstep.export.card import fenced, plain
from fewstep.files import JSON_DEPTH, parse_json, read_json
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import read_folder
from fewstep.recipe.store import load
from fewstep.train.product import check_step_count

DEEP = "[" * 100_000


def refusal(call: Any, *args: Any, **more: Any) -> str:
    with pytest.raises(UserError) as told:
        call(*args, **more)
    return str(told.value)


@pytest.mark.parametrize(
    "text", ["", "{", DEEP, '{"a": ' * 5000, "[" * 65 + "]" * 65, "\udcff", '{"a": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_json_is_named(tmp_path: Path, text: str):
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refusal(read_json, file).startswith(f"{file}: cannot be read as JSON: ")


def test_json_of_a_sane_depth_is_read(tmp_path: Path):
    text = '{"a": ' + "[" * (JSON_DEPTH - 1) + "]" * (JSON_DEPTH - 1) + "}"
    assert parse_json(text, "x") == json.loads(text)
    file = tmp_path / "x.json"
    file.write_text("[]")
    assert refusal(read_json, file) == f"{file}: expected a JSON object"
    assert (
        refusal(read_json, tmp_path / "none") == f"{tmp_path / 'none'}: cannot be read as JSON: No such file or directory"
    )
    assert "Is a directory" in refusal(read_json, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", DEEP, "{}", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"name": 1}]}'])
def test_damaged_results_are_named_with_a_remedy(tmp_path: Path, text: str):
    file = tmp_path / "results.json"
    file.write_text(text)
    told = refusal(read_results, file)
    assert told.count(str(file)) == 1
    assert told.endswith("; delete it, or measure the run again")


@pytest.mark.parametrize("change", [
    {"count": "5"}, {"count": 1e30}, {"rows": 0}, {"rows": True}, {"made_with": []}, {"shards": []},
    {"shards": {"0": [1]}}, {"shards": {"../../x": [1, 2]}}, {"shards": {"0": ["a", "b"]}}, {"shards": None},
])  # fmt: skip
def test_a_forged_index_of_shards_is_named(tmp_path: Path, change: dict[str, Any]):
    good = {"made_with": {"vae": "x"}, "count": 4, "rows": 4, "shards": {"0": [10, 11]}}
    (tmp_path / "index.json").write_text(json.dumps(good))
    assert read_index(tmp_path) == good
    (tmp_path / "index.json").write_text(json.dumps(good | change))
    assert refusal(read_index, tmp_path).startswith(f"{tmp_path / 'index.json'}: cannot be read: ")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("hostile") / "teacher")


def test_configs_of_a_teacher_are_checked(teacher: Path, tmp_path: Path):
    folder = Path(shutil.copytree(teacher, tmp_path / "t"))
    unet, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    edit_json(scheduler, num_train_timesteps=10**12)
    assert (
        refusal(load_denoiser, str(folder))
        == f"{scheduler}: num_train_timesteps is 1000000000000; at most 65536 are read"
    )
    edit_json(scheduler, num_train_timesteps=40)
    for key, value in (("norm_eps", [-1]), ("dropout", "x"), ("reverse_transformer_layers_per_block", [None])):
        before = unet.read_text()
        edit_json(unet, **{key: value})
        told = refusal(load_denoiser, str(folder))
        assert told.startswith(f"{unet}: {key} is {json.dumps(value)}")
        unet.write_text(before)
    unet.write_text(DEEP)
    assert refusal(read_folder, str(folder)).startswith(f"{unet}: cannot be read as JSON: is nested deeper")


def test_counts_are_bounded_before_memory_is_asked_for():
    for text in ("0-99999999999", "5-4", "9-10", "99999999999", "1" * 5000, "3,0-" + "9" * 40):
        assert "--classes" in refusal(parse_classes, text, 10)
    assert parse_classes("0-9", 10) == list(range(10))
    for text in ("100000000000", "1" * 5000, "10001"):
        assert "--steps" in refusal(parse_steps, text)
    assert parse_steps("4,1,10000") == (1, 4, 10_000)
    assert "--steps must be at most 10000, not" in refusal(check_step_count, 10**11, "--steps")
    for count, shape in ((10**12, (1, 8, 8)), (0, (2,)), (100_001, (2,)), (2000, (3, 1024, 1024))):
        assert refusal(check_sheet, count, shape).startswith(f"--count {count}: expected 1 to ")
    check_sheet(100_000, (1, 8, 8))


@pytest.mark.parametrize("setting", [
    "student.width=1000000000", "student.depth=1000000", "data.modes=1000000000", "student={name: mlp, width: 65536}",
    "train.batch=1000000000000", "evaluate.samples=1000000000000", "evaluate.teacher_steps=[100000000000]",
    "data.std=0.0", "data.std=-1.0", "data.radius=1e300", "teacher.std=0.0", "data.modes=5", "teacher.radius=2.0",
    "student.frequencies=1000000",
])  # fmt: skip
def test_sizes_that_cannot_be_meant_are_refused_at_check(setting: str):
    with pytest.raises(RecipeError, match=r"argument '|dmd2.yaml:3: teacher\.modes: 8 is not the data's, 5"):
        load("toy/dmd2", [setting])


@pytest.mark.parametrize(("settings", "words"), [
    (["student={name: copy, of: ghost}"], "student.of: role 'ghost' is not in this recipe; built before student: tea"),
    (["student={name: copy, of: student}"], "student.of: role 'student' is this role itself"),
    (["student={name: copy, of: critic}"], "student.of: role 'critic' is built after it"),
    (["critic={name: lora, of: ghost}"], "critic.of: role 'ghost' is not in this recipe; built before critic: tea"),
    (["roles={a: {name: copy, of: b}, b: {name: copy, of: a}}"], "roles.a.of: role 'b' is built after it"),
    (["train.compile=[ghost]"], "train.compile: role 'ghost' is not in this recipe; it has teacher, student, critic"),
    (["method.guidance=2.0"], "method.guidance: a guidance scale of 2.0 needs conditions"),
    (["evaluate.guidance=2.0"], "evaluate.guidance: a guidance scale of 2.0 needs conditions"),
])  # fmt: skip
def test_what_a_recipe_shows_is_told_with_its_key(settings: list[str], words: str):
    with pytest.raises(RecipeError) as told:
        load("toy/dmd2", settings)
    assert f"argument {settings[0]!r}: {words}" in str(told.value)
    load("toy/dmd2", ["data.conditional=true", "method.guidance=2.0"])


@pytest.mark.parametrize("text", [
    "<script>alert(1)</script>", "![x](http://a.b/c.png)", "[a](javascript:alert(1))", "a | b", "```\n<img src=x>", "\\|",
    "line\n# head\n---",
])  # fmt: skip
def test_words_of_others_open_nothing_in_markdown(text: str):
    """No tag, link, picture or code begins in it, and it stays in its line and its cell."""
    import re

    line = plain(text)
    assert "\n" not in line
    assert "<" not in line
    bare = re.sub(r"\\[\\`\[\]|]", "", line)
    assert not set("`[]|\\") & set(bare)


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("plain") == "```"
    assert fenced("a ```` b") == "`````"
    assert fenced("a `b`", 1) == "``"
