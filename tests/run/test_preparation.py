"""What is said of a run before it starts is what the loop then does."""

import json

import numpy as np
import pytest
from PIL import Image
from said import QUIET, line, names, naming

from lorakit import storage
from lorakit.adapter import proof
from lorakit.adapter import read as read_module
from lorakit.base import encode as encode_module
from lorakit.base import model
from lorakit.console import Console
from lorakit.dataset import caption_variants, scan, selection
from lorakit.dataset import folder as folders
from lorakit.dataset import picture as picture_module
from lorakit.run import preparation, run
from lorakit.storage import archive

pytestmark = pytest.mark.usefixtures("weights_only")


@pytest.fixture
def small(tmp_path):
    """Seven pictures, all smaller than 64 pixels but two, three times an epoch."""
    folder = tmp_path / "small" / "3_dot"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate([(48, 48)] * 3 + [(40, 33), (20, 90), (100, 100), (5, 60)]):
        noise = random.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder.parent


@pytest.fixture
def sixty_four(settings, small):
    """A run on them, at 64 pixels."""
    return settings.with_(dataset=str(small), resolution=64, bucket_step=16, repeats=None, sample_prompts=("dot",))


def test_pictures_below_the_resolution_are_trained_on_as_they_are(sixty_four, tmp_path):
    config = sixty_four.with_(bucket_rule="no_upscale", min_bucket_side=64, max_bucket_side=64, epochs=2)
    said, seen = [], []
    result = run.start(config, tmp_path / "run", say=said.append, progress=False, listeners=[seen.append])
    assert line(said, "buckets", "16×48: 1", "16×80: 1", "32×32: 1", "48×48: 3", "64×64: 1")
    # 9 pictures of 48×48 make 5 batches, 3 of each other size 2
    assert line(said, "length", 7, 3, 21, 2, 13, 26)
    assert (len(seen), result.total, sum(step.epoch == 1 for step in seen)) == (26, 26, 13)
    sizes = [(48, 48)] * 3 + [(32, 32), (16, 80), (64, 64), (16, 48)]
    assert all(len({sizes[picture] for picture in step.examples}) == 1 for step in seen)
    metadata = read_module.load(result.lora).metadata
    assert metadata["ss_num_batches_per_epoch"] == "13" and metadata["ss_bucket_no_upscale"] == "True"
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert {tuple(bucket["resolution"]): bucket["count"] for bucket in buckets} == {
        size: 3 * sizes.count(size) for size in sizes
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"bucket_rule": "least_crop"}, {"min_bucket_side": 64, "max_bucket_side": 96}, {"bucket_rule": "no_upscale"}],
    ids=str,
)
def test_the_length_that_is_said_is_the_loops(sixty_four, tmp_path, changes):
    config = sixty_four.with_(epochs=1, **changes)
    said = []
    prepared = preparation.prepare(config, tmp_path, Console(said.append, False))
    assert prepared.examples.steps_per_epoch == prepared.examples.batches_per_epoch  # no accumulation
    assert line(said, "length", prepared.examples.batches_per_epoch)
    areas = [p.latents.shape[-1] * p.latents.shape[-2] for p in prepared.examples.pictures]
    height, width = prepared.prediction.size
    cell = width * height // max(areas)  # of the pictures' latents, in pixels
    assert cell == round(cell**0.5) ** 2 and cell * max(areas) == width * height


