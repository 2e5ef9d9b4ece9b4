"""What captions will teach: the trigger, what it takes in, what the text encoder never sees.

The tokenizer is the bases' own, CLIP's, whose vocabulary is in the order its training text used words: a low rank is a
common word. Where a number here is a judgement, it stands in a constant.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from lorakit.dataset import captions as captions_module

FAMILIES = ("sd15", "sd2", "sdxl")  # all of them read CLIP's vocabulary
SEVERITIES = ("serious", "warning", "info")
KINDS = ("character", "style", "object", "clothing")
TOKENS = 75  # that a text encoder reads, of the 77 less its marks for beginning and end
COMMON = 40_000  # a word of lower rank is one the base knows well; the vocabulary ends at 49 408
SHORT = 4  # letters; a longer word with a token of its own is a word, however rare
DETAILED, MINIMAL = 4, 15  # words beside the trigger: fewer are poor for a character, more are much for a style
KNOWN = {  # triggers that bases already draw something for
    "sks": "a Soviet rifle, which bases draw",
    "aks": "a rifle",
    "akm": "a rifle",
    "svd": "a sniper rifle",
    "uzi": "a submachine gun",
    "rpg": "a grenade launcher, and a kind of game",
}
EMPTY = {"a", "an", "the", "of", "in", "on", "at", "to", "by", "for", "from", "with", "and", "or", "is", "are", "it"}
EMPTY |= {"its", "this", "that", "his", "her", "their", "photo"}  # words that say nothing of a picture
WORD = r"[^\W_]+(?:['-][^\W_]+)*"


@dataclass(frozen=True)
class Finding:
    kind: str  # "trigger", "without_trigger", "too_long", …
    severity: str  # one of SEVERITIES
    message: str
    names: tuple[str, ...] = ()  # of the pictures it is about; () for all of them, or none


@dataclass(frozen=True)
class Audit:
    captions: int
    findings: tuple[Finding, ...]
    tags: dict[str, int]  # part between commas → captions that have it, the most frequent first
    words: dict[str, int]

    def facts(self) -> dict:
        """For JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The findings, the gravest first and at most 5 of a kind, and the most frequent tags and words."""
        lines = [f"{self.captions} caption{'s' * (self.captions != 1)}, {len(self.findings)} findings"]
        times = Counter()
        for finding in sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity)):
            times[finding.kind] += 1
            if times[finding.kind] <= 5:
                lines.append(f"{finding.severity:<8} {finding.message}{_named(finding.names)}")
        lines += [f"{'':<8} {n - 5} more of kind {kind}" for kind, n in times.items() if n > 5]
        for title, counts in (("tags", self.tags), ("words", self.words)):
            shown = ", ".join(f"{text} × {n}" for text, n in list(counts.items())[:12])
            lines.append(f"{title:<8} {shown}{' …' * (len(counts) > 12)}")
        return "\n".join(lines)


def audit_captions(captions, trigger: str = "", family: str = "sd15", kind: str = "character") -> Audit:
    """Check the captions of a set.

    Args:
        captions: {name: caption}, or a `dataset.Dataset`.
        trigger: the words that will call the LoRA up.
        family: of the base: its tokenizer counts.
        kind: what is taught: one of KINDS.

    Raises:
        ValueError: unknown family or kind.
    """
    if family not in FAMILIES or kind not in KINDS:
        raise ValueError(f"{family!r}, {kind!r}: families are {', '.join(FAMILIES)}; kinds are {', '.join(KINDS)}.")
    captions = dict(captions) if isinstance(captions, Mapping) else captions_module.captions_of(captions)
    trigger = " ".join(trigger.split())
    parts = {name: {tag.lower() for tag in captions_module.tags(caption)} for name, caption in captions.items()}
    words = {name: set(re.findall(WORD, caption.lower())) - EMPTY for name, caption in captions.items()}
    findings = [
        *(of_trigger(trigger) if trigger else ()),
        *_placed(captions, trigger),
        *_too_long(captions),
        *(_repeated(captions) if kind != "style" else ()),  # a style's may say next to nothing
        *_constant(captions, parts, words, trigger),
        *_detail(words, trigger, kind),
    ]
    return Audit(len(captions), tuple(findings), _counted(parts), _counted(words))


# ── The trigger by itself ───────────────────────────────────────────────────────────────────────────────────────────


@cache
def _tokenizer():
    """CLIP's, as it ships with lorakit."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(__file__).parents[1] / "families" / "tokenizer", local_files_only=True)


