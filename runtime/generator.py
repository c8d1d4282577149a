"""Language models: prompts or messages in, text out, in batches of unequal lengths or piece by piece.

Life of a request: tokenize → row of the cache (what it holds of the prompt is not computed again) → the prompt in chunks,
alone → one token a step, all rows together, or several where their guesses come true → detokenize → stop. A row that is done changes places with the last one
and keeps its tokens, in case the next prompt begins with them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.detokenizer import Detokenizer, StopStrings
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.prompt_lookup import LONGEST_GUESS, PromptLookup
from onnxpress.runtime.sampler import Sampler, Sampling, top_logprobs
from onnxpress.runtime.session import Session
from onnxpress.runtime.tokenization import Tokenizer

DEFAULT_NEW_TOKENS = 256
CACHE_BYTES = 2 * 2**30
MOST_ROWS = 16  # sequences that are generated together
# Sequences whose keys and values are kept for the prompts to come, where the budget allows it; on a card one.
_IDLE_ROWS = 4
# Prompt tokens of one step: enough for the products to be shared between threads well, few enough for the caches (docs/decisions/0010).
PROMPT_CHUNK, PROMPT_CHUNK_ON_CARD = 256, 512

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Json]]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A chosen token's log-probability in nats by the model itself, and those of the likeliest tokens."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An answer.

    finish_reason: "stop" (an end token or a stop string), "length" (max_new_tokens) or "context" (the model's limit).
    token_ids: all that were generated, the end token not. prompt_tokens: of the prompt; cached_tokens: how many of these were
    in the cache. logprobs: one a token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of an answer. index: which answer of the batch. text: may be empty. generation: the whole, in its last piece."""

    index: int
    text: str
    generation: Generation | None = None


