"""Checks of captions: is the trigger rare and present, what does it absorb, which words are cut off.

The tokenizer is CLIP's, as in all bases. Its vocabulary is ordered by frequency in its training text: a low rank is a
common word. Limits that are a judgement are constants.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.dataset.captions import LITERAL, excerpt, markup, split_tags, trigger_pattern
from lorakit.dataset.folder import Dataset
from lorakit.dataset.report import Finding, Report, Severity

FAMILIES = ("sd15", "sd2", "sdxl")  # all of them use CLIP's vocabulary
KINDS = ("character", "style", "object", "clothing")
TOKENS = 75  # that a text encoder reads at once: 77 without its marks for beginning and end
LONGEST = 225  # that are read of a caption, in chunks
COMMON = 40_000  # a base knows words of lower rank well; the vocabulary ends at 49 408
SHORT = 4  # letters; a longer word with its own token is an ordinary word of any rank
DETAILED, MINIMAL = 4, 15  # words besides the trigger: fewer are too few for a character, more too many for a style
KNOWN = {  # triggers that already mean something to the bases
    "sks": "a Soviet rifle, which bases draw",
    "aks": "a rifle",
    "akm": "a rifle",
    "svd": "a sniper rifle",
    "uzi": "a submachine gun",
    "rpg": "a grenade launcher, and a kind of game",
}
EMPTY = {"a", "an", "the", "of", "in", "on", "at", "to", "by", "for", "from", "with", "and", "or", "is", "are", "it"}
EMPTY |= {"its", "this", "that", "his", "her", "their", "photo"}  # words that describe nothing
WORD = r"[^\W_]+(?:['-][^\W_]+)*"


def audit_captions(
    captions: Mapping[str, str] | Dataset, trigger: str = "", family: str = "sd15", kind: str = "character"
) -> Report:
    """Check the captions of a set.

    Args:
        captions: {name: caption}, or a dataset.
        trigger: the words that activate the LoRA.
        family: of the base, whose tokenizer counts.
        kind: of LoRA: one of KINDS.

    Returns:
        The report. Its figures are the number of captions, and "tags" and "words": how many captions have each, the
        most frequent first.

    Raises:
        ValueError: unknown family or kind.
    """
    if family not in FAMILIES or kind not in KINDS:
        raise ValueError(f"{family!r}, {kind!r}: families are {', '.join(FAMILIES)}; kinds are {', '.join(KINDS)}.")
    dataset = captions if isinstance(captions, Dataset) else None
    captions = dict(captions.captions if isinstance(captions, Dataset) else captions)
    trigger = " ".join(trigger.split())
    parts = {name: {tag.lower() for tag in split_tags(caption)} for name, caption in captions.items()}
    words = {name: set(re.findall(WORD, caption.lower())) - EMPTY for name, caption in captions.items()}
    findings = [
        *(check_trigger(trigger) if trigger else ()),
        *_placed(captions, trigger),
        *_too_long(captions),
        *(Finding("markup", "warning", f"Has {sign}, {LITERAL}", found) for sign, found in markup(captions).items()),
        *(_repeated(captions) if kind != "style" else ()),  # a style's captions may be nearly empty
        *_constant(captions, parts, words, trigger),
        *_detail(words, trigger, kind),
    ]
    figures: dict[str, Any] = {"captions": len(captions), "tags": _counted(parts), "words": _counted(words)}
    lines = [f"{len(captions)} caption{'s' * (len(captions) != 1)}, {len(findings)} findings"]
    for title in ("tags", "words"):
        frequent = ", ".join(f"{text} × {n}" for text, n in list(figures[title].items())[:12])
        lines.append(f"{title}: {frequent}{' …' * (len(figures[title]) > 12)}")
    return Report(tuple(lines), tuple(findings), figures, dataset)


# ── The trigger itself ──────────────────────────────────────────────────────────────────────────────────────────────


@cache
@storage.exclusive
def _tokenizer() -> Any:
    """CLIP's, which ships with lorakit."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(__file__).parents[1] / "families" / "tokenizer", local_files_only=True)


@cache
def _vocabulary() -> dict[str, int]:
    return _tokenizer().get_vocab()


