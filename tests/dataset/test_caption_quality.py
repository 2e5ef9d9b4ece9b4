"""The audit of captions: what CLIP's tokenizer reads, where the trigger is, and what it takes in."""

import json

import pytest
from PIL import Image
from said import line, names, naming

from lorakit.base.model import FAMILIES, tokenize
from lorakit.dataset import caption_quality
from lorakit.dataset import folder as dataset_folder


def found(captions, trigger="", kind="object", **settings):
    """kind of finding → its findings, without those on the trigger by itself."""
    kinds = {}
    for finding in caption_quality.audit_captions(captions, trigger, kind=kind, **settings).findings:
        if finding.kind != "trigger":
            kinds.setdefault(finding.kind, []).append(finding)
    return kinds


# ── The trigger by itself ───────────────────────────────────────────────────────────────────────────────────────────


def told(trigger):
    return [f"{finding.severity} {finding.message}" for finding in caption_quality.check_trigger(trigger)]


@pytest.mark.parametrize("word", ["dog", "emma", "teapot", "trombone", "bluedog", "sunflower"])
def test_ordinary_words_are_known_by_the_vocabulary(word):
    assert caption_quality.ordinary(word) and line(told(word), "warning", word)


@pytest.mark.parametrize("word", ["sks", "ohwx", "txcl", "zwx", "xyzzy", "vrtx"])
def test_rare_words_pass(word):
    assert not caption_quality.ordinary(word)
    assert {finding.severity for text in (word, f"{word} dog") for finding in caption_quality.check_trigger(text)} == {
        "info"
    }


def test_the_split_is_the_tokenizers():
    assert line(told("txcl"), "txcl", "tx·cl", 2, 75)
    assert line(told("qzvxkjwpt"), "info", "qzvxkjwpt", 75)


def test_a_weapon_signs_digits_and_capitals_are_told():
    (plain,) = told("ohwx")
    assert names(plain, "info", "ohwx", 1, 75)
    assert line(told("sks dog"), "sks", caption_quality.KNOWN["sks"])
    split, spelled = told("ohwx_1")
    assert names(split, "ohwx_1", "ohwx·_·1") and names(spelled, "info", "ohwx_1")
    assert line(told("Ohwx"), "Ohwx", "ohwx")


# ── The trigger in captions ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_trigger_counts_as_words_of_its_own():
    kinds = found({"1": "SKS dog", "2": "he asks", "3": "a dog", "4": "sks by sks", "5": "", "6": "sks's"}, "sks")
    assert kinds["trigger_in_word"][0].pictures == ("2",)
    assert kinds["without_trigger"][0].pictures == ("3",)
    assert kinds["trigger_twice"][0].pictures == ("4",)
    assert kinds["empty"][0].pictures == ("5",)


def test_a_trigger_that_no_caption_has_is_serious():
    assert found({"1": "a dog", "2": "a cat"}, "ohwx")["without_trigger"][0].severity == "serious"
    assert found({"1": "a dog", "2": "ohwx"}, "ohwx")["without_trigger"][0].severity == "warning"


@pytest.mark.parametrize("near", ["ohwz man", "owhx man", "ohwxx man", "ohw man", "ohwxman", "ohwx-man"])
def test_a_slip_in_the_trigger_is_found(near):
    [finding] = found({"1": "ohwx man", "2": f"a photo of {near}, smiling"}, "ohwx man")["trigger_misspelled"]
    assert finding.pictures == ("2",) and names(finding.message, repr(near), "'ohwx man'")


def test_ordinary_words_are_no_slips():
    assert "trigger_misspelled" not in found({"1": "sks under the sky", "2": "sks skis"}, "sks")


def test_one_off_is_a_distance_of_one():
    assert (
        caption_quality.one_off("sks", "sk")
        and caption_quality.one_off("sks", "xsks")
        and caption_quality.one_off("sks", "skk")
    )
    assert caption_quality.one_off("sks", "kss") and caption_quality.one_off("", "a")
    assert not any(
        caption_quality.one_off(a, b) for a, b in [("sks", "sks"), ("sks", "ssss"), ("abc", "cba"), ("ab", "")]
    )


# ── What is read ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", ["", "a ", "a b ", "a b c "])
def test_what_is_cut_off_is_what_the_text_encoder_never_sees(before):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(FAMILIES / "tokenizer")
    caption = f"{before}Photo  of sks dog, " + ", ".join(f"überlong {i}" for i in range(40)) + " and the END of it"
    count, lost = caption_quality.cut_off(caption)
    seen = tokenize(tokenizer, [caption], 3)[0].view(3, 77)
    assert lost.endswith("the END of it") and count == len(tokenizer.tokenize(caption)) > 225
    kept = "".join(tokenizer.decode(chunk[1:-1]) for chunk in seen) + lost
    assert "".join(kept.lower().split()) == "".join(caption.lower().split())
    [finding] = found({"1": caption, "2": "a dog"})["too_long"]
    assert finding.pictures == ("1",) and repr(lost) in finding.message


