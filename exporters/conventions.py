"""Finds out by numbers how a decoder computes its norms, rotary embeddings, attention masks, caches and experts.

One forward pass with real numbers, in which every attention, every rotary embedding and every mixture of experts is recorded in the order of the
calls. Nothing is known by a model's name: what a function does is told by comparing what it answers with what
ONNX Runtime's operator would. What fits no operator stays in the graph as the model computes it; only attention has to fit.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from onnxpress.errors import ConversionError
from onnxpress.exporters.attention import registered_attention, uses_interface
from onnxpress.exporters.experts import ExpertsForm, recorded_experts
from onnxpress.exporters.indexers import CHOICES, IndexerCalls, silent_indexers
from onnxpress.exporters.own_attention import OwnAttention, replaced_attention, scale_and_window
from onnxpress.exporters.recurrences import State, deaf_recurrences, recorded_recurrences
from onnxpress.exporters.replaced import bound, replaced_forwards, replaced_functions

_NAME = "onnxpress_recorder"
_LENGTH = 9  # tokens of the recorded forward pass
_HARMLESS = frozenset(
    # what attention functions are told and what the mask, the cache or nobody needs
    {"is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}
    | {"return_dict", "position_embeddings", "past_key_values", "cache", "layer_idx", "output_router_logits"}
    | {"logits_to_keep"}
)
ROTARY_CHANGES = "the rotary embeddings change with the length of the text"  # a reason of Conventions.limited_by
_TOLERANCE = 1e-5  # relative and absolute
_DEAF = 1e-3  # of the largest number: what a token hears that should hear nothing, experts that meet others in a batch aside
_HEAD_STEP = 8  # heads of other sizes are refused by ONNX Runtime's attention
_ROTARY_STEP = 8  # ONNX Runtime's kernel rotates vectors of so many numbers


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention of the forward pass.

    head_dim: numbers of a head, the larger where keys and values differ, and a multiple of 8, as the kernel wants it. window: how many tokens back it sees, itself included; None
    is all.
    """

    kv_num_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, kw_only=True)
class RotaryCall:
    """One application of rotary embeddings, to a query, a key, or both.

    table: index into `Conventions.tables`. width: how many numbers of a head are turned, from the first on. interleaved:
    pairs stand side by side, not half a width apart. lengths_first: tensors are (batch, length, heads, head_dim); otherwise heads come
    before the length.
    """

    table: int
    width: int
    interleaved: bool
    lengths_first: bool


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A root-mean-square norm: x / sqrt(mean(x²) + epsilon) · (offset + its weight); the offset is 0 or 1."""

    offset: int
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What was found out.

    attentions and rotaries: in the order of the calls; None for a rotary embedding that fits no operator. tables: (cosines,
    sines), float32 (positions, width / 2) each. norms: by module. states: of layers that keep one, in the
    order of the calls. experts: by module, None where they fit no operator. indexers: modules that choose what is attended to, and within
    `positions` keep all. first_position: what the model is told of a text's first token. positions: the longest context; where these are
    fewer than were asked for, limited_by says what happens beyond.
    """

    attentions: tuple[AttentionCall, ...]
    rotaries: tuple[RotaryCall | None, ...]
    tables: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    norms: dict[torch.nn.Module, Norm]
    states: tuple[State, ...]
    experts: dict[torch.nn.Module, ExpertsForm | None]
    indexers: tuple[torch.nn.Module, ...]
    first_position: int
    positions: int
    limited_by: str


def learn(model: PreTrainedModel, *, positions: int, rotary_of_longest: bool = False) -> Conventions:
    """Run `model` once and say how it computes. positions: the longest context, for which tables are made.

    rotary_of_longest: whether rotary embeddings that change with the length of the text are those of the longest in all texts.
    Raises ConversionError where its attention is not causal, or not what GroupQueryAttention computes.
    """
    try:
        return _learned(model, positions, rotary_of_longest)
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # whatever a model raises that needs more
        raise ConversionError(f"{type(model).__name__} does not run on tokens and positions alone: {error}") from error


