"""Settings of a run as fields to fill in, and what they will take, before anything is downloaded."""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, get_args, get_origin

import ipywidgets as widgets
import torch
from IPython.display import HTML

from lorakit import base as bases
from lorakit import config as configs
from lorakit import demo, plan, presets, run, storage
from lorakit.config import Config
from lorakit.device import choose_device, compute_dtype
from lorakit.widgets.parts import button, note
from lorakit.widgets.training import cards_html

BASES = (  # what it is called, and what `Config.base` is
    ("Stable Diffusion 1.5", "sd15"), ("Stable Diffusion 2.1", "sd21"), ("Stable Diffusion XL", "sdxl"),
    ("embedded: small, for a CPU, to try things out", "demo"),
)  # fmt: skip
FAMILY = {"sd15": "sd15", "sd21": "sd2", "sdxl": "sdxl"}
FIRST = (  # the fields that a first run needs; all others are folded away
    "name", "dataset", "trigger", "steps", "rank", "alpha", "learning_rate", "schedule", "batch_size", "resolution",
    "save_every", "sample_every", "sample_prompts", "validation_share",
)  # fmt: skip
USUAL = ""  # no preset of the user's own
STEPS = {"character": "3000–5000", "style": "2000–4000", "object": "2500–4000", "clothing": "3000–5000"}
RANKS = {
    "character": "32–64 for a character", "style": "16–32 for a style, 64–128 for a complex one",
    "object": "16–32 for an object", "clothing": "32–64 for clothing",
}  # fmt: skip
SIZES = {"sd15": "512 usually generalises better than 768", "sd2": "768 for SD 2.1", "sdxl": "1024 for SDXL"}
LINE = widgets.Layout(display="grid", grid_template_columns="130px minmax(0, 1fr)", grid_gap="0 10px")
FLOW = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="0 10px")


def advice(name: str, kind: str, family: str) -> str:
    """What the training guide says of a setting, for what is taught and on which family."""
    return {
        "trigger": "a word unlikely in ordinary prompts; every caption should have it",
        "steps": f"{STEPS[kind]} for {kind} (the guide's)",
        "rank": "128–256 for SDXL" if family == "sdxl" else RANKS[kind],
        "alpha": "half of rank, or equal",
        "learning_rate": "1e-4; 5e-5 where colours shift",
        "schedule": "constant; cosine against overfitting; constant_with_warmup for unstable runs",
        "batch_size": "1 is most consistent, 2–4 faster",
        "resolution": SIZES.get(family, ""),
        "save_every": "500, and all are kept",
        "sample_prompts": "a prompt a line, some of them unlike the captions",
        "validation_share": "0.1 keeps a tenth of the pictures back: validation loss, overfit dial, best checkpoint",
    }.get(name, "")


def preset(kind: str, base: str) -> Config:
    """The usual settings for what is taught on a base, which is named as for `Settings`.

    Raises:
        ValueError: no such kind.
    """
    base = _present(base)
    if base == "demo":
        return demo.config(kind=kind)
    return presets.preset(kind, FAMILY.get(base, "sd15")).with_(base=bases.KNOWN.get(base, base))


def _present(base: str) -> str:
    return ("sd15" if torch.cuda.is_available() else "demo") if base == "auto" else base


