"""Drafts: the real classes with few, random weights, saved and loaded as the hub's are; and what is done with them."""

import csv
import fnmatch
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from said import naming

from lorakit.console import Console
from lorakit.dataset import captioner, captions
from lorakit.dataset import folder as folders
from lorakit.dataset import picture as picture_module
from lorakit.device import Compute

CPU = Compute.choose("cpu")
QUIET = Console.quiet()
BY_THREE = captioner.Captioner(batch_size=3)
WORDS = ["a", "photo", "of", "dog", "cat", "red", "blue", "house", "tree", "the", "in", "on", "with", "big", "small"]
SIZE = {"height": 32, "width": 32}
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = LAYERS | {"image_size": 32, "patch_size": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


# ── Small captioners ────────────────────────────────────────────────────────────────────────────────────────────────


def tokenizer(*special, **named):
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<pad>", "<s>", "</s>", "<unk>", *special, *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    named = named or {"additional_special_tokens": list(special)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **named
    )


def write(folder, kind, config, processor):
    """Weights large enough for what is seen to change what is said."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = kind(config)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_blip(folder):
    words = tokenizer("[DEC]")
    text = LAYERS | IDS | {"encoder_hidden_size": 16, "vocab_size": len(words), "bos_token_id": 4, "sep_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=SIZE), words)
    write(folder, transformers.BlipForConditionalGeneration, config, processor)


def write_blip2(folder):
    words = tokenizer("<image>")
    text = transformers.OPTConfig(
        vocab_size=len(words), hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=128, **IDS,
    )  # fmt: skip
    looks = LAYERS | {"vocab_size": 8, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
    config = transformers.Blip2Config(
        text_config=text.to_dict(), vision_config=VISION, qformer_config=looks, num_query_tokens=4, image_token_index=4
    )
    processor = transformers.Blip2Processor(transformers.BlipImageProcessor(size=SIZE), words, num_query_tokens=4)
    write(folder, transformers.Blip2ForConditionalGeneration, config, processor)


def write_florence2(folder):
    if not hasattr(transformers, "Florence2ForConditionalGeneration"):
        pytest.skip("this transformers has no Florence-2 of its own")
    words = tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    text = transformers.BartConfig(
        vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=2,
        max_position_embeddings=256, **IDS,
    )  # fmt: skip
    vision = {
        "depths": (1, 1, 1, 1), "embed_dim": (8, 8, 8, 16), "num_heads": (1, 1, 1, 2), "num_groups": (1, 1, 1, 2),
        "window_size": 4, "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 8,
    }  # fmt: skip
    config = transformers.Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=4)
    sees = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    sees.image_seq_length = 5  # 2×2 cells, and their mean
    processor = transformers.Florence2Processor(sees, words)
    write(folder, transformers.Florence2ForConditionalGeneration, config, processor)


def write_smolvlm(folder):
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles)
    text = LAYERS | IDS | {"model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 2}
    config = transformers.Idefics3Config(
        text_config=text, vision_config=VISION | {"patch_size": 8}, image_token_id=5, scale_factor=2, pad_token_id=0
    )
    sees = transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    asked = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    chat = f"{{% for part in messages[0]['content'] %}}{asked}{{% endfor %}}<end_of_utterance>"
    processor = transformers.Idefics3Processor(sees, words, image_seq_len=4, chat_template=chat)
    write(folder, transformers.Idefics3ForConditionalGeneration, config, processor)


WRITERS = {"blip": write_blip, "blip2": write_blip2, "florence2": write_florence2, "smolvlm": write_smolvlm}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """kind → folder of a small model of that kind."""
    made, root = {}, tmp_path_factory.mktemp("captioners")

    def folder(kind):
        if kind not in made:
            WRITERS[kind](root / kind)
            made[kind] = root / kind
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def seen():
    random = np.random.default_rng(0)
    noise = [random.integers(0, 255, (40, width, 3), np.uint8) for width in (30, 50, 160)]  # the last in fewer tiles
    return [Image.fromarray(pixels) for pixels in noise] + [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(captioner, "LONGEST", 8)


def load(model, **settings):
    """What captions pictures."""
    return captioner.Captioner(str(model), **{"compute": CPU} | settings).load()


def as_documented(kind, folder, prompt=None):
    """What captions one picture by transformers' own class, as its documentation shows."""
    names = {"blip": "Blip", "blip2": "Blip2", "florence2": "Florence2", "smolvlm": "Idefics3"}
    model = getattr(transformers, f"{names[kind]}ForConditionalGeneration").from_pretrained(folder).eval()
    processor = getattr(transformers, f"{names[kind]}Processor").from_pretrained(folder)

    @torch.no_grad()
    def ask(picture):
        if kind == "smolvlm":
            asked = [{"type": "image"}, {"type": "text", "text": prompt or captioner.INSTRUCTION}]
            text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
            inputs = processor(text=text, images=[picture], return_tensors="pt")
            written = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        else:
            text = prompt or ("<DETAILED_CAPTION>" if kind == "florence2" else None)
            inputs = processor(images=picture, return_tensors="pt", **({"text": text} if text else {}))
            written = model.generate(**inputs, do_sample=False, max_new_tokens=8, num_beams=3)
        return processor.batch_decode(written, skip_special_tokens=True)[0].strip()

    return ask


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_a_batch_is_captioned_as_the_documentation_does_one_by_one(kind, prompt, folder_of, seen):
    found = load(folder_of(kind), prompt=prompt)(seen)
    assert found == list(map(as_documented(kind, folder_of(kind), prompt), seen))
    assert len(set(found)) > 1  # what is said depends on what is seen


