import os
import signal
import threading
from dataclasses import replace
from math import nan

import pytest
import torch
from loops import CPU, begin, examples, prepared
from PIL import Image
from said import naming

from lorakit.adapter import injection
from lorakit.adapter.specs import layer_specs
from lorakit.base import model
from lorakit.dataset import folder as folders
from lorakit.dataset import picture
from lorakit.device import Compute
from lorakit.run import preparation
from lorakit.train import loop as loop_module
from lorakit.train import loss, optimizers, validation
from lorakit.train.distributed import Team


@pytest.mark.no_cover
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_only_the_adapter_moves_and_the_loss_falls(settings, small_bases, tmp_path, family):
    settings = settings.with_(base=str(small_bases[family]), steps=30, learning_rate=1e-2, batch_size=6)
    ready = prepared(settings, tmp_path)
    unet, state, loop = begin(settings, ready)
    frozen = {n: p.clone() for n, p in unet.named_parameters() if not p.requires_grad}
    done = loop_module.drain(loop)
    assert [step.number for step in done] == list(range(1, 31))
    assert all(torch.equal(frozen[n], p) for n, p in unet.named_parameters() if n in frozen)
    assert all(weight.abs().sum() > 0 for weight in state.adapter.parameters())
    # the same noise and timesteps with the adapter and without
    probe = settings.with_(seed=99)
    item = examples(ready, probe).batch([0, 1, 2, 3], 0, 0)
    alphas = ready.base.alphas_cumprod()
    with torch.no_grad():
        after = loop_module.batch_loss(unet, ready.base, alphas, item, probe)
        with injection.strength(state.adapter, 0):
            before = loop_module.batch_loss(unet, ready.base, alphas, item, probe)
    assert after < 0.97 * before


def test_the_loss_is_the_one_of_diffusers_training_script(settings, tmp_path):
    """Computed the way examples/text_to_image/train_text_to_image_lora.py does, from diffusers' own scheduler."""
    from diffusers import DDPMScheduler

    settings = settings.with_(min_snr_gamma=None)
    ready = prepared(settings, tmp_path)
    unet = model.load_unet(ready.base, Compute(CPU, torch.float32))
    item = examples(ready, settings).batch([0, 1], 4, 0)
    scheduler = DDPMScheduler.from_config(ready.base.configs["scheduler"])
    with torch.no_grad():
        noisy = scheduler.add_noise(item.latents, item.noise, item.timesteps)
        predicted = unet(noisy, item.timesteps, item.embeddings).sample
        theirs = torch.nn.functional.mse_loss(predicted, item.noise)
        ours = loop_module.batch_loss(unet, ready.base, ready.base.alphas_cumprod(), item, settings)
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_accumulating_equals_the_large_batch(settings, small_bases, tmp_path):
    settings = settings.with_(dataset=str(tmp_path / "pictures"), repeats=1, min_snr_gamma=None, max_grad_norm=0)
    ready = prepared(settings, tmp_path)
    unet, state, _ = begin(settings, ready)
    gradients = []
    for groups in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
        offset = 0
        for indices in groups:
            item = examples(ready, settings).batch(indices, 0, offset)
            value = loop_module.batch_loss(unet, ready.base, ready.base.alphas_cumprod(), item, settings) / len(groups)
            value.backward()
            offset += len(indices)
        gradients.append([w.grad.clone() for w in state.adapter.parameters() if w.grad is not None])
        state.optimizer.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_an_epoch_repeats_every_picture_and_never_mixes_sizes(settings, tmp_path):
    settings = settings.with_(epochs=2, batch_size=4)
    ready = prepared(settings, tmp_path)
    per_epoch, total = ready.examples.steps_per_epoch, ready.examples.total_steps
    assert (per_epoch, total) == (3, 6)  # 8 square ones in two batches, 4 wide ones in one
    _, _, loop = begin(settings, ready)
    done = loop_module.drain(loop)
    for epoch in (1, 2):
        seen = sorted(i for step in done if step.epoch == epoch for i in step.examples)
        assert seen == sorted([0, 1, 2, 3, 4, 5] * 2)
    for step in done:
        assert len({ready.examples.pictures[i].latents.shape for i in step.examples}) == 1


