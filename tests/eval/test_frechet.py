"""Frechet distance against closed forms and clean-fid; its error bar and bias against simulation."""

import numpy as np
import pytest
from cleanfid.fid import frechet_distance as cleanfid_distance

from fewstep.eval.metrics import frechet
from fewstep.eval.metrics.frechet import frechet_distance, paired_difference
from fewstep.eval.metrics.statistics import FeatureStatistics


def gaussian(mean, covariance, n=None):
    return FeatureStatistics.from_moments(mean, covariance, n)


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def test_commuting_gaussians_have_the_closed_form():
    q = rotation(5)
    a, b = np.array([4.0, 1.0, 0.25, 9.0, 2.0]), np.array([1.0, 1.0, 4.0, 0.5, 3.0])
    shift = np.arange(5.0)
    expected = float(shift @ shift + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))
    result = frechet_distance(gaussian(shift, q @ np.diag(a) @ q.T), gaussian(np.zeros(5), q @ np.diag(b) @ q.T))
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert (result.n, result.standard_error, result.corrected, result.usable) == (None, None, None, False)


def test_two_by_two_gaussians_that_do_not_commute_have_the_closed_form():
    # For 2x2 matrices tr (S R)^(1/2) = sqrt(tr SR + 2 sqrt(det SR)).
    s, r = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    cross = np.sqrt(np.trace(s @ r) + 2 * np.sqrt(np.linalg.det(s @ r)))
    expected = 1.25 + np.trace(s) + np.trace(r) - 2 * cross
    result = frechet_distance(gaussian([1.0, 0.5], s), gaussian([0.0, 0.0], r))
    assert result.value == pytest.approx(expected, rel=1e-12)


def test_singular_gaussians_are_exact():
    # Rank one against rank one: tr (S R)^(1/2) = |u.v|.
    u, v = np.array([1.0, 2.0, 2.0]), np.array([2.0, -1.0, 3.0])
    result = frechet_distance(gaussian(np.zeros(3), np.outer(u, u)), gaussian(np.zeros(3), np.outer(v, v)))
    assert result.value == pytest.approx(9 + 14 - 2 * 6, rel=1e-7)
    ranked = frechet_distance(gaussian(np.zeros(3), np.outer(u, u), 2), gaussian(np.zeros(3), np.outer(v, v), 2))
    assert ranked.value == pytest.approx(9 + 14 - 2 * 6, rel=1e-13)


def test_equal_statistics_are_at_distance_zero_and_it_is_symmetric():
    x = np.random.default_rng(1).normal(size=(90, 8)) @ rotation(8) * np.arange(1, 9)
    a, b = FeatureStatistics(8), FeatureStatistics(8)
    a.update(x)
    b.update(x[:40] * 1.3 + 0.2)
    assert frechet_distance(a, a).value == pytest.approx(0.0, abs=1e-11 * np.trace(a.covariance))
    assert frechet_distance(a, b).value == pytest.approx(frechet_distance(b, a).value, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(400, 24), (2000, 96)])
def test_equals_clean_fid_at_full_rank(n, d):
    generator = np.random.default_rng(d)
    x = generator.normal(size=(n, d)) @ (generator.normal(size=(d, d)) / d**0.5) + 0.1
    y = np.abs(generator.normal(size=(n + 50, d)) @ (generator.normal(size=(d, d)) / d**0.5))
    reference = FeatureStatistics(d)
    reference.update(y)
    expected = cleanfid_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert frechet_distance(x, reference).value == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions_is_exact_with_features_and_by_rank():
    generator = np.random.default_rng(3)
    d, n = 40, 13
    # The reference is diagonal: the trace of the root is the nuclear norm of the scaled centred rows.
    x = generator.normal(size=(n, d))
    reference = gaussian(np.zeros(d), np.diag(np.linspace(0.5, 2.0, d)), 500)
    centred = x - x.mean(0)
    scaled = centred * np.sqrt(np.linspace(0.5, 2.0, d))
    nuclear = np.linalg.svd(scaled, compute_uv=False).sum() / np.sqrt(n - 1)
    expected = x.mean(0) @ x.mean(0) + np.trace(np.cov(x.T)) + np.linspace(0.5, 2.0, d).sum() - 2 * nuclear
    result = frechet_distance(x, reference)
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert not result.usable
    assert "N too small" in result.reason
    assert (result.standard_error, result.bias) == (None, None)
    stats = FeatureStatistics(d)
    stats.update(x)
    assert frechet_distance(stats, reference).value == pytest.approx(expected, rel=1e-9)


