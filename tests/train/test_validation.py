import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from loops import CPU, begin, prepared
from said import QUIET, line, names

from lorakit import demo
from lorakit.adapter import injection
from lorakit.adapter.specs import layer_specs
from lorakit.base import model
from lorakit.dataset import folder as dataset_folder
from lorakit.device import Compute
from lorakit.run import checkpoint, run, run_folder
from lorakit.train import loop as loop_module
from lorakit.train import validation

DIGESTS = [f"{i * 7919:064x}"[::-1] for i in range(1, 41)]


# ── Choosing pictures ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_share_of_the_pictures_is_held_out_by_content():
    held = validation.hold_out(DIGESTS, 0.1, seed=1)
    assert len(held) == 4 and held == sorted(held)
    assert validation.hold_out(DIGESTS, 0.1, seed=1) == held != validation.hold_out(DIGESTS, 0.1, seed=2)
    names = {DIGESTS[i] for i in held}
    shuffled = DIGESTS[::-1]
    assert {shuffled[i] for i in validation.hold_out(shuffled, 0.1, seed=1)} == names
    more = [*DIGESTS, "f" * 64]
    assert len(names & {more[i] for i in validation.hold_out(more, 0.1, seed=1)}) >= 3


def test_copies_are_held_out_together_and_a_picture_is_left():
    twice = DIGESTS[:5] * 2
    held = validation.hold_out(twice, 0.2, seed=0)
    assert len(held) == 2 and twice[held[0]] == twice[held[1]]
    assert validation.hold_out(DIGESTS[:2], 0.9, seed=0) in ([0], [1])
    assert validation.hold_out(DIGESTS[:1], 0.5, seed=0) == [] == validation.hold_out(DIGESTS, 0, seed=0)


def test_every_folder_and_shape_is_held_out_in_proportion():
    kinds = [("5_cat", "tall")] * 12 + [("5_cat", "square")] * 4 + [("3_dog", "wide")] * 8
    choices = [validation.hold_out(DIGESTS[:24], 0.25, seed, kinds) for seed in range(20)]
    for held in choices:
        expected = [("3_dog", "wide")] * 2 + [("5_cat", "square")] + [("5_cat", "tall")] * 3
        assert sorted(kinds[place] for place in held) == expected
    assert len(set(map(tuple, choices))) > 10  # random within each kind


def test_a_single_picture_is_of_the_most_common_kind():
    kinds = [("a", "tall")] * 3 + [("b", "square")] * 6
    assert [kinds[place] for place in validation.hold_out(DIGESTS[:9], 0.1, 0, kinds)] == [("b", "square")]


def test_a_spread_choice_depends_only_on_contents_and_is_stable():
    random = np.random.default_rng(0)
    for trial in range(200):
        size = int(random.integers(3, 40))
        kinds = [(f"{random.integers(4)}_x", ("tall", "square", "wide")[random.integers(3)]) for _ in range(size)]
        share, digests = random.choice([0.1, 0.25, 0.5]), DIGESTS[:size]
        held = {digests[place] for place in validation.hold_out(digests, share, trial, kinds)}
        turned = validation.hold_out(digests[::-1], share, trial, kinds[::-1])
        assert {digests[::-1][place] for place in turned} == held
        less = {digests[place] for place in validation.hold_out(digests[:-1], share, trial, kinds[:-1])}
        assert len(less - held) <= 2 and abs(len(held) - len(less)) <= 1


def test_copies_in_two_folders_are_held_out_together():
    twice, kinds = DIGESTS[:6] * 2, [("a",)] * 6 + [("b",)] * 6
    held = [twice[place] for place in validation.hold_out(twice, 0.5, 1, kinds)]
    assert len(held) == 6 and set(held[:3]) == set(held[3:])


