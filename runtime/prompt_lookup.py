"""Guesses the next tokens of a text from an earlier place where the same tokens stood (prompt lookup decoding).

A model reads several guessed tokens in one step and answers after each of them; those that it would have chosen itself are kept.
So the text is the one without guesses, but for what quantized kernels round otherwise over several tokens than over one. It pays
where answers repeat what was said before: code, quotations, extraction. Source of the method:
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_GUESS = 16
_MATCHES = (4, 3, 2)  # how many tokens have to be the same; the most first
_JUDGED = 32  # guessed tokens after which it is decided whether guessing pays
_LEAST_SHARE = 0.5  # of guesses that come true; a step of n tokens takes about n / 2 times one of a single token
_PAUSE = 64  # tokens without guesses where it does not pay


class PromptLookup:
    """The text of one sequence. most: tokens to guess at a time.

    Whether guessing pays is decided by counts and not by the clock, so that the same prompt takes the same steps each time.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram → where it last ended, the text's own end left out
        self._guessed = self._came_true = 0
        self._paused_until = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text has one more token."""
        end = len(self._tokens)
        for count in _MATCHES:
            if end >= count:
                self._ends[tuple(self._tokens[end - count :])] = end
        self._tokens.append(token)

    def guess(self) -> list[int]:
        """What may come next; nothing where the text's end is new, or where guesses did not come true lately."""
        end = len(self._tokens)
        if end < self._paused_until:
            return []
        for count in _MATCHES:
            before = self._ends.get(tuple(self._tokens[-count:])) if end > count else None
            if before is not None:
                guess = self._tokens[before : before + self._most]
                while len(guess) < self._most:  # the text ends in a repetition, which goes on
                    guess += guess[: self._most - len(guess)]
                return guess
        return []

    def judge(self, guessed: int, came_true: int) -> None:
        """How a guess turned out."""
        self._guessed += guessed
        self._came_true += came_true
        if self._guessed >= _JUDGED:
            if self._came_true < _LEAST_SHARE * self._guessed:
                self._paused_until = len(self._tokens) + _PAUSE
            self._guessed = self._came_true = 0