def _places(text: str) -> list[tuple[int, int]]:
    """The first and last position of each token in a text, without marks for beginning and end."""
    split = _tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return split["offset_mapping"]


def _rank(word: str) -> int | None:
    """A word's place among CLIP's tokens, the most frequent first; None if it is not one token."""
    return _vocabulary().get(word.lower() + "</w>")


def ordinary(word: str) -> bool:
    """Whether the base knows a word: CLIP has a token for it that is common or long, or for both halves of it."""
    rank = _rank(word)
    if rank is not None:
        return rank < COMMON or len(word) > SHORT
    halves = [(word[:i], word[i:]) for i in range(3, len(word) - 2)]
    return any((_rank(a) or COMMON) < COMMON and (_rank(b) or COMMON) < COMMON for a, b in halves)


def check_trigger(trigger: str) -> list[Finding]:
    """Findings about a trigger: whether it is rare enough, and how the tokenizer splits it."""
    texts: list[tuple[Severity, str]] = []
    words = trigger.lower().split()
    tokens = [trigger[start:end] for start, end in _places(trigger)]
    read = f"{trigger!r} is read as {'·'.join(tokens)}, {len(tokens)} of {TOKENS} tokens"
    texts.append(("info", read + ": a shorter one leaves more for the rest" * (len(tokens) > 4)))
    for word in filter(KNOWN.__contains__, words):
        texts.append(("info", f"{word!r} is also {KNOWN[word]}: another rare word has no meaning yet."))
    if all(map(ordinary, words)):
        ranks = ", ".join(f"{word}: rank {_rank(word)}" if _rank(word) else f"{word}: two in one" for word in words)
        advice = "which the base already knows: add or use one that it does not know."
        message = f"{trigger!r} consists of ordinary words ({ranks}; of {len(_vocabulary())}), {advice}"
        texts.append(("warning", message))
    if re.search(r"[^\w\s]|_|\d", trigger):
        advice = "prompts must write it exactly so. Letters only are safer."
        texts.append(("info", f"{trigger!r} has signs or digits, at which the tokenizer splits it: {advice}"))
    if trigger != trigger.lower():
        texts.append(("info", f"Case does not matter: {trigger!r} and {trigger.lower()!r} are the same to the base."))
    return [Finding("trigger", severity, message) for severity, message in texts]


# ── The trigger in captions ─────────────────────────────────────────────────────────────────────────────────────────


def _placed(captions: Mapping[str, str], trigger: str) -> list[Finding]:
    """Empty captions, and those with the trigger missing, misspelled, part of a word, or repeated."""
    empty = tuple(name for name in captions if not captions[name])
    findings = [Finding("empty", "warning", "No caption: draft or write one.", empty)]
    if trigger:
        times = {name: len(trigger_pattern(trigger).findall(caption)) for name, caption in captions.items()}
        spelled = {name: near for name, caption in captions.items() if (near := _misspelled(caption, trigger))}
        inside = tuple(name for name in captions if not times[name] and trigger.lower() in captions[name].lower())
        other = {*spelled, *inside, *empty}
        without = tuple(name for name in captions if not times[name] and name not in other)
        twice = tuple(name for name in captions if times[name] > 1)
        absent, part = f"No {trigger!r}, so it learns nothing here.", f"{trigger!r} only as a part of another word."
        findings += [
            Finding("without_trigger", "warning" if any(times.values()) else "serious", absent, without),
            Finding("trigger_in_word", "warning", f"{part} It has other tokens there.", inside),
            Finding("trigger_twice", "info", f"{trigger!r} twice: once is enough.", twice),
        ]
        for name, near in spelled.items():
            advice = f"{near!r} is nearly {trigger!r}: correct it if that is meant."
            findings.append(Finding("trigger_misspelled", "warning", advice, (name,)))
    return [finding for finding in findings if finding.pictures]


def _misspelled(caption: str, trigger: str) -> str:
    """Words of a caption that are one typing error away from the trigger; "" if there are none."""
    words, count, trigger = re.findall(r"[^\s,.;:!?()\"]+", caption.lower()), len(trigger.split()), trigger.lower()
    for size in (count, count + 1, count - 1):
        for start in range(len(words) - size + 1) if size else ():
            near = " ".join(words[start : start + size])
            if one_off(near, trigger) and not (size == 1 and ordinary(near)):
                return near
    return ""