def _learned(model: PreTrainedModel, positions: int, rotary_of_longest: bool) -> Conventions:
    first = _first_position(model)
    ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) % min(64, _vocabulary(model))
    recorder = _recorded(model, positions, ids, first)
    choices = recorder.choices
    indexers = tuple(choices.found)
    if indexers:  # once more without them, as the graph will be: they turn queries and keys of their own
        recorder = _recorded(model, positions, ids, first, indexers)
        recorder.limit(choices.longest(positions), "an indexer chooses which tokens are attended to")
    if not uses_interface(model):
        recorder.attentions = _own_attentions(model, positions, first)
    with torch.no_grad():
        tables = recorder.tables(of_longest=rotary_of_longest)
    if not recorder.attentions and not recorder.states:
        raise ConversionError(
            f"{type(model).__name__} computes attention by itself, not through transformers' attention interface."
        )
    _refuse_other_memory(model, ids, first, indexers)
    return Conventions(
        attentions=tuple(recorder.attentions),
        rotaries=tuple(recorder.rotaries),
        tables=tables,
        norms=_norms(model),
        states=tuple(recorder.states),
        experts=recorder.experts,
        indexers=indexers,
        first_position=first,
        positions=recorder.positions,
        limited_by=recorder.limited_by,
    )


def _recorded(
    model: PreTrainedModel, positions: int, ids: torch.Tensor, first: int, indexers: Iterable[torch.nn.Module] = ()
) -> _Recorder:
    """What a forward pass met in which these indexers are silent."""
    recorder = _Recorder(model, positions)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if uses_interface(model):
            stack.enter_context(registered_attention(model, _NAME, recorder.attention, recorder.mask))
        stack.enter_context(rotary_functions(model, recorder.rotary))
        stack.enter_context(rotary_modules(model, recorder.source))
        stack.enter_context(recorded_experts(model, recorder.experts))
        stack.enter_context(recorded_recurrences(model, recorder.states))
        stack.enter_context(silent_indexers(indexers))
        stack.enter_context(recorder.choices.recorded())
        _forward(model, ids, first)
    return recorder


def _own_attentions(model: PreTrainedModel, positions: int, first: int) -> list[AttentionCall]:
    """Of a model that computes attention by itself, on a text of the longest context, because a window shows on no shorter one."""
    found: list[AttentionCall] = []

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> None:
        scale, window = scale_and_window(query, key, weights, type(model).__name__)
        found.append(
            AttentionCall(
                kv_num_heads=key.shape[1],
                head_dim=_head_dim(query, value),
                scale=scale,
                window=window,
                softcap=None,
            )
        )

    with torch.no_grad(), OwnAttention(note):
        _forward(model, torch.arange(positions)[None] % _vocabulary(model), first)
    return found