def test_what_was_decided_about_pictures_holds_for_training(settings, tmp_path):
    better, store = tmp_path / "better.png", tmp_path / "decisions.json"
    Image.new("RGB", (64, 64), "red").save(better)
    made = selection.Decisions(leave_out=("2_sks thing/0.png",), replace={"2_sks thing/1.png": str(better)})
    selection.save_decisions(made, store, settings.dataset)
    settings = settings.with_(decisions=str(store))
    result = run.start(settings, tmp_path / "run", **QUIET)
    assert [picture.path.name for picture in preparation.scan_dataset(settings).pictures] == [
        "better.png", "2.png", "3.png", "4.png", "5.png",
    ]  # fmt: skip
    assert proof.describe_file(result.lora)["hash"] == "verified"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["decisions"] == str(store)
    store.rename(tmp_path / "moved.json")  # what was decided counts, not where that stands
    run.start(settings.with_(decisions=str(tmp_path / "moved.json")), tmp_path / "run", **QUIET)
    selection.save_decisions(selection.Decisions(), store, settings.dataset)
    with pytest.raises(ValueError, match=naming("run", "dataset")):
        run.start(settings, tmp_path / "run", **QUIET)


def test_pictures_on_drive_are_read_from_a_local_copy(settings, tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"proc /proc proc rw 0 0\ndrive {tmp_path / 'pictures'} fuse rw,nosuid 0 0\n")
    assert not preparation.scan_dataset(settings).root.is_relative_to(storage.user_cache())
    monkeypatch.setattr(folders, "MOUNTS", mounts)
    found = preparation.scan_dataset(settings)
    assert found.root.is_relative_to(storage.user_cache()) and len(found) == 6
    decided = selection.Decisions(leave_out=("2_sks thing/0.png",))
    selection.save_decisions(decided, tmp_path / "decisions.json", settings.dataset)
    assert len(preparation.scan_dataset(settings.with_(decisions=str(tmp_path / "decisions.json")))) == 5
    monkeypatch.setattr(folders, "MOUNTS", tmp_path / "none")
    assert not folders.is_remote(tmp_path)


def test_folders_of_a_toml_on_drive_are_decided_about_by_name(settings, pictures, tmp_path, monkeypatch):
    """As the panel, which reads Drive itself, names them."""
    own = pictures / "2_sks thing"
    for number, folder in enumerate("aabb"):
        (pictures / folder).mkdir(exist_ok=True)
        (own / f"{number}.png").rename(pictures / folder / f"{number % 2}.png")
    form = "[[datasets]]\n" + "".join(f"[[datasets.subsets]]\nimage_dir = '{folder}'\n" for folder in "ab")
    (pictures / "set.toml").write_text(form)
    (tmp_path / "mounts").write_text(f"drive {pictures} fuse rw 0 0\n")
    monkeypatch.setattr(folders, "MOUNTS", tmp_path / "mounts")
    named = selection.Decisions(leave_out=("a/1.png",), replace={"b/0.png": str(own / "4.png")})
    assert len(selection.apply_decisions(folders.scan(pictures / "set.toml"), named).pictures) == 3
    selection.save_decisions(named, tmp_path / "decisions.json", pictures / "set.toml")
    settings = settings.with_(dataset=str(pictures / "set.toml"), decisions=str(tmp_path / "decisions.json"))
    found = preparation.scan_dataset(settings)
    assert [folders.picture_name(p.known_as, found) for p in found.pictures] == ["a/0.png", "b/0.png", "b/1.png"]
    assert [p.path.is_relative_to(storage.user_cache()) for p in found.pictures] == [True, False, True]
    (tmp_path / "masks" / "b").mkdir(parents=True)
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "b" / "0.png")
    masked = folders.find_masks(found.pictures, tmp_path / "masks", found.root)
    assert [mask is not None for mask in masked] == [False, True, False]


def test_masks_and_regularisation_on_drive_are_read_from_local_copies(settings, pictures, tmp_path, monkeypatch):
    drive = tmp_path / "drive"
    (drive / "masks").mkdir(parents=True)
    (drive / "class").mkdir()
    Image.new("L", (32, 32)).save(drive / "masks" / "0.png")
    Image.new("RGB", (32, 32), "red").save(drive / "class" / "0.png")
    (tmp_path / "mounts").write_text(f"drive {drive} fuse rw 0 0\n")
    monkeypatch.setattr(folders, "MOUNTS", tmp_path / "mounts")
    read, masks, encode = [], picture_module.open_mask, encode_module.encode_pictures
    monkeypatch.setattr(picture_module, "open_mask", lambda mask: read.append(mask.path) or masks(mask))

    def reading(base, pictures, *rest, **options):
        read.append(pictures[-1].path)
        return encode(base, pictures, *rest, **options)

    monkeypatch.setattr(encode_module, "encode_pictures", reading)
    settings = settings.with_(mask=str(drive / "masks"), regularisation=str(drive / "class"))
    there = preparation.prepare(settings, tmp_path / "run", Console.quiet())
    assert there.examples.pictures[0].mask.max() == 0 and there.prior_repeats == 12
    assert len(read) >= 2 and all(path.is_relative_to(storage.user_cache()) for path in read)


