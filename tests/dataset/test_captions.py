"""Captions: the forms one is trained in; many edited at once, seen first, written whole and undone to the byte."""

import random
import re
from collections import Counter

import pytest
from PIL import Image
from said import names, naming

from lorakit.config import Config
from lorakit.dataset import captions
from lorakit.dataset import folder as folders


def asked(**settings) -> Config:
    return Config(steps=1, **settings)


def variants(*lines: str, **settings) -> tuple[str, ...]:
    return captions.caption_variants(lines, asked(**settings))


def test_one_form_where_nothing_is_varied():
    assert variants("a, b,  c") == ("a, b,  c",)
    assert variants("a", shuffle_captions=True) == ("a",)
    assert variants("a, b", shuffle_captions=True, keep_tokens=2, tag_dropout=0.5) == ("a, b",)
    assert variants("{a|b}, c|||d;;;e") == ("{a|b}, c|||d;;;e",)  # signs that are not asked for


def test_shuffling_keeps_every_tag_and_the_first_in_place():
    forms = variants("sks, red, big, round, old", shuffle_captions=True, keep_tokens=1, caption_variants=16)
    assert len(forms) == 16 and len(set(forms)) > 8
    for form in forms:
        assert form.startswith("sks, ")
        assert sorted(captions.split_tags(form)) == sorted(["sks", "red", "big", "round", "old"])


def test_dropout_drops_about_its_share_and_keeps_the_order():
    forms = variants("sks, a, b, c, d", caption_variants=400, keep_tokens=1, tag_dropout=0.25)
    left = [captions.split_tags(form)[1:] for form in forms]
    assert 0.2 < 1 - sum(map(len, left)) / 1600 < 0.3
    assert all(tags == sorted(tags) for tags in left)


def test_chance_depends_on_seed_and_words_alone():
    first = variants("a, b, c, d", shuffle_captions=True, seed=1)
    assert first == variants("a, b, c, d", shuffle_captions=True, seed=1)
    assert first != variants("a, b, c, d", shuffle_captions=True, seed=2)


def test_lines_and_choices_occur_equally_often():
    drawn = variants("sks one", "sks two", "sks {red|green} {hat|shoe|bag}", caption_choices=True, caption_variants=36)
    assert Counter(text.split()[1] for text in drawn)["one"] == 12 and len(drawn) == 36
    assert Counter(drawn) == {
        "sks one": 12, "sks two": 12,
        **{f"sks {colour} {thing}": 2 for colour in ("red", "green") for thing in ("hat", "shoe", "bag")},
    }  # fmt: skip
    many = variants(" ".join(["{a|b|c|d}"] * 6), caption_choices=True, caption_variants=64)  # of 4096
    assert len(set(many)) > 50 and all(len(set(text.split()) - set("abcd")) == 0 for text in many)
    assert many == variants(" ".join(["{a|b|c|d}"] * 6), caption_choices=True, caption_variants=64)
    assert len(variants(*"abcdef", caption_variants=4)) == 6  # every line is learned
    assert set(variants("{a|}{{b}} {c}", caption_choices=True)) == {"a{b} c", "{b} c"}


def test_separators_hold_tags_in_place_and_together():
    drawn = variants(
        "sks, a ||| b;;;c, d, e ||| best, quality", keep_tokens_separator="|||", secondary_separator=";;;",
        shuffle_captions=True, caption_variants=32,
    )  # fmt: skip
    assert all(text.startswith("sks, a, ") and text.endswith(", best, quality") and "b, c" in text for text in drawn)
    assert len(set(drawn)) == 6 and all(
        sorted(captions.split_tags(text)) == sorted(["sks", "a", "b", "c", "d", "e", "best", "quality"])
        for text in drawn
    )
    dropped = variants("a|||b;;;c, d", keep_tokens_separator="|||", secondary_separator=";;;", tag_dropout=0.5)
    assert {"a", "a, b, c", "a, d", "a, b, c, d"} >= set(dropped) >= {"a, b, c", "a, d"}
    unshuffled = {"keep_tokens_separator": "|||", "secondary_separator": ";;;"}
    assert variants("a|||b;;;c, d", **unshuffled) == ("a, b, c, d",)
    assert captions.plain_caption(["{x|y}|||b, c", "z"], asked(caption_choices=True, **unshuffled)) == "x, b, c"