def simulate(law, reference, n, replicates, seed=0):
    generator = np.random.default_rng(seed)
    return [frechet_distance(law(generator, n), reference) for _ in range(replicates)]


def test_standard_error_and_bias_agree_with_simulation_for_a_gaussian():
    d = 6
    scales = np.linspace(0.6, 1.6, d)
    mixing = rotation(d, 4)
    reference = gaussian(np.zeros(d), np.diag(np.linspace(1.0, 2.0, d)))
    truth = frechet_distance(gaussian(np.full(d, 0.3), mixing @ np.diag(scales**2) @ mixing.T), reference).value
    results = simulate(lambda g, n: g.normal(size=(n, d)) * scales @ mixing.T + 0.3, reference, 600, 400)
    values = np.array([r.value for r in results])
    spread = values.std(ddof=1)
    # 400 replicates know the spread to 3.5 % and the mean to 0.05 spreads.
    assert np.mean([r.standard_error for r in results]) == pytest.approx(spread, rel=0.1)
    assert np.mean([r.bias for r in results]) == pytest.approx(values.mean() - truth, abs=0.15 * spread)
    assert np.mean([r.corrected for r in results]) == pytest.approx(truth, abs=0.15 * spread)
    covered = np.mean([abs(r.corrected - truth) < 1.96 * r.standard_error for r in results])
    assert 0.91 < covered < 0.985
    assert all(r.usable for r in results)


def test_standard_error_holds_where_the_distance_vanishes():
    d, n = 8, 400
    covariance = np.diag(np.linspace(0.5, 2.0, d))
    reference = gaussian(np.zeros(d), covariance)
    results = simulate(lambda g, m: g.normal(size=(m, d)) @ np.sqrt(covariance), reference, n, 300, seed=11)
    spread = np.std([r.value for r in results], ddof=1)
    # The first-order error would be sqrt(2) = 1.41 of the spread here.
    assert np.mean([r.standard_error for r in results]) == pytest.approx(spread, rel=0.15)
    first_order = np.mean([r.influence.std(ddof=1) / n**0.5 for r in results])
    assert first_order > 1.25 * spread


def test_second_order_influence_is_the_curvature_of_the_distance():
    generator = np.random.default_rng(12)
    x = generator.normal(size=(300, 3)) @ rotation(3) * np.array([1.0, 2.0, 0.5])
    reference = gaussian(np.zeros(3), np.diag([1.0, 0.5, 2.0]))
    result = frechet_distance(x, reference)
    left, right = frechet._pairs(300)

    def at(i, j, a, b):
        weights = np.full(300, 1.0)
        weights[i] += a
        weights[j] += b
        weights /= weights.sum()
        mean = weights @ x
        return frechet_distance(gaussian(mean, (x - mean).T @ ((x - mean) * weights[:, None])), reference).value

    # d2 FD / da db = (2 h - IF_i - IF_j) / n^2 when weights are normalised.
    step = 0.5
    for k in range(6):
        i, j = left[k], right[k]
        mixed = (at(i, j, step, step) - at(i, j, step, -step) - at(i, j, -step, step) + at(i, j, -step, -step)) / (
            4 * step**2
        )
        found = (2 * result.curvature[k] - result.influence[i] - result.influence[j]) / 300**2
        assert found == pytest.approx(mixed, rel=0.05, abs=3e-6)