def test_dropped_captions_are_drawn_from_step_and_place(settings, tmp_path):
    settings = settings.with_(caption_dropout=0.5, flip=True)
    ready = prepared(settings, tmp_path)
    empty = ready.examples.texts[""].embeddings
    dropped = [torch.equal(examples(ready, settings).batch([0], step, 0).embeddings[0], empty) for step in range(200)]
    assert 70 < sum(dropped) < 130
    mirrored = [
        torch.equal(
            examples(ready, settings).batch([0], step, 0).latents[0],
            ready.examples.pictures[0].mirrored,
        )
        for step in range(200)
    ]
    assert 70 < sum(mirrored) < 130
    a, b = (examples(ready, settings).batch([0, 1], 3, 0) for _ in range(2))
    assert torch.equal(a.noise, b.noise) and torch.equal(a.embeddings, b.embeddings)


def test_sampling_in_the_middle_changes_nothing(settings, tmp_path):
    """Validation and samples must not disturb the run's randomness."""
    ready = prepared(settings, tmp_path)
    _, state, loop = begin(settings, ready)
    loop_module.drain(loop)
    _, other, loop = begin(settings, ready)
    loop_module.drain(loop, lambda step: torch.rand(step.number))
    for a, b in zip(state.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_gives_the_same_weights(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    states = []
    for on in (False, True):
        _, state, loop = begin(settings.with_(gradient_checkpointing=on, steps=3), ready)
        loop_module.drain(loop)
        states.append(state)
    for a, b in zip(*(s.adapter.parameters() for s in states), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bf16_trains(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    unet = model.load_unet(ready.base, Compute(CPU, torch.bfloat16))
    adapter = injection.inject(unet, layer_specs(unet, 4, 2))
    state = loop_module.initial_state(adapter, settings, CPU, torch.bfloat16)
    done = loop_module.drain(loop_module.steps(unet, ready.base, state, examples(ready, settings)))
    assert all(torch.isfinite(step.loss) for step in done)
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in adapter.parameters())


def test_an_interrupt_ends_after_the_step(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    _, state, loop = begin(settings, ready)

    def ctrl_c(step):
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    done = loop_module.drain(loop, ctrl_c)
    assert [step.number for step in done] == [1, 2]
    assert state.step == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interrupt_raises(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    _, _, loop = begin(settings, ready)

    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop_module.drain(loop, twice)


def test_stop_works_from_another_thread(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    _, state, loop = begin(settings, ready)
    stop = threading.Event()
    worker = threading.Thread(target=lambda: loop_module.drain(loop, lambda _: stop.set(), stop=stop))
    worker.start()
    worker.join(60)
    assert state.step == 1


def test_noise_differs_in_each_step_and_the_schedule_is_followed(settings, tmp_path):
    settings = settings.with_(schedule="linear", steps=4)
    ready = prepared(settings, tmp_path)
    _, _, loop = begin(settings, ready)
    rates = [step.learning_rate for step in loop_module.drain(loop)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    first, second = (loss.Noise().draw(settings.seed, step, [0], (4, 8, 8)).noise for step in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["loss", "schedule"])
def test_every_choice_of_loss_and_schedule_trains(settings, tmp_path, name):
    choices = {
        "loss": [
            {"loss": "huber"}, {"loss": "smooth_l1"}, {"min_snr_gamma": None, "debiased": True},
            {"multires_noise_iterations": 3}, {"input_perturbation": 0.1}, {"timestep_sampling": "logit_normal"},
            {"min_timestep": 400, "max_timestep": 600},
        ],
        "schedule": [
            {"schedule": "cosine_with_restarts", "schedule_cycles": 2}, {"schedule": "polynomial", "schedule_power": 2},
            {"schedule": "constant_with_warmup", "warmup_steps": 0.5},
        ],
    }  # fmt: skip
    ready = prepared(settings, tmp_path)
    seen = []
    for changes in choices[name]:
        _, state, loop = begin(settings.with_(steps=4, **changes), ready)
        done = loop_module.drain(loop)
        assert all(torch.isfinite(step.loss) for step in done) and all(step.finite for step in done)
        seen.append((float(done[0].loss), *(step.learning_rate for step in done)))
    assert len(set(seen)) == len(seen)  # each of them has an effect


def test_lora_plus_moves_the_up_matrices_faster(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    _, state, loop = begin(settings.with_(learning_rate_ratio=8.0, optimizer="lion", steps=1, weight_decay=0), ready)
    before = {name: weight.detach().clone() for name, weight in state.adapter.state().items()}
    loop_module.drain(loop)
    moved = {
        part: max(
            float((w.detach() - before[n]).abs().max()) for n, w in state.adapter.state().items() if n.endswith(part)
        )
        for part in (".up", ".down")
    }
    assert moved[".up"] == pytest.approx(8e-3, rel=1e-3)  # Lion moves by the rate itself
    assert moved[".down"] <= 1e-3 * 1.001


def test_the_average_is_evaluated_and_training_continues_from_the_weights(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    for changes in ({"ema_decay": 0.9}, {"optimizer": "adamw_schedulefree"}):
        _, state, loop = begin(settings.with_(**changes), ready)
        loop_module.drain(loop)
        live = [weight.detach().clone() for weight in state.adapter.parameters()]
        with state.evaluated():
            evaluated = [weight.detach().clone() for weight in state.adapter.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(live, evaluated, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(live, state.adapter.parameters(), strict=True))


def test_the_average_follows_its_recursion():
    weight = torch.zeros(3)
    ema = optimizers.Ema([weight], 0.5)
    expected = torch.zeros(3)
    for step in range(1, 30):
        weight += 1
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(ema.average[0], expected)


# ── Steps that are not finite ───────────────────────────────────────────────────────────────────────────────────────


def poison(ready, index: int) -> None:
    """Make a picture's latents NaN, as a broken cache or an overflow would."""
    pictures = ready.examples.pictures
    pictures[index] = replace(pictures[index], latents=torch.full_like(pictures[index].latents, nan))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_a_step_that_is_not_finite_changes_nothing(settings, tmp_path, optimizer):
    ready = prepared(settings, tmp_path)
    poison(ready, 4)  # one of the two wide pictures
    _, state, loop = begin(settings.with_(optimizer=optimizer, batch_size=1, steps=12, repeats=1), ready)
    skipped, before = [], None
    for step in loop:
        weights = [weight.detach().clone() for weight in state.adapter.parameters()]
        if not step.finite:
            skipped.append(step.examples)
            assert before is None or all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        assert all(torch.isfinite(weight).all() for weight in weights)
        before = weights
    assert skipped and set(skipped) == {(4,)}


def test_three_in_a_row_end_the_loop_with_the_last_good_weights(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    for index in range(6):
        poison(ready, index)
    _, state, loop = begin(settings.with_(steps=40), ready)
    first = [weight.detach().clone() for weight in state.adapter.parameters()]
    with pytest.raises(loop_module.Diverged, match=naming(3, 11)):
        loop_module.drain(loop)
    assert all(torch.equal(a, b) for a, b in zip(first, state.adapter.parameters(), strict=True))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_run_that_skips_its_last_steps_is_not_done(settings, tmp_path, steps):
    """Skipped steps were looked at every ten steps only: shorter runs ended as if they had trained."""
    ready = prepared(settings, tmp_path)
    for index in range(6):
        poison(ready, index)
    _, _, loop = begin(settings.with_(steps=steps), ready)
    with pytest.raises(loop_module.Diverged, match=naming(steps)):
        loop_module.drain(loop)


# ── Masks and prior preservation ────────────────────────────────────────────────────────────────────────────────────


def gradients(ready, settings, **changes):
    unet, state, _ = begin(settings, ready)
    for weight in state.adapter.parameters():  # up matrices are zero at first, and hide the down ones
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    item = examples(ready, settings).batch([0, 1], 0, 0, **changes)
    value = loop_module.batch_loss(unet, ready.base, ready.base.alphas_cumprod(), item, settings, state.adapter)
    value.backward()
    return float(value.detach()), [weight.grad for weight in state.adapter.parameters()]


def test_masked_cells_are_not_learned(settings, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    half = Image.new("L", (32, 32), 255)
    half.paste(0, (16, 0, 32, 32))
    for number in range(3):
        half.save(masks / f"{number}.png")
    masked = settings.with_(mask=str(masks))
    ready = prepared(masked, tmp_path)
    cells = ready.examples.pictures[0].mask
    assert cells.shape == (1, *ready.examples.pictures[0].latents.shape[1:])
    assert cells[..., :4].min() == 1 and cells[..., 4:].max() == 0
    assert ready.examples.pictures[3].mask is None
    item = examples(ready, masked).batch([0, 1], 0, 0)
    predicted, expected = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    expected[..., 4:] = 100
    assert loss.error(predicted, expected, mask=item.mask) == 0.5
    part = examples(ready, masked.with_(unmasked_weight=0.25)).batch([0, 3], 0, 0).mask
    assert part[0, ..., 4:].max() == 0.25 and part[1].min() == 1
    question = validation.questions(ready.examples.pictures[:1], examples(ready, masked))[0]
    assert torch.equal(question.mask[0], cells)  # validated as it is trained
    for index in (0, 1):
        ready.examples.pictures[index] = replace(ready.examples.pictures[index], mask=torch.zeros_like(cells))
    value, weights = gradients(ready, masked)
    assert value == 0 and all(gradient.abs().max() == 0 for gradient in weights)


def test_a_mask_is_mirrored_with_its_picture(settings, tmp_path):
    settings = settings.with_(flip=True)
    ready = prepared(settings, tmp_path)
    cells = torch.zeros(1, *ready.examples.pictures[0].latents.shape[1:])
    cells[..., 0] = 1
    ready.examples.pictures[0] = replace(ready.examples.pictures[0], mask=cells)
    for step in range(12):
        item = examples(ready, settings).batch([0], step, 0)
        mirrored = torch.equal(item.latents[0], ready.examples.pictures[0].mirrored)
        assert torch.equal(item.mask[0], cells.flip(-1) if mirrored else cells)


def test_transparency_is_a_mask_too(settings, pictures, tmp_path):
    for file in pictures.rglob("[01].png"):
        image = Image.open(file).convert("RGBA")
        image.putalpha(Image.new("L", image.size, 1 if file.stem == "0" else 255))
        image.save(file)
    ready = prepared(settings.with_(mask="alpha"), tmp_path)
    assert ready.examples.pictures[0].mask.max() < 0.01 and ready.examples.pictures[1].mask is None


def test_transparency_is_rotated_with_its_picture(tmp_path):
    """EXIF rotation: the left half of the stored picture is the upper half of the displayed one."""
    file = tmp_path / "pictures" / "a.png"
    file.parent.mkdir()
    image, exif = Image.new("RGBA", (40, 24), (200, 0, 0, 255)), Image.Exif()
    image.paste((0, 0, 200, 0), (0, 0, 20, 24))
    exif[0x0112] = 6  # displayed rotated clockwise
    image.save(file, exif=exif)
    scanned = folders.scan(file.parent)
    (mask,) = folders.find_masks(scanned.pictures, "alpha", file.parent)
    seen = picture.open_mask(mask)
    assert seen.size == (scanned.pictures[0].width, scanned.pictures[0].height) == (24, 40)
    assert seen.crop((0, 0, 24, 20)).getextrema() == (0, 0) and seen.crop((0, 20, 24, 40)).getextrema() == (255, 255)


def test_masks_that_mask_nothing_are_refused(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=naming("empty")):
        prepared(settings.with_(mask=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(ValueError, match=naming("alpha")):
        prepared(settings.with_(mask="alpha"), tmp_path)


def test_regularisation_pictures_are_as_frequent_as_the_others_and_weighted(settings, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32), (40 * number, 90, 120)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("thing")
    regular = settings.with_(regularisation=str(folder), prior_weight=0.5)
    ready = prepared(regular, tmp_path)
    assert [p.prior for p in ready.examples.pictures] == [False] * 6 + [True] * 5
    assert sum(ready.examples.repeats[:6]) == sum(ready.examples.repeats[6:]) == 12
    item = examples(ready, regular).batch([0, 6], 0, 0)
    assert item.weight.tolist() == [1.0, 0.5] and item.base_target is None
    assert len(loop_module.drain(begin(regular, ready)[2])) == regular.steps
    other = preparation.settings(regular, ready)
    assert str(tmp_path) not in str(other) and other["regularisation"] == ready.contents["regularisation"]


def test_class_captions_keep_the_prediction_of_the_base(settings, tmp_path):
    preserving = settings.with_(prior_prediction=True, trigger="sks thing", class_word="thing", min_snr_gamma=None)
    ready = prepared(preserving, tmp_path)
    assert "thing, number 3" in ready.examples.texts
    item = examples(ready, preserving).batch([0, 1], 0, 0, class_captions=True)
    assert torch.equal(item.embeddings[0], ready.examples.texts["thing, number 0"].embeddings)
    assert item.weight.tolist() == [1.0, 1.0] and item.base_target.all()
    unet, state, loop = begin(preserving, ready)
    alphas = ready.base.alphas_cumprod()
    fresh = loop_module.batch_loss(unet, ready.base, alphas, item, preserving, state.adapter)
    assert fresh < 1e-10  # a fresh adapter does not change the prediction
    assert gradients(ready, preserving, class_captions=True)[0] > 1e-4  # another one does
    assert len(loop_module.drain(loop)) == preserving.steps


def test_captions_are_shuffled_in_each_step(settings, pictures, tmp_path):
    for file in pictures.rglob("*.txt"):
        file.write_text("sks thing, red, big, round, old, blue")
    shuffled = settings.with_(shuffle_captions=True, keep_tokens=1, caption_variants=8)
    ready = prepared(shuffled, tmp_path)
    seen = [examples(ready, shuffled).batch([0], step, 0).embeddings for step in range(40)]
    assert 4 <= len({x.numpy().tobytes() for x in seen}) <= 8
    again = examples(ready, shuffled).batch([0], 7, 0).embeddings
    assert torch.equal(again, seen[7])


def test_rates_by_place_multiply_with_lora_plus(settings, tmp_path):
    ready = prepared(settings, tmp_path)
    changed = settings.with_(block_rates={"up_blocks": 0.5, "up_blocks.1.attentions.0": 0.0}, learning_rate_ratio=4)
    _, state, loop = begin(changed, ready)
    before = {name: weight.detach().clone() for name, weight in state.adapter.state().items()}
    counts = {group["ratio"]: len(group["params"]) for group in state.optimizer.param_groups}
    assert set(counts) == {1.0, 4.0, 0.5, 2.0, 0.0} and sum(counts.values()) == len(before)
    for step, _ in zip(loop, range(2), strict=False):
        assert step.finite
    for name, weight in state.adapter.state().items():
        assert torch.equal(weight, before[name]) == name.startswith("up_blocks.1.attentions.0."), name
    with pytest.raises(ValueError, match=naming("block_rates", "up")):
        begin(settings.with_(block_rates={"up": 0.5}), ready)


def test_text_encoders_learn_each_at_its_rate(settings, small_bases, tmp_path):
    settings = settings.with_(
        base=str(small_bases["sdxl"]), text_encoder_rate=2e-3, text_encoder_2_rate=5e-4, learning_rate_ratio=4.0,
        block_rates={"text_encoder.encoder.layers.0": 0.5}, steps=1, optimizer="adamw",
    )  # fmt: skip
    ready = prepared(settings, tmp_path)
    _, state, loop = begin(settings, ready)
    rates = {id(w): group["ratio"] * 1e-3 for group in state.optimizer.param_groups for w in group["params"]}
    rates = {name: rates[id(weight)] for name, weight in state.adapter.state().items()}
    down, up = "self_attn.q_proj.down", "self_attn.q_proj.up"
    assert rates[f"text_encoder.encoder.layers.1.{down}"] == pytest.approx(2e-3)
    assert rates[f"text_encoder.encoder.layers.0.{down}"] == pytest.approx(1e-3)
    assert rates[f"text_encoder_2.encoder.layers.1.{down}"] == pytest.approx(5e-4)
    assert rates[f"text_encoder_2.encoder.layers.1.{up}"] == pytest.approx(2e-3)
    assert rates["mid_block.attentions.0.proj_in.down"] == pytest.approx(1e-3)
    before = {name: weight.detach().clone() for name, weight in state.adapter.state().items()}
    loop_module.drain(loop)
    moved = {name for name, weight in state.adapter.state().items() if not torch.equal(weight, before[name])}
    # SDXL takes the next-to-last layer, so the last layer of the first encoder gets no gradient.
    silent = {name for name in before if name.startswith("text_encoder.encoder.layers.1.") and name.endswith(".up")}
    assert {name for name in before if name.endswith(".up")} - moved == silent


def test_the_text_encoders_gradient_is_that_of_the_whole_pipeline(settings, small_bases, tmp_path):
    """Caption → tokens → CLIP → UNet → loss, written out, against the loop's use of cached embeddings."""
    settings = settings.with_(text_encoder_rate=1e-3, train_unet=False, min_snr_gamma=None)
    ready = prepared(settings, tmp_path)
    unet, state, _ = begin(settings, ready)
    for weight in state.adapter.parameters():
        weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    item = examples(ready, settings).batch([0, 1], 0, 0)
    alphas = ready.base.alphas_cumprod()
    ours = loop_module.batch_loss(unet, ready.base, alphas, item, settings, state.adapter)
    expected = torch.autograd.grad(ours, state.adapter.parameters())
    _, tokenizer = model.load_text_encoder(ready.base, Compute(CPU, torch.float32))
    captions = [p.caption for p in ready.examples.pictures[:2]]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    text = state.adapter.models["text_encoder"](tokens).last_hidden_state
    noisy = loss.add_noise(item.latents, item.noise, alphas[item.timesteps])
    theirs = torch.nn.functional.mse_loss(unet(noisy, item.timesteps, text).sample, item.noise)
    gradients = torch.autograd.grad(theirs, state.adapter.parameters())
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(expected, gradients, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)


def test_base_targets_use_the_original_text_encoders(settings, tmp_path):
    settings = settings.with_(
        text_encoder_rate=1e-3, prior_prediction=True, trigger="sks thing", class_word="thing", min_snr_gamma=None
    )
    ready = prepared(settings, tmp_path)
    unet, state, _ = begin(settings, ready)
    for weight in state.adapter.parameters():
        weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    item = examples(ready, settings).batch([0, 1], 0, 0, class_captions=True)
    alphas = ready.base.alphas_cumprod()
    noisy = loss.add_noise(item.latents, item.noise, alphas[item.timesteps])
    bare = model.load_unet(ready.base, Compute(CPU, torch.float32))
    texts = model.reencode(ready.base, state.adapter.encoders, item.embeddings, item.pooled, item.tokens)[0]
    with torch.no_grad():
        base_prediction = bare(noisy, item.timesteps, item.embeddings).sample
        expected = torch.nn.functional.mse_loss(unet(noisy, item.timesteps, texts).sample, base_prediction)
        ours = loop_module.batch_loss(unet, ready.base, alphas, item, settings, state.adapter)
    assert torch.allclose(ours, expected, rtol=1e-5) and not torch.allclose(texts, item.embeddings, atol=1e-3)


def test_a_batch_in_parts_has_the_same_result(settings, tmp_path):
    settings = settings.with_(batch_size=3, steps=4, learning_rate=1e-4)
    ready = prepared(settings, tmp_path)
    _, whole, loop = begin(settings, ready)
    done = loop_module.drain(loop)
    for parts in (2, 1):
        _, state, loop = begin(settings.with_(micro_batch_size=parts), ready)
        again = loop_module.drain(loop)
        assert [step.examples for step in again] == [step.examples for step in done]
        assert [float(step.loss) for step in again] == pytest.approx([float(step.loss) for step in done], rel=1e-5)
        # Compared as a whole: AdamW makes full steps even for gradients that are only rounding errors.
        one, other = (torch.cat([w.detach().flatten() for w in s.adapter.state().values()]) for s in (state, whole))
        assert (one - other).norm() < 1e-3 * other.norm(), (one - other).norm() / other.norm()


def test_a_process_without_pictures_in_a_step_keeps_its_scaler_in_step(settings, tmp_path):
    """In the first step after a start its scaler has scaled no loss yet, and unscaling used to fail."""
    settings = settings.with_(steps=2)
    ready = prepared(settings, tmp_path)
    unet, state, _ = begin(settings, ready)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    class Idle(Team):
        def share(self, count):
            return slice(0, 0)

        def add_up(self, tensors):
            pass

        def any(self, flag):
            return flag

    done = loop_module.drain(
        loop_module.steps(unet, ready.base, state, examples(ready, settings), Idle(1, 2)),
    )
    assert len(done) == 2 and state.scaler.get_scale() == 4.0


def test_column_norms_do_not_decay(settings, tmp_path):
    settings = settings.with_(algorithm="dora", weight_decay=0.5)
    _, state, _ = begin(settings, prepared(settings, tmp_path))
    lengths = {id(weight) for name, weight in state.adapter.state().items() if name.endswith("dora_scale")}
    for group in state.optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if id(group["params"][0]) in lengths else 0.5)
        assert len({id(weight) in lengths for weight in group["params"]}) == 1