def test_the_held_out_kinds_are_described(pictures):
    dataset = dataset_folder.scan(pictures)
    kinds = validation.traits(dataset.pictures)
    assert kinds == [("2_sks thing", "square")] * 4 + [("2_sks thing", "wide")] * 2
    held = validation.hold_out([p.digest for p in dataset.pictures], 0.5, 0, kinds)
    text = validation.representative(held, kinds)
    assert names(text, "square 2 of 4", "wide 1 of 2")
    same = validation.representative([0], kinds[:4])
    assert same and not names(same, "square") and not names(same, 4)  # one kind has no shares


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_measuring_is_repeatable_and_has_no_side_effects(settings, ready):
    unet, _, _ = begin(settings, ready)
    batches = validation.questions(ready.examples.pictures[:2], ready.examples)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), unet.training
    first = validation.measure(unet, ready.base, batches, settings)
    torch.rand(5)
    again = validation.questions(ready.examples.pictures[:2], ready.examples)
    torch.set_rng_state(before[0])
    assert validation.measure(unet, ready.base, again, settings) == first
    assert torch.equal(torch.get_rng_state(), before[0]) and unet.training == before[2]
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_validation_leaves_the_run_bit_identical(settings, ready):
    plain, seen = begin(settings, ready), []
    loop_module.drain(plain[2])
    unet, state, loop = begin(settings, ready)
    held_out, trained = ready.examples.pictures[:2], replace(ready.examples, pictures=ready.examples.pictures[2:])
    listener = validation.validate_every(2, unet, ready.base, state, trained, held_out, seen.append)
    loop_module.drain(loop, listener)
    for a, b in zip(plain[1].adapter.parameters(), state.adapter.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [value.step for value in seen] == [2, 4, 6]
    assert len({value.held_out_base for value in seen}) == 1
    assert seen[0].held_out != seen[0].held_out_base


@pytest.mark.no_cover
def test_memorising_increases_the_gap(tmp_path):
    """Three pictures of the demo, memorised at a high rate: their loss falls more than that of the others."""
    (tmp_path / "six").mkdir()
    for file in sorted(demo.PICTURES.glob("*/*"))[:12]:  # with their captions
        shutil.copy(file, tmp_path / "six")
    settings = demo.config(dataset=str(tmp_path / "six"), steps=20, learning_rate=8e-3, batch_size=3, warmup_steps=0)
    ready = prepared(settings, tmp_path)
    unet = model.load_unet(ready.base, Compute(CPU, torch.float32))
    adapter = injection.inject(unet, layer_specs(unet, settings.rank, settings.alpha), 0)
    state, seen = loop_module.initial_state(adapter, settings, CPU, torch.float32), []
    held_out = ready.examples.pictures[3:]
    trained = replace(ready.examples, pictures=ready.examples.pictures[:3], repeats=[1] * 3, config=settings)
    loop = loop_module.steps(unet, ready.base, state, trained)
    listener = validation.validate_every(10, unet, ready.base, state, trained, held_out, seen.append)
    loop_module.drain(loop, listener)
    assert seen[-1].trained < 0.8 * seen[-1].trained_base
    assert seen[-1].gap > 0.1 and seen[-1].gap > seen[0].gap


def test_a_fresh_adapter_has_no_gap():
    value = validation.Validation(0, 0.5, 0.5, 0.3, 0.3)
    assert value.gap == 0 and value.facts()["validation_loss"] == 0.5


# ── Advice ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = [100 * i for i in range(1, 21)]


def noisy(curve, spread: float, seed: int = 0) -> list[float]:
    random = np.random.default_rng(seed)
    return [value * (1 + spread * random.standard_normal()) for value in curve]


FALLING = [0.2 - 0.004 * i for i in range(20)]
PLATEAU = [0.12 + 0.08 * math.exp(-i / 2) for i in range(20)]
RISING = [0.12 + 0.0006 * (i - 9) ** 2 for i in range(20)]


@pytest.mark.parametrize(
    ("curve", "state", "best"),
    [(FALLING, "falling", 2000), (PLATEAU, "plateau", 2000), (RISING, "rising", 1000)],
    ids=["falling", "plateau", "rising"],
)
@pytest.mark.parametrize("seed", range(8))
def test_the_guides_three_cases_are_distinguished(curve, state, best, seed):
    advice = validation.advise(STEPS, curve)
    assert (advice.state, advice.best) == (state, best)
    advice = validation.advise(STEPS, noisy(curve, 0.002, seed))
    assert advice.state == state
    if state != "plateau":  # on a plateau any value may be the lowest
        assert abs(advice.best - best) <= 200
    if state == "rising":
        assert names(str(advice), advice.best)


def test_a_single_outlier_has_no_effect():
    up, down = list(FALLING), list(PLATEAU)
    up[-2], down[5] = 0.9, 0.01
    assert validation.advise(STEPS, up).state == "falling"
    assert validation.advise(STEPS, down).best != STEPS[5]


def test_few_values_are_early_and_none_is_none():
    assert validation.advise([], []).best is None
    early = validation.advise(STEPS[:5], RISING[:5])
    assert early.state == "early" and names(str(early), 5)


def test_values_that_are_not_finite_are_never_the_best():
    curve = [math.nan, *RISING[1:19], math.nan]
    advice = validation.advise(STEPS, curve)
    assert advice.best == 1000 and advice.state == "rising"


# ── In a run ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("weights_only")
def test_a_run_holds_pictures_out_and_names_its_best_checkpoint(settings, tmp_path):
    lines = []
    settings = settings.with_(validation_share=0.3, validate_every=2, steps=12)
    result = run.start(settings, tmp_path / "run", **QUIET | {"say": lines.append})
    log = run_folder.read_log(tmp_path / "run" / "log.jsonl")
    marked = {entry["step"]: entry for entry in log if "validation_loss" in entry}
    assert sorted(marked) == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(entry["overfit_gap"]) for entry in marked.values())
    assert line(lines, "held out", 2, 6)
    assert result.best and result.best.name in {checkpoint.name(step) for step in (3, 6, 9, 12)}
    assert line(lines, "best", result.best.name)
    assert run_folder.RunFolder(tmp_path / "run").describe()["best"] == result.best.name


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only")
def test_a_resumed_run_validates_as_an_uncut_one(settings, tmp_path):
    settings = settings.with_(validation_share=0.3, validate_every=2, steps=8)
    run.start(settings, tmp_path / "whole", **QUIET)

    def stop(step):
        if step.number == 5:
            (tmp_path / "cut" / "STOP").touch()

    run.start(settings, tmp_path / "cut", **QUIET, listeners=[stop])
    run.start(settings, tmp_path / "cut", **QUIET)
    whole, cut = (
        [entry.get("validation_loss") for entry in run_folder.read_log(tmp_path / name / "log.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut and len(list(filter(None, cut))) == 4