def test_a_mask_that_cannot_be_copied_is_not_left_away(settings, pictures, tmp_path, monkeypatch):
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "0.png")
    monkeypatch.setattr(archive, "_copy", lambda file, target: "cannot be copied (it is gone): look")
    found = folders.scan(pictures)
    with pytest.raises(OSError, match=naming("0.png", "it is gone")):
        folders.find_masks(found.pictures, tmp_path / "masks", found.root, copy=True, cache=tmp_path / "cache")


def test_a_replaced_picture_keeps_its_name(settings, tmp_path):
    better, said = tmp_path / "better.png", []
    Image.new("RGB", (32, 32), "red").save(better)
    named = {"2_sks thing/1.png": str(better), "2_sks thing/2.png": str(better)}
    selection.save_decisions(selection.Decisions(replace=named), tmp_path / "decisions.json", settings.dataset)
    settings = settings.with_(decisions=str(tmp_path / "decisions.json"), mask=str(tmp_path / "masks"))
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "0.png")
    for name in ("1", "1.png"):
        prepared = preparation.prepare(
            settings.with_(validation_pictures=(name,)), tmp_path / "run", Console(said.append, False)
        )
        assert prepared.names == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    assert len([text for text in said if names(text, "held out", 1, 6, "1.png")]) == 2
    assert line(said, "masks", "1.png", "2.png") and not names("\n".join(said), "better.png")


def test_drawn_captions_are_encoded_once_and_resumed_bit_for_bit(settings, pictures, tmp_path, monkeypatch):
    for file in pictures.rglob("*.txt"):
        file.write_text("sks {red|blue} thing ||| round;;;old, big\nsks alone, on a table\n")
    drawn = settings.with_(
        caption_lines="random", caption_choices=True, keep_tokens_separator="|||", secondary_separator=";;;",
        shuffle_captions=True, caption_variants=8, steps=4, save_every=1, validation_share=0.2, validate_every=2,
    )  # fmt: skip
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *a, **k: encoded.append(len(a[1])) or encode(*a, **k))
    whole = run.start(drawn, tmp_path / "whole", progress=False, say=(said := []).append)
    # Four variants of each line, of which many are alike; no caption; the sample's prompt.
    texts = set(caption_variants(scan(pictures).pictures[0].lines, drawn)) | {"", "sks thing"}
    assert sum(encoded) == len(texts) == 5 and line(said, "pictures", 6) and line(said, 6, "several lines")
    before = whole.lora.read_bytes()
    for path in (*(tmp_path / "whole" / "checkpoints").glob("*[34].safetensors"), whole.lora):
        path.unlink()
    again = run.start(drawn, tmp_path / "whole", progress=False, say=said.append)
    assert line(said, "resume", 2) and again.lora.read_bytes()[-5000:] == before[-5000:]
    joined = run.start(settings.with_(steps=4), tmp_path / "joined", progress=False, say=lambda _: None)
    assert joined.lora.read_bytes()[-5000:] != before[-5000:]
    next(pictures.rglob("*.txt")).write_text("sks {red|blue} thing |||\nround;;;old, big sks alone, on a table\n")
    with pytest.raises(ValueError, match=naming("dataset")):  # the words are the same, the lines are not
        run.start(drawn, tmp_path / "whole", progress=False, say=lambda _: None)
