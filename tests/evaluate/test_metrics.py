"""What is measured of pictures is what it says: each on pictures and vectors where the answer is known."""

import numpy as np
import pytest
from PIL import Image

from lorakit.evaluate import metrics


def unit(*rows):
    vectors = np.array(rows, float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plain(*colours, side=16):
    return [Image.new("RGB", (side, side), colour) for colour in colours]


@pytest.fixture
def random():
    return np.random.default_rng(0)


def spread(random, middle, count, wide=0.05):
    return unit(*(np.asarray(middle) + random.normal(0, wide, (count, len(middle)))))


def test_likeness_goes_from_the_base_to_the_training_pictures(random):
    here, there = [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]
    training, base = spread(random, there, 12), spread(random, here, 8)
    within = metrics.likeness_within(training)
    plain = metrics.likeness(base, training)
    assert metrics.gain(plain, plain, within) == 0
    twins = metrics.likeness(spread(random, there, 8), training)
    assert metrics.gain(twins, plain, within) == pytest.approx(1, abs=0.1) and metrics.hits(twins, plain, within) == 1
    halfway = metrics.likeness(spread(random, [1, 1, 0, 0, 0, 0], 8), training)
    assert 0.4 < metrics.gain(halfway, plain, within) < 0.95
    mixed = metrics.likeness(np.concatenate([spread(random, there, 6), base[:2]]), training)
    assert metrics.hits(mixed, plain, within) == 0.75


def test_likeness_that_shuffled_labels_reach_as_well_is_chance(random):
    base = random.normal(0.3, 0.1, 16)
    assert metrics.chance(base + 0.2 + random.normal(0, 0.02, 16), base) < 0.001
    assert metrics.chance(base, base) == 1
    shares = [metrics.chance(base + noise, base) < 0.05 for noise in random.normal(0, 0.05, (200, 16))]
    assert 0.01 < np.mean(shares) < 0.1  # as often as it says


def test_unevenness_is_the_spread_over_subjects(random):
    base, within = np.full(8, 0.2), np.full(10, 0.7)
    assert metrics.unevenness(np.full(8, 0.6), base, within) == 0
    assert metrics.unevenness(np.array([0.2, 0.7] * 4), base, within) == pytest.approx(0.5)


def test_spread_is_nothing_for_copies_and_one_for_what_has_nothing_in_common():
    assert metrics.spread(unit(*np.eye(5))) == pytest.approx(1)
    assert metrics.spread(unit(*np.ones((5, 3)))) == pytest.approx(0)


def test_a_leak_is_the_likeness_that_comes_without_the_trigger():
    base, full = np.full(6, 0.2), np.full(6, 0.8)
    assert metrics.leak(full, base, base, base, full) == 0
    assert metrics.leak(full, base, full, base, full) == pytest.approx(1)
    assert metrics.leak(full, base, np.full(6, 0.35), base, full) == pytest.approx(0.25)
    assert metrics.leak(base + 1e-9, base, np.full(6, 0.23), base, full) == pytest.approx(0.2)  # nothing comes with it


def test_adherence_tells_pictures_of_their_prompts_from_any_pictures(random):
    texts = np.eye(6)
    assert metrics.adherence(texts, texts) == 1
    assert metrics.adherence(unit(*np.ones((6, 6))), texts) == pytest.approx(0)
    assert metrics.adherence(texts[::-1], texts) < 0


def test_copies_are_found_with_what_they_copy(random):
    training = unit(*np.eye(5))
    place, cosine = metrics.nearest(unit([0, 0, 1, 0.01, 0], [1, 1, 0, 0, 0]), training)
    assert place[0] == 2 and cosine[0] > 0.999 and cosine[1] < 0.8


def test_what_repeats_a_training_picture_is_nearer_than_two_of_them_and_than_the_base():
    training = unit(*np.eye(6))
    assert metrics.too_near(training, unit([1, -1, 0, 0, 0, 0])) == pytest.approx(0.15 + 0.85 * 2**-0.5, abs=1e-6)
    alike = unit([1, 0.1, 0, 0, 0, 0], [1, 0, 0.1, 0, 0, 0], [1, 0, 0, 0.1, 0, 0])  # many sides of one thing
    assert 0.99 < alike[0] @ alike[1] < metrics.too_near(alike, training) < 1
    twice = np.concatenate([training, unit([1, 0.1, 0, 0, 0, 0])])  # one of them is there twice: no rule for the others
    assert metrics.too_near(twice, training[:1] * 0) == pytest.approx(metrics.too_near(training, training[:1] * 0))


@pytest.mark.parametrize(
    ("values", "rises"), [([1, 2, 3], 1), ([3, 2, 1], -1), ([1, 3, 2, 4], 2 / 3), ([4, 4, 4, 4], 0), ([5], 0)]
)
def test_rising(values, rises):
    assert metrics.rises(values) == pytest.approx(rises)


def test_colours_between_base_and_training_pictures_are_no_shift():
    base, training = metrics.colours(plain("gray", "gray")), metrics.colours(plain("red", "darkred", "red"))
    halfway = metrics.colours(plain((192, 64, 64)))
    assert metrics.colour_shift(halfway, base, training) == pytest.approx(0, abs=1e-5)
    assert metrics.colour_shift(metrics.colours(plain("blue")), base, training) > 1
    assert metrics.colour_shift(halfway, base, None) > 1  # the base's own grey was all that is known


def test_burned_in_colours_count_and_black_and_white_do_not():
    assert metrics.clipped(plain("white", "black", (120, 90, 60), (40, 40, 0))) == 0
    assert metrics.clipped(plain((255, 0, 0), (0, 200, 90))) == 1


def test_noise_shows_in_the_finest_detail(random):
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    noisy = np.clip(smooth + random.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
    assert metrics.residue([Image.fromarray(noisy)]) > 3 * metrics.residue([Image.fromarray(smooth)])


def test_pictures_of_one_colour_are_broken(random):
    noise = Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8))
    assert metrics.broken([*plain("black", "red"), noise, noise]) == 0.5
    assert metrics.difference([noise], [noise]) == 0 and metrics.difference(plain("black"), plain("white")) == 255
