"""Sort the tags of captions by kind, in the order in which a base was trained."""

import re
from collections.abc import Iterable, Mapping, Sequence

from lorakit.dataset.captions import spaced, split_tags

KINDS = {  # kind of tag → pattern of its tags, with spaces, in lower case; "character" and "series" also by context
    "quality": r"(masterpiece|(best|amazing|high|great|good|normal|average|bad|low|worst) (quality|score|aesthetic)"
    r"|very aesthetic|very awa|score \d( up)?)",
    "rating": r"(safe|sensitive|nsfw|explicit|questionable|rating[: ]\w+)",
    "people": r"(solo|\d\+?(girl|boy|other)s?|multiple (girls|boys|others)|no humans)",
    "artist": r"(artist:.*|by [\w .-]+)",
    "character": r"character:.*",
    "series": r"(series|copyright):.*",
    "special": r"(newest|recent|mid|early|old|year \d{4})",
    "other": r"(absurdres|highres|lowres|official art|commentary( request)?|english commentary|translation request"
    r"|bad id|bad \w+ id|\w+ (username|commentary)|signature|watermark|artist name|dated)",
    "general": r".*",
}


def kind_of(tag: str, series: Iterable[str] = ()) -> str:
    """The kind of a tag, one of KINDS.

    Args:
        series: names, in lower case with spaces, that the caption gives in brackets after a character.

    Source: the categories of Danbooru, and the tags that the model cards of NoobAI, Pony and Animagine list.
    """
    plain = spaced(tag.strip()).replace("\\", "").lower()
    if plain in series:
        return "series"
    for kind, pattern in KINDS.items():
        if kind != "general" and re.fullmatch(pattern, plain):
            return kind
    return "character" if _series_of(plain) else "general"


def order_tags(captions: Mapping[str, str], order: Sequence[str], trigger: str = "") -> dict[str, str]:
    """The captions with their tags sorted by kind; tags of one kind stay as they are.

    Kinds that the order lacks stand where "general" does, without it at the end. The trigger counts as a character.

    Args:
        order: kinds of tags, as in `NamedBase.tag_order`.

    Raises:
        ValueError: an unknown kind, or none.
    """
    if not order or (unknown := [kind for kind in order if kind not in KINDS]):
        raise ValueError(f"{', '.join(unknown) if order else 'nothing'} is no order of tags: use {', '.join(KINDS)}.")
    rest = order.index("general") if "general" in order else len(order)

    def ordered(caption: str) -> str:
        tags = split_tags(caption)
        series = {name for tag in tags if (name := _series_of(spaced(tag).replace("\\", "").lower()))}

        def place(tag: str) -> int:
            kind = "character" if trigger and tag.lower() == trigger.lower() else kind_of(tag, series)
            return order.index(kind) if kind in order else rest

        return ", ".join(sorted(tags, key=place))

    return {name: ordered(caption) for name, caption in captions.items()}


def _series_of(tag: str) -> str | None:
    """The series in a character's tag, "saber (fate)"; None for other tags, such as "horror (theme)"."""
    match = re.fullmatch(r".+ \(([^()]+)\)", tag)
    general = r"(theme|medium|style|cosplay|symbol|object|animal|weapon|food|color|pose|body part|\w+ pun|meme)"
    return match[1] if match and not re.fullmatch(general, match[1]) else None