@pytest.mark.parametrize("kind", WRITERS)
def test_half_precision_is_what_a_gpu_is_given(kind, folder_of, seen):
    half = Compute(torch.device("cpu"), torch.float16)
    model, _ = captioner._open(folder_of(kind), half)
    assert Counter(weight.dtype for weight in model.parameters()).most_common(1)[0][0] == torch.float16
    assert len(load(folder_of(kind), compute=half)(seen[:2])) == 2


# ── The tagger ──────────────────────────────────────────────────────────────────────────────────────────────────────

TAGS = {"sensitive": 9, "mostly_red": 0, "mostly_blue": 0, "^_^": 0, "hatsune_miku": 4, "bright_border": 0}


@pytest.fixture
def tagger(tmp_path):
    """Writes a graph that looks at the mean of each channel alone."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    def written(batch):
        blue, green, red = np.eye(3)
        columns = [
            0 * red, red - green - blue, blue - green - red, 0 * red, red - green - blue, (red + green + blue) / 3
        ]  # fmt: skip
        weights = {
            "axes": np.array([1, 2]),
            "look": np.stack(columns, 1).astype(np.float32) / 255,
            "bias": np.array([9, -0.5, -0.5, 1, -1, -0.7], np.float32),
        }
        nodes = [
            helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "look"], ["score"]),
            helper.make_node("Add", ["score", "bias"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["output"]),
        ]
        graph = helper.make_graph(
            nodes, "tagger",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 448, 448, 3])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(TAGS)])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, tmp_path / "model.onnx")
        with (tmp_path / "selected_tags.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["tag_id", "name", "category", "count"])
            rows.writerows([number, *tag, 100] for number, tag in enumerate(TAGS.items()))
        return tmp_path

    return written


@pytest.mark.parametrize("batch", ["N", 1])
def test_a_tagger_sees_blue_first_and_white_around(tagger, batch):
    folder = tagger(batch)
    pictures = [Image.new("RGB", (90, 90), colour) for colour in ("red", "blue", "black")]
    pictures.append(Image.new("RGB", (10, 100), "black"))  # nine tenths of its square are white
    found = load(folder, thresholds=(0.52, 0.9))(pictures)
    assert found == ["^_^, mostly red", "^_^, mostly blue", "^_^", "^_^, bright border"]
    found = load(folder, thresholds=(0.52, 0.5))(pictures[:1])
    assert found == ["hatsune miku, ^_^, mostly red"]


def test_a_tagger_of_another_list_is_refused(tagger):
    folder = tagger("N")
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n1,red,0,9\n")
    with pytest.raises(ValueError, match=naming(folder.name, 448, len(TAGS), 1)):
        load(folder)


def test_what_a_tagger_needs_is_said(tagger, monkeypatch):
    folder = tagger("N")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=naming("onnxruntime", "lorakit[tagger]")):
        load(folder)


# ── Where models come from ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_hub_is_asked_for_what_is_read_alone(folder_of, tmp_path, monkeypatch, seen):
    hub, fetched = tmp_path / "hub", tmp_path / "fetched"
    shutil.copytree(folder_of("blip"), hub)
    for name in ("pytorch_model.bin", "tf_model.h5", "modeling_own.py"):
        (hub / name).write_text("not to be fetched")

    def download(repository, revision, allow_patterns):
        assert (repository, revision) == captioner.MODELS["blip"]
        fetched.mkdir(exist_ok=True)
        for file in hub.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, fetched)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load("blip")(seen) == load(hub)(seen)
    assert {file.suffix for file in fetched.iterdir()} <= {".json", ".safetensors"}


def test_a_hub_out_of_reach_says_so(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    for model, name in (("florence2", "florence-community/Florence-2-large"), ("owner/model", "owner/model")):
        with pytest.raises(FileNotFoundError, match=naming(name, "Name or service not known")):
            load(model)


def test_an_unknown_model_is_answered_with_those_there_are():
    with pytest.raises(FileNotFoundError, match=naming("blop", *captioner.MODELS)):
        load("blop")


def test_pickles_are_never_read(folder_of, tmp_path):
    shutil.copytree(folder_of("blip"), tmp_path, dirs_exist_ok=True)
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=naming(tmp_path.name, ".safetensors")):
        load(tmp_path)


def test_weights_of_another_model_are_refused(folder_of, tmp_path):
    shutil.copytree(folder_of("blip"), tmp_path, dirs_exist_ok=True)
    shutil.copy(folder_of("blip2") / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path.name, "BlipForConditionalGeneration") + r"(?=.* \d+ )"):
        load(tmp_path)


def test_a_model_that_does_not_write_is_refused(small_bases):
    with pytest.raises(ValueError, match=naming("text_encoder", *captioner.MODELS)):
        load(small_bases["sd15"] / "text_encoder")


def test_a_model_without_a_way_to_ask_it_is_refused(folder_of, tmp_path):
    shutil.copytree(folder_of("smolvlm"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=naming(tmp_path.name, *captioner.MODELS)):
        load(tmp_path)


# ── What is done with drafts ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mixed(tmp_path):
    """Six pictures, of which 0 has a caption written by hand; the others have that of their folder."""
    folder = tmp_path / "mixed" / "2_sks thing"
    folder.mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("by hand")
    return folders.scan(tmp_path / "mixed")


@pytest.fixture
def asked(monkeypatch):
    """Instead of a model, one that names a picture's red, and remembers what it was asked; None in it interrupts."""
    colours = []

    def load(chosen):
        def ask(pictures):
            reds = [picture.getpixel((0, 0))[0] for picture in pictures]
            if None in colours and 160 in reds:
                colours.remove(None)
                raise KeyboardInterrupt
            colours.extend(reds)
            return [f"{chosen.model} {red}" for red in reds]

        return ask

    monkeypatch.setattr(captioner.Captioner, "load", load)
    return colours


