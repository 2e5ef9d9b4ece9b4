"""The pictures behind the embedded base: emoji, which have names and come in many styles.

The icon sets are npm's `@iconify-json/*` packages (SVG bodies by name), rendered by resvg. Nothing here runs when
lorakit is used: only `demo.pretrain` and the measurements in tests/bench/ need the packages.
"""

import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

# What the base is taught: the word its captions use -> the npm package. Licences: demo/LICENSES.md.
STYLES = {
    "noto": "noto",
    "fluent": "fluent-emoji",
    "ink": "fluent-emoji-high-contrast",
    "firefox": "fxemoji",
}
NEW_STYLE = "fluent-emoji-flat"  # never shown to the base: what the demo's LoRA learns
UNSEEN = (NEW_STYLE, "twemoji", "openmoji")  # never shown to the autoencoder either
VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",  # not taught: only what it draws as well counts as a subject
    "fluent-emoji": "1.2.7",
    "fluent-emoji-high-contrast": "1.2.6",
    "fxemoji": "1.2.2",
    "fluent-emoji-flat": "1.2.6",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
}
SIZE = 64
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (150, 150, 150),
    "red": (214, 60, 60),
    "orange": (245, 150, 60),
    "yellow": (250, 220, 90),
    "green": (90, 175, 90),
    "blue": (80, 130, 220),
    "purple": (150, 95, 200),
    "pink": (245, 165, 200),
}
# How a picture is finished, whatever its style: a base that was told the two apart can be taught a look of its own.
FINISHES = ("flat colors", "outlined", "pastel", "dark", "gray")
HUES = {"teal": 180, "violet": 270, "lime": 90}  # colour turned by so many degrees
SIZES = {"small": 36, "medium": 56}  # pixels of 64
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# People, faces and hands differ by a nuance; letters, clocks, buttons and coloured shapes by a glyph or a hue that
# the one-colour style cannot show. None of them is a subject that 64 pixels tell apart in every style.
NOT_SUBJECTS = re.compile(
    r"(^|-)(man|men|woman|women|person|people|girl|boy|couple|family|kiss|baby|child|adult|older|santa|mrs|mx|prince"
    r"|princess|elf|genie|mage|fairy|vampire|zombie|merman|mermaid|merperson|superhero|supervillain|deaf|pregnant"
    r"|breast|hand|hands|fist|finger|fingers|thumbs|palm|palms|index|gesture|victory|salute|button|oclock|thirty"
    r"|arrow|keycap|square|circle|triangle|diamond|zodiac|cat-with|face-with|faces|heart|hearts|sign|symbol|input"
    r"|banknote|globe-showing|speaker|moon|mailbox|mark|cl|flag|bust|busts|guard|cop|detective|pilot|judge|cook"
    r"|worker|officer|farmer|artist|astronaut|singer|teacher|student|scientist|technologist|mechanic|firefighter"
    r"|ninja|bowing|angel|clasp|hug|wrestling|skier|snowboarder|selfie|footprints|japanese|yen|chart|latin|cross"
    r"|bearded|blond|pouting|kissing|grinning|smiling|crying|weary|frowning|winking|smirking|unamused|neutral"
    r"|expressionless|anguished|confounded|confused|disappointed|fearful|flushed|grimacing|hushed|lying|nauseated"
    r"|nerd|pensive|persevering|relieved|sad|sleeping|sleepy|sneezing|thinking|tired|upside|worried|zany|zipper"
    r"|astonished|angry|enraged|exploding|shushing|star-struck|partying|woozy|pleading|yawning|hot-face|cold-face"
    r"|drooling|rolling|money-mouth|beaming|squinting|downcast|anxious|dizzy-face|loudly)(-|$)"
    r"|aries|gemini|cancer|leo$|virgo|sagittarius|capricorn|pisces|^om$|^plus|^minus|^multiply|double-curly|circled"
    r"|speech-bubble|mobile-phone-|mobile-phones|room$|water-closet|claim|left-luggage|potable|departure|arrival|locked-with"
    r"|tilted-right|wheel-of|^metro|light-rail|tram$|tram-car|trolley|railway-car|minibus|monorail|suspension|outbox"
    r"|crossing|no-littering|no-entry|antenna-bars|vibration|zzz|eight-spoked|asterisk|green-book|blue-book|face-"
    r"|check-box|beer-mugs|musical-notes|linked-paper|airplane-|round-pushpin|bookmark-tabs|currency|hundred|seat$"
    r"|^(soon|top|end|back|on|copyright|registered|trade-mark|information|recycling|wavy|curly|part|hollow|heavy|white|black)-?"
    r"|evil-monkey|up-!|-face$(?<!cat-face)(?<!dog-face)(?<!wolf-face)(?<!tiger-face)(?<!horse-face)(?<!cow-face)"
    r"(?<!pig-face)(?<!mouse-face)(?<!rabbit-face)(?<!monkey-face)(?<!dragon-face)(?<!clown-face)"
)


