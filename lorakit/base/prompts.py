"""Prompts in the notation of A1111 and ComfyUI: weighted words, and more than 75 tokens.

compel applies the weights to the embeddings. It is optional: without it a message says that weights are ignored.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorakit.base import model
from lorakit.device import autocast

Fragment = tuple[str, float]  # some words and their weight
ROUND = 1.1  # the weight of a pair of round brackets; of square ones, its inverse
_PARTS = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\)|\]|[^\\()\[\]:]+|.", re.DOTALL)


def parse(prompt: str) -> list[Fragment]:
    """The words of a prompt with their weights: (words:1.2), (words) 1.1, [words] 1/1.1, nested ones multiplied.

    A bracket after a backslash is text. A bracket that is never closed extends to the end; a closing bracket that was
    never opened is text.

    Source: the grammar of A1111's stable-diffusion-webui; ComfyUI uses the part of it with round brackets.
    """
    fragments: list[Fragment] = []
    opened: list[tuple[str, int]] = []  # each open bracket, and the first fragment inside

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        start = opened.pop()[1]
        fragments[start:] = [(words, weight * factor) for words, weight in fragments[start:]]
        return True

    for part in _PARTS.findall(prompt):
        if part in ("(", "["):
            opened.append((part, len(fragments)))
        elif not (
            (part == ")" and close("(", ROUND))
            or (part == "]" and close("[", 1 / ROUND))
            or (part[0] == ":" and part[-1] == ")" and close("(", float(part[1:-1])))
        ):
            fragments.append((part[1:] if part[0] == "\\" and len(part) > 1 else part, 1.0))
    while opened:
        bracket = opened[-1][0]
        close(bracket, ROUND if bracket == "(" else 1 / ROUND)
    joined: list[Fragment] = []  # neighbours of the same weight as one
    for words, weight in fragments:
        if joined and abs(joined[-1][1] - weight) < 1e-6:
            joined[-1] = (joined[-1][0] + words, weight)
        else:
            joined.append((words, weight))
    return joined or [("", 1.0)]


def without_weights(prompt: str) -> str:
    """The words of a prompt."""
    return "".join(words for words, _ in parse(prompt))


def escape(text: str) -> str:
    """The prompt whose words are this text, brackets included."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def weighted_fragments(prompt: str) -> tuple[Fragment, ...]:
    """The fragments of a prompt that has weights; else ()."""
    fragments = tuple(parse(prompt))
    return fragments if any(weight != 1 for _, weight in fragments) else ()


def can_weigh() -> bool:
    """Whether compel is installed."""
    return util.find_spec("compel") is not None


def encode_fragments(
    base: model.Base, encoder: Any, tokenizer: Any, fragments: tuple[Fragment, ...], clip_skip: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One text encoder's embeddings of weighted words, in as many chunks of the encoder's length as they need.

    compel must be installed.

    Returns:
        Embeddings, shape (chunks × length, width); the pooled embedding (width,) and the tokens (length,) of the first
        chunk without weights, as in A1111 and ComfyUI.

    Source: compel, https://github.com/damian0815/compel (weights above 1 move away from the empty prompt, weights
    below 1 towards the prompt without the words).
    """

    from compel import EmbeddingsProvider, SplitLongTextMode

    def encode(tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with autocast(encoder.device, encoder.dtype):
            return model.encode(encoder, tokens, base.family, clip_skip, mask)

    text = "".join(words for words, _ in fragments)
    tokens = model.tokenize(tokenizer, [text])
    embeddings, pooled = encode(tokens.to(encoder.device))
    provider = EmbeddingsProvider(
        tokenizer, _CompelEncoder(encode, encoder.device), truncate=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )  # fmt: skip
    texts, weights = map(list, zip(*fragments, strict=True))
    weighted = provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights], device=encoder.device)
    return weighted[0].to(embeddings.dtype), pooled[0], tokens[0]


@dataclass
class _CompelEncoder:
    """A text encoder as compel calls it, with the family's rules and any clip skip."""

    encode: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    device: torch.device
    dtype: torch.dtype = torch.float32

    def __call__(self, tokens: Tensor, mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.encode(tokens, mask)[0].float())
