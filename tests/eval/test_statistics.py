"""Streaming statistics against numpy, under any batching or offset; the file format and its refusals."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from fewstep.eval.metrics.statistics import FeatureStatistics


def draw(n, d, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) + offset


def gathered(features, sizes):
    stats = FeatureStatistics(features.shape[1])
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        stats.update(part)
    return stats


@pytest.mark.parametrize("sizes", [[37], [1, 36], [5, 0, 20, 12], [1] * 37])
def test_moments_equal_numpy_for_any_batching(sizes):
    x = draw(37, 6)
    stats = gathered(x, sizes)
    assert stats.n == 37
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(stats.covariance, np.cov(x.T), rtol=1e-12, atol=1e-13)


def test_no_cancellation_under_a_large_offset():
    centred = draw(200, 5)
    stats = gathered(centred + 1e7, [3, 97, 100])
    # The offset itself costs 1e7 * 2^-53 per value; sums of squares about zero would leave no digit.
    np.testing.assert_allclose(stats.covariance, np.cov(centred.T), rtol=1e-7)


def test_merge_is_the_same_in_any_order_and_equals_one_pass():
    x = draw(60, 4, offset=1000.0)
    parts = [gathered(x[:7], [7]), gathered(x[7:8], [1]), gathered(x[8:], [30, 22]), FeatureStatistics(4)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        total = FeatureStatistics(4)
        for index in order:
            total.merge(parts[index])
        assert total.n == 60
        np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(total.covariance, np.cov(x.T), rtol=1e-11)
    assert parts[0].n == 7


def test_torch_features_of_any_floating_type_are_accepted():
    x = torch.from_numpy(draw(9, 3)).to(torch.bfloat16)
    stats = FeatureStatistics(3)
    stats.update(x)
    np.testing.assert_allclose(stats.covariance, np.cov(x.double().numpy().T), rtol=1e-12)


def test_update_after_reading_moments_is_counted():
    x = draw(20, 3)
    stats = gathered(x[:10], [10])
    first = stats.covariance.copy(), stats.root.copy()
    stats.update(x[10:])
    np.testing.assert_allclose(stats.covariance, np.cov(x.T), rtol=1e-12)
    assert np.abs(stats.root @ stats.root.T - first[1] @ first[1].T).max() > 1e-3


def test_root_squares_to_the_covariance_and_has_at_most_n_minus_1_columns():
    full, thin = gathered(draw(50, 7), [50]), gathered(draw(5, 7), [5])
    np.testing.assert_allclose(full.root @ full.root.T, full.covariance, atol=1e-12 * full.covariance.max())
    np.testing.assert_allclose(thin.root @ thin.root.T, thin.covariance, atol=1e-12 * thin.covariance.max())
    assert full.root.shape == (7, 7)
    assert thin.root.shape == (7, 4)


def test_bad_features_are_named_and_not_added():
    stats = FeatureStatistics(3)
    bad = np.ones((4, 3))
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 4 rows hold NaN or infinity, first row 2"):
        stats.update(bad)
    with pytest.raises(ValueError, match=r"expected shape \(N, 3\), got \(4, 2\)"):
        stats.update(np.ones((4, 2)))
    assert stats.n == 0
    stats.update(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 2 samples, have 1"):
        _ = stats.covariance
    with pytest.raises(ValueError, match="dimension 2 does not match 3"):
        stats.merge(FeatureStatistics(2))


def test_file_round_trip_keeps_moments_count_and_provenance(tmp_path):
    stats = gathered(draw(12, 4), [12])
    stats.provenance = {"images": "toy", "sha256": "é"}
    path = stats.save(tmp_path / "deep" / "a.npz")
    back = FeatureStatistics.load(path)
    np.testing.assert_array_equal(back.mean, stats.mean)
    np.testing.assert_array_equal(back.covariance, stats.covariance)
    assert back.n == 12
    assert back.provenance == stats.provenance
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    more = draw(5, 4, seed=1)
    back.update(more)
    np.testing.assert_allclose(back.covariance, np.cov(np.vstack([draw(12, 4), more]).T), rtol=1e-11)


def test_foreign_files_with_mu_and_sigma_are_read(tmp_path):
    x = draw(30, 3)
    extra = {"mu_s": np.zeros(2), "sigma_s": np.eye(2), "arr_0": np.zeros((1, 4, 4, 3), np.uint8)}
    np.savez(tmp_path / "adm.npz", mu=x.mean(0).astype(np.float32), sigma=np.cov(x.T).astype(np.float32), **extra)
    stats = FeatureStatistics.load(tmp_path / "adm.npz")
    assert stats.n is None
    np.testing.assert_allclose(stats.covariance, np.cov(x.T), rtol=1e-6)
    with pytest.raises(ValueError, match="unknown sample count"):
        stats.update(x)
    with pytest.raises(ValueError, match="unknown sample count"):
        stats.merge(gathered(x, [30]))


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_and_broken_files_are_refused_by_name(tmp_path):
    pickled = tmp_path / "edm2.pkl"
    pickled.write_bytes(pickle.dumps({"fid": Boom()}))
    with pytest.raises(ValueError, match=r"edm2\.pkl: a pickle .* refused.*fewstep\.eval\.tools\.convert"):
        FeatureStatistics.load(pickled)
    hidden = tmp_path / "object.npz"
    np.savez(hidden, mu=np.array([Boom()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"object\.npz: .*allow_pickle"):
        FeatureStatistics.load(hidden)
    whole = gathered(draw(12, 4), [12]).save(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz: not an npz archive \(or truncated\)"):
        FeatureStatistics.load(tmp_path / "cut.npz")
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped\.npz: damaged npz archive"):
        FeatureStatistics.load(tmp_path / "flipped.npz")
    buffer = io.BytesIO()
    np.savez(buffer, mean=np.zeros(2))
    (tmp_path / "keys.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"keys\.npz: missing \['mu', 'sigma'\], has \['mean'\]"):
        FeatureStatistics.load(tmp_path / "keys.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such statistics file"):
        FeatureStatistics.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(3), np.eye(2), r"covariance: expected shape \(3, 3\), got \(2, 2\)"),
        (np.zeros((1, 3)), np.eye(3), r"mean: expected shape \(D,\), got \(1, 3\)"),
        (np.array([0.0, np.inf]), np.eye(2), "not finite"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (np.zeros(2), np.diag([1.0, -1.0]), "negative variance"),
    ],
)
def test_moments_that_make_no_sense_are_refused(tmp_path, mean, covariance, message):
    np.savez(tmp_path / "bad.npz", mu=mean, sigma=covariance)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.load(tmp_path / "bad.npz")


def test_indefinite_covariance_is_refused_when_its_root_is_needed():
    stats = FeatureStatistics.from_moments(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        _ = stats.root


def test_failed_save_leaves_the_old_file(tmp_path):
    path = gathered(draw(12, 4), [12]).save(tmp_path / "a.npz")
    before = path.read_bytes()
    broken = gathered(draw(12, 4, seed=2), [12])
    broken.provenance = {"bad": object()}
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert json.loads(str(np.load(path)["provenance"])) == {}
