"""KID, MMD, manifold metrics, scores and diversity against loops over pairs and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from fewstep.eval.metrics import measures as metrics
from fewstep.eval.metrics.energy import energy_distance


def pair(n=23, m=31, d=4, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)), generator.normal(size=(m, d)) * 1.5 + 0.4


def loop_mmd(x, y, kernel, biased=False):
    def mean(a, b, same):
        values = [
            kernel(p, q)
            for (i, p), (j, q) in itertools.product(enumerate(a), enumerate(b))
            if biased or not same or i != j
        ]
        return sum(values) / len(values)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_equals_the_sum_over_pairs():
    x, y = pair()
    expected = loop_mmd(x, y, lambda p, q: (p @ q / 4 + 1) ** 3)
    assert metrics.kernel_distance(x, y).value == pytest.approx(expected, rel=1e-11)


def test_kid_blocks_do_not_matter(monkeypatch):
    x, y = pair()
    whole = metrics.kernel_distance(x, y)
    monkeypatch.setattr(metrics, "_ROWS", 5)
    cut = metrics.kernel_distance(x, y)
    assert cut.value == pytest.approx(whole.value, rel=1e-12)
    assert cut.standard_error == pytest.approx(whole.standard_error, rel=1e-12)


def test_jackknife_equals_leaving_each_row_out():
    x, y = pair(9, 7)
    kid = lambda a, b: metrics.kernel_distance(a, b).value  # noqa: E731
    left_x = np.array([kid(np.delete(x, i, 0), y) for i in range(9)])
    left_y = np.array([kid(x, np.delete(y, i, 0)) for i in range(7)])
    variance = 8 * left_x.var() + 6 * left_y.var()
    assert metrics.kernel_distance(x, y).standard_error == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_kid_is_unbiased_and_its_error_bar_covers():
    # For N(0, 1) against N(m, 1) in one dimension the kernel's moments give MMD^2 in closed form.
    shift, generator = 0.8, np.random.default_rng(1)
    # E(xy+1)^3 = 1 + 3 E[x]E[y] + 3 E[x^2]E[y^2] + E[x^3]E[y^3]
    moments = lambda m: (m, 1 + m * m, 3 * m + m**3)  # noqa: E731

    def expected_kernel(a, b):
        (a1, a2, a3), (b1, b2, b3) = moments(a), moments(b)
        return 1 + 3 * a1 * b1 + 3 * a2 * b2 + a3 * b3

    truth = expected_kernel(0, 0) + expected_kernel(shift, shift) - 2 * expected_kernel(0, shift)
    draws = [
        metrics.kernel_distance(generator.normal(size=(80, 1)), generator.normal(size=(60, 1)) + shift)
        for _ in range(400)
    ]
    values = np.array([d.value for d in draws])
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 20)
    assert np.sqrt(np.mean([d.standard_error**2 for d in draws])) == pytest.approx(values.std(), rel=0.25)


@pytest.mark.parametrize("unbiased", [True, False])
def test_gaussian_mmd_equals_the_sum_over_pairs(unbiased):
    x, y = pair(seed=2)
    expected = loop_mmd(x, y, lambda p, q: np.exp(-((p - q) @ (p - q)) / (2 * 1.7**2)), biased=not unbiased)
    found = metrics.gaussian_mmd(x, y, sigma=1.7, unbiased=unbiased)
    assert found.value == pytest.approx(expected, rel=1e-10)


def test_cmmd_is_the_biased_thousandfold_value_on_unit_rows():
    x, y = pair(seed=3)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    expected = 1000 * loop_mmd(a, b, lambda p, q: np.exp(-((p - q) @ (p - q)) / 200), biased=True)
    assert metrics.cmmd(x, y).value == pytest.approx(expected, rel=1e-9)
    assert metrics.cmmd(3 * x, y).value == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="row 2 is zero"):
        metrics.cmmd(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), np.eye(2))


def loop_manifold(real, fake, k):
    distance = lambda p, q: np.sqrt(((p - q) ** 2).sum())  # noqa: E731
    radius = lambda s, i: sorted(distance(s[i], q) for j, q in enumerate(s) if j != i)[k - 1]  # noqa: E731
    r_real = [radius(real, i) for i in range(len(real))]
    r_fake = [radius(fake, i) for i in range(len(fake))]
    inside = np.array([[distance(f, p) <= r for p, r in zip(real, r_real, strict=True)] for f in fake])
    back = np.array([[distance(f, p) <= r for f, r in zip(fake, r_fake, strict=True)] for p in real])
    return inside.any(1).mean(), back.any(1).mean(), inside.sum() / (k * len(fake)), inside.any(0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_metrics_equal_their_definition(monkeypatch, k):
    real, fake = pair(37, 29, 3, seed=4)
    monkeypatch.setattr(metrics, "_ROWS", 8)
    found = metrics.manifold(real, fake, k)
    expected = loop_manifold(real, fake, k)
    np.testing.assert_allclose((found.precision, found.recall, found.density, found.coverage), expected)


def test_precision_and_recall_are_not_swapped():
    generator = np.random.default_rng(5)
    wide, narrow = generator.normal(size=(300, 2)), 0.1 * generator.normal(size=(200, 2))
    found = metrics.manifold(real=wide, fake=narrow, k=3)
    assert found.precision > 0.95
    assert found.recall < 0.1
    assert metrics.manifold(wide, wide, 3).coverage == 1.0
    far = metrics.manifold(wide, narrow + 100, 3)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="k: expected 1 to 199 for sets of 300 and 200, got 200"):
        metrics.manifold(wide, narrow, 200)


def test_classifier_score_closed_forms():
    confident = torch.full((30, 5), -1e4)
    confident[torch.arange(30), torch.arange(30) % 5] = 1e4
    assert metrics.classifier_score(confident, splits=3).value == pytest.approx(5.0, rel=1e-12)
    same = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).expand(30, 5)
    assert metrics.classifier_score(same, splits=3).value == pytest.approx(1.0, rel=1e-12)
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double()
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = metrics.classifier_score(p.log(), splits=1)
    assert found.value == pytest.approx(math.exp(divergence), rel=1e-12)
    assert math.isnan(found.standard_error)
    with pytest.raises(ValueError, match="cannot be cut into 3 splits"):
        metrics.classifier_score(p.log(), splits=3)


def test_class_accuracy_counts_and_refuses():
    logits = torch.eye(4)
    found = metrics.class_accuracy(logits, torch.tensor([0, 1, 2, 0]))
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    with pytest.raises(ValueError, match=r"labels: expected 0\.\.3, got 0\.\.4"):
        metrics.class_accuracy(logits, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="do not match"):
        metrics.class_accuracy(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="not finite"):
        metrics.class_accuracy(logits / 0, torch.tensor([0, 1, 2, 3]))


def test_diversity_is_relative_to_real_data_of_the_same_class():
    generator = np.random.default_rng(6)
    real = np.vstack([generator.normal(size=(20, 3)), 50 + 2 * generator.normal(size=(25, 3))])
    real_labels = torch.tensor([0] * 20 + [1] * 25)
    fake = np.vstack([0.5 * real[:20], real[20:], np.ones((4, 3))[:0]])
    found = metrics.within_class_diversity(fake, real_labels, real, real_labels)
    assert found == {0: pytest.approx(0.5, rel=1e-12), 1: pytest.approx(1.0, rel=1e-12)}
    collapsed = metrics.within_class_diversity(np.full((5, 3), 7.1), torch.zeros(5), real, real_labels)
    assert collapsed == {0: 0.0}
    with pytest.raises(ValueError, match="class 2 has 5 samples and 0 real images"):
        metrics.within_class_diversity(np.ones((5, 3)), torch.full((5,), 2), real, real_labels)


def test_mean_pairwise_distance_over_blocks(monkeypatch):
    x, _ = pair(17)
    expected = np.mean([np.linalg.norm(p - q) for p, q in itertools.combinations(x, 2)])
    monkeypatch.setattr(metrics, "_ROWS", 4)
    assert metrics.mean_pairwise_distance(x) == pytest.approx(expected, rel=1e-12)


def test_features_of_two_widths_or_with_nan_are_refused():
    x, y = pair()
    for metric in (metrics.kernel_distance, metrics.manifold, metrics.cmmd):
        with pytest.raises(ValueError, match="dimension 3 and 4 cannot be compared"):
            metric(x[:, :3], y)
        with pytest.raises(ValueError, match="NaN or infinity"):
            metric(np.where(x > 1, np.nan, x), y)


def test_energy_distance_equals_the_sum_over_pairs(monkeypatch):
    x, y = pair(11, 13, 5, seed=7)
    norm = np.linalg.norm
    expected = (
        2 * np.mean([norm(p - q) for p in x for q in y])
        - np.mean([norm(p - q) for p, q in itertools.combinations(x, 2)])
        - np.mean([norm(p - q) for p, q in itertools.combinations(y, 2)])
    )
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("fewstep.eval.metrics.energy._PAIRS_AT_ONCE", 20)
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-12)
    images = energy_distance(a[:, :4].reshape(11, 1, 2, 2), b[:, :4].reshape(13, 1, 2, 2))
    assert images == pytest.approx(energy_distance(a[:, :4], b[:, :4]), rel=1e-12)


def test_energy_distance_of_two_gaussians_in_one_dimension():
    # E|N(m, s^2)| = s sqrt(2/pi) exp(-m^2 / 2 s^2) + m erf(m / (s sqrt 2)).
    def folded(mean, scale):
        return scale * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * scale**2)) + mean * math.erf(
            mean / (scale * math.sqrt(2))
        )

    truth = 2 * folded(1.0, math.sqrt(1 + 4)) - folded(0.0, math.sqrt(2)) - folded(0.0, math.sqrt(8))
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(40):
        x = torch.randn(200, generator=generator)
        y = 1 + 2 * torch.randn(300, generator=generator)
        values.append(energy_distance(x, y))
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / math.sqrt(40))


def test_energy_distance_is_exact_between_near_points_far_from_the_origin():
    x = torch.tensor([[1e8, 0.0], [1e8, 1.0]], dtype=torch.float64)
    assert energy_distance(x, x) == pytest.approx(2 * 0.5 - 1 - 1, abs=1e-12)


def test_energy_distance_refuses_bad_clouds():
    good = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="dimension 2 and 3"):
        energy_distance(good, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="y: expected at least 2 samples"):
        energy_distance(good, good[:1])
    with pytest.raises(ValueError, match="x: values that are not finite"):
        energy_distance(good / 0, good)
