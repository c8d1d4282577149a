"""Compares a language model's graph with the PyTorch original over prompts and many steps, on one growing cache.

Three rows of unequal prompts, the longest in two parts; then single tokens, each row at its own length. Every answer is compared
with the original's, which reads each text as a whole; the likeliest token has to be the same at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxpress.errors import ParityError
from onnxpress.exporters.exported import Exported
from onnxpress.exporters.transformers_decoder import DecoderReference
from onnxpress.exporters.verify import ParityRow, allowed_difference

_STEPS = 20
_PROMPTS = (33, 20, 1)  # tokens, as far as the context allows
_LONG_PROMPT = 300  # a row alone
_STEPS_AFTER_LONG = 4


class Stepping(Protocol):
    """A language model that keeps what it has read: the runtime's `ModelStep`."""

    def run(self, first: int, tokens: list[list[int]]) -> npt.NDArray[np.float32]:
        """Logits (rows, vocabulary) after new tokens of the rows first, first + 1, …"""
        ...


class DecoderParityCheck:
    """The original's answers, computed once, to hold any number of graphs against."""

    def __init__(self, exported: Exported) -> None:
        signature = exported.graph.signature
        ids = next(spec for spec in signature.inputs if spec.name == "input_ids")
        assert ids.bounds is not None
        assert isinstance(exported.reference, DecoderReference)
        context = signature.axes["length"][1]
        vocabulary = np.setdiff1d(np.arange(ids.bounds[1] + 1), _of_more_than_text(exported.reference.module.config))
        random = np.random.default_rng(0)
        steps = min(_STEPS, context - 1)
        self._texts: list[_Text] = []
        for wanted in _PROMPTS:
            prompt = max(1, min(wanted, context - steps))
            self._texts.append(_text(exported.reference, random, vocabulary, prompt, steps))
        longest = min(_LONG_PROMPT, context - _STEPS_AFTER_LONG)
        self._long: _Text | None = None
        if longest > _PROMPTS[0] + steps:
            self._long = _text(exported.reference, random, vocabulary, longest, _STEPS_AFTER_LONG)
        compared = max(_PROMPTS[0] + steps, longest + _STEPS_AFTER_LONG)
        self.notes = (
            (f"contexts over {compared} tokens were not compared with the original",) if context > compared else ()
        )

    def check(self, open_candidate: Callable[[], Stepping]) -> list[ParityRow]:
        """One row a text; raises ParityError at the first step that differs. open_candidate: gives one with an empty cache."""
        first, *others = self._texts
        half = -(-first.prompt // 2)
        # The longest prompt in two parts, the second of them beside single tokens of the other rows.
        plans = [[half, max(1, first.prompt - half)], *([text.prompt, 1] for text in others)]
        rows = self._follow(open_candidate(), self._texts, plans)
        if self._long is not None:
            rows += self._follow(open_candidate(), [self._long], [[self._long.prompt]])
        return rows

    def _follow(self, candidate: Stepping, texts: list[_Text], plans: list[list[int]]) -> list[ParityRow]:
        """Feed texts in the planned parts, then token by token, and compare every answer to a text's end."""
        worst = [0.0] * len(texts)
        read = [0] * len(texts)
        step = 0
        while all(position + 1 < len(text.tokens) for position, text in zip(read, texts, strict=True)) or not step:
            counts = [plan[step] if step < len(plan) else 1 for plan in plans]
            parts = [
                text.tokens[position : position + count]
                for text, position, count in zip(texts, read, counts, strict=True)
            ]
            logits = candidate.run(0, parts)
            read = [position + len(part) for position, part in zip(read, parts, strict=True)]
            for row, (text, position) in enumerate(zip(texts, read, strict=True)):
                answered = position - text.prompt
                if 0 <= answered < len(text.expected):
                    worst[row] = max(worst[row], _compare(text, answered, logits[row]))
            step += 1
        return [
            ParityRow(
                case=f"prompt of {text.prompt} tokens, {position - text.prompt} steps",
                output="logits",
                max_abs=difference,
                max_rel=difference / float(np.abs(text.expected).max()),
            )
            for text, position, difference in zip(texts, read, worst, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Random tokens, of which the first `prompt` are read first, and the original's logits after these and each further one."""

    prompt: int
    tokens: list[int]
    expected: npt.NDArray[np.float32]


def _of_more_than_text(config: Any) -> list[int]:
    """The tokens that stand for images or sound in a model that takes them; it counts positions otherwise where it meets them."""
    if config.get_text_config() is config:
        return []
    names = ("_token_id", "_token_index")
    return [token for name, token in config.to_dict().items() if name.endswith(names) and isinstance(token, int)]


def _text(
    reference: DecoderReference,
    random: np.random.Generator,
    vocabulary: npt.NDArray[np.int64],
    prompt: int,
    steps: int,
) -> _Text:
    tokens = vocabulary[random.integers(0, len(vocabulary), prompt + steps)]
    expected = reference.logits(tokens[:-1], list(range(prompt - 1, prompt + steps - 1)))
    return _Text(prompt=prompt, tokens=tokens.tolist(), expected=expected)


def _compare(text: _Text, step: int, found: npt.NDArray[np.float32]) -> float:
    expected = text.expected[step]
    difference = float(np.abs(expected.astype(np.float64) - found).max())
    allowed = allowed_difference(float(np.abs(expected).max()))
    best, chosen = int(expected.argmax()), int(found.argmax())
    tied = float(expected[best] - expected[chosen]) <= 2 * allowed
    if not difference <= allowed or not (best == chosen or tied):  # also where it is not a number
        raise ParityError(
            f"The logits do not answer like PyTorch {step} steps after a prompt of {text.prompt} tokens: they differ by "
            f"up to {difference:.3g}, where {allowed:.3g} is allowed; the likeliest token is {chosen}, PyTorch's {best}. Do "
            "not use the graph, and report the model as one that does not convert."
        )
    return difference