@dataclass(frozen=True)
class Subject:
    """A thing with a name, and the icon that draws it in each style (None where a style lacks it)."""

    name: str
    icons: dict  # package -> icon name


def packages(folder: Path, names=tuple(VERSIONS)) -> dict[str, dict]:
    """Read icon sets from `folder`, fetching the ones that are missing with npm.

    Returns:
        package name -> {"icons", "aliases", "width", "height", "chars"}.

    Raises:
        RuntimeError: npm is missing or could not fetch a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for name in names:
        archive = folder / f"iconify-json-{name}-{VERSIONS[name]}.tgz"
        if not archive.exists():
            try:
                subprocess.run(
                    ["npm", "pack", "--silent", f"@iconify-json/{name}@{VERSIONS[name]}"],
                    cwd=folder, check=True, capture_output=True, text=True,
                )  # fmt: skip
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(
                    f"The icon set @iconify-json/{name} could not be fetched with npm ({error}).\n"
                    f"Install npm, or put {archive.name} into {folder}."
                ) from error
        with tarfile.open(archive) as tar:
            read = lambda file: json.load(tar.extractfile(f"package/{file}"))  # noqa: B023, E731
            sets[name] = {"aliases": {}, **read("icons.json"), "chars": read("chars.json")}
    return sets


def render(icons: dict, name: str, size: int) -> np.ndarray:
    """Draw one icon.

    Returns:
        RGBA, shape (size, size, 4), uint8, alpha not premultiplied.
    """
    import resvg_py

    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}" color="#1a1a1a">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size)))


def turn_hue(rgb: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate the hue of RGB values in [0, 255], shape (..., 3), keeping their brightness (YIQ rotation)."""
    turn = np.deg2rad(degrees)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    rotate = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    return np.clip(rgb @ (np.linalg.inv(to_yiq) @ rotate @ to_yiq).T, 0, 255)


def finish(icon: np.ndarray, word: str) -> np.ndarray:
    """Change how a rendered icon looks, one of FINISHES. RGBA, shape (h, w, 4), uint8, as it came."""
    picture = Image.fromarray(icon)
    rgb, alpha = icon[..., :3].astype(np.float64), picture.getchannel("A")
    if word == "flat colors":
        rgb[icon[..., 3] == 0] = rgb[icon[..., 3] > 0].mean(0)  # black there would bleed into the edges
        size = (icon.shape[1] * 3, icon.shape[0] * 3)  # quantised large, so that edges stay smooth
        large = Image.fromarray(rgb.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        few = large.quantize(6, kmeans=3, dither=Image.Dither.NONE).convert("RGB")
        rgb = np.asarray(few.resize(picture.size, Image.Resampling.BOX))
    elif word == "outlined":
        wider = alpha.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.MaxFilter(3))
        share = np.asarray(alpha)[..., None] / 255
        rgb, alpha = rgb * share + 25 * (1 - share), wider
    elif word == "pastel":
        rgb = 0.5 * rgb + 127
    elif word == "dark":
        rgb = 0.5 * rgb
    elif word == "gray":
        rgb = np.repeat(rgb @ [[0.299], [0.587], [0.114]], 3, -1)
    return np.dstack([rgb.round().astype(np.uint8), np.asarray(alpha)])


