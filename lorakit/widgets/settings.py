"""Settings of a run as fields with advice, and a prediction of the run before anything is downloaded."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin

import ipywidgets as widgets
import torch

from lorakit import config as configs
from lorakit import demo, named, presets, storage
from lorakit.config import Config
from lorakit.widgets.parts import button, line, note, on_change, reporting

BASES = (  # label, value of `Config.base`
    *((base.title, base.name) for base in named.NAMED.values()),
    ("embedded: small, for a CPU, to try things out", "demo"),
)
FIRST = (  # the fields that a first run needs; all others are folded away
    "name", "dataset", "trigger", "steps", "rank", "alpha", "learning_rate", "schedule", "batch_size", "resolution",
    "save_every", "sample_every", "sample_prompts", "validation_share",
)  # fmt: skip
GUIDE, USUAL = "", ":usual"  # presets that are not the user's own
STEPS = {"character": "3000–5000", "style": "2000–4000", "object": "2500–4000", "clothing": "3000–5000"}
RANKS = {
    "character": "32–64 for a character", "style": "16–32 for a style, 64–128 for a complex one",
    "object": "16–32 for an object", "clothing": "32–64 for clothing",
}  # fmt: skip
SIZES = {"sd15": "512 usually generalises better than 768", "sd2": "768 for SD 2.1", "sdxl": "1024 for SDXL"}
WIDE = "min(100%, 420px)"


def advice(name: str, kind: str, base: str) -> str:
    """Advice on a setting, for a kind of LoRA and a base: the training guide's, and what is usual for the base."""
    entry = named.find(base)
    family = entry.family if entry else ""
    of_guide = {
        "trigger": "a word unlikely in ordinary prompts; every caption should have it",
        "steps": f"{STEPS[kind]} for {kind} (the guide's)",
        "rank": "128–256 for SDXL" if family == "sdxl" else RANKS[kind],
        "alpha": "half of rank, or equal",
        "learning_rate": "1e-4; 5e-5 where colours shift",
        "schedule": "constant; cosine against overfitting; constant_with_warmup for unstable runs",
        "batch_size": "1 is most consistent, 2–4 faster",
        "resolution": SIZES.get(family, ""),
        "save_every": "500, and all are kept",
        "sample_prompts": "a prompt a line, some of them unlike the captions"
        + (f"; this base expects: {entry.prompt.format('…')}" if entry and entry.prompt != "{}" else ""),
        "validation_share": "0.1 holds out a tenth of the pictures: validation loss, overfit dial, best checkpoint",
    }.get(name, "")
    usual = entry.usual if entry else None
    of_others = f"{usual.source}: {usual.settings[name]}" if usual and name in usual.settings else ""
    return "; ".join(filter(None, (of_guide, of_others)))


def preset(kind: str, base: str, usual: bool = False) -> Config:
    """The settings to start from for a kind of LoRA on a base; arguments as for `Settings` and `presets.preset`.

    Raises:
        ValueError: no such kind.
    """
    base = _resolve(base)
    if base == "demo":
        return demo.config(kind=kind)
    if named.find(base):
        return presets.preset(kind, base, usual=usual)
    return presets.preset(kind).with_(base=base)


def _resolve(base: str) -> str:
    return ("sd15" if torch.cuda.is_available() else "demo") if base == "auto" else base


