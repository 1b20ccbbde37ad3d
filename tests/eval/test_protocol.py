"""Presets, evaluation, tables and reports: hashes that separate protocols, and nothing printed that was not asked for."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
import torch

from fewstep.eval.features.base import random_conv
from fewstep.eval.features.house import house_digits
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.statistics import FeatureStatistics
from fewstep.eval.protocol import evaluation
from fewstep.eval.protocol.datasets import digits
from fewstep.eval.protocol.evaluate import METRICS, evaluate
from fewstep.eval.protocol.latency import measure_latency, seconds_per_1000
from fewstep.eval.protocol.preset import (
    METRICS as NAMES,
    MissingFiles,
    Preset,
    labels_of,
    load_preset,
    preset_names,
    require_files,
)
from fewstep.eval.protocol.reference import digits_reference, preset_reference
from fewstep.eval.protocol.runner import extract_images, shard_size
from fewstep.eval.report import image_grid, write_report
from fewstep.eval.tools.convert import read_pickled_statistics


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    return tmp_path / "cache"


def edited(tmp_path, old, new, name="digits"):
    import fewstep.eval.protocol.preset as protocol

    text = (protocol.FOLDER / f"{name}.yaml").read_text()
    assert old in text
    path = tmp_path / f"edited-{abs(hash((old, new)))}.yaml"
    path.write_text(text.replace(old, new))
    return path


def test_every_shipped_preset_loads_under_its_own_name_with_its_own_hash():
    presets = [load_preset(name) for name in preset_names()]
    assert {preset.name for preset in presets} == set(preset_names())
    wanted = {"edm-cifar10", "edm-imagenet64", "adm-imagenet64", "adm-imagenet256", "edm2", "coco30k"}
    wanted |= {"coco10k-sdxl", "mjhq30k", "hpsv2", "geneval", "digits", "fashion-mnist"}
    assert wanted <= set(preset_names())
    assert len({preset.hash for preset in presets}) == len(presets)
    assert load_preset("geneval").images_per_prompt == 4
    assert load_preset("coco30k").reference.images == 40504


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("number: 5000", "number: 5001", True),
        ("quantiser: round", "quantiser: edm", True),
        ("chain: []", "chain: [{op: clean-bicubic, size: 8}]", True),
        ("images: 1797", "images: 1796", True),
        ("notes: Needs", "notes: Still needs", False),
        ("title: scikit", "title: The scikit", False),
    ],
)
def test_the_hash_changes_with_what_changes_the_number(tmp_path, old, new, changes):
    assert (load_preset(edited(tmp_path, old, new)).hash != load_preset("digits").hash) is changes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("number: 5000", "number: 5000.5", "number: Input should be a valid integer"),
        ("number: 5000", "nummer: 5000", "nummer: Unexpected keyword argument"),
        ("quantiser: round", "quantiser: floor", "quantiser: 'floor' is not one of"),
        ("metrics: [fd,", "metrics: [fid,", "metrics: 'fid' is not one of"),
        ("classes: 10", "classes: null", "conditions.classes: needed for labels"),
        ("chain: []", "chain: [{op: nearest}]", "chain: 'nearest' is not one of"),
        ("chain: []", "chain: [{op: pil-lanczos}]", "chain: 'pil-lanczos' needs a size"),
        ("chain: []", "chain: [", "not YAML"),
        ("number: 5000", "number: 2024-01-01", "number: Input should be a valid integer"),
    ],
)
def test_broken_presets_say_what_is_wrong(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_preset(edited(tmp_path, old, new))


def test_unknown_preset_lists_the_known():
    with pytest.raises(FileNotFoundError, match=r"preset digit: not one of .*'digits'"):
        load_preset("digit")


def test_missing_files_are_all_named_with_licence_and_place(cache):
    with pytest.raises(MissingFiles) as caught:
        require_files(load_preset("coco30k"))
    text = str(caught.value)
    for part in (
        "captions_coco14_test.txt",
        "CC-BY-4.0",
        "coco14-val-40504",
        "inception-2015-12-05.pt",
        str(cache),
    ):
        assert part in text
    (cache / "prompts" / "captions_coco14_test.txt").write_text("another file")
    with pytest.raises(ValueError, match=r"captions_coco14_test\.txt: sha256 is not the protocol's edabd2a5"):
        require_files(load_preset("coco30k"))


def test_labels_belong_to_the_index_and_random_ones_are_even():
    preset = load_preset("digits")
    assert labels_of(preset, [0, 9, 10, 4999]) == [0, 9, 0, 9]
    random = load_preset("edm-cifar10")
    everything = labels_of(random, list(range(20000)))
    assert labels_of(random, [7, 19999, 3]) == [everything[7], everything[19999], everything[3]]
    counts = np.bincount(everything, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    with pytest.raises(ValueError, match="conditions are 'prompts', not labels"):
        labels_of(load_preset("coco30k"), [0])


def test_repetitions_use_consecutive_seeds():
    preset = load_preset("edm-cifar10")
    assert [preset.seeds(r)[0] for r in range(3)] == [0, 50000, 100000]
    assert len(preset.seeds(2)) == 50000


def small(tmp_path, number=1797, **fields) -> Preset:
    return load_preset(edited(tmp_path, "number: 5000", f"number: {number}"))


def digit_samples(noise):
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    pixels = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 255).round()
    return extract_images(iter(pixels.to(torch.uint8).split(500)), house_digits()), labels


_MEASURED = []


@pytest.fixture
def evaluations(tmp_path):
    # Measured once; every test gets its own copy to change.
    if not _MEASURED:
        _MEASURED.extend(measured(tmp_path))
    return copy.deepcopy(_MEASURED)


def measured(tmp_path):
    preset, extractor = small(tmp_path), house_digits()
    reference = preset_reference(preset, extractor)
    found = []
    for noise, seconds in ((60.0, 0.5), (25.0, 2.0)):
        samples, labels = digit_samples(noise)
        found.append(
            evaluate(
                f"noise {noise:g}",
                preset,
                extractor,
                samples,
                reference,
                labels=labels,
                seconds=seconds,
                calls=1,
            )
        )
    return found


def test_evaluation_measures_all_its_preset_names(evaluations, tmp_path):
    bad, good = evaluations
    assert bad.metrics["FD (house-digits)"]["value"] > good.metrics["FD (house-digits)"]["value"] > 0
    assert set(good.metrics) == {
        "FD (house-digits)",
        "KID (house-digits, cubic, unbiased)",
        *(f"{m} (house-digits, k=5)" for m in ("precision", "recall", "density", "coverage")),
        "class accuracy (house-digits)",
        "within-class diversity (house-digits)",
        "classifier score (house-digits, 10 splits)",
    }
    assert good.metrics["class accuracy (house-digits)"]["value"] > 0.95
    path = good.save(tmp_path / "result.json")
    assert evaluation.Evaluation.load(path) == pytest.approx(evaluation.Evaluation.load(path))
    assert evaluation.Evaluation.load(path).metrics["FD (house-digits)"]["n"] == 1797
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a result of fewstep eval"):
        evaluation.Evaluation.load(tmp_path / "other.json")


def test_the_table_ranks_by_fd_and_refuses_mixed_protocols(evaluations):
    header, rows = evaluation.comparison_rows(evaluations)
    assert header[:3] == ["model", "N", "FD (house-digits)"]
    assert [row[0] for row in rows] == ["noise 25", "noise 60"]
    assert re.match(r"[\d.]+ ± [\d.]+ \(b/N [\d.]+, corrected [\d.]+\)", rows[0][2])
    evaluations[1].preset_hash = "0" * 16
    with pytest.raises(evaluation.PresetMismatch, match="different protocols do not compare"):
        evaluation.comparison_rows(evaluations)


def test_results_of_other_files_are_not_tabulated(evaluations):
    a, b = evaluations
    assert a.files == {
        "extractor": house_digits().sha256,
        "reference": digits_reference(house_digits()).digest,
    }
    a.files["clip"] = "1" * 64  # a score that the other row leaves out mixes nothing
    evaluation.comparison_rows([a, b])
    b.files["extractor"] = "2" * 64
    with pytest.raises(evaluation.PresetMismatch, match=r"different files \(extractor\) .*noise 25 \(22222"):
        evaluation.comparison_rows([a, b])


def test_too_few_samples_are_said_to_be_too_few():
    reference = digits_reference(house_digits()).statistics
    noise = np.random.default_rng(0).normal(size=(70, reference.root.shape[1]))
    features = reference.mean + noise @ reference.root.T
    texts = [evaluation.format_entry(frechet_distance(features[:n], reference).as_dict()) for n in (60, 64, 70)]
    assert all(text.endswith("N too small: see KID or CMMD)") for text in texts[:2])
    assert texts[2].endswith("N too small to correct: see KID or CMMD)")


def test_wrong_numbers_of_samples_are_refused(tmp_path):
    extractor = house_digits()
    reference = digits_reference(extractor)
    samples, _ = digit_samples(5.0)
    with pytest.raises(ValueError, match="samples: 1797, preset digits asks for 5000"):
        evaluate("x", load_preset("digits"), extractor, samples, reference)
    with pytest.raises(ValueError, match="2 repetitions, preset digits asks for 1"):
        evaluate("x", small(tmp_path), extractor, [samples, samples], reference)


def test_metrics_a_reference_cannot_give_are_stated_not_dropped(tmp_path):
    extractor = house_digits()
    reference = digits_reference(extractor)
    moments = type(reference)("moments", reference.statistics)
    samples, labels = digit_samples(5.0)
    path = edited(tmp_path, "number: 5000", "number: 1797")
    path.write_text(path.read_text().replace(", diversity", ""))
    found = evaluate("x", load_preset(path), extractor, samples, moments, labels=labels)
    assert set(found.omitted) == {"kid", "prdc5"}
    assert "moments only" in found.omitted["kid"]


def test_file_references_of_another_kind_are_refused(tmp_path, cache):
    preset = load_preset("edm-cifar10")
    for folder, name in (("weights", preset.extractor_file.name),):
        (cache / folder).mkdir(parents=True)
        (cache / folder / name).write_bytes(b"x")
    (cache / "reference").mkdir()
    stats = FeatureStatistics.from_moments(np.zeros(4), np.eye(4))
    stats.save(cache / "reference" / "cifar10-32x32.npz")
    with pytest.raises(ValueError, match="sha256 is not the protocol's"):
        require_files(preset)
    with pytest.raises(ValueError, match=r"cifar10-32x32.npz: dimension 4, but random-conv-0-6 gives 6"):
        preset_reference(preset, random_conv(0, dim=6))
    with pytest.raises(ValueError, match="only exports images"):
        preset_reference(load_preset("geneval"), random_conv(0))


def test_minimum_of_three_stands_beside_mean_and_spread(tmp_path):
    path = edited(tmp_path, "metrics: [fd, kid, prdc5, class-accuracy, diversity, classifier-score]", "metrics: [fd]")
    text = path.read_text().replace("number: 5000", "number: 1797")
    results = {}
    for report in ("min", "mean"):
        path.write_text(text + f"\nrepetitions: 3\nreport: {report}\n")
        runs = [digit_samples(noise)[0] for noise in (20.0, 22.0, 24.0)]
        found = evaluate("x", load_preset(path), house_digits(), runs, digits_reference(house_digits()))
        results[report] = found.metrics["FD (house-digits)"]
    values = results["min"]["repetitions"]
    assert results["min"]["value"] == min(values)
    assert results["mean"]["value"] == pytest.approx(np.mean(values))
    assert results["mean"]["standard_error"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    assert results["min"]["sd"] == pytest.approx(np.std(values, ddof=1))


def test_report_is_one_file_without_outside_links(evaluations, tmp_path):
    images = digits()[0][:10].round().to(torch.uint8)
    latency = measure_latency(lambda i: images[: len(i)], batch_size=3, repeats=4, warm_up=1)
    assert 0 < latency.p50 <= latency.p95
    for e, calls in zip(evaluations, (1, 4), strict=True):
        e.calls, e.group, e.images, e.latency = calls, "model <b>", images, (latency,)
    evaluations[0].omitted["kid"] = "toy & reason"
    page = write_report(evaluations, tmp_path / "report", title="Digits <test>").read_text()
    assert "Digits &lt;test&gt;" in page
    assert "toy &amp; reason" in page
    assert page.count("data:image/png;base64,") >= 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"https?://", page)
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [item["calls"] for item in content] == [1, 4]
    assert [evaluation.Evaluation.from_json(item).as_json() for item in content] == content
    assert content[0]["latency"][0]["batch_size"] == 3
    with pytest.raises(ValueError, match="none were given"):
        write_report([], tmp_path)


def test_image_grid_places_images():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 4)
    grid = image_grid(images, columns=3, gap=1)
    assert grid.shape == (3, 5, 14)
    assert grid[0, 0, [0, 5, 10]].tolist() == [0, 1, 2]
    assert grid[0, 3, [0, 5, 10]].tolist() == [3, 4, 255]
    assert (grid[:, 2] == 255).all()


class Evil:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_pickled_statistics_convert_without_running_anything(tmp_path):
    mu, sigma = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    content = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu + 1, "sigma": sigma}}
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps(content))
    found = read_pickled_statistics(path, "fd_dinov2")
    np.testing.assert_array_equal(found.mean, mu + 1)
    back = FeatureStatistics.load(found.save(tmp_path / "stats.npz"))
    assert back.provenance["entry"] == "fd_dinov2"
    with pytest.raises(ValueError, match=r"choose an entry of \['fd_dinov2', 'fid'\], got None"):
        read_pickled_statistics(path)
    path.write_bytes(pickle.dumps({"mu": mu, "sigma": Evil()}))
    with pytest.raises(ValueError, match=r"refused, it refers to builtins\.eval"):
        read_pickled_statistics(path)
    path.write_bytes(pickle.dumps(content)[:-30])
    with pytest.raises(ValueError, match="refused"):
        read_pickled_statistics(path, "fid")
    path.write_bytes(pickle.dumps([mu, sigma]))
    with pytest.raises(ValueError, match="expected mu and sigma inside, found list"):
        read_pickled_statistics(path)


def test_every_metric_that_a_preset_may_name_is_computed():
    assert set(METRICS) == set(NAMES)


def test_a_speed_is_the_best_of_three_warm_draws_on_one_thread(monkeypatch):
    now, costs, calls = [0.0], iter((100.0, 7.0, 2.0, 3.0)), []

    def generate(indices):
        calls.append((indices, torch.get_num_threads()))
        now[0] += next(costs)
        return torch.zeros(len(indices), 1, 2, 3)

    monkeypatch.setattr("fewstep.eval.protocol.latency._now", lambda: now[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert seconds_per_1000(generate, [5, 6]) == 1000 * 2.0 / 2
        assert calls == [([5, 6], 1)] * 4  # the cold draw does not count
        assert torch.get_num_threads() == 2
        with pytest.raises(StopIteration):
            seconds_per_1000(generate, [5, 6])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: null", "size: 8", "vectors take no size, channels, quantiser or chain"),
        ("quantiser: null", "quantiser: round", "vectors take no size, channels, quantiser or chain"),
        ("extractor: vectors", "extractor: house-digits", "quantiser: None is not one of"),
    ],
)
def test_vectors_have_no_pixels(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_preset(edited(tmp_path, old, new, "energy"))


def test_shards_are_whole_batches_for_any_number_of_processes():
    assert [shard_size(n) for n in (1, 2, 9, 80, 1797, 4000, 5000, 50_000)] == [
        1,
        1,
        2,
        16,
        256,
        512,
        512,
        512,
    ]
