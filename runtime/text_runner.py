"""What all runners of text models share: tokenize, chunk, run, cut the padding off, warn of truncation."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Arrays, Json, Runnable
from onnxpress.runtime.batching import plan, run_chunks
from onnxpress.runtime.session import Session
from onnxpress.runtime.tokenization import Encoding, Sample, Tokenizer, TruncationWarning

Answer = dict[str, np.ndarray[Any, Any]]

TOKENS_PER_CHUNK = 256
TOKENS_PER_CHUNK_ON_CARD = 16384  # 128 texts of 128 tokens: what a step costs is spread over enough of them
_STEP_ON_CARD = 8  # lengths are padded to multiples of it, so that fewer shapes have to be captured


class TextRunner(ABC):
    """Answers texts. session: a Session, or anything that runs named arrays. options: the manifest's.

    tokens_per_chunk: rows of a chunk times their length, or more on a card where None; batches run in such chunks. Safe to call from
    threads.
    """

    task: ClassVar[str]
    one_answer_a_token: bool = False  # whether the outputs' first axis behind the batch is the tokens'

    def __init__(
        self,
        session: Runnable,
        tokenizer: Tokenizer,
        options: Mapping[str, Json],
        *,
        tokens_per_chunk: int | None = None,
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.options = options
        on_card = isinstance(session, Session) and not session.on_cpu
        self.tokens_per_chunk = tokens_per_chunk or (TOKENS_PER_CHUNK_ON_CARD if on_card else TOKENS_PER_CHUNK)
        self._length_step = _STEP_ON_CARD if on_card else 1
        self._most_rows = session.largest("batch") if isinstance(session, Session) else None
        self._longest = session.largest("length") if isinstance(session, Session) else None

    def outputs(self, samples: Sequence[Sample]) -> list[Answer]:
        """The raw outputs for each text or pair: no batch axis, no padding. Raises InputError."""
        return self.run_encodings(self.encode(samples))

    @abstractmethod
    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """One JSON value a text or pair: what `onnxpress run` prints."""

    def encode(self, samples: Sequence[Sample]) -> list[Encoding]:
        """Tokenize; warns with TruncationWarning when something was cut. Raises InputError."""
        encodings = self.tokenizer.encode(samples)
        cut = [encoding.truncated for encoding in encodings if encoding.truncated]
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(encodings)} texts were longer than {self.tokenizer.max_length} tokens and were cut; "
                f"the longest lost {max(cut)}.",
                TruncationWarning,
                stacklevel=_frames_to_the_user(),
            )
        return encodings

    def run_encodings(self, encodings: Sequence[Encoding]) -> list[Answer]:
        """The raw outputs for each encoding: no batch axis, no padding."""
        names = self.session.input_names

        def chunk(rows: np.ndarray[Any, Any]) -> Arrays:
            some = [encodings[row] for row in rows]
            arrays = self.tokenizer.batch(some, multiple=self._length_step, most=self._longest)
            return {name: arrays[name] for name in names}

        step = self._length_step
        lengths = [-(-len(encoding) // step) * step for encoding in encodings]
        chunks = plan(lengths, self.tokens_per_chunk, self._most_rows)
        answers: list[Answer] = [{}] * len(encodings)
        for rows, outputs in zip(chunks, run_chunks(self.session, chunks, chunk), strict=True):
            for place, row in enumerate(rows):
                end = len(encodings[row]) if self.one_answer_a_token else None
                answers[row] = {name: array[place][:end] for name, array in outputs.items()}
        return answers

    def run_rows(self, feeds: Arrays) -> Answer:
        """Rows that are tokenized already, int64 (batch, length): the whole batch, run in chunks, lanes and all."""
        batch, length = next(iter(feeds.values())).shape
        rows = min(max(1, self.tokens_per_chunk // length), self._most_rows or batch)

        def chunk(start: int) -> Arrays:
            return {name: array[start : start + rows] for name, array in feeds.items()}

        answers = run_chunks(self.session, range(0, batch, rows), chunk)
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def _frames_to_the_user() -> int:
    """How far up the first frame outside of the runtime is, so that a warning shows the user's own line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("onnxpress.runtime"):
        frame, level = frame.f_back, level + 1
    return level


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Softmax over the last axis that does not overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray[Any, Any] = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def check_count(top_k: int) -> None:
    """Raise InputError unless at least one answer is asked for."""
    if top_k < 1:
        raise InputError(f"top_k={top_k} was asked for; at least 1 is needed.")
