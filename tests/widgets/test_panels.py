"""The panels, asked as a kernel asks them; test_browser.py clicks them."""

import io
import shutil
import zipfile
from pathlib import Path

import ipywidgets as widgets
import pytest
from panels import tone, words
from PIL import Image
from said import names

from lorakit.dataset import folder as dataset_folder
from lorakit.dataset import selection
from lorakit.dataset.buckets import Buckets
from lorakit.dataset.picture import thumbnail
from lorakit.widgets.captions import Captions
from lorakit.widgets.dataset import Pictures

LEAVE_OUT, FINE, REPLACE = "leave out", "is fine", "replace"  # toggles of a picture


@pytest.fixture
def panel(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Captions(dataset_folder.scan(pictures), trigger="sks thing")


def all_widgets() -> dict:
    """Those that have not been closed; ipywidgets 7 keeps them elsewhere."""
    found = getattr(widgets.widget, "_instances", None)
    return widgets.Widget.widgets if found is None else found


def said(widget, *values) -> bool:
    """Whether a widget's text names all of these values."""
    return names(words(widget.value), *values)


def test_captions_are_edited_by_hand_saved_and_brought_back(panel, pictures):
    row = panel.pages.visible.children[2]
    row.children[1].children[1].value = "sks thing,\n on a table "
    assert panel.captions["2_sks thing/2.png"] == "sks thing, on a table"
    assert said(panel.status, 1) and tone(panel.status.value) == "warning"
    panel.filter.value = "edited"
    assert panel.pages.items == ["2_sks thing/2.png"]
    panel.save()
    file = pictures / "2_sks thing" / "2.txt"
    assert file.read_text() == "sks thing, on a table\n"
    assert said(panel.status, 1) and tone(panel.status.value) == "good"
    panel.save()
    assert tone(panel.status.value) == ""  # there is nothing new to save
    panel.undo()
    assert file.read_text() == "sks thing, number 2"
    assert panel.captions["2_sks thing/2.png"] == "sks thing, number 2"
    assert said(panel.status, 1) and tone(panel.status.value) == "good"
    panel.undo()
    assert tone(panel.status.value) == "bad" and file.read_text() == "sks thing, number 2"


def test_many_are_edited_after_a_look(panel):
    assert panel.apply.disabled
    panel.first.value = "a photo of {trigger}, {caption}"
    panel.edit.value = "find and replace"
    assert panel.second.layout.display == "" and panel.regex.layout.display == ""
    panel.first.value, panel.second.value, panel.regex.value = r"number (\d)", r"no. \1", True
    panel._preview()
    assert said(panel.preview, 6, "+ sks thing, no. 0")
    assert not panel.apply.disabled and panel.captions["2_sks thing/0.png"] == "sks thing, number 0"
    panel._apply()
    assert panel.captions["2_sks thing/0.png"] == "sks thing, no. 0" and panel.apply.disabled
    panel.first.value = "("
    panel._preview()
    assert tone(panel.preview.value) == "bad" and panel.apply.disabled
    panel.edit.value = "put into a form"
    panel.first.value = "{nobody}"
    panel._preview()
    assert said(panel.preview, "nobody") and tone(panel.preview.value) == "bad" and panel.apply.disabled


def test_filters_and_pages(panel):
    assert len(panel.pages.visible.children) == 6 and said(panel.pages.position, "1–6", 6, 1)
    panel.search.value = "number 3"
    assert panel.pages.items == ["2_sks thing/3.png"]
    panel.search.value = "nowhere"
    assert panel.pages.items == [] and not any(map(str.isdigit, words(panel.pages.position.value)))
    panel.search.value, panel.pages.most = "", 4
    panel.show()
    panel.pages.turn(1)
    assert len(panel.pages.visible.children) == 2 and said(panel.pages.position, "5–6", 6, 2)
    panel.pages.turn(1)
    assert panel.pages.page == 1
    alive = len(all_widgets())
    panel.pages.turn(-1)
    panel.pages.turn(1)
    assert len(all_widgets()) == alive  # what is not seen any more is gone
    assert said(panel.frequent, "sks thing")


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


def toggled(cell, text, on=True):
    """Click a picture's toggle."""
    (toggle,) = [part for part in cell.children if getattr(part, "description", "") == text]
    toggle.value = on


def test_pictures_are_left_out_with_a_click_and_stay_so(chosen, pictures, tmp_path):
    assert said(chosen.message, 6, 20) and len(chosen.pages.visible.children) == 6  # the guide asks for 20
    cell = chosen.pages.visible.children[0]
    name = chosen.pages.items[0]
    toggled(cell, LEAVE_OUT)
    assert name not in chosen.dataset.by_name
    assert len(chosen.dataset) == 5
    chosen.filter.value = "left out"
    assert chosen.pages.items == [name]
    again = Pictures(str(pictures), resolution=64, store=tmp_path / "decisions.json")
    assert len(again.dataset) == 5
    toggled(chosen.pages.visible.children[0], LEAVE_OUT, False)
    assert len(chosen.dataset) == 6
    assert sorted(path.name for path in (pictures / "2_sks thing").iterdir()) == sorted(
        f"{n}.{kind}" for n in range(6) for kind in ("png", "txt")
    )


def test_a_picture_that_is_fine_is_not_spoken_of_again(chosen):
    marked = [name for name in chosen.by_name if chosen.findings.get(name)]
    assert marked  # 32 pixels are enlarged to 64
    chosen.filter.value = "marked"
    assert set(chosen.pages.items) == set(marked)
    toggled(chosen.pages.visible.children[0], FINE)
    fine = chosen.pages.items[0]
    chosen.check()
    assert not chosen.findings.get(fine) and len(chosen.dataset) == 6


def test_a_picture_is_replaced_and_keeps_its_name_and_caption(chosen, pictures, tmp_path):
    name, place = "2_sks thing/4.png", 4
    cell = chosen.pages.visible.children[chosen.pages.items.index(name)]
    image, path, wrong = cell.children[0], *cell.children[-2:]
    old = image.value
    assert path.layout.display == "none"
    toggled(cell, REPLACE)
    assert path.layout.display == ""
    path.value = str(tmp_path / "none.png")
    assert said(wrong, "none.png") and not chosen.decisions.replace
    (tmp_path / "notes.png").write_text("no picture")
    path.value = str(tmp_path / "notes.png")
    assert said(wrong, "notes.png") and image.value == old and not chosen.decisions.replace
    better = tmp_path / "better.png"
    Image.new("RGB", (96, 96), "red").save(better)
    path.value = f" {better} "
    assert chosen.decisions.replace == {name: str(better)} and image.value != old and not wrong.value
    taken = chosen.dataset.pictures[place]
    assert (taken.path, taken.width, taken.caption) == (better, 96, "sks thing, number 4")
    assert (pictures / name).is_file()
    chosen.check()
    assert chosen.report.measured[place].name == name  # what is found about it is told where it is seen
    panel = Captions(chosen.dataset)  # and its caption stays the caption of the picture's own file
    panel.captions[name] = "sks thing, new"
    panel.save()
    assert (pictures / "2_sks thing" / "4.txt").read_text() == "sks thing, new\n"

    again = Pictures(str(pictures), resolution=64, store=tmp_path / "decisions.json")
    assert again.dataset.pictures[place].path == better
    cell = again.pages.visible.children[again.pages.items.index(name)]
    assert cell.children[-2].value == str(better) and cell.children[-2].layout.display == ""
    toggled(cell, REPLACE, False)
    assert again.dataset.pictures[place].path == pictures / name and cell.children[0].value == old
    assert not selection.load_decisions(tmp_path / "decisions.json", pictures).replace

    selection.save_decisions(selection.Decisions(replace={name: str(better)}), tmp_path / "decisions.json", pictures)
    better.unlink()
    gone = Pictures(str(pictures), resolution=64, store=tmp_path / "decisions.json")
    assert said(gone.message, name, "better.png") and len(gone.dataset) == 6 and not gone.decisions.replace


def test_the_rule_of_the_buckets_is_the_runs(pictures):
    assert any(found.kind == "resolution" for found in Pictures(str(pictures), resolution=64).report.findings)
    own = Pictures(str(pictures), resolution=Buckets(64, 8, "no_upscale"))
    assert not any(found.kind == "resolution" for found in own.report.findings)
    narrow = Pictures(str(pictures), resolution=Buckets(32, 8, minimum=32, maximum=32))
    assert {measured.fit.size for measured in narrow.report.measured} == {(32, 32)}
    narrow._show_crops()
    assert narrow.sheet.value


def test_pages_of_pictures_leave_nothing_behind(chosen):
    chosen.show()
    alive = len(all_widgets())
    chosen.show()
    assert len(all_widgets()) == alive


def test_what_is_cut_off_is_shown(chosen):
    assert chosen.sheet.layout.display == "none"
    chosen._show_crops()
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
    with pytest.raises(ValueError):
        panel.dataset  # noqa: B018
    panel._uploaded({"a.zip": sent} if release == 7 else (sent,))
    assert len(panel.dataset) == 6 and Path(panel.source).is_dir()  # not the archive, in which no caption could stay
    assert Path(panel.source).is_relative_to(tmp_path / "uploads")


@pytest.mark.usefixtures("colab_package")
def test_on_colab_its_own_dialog_uploads(pictures, tmp_path, monkeypatch):
    panel = Pictures(uploads=tmp_path / "uploads")
    assert panel.upload.description == "Upload" and not isinstance(panel.upload, widgets.FileUpload)
    panel.upload.click()  # and nothing is chosen
    assert panel.scanned is None
    monkeypatch.setenv("FAKE_COLAB_UPLOAD", shutil.make_archive(str(tmp_path / "packed"), "zip", pictures))
    panel.upload.click()
    assert len(panel.dataset) == 6 and (tmp_path / "uploads" / "packed.zip").is_file()
    monkeypatch.setenv("FAKE_COLAB_UPLOAD", str(tmp_path / "gone.zip"))
    panel.upload.click()
    assert said(panel.message, "gone.zip") and tone(panel.message.value) == "bad"
    assert not panel.dialog.children and len(panel.dataset) == 6
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert isinstance(Pictures().upload, widgets.FileUpload)


def test_a_wrong_path_is_told(tmp_path, pictures):
    panel = Pictures(str(tmp_path / "nowhere"))
    assert said(panel.message, "nowhere") and tone(panel.message.value) == "bad" and panel.scanned is None
    shutil.rmtree(pictures / "2_sks thing")
    panel.read(str(pictures))
    assert said(panel.message, "pictures") and tone(panel.message.value) == "bad"
