"""Exports a transformers language model of any architecture as one graph for prompts and for single tokens.

    input_ids        int64 (batch, length)      new tokens, padded on the right
    past_lengths     int32 (batch,)             tokens that each row has in the cache
    lengths          int32 (batch,)             new tokens of each row, the padding not counted
    logit_indices    int64 (answers,)           which tokens to answer, as row · length + column
    past_key_values.N.key, .value               float32 (batch, kv_heads, capacity, head_dim)
    total_length     int32 ()                   the longest row's tokens, past and new; in the form for CUDA alone
    past_states.N.recurrent, .conv              float32 (batch, …): of layers that keep a state of one size (recurrences.py)
    → logits         float32 (answers, vocabulary)
    → hidden_states  float32 (answers, hidden), where asked for: what the logits are a projection of
    → present.N.key, .value                     as the past, with the new tokens written in
    → present_states.N.recurrent, .conv         as the past, after the new tokens

Rows are independent: each has its own past and its own number of new tokens, so that prompts, parts of prompts and single
tokens can share a step. Past and present may be one buffer, which is then written in place; its capacity has to hold the
longest row. The vocabulary is projected only for the tokens that are asked for: the last of each row to generate, several to
check a draft, all of them for perplexity.

CUDA's kernel is not told how many new tokens each row has: rows with a past bring one each, or there is one row; without a past they may be
unequal and padded. It reads the longest row's length on the CPU; computed in the graph that would be copied back in each step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.adapter import merge_adapter
from onnxpress.exporters.conventions import ROTARY_CHANGES, Conventions, learn, rotary_modules
from onnxpress.exporters.decoder_operators import Step, add_cache, decoder_operators
from onnxpress.exporters.experts import arrange_experts, emitted_experts, experts_notes
from onnxpress.exporters.half_weights import HalfWeights, put_weights
from onnxpress.exporters.json_files import read_object
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.recurrences import (
    PAST_STATES,
    PRESENT_STATES,
    Recurrence,
    emitted_recurrences,
    state_names,
)
from onnxpress.exporters.replaced import replaced_forwards
from onnxpress.exporters.tasks import Task, reads_more_than_text
from onnxpress.exporters.tokenizer import read_tokenizer
from onnxpress.exporters.trace import LARGEST_AXIS, LARGEST_BATCH, tensor_spec, trace
from onnxpress.exporters.transformers_model import TextExport, input_limit, load_model, position_limit, refuse_longer
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Json, Signature

# Of generation_config.json, what is taken, where its value means something; what says nothing of the answers; and values that change
# nothing. What else is there is named as not applied.
_TAKEN: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 < value < 1e6,
    "top_k": lambda value: isinstance(value, int) and 0 < value < 2**31,
    "top_p": lambda value: 0 < value < 1,
    "min_p": lambda value: 0 < value < 1,
    "repetition_penalty": lambda value: 1e-6 <= value <= 1e6,
}
_SILENT = frozenset({
    "transformers_version", "trust_remote_code", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample",
    "use_cache", "cache_implementation", "cache_config", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "return_dict", "return_dict_in_generate", "return_legacy_cache", "compile_config", "disable_compile", "low_memory",
    "prefill_chunk_size", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "early_stopping", "length_penalty", "chat_format", "max_window_size",
})  # fmt: skip
_IDLE: Mapping[str, Json] = {
    **dict.fromkeys(("top_k", "min_p", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("min_new_tokens", "epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0),
    **dict.fromkeys(("top_p", "typical_p", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), 1),
    "max_length": 20,  # transformers' own default
}
_DRAWING = {"temperature": 1.0, "top_k": 50}  # of transformers 5, where a file says that it draws, and no more
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # where do_sample is true


def export_decoder(
    folder: Path,
    wanted: Task,
    config: Any,
    *,
    trust_remote_code: bool,
    max_length: int | None,
    adapter: str | os.PathLike[str] | None,
    hidden_states: bool,
    uniform_steps: bool = False,
    dtype: torch.dtype = torch.float32,
    instead: torch.nn.Module | None = None,
) -> TextExport:
    """Export the language model in a folder. Raises SourceError and ConversionError.

    max_length: the longest context in tokens, prompt and answer together. adapter: a LoRA folder, merged first.
    hidden_states: whether they are an output. uniform_steps: the form for CUDA. dtype: of its large weights while it is built. instead: the model to export in the place of the folder's.
    """
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    _declared(folder)  # else the weights would be blamed for what is wrong with it
    model: Any = instead
    notes: tuple[str, ...] = ()
    if instead is None:
        model, notes = load_model(folder, wanted, config, trust_remote_code=trust_remote_code, dtype=dtype)
    if adapter is not None and instead is None:
        notes += (merge_adapter(model, Path(adapter)),)
    if reads_more_than_text(config):
        notes += ("the text of the model alone: its images, sound and video are not read",)
    halves = None
    if dtype != torch.float32:
        halves = HalfWeights(model)
        notes += (
            f"large weights stayed in {str(dtype).rpartition('.')[2]} while it was built: memory does not hold them in float32",
        )
    limit = input_limit(model, tokenizer, max_length)
    if max_length is not None:
        refuse_longer(folder, max_length, limit)
    elif position_limit(model) is None:
        notes += (f"context: {limit} tokens; the model itself has no limit, and --max-length takes more",)
    context = max_length or limit
    name = type(model).__name__
    if context < 2:
        raise SourceError(f"A context of {context} leaves no room for an answer; ask for at least 2 tokens.")
    with quiet():
        conventions = learn(model, positions=context)
    of_longest = False
    if conventions.positions < context and max_length is not None and conventions.limited_by == ROTARY_CHANGES:
        shorter = conventions.positions
        with quiet():
            conventions = learn(model, positions=context, rotary_of_longest=True)
        of_longest = conventions.positions == context
        notes += (f"rotary embeddings of texts over {shorter} tokens in all texts, as {context} were asked for",)
    if conventions.positions < context:
        if max_length is not None:
            raise SourceError(
                f"A context of {max_length} was asked for; in {name}, beyond {conventions.positions} tokens, {conventions.limited_by}, "
                f"which is not exported. Ask for at most {conventions.positions}."
            )
        more = (
            "; --max-length takes more"
            if conventions.limited_by == ROTARY_CHANGES and None not in conventions.rotaries
            else ""
        )
        notes += (f"context: {conventions.positions} of {context} tokens; beyond, {conventions.limited_by}{more}",)
        context = conventions.positions
    graph = export_causal_lm(
        model, conventions, context=context, hidden_states=hidden_states, uniform_steps=uniform_steps, halves=halves
    )
    sampling, remarks = _own_sampling(folder)
    options: dict[str, Json] = {
        "max_length": context,
        "pad_token_id": tokenizer.pad_token_id,
        **_special_tokens(model),
        **({"sampling": sampling} if sampling else {}),
    }
    return TextExport(
        graph=graph,
        reference=DecoderReference(model, conventions.first_position, rotary_of=context if of_longest else None),
        options=options,
        tokenizer=tokenizer,
        notes=(*notes, *_summary(conventions, uniform_steps=uniform_steps), *tokenizer.notes, *remarks),
    )


def export_causal_lm(
    model: PreTrainedModel,
    conventions: Conventions,
    *,
    context: int,
    hidden_states: bool = False,
    uniform_steps: bool = False,
    halves: HalfWeights | None = None,
) -> Graph:
    """The graph of a model whose conventions are known. The model is left as it was. Raises ConversionError."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConversionError(f"{type(model).__name__} does not say which layer gives its logits.")
    if conventions.states and uniform_steps:
        raise ConversionError(
            f"{type(model).__name__} has layers that keep a state (linear attention, state spaces, convolutions); no form of them "
            "for CUDA has been tried. Build it for the CPU."
        )
    wrapped = CausalModel(
        model, head, conventions, context, hidden_states=hidden_states, uniform_steps=uniform_steps
    ).eval()
    example = wrapped.example()
    past = state_names(conventions.states, PAST_STATES)
    shapes: dict[str, tuple[str | int, ...]] = {
        "input_ids": ("batch", "length"),
        "past_lengths": ("batch",),
        "lengths": ("batch",),
        "logit_indices": ("answers",),
        **({"total_length": ()} if uniform_steps else {}),
        **dict(zip(past, (("batch", *state.shape) for state in conventions.states), strict=True)),
    }
    axes = {
        "batch": (1, LARGEST_BATCH),
        "length": (1, context),
        "answers": (1, LARGEST_AXIS),
        **({"capacity": (1, context)} if conventions.attentions else {}),
    }
    outputs = [
        "logits",
        *(["hidden_states"] if hidden_states else []),
        *state_names(conventions.states, PRESENT_STATES),
    ]
    with ExitStack() as stack:
        weights = {} if halves is None else stack.enter_context(halves.traced())
        stack.enter_context(wrapped.emitting())
        ir_model, *_ = trace(
            wrapped, example, shapes=shapes, axes=axes, outputs=outputs, prefix="model.", name=type(model).__name__
        )
        put_weights(ir_model, weights)
    add_cache(ir_model, conventions)
    arrange_experts(ir_model)
    ir_model.graph.opset_imports.setdefault("com.microsoft", 1)
    vocabulary = int(model.config.get_text_config().vocab_size)
    bounds = {
        "input_ids": (0, vocabulary - 1),
        "past_lengths": (0, context),
        "lengths": (0, context),
        "total_length": (0, context),
    }
    signature = Signature(
        task="text-generation",
        inputs=tuple(tensor_spec(value, bounds=bounds.get(str(value.name))) for value in ir_model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in ir_model.graph.outputs),
        axes=axes,
    )
    return Graph(model=ir_model, signature=signature)