def test_225_tokens_are_read_whole():
    assert caption_quality.cut_off(" ".join(["dog"] * 225)) == (225, "")
    assert caption_quality.cut_off(" ".join(["dog"] * 226)) == (226, "dog")
    kinds = found({"1": " ".join(["dog"] * 75), "2": " ".join(["dog"] * 76)})
    assert "too_long" not in kinds and [finding.pictures for finding in kinds["long"]] == [("2",)]


# ── What it teaches ─────────────────────────────────────────────────────────────────────────────────────────────────

VARIED = {"1": "sks dog, red collar, grass", "2": "sks dog, snow, red collar", "3": "sks dog, on a sofa, red collar"}


def test_what_always_comes_with_the_trigger_is_absorbed():
    kinds = found(VARIED | {"4": "grass, wide view"}, "sks")
    assert names(kinds["absorbed"][0].message, "sks", "dog, red collar") and "grass" not in kinds["absorbed"][0].message
    assert "unvaried" not in kinds


def test_what_never_varies_is_told_once():
    kinds = found(VARIED, "sks")
    assert "absorbed" in kinds and "unvaried" not in kinds
    [finding] = found(VARIED)["unvaried"]
    assert names(finding.message, "red collar, sks dog")


def test_the_same_caption_is_told_with_its_pictures():
    same = {"1": "a dog", "2": "A  dog", "3": "a cat"}
    [finding] = found(same)["repeated"]
    assert finding.pictures == ("1", "2") and "repeated" not in found(same, kind="style")


def test_detail_follows_the_guide():
    long = {str(i): f"sks, {' '.join(f'w{i}x{j}' for j in range(20))}" for i in range(3)}
    short = {str(i): f"sks, w{i}" for i in range(3)}
    assert "detail" in found(long, "sks", "style") and "detail" not in found(short, "sks", "style")
    assert "detail" in found(short, "sks", "character") and "detail" not in found(long, "sks", "character")


def test_frequencies_count_captions():
    counts = caption_quality.audit_captions({"1": "Red, red, a dog", "2": "red, a cat"})
    assert counts.figures["tags"] == {"red": 2, "a cat": 1, "a dog": 1} and next(iter(counts.figures["tags"])) == "red"
    assert counts.figures["words"] == {"red": 2, "cat": 1, "dog": 1}


# ── The whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dataset_is_audited_by_the_names_of_its_pictures(tmp_path):
    for name, caption in {"5_dog/1": "ohwx dog, on grass by a lake", "5_dog/2": "a dog"}.items():
        (tmp_path / "5_dog").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), caption[:4] == "ohwx" and "red" or "blue").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    result = caption_quality.audit_captions(dataset_folder.scan(tmp_path), "ohwx", "sdxl", "character")
    assert [f.pictures for f in result.findings if f.kind == "without_trigger"] == [("5_dog/2.png",)]
    facts = json.loads(json.dumps(result.facts()))
    assert facts["captions"] == 2 and facts["findings"][0]["kind"] == "trigger"
    assert {"picture": "5_dog/2.png", "kind": "without_trigger"}.items() <= facts["findings"][1].items()
    first, *lines = result.describe().splitlines()
    assert names(first, 2, len(result.findings))
    worst = lines.index(line(lines, "warning", "without_trigger"))
    assert names(lines[worst + 1], "ohwx", "5_dog/2.png") and worst < lines.index(line(lines, "info", "trigger"))
    assert "data:image/jpeg;base64," in result._repr_html_()


def test_a_report_stays_short():
    report = caption_quality.audit_captions({str(i): f"{i} " + "very " * 230 for i in range(50)})
    lines = report.describe(most=5).splitlines()
    first = lines.index(line(lines, "warning", "too_long", 50))
    assert all(names(text, 225) for text in lines[first + 1 : first + 6]) and names(lines[first + 6], 45)
    assert sum(names(text, 225) for text in lines) == 5
    assert "225 are read" in report._repr_html_()  # without a dataset there are no pictures to show


def test_no_captions_are_no_trouble():
    assert caption_quality.audit_captions({}, "ohwx").figures["captions"] == 0
    ((kind, [finding]),) = found({"1": ""}).items()
    assert (kind, finding.severity, finding.pictures) == ("empty", "warning", ("1",))


def test_unknown_kinds_and_families_are_refused():
    with pytest.raises(ValueError, match=naming("person", *caption_quality.KINDS)):
        caption_quality.audit_captions({}, kind="person")
    with pytest.raises(ValueError, match=naming("flux", *caption_quality.FAMILIES)):
        caption_quality.audit_captions({}, family="flux")


def test_signs_of_other_programs_are_named():
    """They would be learned to the letter."""
    signs = {
        "a": "a {red|blue} cat",
        "b": "cat <lora:x:1>",
        "c": "(cat:1.3)",
        "d": "cat &amp; dog",
        "e": '{"tags": "cat"}',
    }
    plain = {"f": "a cat (sitting), 3:2, {", "g": "a < b", "h": "cats & dogs", "i": "[cat]"}
    named = found(signs | plain)["markup"]
    assert {name for finding in named for name in finding.pictures} == set(signs)