@dataclass(kw_only=True)
class _Sequence:
    """A request on its way."""

    index: int
    prompt: list[int]
    limit: int  # new tokens at most
    limit_reason: str
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopStrings
    ends: frozenset[int]
    logprobs: int | None
    lookup: PromptLookup | None
    answer: list[int] = field(default_factory=list)
    text: str = ""
    cached: int = 0
    probabilities: list[TokenLogprob] = field(default_factory=list)

    def take(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> Piece:
        """Choose a token and say what it gives."""
        token = self.sampler.pick(logits)
        if token in self.ends:
            return self._last("stop")
        if self.logprobs is not None:
            own, top = top_logprobs(logits, token, self.logprobs)
            self.probabilities.append(TokenLogprob(token_id=token, logprob=own, top=top))
        self.answer.append(token)
        if self.lookup is not None:
            self.lookup.push(token)
        shown = self.stops.push(self.detokenizer.push(token))
        if self.stops.found is not None:
            return self._last("stop", shown)
        if len(self.answer) == self.limit:
            return self._last(self.limit_reason, shown)
        self.text += shown
        return Piece(index=self.index, text=shown)

    def _last(self, reason: str, shown: str = "") -> Piece:
        shown += self.stops.push(self.detokenizer.flush()) + self.stops.flush()
        reason = reason if self.stops.found is None else "stop"
        self.text += shown
        generation = Generation(
            text=self.text,
            token_ids=self.answer,
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            logprobs=self.probabilities if self.logprobs is not None else None,
        )
        return Piece(index=self.index, text=shown, generation=generation)


class Generator:
    """Generates text. cache_bytes: the most memory for keys and values. One call at a time; others wait.

    Tokens are chosen as `sampling` says, the model's own way where its generation_config.json had one, else greedily; what a call
    is given goes before it. A sequence's random numbers are its own, so that the same seed gives the same text in
    other company too; but quantized kernels round a little differently for one row than for several, which can tip a choice
    between tokens that are nearly as likely. Of `dual`, batches of 8 and more take other weights than smaller ones, and
    `int8-dynamic` has one scale for a batch: most drawn answers are others there.
    """

    task: ClassVar[str] = "text-generation"

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        options: Mapping[str, Json],
        template: ChatTemplate | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        _check_count("cache_bytes", cache_bytes)
        self.session = session
        self.tokenizer = tokenizer
        self.options = options
        self.template = template
        self.context = int(options["max_length"])
        self.sampling = Sampling(**options.get("sampling", {}))
        self._cache = KeyValueCache(
            session.signature.inputs, context=self.context, budget=cache_bytes, memory=session.memory
        )
        self._step = ModelStep(session, self._cache)
        self._chunk = PROMPT_CHUNK if session.on_cpu else PROMPT_CHUNK_ON_CARD
        self._ends = frozenset(options.get("eos_token_ids", ()))
        self._read: tuple[list[int], Any] = ([], None)  # the last prompt that was read, and the logits after it
        self._idle_rows = _IDLE_ROWS if session.on_cpu else 1  # a step in another row would be another CUDA graph
        self._first = 0  # the row of the first sequence that is being generated
        self._sequences = 0  # how many there have been
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose stream is running

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self._step.vocabulary

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether so many sequences of so many tokens each, prompt and answer together, are generated together."""
        return rows <= MOST_ROWS and self._cache.fits(rows, tokens)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        messages: Messages | Sequence[Messages] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Answers to prompts or to messages, in their order; n of each where n is given, side by side.

        prompts: texts or lists of token ids, or one of them. messages: a conversation, or a list of them. options: those of
        `stream`. Raises InputError.
        """
        finished = {
            piece.index: piece.generation
            for piece in self.stream(prompts, messages=messages, **options)
            if piece.generation is not None
        }
        return [finished[index] for index in sorted(finished)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        messages: Messages | Sequence[Messages] | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int | None = None,
        prompt_lookup: int = 0,
        template_variables: Mapping[str, Json] | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Pieces of the answers as they come; the last of each carries the whole.

        max_new_tokens: 256 where None, or what the context leaves. stop: strings that end an answer and are not part of it; special tokens
        by their names too.
        stop_token_ids: beside the model's own end tokens, which ignore_eos switches off. n: answers to each prompt. logprobs: how
        many of the likeliest tokens to name beside the chosen one. prompt_lookup: how many tokens to guess at a time from what the
        text holds already, 0 for none; while a single answer is generated. template_variables: for the chat template. sampling:
        fields of `Sampling`, in the place of the model's own; with temperature=0 nothing is drawn. Raises InputError at once, before anything
        is generated.
        """
        known = set(Sampling.__dataclass_fields__)
        if unknown := sorted(set(sampling) - known):
            raise InputError(f"Unknown option {unknown[0]!r}; sampling options are: {', '.join(sorted(known))}.")
        ids = self._tokens(prompts, messages, template_variables or {})
        _check_count("n", n)
        if max_new_tokens is not None:
            _check_count("max_new_tokens", max_new_tokens)
        if logprobs is not None and (
            not isinstance(logprobs, int | np.integer) or isinstance(logprobs, bool) or logprobs < 0
        ):
            raise InputError(f"logprobs is {logprobs!r}; it takes a whole number from 0 on.")
        if type(prompt_lookup) is not int or not 0 <= prompt_lookup <= LONGEST_GUESS:
            raise InputError(f"prompt_lookup is {prompt_lookup!r}; it takes a whole number from 0 to {LONGEST_GUESS}.")
        if prompt_lookup and self._cache.keeps_states:
            raise InputError(
                "prompt_lookup needs a cache that can be cut back, and this model's linear attention mixes what it has read: leave it out."
            )
        stop = () if stop is None else stop
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (stop,)
        if not all(isinstance(item, str) and item for item in stops):
            raise InputError("stop takes strings that are not empty.")
        chosen = replace(self.sampling, **sampling)
        stop_token_ids = () if stop_token_ids is None else stop_token_ids
        if not _is_ids(stop_token_ids):
            raise InputError("stop_token_ids takes a list of token ids.")
        ends = frozenset((*stop_token_ids, *self._special(stops), *(() if ignore_eos else self._ends)))
        sequences: list[_Sequence] = []
        for prompt in ids:
            limit, reason = self._limit(len(prompt), None if max_new_tokens is None else int(max_new_tokens))
            for sample in range(n):
                sequences.append(
                    _Sequence(
                        index=len(sequences),
                        prompt=prompt,
                        limit=limit,
                        limit_reason=reason,
                        sampler=Sampler(chosen, prompt, vocabulary=self.vocabulary, sample=sample),
                        detokenizer=Detokenizer(self.tokenizer.inner, prompt),
                        stops=StopStrings(stops),
                        ends=ends,
                        logprobs=logprobs,
                        lookup=PromptLookup(prompt, prompt_lookup) if prompt_lookup else None,
                    )
                )
        for sequence in sequences:
            self._check_budget(sequence)
        return self._run(sequences)

    def hidden_states(self, prompt: Prompt) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 (tokens, hidden): the states that each of a prompt's logits are a projection of; nothing is kept.

        Raises InputError, also for an artifact that was built without `hidden_states`.
        """
        if "hidden_states" not in self.session.output_names:
            raise InputError("This artifact answers no hidden states: build it again with --hidden-states.")
        ids = self._encode(0, prompt)
        if len(ids) > self.context:
            raise InputError(
                f"The prompt has {len(ids)} tokens, and the model's context is {self.context}: shorten it."
            )
        cache = KeyValueCache(
            self._cache.specs, context=self.context, budget=self._cache.budget, memory=self.session.memory
        )
        step = ModelStep(self.session, cache, output="hidden_states", captures=False)
        parts = [ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk)]
        return np.concatenate([step.run(0, [part], answers=[len(part)]).copy() for part in parts])

    def reset(self) -> None:
        """Forget all prompts and answers that are in the cache."""
        self._refuse_own_stream()
        with self._lock:
            self._cache.clear()

    def _refuse_own_stream(self) -> None:
        if self._owner == threading.get_ident():  # waiting for oneself would take for ever
            raise InputError(
                "A stream of this generator that was begun in this thread is still open: finish it, or close() it. Where streams "
                "go from thread to thread, read each in one of them, and hand its pieces on."
            )

    def _run(self, sequences: Iterable[_Sequence]) -> Iterator[Piece]:
        self._refuse_own_stream()
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield from self._pieces(deque(sequences))
            finally:
                self._owner = None

    def _pieces(self, waiting: deque[_Sequence]) -> Iterator[Piece]:
        active: list[_Sequence] = []
        anywhere = len(waiting) == 1 and self.session.on_cpu  # rows of several have to lie side by side
        self._first = 0
        while waiting or active:
            while waiting and self._has_room(active, waiting[0]):
                yield self._begin(waiting.popleft(), active, anywhere)
            if not active:
                continue
            if len(active) == 1:
                pieces = self._step_alone(active[0])
                yield from pieces[:-1]
                pieces = pieces[-1:]
            else:
                logits = self._step.run(0, [[sequence.answer[-1]] for sequence in active])
                pieces = [sequence.take(row) for sequence, row in zip(active, logits, strict=True)]
            for row in reversed(range(len(active))):
                if pieces[row].generation is not None:
                    self._cache.swap(row, len(active) - 1)
                    active[row] = active[-1]
                    active.pop()
            yield from pieces

    def _step_alone(self, sequence: _Sequence) -> list[Piece]:
        """The next token of the only sequence, and those after it that were guessed."""
        guess = sequence.lookup.guess() if sequence.lookup is not None else []
        guess = guess[: sequence.limit - len(sequence.answer) - 1]
        known = len(sequence.prompt) + len(sequence.answer) - 1
        logits = self._step.run(self._first, [[sequence.answer[-1], *guess]], answers=[1 + len(guess)])
        pieces = [sequence.take(logits[0])]
        while pieces[-1].generation is None and len(pieces) <= len(guess):
            if sequence.answer[-1] != guess[len(pieces) - 1]:
                break
            pieces.append(sequence.take(logits[len(pieces)]))
        self._cache.truncate(self._first, known + len(pieces))
        if sequence.lookup is not None and guess:
            sequence.lookup.judge(len(guess), len(pieces) - 1)
        return pieces

    def _begin(self, sequence: _Sequence, active: list[_Sequence], anywhere: bool) -> Piece:
        """Read a prompt into a row, the one after the active ones unless it may be anywhere; the sequence joins them unless its
        first token is its last.
        """
        cache, row, prompt = self._cache, len(active), sequence.prompt
        longest = max(map(_longest, [*active, sequence]))
        again = prompt == self._read[0] and prompt in cache.tokens  # the next sample of one prompt
        needed = prompt if again else prompt[:-1]
        # Of those that hold as much, the one begun longest ago: others may go on with theirs.
        source = max(
            range(cache.rows), key=lambda other: (cache.usable(other, needed), -cache.begun[other]), default=row
        )
        if source > row and not cache.fits(cache.rows, longest):  # rows will go, the last first
            cache.swap(row, source)
            source = row
        cache.reserve(row + 1, longest)
        sequence.cached = cache.usable(source, needed)
        place = self._idle_row(row, source, sequence.cached)
        if place != source:
            cache.truncate(place, 0)
        if anywhere:
            self._first = row = place
        else:
            cache.swap(row, place)
            source = {row: place, place: row}.get(source, source)
        cache.copy(source, row, sequence.cached)
        self._sequences += 1
        cache.begun[row] = self._sequences
        if not again:
            rest = prompt[sequence.cached :]
            for start in range(0, len(rest), self._chunk):
                logits = self._step.run(row, [rest[start : start + self._chunk]])
            self._read = (prompt, logits[0].copy())
        piece = sequence.take(self._read[1])
        if piece.generation is None:
            active.append(sequence)
        return piece

    def _idle_row(self, busy: int, source: int, shared: int) -> int:
        """A row behind the busy ones for a prompt that shares tokens with the row `source`.

        That row itself, where all of it goes on; else an empty or a new one; with _IDLE_ROWS in use, or no budget for more, that
        row where at least half of it goes on; else the one that was begun longest ago.
        """
        cache, idle = self._cache, range(busy, self._cache.rows)
        held = len(cache.tokens[source])
        if source in idle and shared == held:
            return source
        oldest = min(idle, key=lambda row: (bool(cache.tokens[row]), cache.begun[row]))
        if not cache.tokens[oldest]:
            return oldest
        if len(idle) < self._idle_rows and cache.fits(cache.rows + 1, cache.capacity):
            cache.reserve(cache.rows + 1, cache.capacity)
            return cache.rows - 1
        return source if source in idle and 2 * shared >= held else oldest

    def _has_room(self, active: list[_Sequence], sequence: _Sequence) -> bool:
        if not active:
            return True
        longest = max(map(_longest, [*active, sequence]))
        return self.fits(len(active) + 1, longest)

    def _check_budget(self, sequence: _Sequence) -> None:
        longest = _longest(sequence)
        if not self._cache.fits(1, longest):
            needed, budget = self._cache.needed(1, longest) / 2**20, self._cache.budget / 2**20
            raise InputError(
                f"A prompt of {len(sequence.prompt)} tokens and {sequence.limit} new ones need {needed:.1f} MiB of cache, "
                f"and the budget is {budget:.1f} MiB: raise cache_bytes, or ask for fewer tokens."
            )

    def _special(self, stops: Sequence[str]) -> list[int]:
        """The special tokens of these names: they give no text, in which they would be found."""
        added = self.tokenizer.inner.get_added_tokens_decoder().items() if stops else ()
        return [token for token, added_token in added if added_token.special and added_token.content in stops]

    def _limit(self, prompt_tokens: int, wanted: int | None) -> tuple[int, str]:
        room = self.context - prompt_tokens
        if room < 1:
            raise InputError(
                f"The prompt has {prompt_tokens} tokens, and the model's context is {self.context}, the answer included: "
                "shorten the prompt."
            )
        if wanted is not None and wanted > room:
            raise InputError(
                f"{wanted} new tokens were asked for after a prompt of {prompt_tokens}; the model's context of {self.context} "
                f"leaves {room}."
            )
        if wanted is None and room < DEFAULT_NEW_TOKENS:
            return room, "context"
        return wanted or DEFAULT_NEW_TOKENS, "length"

    def _tokens(self, prompts: Any, messages: Any, variables: Mapping[str, Json]) -> list[list[int]]:
        if (prompts is None) == (messages is None):
            raise InputError("Give either prompts or messages.")
        if messages is not None:
            if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
                raise InputError('Messages are a list that is not empty, of {"role": "user", "content": "…"}.')
            conversations = [messages] if isinstance(messages[0], Mapping) else messages
            return [
                self._encode_messages(index, conversation, variables)
                for index, conversation in enumerate(conversations)
            ]
        if variables:
            raise InputError("template_variables go with messages.")
        if isinstance(prompts, str) or (_is_ids(prompts) and len(prompts)):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise InputError(f"The prompts are a {type(prompts).__name__}; texts or lists of token ids are expected.")
        if not prompts:
            raise InputError("No prompt was given.")
        return [self._encode(index, prompt) for index, prompt in enumerate(prompts)]

    def _encode(self, index: int, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise InputError(f"Prompt {index} is empty.")
            ids = self._text_ids(index, prompt, special=True)
        elif _is_ids(prompt):
            ids = [int(token) for token in prompt]
        else:
            raise InputError(f"Prompt {index} is a {type(prompt).__name__}; a text or a list of token ids is expected.")
        return self._checked(index, ids)

    def _text_ids(self, index: int, text: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"Prompt {index} holds half a character (a lone surrogate).") from None
        return list(self.tokenizer.inner.encode(text, add_special_tokens=special).ids)

    def _checked(self, index: int, ids: list[int]) -> list[int]:
        if not ids:
            raise InputError(f"Prompt {index} has no tokens.")
        outside = [token for token in ids if not 0 <= token < self.vocabulary]
        if outside:
            raise InputError(f"Prompt {index} has the token id {outside[0]}; the model has 0 to {self.vocabulary - 1}.")
        return ids

    def _encode_messages(self, index: int, conversation: Any, variables: Mapping[str, Json]) -> list[int]:
        if self.template is None:
            raise InputError(
                "This model has no chat template, so it takes prompts and not messages: give `prompts`, in the form that it was "
                "trained on."
            )
        text = self.template.render(conversation, variables=variables)
        return self._checked(index, self._text_ids(index, text, special=False))


def _longest(sequence: _Sequence) -> int:
    """Tokens of a sequence at its end; the last one is never read."""
    return len(sequence.prompt) + sequence.limit - 1


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in value)
    )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}; it takes a whole number from 1 on.")