class CausalModel(torch.nn.Module):
    """A causal language model with a plain call: the graph's inputs in, a tuple of its outputs out."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: torch.nn.Module,
        conventions: Conventions,
        context: int,
        *,
        hidden_states: bool = False,
        uniform_steps: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._head = [head]  # in a list: it is part of the model already
        self._conventions = conventions
        self._context = context
        self._step: Step | None = None
        self._recurrence: Recurrence | None = None
        self._answers: torch.Tensor | None = None
        self._gives_hidden = hidden_states
        self._uniform_steps = uniform_steps
        self._hidden: torch.Tensor | None = None
        for index, (cosines, sines) in enumerate(conventions.tables):
            self.register_buffer(f"rotary_{index}_cos", cosines, persistent=False)
            self.register_buffer(f"rotary_{index}_sin", sines, persistent=False)
        self._norm_weights: dict[torch.nn.Module, str] = {}
        names = {module: name for name, module in model.named_modules()}
        for module, norm in conventions.norms.items():
            if norm.offset:
                name = f"{names[module].replace('.', '_')}_weight"
                self.register_buffer(name, norm.offset + next(module.parameters()).detach(), persistent=False)
                self._norm_weights[module] = name

    @contextmanager
    def emitting(self) -> Iterator[None]:
        """Let the model emit ONNX Runtime's operators while this lasts."""
        with ExitStack() as stack:
            stack.enter_context(decoder_operators(self.model, self._conventions, self._current))
            stack.enter_context(replaced_forwards({self._head[0]: self._logits}))
            stack.enter_context(emitted_recurrences(self.model, self._current_recurrence))
            # CUDA's operator for experts has not been tried.
            forms = {} if self._uniform_steps else self._conventions.experts
            stack.enter_context(emitted_experts(self.model, forms))
            yield

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The graph's inputs in their order, but for keys and values; logits, perhaps hidden states, and states out."""
        input_ids, past_lengths, lengths, self._answers, *more = inputs
        total, states = more[: self._uniform_steps], more[self._uniform_steps :]
        columns = torch.arange(input_ids.shape[1])
        # Padding may lie beyond the last position there is; what it gets does not matter.
        positions = (past_lengths.to(torch.int64)[:, None] + columns[None]).clamp(max=self._context - 1)
        ends = past_lengths + lengths - 1
        self._step = Step(
            positions=positions,
            ends=ends,
            total=total[0] if total else (ends + 1).amax(0),
            lengths=None if total else lengths,
            tables=[
                (getattr(self, f"rotary_{index}_cos"), getattr(self, f"rotary_{index}_sin"))
                for index in range(len(self._conventions.tables))
            ],
            norm_weights={module: getattr(self, name) for module, name in self._norm_weights.items()},
        )
        self._recurrence = Recurrence(lengths=lengths, past=states)
        logits = self.model(
            input_ids=input_ids,
            position_ids=positions + self._conventions.first_position,
            attention_mask=None,
            use_cache=False,
            return_dict=True,
        ).logits
        if self._step.attentions != len(self._conventions.attentions) or len(self._recurrence.present) != len(states):
            raise ConversionError("The layers of a trace are not those of the forward pass before it.")
        if not self._gives_hidden:
            return logits, *self._recurrence.present
        assert self._hidden is not None, "the output layer was called"
        return logits, self._hidden, *self._recurrence.present

    def example(self) -> dict[str, torch.Tensor]:
        """Inputs to trace with: two rows, whose sizes are all different."""
        batch, length = 2, min(5, self._context)
        return {
            "input_ids": torch.ones(batch, length, dtype=torch.int64),
            "past_lengths": torch.tensor([0, 0], dtype=torch.int32),
            "lengths": torch.tensor([length, length], dtype=torch.int32),
            "logit_indices": torch.tensor([0, 1, 2], dtype=torch.int64),
            **({"total_length": torch.tensor(length, dtype=torch.int32)} if self._uniform_steps else {}),
            **{
                name: torch.zeros(batch, *state.shape)
                for name, state in zip(
                    state_names(self._conventions.states, PAST_STATES), self._conventions.states, strict=True
                )
            },
        }

    def _current(self) -> Step:
        assert self._step is not None
        return self._step

    def _current_recurrence(self) -> Recurrence:
        assert self._recurrence is not None
        return self._recurrence

    def _logits(self, _: torch.nn.Module, original: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """The output layer for the tokens that are asked for: (batch, length, hidden) → (answers, vocabulary)."""
        assert self._answers is not None
        self._hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._answers)
        return original(self._hidden)