def as_sd_scripts(caption: str, keep: str, secondary: str, shuffle: random.Random) -> str:
    """One draw by the rules of sd-scripts' `process_caption`, written down from its description."""
    caption = shuffle.choice(caption.split("\n"))
    caption = re.sub(r"\{([^}]+)\}", lambda match: shuffle.choice(match[1].split("|")), caption)
    fixed, _, rest = caption.partition(keep) if keep in caption else ("", "", caption)
    free, _, end = rest.partition(keep)
    tags = [tag.strip() for tag in free.split(",") if tag.strip()]
    shuffle.shuffle(tags)
    parts = [tag.strip() for tag in fixed.split(",")], tags, [tag.strip() for tag in end.split(",")]
    text = ", ".join(tag for part in parts for tag in part if tag)
    return ", ".join(tag.strip() for tag in text.replace(secondary, ",").split(","))


def test_all_draws_of_sd_scripts_are_drawn_and_no_others():
    caption = "sks {cat|dog}, cute ||| a;;;b, c ||| end\nsks alone, {x|y}"
    theirs = {as_sd_scripts(caption, "|||", ";;;", random.Random(number)) for number in range(500)}
    ours = variants(
        *caption.split("\n"), caption_choices=True, keep_tokens_separator="|||", secondary_separator=";;;",
        shuffle_captions=True, caption_variants=200,
    )  # fmt: skip
    assert set(ours) == theirs and len(theirs) == 8


def test_lines_are_joined_and_that_is_shown(pictures):
    for number, file in enumerate(sorted(pictures.rglob("*.txt"))):
        file.write_text("one  cat\n\n ,\nsks dog\n" if number < 2 else "a hat")
    dataset = folders.scan(pictures)
    assert [p.caption for p in dataset.pictures[:3]] == ["one cat , sks dog"] * 2 + ["a hat"]
    assert [p.lines for p in dataset.pictures[:3]] == [("one cat", "sks dog")] * 2 + [("a hat",)]
    assert names(dataset.describe(), "2 of several lines", "caption_lines")
    assert all(len(p.lines) == 1 for p in folders.scan(pictures, first_line=True).pictures)


def test_the_class_takes_the_triggers_place():
    assert captions.without_trigger("a photo of sks cat, red", "sks cat", "cat") == "a photo of cat, red"
    assert captions.without_trigger("a photo of Sks cat, red", "sks", "cat") == "a photo of cat, red"
    assert captions.without_trigger("art at a party,  by night", "art", "\\x") == "\\x at a party, by night"
    assert captions.without_trigger("a party,  by night", "art", "cat") == "a party,  by night"
    assert captions.without_trigger("sks cat", "sks", "") == "cat"


# ── Many at once ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_guides_template_is_put_on_once():
    once = captions.apply_template({"1": "a dog, on grass", "2": "", "3": "a photo of sks"}, trigger="sks")
    assert once == {"1": "a photo of sks, a dog, on grass", "2": "a photo of sks", "3": "a photo of sks"}
    assert captions.apply_template(once, trigger="sks") == once
    assert captions.apply_template({"1": "a dog"}, "{caption}, oil painting")["1"] == "a dog, oil painting"
    assert captions.apply_template({"1": "a {dog}"}, "{trigger}", "sks")["1"] == "sks"


@pytest.mark.parametrize("form, wrong", [("{subject}, {caption}", "subject"), ("{trigger}, {caption}", "trigger")])
def test_a_form_that_cannot_be_filled_is_refused(form, wrong):
    with pytest.raises(ValueError, match=naming(repr(form))) as caught:
        captions.apply_template({"1": "a dog"}, form)
    assert names(str(caught.value).replace(form, ""), wrong)


def test_plain_text_is_replaced_as_it_stands():
    assert captions.replace_text({"1": r"a (dog) [x] \1"}, "(dog) [x]", r"cat\1") == {"1": r"a cat\1 \1"}
    assert captions.replace_text({"1": "Dog dog"}, "dog", "cat") == {"1": "Dog cat"}