@cache
def _vocabulary() -> dict[str, int]:
    return _tokenizer().get_vocab()


def _places(text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends in it, without marks for beginning and end."""
    split = _tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return split["offset_mapping"]


def _rank(word: str) -> int | None:
    """A word's place among CLIP's tokens, the most frequent first; None if it has no token of its own."""
    return _vocabulary().get(word.lower() + "</w>")


def ordinary(word: str) -> bool:
    """Whether the base knows a word: CLIP has it among its common ones, or both halves of it."""
    rank = _rank(word)
    if rank is not None:
        return rank < COMMON or len(word) > SHORT
    halves = [(word[:i], word[i:]) for i in range(3, len(word) - 2)]
    return any((_rank(a) or COMMON) < COMMON and (_rank(b) or COMMON) < COMMON for a, b in halves)


def of_trigger(trigger: str) -> list[Finding]:
    """Whether a trigger is rare enough, and how the tokenizer reads it."""
    found, words = [], trigger.lower().split()
    split = [trigger[start:end] for start, end in _places(trigger)]
    read = f"{trigger!r} is read as {'·'.join(split)}, {len(split)} of {TOKENS} tokens"
    found.append(("info", read + ": a shorter one leaves more for the rest" * (len(split) > 4)))
    for word in words:
        if word in KNOWN:
            found.append(("info", f"{word!r} is also {KNOWN[word]}: with another rare word nothing is in the way."))
    if all(map(ordinary, words)):
        ranks = ", ".join(f"{word}: rank {_rank(word)}" if _rank(word) else f"{word}: two in one" for word in words)
        advice = "which the base draws already: add or take one that it does not know."
        found.append(("warning", f"{trigger!r} is made of ordinary words ({ranks}; of {len(_vocabulary())}), {advice}"))
    if re.search(r"[^\w\s]|_|\d", trigger):
        advice = "prompts must write it just so. Letters alone are safer."
        found.append(("info", f"{trigger!r} has signs or digits, at which the tokenizer splits it: {advice}"))
    if trigger != trigger.lower():
        found.append(("info", f"Capitals do not count: {trigger!r} and {trigger.lower()!r} are the same to the base."))
    return [Finding("trigger", severity, message) for severity, message in found]


# ── The trigger in captions ─────────────────────────────────────────────────────────────────────────────────────────


def _placed(captions: Mapping[str, str], trigger: str) -> list[Finding]:
    """Empty captions; those where the trigger is missing, misspelled, part of a word, or there twice."""
    empty = [name for name in captions if not captions[name]]
    found = [Finding("empty", "warning", "No caption: draft or write one.", tuple(empty))]
    if trigger:
        times = {
            name: len(captions_module.trigger_pattern(trigger).findall(caption)) for name, caption in captions.items()
        }
        spelled = {name: near for name, caption in captions.items() if (near := _misspelled(caption, trigger))}
        inside = [name for name in captions if not times[name] and trigger.lower() in captions[name].lower()]
        without = [name for name in captions if captions[name] and not times[name] and name not in {*spelled, *inside}]
        twice = [name for name in captions if times[name] > 1]
        lacks, part = f"No {trigger!r}, so nothing is learned for it.", f"{trigger!r} only as a part of another word."
        grave = "warning" if any(times.values()) else "serious"
        found += [
            Finding("without_trigger", grave, lacks, tuple(without)),
            Finding("trigger_in_word", "warning", f"{part} It has other tokens there.", tuple(inside)),
            Finding("trigger_twice", "info", f"{trigger!r} twice: once is enough.", tuple(twice)),
        ]
        for name, near in spelled.items():
            wrong = f"{near!r} is nearly {trigger!r}: correct it if that is meant."
            found.append(Finding("trigger_misspelled", "warning", wrong, (name,)))
    return [finding for finding in found if finding.names]


def _misspelled(caption: str, trigger: str) -> str:
    """Words of a caption that are one slip of the hand away from the trigger; "" if there are none."""
    words, count, trigger = re.findall(r"[^\s,.;:!?()\"]+", caption.lower()), len(trigger.split()), trigger.lower()
    for size in (count, count + 1, count - 1):
        for start in range(len(words) - size + 1) if size else ():
            near = " ".join(words[start : start + size])
            if one_off(near, trigger) and not (size == 1 and ordinary(near)):
                return near
    return ""


def one_off(a: str, b: str) -> bool:
    """Whether one letter more, less or other, or two exchanged, make one text of the other (Damerau 1964)."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    return a != b and (a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:]))


# ── What is read, and what it teaches ───────────────────────────────────────────────────────────────────────────────


def cut_off(caption: str) -> tuple[int, str]:
    """The tokens of a caption, and the end of it that text encoders never see: "" if they see all."""
    places = _places(caption)
    return len(places), caption[places[TOKENS][0] :] if len(places) > TOKENS else ""


def _too_long(captions: Mapping[str, str]) -> list[Finding]:
    read = {name: cut_off(caption) for name, caption in captions.items()}
    return [
        Finding("too_long", "warning", f"{count} tokens, of which {TOKENS} are read. Cut off: {lost!r}", (name,))
        for name, (count, lost) in read.items()
        if lost
    ]


def _repeated(captions: Mapping[str, str]) -> list[Finding]:
    same = defaultdict(list)
    for name, caption in captions.items():
        same[" ".join(caption.lower().split())].append(name)
    return [
        Finding("repeated", "info", f"The same caption, {text!r}: say how the pictures differ.", tuple(names))
        for text, names in same.items()
        if text and len(names) > 1
    ]


def _constant(
    captions: Mapping[str, str], parts: Mapping[str, set[str]], words: Mapping[str, set[str]], trigger: str
) -> list[Finding]:
    """What always comes with the trigger, and what is the same in all captions."""
    own, found = set(re.findall(WORD, trigger.lower())), []
    with_trigger = [
        name for name in captions if trigger and captions_module.trigger_pattern(trigger).search(captions[name])
    ]
    told = _shared(with_trigger, parts, words, own)
    if told:
        advice = "Right for what it is one of. What belongs to it can be left out; what does not must vary."
        always = f"Always with {trigger!r}, which so absorbs it: {', '.join(sorted(told))}. {advice}"
        found.append(Finding("absorbed", "info", always))
    if rest := _shared([name for name in captions if captions[name]], parts, words, own) - told:
        same = f"In every caption: {', '.join(sorted(rest))}. What never varies tells no picture from another."
        found.append(Finding("unvaried", "info", same))
    return found


def _shared(
    names: Sequence[str], parts: Mapping[str, set[str]], words: Mapping[str, set[str]], own: set[str]
) -> set[str]:
    """Tags that all these captions have, and words that all have and none of those tags holds."""
    if len(names) < 2:
        return set()
    tags = {tag for tag in set.intersection(*(parts[name] for name in names)) if not own & set(re.findall(WORD, tag))}
    said = {word for tag in tags for word in re.findall(WORD, tag)}
    return tags | (set.intersection(*(words[name] for name in names)) - said - own)


def _detail(words: Mapping[str, set[str]], trigger: str, kind: str) -> list[Finding]:
    """The guide's advice: minimal captions for a style, detailed ones for all else."""
    own = set(re.findall(WORD, trigger.lower()))
    typical = statistics.median([len(said - own) for said in words.values() if said] or [DETAILED])
    message = f"The median caption has {typical:g} words beside the trigger. A LoRA of kind {kind} wants "
    if kind == "style" and typical > MINIMAL:
        return [Finding("detail", "info", message + "minimal ones: what is not named is taken for the style.")]
    if kind != "style" and typical < DETAILED:
        return [Finding("detail", "info", message + "detail: name pose, clothing, background and lighting.")]
    return []


def _counted(held: Mapping[str, set[str]]) -> dict[str, int]:
    counts = Counter(text for texts in held.values() for text in texts)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" ({', '.join(names[:5])}{more})" if names else ""
