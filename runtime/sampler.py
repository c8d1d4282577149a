"""Chooses the next token from logits: greedy, or drawn after penalties, temperature, top-k, top-p and min-p.

Each sequence has its own sampler with its own random numbers: none are used up by what else is generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import ArtifactError, InputError

_FIRST_CANDIDATES = 1024  # top-p sorts so many tokens before it sorts a whole vocabulary
_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Applied in this order; raises InputError for values that mean nothing.

    logit_bias: added to the logits of these tokens. repetition_penalty: divides positive logits, and multiplies negative ones,
    of tokens that are in the prompt or the answer (arXiv 1909.05858). presence_penalty and frequency_penalty: subtracted once,
    or as often as a token is in the answer. temperature: 0 is greedy, and then the rest does not apply. top_k: 0 is all.
    top_p: the fewest tokens that together have this probability (arXiv 1904.09751). min_p: at least this share of the
    likeliest token's probability (arXiv 2407.01082). seed: None draws anew each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda value: value >= 0, "0 (greedy) or more")
        _check(
            "top_k",
            self.top_k,
            lambda value: isinstance(value, int | np.integer) and value >= 0,
            "a whole number, 0 for all",
        )
        _check("top_p", self.top_p, lambda value: 0 < value <= 1, "over 0 and at most 1")
        _check("min_p", self.min_p, lambda value: 0 <= value < 1, "from 0 to under 1")
        _check("repetition_penalty", self.repetition_penalty, lambda value: 1e-6 <= value <= 1e6, "from 1e-6 to 1e6")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), lambda value: abs(value) <= 1e6, "from -1e6 to 1e6")
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias is a {type(self.logit_bias).__name__}; it takes numbers by token id.")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise InputError(f"logit_bias names the token {token!r}; it takes numbers by token id.")
            _check(f"logit_bias of token {token}", bias, lambda value: abs(value) <= 1e6, "a number from -1e6 to 1e6")
        if self.seed is not None:
            _check(
                "seed",
                self.seed,
                lambda value: isinstance(value, int | np.integer) and 0 <= value <= _LARGEST_SEED,
                f"a whole number from 0 to {_LARGEST_SEED}",
            )


class Sampler:
    """Chooses the tokens of one sequence. prompt: its tokens. sample: which of several answers to the prompt this is."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], *, vocabulary: int, sample: int = 0) -> None:
        outside = [token for token in sampling.logit_bias if not 0 <= token < vocabulary]
        if outside:
            raise InputError(f"logit_bias names the token {outside[0]}; the model has 0 to {vocabulary - 1}.")
        self._sampling = sampling
        self._random = np.random.default_rng(None if sampling.seed is None else (sampling.seed, sample))
        self._biased = list(sampling.logit_bias)
        self._bias = np.array([sampling.logit_bias[token] for token in self._biased], np.float32)
        self._changes_logits = bool(
            self._biased or sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        )
        if self._changes_logits:
            self._seen = np.zeros(vocabulary, bool)
            self._seen[list(prompt)] = True
            self._counts = np.zeros(vocabulary, np.int32)

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, from logits (vocabulary,), which are left as they are."""
        changed = self._penalized(logits) if self._changes_logits else logits
        token = int(changed.argmax())
        if not math.isfinite(changed[token]):  # argmax stops at the first that is not a number
            raise ArtifactError("The model answers with logits that are not numbers; verify the artifact.")
        if self._sampling.temperature > 0:
            with np.errstate(
                over="ignore"
            ):  # by temperatures of next to nothing: what is not the largest is minus infinity
                token = self._draw((changed.astype(np.float64) - changed[token]) / self._sampling.temperature)
        if self._changes_logits:
            self._seen[token] = True
            self._counts[token] += 1
        return token

    def _penalized(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        sampling = self._sampling
        changed = logits.copy()
        changed[self._biased] += self._bias
        if sampling.repetition_penalty != 1:
            seen = changed[self._seen]
            penalty = np.float32(sampling.repetition_penalty)
            changed[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            changed -= sampling.presence_penalty * (self._counts > 0) + sampling.frequency_penalty * self._counts
        return changed.astype(np.float32)

    def _draw(self, scaled: npt.NDArray[np.float64]) -> int:
        """From logits of which the largest is 0."""
        sampling = self._sampling
        count = min(sampling.top_k or len(scaled), len(scaled))
        if count == len(scaled) and sampling.top_p == 1 and sampling.min_p == 0:
            tokens = np.arange(len(scaled))
            return int(tokens[self._chosen(np.exp(scaled))])
        whole = float(np.exp(scaled).sum()) if count == len(scaled) else 0.0
        size = min(count, _FIRST_CANDIDATES) if whole else count
        while True:
            tokens = _largest(scaled, size)
            shares = np.exp(scaled[tokens])
            shares = shares / (whole or shares.sum())
            enough = size == count or shares.sum() >= sampling.top_p or shares[-1] < sampling.min_p * shares[0]
            if enough:
                break
            size = count
        kept = (np.cumsum(shares) - shares < sampling.top_p) & (shares >= sampling.min_p * shares[0])
        return int(tokens[kept][self._chosen(shares[kept])])

    def _chosen(self, shares: npt.NDArray[np.float64]) -> int:
        """An index, drawn by shares that need not add up to 1."""
        sums = np.cumsum(shares)
        return int(np.searchsorted(sums, self._random.random() * sums[-1], side="right").clip(0, len(sums) - 1))


def top_logprobs(logits: npt.NDArray[np.float32], token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The model's own log-probability of a token, and of the `count` likeliest ones, in nats."""
    values = logits.astype(np.float64)
    total = float(values.max() + np.log(np.exp(values - values.max()).sum()))
    likeliest = _largest(values, min(count, len(values))) if count else np.empty(0, np.int64)
    return float(values[token] - total), [(int(index), float(values[index] - total)) for index in likeliest]


def _largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Indices of the largest values, largest first, equal ones in order."""
    found = np.arange(len(values)) if count >= len(values) else np.argpartition(values, -count)[-count:]
    return found[np.lexsort((found, -values[found]))]


def _check(name: str, value: Any, holds: Callable[[Any], object], allowed: str) -> None:
    number = (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
    if not number or not holds(value):
        raise InputError(f"{name} is {value!r}; it takes {allowed}.")