def one_off(a: str, b: str) -> bool:
    """Whether one letter added, removed or replaced, or two exchanged, turns one text into the other (Damerau 1964)."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    return a != b and (a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:]))


# ── The captions as a whole ─────────────────────────────────────────────────────────────────────────────────────────


def cut_off(caption: str) -> tuple[int, str]:
    """The number of tokens of a caption, and its end that is never read: "" if all of it can be."""
    places = _places(caption)
    return len(places), caption[places[LONGEST][0] :] if len(places) > LONGEST else ""


def _too_long(captions: Mapping[str, str]) -> list[Finding]:
    read = {name: cut_off(caption) for name, caption in captions.items()}
    long = tuple(name for name, (count, lost) in read.items() if count > TOKENS and not lost)
    message = f"More than {TOKENS} tokens, which is read in chunks of {TOKENS}; many other trainers cut it off there."
    return [Finding("long", "info", message, long)] * bool(long) + [
        Finding(
            "too_long", "warning", f"{count} tokens, of which {LONGEST} are read. Cut off: {excerpt(lost)!r}", (name,)
        )
        for name, (count, lost) in read.items()
        if lost
    ]


def _repeated(captions: Mapping[str, str]) -> list[Finding]:
    same = defaultdict(list)
    for name, caption in captions.items():
        same[" ".join(caption.lower().split())].append(name)
    return [
        Finding("repeated", "info", f"The same caption, {excerpt(text)!r}: say how the pictures differ.", tuple(names))
        for text, names in same.items()
        if text and len(names) > 1
    ]


def _constant(
    captions: Mapping[str, str], parts: Mapping[str, set[str]], words: Mapping[str, set[str]], trigger: str
) -> list[Finding]:
    """What is in every caption with the trigger, and what is in every caption."""
    trigger_words, findings = set(re.findall(WORD, trigger.lower())), []
    with_trigger = [name for name in captions if trigger and trigger_pattern(trigger).search(captions[name])]
    absorbed = _shared(with_trigger, parts, words, trigger_words)
    if absorbed:
        advice = "Right for its class. Leave out what belongs to it, and vary what does not."
        message = f"Always with {trigger!r}, which so absorbs it: {excerpt(', '.join(sorted(absorbed)))}. {advice}"
        findings.append(Finding("absorbed", "info", message))
    if rest := _shared([name for name in captions if captions[name]], parts, words, trigger_words) - absorbed:
        message = (
            f"In every caption: {excerpt(', '.join(sorted(rest)))}. Words that never vary distinguish no pictures."
        )
        findings.append(Finding("unvaried", "info", message))
    return findings


def _shared(
    names: Sequence[str], parts: Mapping[str, set[str]], words: Mapping[str, set[str]], trigger_words: set[str]
) -> set[str]:
    """Tags in all these captions, and words in all of them but in none of those tags; without the trigger's."""
    if len(names) < 2:
        return set()
    tags = set.intersection(*(parts[name] for name in names))
    tags = {tag for tag in tags if not trigger_words & set(re.findall(WORD, tag))}
    in_tags = {word for tag in tags for word in re.findall(WORD, tag)}
    return tags | (set.intersection(*(words[name] for name in names)) - in_tags - trigger_words)


def _detail(words: Mapping[str, set[str]], trigger: str, kind: str) -> list[Finding]:
    """The guide's advice: minimal captions for a style, detailed ones for all else."""
    trigger_words = set(re.findall(WORD, trigger.lower()))
    typical = statistics.median([len(own - trigger_words) for own in words.values() if own] or [DETAILED])
    message = f"The median caption has {typical:g} words besides the trigger. A LoRA of kind {kind} needs "
    if kind == "style" and typical > MINIMAL:
        return [Finding("detail", "info", message + "minimal ones: the style absorbs what they do not name.")]
    if kind != "style" and typical < DETAILED:
        return [Finding("detail", "info", message + "detail: name pose, clothing, background and lighting.")]
    return []


def _counted(by_name: Mapping[str, set[str]]) -> dict[str, int]:
    counts = Counter(text for texts in by_name.values() for text in texts)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
