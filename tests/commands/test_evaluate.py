"""fewstep eval with a preset: what is refused, what is skipped and told, and the same numbers by any processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_command import eval_refusal
from PIL import Image
from processes import two_processes
from tiny_teacher import make_run, make_teacher

from fewstep.cli import main
from fewstep.commands.evaluate import discard
from fewstep.commands.judge import Judge
from fewstep.config import UserError
from fewstep.eval.features.house import HouseDigits, house_digits
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol.datasets import digits
from fewstep.eval.protocol.images import save_image
from fewstep.eval.protocol.preset import FOLDER, Preset, labels_of, load_preset
from fewstep.eval.protocol.prompts import export_images, missing, prompts_of, read_prompts
from fewstep.eval.protocol.reference import digits_reference
from fewstep.eval.protocol.runner import Samples

N = 80


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained") / "run", teacher)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first N digits as PNGs."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(digits()[0][:N].round().to(torch.uint8)):
        save_image(image, folder / f"{index:03d}.png")
    return folder


Call = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Call:
    return partial(eval_refusal, capfd)


@pytest.fixture
def ok(capfd: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: Any) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["eval", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert caught.value.code == 0, err
        return out

    return call


def test_arguments_that_make_no_sense(refused: Call, trained: Path, teacher: Path, pictures: Path, tmp_path: Path):
    assert refused().startswith("eval: give a run, an export or a diffusers folder, or --images")
    assert refused("--images", pictures) == (
        "--images: nothing says how to measure this; give --against FOLDER with real pictures, or --preset NAME, of "
        "those that --list-presets names"
    )
    assert refused(trained, "--allow-skips").startswith("--allow-skips: is for a folder of images")
    assert refused(trained, "--omit", "kid") == (
        "--omit kid: preset fd-house-digits measures fd, class-accuracy, diversity"
    )
    assert refused(trained, "--samples", "19") == (
        "samples 19: the diversity within a class needs two of each, so at least 20 for 10 classes"
    )
    assert refused(trained, "--steps", "0").startswith("--steps '0': expected whole numbers of at least 1")
    preset = ("--preset", "digits")
    assert "preset digit: not one of" in refused(trained, "--preset", "digit")
    assert refused(trained, *preset, "--seed", "3").startswith("--seed: a preset has seeds of its own")
    assert refused(*preset).startswith("eval: give a run, an export or a diffusers folder")
    assert refused(trained, *preset, "--images", pictures).startswith("eval: give a run")
    assert refused(trained, *preset, "--out", "x").startswith("--out: preset digits measures")
    assert refused(trained, *preset, "--allow-skips").startswith("--allow-skips: is for a folder of images")
    assert refused("--images", pictures, *preset, "--any").startswith("--images: the samples are there")
    assert refused("--images", pictures, *preset, "--steps", "2").startswith("--images: the samples are there")
    assert refused(trained, *preset, "--steps", "4") == (
        "--steps 4: this student was trained for 1; add --any to try it anyway"
    )
    assert refused(trained, *preset, "--call", "guidance_scale=2").startswith("--call: ")
    assert refused(teacher, *preset, "--steps", "1", "--teacher", "2").startswith("--teacher: ")
    assert refused(teacher, *preset) == f"{teacher}: does not say how many steps it takes; give --steps"
    assert refused(teacher, *preset, "--steps", "1", "--call", "a b=2").startswith("--call 'a b=2': expected key")
    assert "its pipeline cannot be called like that" in refused(teacher, *preset, "--steps", "1", "--call", "cfg=2")
    text = (FOLDER / "digits.yaml").read_text()
    (tmp_path / "large.yaml").write_text(text.replace("size: 8", "size: 9"))
    assert refused(trained, "--preset", tmp_path / "large.yaml") == (
        f"{trained}: preset digits is for 9 x 9 grey images; these samples are [1, 8, 8]"
    )
    assert refused("nowhere", *preset) == "nowhere: no such run or folder"


def test_a_preset_without_its_files_names_them_all(refused: Call, trained: Path, cache: Path):
    told = refused(trained, "--preset", "coco30k")
    for part in (
        "captions_coco14_test.txt",
        "CC-BY-4.0",
        "coco14-val-40504",
        "inception-2015-12-05.pt",
        str(cache),
    ):
        assert part in told


def test_wrong_weights_and_references(refused: Call, pictures: Path, tmp_path: Path, cache: Path):
    images = ("--images", pictures)
    assert refused(*images, "--preset", "digits", "--samples", N, "--extractor-path", tmp_path / "no.safetensors") == (
        f"{tmp_path / 'no.safetensors'}: no weights of house-digits; make them with "
        "`python -m fewstep.eval.tools.train_house --data digits`"
    )
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"head.1.weight": torch.zeros(3, 4)}, other)
    told = refused(*images, "--preset", "digits", "--samples", N, "--extractor-path", other)
    assert told.startswith(f"{other}: not weights of house-digits; names or shapes differ at")
    # Inception's digest is part of the protocol: another file of that name is not it.
    weights = tmp_path / "inception-2015-12-05.pt"
    weights.write_bytes(b"another network")
    mine = tmp_path / "mine.yaml"
    text = (FOLDER / "edm-cifar10.yaml").read_text()
    text, changed = re.subn(r"repetitions: 3", "repetitions: 1", text)
    assert changed == 1
    mine.write_text(
        re.sub(r"reference:.*?metrics", "reference: {kind: builtin, name: digits}\nmetrics", text, flags=re.S)
    )
    told = refused(*images, "--preset", mine, "--samples", N, "--extractor-path", weights)
    assert told.startswith(f"inception-2015: {weights} has sha256 ")
    assert "expected f58cb9b6" in told
    # A reference of 63 features for an extractor of 64.
    narrow = tmp_path / "narrow.yaml"
    text = (FOLDER / "digits.yaml").read_text()
    file = "file: {name: narrow.npz, licence: none, source: here}"
    narrow.write_text(text.replace("kind: builtin, name: digits, images: 1797", f"kind: file, name: narrow, {file}"))
    folder = cache / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    FeatureStatistics.from_moments(np.zeros(63), np.eye(63), 99).save(folder / "narrow.npz")
    told = refused(*images, "--preset", narrow, "--samples", N)
    assert told == f"{folder / 'narrow.npz'}: dimension 63, but house-digits gives 64"


def colour(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


def alpha(path: Path) -> None:
    Image.new("LA", (8, 8)).save(path)


def sixteen(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def larger(path: Path) -> None:
    Image.new("L", (9, 7)).save(path)


BAD = [
    (colour, "is colour, expected 8-bit grey"),
    (alpha, "is grey with alpha, expected 8-bit grey"),
    (sixteen, "is 16-bit grey, expected 8-bit grey"),
    (corrupt, "cannot be read: "),
    (larger, "7x9 pixels, the first image has 8x8"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[f.__name__ for f, _ in BAD])
def test_a_bad_image_is_refused_or_skipped_and_told(
    refused: Call, ok: Call, pictures: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
):
    folder = Path(shutil.copytree(pictures, tmp_path / "images"))
    spoil(folder / "005.png")
    arguments = ("--images", folder, "--preset", "digits", "--samples")
    assert refused(*arguments, N - 1).startswith(f"{folder / '005.png'}: {message}")
    told = ok(*arguments, N - 1, "--allow-skips")
    assert "1 images skipped" in told
    assert f"005.png: {message}" in told
    assert "left out: class-accuracy: a folder of images does not say" in told
    # The protocol's number is not met by the images that are left: no number is computed from fewer.
    assert f"only {N - 1} usable images, {N} asked for, 1 skipped" in refused(*arguments, N, "--allow-skips")


def test_folders_that_do_not_hold_the_protocols_images(refused: Call, pictures: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    preset = ("--preset", "digits")
    assert refused("--images", empty, *preset).startswith(f"{empty}: no images (")
    assert refused("--images", tmp_path / "no", *preset) == f"{tmp_path / 'no'}: no such folder"
    assert refused("--images", pictures, *preset) == (
        f"{pictures}: {N} images, but 5000 are asked for by preset digits; measure these with --samples {N}"
    )
    large = tmp_path / "large"
    for index in range(3):
        save_image(torch.zeros(1, 9, 9, dtype=torch.uint8), large / f"{index}.png")
    assert refused("--images", large, *preset) == (
        f"{large}: 3 images, but 5000 are asked for by preset digits; it takes 8 x 8 and the first is 9 x 9: "
        "--against FOLDER compares any size"
    )
    assert refused("--images", large, *preset, "--samples", 3) == (
        f"{large}: preset digits is for 8 x 8 grey images; these samples are [1, 9, 9]"
    )


def test_features_that_are_not_numbers(refused: Call, pictures: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    digits_reference(house_digits())  # cached with good features
    good = HouseDigits.forward
    monkeypatch.setattr(
        HouseDigits, "forward", lambda self, x: good(self, x).where(x.sum((1, 2, 3))[:, None] < 0, torch.nan)
    )
    assert "hold NaN or infinity" in refused("--images", pictures, "--preset", "digits", "--samples", N)
    assert "NaN features for samples 0..15" in refused(trained, "--preset", "digits", "--samples", N)


def test_a_folder_of_real_images_is_measured(ok: Call, pictures: Path, tmp_path: Path):
    told = ok("--images", pictures, "--preset", "digits", "--samples", N, "--report", tmp_path / "report")
    (row,) = json.loads((tmp_path / "report" / "report.json").read_text())
    extractor = house_digits()
    features = extractor(digits()[0][:N].round())
    from fewstep.eval.metrics.frechet import frechet_distance

    expected = frechet_distance(features, digits_reference(extractor).statistics).value
    assert row["metrics"]["FD (house-digits)"]["value"] == pytest.approx(expected, rel=1e-5)
    page = (tmp_path / "report" / "report.html").read_text()
    assert extractor.sha256 in page
    assert "network call" not in page  # nothing is known of how a folder was made
    assert row["number"] == N
    assert row["preset_hash"] == replace(load_preset("digits"), number=N).hash
    assert row["preset_hash"] in told


def report_of(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "report.json").read_text())
    return [{"name": r["name"], "calls": r["calls"], "hash": r["preset_hash"], "metrics": r["metrics"]} for r in rows]


def command_line(*arguments: str) -> None:
    main(list(arguments))


def test_two_processes_give_the_numbers_of_one(ok: Call, trained: Path, tmp_path: Path, cache: Path):
    arguments = [str(trained), "--preset", "digits", "--samples", str(N)]
    ok(*arguments, "--batch", "7", "--report", tmp_path / "one")
    assert not list((cache / "evaluation").iterdir())  # shards of a finished evaluation are gone
    told = two_processes(command_line, "eval", *arguments, "--batch", "9", "--report", str(tmp_path / "two"))
    assert [text.count("FD (house-digits)") for text in told] == [1, 0]  # only the main process speaks
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert [r["calls"] for r in one] == [1]
    for a, b in zip(one, two, strict=True):
        assert (a["name"], a["hash"]) == (b["name"], b["hash"])
        assert a["metrics"].keys() == b["metrics"].keys()
        for key in ("FD (house-digits)", "class accuracy (house-digits)", "recall (house-digits, k=5)"):
            assert a["metrics"][key]["value"] == pytest.approx(b["metrics"][key]["value"], rel=1e-4)


def test_a_pipeline_is_called_as_diffusers_calls_it(ok: Call, teacher: Path, tmp_path: Path):
    arguments = (teacher, "--preset", "digits", "--samples", 70, "--steps", "1,2")
    ok(*arguments, "--report", tmp_path / "a", "--batch", 13)
    rows = report_of(tmp_path / "a")
    assert sorted((r["name"], r["calls"]) for r in rows) == [("teacher, 1 step", 1), ("teacher, 2 steps", 2)]


def test_a_report_asks_for_the_samples_of_the_set_in_the_batches_asked_for(
    ok: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[int]] = []

    def labels(preset: Preset, indices: list[int]) -> list[int]:
        asked.append(indices)
        return labels_of(preset, indices)

    monkeypatch.setattr("fewstep.commands.sources.labels_of", labels)
    ok(trained, "--preset", "digits", "--samples", 30, "--batch", 9, "--report", tmp_path / "report")
    every = list(range(30))
    assert asked.count(every) == 1  # the conditions of the whole set, for the reward of its samples
    asked.remove(every)
    assert max(map(len, asked)) == 9
    assert {i for part in asked for i in part} == set(every)


def test_what_a_killed_attempt_left_does_not_cost_the_result(tmp_path: Path):
    folder = tmp_path / "job"
    folder.mkdir()
    for name in ("shard-00000.safetensors", ".shard-00001-abc.safetensors", "job.json"):
        (folder / name).write_bytes(b"")
    features = torch.zeros(2, 3)
    discard(Samples(features, None, FeatureStatistics(3), [folder / "shard-00000.safetensors"]))
    assert not folder.exists()


def test_shards_of_other_prompts_are_not_taken_up():
    preset = load_preset("digits")

    def key(prompts: list[str] | None) -> str:
        extractor = house_digits()
        reference = digits_reference(extractor)
        judge = Judge(preset=preset, extractor=extractor, reference=reference, prompts=prompts)
        return judge.job(64, {"model": "digest"}).key(extractor)

    assert len({key(None), key(["a"]), key(["b"])}) == 3
    assert key(["a"]) == key(["a"])


def test_prompt_files(tmp_path: Path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n a dog \n\nlast\n")
    assert read_prompts(lines, 2) == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="line 3 holds no prompt"):
        read_prompts(lines, 4)
    with pytest.raises(ValueError, match=r"prompts\.txt: 4 prompts, 5 are asked for"):
        read_prompts(lines, 5)
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "a cat", "tag": 1}\n{"tag": 2}\n')
    assert read_prompts(objects, 1) == ["a cat"]
    with pytest.raises(ValueError, match=r":2: expected \{"):
        read_prompts(objects, 2)
    lines.write_text("one\u2028line\r\na dog\x85\n", encoding="utf-8")
    assert read_prompts(lines, 2) == ["one\u2028line", "a dog"]
    assert prompts_of(replace(load_preset("geneval"), number=7), lines) == ["one\u2028line"] * 4 + ["a dog"] * 3


def noise(indices: list[int]) -> torch.Tensor:
    rows = [torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in indices]
    return torch.stack(rows).tanh()


def test_folders_for_geneval_and_hpsv2(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "tag": i}) + "\n" for i in range(3)))
    preset = replace(load_preset("geneval"), number=12)
    out = tmp_path / "geneval"
    assert export_images(preset, file, out, noise, batch_size=5, rank=1, world_size=2) == 6
    assert len(list(missing(preset, out))) == 6
    assert export_images(preset, file, out, noise, batch_size=3) == 6
    assert export_images(preset, file, out, noise) == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000", "00001", "00002"]
    assert sorted(p.name for p in (out / "00001" / "samples").iterdir()) == [f"{i:05d}.png" for i in range(4)]
    assert json.loads((out / "00002" / "metadata.jsonl").read_text()) == {"prompt": "p2", "tag": 2}
    pixels = np.asarray(Image.open(out / "00001" / "samples" / "00002.png"))
    expected = ((noise([6])[0] + 1) / 2 * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)
    hps = replace(load_preset("hpsv2"), number=8)
    assert export_images(hps, file, tmp_path / "hps", noise) == 8
    found = sorted(str(p.relative_to(tmp_path / "hps")) for p in (tmp_path / "hps").rglob("*.jpg"))
    assert found == [f"{s}/{i:05d}.jpg" for s in ("anime", "concept-art", "paintings", "photo") for i in range(2)]
    with pytest.raises(ValueError, match="preset digits: fewstep knows no folder layout"):
        export_images(load_preset("digits"), file, out, noise)


def test_export_presets_say_what_they_need(refused: Call, trained: Path, teacher: Path):
    assert refused(trained, "--preset", "geneval").startswith("preset geneval: writes images of a diffusers folder")
    assert refused(teacher, "--preset", "geneval").endswith("say where with --out FOLDER")
    for option in (("--omit", "fd"), ("--clip-path", "x"), ("--extractor-path", "x"), ("--allow-skips",)):
        told = refused(teacher, "--preset", "geneval", "--out", "x", *option)
        assert told.startswith(f"{option[0]}: preset geneval measures nothing")
    assert "evaluation_metadata.jsonl: missing" in refused(teacher, "--preset", "geneval", "--out", "x")


def test_a_selftest_that_fails_says_so(refused: Call, monkeypatch: pytest.MonkeyPatch):
    from fewstep.eval.tools.selftest import Check, Sensitivity

    checks = [Check("good", 1e-9, 1e-6), Check("bad", 1e-3, 1e-6), Check("absent", 0.0, 0.0, "no scipy")]
    monkeypatch.setattr("fewstep.eval.tools.selftest.selftest", lambda: (checks, [Sensitivity("none", 1.0, 0.0)]))
    assert refused("--selftest") == "selftest: 1 of 3 checks failed: bad"


def test_fashion_mnist_is_a_data_set_of_recipes(tmp_path: Path):
    import gzip
    import struct

    from fewstep.data.images import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(6 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(6, 28, 28)
    head = struct.pack(">IIII", 0x803, 6, 28, 28)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 6) + bytes([0, 3, 9, 1, 2, 5]))
    data = FashionMNIST(path=str(tmp_path), split="test").open()
    images, labels = data.all()
    assert (data.shape, data.classes) == ((1, 28, 28), 10)
    assert labels is not None
    assert labels.tolist() == [0, 3, 9, 1, 2, 5]
    torch.testing.assert_close((images + 1) * 127.5, torch.from_numpy(pixels).float().unsqueeze(1))
    with pytest.raises(UserError, match=r"data fashion-mnist: .*train-images-idx3-ubyte\(\.gz\): no Fashion-MNIST"):
        FashionMNIST(path=str(tmp_path)).open()