def _head_dim(query: torch.Tensor, value: torch.Tensor) -> int:
    return -(-max(query.shape[3], value.shape[3]) // _HEAD_STEP) * _HEAD_STEP


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _first_position(model: PreTrainedModel) -> int:
    """The position of a text's first token where a model is told none: 0, or what follows its padding token (RoBERTa and its kin)."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokens = [token for token in range(min(64, _vocabulary(model))) if token != padding][:_LENGTH]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for first in (0, *([] if padding is None else [padding + 1])):
            answer = _forward(model, ids, first)
            if torch.allclose(answer, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
                return int(first)
    raise ConversionError(
        f"{type(model).__name__} answers otherwise when it is told that its tokens are at 0, 1, 2… than when it is told nothing."
    )


def _forward(model: PreTrainedModel, ids: torch.Tensor, first: int) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=(first + torch.arange(ids.shape[1]))[None].repeat(len(ids), 1),
        use_cache=False,
    ).logits
    return logits


def _refuse_other_memory(
    model: PreTrainedModel, ids: torch.Tensor, first: int, indexers: Iterable[torch.nn.Module]
) -> None:
    """Raise ConversionError where a token hears of those before it otherwise than through what was recorded.

    All of that is made deaf; then another first token may change nothing that follows.
    """
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % _vocabulary(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(replaced_attention(model, _NAME, _deaf_attention, no_mask))
        stack.enter_context(deaf_recurrences(model))
        stack.enter_context(silent_indexers(indexers))
        one, another = _followed(model, ids, first), _followed(model, other, first)
    for (name, x), (_, y) in zip(one, another, strict=True):
        if not torch.allclose(x[:, 1:], y[:, 1:], rtol=0, atol=_DEAF * float(x.abs().max())):
            raise ConversionError(
                f"{type(model).__name__} reads earlier tokens, at {name} or right before it, otherwise than through transformers' "
                "attention interface and the linear attention, state spaces and convolutions that ONNX Runtime has operators for."
            )


def no_mask(*_: Any, **__: Any) -> torch.Tensor:
    """For attention that looks at no mask; indexers are handed a part of it."""
    return torch.zeros(1, 1, 1, 1)


def _followed(model: PreTrainedModel, ids: torch.Tensor, first: int) -> list[tuple[str, torch.Tensor]]:
    """What the modules answer, (batch, length, …), by their names, in the order in which they are done; then the logits."""
    found: list[tuple[str, torch.Tensor]] = []

    def note(name: str, _module: torch.nn.Module, _given: Any, answer: Any) -> None:
        answer = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(answer, torch.Tensor) and answer.dim() > 2 and answer.shape[:2] == ids.shape:
            found.append((name, answer))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        logits = _forward(model, ids, first)
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, ("the last layer", logits)]


def _deaf_attention(
    _module: torch.nn.Module, query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


@contextmanager
def rotary_functions(model: PreTrainedModel, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let `replacement(original, count, …)` stand for the model's apply_rotary… functions while this lasts.

    The arguments that follow are `count` tensors to turn, one or a query and a key, then cos and sin, or one table of complex numbers.
    """

    def chosen(name: str, function: Any) -> Callable[..., Any] | None:
        fits = name.startswith("apply_rotary") and callable(function)
        return bound(replacement, function, count) if fits and (count := _turned_tensors(function)) else None

    with replaced_functions(model, chosen):
        yield


@contextmanager
def rotary_modules(model: PreTrainedModel, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let `replacement(module, original, …)` stand for the forward of the modules that give (cos, sin)."""
    with replaced_forwards(
        {module: replacement for module in model.modules() if "RotaryEmbedding" in type(module).__name__}
    ):
        yield


_Table = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


class _Marks:
    """What is known of tensors, and of their slices, which share their memory."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, Any]] = {}  # the tensors, so that their memory stays theirs

    def put(self, tensor: torch.Tensor, mark: Any) -> None:
        self._known[tensor.untyped_storage().data_ptr()] = tensor, mark

    def of(self, tensor: Any) -> Any:
        """None where nothing is known."""
        return self._known[tensor.untyped_storage().data_ptr()][1] if tensor in self else None

    def __contains__(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self._known


@dataclass
class _Recorder:
    model: PreTrainedModel
    positions: int
    attentions: list[AttentionCall] = field(default_factory=list)
    rotaries: list[RotaryCall | None] = field(default_factory=list)
    experts: dict[torch.nn.Module, ExpertsForm | None] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)
    choices: IndexerCalls = field(default_factory=lambda: IndexerCalls(length=_LENGTH))
    limited_by: str = ""
    _marks: _Marks = field(default_factory=_Marks)
    _whole: dict[Any, Callable[[int], _Table]] = field(default_factory=dict)
    _table_of: dict[Any, int] = field(default_factory=dict)

    def limit(self, positions: int, why: str) -> None:
        """The context has so many positions at most; why: what happens beyond."""
        if positions < self.positions:
            self.positions, self.limited_by = positions, why

    def tables(self, *, of_longest: bool) -> tuple[_Table, ...]:
        """Of the rotary embeddings that fit operators, as they number them, for the whole context.

        of_longest: whether shorter texts may have them too; those that fit no operator are as the model computes them.
        """
        for table in self._whole.values() if not of_longest or None in self.rotaries else ():
            self.limit(_stable_length(table, self.positions), ROTARY_CHANGES)
        found = []
        for source, layout in self._table_of:
            cos, sin = (_LAYOUTS[layout](part)[0].float().contiguous() for part in self._whole[source](self.positions))
            found.append((cos, sin))
        return tuple(found)

    def mask(self, mask_function: Callable[..., torch.Tensor], **_: Any) -> torch.Tensor:
        """A stand-in that carries the window, or why it has none; the recorded attention makes its own mask.

        Models make masks that none of their layers use (Qwen2-MoE), so that one of another kind is not yet an error.
        """
        mask = torch.zeros(1, 1, _LENGTH, _LENGTH)
        try:
            self._marks.put(mask, self._window(mask_function))
        except ConversionError as error:
            self._marks.put(mask, error)
        return mask

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # (batch, heads, length, head_dim)
        key: torch.Tensor,  # (batch, kv_heads, length, head_dim)
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,  # (heads,): a sink's scores
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        name = type(module).__name__
        for choice in (options.pop(option, None) for option in CHOICES):
            if choice is not None and not self.choices.chose(choice):
                raise ConversionError(
                    f"{name} chooses which tokens are attended to in a way that cannot be told from outside."
                )
        unknown = sorted(
            option
            for option, value in options.items()
            if option not in _HARMLESS and value is not None and value is not False
        )
        if unknown:
            raise ConversionError(
                f"{name} asks its attention for {', '.join(unknown)}, which GroupQueryAttention does not have here."
            )
        if attention_mask not in self._marks:
            raise ConversionError(f"{name} makes an attention mask of its own, which cannot be told from outside.")
        mark: tuple[int | None, int] | ConversionError = self._marks.of(attention_mask)
        if isinstance(mark, ConversionError):
            raise mark
        window, longest = mark
        self.limit(longest, "attention sees chunks of the text")
        if sliding_window is not None and window is not None and int(sliding_window) != window:
            raise ConversionError(f"{name} says that its window is {sliding_window} and masks to {window} tokens.")
        scale = float(query.shape[3] ** -0.5 if scaling is None else scaling)
        call = AttentionCall(
            kv_num_heads=key.shape[1],
            head_dim=_head_dim(query, value),
            scale=scale,
            window=window,
            softcap=float(softcap) if softcap else None,
        )
        self.attentions.append(call)
        repeats = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scale
        if call.softcap:
            scores = (scores / call.softcap).tanh() * call.softcap
        index = torch.arange(scores.shape[-1])
        seen = index[None] <= index[:, None]
        if window is not None:
            seen &= index[:, None] - index[None] < window
        scores = scores.masked_fill(~seen, -1e9)
        if s_aux is not None:
            scores = torch.cat((scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
        weights = scores.softmax(-1)[..., : len(index)]
        return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2).contiguous(), None

    def source(self, module: torch.nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a rotary module answers, marked with where it came from; the whole table is asked of it once."""
        answer = original(*args, **kwargs)
        options = {name: value for name, value in kwargs.items() if name not in ("x", "position_ids")}
        key = (id(module), tuple(args[2:]), tuple(sorted(options.items())))
        if key not in self._whole:
            like = kwargs["x"] if "x" in kwargs else args[0]

            def table(count: int) -> _Table:
                asked = copy.deepcopy(module)  # some change themselves when they are asked for more
                return _cosines_sines(
                    type(module).forward(asked, like[:1], torch.arange(count)[None], *args[2:], **options)
                )

            self._whole[key] = table
        self._marks.put(answer[0] if isinstance(answer, tuple) else answer, key)
        return answer

    def rotary(self, original: Callable[..., Any], count: int, *args: Any, **kwargs: Any) -> Any:
        turned = original(*args, **kwargs)
        answers = turned if isinstance(turned, tuple) else (turned,)
        self.rotaries.append(self._fitting(args[:count], args[count:], answers))
        return turned

    def _fitting(self, heads: Sequence[Any], tables: Sequence[Any], turned: Sequence[Any]) -> RotaryCall | None:
        source = self._marks.of(tables[0]) if tables else None
        if (
            source is None
            or tables[0].dim() != 3
            or len(heads) != len(turned)
            or any(x is None or x.dim() != 4 for x in heads)
        ):
            return None
        cos, sin = _cosines_sines(tables[0] if tables[0].is_complex() else tuple(tables[:2]))
        for lengths_first, interleaved in itertools.product((False, True), repeat=2):
            pairs = [
                (x.transpose(1, 2), y.transpose(1, 2)) if lengths_first else (x, y)
                for x, y in zip(heads, turned, strict=True)
            ]
            for layout, take in _LAYOUTS.items():
                half_cos, half_sin = take(cos), take(sin)
                size = 2 * half_cos.shape[-1]
                if size % _ROTARY_STEP or any(size > x.shape[-1] or x.shape[2] != cos.shape[1] for x, _ in pairs):
                    continue
                if all(
                    torch.allclose(
                        _turn(x, half_cos, half_sin, interleaved=interleaved), y, rtol=_TOLERANCE, atol=_TOLERANCE
                    )
                    for x, y in pairs
                ):
                    table = self._table(source, layout)
                    return RotaryCall(table=table, width=size, interleaved=interleaved, lengths_first=lengths_first)
        return None

    def _table(self, source: Any, layout: str) -> int:
        return self._table_of.setdefault((source, layout), len(self._table_of))

    def _window(self, mask_function: Callable[..., torch.Tensor]) -> tuple[int | None, int]:
        """How far back a mask sees, and in how long texts. Raises ConversionError.

        A mask that is neither everything nor a window (chunks) is everything up to some length.
        """
        last = self.positions - 1
        keys = torch.arange(self.positions)[None, None, None, :]
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)

        def count(query: int) -> int:
            try:
                seen = mask_function(zero, zero, torch.tensor(query), keys).expand(keys.shape)[0, 0, 0].nonzero()[:, 0]
            except Exception as error:  # a mask that cannot be asked in this way may raise anything
                raise ConversionError(f"{type(self.model).__name__} has a mask of its own kind: {error}") from error
            first, number = (int(seen[0]), len(seen)) if len(seen) else (0, 0)
            if first + number != query + 1:
                raise ConversionError(
                    f"{type(self.model).__name__} does not look at the tokens up to the present one alone: at position "
                    f"{query} it sees {number} tokens from {first} on."
                )
            return number

        counts = {
            query: count(query)
            for query in sorted({0, 1, 2, 7, last // 3, last // 2, last - 1, last} & set(range(last + 1)))
        }
        window = counts[last]
        if all(number == min(query + 1, window) for query, number in counts.items()):
            return None if window == self.positions else window, self.positions
        return None, bisect_left(range(self.positions), True, key=lambda query: count(query) <= query)


_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "halves": lambda table: table[..., : table.shape[-1] // 2],
    "pairs": lambda table: table[..., 0::2],
    "half": lambda table: table,
}


def _cosines_sines(answer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what a rotary module gives: two tables, or one of complex numbers."""
    cos, sin = answer if isinstance(answer, tuple) else (answer.real, answer.imag)
    return cos, sin


def _stable_length(table: Callable[[int], tuple[torch.Tensor, torch.Tensor]], longest: int) -> int:
    """The largest number of positions up to `longest` whose table begins like that of a few positions; bisected."""
    few = min(_LENGTH, longest)
    first = table(few)

    def begins_alike(count: int) -> bool:
        return all(torch.allclose(one, other[:, :few]) for one, other in zip(first, table(count), strict=True))

    if begins_alike(longest):
        return longest
    return few - 1 + bisect_left(range(few, longest + 1), True, key=lambda count: not begins_alike(count))


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """What com.microsoft RotaryEmbedding computes: x (batch, heads, length, head_dim), cos (batch, length, width / 2)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    one, other = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    first, second = one * cos - other * sin, other * cos + one * sin
    joined = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((joined, rest), -1)


def _norms(model: PreTrainedModel) -> dict[torch.nn.Module, Norm]:
    """The modules with one vector of weights that are root-mean-square norms, told by trying them."""
    found = {}
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
        if len(parameters) != 1 or parameters[0].dim() != 1 or list(module.children()) or not epsilon:
            continue
        weight = parameters[0].detach()
        x = torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0))
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(epsilon))
        with torch.no_grad():
            try:
                answer = module(x)
            except Exception:  # a module that takes something else is no norm
                continue
        for offset in (0, 1):
            if answer.shape == x.shape and torch.allclose(
                normed * (offset + weight), answer, rtol=_TOLERANCE, atol=_TOLERANCE
            ):
                found[module] = Norm(offset=offset, epsilon=float(epsilon))
                break
    return found


def _turned_tensors(function: Any) -> int:
    """How many tensors a function turns by cosines and sines, or by complex numbers; 0 where it is of another kind."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return 0
    if names == ["xq", "xk", "freqs_cis"]:
        return 2
    return next((count for count in (1, 2) if names[count : count + 2] == ["cos", "sin"]), 0)