class Settings(widgets.VBox):
    """A panel of settings: a kind of LoRA and a base fill all fields with a preset, and each can be changed.

    Args:
        kind: character, style, object or clothing.
        base: a name of `named.NAMED`, "demo", a hub id, a file or folder; "auto" is SD 1.5 on an NVIDIA card, else the
            embedded base.
        store: file that keeps the settings, by the arguments of the panel. The same arguments restore them, so that a
            notebook that is run again resumes the same run.
        given: settings that replace the preset's.
    """

    def __init__(self, kind: str = "character", base: str = "auto", *, store: Path | None = None, **given: Any):
        base = _resolve(base)
        self.given, self.store = {name: value for name, value in given.items() if value not in ("", None)}, store
        self.arguments = json.loads(json.dumps({"kind": kind, "base": base, **self.given}))
        other = [] if base in [value for _, value in BASES] else [(base, base)]
        self.kind = widgets.Dropdown(options=["character", "style", "object", "clothing"], value=kind)
        self.base = widgets.Dropdown(options=[*BASES, *other], value=base, layout=widgets.Layout(width=WIDE))
        self.presets = widgets.Dropdown(layout=widgets.Layout(width=WIDE))
        self.preset_name = widgets.Text(placeholder="its name", layout=widgets.Layout(width="160px"))
        self.preset_message, self.filling = widgets.HTML(), False
        self.message, self.facts = widgets.HTML(), widgets.HTML()
        # Shared by all lines, which saves the page many models.
        self.flow = widgets.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="0 10px")
        self.columns = widgets.Layout(display="grid", grid_template_columns="130px minmax(0, 1fr)", grid_gap="0 10px")
        self.fields: dict[str, widgets.Widget] = {}
        self.hints: dict[str, widgets.HTML] = {}
        rest = [name for name in Config.model_fields if name not in ("base", "kind", *FIRST)]
        first, folded = ([self._line(name) for name in names] for names in (FIRST, rest))
        advanced = widgets.Accordion([widgets.VBox(folded)], selected_index=None)
        advanced.set_title(0, "Advanced")
        keep = [self.preset_name, button("Keep", self.keep), self.preset_message]
        super().__init__([
            self._labelled("kind", self.kind), self._labelled("base", self.base, self.facts),
            self._labelled("preset", self.presets), *first, advanced, self.message,
            self._labelled("keep as a preset", *keep),
        ])  # fmt: skip
        self._fill_usual()
        if store and store.exists():
            self._restore(store)
        on_change(self._fill_usual, self.kind, self.base)
        on_change(self._use_preset, self.presets)
        on_change(self._check, *self.fields.values())
        self._check()

    def _line(self, name: str) -> widgets.Box:
        self.fields[name], self.hints[name] = _field(name), widgets.HTML()
        return self._labelled(name, self.fields[name], self.hints[name])

    def _labelled(self, name: str, *fields: widgets.Widget) -> widgets.Box:
        label = widgets.HTML(line(name.replace("_", " "), "padding-top:6px"))
        return widgets.Box([label, widgets.Box(fields, layout=self.flow)], layout=self.columns)

    # ── Presets ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _fill_usual(self) -> None:
        """Fill every field with the guide's preset of the kind and the base."""
        if not self.filling:
            self._list_presets(GUIDE)
            self._fill(preset(self.kind.value, self.base.value).with_(**self.given))

    def _list_presets(self, chosen: str) -> None:
        entry = named.find(self.base.value)
        others = [(f"as {entry.usual.source} trains this base", USUAL)] if entry and entry.usual else []
        own = [(name, name) for name in presets.own_presets()]
        before, self.filling = self.filling, True
        self.presets.options = [("the training guide's settings", GUIDE), *others, *own]
        self.presets.value, self.filling = chosen, before

    def _use_preset(self) -> None:
        """Fill in the settings of a preset; for one of the user's own, all others stay."""
        if self.filling:
            return
        if self.presets.value in (GUIDE, USUAL):
            usual = self.presets.value == USUAL
            self._fill(preset(self.kind.value, self.base.value, usual).with_(**self.given))
            return
        with reporting(self.preset_message):
            settings = presets.kept(self.presets.value)
            config = configs.parse(self._settings() | settings)
            self.preset_message.value, self.filling = "", True  # the new kind and base do not ask for their preset
            try:
                self.kind.value = config.kind
                if "base" in settings:
                    self._set_base(config.base)
            finally:
                self.filling = False
            self._fill(config)

    def _set_base(self, base: str) -> None:
        base = entry.name if (entry := named.find(base)) else base
        if base not in [value for _, value in self.base.options]:
            self.base.options = [*self.base.options, (base, base)]
        self.base.value = base

    def keep(self) -> None:
        """Keep the settings as one of the user's own presets."""
        with reporting(self.preset_message):
            name = self.preset_name.value.strip()
            presets.save_preset(name, self.config)
            self._list_presets(name)
            self.preset_message.value = note(f"{name} is kept", "good")

    # ── Values ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fill(self, config: Config) -> None:
        entry = named.find(self.base.value)
        self.facts.value = line(_facts(entry) if entry else "", "opacity:.75;font-size:12px")
        for name, field in self.fields.items():
            field.value = _to_field(name, getattr(config, name))
            hint = advice(name, self.kind.value, self.base.value) or Config.model_fields[name].description or ""
            self.hints[name].value = line(hint, "opacity:.75;font-size:12px")

    def _restore(self, store: Path) -> None:
        """Fill in the settings that the file keeps for these arguments."""
        with suppress(ValueError, KeyError, TypeError):  # of another version: the preset stays
            for entry in _stored(store):
                if entry["begun"] == self.arguments:
                    config = configs.parse(entry["settings"])
                    self.kind.value, self.base.value = config.kind, entry["base"]
                    self._fill(config)

    @property
    def config(self) -> Config:
        """The settings in the fields; they are written into `store`.

        Raises:
            ValueError: names every wrong setting.
        """
        config = configs.parse(self._settings())
        if self.store:
            entry = {"begun": self.arguments, "base": self.base.value, "settings": config.model_dump(mode="json")}
            others = [old for old in _stored(self.store) if old.get("begun") != self.arguments]
            with storage.write_file(self.store) as partial:
                partial.write_text(json.dumps([*others, entry], indent=2) + "\n", "utf-8")
        return config

    def _settings(self) -> dict[str, Any]:
        values = {name: _from_field(name, field.value) for name, field in self.fields.items()}
        entry = named.find(self.base.value)
        return values | {"kind": self.kind.value, "base": entry.reference if entry else self.base.value}

    def _check(self) -> None:
        with reporting(self.message):
            configs.parse(self._settings())
            self.message.value = ""


