"""Pictures made by a base: the base's own, each once, and a folder that lorakit itself reads."""

import numpy as np
import pictures as pictures_of
import pytest
from PIL import Image
from said import naming

from lorakit.base import model
from lorakit.dataset import folder as folders
from lorakit.sample import denoise, png, regularisation

PROMPTS = ["a photo of a cat", "ein Bild, кот"]
SETTINGS = {"steps": 2, "guidance": 3.0, "device": "cpu", "size": (32, 24), "batch": 3}


def generated(base, prompts, folder, name, **settings):
    """`generate_pictures` with flat settings."""
    own = {key: settings.pop(key) for key in ("repeats", "captions") if key in settings}
    sampling, compute = pictures_of.sampling(settings), pictures_of.compute(settings)
    assert not settings
    return regularisation.generate_pictures(base, prompts, folder, name, sampling, compute=compute, **own)


@pytest.fixture
def base(small_bases) -> model.Base:
    return model.open(small_bases["sd15"])


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many pictures each call of the sampler was asked for."""
    counts, original = [], denoise.Denoiser._denoise

    def counted(denoiser, texts, seeds):
        counts.append(len(seeds))
        return original(denoiser, texts, seeds)

    monkeypatch.setattr(denoise.Denoiser, "_denoise", counted)
    return counts


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pictures_of_all_prompts_with_all_seeds(small_bases, tmp_path, made, family):
    base = model.open(small_bases[family])
    folder = generated(base, PROMPTS, tmp_path / "reg", name="cat", repeats=3, seeds=(5, 7), **SETTINGS)
    assert folder == tmp_path / "reg" / "3_cat" and made == [3, 1]
    found = folders.scan(tmp_path / "reg")
    assert found.problems == () and {p.caption_source for p in found.pictures} == {".txt"}
    assert sorted((p.caption, p.repeats, p.width, p.height) for p in found.pictures) == sorted(
        (prompt, 3, 24, 32) for prompt in PROMPTS for _ in range(2)
    )
    expected = pictures_of.rows(base, [p for p in PROMPTS for _ in range(2)], seeds=[5, 7, 5, 7], **SETTINGS)
    for number, (rows, prompt) in enumerate(zip(expected, [p for p in PROMPTS for _ in range(2)], strict=True)):
        seed = (5, 7)[number % 2]
        (file,) = [p.path for p in found.pictures if p.caption == prompt and p.path.stem.endswith(f"-seed-{seed}")]
        with Image.open(file) as picture:
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(rows[0])).max() <= 1
            told = picture.info["parameters"]
        assert told == png.infotext(prompt, seed, (32, 24), denoise.Sampling(steps=2, guidance=3.0), family)


def test_what_is_there_and_sound_is_not_made_again(base, tmp_path, made, monkeypatch):
    def again(**changes):
        made.clear()
        return generated(base, PROMPTS, tmp_path, name="cat", **(SETTINGS | {"seeds": range(3)} | changes))

    folder = again()
    files = sorted(folder.glob("*.png"))
    before = {file: file.read_bytes() for file in files}
    assert len(files) == 6 and made == [3, 3]
    with monkeypatch.context() as patch:
        patch.setattr(model, "load_unet", None)  # nothing is loaded where nothing is missing
        again()
    files[0].unlink()
    files[1].write_bytes(before[files[1]][:-40])
    files[2].write_bytes(before[files[3]])  # another picture by its name
    files[4].with_suffix(".txt").write_text("by hand")
    files[5].with_suffix(".txt").unlink()
    again()
    assert made == [3, 1] and {file: file.read_bytes() for file in files} == before
    assert files[4].with_suffix(".txt").read_text() == "by hand"
    again(seeds=range(4))
    assert made == [2] and len(list(folder.glob("*.png"))) == 8
    again(steps=3)
    assert made == [3, 3] and len(list(folder.glob("*.png"))) == 8  # other settings: made anew, in the same place


def test_an_interrupt_leaves_no_half_written_picture(base, tmp_path, monkeypatch):
    save = Image.Image.save

    def cut(picture, file, *rest, **options):
        save(picture, file, *rest, **options)
        if len(list(tmp_path.rglob("*.png"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", cut)
        generated(base, PROMPTS, tmp_path, name="cat", seeds=range(2), **SETTINGS)
    assert len(folders.scan(tmp_path)) == 2 and not list(tmp_path.rglob("*.partial"))
    generated(base, PROMPTS, tmp_path, name="cat", seeds=range(2), **SETTINGS)
    assert len(folders.scan(tmp_path)) == 4 and folders.scan(tmp_path).problems == ()


def test_captions_may_differ_from_prompts(base, tmp_path):
    generated(base, PROMPTS, tmp_path, name="style", captions=["sks one", "sks two"], **SETTINGS)
    assert {p.caption for p in folders.scan(tmp_path).pictures} == {"sks one", "sks two"}


def test_prompts_that_begin_alike_have_their_own_files(base, tmp_path):
    long = "a photo of a cat that sits on a table in the garden"
    generated(base, [long + " today", long + "!", "/../..", "???"], tmp_path, name="cat", **SETTINGS)
    assert len(list((tmp_path / "1_cat").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": []}, [0, 1]), ({"seeds": ()}, [2, 0]), ({"captions": ["one"]}, [2, 1]),
        ({"repeats": 0}, ["0_cat"]), ({"repeats": 1000}, ["1000_cat"]), ({"name": "a/b"}, ["1_a/b"]),
        ({"name": ""}, ["1_"]), ({"size": (30, 30)}, ["30×30", 8]),
        ({"scheduler": "x"}, ["x", *denoise.SCHEDULERS]),
    ],
)  # fmt: skip
def test_settings_that_make_no_pictures_are_told(base, tmp_path, changes, named):
    settings = {"prompts": PROMPTS, "name": "cat"} | SETTINGS | changes
    with pytest.raises(ValueError, match=naming(*named)):
        generated(base, folder=tmp_path, **settings)
    assert not list(tmp_path.rglob("*.png"))
