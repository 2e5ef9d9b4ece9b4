"""Prompts as people write them for A1111 and ComfyUI: words that count more or less, and more than 75 tokens.

The weights are worked into the embeddings by compel, which is optional: without it they are left out, and told.
"""

import re
from collections.abc import Callable
from importlib import util
from types import SimpleNamespace

import torch
from torch import Tensor

from lorakit.base import model
from lorakit.device import autocast

Fragment = tuple[str, float]  # some words, and what they count
ONCE = 1.1  # what a pair of round brackets counts; square ones, its inverse
_PARTS = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\)|\]|[^\\()\[\]:]+|.", re.DOTALL)


def parse(prompt: str) -> list[Fragment]:
    """The words of a prompt with what they count: (words:1.2), (words) 1.1, [words] 1/1.1, nested ones multiplied.

    A backslash before a bracket makes it a letter. Brackets that nobody closes count to the end; one that nobody
    opened is a letter.

    Source: the grammar of A1111's stable-diffusion-webui; ComfyUI's is the part of it with round brackets.
    """
    found: list[Fragment] = []
    opened: list[tuple[str, int]] = []  # which bracket, and the first fragment inside

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        start = opened.pop()[1]
        found[start:] = [(words, weight * factor) for words, weight in found[start:]]
        return True

    for part in _PARTS.findall(prompt):
        if part in ("(", "["):
            opened.append((part, len(found)))
        elif not (
            (part == ")" and close("(", ONCE))
            or (part == "]" and close("[", 1 / ONCE))
            or (part[0] == ":" and part[-1] == ")" and close("(", float(part[1:-1])))
        ):
            found.append((part[1:] if part[0] == "\\" and len(part) > 1 else part, 1.0))
    while opened:
        bracket = opened[-1][0]
        close(bracket, ONCE if bracket == "(" else 1 / ONCE)
    return _joined(found)


def _joined(found: list[Fragment]) -> list[Fragment]:
    """Neighbours that count the same as one."""
    joined: list[Fragment] = []
    for words, weight in found:
        if joined and abs(joined[-1][1] - weight) < 1e-6:
            joined[-1] = (joined[-1][0] + words, weight)
        else:
            joined.append((words, weight))
    return joined or [("", 1.0)]


def words(prompt: str) -> str:
    """The prompt without its weights."""
    return "".join(text for text, _ in parse(prompt))


def escape(text: str) -> str:
    """A caption as a prompt that says the same: its brackets are letters."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def special(prompt: str, base: model.Base) -> tuple[Fragment, ...]:
    """The prompt's fragments where it has weights, or may be longer than the base's encoders take; () where not."""
    fragments = tuple(parse(prompt))
    letters = min(base.configs[which].get("max_position_embeddings", 77) for which in base.text_encoders) - 2
    # A token has a byte at least: what is no longer than that in bytes fits.
    (first, weight), *more = fragments
    return fragments if more or weight != 1 or len(first.encode()) > letters else ()


def can_weigh() -> bool:
    """Whether compel is installed."""
    return util.find_spec("compel") is not None


def encode(
    base: model.Base, encoder, tokenizer, fragments: tuple[Fragment, ...], clip_skip: int = 1,
    say: Callable[[str], None] = print,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One text encoder's embeddings of weighted words, in as many stretches of the encoder's length as they need.

    Args:
        say: told where compel is missing: weights then count nothing, and what is too long is cut off.

    Returns:
        Embeddings (stretches × length, width); the pooled one (width,), of the first stretch and without weights, as
        A1111 and ComfyUI have it; that stretch's tokens (length,).

    Source: compel, https://github.com/damian0815/compel (weights above 1 away from the empty prompt, below 1 towards
        the prompt without the words).
    """
    plain = "".join(text for text, _ in fragments)
    tokens = model.tokenize(tokenizer, [plain])
    with autocast(encoder.device, encoder.dtype):
        embeddings, pooled = model.encode(encoder, tokens.to(encoder.device), base.family, clip_skip)
    length = len(tokenizer(plain, truncation=False, verbose=False).input_ids)
    if length <= tokens.shape[1] and all(weight == 1 for _, weight in fragments):
        return embeddings[0], pooled[0], tokens[0]
    if not can_weigh():
        say(
            f"prompt    {plain[:40]!r}: weights count nothing and more than {tokens.shape[1] - 2} tokens are cut off "
            'without compel: pip install "lorakit[prompts]"'
        )
        return embeddings[0], pooled[0], tokens[0]
    from compel import EmbeddingsProvider, SplitLongTextMode

    def answer(ids, mask=None, **_) -> SimpleNamespace:
        """What compel asks of a text encoder, by the family's rules and with any clip skip."""
        with autocast(encoder.device, encoder.dtype):
            found = model.encode(encoder, ids, base.family, clip_skip, mask)[0]
        return SimpleNamespace(last_hidden_state=found.float())

    provider = EmbeddingsProvider(
        tokenizer, _Asking(answer, encoder.device), truncate=False, split_long_text_mode=SplitLongTextMode.PHRASES
    )
    texts, weights = zip(*fragments, strict=True)
    found = provider.get_embeddings_for_weighted_prompt_fragments([list(texts)], [list(weights)], device=encoder.device)
    return found[0].to(embeddings.dtype), pooled[0], tokens[0]


class _Asking:
    """A function in the place of a text encoder."""

    def __init__(self, answer: Callable, device: torch.device):
        self.answer, self.device, self.dtype = answer, device, torch.float32

    def __call__(self, *args, **kwargs):
        return self.answer(*args, **kwargs)
