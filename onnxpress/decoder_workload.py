"""What a language model is tried on: texts whose next tokens it predicts, a prompt and a step to time, cases to keep.

The metric is how much of the likelihood of real text is kept: the original's perplexity over the candidate's, 1 where nothing
is lost, 0.95 where perplexity is 5 % higher. Beside it the Kullback-Leibler divergence of the distributions, and the share of
equal likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress import evaluation, metrics
from onnxpress.errors import RecipeError
from onnxpress.manifest import Arrays, Json, Runnable, Signature
from onnxpress.runtime.bfloat16 import host_dtype
from onnxpress.runtime.cache import is_past, is_state
from onnxpress.runtime.model_step import TOTAL_LENGTH
from onnxpress.runtime.session import Session
from onnxpress.runtime.tokenization import Tokenizer
from onnxpress.sample_files import read_samples
from onnxpress.samples import LONG, builtin_samples, overlap, spread
from onnxpress.workload import Answers

_KEPT_BYTES = 256 * 2**20  # of the original's logits
_LEAST_POSITIONS = 16  # of one text: each is read as a whole, however few of its tokens are asked
_CALIBRATED_ANSWERS = 16  # positions of a calibration text whose logits are asked for
_TOO_SHORT = "{}: no text has two tokens, so there is nothing to calibrate on."
_WINDOW = 256  # tokens of one piece of a long text
_PROMPT = 128  # tokens of the prompt that is timed
_BATCH_TRIAL = 16
_BATCH = 4


class DecoderWorkload:
    """Texts as token ids, the project's own or the user's (a .txt file cut into windows, or a column of texts)."""

    rows_can_run_alone = False
    task = "text-generation"
    labelled_samples = 0  # texts have no labels

    def __init__(
        self,
        *,
        signature: Signature,
        options: Mapping[str, Json],
        tokenizer_folder: Path,
        file: Path | None = None,
        calibration: Path | None = None,
        columns: Mapping[str, str | int] | None = None,
        samples: int = 200,
        calibration_samples: int = 128,
    ) -> None:
        self._signature = signature
        self._context = int(options["max_length"])
        tokenizer = Tokenizer.from_folder(
            tokenizer_folder, max_length=self._context, pad_token_id=options["pad_token_id"]
        )
        ids = next(spec for spec in signature.inputs if spec.name == "input_ids")
        assert ids.bounds is not None
        self._vocabulary = ids.bounds[1] + 1
        self._beyond = 0  # tokens of texts that the tokenizer knows and the model does not
        own, given, self.notes = builtin_samples(self.task, tokenizer)
        if calibration is None:
            self._calibration = self._windows(tokenizer, [sample.text for sample in own])[:calibration_samples]
        else:
            found = self._windows_of_file(tokenizer, calibration, columns)
            self._calibration = [found[index] for index in spread(len(found), calibration_samples)]
        texts = [sample.text for sample in given]
        if file is not None:
            texts = [sample.text for sample in read_samples(file, self.task, columns)]
            both = _shared(self._calibration, texts, tokenizer)
            if calibration is not None and (long := [text for text in both.values() if len(text) >= LONG]):
                raise RecipeError(overlap(calibration, file, len(long)))
            self._calibration = [window for index, window in enumerate(self._calibration) if index not in both]
        windows = self._windows(tokenizer, texts)
        if not windows:
            raise RecipeError(
                f"{file or 'The built-in texts'}: no text has two tokens, so there is nothing to predict."
            )
        most = max(_LEAST_POSITIONS, _KEPT_BYTES // (4 * self._vocabulary))
        asked = min(samples, max(1, most // _LEAST_POSITIONS))
        self._evaluation = [windows[index] for index in spread(len(windows), asked)]
        self._positions = max(1, most // len(self._evaluation))
        self._next = np.concatenate([np.array(window)[self._asked(window) + 1] for window in self._evaluation])
        self.notes += (f"judged at {len(self._next)} tokens of {len(self._evaluation)} texts",)
        if self._beyond:
            self.notes += (
                f"{self._beyond} tokens of the texts were left out: the tokenizer has them, and the model, whose tokens are 0 to "
                f"{self._vocabulary - 1}, has not",
            )

    def calibration(self) -> Iterator[Arrays]:
        """The graph's inputs for one calibration text at a time."""
        for window in self._calibration:
            asked = np.unique(np.linspace(0, len(window) - 1, _CALIBRATED_ANSWERS).round().astype(np.int64))
            yield self._feeds([window], [asked])

    def questions(self) -> list[tuple[list[int], np.ndarray]]:
        """The evaluation texts as token ids, each with the positions whose next tokens are asked for."""
        return [(window, self._asked(window)) for window in self._evaluation]

    def answers(self, runnable: Runnable) -> Answers:
        """Logits (positions, vocabulary) of each text."""
        found = []
        for window, asked in self.questions():
            feeds = self._feeds([window], [asked], runnable)
            found.append({"logits": runnable.run({name: feeds[name] for name in runnable.input_names})["logits"]})
        return found

    def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
        """likelihood_kept, perplexity, kl_mean, top1_agreement, max_abs."""
        own, original = self._perplexity(answers), self._perplexity(reference)
        agreement = metrics.choice_metrics(reference, answers, "logits")
        return {"likelihood_kept": original / own if np.isfinite(own) else 0.0, "perplexity": own, **agreement}

    def score(self, runnable: Runnable) -> dict[str, float]:
        """No labels: nothing beyond the metrics."""
        return {}

    def batch_dependence(self, runnable: Runnable, answers: Answers) -> float:
        """Mean cosine between a text's logits alone and beside others of other lengths."""
        windows = [window[: 8 + 5 * (index % 5)] for index, window in enumerate(self._evaluation[:_BATCH_TRIAL])]
        alone, together = [], []
        for start in range(0, len(windows), _BATCH):
            group = windows[start : start + _BATCH]
            last = [np.array([len(window) - 1]) for window in group]
            together += list(runnable.run(self._feeds(group, last, runnable))["logits"])
            alone += [runnable.run(self._feeds([window], [index], runnable))["logits"][0] for window, index in zip(group, last, strict=True)]  # fmt: skip
        return evaluation.batch_dependence([{"logits": row} for row in alone], [{"logits": row} for row in together])

    def timing(self, runnable: Runnable) -> dict[tuple[int, ...], Arrays]:
        """A prompt, and a single token after it; keyed by (batch, new tokens)."""
        length = min(_PROMPT, self._context - 1)
        random = np.random.default_rng(0)
        prompt = random.integers(0, self._vocabulary, length).tolist()
        return {
            (1, length): self._feeds([prompt], [np.array([length - 1])], runnable),
            (1, 1): self._feeds([prompt[:1]], [np.array([0])], runnable, past=length),
        }

    def golden(self, runnable: Runnable) -> dict[str, Arrays]:
        """Two prompts of unequal lengths in a batch, and single tokens after a made-up past.

        Where layers keep states, which are megabytes for every row, a few tokens of one row after such a past.
        """
        windows = [window[:12] for window in self._evaluation[:2]]
        tokens = [window[:1] for window in windows]
        past = min(8, self._context - 1)
        if any(map(is_state, self._signature.inputs)):
            few = windows[0][:3]
            past = min(past, self._context - len(few))
            return {"tokens": self._feeds([few], [np.array([len(few) - 1])], runnable, past=past)}
        return {
            "prompts": self._feeds(windows, [np.array([len(window) - 1]) for window in windows], runnable),
            "tokens": self._feeds(tokens, [np.array([0])] * len(tokens), runnable, past=past),
        }

    def _asked(self, window: list[int]) -> np.ndarray:
        """Evenly spread positions of a text, each with a token after it."""
        count = min(self._positions, len(window) - 1)
        return np.unique(np.linspace(0, len(window) - 2, count).round().astype(np.int64))

    def _perplexity(self, answers: Answers) -> float:
        losses, start = [], 0
        for answer in answers:  # one at a time: all of them in float64 would be several times the memory
            logits = answer["logits"].astype(np.float64)
            if not np.isfinite(logits).all():
                return float("inf")
            wanted = self._next[start : start + len(logits)]
            losses.append(-metrics.log_softmax(logits)[np.arange(len(logits)), wanted])
            start += len(logits)
        return float(np.exp(np.mean(np.concatenate(losses))))

    def _feeds(
        self, rows: list[list[int]], asked: list[np.ndarray], runnable: Runnable | None = None, past: int = 0
    ) -> Arrays:
        """The graph's inputs for new tokens of each row; `past` tokens of random keys and values before them.

        runnable: whose cache they suit, the export's where None.
        """
        length = max(map(len, rows))
        ids = np.zeros((len(rows), length), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
        sizes = {"batch": len(rows), "capacity": past + length}
        random = np.random.default_rng(0)
        feeds: dict[str, np.ndarray] = {
            "input_ids": ids,
            "past_lengths": np.full(len(rows), past, np.int32),
            "lengths": np.array([len(tokens) for tokens in rows], np.int32),
            "logit_indices": np.concatenate([row * length + index for row, index in enumerate(asked)]),
            TOTAL_LENGTH: np.array(past + length, np.int32),
        }
        signature = runnable.signature if isinstance(runnable, Session) else self._signature
        for spec in signature.inputs:
            if is_past(spec.name):
                shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape)
                cache = np.zeros(shape, host_dtype(spec.dtype))
                feeds[spec.name] = cache
                if is_state(spec):  # small, as keys of length 1 leave it
                    cache[:] = 0.01 * random.standard_normal(shape) if past else 0
                    continue
                numbers = random.standard_normal((*shape[:2], past, shape[3]))
                cache[:, :, :past] = numbers if cache.dtype.kind == "f" else (32 * numbers).clip(-127, 127)
        return {name: feeds[name] for name in runnable.input_names} if isinstance(runnable, Session) else feeds

    def _windows_of_file(
        self, tokenizer: Tokenizer, path: Path, columns: Mapping[str, str | int] | None
    ) -> list[list[int]]:
        """The texts of a file, or the token ids of a .npy file: one row, or one text a row."""
        if path.suffix != ".npy":
            windows = self._windows(tokenizer, [sample.text for sample in read_samples(path, self.task, columns)])
        else:
            ids = read_token_ids(path)
            if not 0 <= ids.min() <= ids.max() < self._vocabulary:
                raise RecipeError(
                    f"{path} has token ids from {ids.min()} to {ids.max()}; the model has 0 to {self._vocabulary - 1}."
                )
            windows = self._pieces(np.atleast_2d(ids).tolist())
        if not windows:
            raise RecipeError(_TOO_SHORT.format(path))
        return windows

    def _windows(self, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        """Texts as token ids, long ones in pieces; those of one token are left out, and tokens that the model does not have."""
        encoded = [tokenizer.inner.encode(text).ids for text in texts]
        known = [[token for token in ids if token < self._vocabulary] for ids in encoded]
        self._beyond += sum(map(len, encoded)) - sum(map(len, known))
        return self._pieces(known)

    def _pieces(self, texts: list[list[int]]) -> list[list[int]]:
        size = min(_WINDOW, self._context)
        windows = [ids[start : start + size] for ids in texts for start in range(0, len(ids), size)]
        return [window for window in windows if len(window) > 1]


def read_token_ids(path: Path) -> npt.NDArray[np.integer[Any]]:
    """Of a .npy file: one row, or one text a row. Raises RecipeError."""
    try:
        with path.open("rb") as file:
            ids = np.load(file, allow_pickle=False)
    except Exception:  # numpy raises half a dozen kinds for files that are something else
        ids = None
    if not isinstance(ids, np.ndarray):
        raise RecipeError(f"{path} is no .npy file of an array of integers, as token ids are.")
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise RecipeError(f"{path} holds {ids.dtype} {list(ids.shape)}; token ids are integers, one or two axes.")
    if not ids.size or ids.shape[-1] < 2:
        raise RecipeError(_TOO_SHORT.format(path))
    return ids


def _shared(windows: list[list[int]], texts: list[str], tokenizer: Tokenizer) -> dict[int, str]:
    """Windows that are part of the texts, or that hold one of them, by their place; each with what is shared."""

    def plain(text: str) -> str:
        return " ".join(text.strip("\ufffd").split())  # where a window cuts a character, half of it is left

    given = [plain(text) for text in texts]
    whole = "\n".join(given)
    found: dict[int, str] = {}
    for index, window in enumerate(windows):
        text = plain(tokenizer.inner.decode(window))
        if text and text in whole:
            found[index] = text
        elif within := [one for one in given if len(one) >= LONG and one in text]:
            found[index] = within[0]
    return found
