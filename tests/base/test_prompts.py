"""Prompts with weights and of any length: their fragments and embeddings."""

import sys

import numpy as np
import pictures as pictures_of
import pytest
import torch
from said import names

from lorakit.base import encode, model
from lorakit.base.prompts import escape, parse, weighted_fragments
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.sample import denoise

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (cat:1.2) b", [("a ", 1), ("cat", 1.2), (" b", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1)]),
        (r"saber \(fate\)", [("saber (fate)", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a) b", [("a) b", 1)]),
        ("ratio 16:9, (x: 1.5 )", [("ratio 16:9, ", 1), ("x", 1.5)]),
    ],
)
def test_weights_are_read_as_a1111_reads_them(prompt, expected):
    fragments = parse(prompt)
    assert [words for words, _ in fragments] == [words for words, _ in expected]
    assert [weight for _, weight in fragments] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("text", ["a (b) [c:1.2] \\ d", "(((", "plain"])
def test_an_escaped_caption_has_no_weights(text):
    assert parse(escape(text)) == [(text, 1)]


def encoded(base, *prompts, folder, **changes):
    texts = encode.encode_prompts(base, prompts, folder, Compute(CPU, torch.float32), **changes)
    return [texts[prompt] for prompt in prompts]


LONG = ", ".join(f"red apple number {n}" for n in range(40))


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_only_weights_change_the_embeddings(small_bases, tmp_path, family):
    pytest.importorskip("compel")
    base = model.open(small_bases[family])
    plain, one, more, bracketed = encoded(
        base, "a red apple", "a (red:1.0) apple", "a (red:1.3) apple", r"a red \(apple\)", folder=tmp_path
    )
    assert torch.allclose(one.embeddings, plain.embeddings, atol=1e-5) and not one.fragments
    assert more.embeddings.shape == plain.embeddings.shape and torch.allclose(more.pooled, plain.pooled, atol=1e-5)
    empty = encoded(base, "", folder=tmp_path)[0]
    # Away from the empty prompt, as in compel and ComfyUI; words of weight 1 do not change.
    words = (more.tokens[0] == model.tokenize(model.load_tokenizer(base), ["red"])[0][1]).nonzero()
    assert len(words) == 1
    place = int(words[0])
    expected = empty.embeddings[place] + 1.3 * (plain.embeddings[place] - empty.embeddings[place])
    assert torch.allclose(more.embeddings[place], expected, atol=1e-5)
    others = [i for i in range(len(more.embeddings)) if i != place]
    assert torch.allclose(more.embeddings[others], plain.embeddings[others], atol=1e-5)
    literal = encode.encode_texts(base, ["a red (apple)"], tmp_path, Compute(CPU, torch.float32))["a red (apple)"]
    assert torch.allclose(bracketed.embeddings, literal.embeddings, atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_a_long_prompt_is_encoded_whole_in_chunks(small_bases, tmp_path, family, clip_skip):
    pytest.importorskip("compel")
    base = model.open(small_bases[family])
    long, again = encoded(base, LONG, LONG.replace("number 39", "number 38"), folder=tmp_path, clip_skip=clip_skip)
    assert len(long.embeddings) % 77 == 0 and len(long.embeddings) >= 4 * 77
    assert torch.allclose(long.embeddings[:77], again.embeddings[:77], atol=1e-5)
    assert not torch.equal(long.embeddings, again.embeddings)  # the last word has an effect
    start = encoded(base, LONG[: LONG.index(", red apple number 1,")], folder=tmp_path, clip_skip=clip_skip)[0]
    assert torch.allclose(long.embeddings[0], start.embeddings[0], atol=1e-5)


def test_encoded_prompts_are_cached(small_bases, tmp_path, monkeypatch):
    pytest.importorskip("compel")
    base = model.open(small_bases["sd15"])
    first = encoded(base, LONG, "(a cat:1.2)", "plain", folder=tmp_path)
    monkeypatch.setattr(model, "load_text_encoder", lambda *_: pytest.fail("loaded again"))
    for one, other in zip(first, encoded(base, LONG, "(a cat:1.2)", "plain", folder=tmp_path), strict=True):
        assert torch.equal(one.embeddings, other.embeddings) and one.fragments == other.fragments


def test_without_compel_a_message_says_that_weights_are_ignored(small_bases, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compel", None)
    base, messages = model.open(small_bases["sd15"]), []
    weighted, plain, long, both = encoded(
        base, "a (red:1.3) apple", "a red apple", LONG, f"(blue) {LONG}", folder=tmp_path,
        console=Console(messages.append, False),
    )  # fmt: skip
    assert torch.allclose(weighted.embeddings, plain.embeddings, atol=1e-5)
    assert len(long.embeddings) >= 4 * 77 and torch.equal(
        both.embeddings[: 4 * 77], encoded(base, f"blue {LONG}", folder=tmp_path)[0].embeddings[: 4 * 77]
    )
    assert len(messages) == 1 and names(messages[0], "a (red:1.3) apple", "compel", "lorakit[prompts]")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pictures_of_long_and_weighted_prompts_depend_on_no_neighbour(small_bases, family):
    pytest.importorskip("compel")
    base = model.open(small_bases[family])
    prompts = ["a cat", LONG, "a (cat:1.4)", "a dog"]
    how = {"steps": 2, "negative": "blurry, " * 60, "size": (32, 32), "device": "cpu", "precision": "no"}
    together = pictures_of.rows(base, prompts, seeds=[1, 2, 3, 4], **how)
    for prompt, seed, (picture,) in zip(prompts, [1, 2, 3, 4], together, strict=True):
        ((single,),) = pictures_of.rows(base, [prompt], seeds=[seed], **how)
        assert np.abs(np.int16(single) - np.int16(picture)).max() <= 1  # rounding differs with the batch
    (plain,), (weighted,) = pictures_of.rows(base, ["a cat", "a (cat:1.4)"], seeds=[3, 3], **how)
    assert plain.tobytes() != weighted.tobytes()


@pytest.mark.parametrize("family, name", [("sd15", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_adapters_of_text_encoders_change_weighted_prompts_too(small_bases, tmp_path, family, name):
    pytest.importorskip("compel")
    base = model.open(small_bases[family])
    texts = encoded(base, "a (cat:1.4)", "a cat", LONG, folder=tmp_path)
    encoder = model.load_text_encoder(base, Compute(CPU, torch.float32), name)[0]
    for one, other in zip(texts, encode.reencode_texts(base, {name: encoder}, texts), strict=True):
        assert torch.allclose(one.embeddings, other.embeddings, atol=1e-5)  # the encoder has not changed
        assert torch.allclose(one.pooled, other.pooled, atol=1e-5) and one.fragments == other.fragments
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.01)
    for one, other in zip(texts, encode.reencode_texts(base, {name: encoder}, texts), strict=True):
        assert not torch.allclose(one.embeddings, other.embeddings, atol=1e-3)


@pytest.mark.parametrize("batch", [8, 3])
def test_a_batch_that_does_not_fit_is_sampled_in_parts(small_bases, monkeypatch, batch):
    base, sizes = model.open(small_bases["sd15"]), []
    real = denoise.Denoiser._denoise

    def short(denoiser, texts, seeds):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(denoiser, texts, seeds)

    how = {"seeds": 0, "steps": 2, "size": (32, 32), "device": "cpu", "precision": "no", "batch": batch}
    prompts = [f"apple {n}" for n in range(8)]
    whole = pictures_of.rows(base, prompts, **how)
    monkeypatch.setattr(denoise.Denoiser, "_denoise", short)
    parts = pictures_of.rows(base, prompts, **how)
    for (one,), (other,) in zip(parts, whole, strict=True):
        assert np.abs(np.int16(one) - np.int16(other)).max() <= 1
    assert max(sizes) == batch and sizes.count(batch) == 1  # a size that did not fit is not tried again
    assert len(sizes) <= 8


def test_a_long_prompt_without_spaces_is_not_truncated(small_bases, tmp_path):
    """In other scripts a character has several tokens."""
    base, prompt = model.open(small_bases["sd15"]), "城市夜景中的一只红色小猫坐在窗台上看着下雨的街道和灯光与行人"
    assert model.tokens_needed(base, [prompt, "a red cat"]).keys() == {prompt}
    assert len(encoded(base, prompt, folder=tmp_path)[0].embeddings) == 2 * 77
    assert weighted_fragments(prompt) == weighted_fragments("a (red:1) cat") == () and weighted_fragments("a (red) cat")