def test_patterns_may_name_groups():
    assert captions.replace_text({"1": "red car, blue car"}, r"(\w+) car", r"car in \1", regex=True)["1"] == (
        "car in red, car in blue"
    )


@pytest.mark.parametrize("find, by", [("a(", "b"), ("a", r"\1"), ("a", r"\g<x>"), ("", "b")])
def test_a_broken_pattern_is_explained(find, by):
    with pytest.raises(ValueError) as caught:
        captions.replace_text({"1": "a"}, find, by, regex=True)
    assert not find or names(str(caught.value), repr(find), repr(by))


def test_tags_are_edited_behind_those_that_are_kept():
    before = {"1": "Sks, long_hair, ^_^, Hat, long hair, grass", "2": "sks"}
    after = captions.retag(before, keep=1, spaces=True, lower=True, remove=["SKS", "hat"], add=["photo"], unique=True)
    assert after == {"1": "sks, long hair, ^_^, grass, photo", "2": "sks, photo"}
    assert captions.retag({"1": "sks, b, A, c"}, keep=1, sort=True) == {"1": "sks, A, b, c"}


def test_the_preview_shows_what_changes_alone():
    before = {"1": "a dog", "2": "a cat", "3": "a dog"}
    found = captions.caption_changes(before, captions.replace_text(before, "dog", "wolf"))
    assert [change.name for change in found] == ["1", "3"]
    title, *lines, last = captions.describe_changes(found, most=1).splitlines()
    assert names(title, 2) and lines == ["1", "  - a dog", "  + a wolf"] and names(last, 1)
    assert names(captions.describe_changes([]), 0)


# ── Written and undone ──────────────────────────────────────────────────────────────────────────────────────────────

ODD = {
    "crlf.txt": b"a dog,\r\non grass\r\n",
    "bom.txt": b"\xef\xbb\xbfa dog",
    "wide.txt": "a dög".encode("utf-16"),
    "west.txt": "a dög".encode("cp1252"),
    "blank.txt": b"",
    "other.caption": b"a dog",
}


@pytest.fixture
def odd(tmp_path):
    """Captions in every encoding, of pictures in a subfolder; one picture has none."""
    folder = tmp_path / "set" / "5_dog"
    folder.mkdir(parents=True)
    for name, raw in ODD.items():
        (folder / name).write_bytes(raw)
    for name in [*ODD, "none.txt"]:
        Image.new("RGB", (8, 8), tuple(name.encode()[:3])).save((folder / name).with_suffix(".png"))
    return tmp_path / "set"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*.*") if file.suffix != ".png"}


def test_an_edit_is_undone_to_the_byte(odd):
    before, pictures = contents(odd), folders.scan(odd)
    old = pictures.captions
    assert old["5_dog/crlf.png"] == "a dog, on grass" and old["5_dog/wide.png"] == "a dög" == old["5_dog/west.png"]
    new = captions.apply_template(old, trigger="sks")
    written = captions.write_captions(captions.caption_changes(old, new), odd)
    assert sorted(path.name for path in written) == sorted([*ODD, "none.txt"])
    assert folders.scan(odd).captions == new
    assert not [name for name in contents(odd) if name not in {path.name for path in written}]
    assert sorted(captions.undo_captions(odd)) == sorted(written)
    assert contents(odd) == before
    with pytest.raises(ValueError, match=naming("set")):
        captions.undo_captions(odd)


def test_edits_are_undone_one_by_one_and_those_of_one_name_together(odd):
    states, pictures = [contents(odd)], ["5_dog/crlf.png", "5_dog/bom.png", "5_dog/none.png"]
    for edit, batches in (("a", [pictures]), ("b", [pictures[:1], pictures[1:]])):
        for some in batches:
            old = folders.scan(odd).captions
            captions.write_captions(
                [captions.Change(name, old[name], f"{edit}, {old[name]}") for name in some], odd, edit=edit
            )
        states.append(contents(odd))
    captions.undo_captions(odd)
    assert contents(odd) == states[1]
    captions.undo_captions(odd)
    assert contents(odd) == states[0]