class Settings(widgets.VBox):
    """A panel of settings: what is taught × base fills all fields with a preset, each can be changed.

    Args:
        kind: character, style, object or clothing.
        base: sd15, sd21, sdxl, demo, a hub id, a file or folder; "auto" is SD 1.5 where there is an NVIDIA card, else
            the embedded base.
        store: file that keeps the settings as they are filled in, by what the panel was begun with. What is there of
            the same arguments is taken up, so that a notebook run again goes on with the same run.
        given: other settings, in place of the preset's.
    """

    def __init__(self, kind: str = "character", base: str = "auto", *, store: Path | None = None, **given: Any):
        base = _present(base)
        self.given, self.store = {name: value for name, value in given.items() if value not in ("", None)}, store
        self.begun = json.loads(json.dumps({"kind": kind, "base": base, **self.given}))
        known = [value for _, value in BASES]
        options = [*BASES, *([] if base in known else [(base, base)])]
        self.kind = widgets.Dropdown(options=["character", "style", "object", "clothing"], value=kind)
        self.base = widgets.Dropdown(options=options, value=base, layout=widgets.Layout(width="min(100%, 420px)"))
        self.own = widgets.Dropdown(layout=widgets.Layout(width="min(100%, 420px)"))
        self.called = widgets.Text(placeholder="its name", layout=widgets.Layout(width="160px"))
        self.kept, self.picking = widgets.HTML(), False
        self.told, self.fields, self.hints = widgets.HTML(), {}, {}
        named = [name for name in Config.model_fields if name not in ("base", "kind")]
        first = [self._line(name) for name in FIRST]
        rest = [self._line(name) for name in named if name not in FIRST]
        folded = widgets.Accordion([widgets.VBox(rest)], selected_index=None)
        folded.set_title(0, "Advanced")
        top = [
            _labelled("what is taught", self.kind), _labelled("base", self.base), _labelled("preset", self.own),
        ]  # fmt: skip
        keep = _labelled("keep as a preset", self.called, button("Keep", self.keep), self.kept)
        super().__init__([*top, *first, folded, self.told, keep])
        self._offer()
        self.preset()
        if store and store.exists():
            self._take_up()
        self.kind.observe(lambda _: self.preset(), "value")
        self.base.observe(lambda _: self.preset(), "value")
        self.own.observe(lambda _: self._pick(), "value")
        for field in self.fields.values():
            field.observe(lambda _: self._check(), "value")
        self._check()

    def _line(self, name: str) -> widgets.Box:
        self.fields[name], self.hints[name] = _field(name), widgets.HTML()
        return _labelled(name, self.fields[name], self.hints[name])

    # ── Values ────────────────────────────────────────────────────────────────────────────────────────────────────

    def preset(self) -> None:
        """Fill every field with what is usual for what is taught on the base."""
        if self.picking:
            return
        self.own.value = USUAL
        self._fill(preset(self.kind.value, self.base.value).with_(**self.given))

    def _offer(self) -> None:
        """The presets that there are, now; none of the user's own is picked."""
        self.own.options = [("the usual settings", USUAL), *((name, name) for name in presets.own_presets())]
        self.own.value = USUAL

    def _pick(self) -> None:
        """Fill in what one of the user's own presets keeps; all else stays as it is."""
        if self.picking:
            return
        if self.own.value == USUAL:
            self.preset()
            return
        try:
            kept = presets.kept(self.own.value)
            config = configs.parse(self._settings() | kept)
        except ValueError as error:
            self.kept.value = note(str(error), "bad")
            return
        self.picking = True  # what is set now asks for no preset of its own
        try:
            self.kind.value, self.kept.value = config.kind, ""
            if "base" in kept:
                short = {hub_id: name for name, hub_id in bases.KNOWN.items()}.get(config.base, config.base)
                if short not in [value for _, value in self.base.options]:
                    self.base.options = [*self.base.options, (short, short)]
                self.base.value = short
        finally:
            self.picking = False
        self._fill(config)

    def keep(self) -> None:
        """Keep the settings as a preset of the user's own."""
        try:
            name = self.called.value.strip()
            presets.save_preset(name, self.config)
        except (ValueError, OSError) as error:
            self.kept.value = note(str(error), "bad")
            return
        self.picking = True
        self._offer()
        self.own.value, self.picking = name, False
        self.kept.value = note(f"{name} is kept", "good")

    def _fill(self, config: Config) -> None:
        family = FAMILY.get(self.base.value, "")
        for name, field in self.fields.items():
            field.value = _shown(name, getattr(config, name))
            said = Config.model_fields[name].description or ""
            hint = advice(name, self.kind.value, family) or said
            self.hints[name].value = f'<div style="opacity:.75;line-height:1.3;font-size:12px">{escape(hint)}</div>'

    def _take_up(self) -> None:
        try:
            for kept in self._kept():
                if kept["begun"] == self.begun:
                    config = configs.parse(kept["settings"])
                    self.kind.value, self.base.value = config.kind, kept["base"]
                    self._fill(config)
        except (ValueError, KeyError, TypeError):  # of another version: the preset stands
            return

    def _kept(self) -> list[dict]:
        try:
            return list(json.loads(self.store.read_text("utf-8")))
        except (OSError, ValueError, TypeError):  # not there, or damaged
            return []

    @property
    def config(self) -> Config:
        """The settings as they are filled in; kept in `store`.

        Raises:
            ValueError: what is wrong with which of them.
        """
        made = configs.parse(self._settings())
        if self.store:
            own = {"begun": self.begun, "base": self.base.value, "settings": made.model_dump(mode="json")}
            others = [kept for kept in self._kept() if isinstance(kept, dict) and kept.get("begun") != self.begun]
            with storage.write_file(self.store) as partial:
                partial.write_text(json.dumps([*others, own], indent=2) + "\n", "utf-8")
        return made

    def _settings(self) -> dict[str, Any]:
        values = {name: _value(name, field.value) for name, field in self.fields.items()}
        return values | {"kind": self.kind.value, "base": bases.KNOWN.get(self.base.value, self.base.value)}

    def _check(self) -> None:
        try:
            configs.parse(self._settings())
            self.told.value = ""
        except ValueError as error:
            self.told.value = note(str(error), "bad")


