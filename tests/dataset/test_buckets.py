"""Buckets: kohya's sizes and choice, crops that always cover, and an order that depends on nothing but its seed."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image
from said import naming

from lorakit.dataset import buckets

# What kohya's trainer lists for 512 with its defaults (min 256, max 1024, step 64), and for 1024 from 512 to 2048.
UPRIGHT_512 = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
UPRIGHT_1024 = (
    "512×1856 512×1920 512×1984 512×2048 576×1664 576×1728 576×1792 640×1536 640×1600 704×1408 704×1472 "
    "768×1280 768×1344 832×1216 896×1152 960×1088"
)


def mirrored(upright, square):
    return sorted([*upright, (square, square), *((h, w) for w, h in upright)])


def test_sizes_are_kohyas():
    assert buckets.bucket_sizes(512) == mirrored(UPRIGHT_512, 512)
    upright = [tuple(map(int, size.split("×"))) for size in UPRIGHT_1024.split()]
    assert buckets.bucket_sizes(1024) == mirrored(upright, 1024)
    assert buckets.bucket_sizes(512, minimum=256, maximum=1024) == buckets.bucket_sizes(512)


def test_sizes_of_a_small_base():
    assert buckets.bucket_sizes(64, step=16) == mirrored([(32, 96), (32, 112), (32, 128), (48, 80)], 64)
    assert buckets.bucket_sizes(64, step=64) == [(64, 64)]


@pytest.mark.parametrize("resolution, step", [(512, 64), (768, 64), (640, 32), (192, 64), (64, 16), (96, 8)])
def test_sizes_keep_their_promises(resolution, step):
    found = buckets.bucket_sizes(resolution, step=step)
    assert found == sorted(set(found)) and (resolution, resolution) in found
    for w, h in found:
        assert w % step == h % step == 0 and w * h <= resolution**2 and (h, w) in found
        assert max(step, resolution // 2 // step * step) <= min(w, h) and max(w, h) <= resolution * 2


def test_limits_are_rounded_outwards_as_in_kohya():
    assert buckets.bucket_sizes(512, minimum=300, maximum=1000) == buckets.bucket_sizes(512, minimum=256, maximum=1024)
    assert buckets.bucket_sizes(512, minimum=512, maximum=512) == [(512, 512)]


def test_the_fits_of_a_run_follow_its_rule_and_limits():
    dimensions = [(100, 40), (40, 100), (30, 30)]
    sizes_of = lambda **how: [fit.size for fit in buckets.Buckets(64, 16, **how).fit(dimensions)]  # noqa: E731
    assert sizes_of() == [(96, 32), (32, 96), (64, 64)]
    assert sizes_of(minimum=48) == [(80, 48), (48, 80), (64, 64)]
    assert sizes_of(maximum=80) == [(80, 32), (32, 80), (64, 64)]
    assert sizes_of(minimum=64, maximum=64) == [(64, 64)] * 3
    assert sizes_of(rule="no_upscale") == [(96, 32), (32, 96), (16, 16)]
    # kohya's trainer ignores the limits by this rule; one bucket alone would also hide the step.
    assert sizes_of(rule="no_upscale", minimum=64, maximum=64) == sizes_of(rule="no_upscale")


def test_a_resolution_off_the_step_names_its_neighbours():
    with pytest.raises(ValueError, match=naming(500, 64, 448, 512)):
        buckets.bucket_sizes(500)
    with pytest.raises(ValueError, match=naming(40, 64)):
        buckets.bucket_sizes(40)
    with pytest.raises(ValueError, match=naming(512, 0)):
        buckets.bucket_sizes(512, step=0)
    with pytest.raises(ValueError, match=naming(640, 1024, 512)):
        buckets.bucket_sizes(512, minimum=640)


@pytest.mark.parametrize(
    "picture, bucket",
    [
        ((512, 512), (512, 512)),
        ((3000, 3000), (512, 512)),
        ((4000, 3000), (576, 448)),  # 1.333: 576/448 = 1.286 is nearer than 640/384 = 1.667
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),  # 1.778: 1.667 is nearer than 704/320 = 2.2
        ((1080, 1920), (384, 640)),
        ((5000, 500), (1024, 256)),  # past the longest
        ((1, 999), (256, 1024)),
        ((320, 768), (320, 768)),  # a bucket's own size stays
    ],
)
def test_assign_takes_the_nearest_shape(picture, bucket):
    assert buckets.assign(*picture, buckets.bucket_sizes(512)) == bucket


def test_assign_does_not_depend_on_the_order_of_buckets():
    tied = [(640, 640), (512, 512), (256, 256)]
    assert buckets.assign(700, 700, tied) == buckets.assign(700, 700, tied[::-1]) == (256, 256)
    assert buckets.assign(512, 512, tied) == (512, 512)
    with pytest.raises(ValueError, match=naming("0×5")):
        buckets.assign(0, 5, tied)


def test_a_fit_always_covers_its_bucket():
    for resolution, step in ((512, 64), (64, 16)):
        found = buckets.bucket_sizes(resolution, step=step)
        for width, height in product((1, 31, 333, 511, 512, 513, 1080, 4001), repeat=2):
            fit = buckets.fit_one(width, height, found)
            (w, h), (sw, sh), (left, top) = fit.size, fit.scaled, fit.crop
            assert sw >= w and sh >= h and (sw == w or sh == h)
            assert abs(left - (sw - w - left)) <= 1 and abs(top - (sh - h - top)) <= 1  # centred
            assert sw == w or abs(sw - width * h / height) <= 0.5  # its shape is kept
            assert sh == h or abs(sh - height * w / width) <= 0.5
            assert fit.lost == pytest.approx(1 - w * h / (sw * sh)) and 0 <= fit.lost < 1


def test_a_known_fit():
    fit = buckets.fit_one(1920, 1080, buckets.bucket_sizes(512))
    assert fit == buckets.Fit(size=(640, 384), scaled=(683, 384), crop=(21, 0))
    assert fit.lost == pytest.approx(43 / 683)


def test_apply_cuts_out_the_middle():
    stripes = np.zeros((64, 192, 3), np.uint8)
    stripes[:, 64:128] = 200  # the middle third
    array = buckets.crop_picture(Image.fromarray(stripes), buckets.fit_one(192, 64, [(64, 64)]))
    assert array.shape == (64, 64, 3) and array.dtype == np.uint8 and array.flags.writeable
    assert (array == 200).all()


def test_apply_returns_height_before_width():
    image = Image.new("RGB", (300, 600), (10, 20, 30))
    array = buckets.crop_picture(image, buckets.fit_one(300, 600, buckets.bucket_sizes(512)))
    assert array.shape == (704, 320, 3) and (array == (10, 20, 30)).all()


def test_apply_changes_nothing_at_its_own_size():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    fit = buckets.fit_one(80, 48, buckets.bucket_sizes(64, step=16))
    assert (buckets.crop_picture(Image.fromarray(pixels), fit) == pixels).all()


def test_reduced_pictures_are_antialiased():
    checks = np.indices((512, 512)).sum(0) % 2 * 255  # every other pixel white: seen from afar, grey
    image = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    array = buckets.crop_picture(image, buckets.fit_one(512, 512, [(64, 64)]))
    assert abs(array.astype(int) - 127).max() <= 3


def test_apply_refuses_what_it_would_squeeze():
    fit = buckets.fit_one(600, 300, buckets.bucket_sizes(512))
    with pytest.raises(ValueError, match=naming((300, 600), fit.scaled)):
        buckets.crop_picture(Image.new("RGB", (300, 600)), fit)  # the same picture, lying on its side
    with pytest.raises(ValueError, match=naming("RGBA")):
        buckets.crop_picture(Image.new("RGBA", (600, 300)), fit)


SIZES = [(512, 512), (448, 576), (512, 512), (576, 448), (448, 576), (512, 512), (512, 512)]
REPEATS = [5, 1, 3, 2, 4, 0, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_an_epoch_shows_each_picture_as_often_as_asked(batch_size):
    batches = buckets.epoch_batches(SIZES, REPEATS, batch_size, seed=7, epoch=3)
    shown = Counter(index for batch in batches for index in batch)
    assert [shown[index] for index in range(len(SIZES))] == REPEATS
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({SIZES[index] for index in batch}) == 1
    short = Counter(SIZES[batch[0]] for batch in batches if len(batch) < batch_size)
    assert all(n == 1 for n in short.values())  # only the last of a bucket
    assert buckets.steps_per_epoch(SIZES, REPEATS, batch_size) == len(batches)


def test_the_order_comes_from_seed_and_epoch_alone():
    order = buckets.epoch_batches(SIZES, REPEATS, 2, seed=7, epoch=3)
    np.random.seed(1)  # a global generator must not matter
    assert buckets.epoch_batches(SIZES, REPEATS, 2, seed=7, epoch=3) == order
    assert buckets.epoch_batches(SIZES, REPEATS, 2, seed=7, epoch=4) != order
    assert buckets.epoch_batches(SIZES, REPEATS, 2, seed=8, epoch=3) != order
    # Written down, because a run resumed under another NumPy or on another machine must go on in this order.
    assert buckets.epoch_batches([(64, 64)] * 8, [1] * 8, 2, seed=0, epoch=0) == [[7, 0], [6, 3], [1, 4], [5, 2]]


def test_the_order_is_fair():
    first = Counter(buckets.epoch_batches([(64, 64)] * 4, [1] * 4, 1, seed=seed, epoch=0)[0][0] for seed in range(400))
    assert all(60 < first[index] < 140 for index in range(4))


def test_an_empty_epoch_and_wrong_arguments():
    assert buckets.epoch_batches([], [], 4, seed=0, epoch=0) == [] and buckets.steps_per_epoch([], [], 4) == 0
    with pytest.raises(ValueError, match=naming(2, 1)):
        buckets.epoch_batches([(64, 64)] * 2, [1], 1, seed=0, epoch=0)
    with pytest.raises(ValueError, match=naming(0)):
        buckets.steps_per_epoch([(64, 64)], [1], 0)
    with pytest.raises(ValueError, match=naming(-1)):
        buckets.epoch_batches([(64, 64)], [-1], 1, seed=0, epoch=0)
    with pytest.raises(ValueError, match=naming("seed", -1)):
        buckets.epoch_batches([(64, 64)], [1], 1, seed=-1, epoch=0)
