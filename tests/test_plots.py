import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from said import names, naming

from lorakit import plots
from lorakit.run import run_folder

SVG = "{http://www.w3.org/2000/svg}"
SCRIPTS = [
    "猫が好き",
    "кот",
    "قطة",
    "חתול",
    "🐈‍⬛",
    "e\u0301",
    "a\nb\tc",
    "\x00\x07",
    "\ud800",
    "",
    " ",
    "$x_1",
    "x" * 300,
]


def noisy(n: int) -> tuple[list[int], list[float]]:
    random = np.random.default_rng(0)
    steps = np.arange(1, n + 1)
    return steps.tolist(), ((0.06 + 0.1 * np.exp(-steps / n * 5)) * random.lognormal(0, 0.6, n)).tolist()


# ── log ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_log_is_read_whole_but_for_a_torn_last_line(tmp_path):
    file = tmp_path / "log.jsonl"
    written = [{"step": n, "loss": 0.1 / n, "learning_rate": 1e-4} for n in range(1, 6)]
    text = "".join(json.dumps(line) + "\n" for line in written)
    file.write_text(text)
    assert run_folder.read_log(file) == written
    for cut in range(2, len(text.splitlines()[-1]) + 1):
        file.write_text(text[:-cut])
        assert run_folder.read_log(file) == written[:-1], text[:-cut]
    file.write_bytes(text.encode() + '{"note": "猫'.encode()[:-1])
    assert run_folder.read_log(str(file)) == written
    file.write_text("")
    assert run_folder.read_log(file) == []


def test_a_diverged_loss_is_read_back(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": math.nan}) + "\n")
    assert math.isnan(run_folder.read_log(tmp_path / "log.jsonl")[0]["loss"])


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("missing")):
        run_folder.read_log(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{\n "steps": 3\n}\n')
    with pytest.raises(ValueError, match=naming(1, "config.json")):
        run_folder.read_log(tmp_path / "config.json")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=naming(2, "log.jsonl", "'[2]'")):
        run_folder.read_log(tmp_path / "log.jsonl")


# ── smoothing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_constant_stays_itself_from_the_first_entry():
    assert plots.smooth([0.37] * 100, half_life=7) == [0.37] * 100


def test_a_line_is_followed_at_the_averages_own_lag():
    keep = 0.5 ** (1 / 5)
    smoothed = plots.smooth(range(500), half_life=5)
    assert smoothed[0] == 0
    assert smoothed[-1] == pytest.approx(499 - keep / (1 - keep), abs=1e-6)


def test_a_loss_weighs_half_after_the_half_life():
    plain = np.array(plots.smooth([0.0] * 1000, half_life=10))
    struck = np.array(plots.smooth([0.0] * 900 + [1.0] + [0.0] * 99, half_life=10))
    assert (struck - plain)[910] == pytest.approx((struck - plain)[900] / 2, rel=1e-6)


def test_noise_gets_less():
    steps, losses = noisy(1000)
    assert np.std(plots.smooth(losses)[300:]) < np.std(losses[300:]) / 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_does_not_count(bad):
    smoothed = plots.smooth([1.0, bad, 2.0, bad], half_life=3)
    assert [math.isnan(x) for x in smoothed] == [False, True, False, True]
    assert [smoothed[0], smoothed[2]] == plots.smooth([1.0, 2.0], half_life=3)


def test_smoothing_nothing_and_with_nonsense():
    assert plots.smooth([]) == []
    for half_life in (0, -1, math.nan):
        with pytest.raises(ValueError, match=naming("half_life", half_life)):
            plots.smooth([1.0], half_life=half_life)


# ── SVG ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [0, 1, 2, 30, 1000, 10_000])
@pytest.mark.parametrize("size", [(640, 240), (320, 160), (1600, 400)])
def test_an_svg_is_small_self_contained_and_the_same_each_time(n, size):
    chart = plots.loss(*noisy(n), total=20_000, title="a run")
    svg = chart.svg(*size)
    assert len(svg.encode()) <= 100 * 1024 and svg == chart.svg(*size)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and float(root.get("width").removesuffix("pt")) == pytest.approx(size[0] * 0.75)
    assert not {element.tag for element in root.iter()} & {
        SVG + tag for tag in ("metadata", "style", "image", "script")
    }
    assert "http" not in svg.replace("http://www.w3.org/", "") and "url(#" in svg
    assert not re.findall(r"20\d\d-\d\d-\d\d|/home|/tmp|href=\"[^#]", svg)


@pytest.mark.parametrize(
    "losses", [[], [math.nan], [math.nan] * 50, [0.0] * 9, [1e-12] * 9, [1e12, 1e-12], [-3.0, 4e5]]
)
def test_odd_runs_still_draw(losses):
    chart = plots.loss(range(len(losses)), losses, total=100)
    ElementTree.fromstring(chart.svg())
    assert chart._repr_png_()


