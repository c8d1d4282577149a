"""Turns tokens into text as they come, whole characters only, and finds stop strings in it.

A character may need several tokens (emoji, Chinese), and a token's text may hang on the one before it (spaces): each
piece is the difference between two decodings that begin a little earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "�"  # what decoding gives for the bytes of half a character
_CONTEXT = 6  # prompt tokens that the first piece is decoded with
_OF_CHARACTER = 4  # tokens of a character at most, a byte each


class Detokenizer:
    """Text of one sequence. inner: a `tokenizers` tokenizer. prompt: the tokens before, which give no text themselves."""

    def __init__(self, inner: Any, prompt: Sequence[int] = ()) -> None:
        self._inner = inner
        self._ids = list(prompt[-_CONTEXT - _OF_CHARACTER :])
        self._prompt = len(self._ids)
        self._start, self._read = self._whole_characters()

    def _whole_characters(self) -> tuple[int, int]:
        """From where to where the end of the prompt is whole characters; the answer may go on with half of one."""
        end = self._prompt
        first = max(0, end - _CONTEXT)
        starts = range(first, max(-1, first - _OF_CHARACTER), -1)
        places = [(start, read) for start in starts for read in range(end, max(start - 1, end - _OF_CHARACTER), -1)]
        texts = [self._decode(self._ids[start:read]) for start, read in places]
        whole = (place for place, text in zip(places, texts, strict=True) if _INCOMPLETE not in text)
        ended = (place for place, text in zip(places, texts, strict=True) if not text.endswith(_INCOMPLETE))
        return next(whole, None) or next(ended, (first, end))  # the latter with bytes that are no characters before

    def push(self, token: int) -> str:
        """The text that one more token completes; may be empty."""
        self._ids.append(token)
        whole = self._decode(self._ids[self._start :])
        if whole.endswith(_INCOMPLETE):
            return ""
        known = self._known(whole)
        if len(whole) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def flush(self) -> str:
        """What is left at the end, without half a character."""
        whole = self._decode(self._ids[self._start :])
        known = self._known(whole)
        self._start = self._read = len(self._ids)
        return whole[len(known) :].rstrip(_INCOMPLETE)

    def _known(self, whole: str) -> str:
        """What of a text was there before, or is the prompt's."""
        if self._read < self._prompt and whole.startswith(self._decode(self._ids[self._start : self._prompt])):
            self._read = self._prompt  # what seemed half a character is the prompt's own
        return self._decode(self._ids[self._start : self._read])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._inner.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Lets text through until one of `stops` comes, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that can be shown now. After a stop string, nothing."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if hits:
            position, self.found = min(hits)
            shown, self._held = self._held[:position], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string came."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
