"""Tags sorted by kind, in the order in which a base was trained."""

import pytest
from said import names, naming
from test_main import called

from lorakit import named
from lorakit.dataset import order_tags, undo_captions, write_captions
from lorakit.dataset.tag_order import KINDS, kind_of

NOOBAI, ANIMAGINE = (named.NAMED[name].tag_order for name in ("noobai-1.1", "animagine-4"))


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("1girl", "people"), ("2boys", "people"), ("6+girls", "people"), ("solo", "people"), ("no_humans", "people"),
        ("masterpiece", "quality"), ("best_quality", "quality"), ("score_8_up", "quality"), ("high score", "quality"),
        ("safe", "rating"), ("rating_explicit", "rating"), ("rating:general", "rating"),
        ("artist:john_kafka", "artist"), ("by wlop", "artist"), ("by the sea side, far", "general"),
        (r"arlecchino \(genshin impact\)", "character"), ("saber_(fate)", "character"), ("character:a", "character"),
        ("horror (theme)", "general"), ("graphite_(medium)", "general"), ("cat_pun", "general"),
        ("series:fate", "series"), ("newest", "special"), ("year 2024", "special"),
        ("absurdres", "other"), ("highres", "other"), ("twitter_username", "other"),
        ("long_hair", "general"), ("looking at viewer", "general"), ("", "general"), ("^_^", "general"),
    ],
)  # fmt: skip
def test_kinds(tag, kind):
    assert kind_of(tag) == kind and kind in KINDS


def test_captions_are_sorted_as_the_base_was_trained():
    caption = (
        r"long hair, absurdres, newest, artist:wlop, fate, sks, saber \(fate\), 1girl, smile, masterpiece, safe, solo"
    )
    assert order_tags({"1.png": caption}, NOOBAI, "sks")["1.png"] == (
        r"1girl, solo, sks, saber \(fate\), fate, artist:wlop, newest, long hair, smile, masterpiece, safe, absurdres"
    )
    assert order_tags({"1.png": caption}, ANIMAGINE, "SKS")["1.png"] == (
        r"1girl, solo, sks, saber \(fate\), fate, safe, long hair, absurdres, newest, artist:wlop, smile, masterpiece"
    )
    assert order_tags({"1.png": "smile, 1girl, hat"}, ["people"])["1.png"] == "1girl, smile, hat"
    assert order_tags({"1.png": "", "2.png": "one sentence about a cat"}, NOOBAI) == {
        "1.png": "", "2.png": "one sentence about a cat",
    }  # fmt: skip
    once = order_tags({"1.png": caption}, NOOBAI)
    assert order_tags(once, NOOBAI) == once


def test_the_edit_is_written_and_undone(pictures):
    from lorakit.dataset import caption_changes, scan

    (file := next(pictures.rglob("0.txt"))).write_bytes(before := b"hat,  1girl , smile\n")
    dataset = scan(pictures)
    changes = caption_changes(dataset.captions, order_tags(dataset.captions, NOOBAI))
    write_captions([change for change in changes if change.name.endswith("0.png")], dataset.root)
    assert file.read_text().strip() == "1girl, hat, smile"
    undo_captions(dataset.root)
    assert file.read_bytes() == before


def test_the_command_and_the_panel_sort_tags(pictures):
    from lorakit.dataset import scan
    from lorakit.widgets.captions import Captions

    for file in pictures.rglob("*.txt"):
        file.write_text("hat, sks, 1girl")
    assert names(called("caption", "order", pictures, "noobai-1.1", "--trigger", "sks")[0], "+ 1girl, sks, hat")
    assert names(called("caption", "order", pictures, "sd15", expect=1)[1], "Stable Diffusion 1.5", "animagine-4")
    panel = Captions(scan(pictures), "sks")
    panel.edit.value = "order tags as a base does"
    panel.first.value = "animagine-4"
    panel._preview()
    panel._apply()
    assert set(panel.captions.values()) == {"1girl, sks, hat"}


def test_wrong_orders_are_refused():
    with pytest.raises(ValueError, match=naming("colour", *KINDS)):
        order_tags({}, ["people", "colour"])
    with pytest.raises(ValueError, match=naming("nothing")):
        order_tags({}, [])
    with pytest.raises(ValueError, match=naming("Stable Diffusion XL", "noobai-1.1")):
        named.tag_order(["sdxl"])
    with pytest.raises(ValueError, match="noobai-1.1"):
        named.tag_order([])
    assert named.tag_order(["people", "general"]) == ["people", "general"]
    assert named.tag_order(["animagine-4"]) == ANIMAGINE