class DecoderReference:
    """The original language model, answering the graph's inputs with logits: row by row, its own attention, no cache.

    Takes no past: `past_lengths` has to be zero and the cache is not looked at. first_position: where it is not 0, positions are
    told; the model alone leaves padding tokens inside of a text out when it counts. rotary_of: the length of the texts whose rotary
    embeddings all have, where these change with it.
    """

    input_names: tuple[str, ...] = ("input_ids", "past_lengths", "lengths", "logit_indices")

    def __init__(self, model: PreTrainedModel, first_position: int = 0, *, rotary_of: int | None = None) -> None:
        self.module = model
        self._first_position = first_position
        self._rotary_of = rotary_of

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """{"logits": float32 (answers, vocabulary)} of one batch."""
        assert not np.any(feeds["past_lengths"]), "the reference has no cache"
        length = feeds["input_ids"].shape[1]
        answers: dict[int, np.ndarray[Any, Any]] = {}
        for row, count in enumerate(feeds["lengths"]):
            wanted = [int(index) for index in feeds["logit_indices"] if index // length == row]
            if not wanted:
                continue
            logits = self.logits(feeds["input_ids"][row, :count], [index % length for index in wanted])
            answers.update(zip(wanted, logits, strict=True))
        return {"logits": np.stack([answers[int(index)] for index in feeds["logit_indices"]])}

    def logits(self, ids: np.ndarray[Any, Any], columns: list[int]) -> np.ndarray[Any, Any]:
        """float32 (columns, vocabulary): what follows the tokens at `columns` of one text."""
        with torch.inference_mode(), self._rotary():
            keep = torch.tensor(columns)
            first = self._first_position
            told = {"position_ids": torch.arange(first, first + len(ids))[None]} if first else {}
            answer = self.module(
                input_ids=torch.tensor(np.asarray(ids))[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                use_cache=False,
                logits_to_keep=keep,
                return_dict=True,
                **told,
            ).logits[0]
            kept = answer if len(answer) == len(columns) else answer[keep]  # some answer all, whatever is asked for
            found: np.ndarray[Any, Any] = kept.float().numpy()
        return found

    @contextmanager
    def _rotary(self) -> Iterator[None]:
        """Let the model's rotary modules answer as in a text of `rotary_of` tokens."""
        if self._rotary_of is None:
            yield
            return
        last = self._rotary_of - 1

        def longest(
            _: torch.nn.Module, original: Callable[..., Any], x: Any, position_ids: Any, *more: Any, **others: Any
        ) -> Any:
            ended = torch.cat((position_ids, torch.full_like(position_ids[..., :1], last)), -1)
            answer = original(x, ended, *more, **others)
            return tuple(table[:, :-1] for table in answer) if isinstance(answer, tuple) else answer[:, :-1]

        with rotary_modules(self.module, longest):
            yield


def _special_tokens(model: PreTrainedModel) -> dict[str, Json]:
    """bos_token_id, and eos_token_ids: whichever of them ends an answer."""
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    config = model.config.get_text_config()
    begin, ends = (
        getattr(config, name, None) if getattr(generation, name) is None else getattr(generation, name)
        for name in ("bos_token_id", "eos_token_id")
    )
    begins, ends = _token_ids("bos_token_id", begin), _token_ids("eos_token_id", ends)
    return {"bos_token_id": next(iter(begins), None), "eos_token_ids": sorted(set(ends))}


def _token_ids(name: str, given: Any) -> list[int]:
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int | float) or item != item // 1 or abs(item) >= 2**31:
            raise SourceError(
                f"{name} of the model's generation_config.json, or config.json, is {given!r}; tokens are whole numbers: mend the file."
            )
    return [int(item) for item in ids]


def _declared(folder: Path) -> dict[str, Any]:
    """generation_config.json, where there is one. Raises SourceError."""
    path = folder / "generation_config.json"
    return read_object(path) if path.is_file() else {}


def _own_sampling(folder: Path) -> tuple[dict[str, Json], tuple[str, ...]]:
    """How generation_config.json wants tokens to be chosen, as far as it is taken, and remarks on it."""
    declared = _declared(folder)
    draws = declared.get("do_sample") is True
    asked = (
        {**_DRAWING, **{name: value for name, value in declared.items() if value is not None}} if draws else declared
    )
    sampling: dict[str, Json] = {}
    left = []
    if type(declared.get("do_sample")) not in (bool, type(None)):
        left.append(f"do_sample {declared['do_sample']!r}")
    others = [name for name in declared if name not in _TAKEN and name not in _SILENT and not name.startswith("_")]
    for name in (*_TAKEN, *others):
        value: Any = asked.get(name)
        idle = value is False if isinstance(value, bool) else value in (None, [], {}, _IDLE.get(name))
        if idle or (name in _OF_DRAWING and not draws):
            continue
        if name in _TAKEN and type(value) in (int, float) and _TAKEN[name](value):
            sampling[name] = value
        else:
            left.append(name if isinstance(value, list | dict) else f"{name} {value}")
    chosen = ", ".join(f"{name} {value}" for name, value in sampling.items())
    taken = f"tokens are chosen by generation_config.json: {chosen}; with a temperature of 0 nothing is drawn"
    return sampling, (
        *((taken,) if sampling else ()),
        *((f"generation_config.json asks for {', '.join(left)}, which is not applied",) if left else ()),
    )


def _summary(conventions: Conventions, *, uniform_steps: bool) -> tuple[str, ...]:
    fused = sum(call is not None for call in conventions.rotaries)
    windows = sorted({call.window for call in conventions.attentions if call.window is not None})
    sentence = (
        f"{len(conventions.attentions)} GroupQueryAttention, {2 * fused} RotaryEmbedding, "
        f"{len(conventions.norms)} SimplifiedLayerNormalization emitted"
    )
    left = len(conventions.rotaries) - fused
    recurrent = sum(state.kind == "recurrent" for state in conventions.states)
    return (
        sentence,
        *((f"{recurrent} LinearAttention emitted",) if recurrent else ()),
        *experts_notes(dict.fromkeys(conventions.experts) if uniform_steps else conventions.experts),
        *((f"{left} rotary embeddings fit no operator and stay as the model computes them",) if left else ()),
        *(
            (f"positions begin at {conventions.first_position}, and padding tokens inside of a text count",)
            if conventions.first_position
            else ()
        ),
        *((f"sliding windows of {', '.join(map(str, windows))} tokens",) if windows else ()),
    )
