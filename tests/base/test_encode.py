import numpy as np
import pytest
import torch
from PIL import Image
from said import naming

from lorakit.base import encode, model
from lorakit.console import Console
from lorakit.dataset import buckets
from lorakit.dataset import folder as folders
from lorakit.dataset import picture as picture_module
from lorakit.device import Compute

CPU = torch.device("cpu")


@pytest.fixture
def loads(monkeypatch):
    """The names of the loading functions, in the order of their calls."""
    loaded = []
    for name in ("load_vae", "load_text_encoder"):
        real = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, real=real, n=name, **k: (loaded.append(n), real(*a, **k))[1])
    return loaded


def encoded_by(small_bases, scanned, folder, flip=False, **changes):
    base = model.open(small_bases["sd15"])
    sizes = buckets.bucket_sizes(32, step=8)
    fits = [buckets.fit_one(p.width, p.height, sizes) for p in scanned]
    return encode.encode_pictures(base, scanned, fits, folder, Compute(CPU, torch.float32), flip=flip, **changes)


def texts(base_folder, prompts, folder, **changes):
    return encode.encode_texts(model.open(base_folder), prompts, folder, Compute(CPU, torch.float32), **changes)


def test_latents_are_those_of_the_vae(small_bases, pictures, tmp_path):
    scanned = folders.scan(pictures).pictures
    encoded = encoded_by(small_bases, scanned, tmp_path / "cache", flip=True)
    base = model.open(small_bases["sd15"])
    vae = model.load_vae(base, Compute(CPU, torch.float32))
    for picture, item in zip(scanned, encoded, strict=True):
        fit = buckets.fit_one(picture.width, picture.height, buckets.bucket_sizes(32, step=8))
        pixels = np.asarray(buckets.crop_picture(picture_module.open_picture(picture), fit), np.float32) / 127.5 - 1
        upright = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            for x, latents in ((upright, item.latents), (upright.flip(-1), item.mirrored)):
                expected = vae.encode(x).latent_dist.mean[0] * vae.config.scaling_factor
                assert torch.allclose(latents, expected, atol=1e-5)
        assert item.latents.shape == (4, fit.size[1] // 4, fit.size[0] // 4)
        assert item.sizes[:2].tolist() == [picture.height, picture.width]
        assert item.sizes[4:].tolist() == [fit.size[1], fit.size[0]]


def test_nothing_is_encoded_twice(small_bases, pictures, tmp_path, loads):
    scanned = folders.scan(pictures).pictures
    first = encoded_by(small_bases, scanned, tmp_path / "cache")
    captions = [p.caption for p in scanned]
    text = texts(small_bases["sd15"], captions, tmp_path / "cache")
    assert loads == ["load_vae", "load_text_encoder"]
    again = encoded_by(small_bases, scanned, tmp_path / "cache")
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, again, strict=True))
    same = texts(small_bases["sd15"], captions, tmp_path / "cache")
    assert all(torch.equal(text[c].embeddings, same[c].embeddings) for c in captions)
    assert len(loads) == 2


def test_only_what_changed_is_encoded_again(small_bases, pictures, tmp_path):
    """Other trainers keep the old embedding of an edited caption and the old latents of a replaced picture."""
    store, counted = tmp_path / "cache", []

    def count(name, done, total):
        counted.append((name, total))

    encoded_by(small_bases, folders.scan(pictures).pictures, store)
    texts(small_bases["sd15"], [p.caption for p in folders.scan(pictures).pictures], store)
    Image.new("RGB", (32, 32), "red").save(pictures / "2_sks thing" / "0.png")
    (pictures / "2_sks thing" / "1.txt").write_text("an edited caption")
    scanned = folders.scan(pictures).pictures
    encoded_by(small_bases, scanned, store, console=Console(print, count))
    edited = texts(small_bases["sd15"], [p.caption for p in scanned], store, console=Console(print, count))
    assert counted == [("pictures", 1), ("captions", 1)]
    assert "an edited caption" in edited


def test_the_key_depends_on_the_vae_the_crop_and_clip_skip(small_bases, pictures, tmp_path, loads):
    scanned, store = folders.scan(pictures).pictures[:1], tmp_path / "cache"
    base = model.open(small_bases["sd15"])
    fit = buckets.fit_one(scanned[0].width, scanned[0].height, buckets.bucket_sizes(32, step=8))
    compute = Compute(CPU, torch.float32)
    encode.encode_pictures(base, scanned, [fit], store, compute)
    encode.encode_pictures(model.open(small_bases["sd2"]), scanned, [fit], store, compute)  # other weights
    smaller = buckets.fit_one(scanned[0].width, scanned[0].height, buckets.bucket_sizes(24, step=8))
    encode.encode_pictures(base, scanned, [smaller], store, compute)
    texts(small_bases["sd15"], ["a"], store)
    texts(small_bases["sd15"], ["a"], store, clip_skip=2)
    # sd15 and sd2 twins were made from one seed, so their VAEs are equal and share entries
    same_vae = model.fingerprint(base, "vae") == model.fingerprint(model.open(small_bases["sd2"]), "vae")
    assert loads.count("load_vae") == (2 if same_vae else 3)
    assert loads.count("load_text_encoder") == 2


def test_a_damaged_entry_is_encoded_again(small_bases, pictures, tmp_path, loads):
    scanned, store = folders.scan(pictures).pictures, tmp_path / "cache"
    first = encoded_by(small_bases, scanned, store)
    victim = sorted(store.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:20])
    again = encoded_by(small_bases, scanned, store)
    assert all(torch.allclose(a.latents, b.latents, atol=1e-6) for a, b in zip(first, again, strict=True))
    assert loads == ["load_vae", "load_vae"]


def test_sdxl_texts_are_both_encoders_concatenated(small_bases, tmp_path):
    text = texts(small_bases["sdxl"], ["a", "b"], tmp_path)["a"]
    assert text.embeddings.shape == (77, 32)
    assert text.pooled.shape == (16,)


def test_nan_is_reported_and_not_cached(small_bases, pictures, tmp_path, monkeypatch):
    real = model.load_vae

    def broken(*arguments):
        vae = real(*arguments)
        vae.encoder.conv_out.bias.data.fill_(float("nan"))
        return vae

    monkeypatch.setattr(model, "load_vae", broken)
    with pytest.raises(FloatingPointError, match=naming("0.png", "NaN")):
        encoded_by(small_bases, folders.scan(pictures).pictures, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))