def _optional(name: str) -> bool:
    return type(None) in get_args(Config.model_fields[name].annotation)


def _kind_of(name: str) -> Any:
    """The setting's type: Literal's values as a tuple, else bool, int, float, str, dict or tuple."""
    annotation = Config.model_fields[name].annotation
    if _optional(name):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    values = get_args(annotation)
    if values and all(isinstance(value, str) for value in values):
        return values
    return get_origin(annotation) or annotation


def _field(name: str) -> widgets.Widget:
    kind, width = _kind_of(name), widgets.Layout(width="160px")
    if isinstance(kind, tuple):
        return widgets.Dropdown(options=list(kind), layout=width)
    if kind is bool:
        return widgets.Checkbox(indent=False, layout=widgets.Layout(width="160px"))
    if kind is tuple:
        return widgets.Textarea(rows=3, layout=widgets.Layout(width="min(100%, 420px)"))
    wide = name in ("name", "dataset")
    return widgets.Text(layout=widgets.Layout(width="min(100%, 420px)") if wide else width)


def _shown(name: str, value: Any) -> Any:
    """A setting as its field shows it; what is not set is an empty text."""
    kind = _kind_of(name)
    if kind is tuple:
        return "\n".join(value)
    if kind is dict:
        return json.dumps(value) if value else ""
    if kind is bool or isinstance(kind, tuple):
        return value
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _value(name: str, shown: Any) -> Any:
    """What a field shows as `Config` takes it; what cannot be read stays a text, of which Config tells."""
    kind = _kind_of(name)
    if kind is tuple:
        return tuple(line.strip() for line in shown.splitlines() if line.strip())
    if kind is bool or isinstance(kind, tuple):
        return shown
    shown = shown.strip()
    if not shown and (kind is not str or _optional(name)):
        return {} if kind is dict else None
    readers: dict[Any, Callable] = {int: int, float: float, dict: json.loads}
    try:
        return readers.get(kind, str)(shown)
    except ValueError:
        return shown


def _labelled(name: str, *things: widgets.Widget) -> widgets.Box:
    label = widgets.HTML(f'<div style="line-height:1.3;padding-top:6px">{escape(name.replace("_", " "))}</div>')
    return widgets.Box([label, widgets.Box(things, layout=FLOW)], layout=LINE)


def planned(config: Config) -> HTML:
    """What a run will take, predicted: memory against this card, minutes, steps, file size. Nothing is downloaded.

    Raises:
        ValueError, FileNotFoundError: settings that do not suit the base, no usable pictures, no such base.
    """
    known = config.base in (*bases.KNOWN, *bases.KNOWN.values())
    base = bases.known(config.base) if known else bases.open(config.base, config.prediction_type)
    here, pictures = plan.this_machine(), run.scan_dataset(config)
    steps = config.steps or config.total_steps(-(-pictures.epoch_size // config.batch_size))
    if here:
        (row,) = [row for row in plan.plan_for_cards(base, config) if row.card.name == here.name]
        chosen, free, where, minutes = row.plan, int(here.memory * 2**30), here.name, row.minutes
    else:
        device = choose_device(config.device)
        free, where, minutes = plan.free_memory_bytes(device), "this computer", None
        dtype = compute_dtype(config.mixed_precision, device)
        chosen = plan.choose_settings(
            base, config, free, dtype=dtype, device=device.type, store=plan.prediction_store()
        )
    prediction = chosen.prediction
    cards = [
        ("memory, predicted", plan.readable_bytes(prediction.peak)),
        (f"free on {where}", plan.readable_bytes(free or 0)),
        ("steps", f"{steps} = {steps * config.batch_size / pictures.epoch_size:.3g} epochs"),
        ("time, estimated", f"about {minutes:.0f} min" if minutes else "not known here"),
        ("LoRA file", f"{prediction.file_size / 1e6:.1f} MB"), ("pictures", f"{len(pictures)}"),
    ]  # fmt: skip
    told = [note(f"{base.name} · {chosen.describe()}", {True: "good", False: "bad", None: "warning"}[chosen.fits])]
    for change in chosen.changes:
        told.append(note(f"chosen because memory is short: {change}", "warning"))
    if not here and config.base != "demo":
        told.append(note("There is no NVIDIA card here: such a base would take days on a CPU.", "bad"))
    auto = {"device": choose_device(config.device).type}
    auto["precision"] = str(compute_dtype(config.mixed_precision, choose_device(config.device)))[6:]
    told.append(note("chosen by itself: " + ", ".join(f"{name} {value}" for name, value in auto.items())))
    return HTML(told[0] + cards_html(cards) + "".join(told[1:]))