def texts(pictures):
    return {file.stem: file.read_text().strip() for file in pictures.root.rglob("*.txt")}


def test_drafts_go_on_where_they_were_cut_and_leave_the_pictures_alone(mixed, asked, tmp_path):
    asked.append(None)
    with pytest.raises(KeyboardInterrupt):
        captioner.draft_captions(mixed, BY_THREE, store=tmp_path, console=QUIET)
    assert asked == [40, 80, 120]
    found = captioner.draft_captions(mixed, BY_THREE, store=tmp_path, console=QUIET)
    assert asked == [40, 80, 120, 160, 200]
    assert found == {f"2_sks thing/{n}.png": f"blip {40 * n}" for n in range(1, 6)}
    assert captioner.draft_captions(mixed, store=tmp_path, console=QUIET) == found and len(asked) == 5
    assert texts(mixed) == {"0": "by hand"}


def test_each_caption_is_written_as_it_is_made(mixed, asked, tmp_path):
    asked.append(None)
    with pytest.raises(KeyboardInterrupt):
        captioner.draft_captions(mixed, BY_THREE, into=mixed.root, store=tmp_path, console=QUIET)
    assert texts(mixed) == {"0": "by hand", "1": "blip 40", "2": "blip 80", "3": "blip 120"}
    captioner.draft_captions(folders.scan(mixed.root), BY_THREE, into=mixed.root, store=tmp_path, console=QUIET)
    assert len(asked) == 5 and texts(mixed)["5"] == "blip 200"