@pytest.mark.parametrize("title", ["</text><script>alert(1)</script>", "a & \"b\" 'c'", *SCRIPTS])
def test_a_title_stays_text(title):
    svg = plots.loss([1, 2], [1.0, 2.0], title=title).svg(2400)
    svg.encode()
    root = ElementTree.fromstring(svg)
    assert f"{SVG}script" not in {element.tag for element in root.iter()}
    text = re.sub("[\x00-\x08\ud800]", "�", " ".join(title.split()))
    assert text[:150] in "\n".join(element.text or "" for element in root.iter(f"{SVG}text"))


def test_an_svg_takes_the_pages_colour():
    svg = plots.loss(*noisy(50)).svg()
    assert set(re.findall(r"(?:fill|stroke): ([^\";]+)", svg)) == {"currentColor", "none", plots.ACCENT, "#b0b0b0"}
    assert 'fill="currentColor"' in svg


def test_threads_draw_the_same_and_leave_matplotlibs_settings():
    import matplotlib

    chart, settings = plots.loss(*noisy(200)), [key for key in matplotlib.rcParams if key != "backend"]
    before = [matplotlib.rcParams[key] for key in settings]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: chart.svg(), range(12)))
    assert set(drawn) == {chart.svg()} and [matplotlib.rcParams[key] for key in settings] == before


def test_the_status_and_what_is_to_come_are_shown():
    chart = plots.loss([1, 2, 3], [1.0] * 3, total=400, validation=[(2, 9.0)])
    assert names(chart.status, 3, 400, "1.00", "9.00") and chart.status in chart.svg()
    assert chart.figure().axes[0].get_xlim()[1] == 400


def test_validation_losses_are_drawn_within_the_plot():
    steps, losses = noisy(50)
    axes = plots.loss(steps, losses, validation=[(10, 9.5), (20, math.nan), (30, 9.0)]).figure().axes[0]
    low, high = axes.get_ylim()
    assert low < min(losses) and 9.5 < high < 11 and axes.lines[2].get_ydata().tolist() == [9.5, 9.0]


# ── figure ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_figure_is_saved_and_shows_itself(tmp_path):
    steps, losses = noisy(300)
    path = tmp_path / "run" / "loss.png"
    chart = plots.loss(steps, losses, title="my_character_v1")
    chart.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width >= 800
        assert not {k: v for k, v in picture.info.items() if k != "dpi"}  # above all, no path
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    (axes,) = chart.figure().axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("loss", "step")
    raw, smoothed = axes.lines
    assert raw.get_ydata().tolist() == losses and smoothed.get_ydata().tolist() == plots.smooth(losses)
    assert chart._repr_png_().startswith(b"\x89PNG")


