"""The panels, asked as a kernel asks them; tests/test_browser.py clicks them."""

import io
import shutil
import zipfile

import pytest

from lorakit import check, dataset
from lorakit.widgets.captions import Captions
from lorakit.widgets.dataset import Pictures
from lorakit.widgets.pictures import thumbnail


@pytest.fixture
def panel(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Captions(dataset.scan(pictures), trigger="sks thing")


def said(widget) -> str:
    return widget.value


def test_captions_are_edited_by_hand_saved_and_brought_back(panel, pictures):
    row = panel.pages.seen.children[2]
    row.children[1].children[1].value = "sks thing,\n on a table "
    assert panel.captions["2_sks thing/2.png"] == "sks thing, on a table"
    assert "1 edited, not saved yet" in said(panel.status)
    panel.filter.value = "edited"
    assert panel.pages.things == ["2_sks thing/2.png"]
    panel.save()
    file = pictures / "2_sks thing" / "2.txt"
    assert file.read_text() == "sks thing, on a table\n" and "1 captions saved" in said(panel.status)
    panel.undo()
    assert file.read_text() == "sks thing, number 2"
    assert panel.captions["2_sks thing/2.png"] == "sks thing, number 2" and "1 captions are as they were" in said(
        panel.status
    )
    panel.undo()
    assert "nothing to undo" in said(panel.status)


def test_many_are_edited_after_a_look(panel):
    assert panel.apply.disabled
    panel.first.value = "a photo of {trigger}, {caption}"
    panel.edit.value = "find and replace"
    assert panel.second.layout.display == "" and panel.regex.layout.display == ""
    panel.first.value, panel.second.value, panel.regex.value = r"number (\d)", r"no. \1", True
    panel._preview()
    assert "6 captions would change" in said(panel.preview) and "+ sks thing, no. 0" in said(panel.preview)
    assert not panel.apply.disabled and panel.captions["2_sks thing/0.png"] == "sks thing, number 0"
    panel._apply()
    assert panel.captions["2_sks thing/0.png"] == "sks thing, no. 0" and panel.apply.disabled
    panel.first.value = "("
    panel._preview()
    assert "cannot be used" in said(panel.preview) and panel.apply.disabled
    panel.edit.value = "put into a form"
    panel.first.value = "{nobody}"
    panel._preview()
    assert "nothing is known of nobody" in said(panel.preview)


def test_filters_and_pages(panel):
    assert len(panel.pages.seen.children) == 6 and "1–6 of 6, page 1 of 1" in said(panel.pages.where)
    panel.search.value = "number 3"
    assert panel.pages.things == ["2_sks thing/3.png"]
    panel.search.value = "nowhere"
    assert panel.pages.things == [] and "none" in said(panel.pages.where)
    panel.search.value, panel.pages.most = "", 4
    panel.show()
    panel.pages.turn(1)
    assert len(panel.pages.seen.children) == 2 and "5–6 of 6, page 2 of 2" in said(panel.pages.where)
    panel.pages.turn(1)
    assert panel.pages.page == 1
    assert "sks thing" in said(panel.frequent)


def test_a_thumbnail_is_small_and_made_once(panel, pictures):
    picture = panel.dataset.pictures[0]
    assert thumbnail(picture) is thumbnail(picture) and len(thumbnail(picture)) < 10_000
    gone = panel.dataset.pictures[1]
    gone.path.unlink()
    thumbnail.cache_clear()
    assert thumbnail(gone)


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def chosen(pictures, tmp_path):
    return Pictures(str(pictures), resolution=64, trigger="sks thing", store=tmp_path / "decisions.json")


def test_pictures_are_left_out_with_a_click_and_stay_so(chosen, pictures, tmp_path):
    assert "6 pictures" in said(chosen.told) and len(chosen.pages.seen.children) == 6
    assert "the guide asks for 20" in said(chosen.told)
    cell = chosen.pages.seen.children[0]
    name = chosen.pages.things[0]
    cell.children[2].value = True
    assert [check.name_of(p.path, chosen.dataset) for p in chosen.dataset.pictures].count(name) == 0
    assert len(chosen.dataset) == 5
    chosen.filter.value = "left out"
    assert chosen.pages.things == [name]
    again = Pictures(str(pictures), resolution=64, store=tmp_path / "decisions.json")
    assert len(again.dataset) == 5
    chosen.pages.seen.children[0].children[2].value = False
    assert len(chosen.dataset) == 6
    assert sorted(path.name for path in (pictures / "2_sks thing").iterdir()) == sorted(
        f"{n}.{kind}" for n in range(6) for kind in ("png", "txt")
    )


def test_a_picture_that_is_fine_is_not_spoken_of_again(chosen):
    marked = [name for name in chosen.by_name if chosen.findings.get(name)]
    assert marked  # 32 pixels are enlarged to 64
    chosen.filter.value = "marked"
    assert set(chosen.pages.things) == set(marked)
    chosen.pages.seen.children[0].children[3].value = True
    fine = chosen.pages.things[0]
    chosen.check()
    assert not chosen.findings.get(fine) and len(chosen.dataset) == 6


def test_what_is_cut_off_is_shown(chosen):
    assert chosen.sheet.layout.display == "none"
    chosen._crops()
    assert bytes(chosen.sheet.value).startswith(b"\x89PNG") and chosen.sheet.layout.display == ""


@pytest.mark.parametrize("release", [7, 8])
def test_an_archive_is_uploaded(pictures, tmp_path, release):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in sorted(pictures.rglob("*.*")):
            zipped.write(file, file.relative_to(pictures))
    sent = (
        {"content": archive.getvalue()}
        if release == 7
        else {"name": "a.zip", "content": memoryview(archive.getvalue())}
    )
    panel = Pictures(uploads=tmp_path / "uploads")
    with pytest.raises(ValueError, match="No pictures are open yet"):
        panel.dataset  # noqa: B018
    panel._uploaded({"a.zip": sent} if release == 7 else (sent,))
    assert len(panel.dataset) == 6 and panel.path.value.endswith("a.zip")


def test_a_wrong_path_is_told(tmp_path, pictures):
    panel = Pictures(str(tmp_path / "nowhere"))
    assert "does not exist" in said(panel.told)
    shutil.rmtree(pictures / "2_sks thing")
    panel.read(str(pictures))
    assert "has no picture to train on" in said(panel.told)