def test_a_hand_edit_is_neither_overwritten_nor_undone(odd):
    old = folders.scan(odd).captions
    found = captions.caption_changes(old, captions.apply_template(old, trigger="sks"))
    (odd / "5_dog" / "bom.txt").write_text("by hand", encoding="utf-8")
    before = contents(odd)
    with pytest.raises(ValueError, match=naming("5_dog/bom.png")):
        captions.write_captions(found, odd)
    assert contents(odd) == before
    captions.write_captions([change for change in found if "bom" not in change.name], odd)
    (odd / "5_dog" / "none.txt").write_text("by hand", encoding="utf-8")
    before = contents(odd)
    with pytest.raises(ValueError, match=naming("none.txt")):
        captions.undo_captions(odd)
    assert contents(odd) == before


def test_captions_of_which_the_first_line_counts_are_no_hand_edits(odd):
    old = folders.scan(odd, first_line=True).captions
    captions.write_captions([captions.Change("5_dog/crlf.png", old["5_dog/crlf.png"], "a cat")], odd)
    assert old["5_dog/crlf.png"] == "a dog," and contents(odd)["crlf.txt"] == b"a cat\non grass\n"


def test_captions_are_written_all_or_none(odd, monkeypatch):
    old, before = folders.scan(odd).captions, contents(odd)
    found, put, calls = captions.caption_changes(old, captions.apply_template(old, trigger="sks")), captions._put, []

    def full(path, raw):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "no space left")
        put(path, raw)

    monkeypatch.setattr(captions, "_put", full)
    with pytest.raises(OSError, match="no space"):
        captions.write_captions(found, odd)
    assert contents(odd) == before
    with pytest.raises(ValueError, match=naming("set")):
        captions.undo_captions(odd)


def test_another_folder_and_another_history_leave_the_pictures_alone(odd, tmp_path):
    old, before = folders.scan(odd).captions, contents(odd)
    found = captions.caption_changes(old, captions.apply_template(old, trigger="sks"))
    history = tmp_path / "drive" / "history.jsonl"
    captions.write_captions(found, odd, into=tmp_path / "out", history=history)
    assert contents(odd) == before and history.is_file()
    assert (tmp_path / "out" / "5_dog" / "none.txt").read_text() == "a photo of sks, dog\n"
    captions.undo_captions(odd, history=history)
    assert contents(tmp_path / "out") == {}


def test_a_torn_line_of_a_history_is_passed_over(odd):
    captions.write_captions([captions.Change("5_dog/none.png", "", "a dog")], odd)
    with captions._history(odd).open("a") as stream:
        stream.write('{"edit": "cut sh')
    captions.undo_captions(odd)
    assert not (odd / "5_dog" / "none.txt").exists()


def test_the_caption_file_that_is_there_is_used(tmp_path):
    for name in ("a.TXT", "b.caption", "e\u0301.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = captions.caption_files(["a.png", "b.png", "\u00e9.png", "new.jpg"], tmp_path)
    assert [path.name for path in found.values()] == ["a.TXT", "b.caption", "e\u0301.txt", "new.txt"]
    with pytest.raises(ValueError, match=naming("a.png", "a.jpg", "a.TXT")):
        captions.caption_files(["a.png", "a.jpg"], tmp_path)


@pytest.mark.parametrize(
    ("after", "lines"),
    [
        ("sks, red cat on a mat the end", "sks, red cat\non a mat\nthe end\n"),
        ("a dog on a mat the end", "a dog\non a mat\nthe end\n"),
        ("red cat the end", "red cat\nthe end\n"),
        ("red cat on a mat the end, best quality", "red cat\non a mat\nthe end, best quality\n"),
        ("something else", "something else\n"),
    ],
)
def test_an_edit_keeps_the_lines_of_a_caption(tmp_path, after, lines):
    (tmp_path / "a.txt").write_text("red cat\non a mat\nthe end\n")
    change = captions.Change("a.png", "red cat on a mat the end", after)
    captions.write_captions([change], tmp_path, history=tmp_path / "history")
    assert (tmp_path / "a.txt").read_text() == lines
    captions.undo_captions(tmp_path, history=tmp_path / "history")
    assert (tmp_path / "a.txt").read_text() == "red cat\non a mat\nthe end\n"