def test_a_figure_leaves_nothing_behind():
    code = """
import sys
from lorakit import plots
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
import matplotlib
matplotlib.rcParams["axes.facecolor"] = "black"
settings = [key for key in matplotlib.rcParams if key != "backend"]  # asking for that one chooses it
before = [matplotlib.rcParams[key] for key in settings]
chart = plots.loss([1, 2, 3], [3.0, 2.0, 1.0])
assert chart.figure().axes[0].get_facecolor() == (1, 1, 1, 1)
chart._repr_png_()
assert [matplotlib.rcParams[key] for key in settings] == before
assert "matplotlib.pyplot" not in sys.modules
import matplotlib.pyplot
assert not matplotlib.pyplot.get_fignums()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("title", SCRIPTS)
def test_a_figure_takes_any_title(title):
    assert plots.loss([1, 2], [1.0, 2.0], title=title)._repr_png_()


def test_a_figure_with_missing_losses_has_a_gap():
    losses = [1.0, math.nan, None, 1.5]
    for line in plots.loss([1, 2, 3, 4], losses).figure().axes[0].lines:
        assert np.isnan(line.get_ydata()).tolist() == [False, True, True, False]


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=naming(2, 1)):
        plots.loss([1, 2], [0.5])


# ── sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────────

COLOURS = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]


def coloured(size: tuple[int, int]) -> list[list[Image.Image]]:
    return [[Image.new("RGB", size, colour) for colour in row] for row in COLOURS]


def boxes(sheet: Image.Image, colours=COLOURS) -> np.ndarray:
    """Where each colour is, (rows, columns, 4) as left, top, right, bottom; a colour must fill its box."""
    pixels = np.asarray(sheet)
    found = []
    for colour in sum(colours, []):
        y, x = np.nonzero((pixels == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(-1))
        box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert len(x) == (box[2] - box[0]) * (box[3] - box[1]), colour
        found.append(box)
    return np.array(found).reshape(len(colours), -1, 4)


def assert_clear_edges(sheet: Image.Image) -> None:
    pixels = np.asarray(sheet)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


@pytest.mark.parametrize(
    "size, cell",
    [((64, 64), (128, 128)), ((64, 48), (192, 144)), ((128, 128), (128, 128)), ((300, 200), (300, 200))],
)
def test_cells_are_enlarged_by_a_whole_factor_and_stand_in_rows_and_columns(size, cell):
    sheet = plots.grid(coloured(size), row_labels=["cat", "dog"], column_labels=["0", "0.5", "1.0"])
    found = boxes(sheet)
    assert (found[..., 2] - found[..., 0] == cell[0]).all() and (found[..., 3] - found[..., 1] == cell[1]).all()
    for column in range(3):
        assert len(set(found[:, column, 0])) == 1
    for row in range(2):
        assert len(set(found[row, :, 1])) == 1
    assert (found[:, :-1, 2] < found[:, 1:, 0]).all() and (found[:-1, :, 3] < found[1:, :, 1]).all()
    assert_clear_edges(sheet)


def test_small_pictures_keep_their_pixels():
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sheet = plots.grid([[Image.fromarray(random)]], row_labels=[""], column_labels=[""])
    pixels = np.asarray(sheet)
    inside = pixels[(pixels != 255).any((1, 2))][:, (pixels != 255).any((0, 2))]
    assert (inside == random.repeat(2, 0).repeat(2, 1)).all()


@pytest.mark.parametrize("size, columns", [((1024, 1024), 5), ((64, 64), 40), ((512, 768), 60), ((2400, 100), 1)])
def test_a_sheet_is_never_too_wide(size, columns):
    rows = [[Image.new("RGB", size, "red")] * columns]
    sheet = plots.grid(rows, row_labels=["a photo of sks person"], column_labels=[f"step {n}" for n in range(columns)])
    assert 2000 < sheet.width <= plots.WIDEST


def test_missing_transparent_and_unequal_pictures():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    small = Image.new("L", (32, 64), 100)
    rows = [[Image.new("P", (64, 64)), None, clear, small]]
    sheet = plots.grid(rows, row_labels=[""], column_labels=["", "", "", ""])
    found = boxes(sheet, [["black", "#eeeeee", (100, 100, 100)]])[0]
    assert (found[:, 2] - found[:, 0]).tolist() == [128, 128, 64]
    pitch = found[1, 0] - found[0, 0]
    assert found[2, 0] == found[0, 0] + 3 * pitch + 32  # centred in the fourth cell, the third being clear
    only = plots.grid([[None]], row_labels=["later"], column_labels=["1.0"])
    assert only.getpixel((only.width - 20, only.height - 20)) == (238, 238, 238)


LONG = "a photo of sks person, smiling, in a snowy forest, soft evening light, 85mm, film grain, looking away, " * 4


@pytest.mark.parametrize("label", [LONG, *SCRIPTS])
def test_labels_of_any_script_and_length_fit(label):
    sheet = plots.grid(coloured((64, 64)), row_labels=[label, "b"], column_labels=[label, "y", "z"])
    assert_clear_edges(sheet)
    boxes(sheet)  # none of the pictures is written over


@pytest.mark.parametrize("width", [1, 30, 128, 400])
@pytest.mark.parametrize("text", [LONG, "x" * 300, "checkpoint step-000500", "猫が好き" * 20, ""])
def test_wrapped_lines_fit_and_lose_nothing(width, text):
    text, font = plots._plain(text), plots._font(16)
    wrapped = plots._wrapped(text, font, width)
    assert "".join(wrapped).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= width or len(line) == 1 for line in wrapped)


def test_a_word_shrinks_before_it_breaks():
    (shrunk,) = plots._labels(["step-00000500"], 100, 16, 0)
    (broken,) = plots._labels(["step-00000500"], 50, 16, 0)
    assert shrunk.height < 2 * 10 < broken.height


def test_a_sheet_is_saved(tmp_path):
    path = tmp_path / "samples" / "sheet.png"
    sheet = plots.grid(coloured((64, 64)), row_labels="ab", column_labels="xyz", path=path)
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    with Image.open(path) as saved:
        assert saved.format == "PNG" and not saved.info and saved.tobytes() == sheet.tobytes()


@pytest.mark.parametrize("rows, columns", [("a", "xyz"), ("ab", "xy"), ("abc", "xyz"), ("", ""), ("ab", "")])
def test_labels_must_match_the_pictures(rows, columns):
    with pytest.raises(ValueError, match=naming([3, 3], len(rows), len(columns))):
        plots.grid(coloured((64, 64)), row_labels=rows, column_labels=columns)
    with pytest.raises(ValueError, match=naming([], len(columns))):
        plots.grid([], row_labels=[], column_labels=columns)