def test_influence_is_the_derivative_of_the_distance_in_each_sample():
    generator = np.random.default_rng(5)
    x = generator.normal(size=(400, 4)) @ rotation(4) * np.array([1.0, 2.0, 0.5, 1.0]) + 0.2
    reference = gaussian(np.zeros(4), np.diag([1.0, 0.5, 2.0, 1.5]))
    result = frechet_distance(x, reference)
    # Weight sample i by (1 + e) / (n + e): the derivative at e = 0 is influence / n.
    for i in (0, 17, 399):
        slopes = []
        for e in (1e-4, -1e-4):
            weights = np.ones(400)
            weights[i] += e
            weights /= weights.sum()
            mean = weights @ x
            covariance = (x - mean).T @ ((x - mean) * weights[:, None])
            slopes.append(frechet_distance(gaussian(mean, covariance), reference).value)
        slope = (slopes[0] - slopes[1]) / 2e-4 * 400
        assert result.influence[i] == pytest.approx(slope, rel=2e-2, abs=2e-2)
    assert abs(result.influence.mean()) < 0.02 * result.influence.std()


def test_too_few_samples_are_called_so():
    generator = np.random.default_rng(6)
    reference = gaussian(np.zeros(20), np.eye(20))
    small = frechet_distance(generator.normal(size=(100, 20)), reference)
    assert small.bias > small.value - small.bias
    assert not small.usable
    assert small.as_dict()["corrected"] is None
    assert "N too small" in str(small)
    assert "b/N=" in str(small)
    far = frechet_distance(generator.normal(size=(2000, 20)) + 1.0, reference)
    assert far.usable
    assert far.as_dict()["corrected"] == far.value - far.bias
    assert f"corrected {far.corrected:.6g}" in str(far)


def test_paired_difference_has_the_spread_of_the_difference():
    d, n = 5, 500
    reference = gaussian(np.zeros(d), np.eye(d))
    generator = np.random.default_rng(7)
    found = []
    for _ in range(150):
        z = generator.normal(size=(n, d))
        noise = 0.05 * generator.normal(size=(n, d))
        found.append(
            (
                paired_difference(
                    frechet_distance(1.2 * z + 0.3 + noise, reference),
                    frechet_distance(1.2 * z + 0.25, reference),
                ),
                frechet_distance(1.2 * z + 0.25, reference).standard_error,
            )
        )
    differences = np.array([pair.value for pair, _ in found])
    predicted = np.mean([pair.standard_error for pair, _ in found])
    assert predicted == pytest.approx(differences.std(ddof=1), rel=0.15)
    assert predicted < 0.5 * np.mean([alone for _, alone in found])


def test_wrong_input_is_refused():
    reference = gaussian(np.zeros(3), np.eye(3))
    x = np.random.default_rng(8).normal(size=(9, 3))
    stats = FeatureStatistics(3)
    stats.update(x)
    with pytest.raises(ValueError, match="dimension 3 does not match the sample's 2"):
        frechet_distance(x[:, :2], reference)
    with pytest.raises(ValueError, match="8 rows, but the statistics count 9"):
        frechet_distance(stats, reference, features=x[:8])
    with pytest.raises(ValueError, match="not both"):
        frechet_distance(x, reference, features=x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(np.where(np.eye(9, 3) > 0, np.nan, x), reference)
    with pytest.raises(ValueError, match="need features"):
        paired_difference(frechet_distance(x, reference), frechet_distance(stats, reference))
    with pytest.raises(ValueError, match="9 and 8 samples cannot be paired"):
        paired_difference(frechet_distance(x, reference), frechet_distance(x[:8], reference))


def test_equality_ignores_the_influence_array():
    x = np.random.default_rng(9).normal(size=(30, 3))
    reference = gaussian(np.zeros(3), np.eye(3))
    assert frechet_distance(x, reference) == frechet_distance(x, reference)