def _facts(base: named.NamedBase) -> str:
    """What to know of a base before it is fetched."""
    size = f"{base.megabytes:,} MB to fetch; " if base.megabytes else ""
    return f"{size}licence: {base.licence or 'see its page'}; {base.sources[0]}"


def _stored(store: Path) -> list[dict[str, Any]]:
    """The entries of the file; none if it is missing or damaged."""
    try:
        return [entry for entry in json.loads(store.read_text("utf-8")) if isinstance(entry, dict)]
    except (OSError, ValueError, TypeError):
        return []


# ── Fields ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _optional(name: str) -> bool:
    return type(None) in get_args(Config.model_fields[name].annotation)


def _type(name: str) -> Any:
    """A setting's type: the values of a Literal as a tuple, else bool, int, float, str, dict or tuple."""
    annotation = Config.model_fields[name].annotation
    if _optional(name):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    values = get_args(annotation)
    if values and all(isinstance(value, str) for value in values):
        return values
    return get_origin(annotation) or annotation


def _field(name: str) -> widgets.Widget:
    kind = _type(name)
    layout = widgets.Layout(width=WIDE if kind is tuple or name in ("name", "dataset") else "160px")
    if isinstance(kind, tuple):
        return widgets.Dropdown(options=list(kind), layout=layout)
    if kind is bool:
        return widgets.Checkbox(indent=False, layout=layout)
    return widgets.Textarea(rows=3, layout=layout) if kind is tuple else widgets.Text(layout=layout)


def _to_field(name: str, value: Any) -> Any:
    """A setting as the value of its field; "" if it is not set."""
    kind = _type(name)
    if kind is tuple:
        return "\n".join(value)
    if kind is dict:
        return json.dumps(value) if value else ""
    if kind is bool or isinstance(kind, tuple):
        return value
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _from_field(name: str, value: Any) -> Any:
    """The value of a field as `Config` takes it; Config reports a text that cannot be read."""
    kind = _type(name)
    if kind is tuple:
        return tuple(text.strip() for text in value.splitlines() if text.strip())
    if kind is bool or isinstance(kind, tuple):
        return value
    value = value.strip()
    if not value and (kind is not str or _optional(name)):
        return {} if kind is dict else None
    if kind is dict:
        with suppress(ValueError):
            return json.loads(value)
    return value  # Config reads numbers
