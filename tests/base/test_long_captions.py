"""Captions of more than 75 tokens: cut as sd-scripts and A1111 cut them, and the same in training and sampling."""

import json

import pytest
import torch
from said import QUIET, line

from lorakit.adapter import read
from lorakit.base import encode, model
from lorakit.device import Compute
from lorakit.plan import planning
from lorakit.run import run

COMPUTE = Compute(torch.device("cpu"), torch.float32)
WORDS = ("style", "background", "red", "small", "white", "mirrored", "noto", "classic", "fluent", "picture", "photo")


def caption(tokens: int) -> str:
    """So many common words, each of which is a token."""
    return " ".join(WORDS[place % len(WORDS)] for place in range(tokens))


def as_sd_scripts(tokenizer, text: str, longest: int) -> list[list[int]]:
    """sd-scripts' chunks: pad the tokens to `longest` + 2, cut them every 75, and give each chunk its marks."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=longest + 2, verbose=False).input_ids
    end, pad, chunks = tokenizer.eos_token_id, tokenizer.pad_token_id, []
    for place in range(1, longest + 1, 75):
        chunk = [ids[0], *ids[place : place + 75], ids[-1]]
        if pad != end:
            chunk[-1] = end if chunk[-2] not in (end, pad) else chunk[-1]
            chunk[1] = end if chunk[1] == pad else chunk[1]
        chunks.append(chunk)
    return chunks


def as_a1111(tokenizer, text: str) -> list[list[int]]:
    """The chunks by its rule, without its wish to break at a comma: as many of 75 tokens as the text needs."""
    ids, chunks = tokenizer(text, add_special_tokens=False, verbose=False).input_ids, []
    while ids or not chunks:
        chunk, ids = ids[:75], ids[75:]
        body = [*chunk, tokenizer.eos_token_id]
        chunks.append([tokenizer.bos_token_id, *body, *[tokenizer.pad_token_id] * (76 - len(body))])
    return chunks


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("tokens", [0, 1, 74, 75, 76, 149, 150, 151, 225, 260])
def test_chunks_are_those_of_others(small_bases, family, tokens):
    base, text = model.open(small_bases[family]), caption(tokens)
    for which in base.text_encoders:
        tokenizer = model.load_tokenizer(base, which)
        for chunks in (1, 2, 3):
            ours = model.tokenize(tokenizer, [text], chunks)[0].view(chunks, 77).tolist()
            assert ours == as_sd_scripts(tokenizer, text, 75 * chunks)
        needed = max(1, -(-tokens // 75))
        if needed <= 3:
            assert model.tokenize(tokenizer, [text], needed)[0].view(needed, 77).tolist() == as_a1111(tokenizer, text)
    counted = model.tokens_needed(base, [text]).get(text, 0)
    assert counted == tokens or tokens <= 75


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_the_tail_counts_in_its_own_chunk(small_bases, tmp_path, family, clip_skip):
    base, text = model.open(small_bases[family]), caption(100)
    other = " ".join([*text.split()[:-1], "face"])
    one, two = (encode.encode_texts(base, [x], tmp_path, COMPUTE, clip_skip, None, 2)[x] for x in (text, other))
    assert one.embeddings.shape[0] == 154 and torch.equal(one.embeddings[:77], two.embeddings[:77])
    assert not torch.allclose(one.embeddings[77:], two.embeddings[77:], atol=1e-3)
    assert torch.equal(one.pooled, two.pooled)  # of the first chunk, as in sd-scripts, A1111 and ComfyUI
    short = encode.encode_texts(base, [text], tmp_path, COMPUTE, clip_skip)[text]
    assert torch.allclose(short.embeddings, one.embeddings[:77], atol=1e-5)
    sampled = encode.encode_prompts(base, [text, "a phone"], tmp_path, COMPUTE, clip_skip)
    assert torch.equal(sampled[text].embeddings, one.embeddings) and len(sampled["a phone"].embeddings) == 77
    encoders = {which: model.load_text_encoder(base, COMPUTE, which)[0] for which in base.text_encoders}
    again = encode.reencode_texts(base, encoders, [one, sampled["a phone"], two], clip_skip)
    for text_of, same in zip((one, sampled["a phone"], two), again, strict=True):
        assert torch.allclose(text_of.embeddings, same.embeddings, atol=1e-5)


@pytest.fixture
def long(settings, pictures):
    """The short run, with captions of 100 tokens."""
    for file in pictures.rglob("*.txt"):
        file.write_text(f"{caption(98)} face")
    return settings.with_(steps=3, sample_every=3, sample_prompts=["a phone", caption(120)], save_every=1)


def tensors(path):
    return {module: parts["up"] for module, parts in read.load(path).parts.items()}


@pytest.mark.parametrize("encoder", [0.0, 1e-3], ids=["", "text encoder"])
def test_a_run_reads_as_much_as_the_longest_caption_needs(long, pictures, tmp_path, encoder):
    long, said = long.with_(text_encoder_rate=encoder), []
    whole = run.start(long, tmp_path / "whole", say=said.append, progress=False)
    assert line(said, "captions", 6, 75, 150) and read.load(whole.lora).metadata["ss_max_token_length"] == "150"
    same = run.start(long.with_(max_token_length=150), tmp_path / "same", **QUIET)
    assert whole.lora.read_bytes()[-5000:] == same.lora.read_bytes()[-5000:]
    said.clear()
    cut = run.start(long.with_(max_token_length=75), tmp_path / "cut", say=said.append, progress=False)
    assert line(said, "captions", 6, 75, "cut") and read.load(cut.lora).metadata["ss_max_token_length"] == "None"
    for file in pictures.rglob("*.txt"):
        file.write_text(f"{caption(98)} phone")  # another word in the tail
    tail = run.start(long, tmp_path / "tail", **QUIET)
    assert any(not torch.equal(x, tensors(whole.lora)[name]) for name, x in tensors(tail.lora).items())
    tail_cut = run.start(long.with_(max_token_length=75), tmp_path / "tail cut", **QUIET)
    if not encoder:
        assert all(torch.equal(x, tensors(cut.lora)[name]) for name, x in tensors(tail_cut.lora).items())


def test_a_run_with_long_captions_resumes_bit_for_bit(long, tmp_path):
    whole = run.start(long, tmp_path / "whole", **QUIET)
    for file in (tmp_path / "whole" / "checkpoints").glob("*[23].safetensors"):
        file.unlink()
    before = whole.lora.read_bytes()
    whole.lora.unlink()
    said = []
    again = run.start(long, tmp_path / "whole", say=said.append, progress=False)
    assert line(said, "resume", 1) and again.lora.read_bytes()[-5000:] == before[-5000:]


def test_longer_captions_are_planned_for(settings):
    costs = [planning.predict(settings.with_(max_token_length=length)) for length in (None, 75, 225)]
    assert costs[0].cost.activations == costs[1].cost.activations < costs[2].cost.activations, json.dumps(str(costs))
