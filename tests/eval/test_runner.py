"""Generation in shards: the same samples for any batch or process count, resumed after any interruption."""

import json

import pytest
import torch
from tiny_runs import die, in_child, killed

from fewstep.eval.features.base import random_conv, wrap
from fewstep.eval.protocol.resize import Step, quantise
from fewstep.eval.protocol.runner import Job, collect, extract_images, run_shards

EXTRACTOR = random_conv(0, dim=6)


def generate(indices):
    rows = [torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(100 + i)) for i in indices]
    return torch.stack(rows).tanh()


def job(**changes):
    return Job(**({"number": 23, "identity": {"model": "toy"}, "shard_size": 6, "batch_size": 4} | changes))


def make(folder, world_size=1, **changes):
    for rank in range(world_size):
        run_shards(job(**changes), folder, generate, EXTRACTOR, rank=rank, world_size=world_size)
    return collect(job(**changes), folder, EXTRACTOR)


def test_samples_do_not_depend_on_batches_processes_or_shards(tmp_path):
    expected = quantise(generate(list(range(23))), "round")
    settings = [(1, {}), (3, {}), (2, {"batch_size": 1}), (5, {"shard_size": 23}), (1, {"shard_size": 1})]
    for number, (world_size, changes) in enumerate(settings):
        samples = make(tmp_path / str(number), world_size, keep_images=True, **changes)
        assert torch.equal(torch.cat(list(samples.images())), expected)
        torch.testing.assert_close(samples.features, EXTRACTOR(expected), atol=1e-6, rtol=1e-5)
        assert samples.statistics.n == 23


def test_only_missing_or_damaged_shards_are_made_again(tmp_path):
    first = make(tmp_path)
    asked = []

    def watching(indices):
        asked.extend(indices)
        return generate(indices)

    assert run_shards(job(), tmp_path, watching, EXTRACTOR) == 0
    (tmp_path / "shard-00001.json").unlink()
    data = tmp_path / "shard-00003.safetensors"
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"2 of 4 shards missing or damaged: shard-00001.*shard-00003"):
        collect(job(), tmp_path, EXTRACTOR)
    # The batch size may change between attempts.
    assert run_shards(job(batch_size=5), tmp_path, watching, EXTRACTOR) == 11
    assert asked == [*range(6, 12), *range(18, 23)]
    torch.testing.assert_close(collect(job(), tmp_path, EXTRACTOR).features, first.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": {"model": "other"}},
        {"number": 24},
        {"quantiser": "edm"},
        {"chain": [Step("bilinear", 8)]},
    ],
)
def test_a_folder_of_another_job_is_refused(tmp_path, changes):
    make(tmp_path)
    with pytest.raises(ValueError, match="holds shards of another job"):
        run_shards(job(**changes), tmp_path, generate, EXTRACTOR)
    with pytest.raises(ValueError, match="holds shards of another job"):
        collect(job(), tmp_path, random_conv(1, dim=6))


def test_killed_process_leaves_a_folder_that_resumes_to_the_same(tmp_path):
    calls = []

    def dying(indices):
        calls.append(indices)
        return die() if len(calls) == 5 else generate(indices)

    assert killed(in_child(lambda: run_shards(job(), tmp_path / "run", dying, EXTRACTOR)))
    assert len(list((tmp_path / "run").glob("shard-*.json"))) == 2
    assert run_shards(job(), tmp_path / "run", generate, EXTRACTOR) == 11
    whole = make(tmp_path / "whole")
    resumed = collect(job(), tmp_path / "run", EXTRACTOR)
    torch.testing.assert_close(resumed.features, whole.features, rtol=0, atol=0)


def test_images_are_not_kept_unless_asked(tmp_path):
    with pytest.raises(ValueError, match="images were not kept"):
        next(make(tmp_path).images())


def test_bad_generators_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"returned shape \(3, 3, 5, 4\) for 4 indices"):
        run_shards(job(), tmp_path / "a", lambda i: generate(i)[:-1], EXTRACTOR)
    with pytest.raises(ValueError, match=r"samples 4\.\.5: images: 2 hold NaN"):
        run_shards(job(), tmp_path / "b", lambda i: generate(i) * (1 if 0 in i else torch.nan), EXTRACTOR)
    broken = wrap(lambda x: x[:, :, 0, 0] / 0, name="broken", dim=3, input_size=None, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"broken: NaN features for samples 0\.\.3"):
        run_shards(job(), tmp_path / "c", generate, broken)
    assert not list((tmp_path / "c").glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"rank: expected 0\.\.1, got 2"):
        run_shards(job(), tmp_path, generate, EXTRACTOR, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        job(batch_size=0)


def test_manifest_states_range_and_checksum(tmp_path):
    make(tmp_path)
    note = json.loads((tmp_path / "shard-00003.json").read_text())
    assert (note["start"], note["stop"]) == (18, 23)
    assert len(note["sha256"]) == 64


def test_ready_images_give_the_same_features(tmp_path):
    pixels = quantise(generate(list(range(23))), "round")
    samples = extract_images(iter(pixels.split(9)), EXTRACTOR)
    torch.testing.assert_close(samples.features, make(tmp_path).features, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="none were given"):
        extract_images(iter([]), EXTRACTOR)