def compose(icon: np.ndarray, background=(255, 255, 255), hue=0, mirrored=False, place=(0, 0)) -> np.ndarray:
    """Put a rendered icon on a plain background of 64 x 64 pixels.

    Args:
        icon: RGBA, shape (h, w, 4), uint8, at most 64 pixels a side.
        hue: degrees by which the icon's colours are turned.
        place: direction from the centre, each of -1, 0, 1.

    Returns:
        RGB, shape (64, 64, 3), uint8.
    """
    icon = icon[:, ::-1] if mirrored else icon
    rgb, alpha = icon[..., :3].astype(np.float64), icon[..., 3:] / 255
    if hue:
        rgb = turn_hue(rgb, hue)
    canvas = np.full((SIZE, SIZE, 3), background, np.float64)
    free = SIZE - icon.shape[0]
    x, y = (round(free / 2 * (1 + 0.85 * d)) for d in place)
    patch = canvas[y : y + icon.shape[0], x : x + icon.shape[1]]
    patch[:] = rgb * alpha + patch * (1 - alpha)
    return canvas.round().astype(np.uint8)


def plain(icons: dict, name: str) -> np.ndarray:
    """The icon as captions without any modifier mean it: medium, centred, on white. RGB (64, 64, 3), uint8."""
    return compose(render(icons, name, SIZES["medium"]))


def caption(subject: str, style: str | None = None, *modifiers: str) -> str:
    """The words the base is taught: `noto style, red apple, blue background, mirrored, small, left`."""
    return ", ".join([f"{style} style"] * bool(style) + [subject] + [word for word in modifiers if word])


def allowed(code: str) -> bool:
    """Whether a code point sequence (hex, joined by dashes) is neither a skin-tone variant nor a flag."""
    parts = code.split("-")
    return not SKIN_TONES.intersection(parts) and not any("1f1e6" <= p <= "1f1ff" for p in parts)


def subjects(sets: dict, near: float = 0.05) -> list[Subject]:
    """The things the base knows by name: those that every style but Firefox OS draws, and that look different.

    Args:
        near: two subjects whose pictures differ by less in any full style (mean absolute difference of 64 x 64
            pixels in [0, 1]) count as one; the later is left out.
    """
    by_code = {
        package: {
            "-".join(part for part in code.split("-") if part != "fe0f"): name
            for code, name in sets[package]["chars"].items()
        }
        for package in ("noto", NEW_STYLE, "fluent-emoji-high-contrast")
    }
    classic = set(sets["noto-v1"]["icons"]) | set(sets["noto-v1"]["aliases"])
    firefox = set(sets["fxemoji"]["icons"])
    fluent = set(sets["fluent-emoji"]["icons"])
    chosen, seen = [], {}
    for code, noto in sorted(by_code["noto"].items()):
        flat = by_code[NEW_STYLE].get(code)
        ink = by_code["fluent-emoji-high-contrast"].get(code)
        if not (allowed(code) and flat in fluent and ink and noto in classic):
            continue
        if NOT_SUBJECTS.search(flat) or NOT_SUBJECTS.search(noto):
            continue
        icons = {
            "noto": noto,
            "noto-v1": noto,
            "fluent-emoji": flat,
            "fluent-emoji-high-contrast": ink,
            NEW_STYLE: flat,
        }
        for name in (noto, flat):
            if name.replace("-", "") in firefox:
                icons["fxemoji"] = name.replace("-", "")
        pictures = {p: plain(sets[p], n).astype(np.float32) / 255 for p, n in icons.items()}
        if any(
            np.abs(pictures[p] - other).mean() < near
            for p in ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-high-contrast")
            for other in seen.get(p, [])
        ):
            continue
        for p, picture in pictures.items():
            seen.setdefault(p, []).append(picture)
        chosen.append(Subject(flat.replace("-", " "), icons))
    return chosen