def test_a_hand_edit_of_a_draft_is_a_persons(mixed, asked, tmp_path):
    captioner.draft_captions(mixed, into=mixed.root, store=tmp_path, console=QUIET)
    (mixed.root / "2_sks thing" / "3.txt").write_text("blip 120, corrected")
    again = folders.scan(mixed.root)
    found = captioner.draft_captions(again, "blip2", into=mixed.root, store=tmp_path, console=QUIET)
    assert sorted(found.values()) == ["blip2 160", "blip2 200", "blip2 40", "blip2 80"]
    assert texts(mixed)["3"] == "blip 120, corrected" and texts(mixed)["0"] == "by hand"
    assert texts(mixed)["4"] == "blip2 160"


def test_what_a_person_writes_meanwhile_is_kept(mixed, tmp_path, monkeypatch):
    last = mixed.root / "2_sks thing" / "5.txt"

    def load(*_, **__):
        return lambda pictures: [last.write_text("just now") and "a dog" for _ in pictures]

    monkeypatch.setattr(captioner.Captioner, "load", load)
    captioner.draft_captions(mixed, into=mixed.root, store=tmp_path, console=QUIET)
    assert texts(mixed) == {"0": "by hand", "5": "just now"} | dict.fromkeys("1234", "a dog")


def test_told_to_it_overwrites_and_undo_brings_all_back(mixed, asked, tmp_path):
    settings = {"into": mixed.root, "store": tmp_path, "console": QUIET}
    assert len(captioner.draft_captions(mixed, captioner.Captioner(batch_size=2), overwrite=True, **settings)) == 6
    assert texts(mixed)["0"] == "blip 0"
    captions.undo_captions(mixed.root)
    assert texts(mixed) == {"0": "by hand"}


def test_another_folder_keeps_what_a_person_wrote_there(mixed, asked, tmp_path):
    there = tmp_path / "drafts" / "2_sks thing"
    there.mkdir(parents=True)
    (there / "5.txt").write_text("mine")
    found = captioner.draft_captions(mixed, into=there.parent, store=tmp_path, console=QUIET)
    assert len(found) == 4 and texts(mixed) == {"0": "by hand"}
    assert (there / "5.txt").read_text() == "mine" and (there / "4.txt").read_text() == "blip 160\n"


def test_a_picture_that_the_model_says_nothing_of_is_asked_again(mixed, tmp_path, monkeypatch):
    said = ["!!!!!!", "", "a  dog\n"]
    clean = captioner._clean
    monkeypatch.setattr(captioner.Captioner, "load", lambda _: lambda pictures: [clean(said.pop(0)) for _ in pictures])
    some = replace(mixed, pictures=mixed.pictures[1:3])
    assert captioner.draft_captions(some, into=mixed.root, store=tmp_path, console=QUIET) == {}
    assert texts(mixed) == {"0": "by hand"}
    assert captioner.draft_captions(replace(mixed, pictures=mixed.pictures[1:2]), store=tmp_path, console=QUIET) == {
        "2_sks thing/1.png": "a dog"
    }


def test_too_many_at_once_are_asked_in_halves():
    sizes = []

    def ask(pictures):
        if len(pictures) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        sizes.append(len(pictures))
        return [str(picture) for picture in pictures]

    assert captioner._ask(ask, list(range(5))) == ["0", "1", "2", "3", "4"] and sizes == [2, 1, 2]


def test_the_whole_way_with_a_small_blip(mixed, folder_of, tmp_path):
    found = captioner.draft_captions(
        mixed, captioner.Captioner(str(folder_of("blip")), compute=CPU), into=mixed.root, store=tmp_path, console=QUIET
    )
    ask = as_documented("blip", folder_of("blip"))
    assert found == {name: ask(picture_module.open_picture(mixed.root / name)) for name in found} and len(found) > 2
    assert folders.scan(mixed.root).captions == mixed.captions | found
