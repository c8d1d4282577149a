"""Decoders of Qwen2's kind at batch 1: a step after 512 tokens and a prompt of 512, beside torch on the same card.

Ours is the graph of decoder_graph.py, three times: bound to ONNX Runtime by hand (what the card takes), through onnxpress' ModelStep
(logits come to numpy), and through its Generator (tokens are chosen and decoded, too).
"""

from __future__ import annotations

import inspect
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoder_graph
import numpy as np
import roof
import torch
from card import Card
from decoder_graph import Shape
from record import Record
from tokenizers import Tokenizer, models
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

from onnxpress.manifest import Signature
from onnxpress.runtime import tokenization
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.generator import Generator
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session

PAST, CAPACITY, NEW = 512, 1024, 128
# No more memory than is asked for: three models of seven billion are on the card at once.
CUDA_OPTIONS = {"enable_cuda_graph": "1", "arena_extend_strategy": "kSameAsRequested"}
TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=320, tied=True, context=2048)


def measure(record: Record, card: Card, name: str, bits: int, *, tiny: bool, whole: bool) -> None:
    """Milliseconds of a step and of a prompt. whole: torch.compile of the whole step, which takes its time, too."""
    of = f"decoder {name}, {'float16' if bits == 16 else f'int{bits}, blocks of {decoder_graph.BLOCK}'}"
    if not record.has_time(of):
        return
    shape = TINY if tiny else decoder_graph.SHAPES[name]
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2**32  # containers often have little
    folder = Path(tempfile.mkdtemp(prefix="onnxpress-gpu-", dir=shared if roomy else None))
    steps: dict[str, Callable[[], Any]] = {}
    prompts: dict[str, Callable[[], Any]] = {}
    try:
        with record.attempt(f"{of}, graph"):
            path, signature = decoder_graph.write(shape, bits, folder)
            _ours(record, card, of, shape, path, signature, steps, prompts)
    finally:
        shutil.rmtree(folder)
    # Once alone: a peer that fails on the card can take the whole process's use of it along.
    _time(record, of, "alone", shape, bits, steps, prompts)
    with torch.inference_mode():
        if bits == 16 and record.has_time(f"{of}, torch"):
            with record.attempt(f"{of}, torch"):
                _peers(record, card, of, shape, steps, prompts, whole=whole)
                # What is ready is timed, whatever the budget says: that takes seconds.
                _time(record, of, "taking turns", shape, bits, steps, prompts)
    steps.clear()
    prompts.clear()
    card.free()


def _time(
    record: Record,
    of: str,
    how: str,
    shape: Shape,
    bits: int,
    steps: dict[str, Callable[[], Any]],
    prompts: dict[str, Callable[[], Any]],
) -> None:
    for case, calls, tokens in ((f"step after {PAST}, {how}", steps, 1), (f"prompt of {PAST}, {how}", prompts, PAST)):
        for system, times in record.take_turns(f"{of}, {case}", calls).items():
            seconds = statistics.median(times) / 1000
            numbers: dict[str, Any] = {"ms": times, "tokens/s": tokens / seconds}
            reached, rate = shape.bytes_per_step(bits, PAST) / 1e9, roof.read_rate(record)
            if tokens > 1:
                reached, rate = shape.operations(tokens) / 1e12, roof.product_rate(record)
            if rate is not None:
                numbers["of its roof"] = reached / seconds / rate
            record.add(of, case, system, **numbers)


def _ours(
    record: Record,
    card: Card,
    of: str,
    shape: Shape,
    path: Path,
    signature: Signature,
    steps: dict[str, Callable[[], Any]],
    prompts: dict[str, Callable[[], Any]],
) -> None:
    """Adds onnxpress' systems, and measures the Generator, which takes no turns."""
    ids = np.random.default_rng(0).integers(2, min(shape.vocabulary, 4000), PAST).tolist()
    with record.attempt(f"{of}, onnxpress' graph, bound by hand"):
        inner = _open(card, path)
        bound = _Bound(inner, card, shape, PAST, 1, graph="1")
        steps["onnxpress' graph, bound by hand"] = bound.run
        prompt = _Bound(inner, card, shape, 0, PAST, graph="2")
        prompts["onnxpress' graph, bound by hand"] = prompt.run
        for one in (bound, prompt):
            one.run()
            if not np.isfinite(one.logits()).all():
                raise ValueError("logits are not finite")
    with record.attempt(f"{of}, onnxpress, ModelStep"):
        session: Any = Session(path, signature=signature, providers=card.providers())
        cache = _cache(session, signature)
        step = ModelStep(session, cache)
        if not np.isfinite(step.run(0, [ids])).all():
            raise ValueError("logits are not finite")

        def again(tokens: list[int], past: int) -> None:
            cache.truncate(0, past)
            step.run(0, [tokens])

        steps["onnxpress, ModelStep, logits in numpy"] = lambda: again([7], PAST)
        other = _cache(session, signature)
        reading = ModelStep(session, other)

        def read() -> None:
            other.truncate(0, 0)
            reading.run(0, [ids])

        prompts["onnxpress, ModelStep, logits in numpy"] = read
        _generator(record, of, session, shape, ids)


def _cache(session: Any, signature: Signature) -> KeyValueCache:
    """One row of CAPACITY tokens, where the session runs."""
    cache = KeyValueCache(signature.inputs, context=CAPACITY, budget=2**32, memory=session.memory)
    cache.reserve(1, CAPACITY)
    return cache


def _generator(record: Record, of: str, session: Session, shape: Shape, ids: list[int]) -> None:
    words = {f"w{index}": index for index in range(320)}
    tokenizer = tokenization.Tokenizer(
        Tokenizer(models.WordLevel(words, unk_token="w0")), max_length=shape.context, pad_token_id=0
    )
    generator = Generator(session, tokenizer, {"max_length": shape.context, "pad_token_id": 0, "eos_token_ids": []})
    rates = []
    for number in range(4):  # the first is not counted
        arrivals = [time.perf_counter() for _ in generator.stream(ids, max_new_tokens=NEW, ignore_eos=True)]
        if number:
            rates.append((len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))
    case = f"{NEW} tokens after {PAST}"
    record.add(of, case, "onnxpress, Generator, greedy", **{"tokens/s": rates, "ms": [1000 / rate for rate in rates]})


def _open(card: Card, path: Path) -> Any:
    import onnxruntime

    if card.real:
        from onnxpress.runtime.providers import check_provider

        check_provider("cuda")  # loads CUDA's libraries, and says what is missing
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    providers: list[Any] = [("CUDAExecutionProvider", CUDA_OPTIONS)] if card.real else ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=0)


class _Bound:
    """A step of one row whose inputs, keys, values and logits stay on the card."""

    def __init__(self, inner: Any, card: Card, shape: Shape, past: int, length: int, *, graph: str) -> None:
        import onnxruntime

        self._inner = inner
        self._options = onnxruntime.RunOptions()
        if card.real:
            self._options.add_run_config_entry("gpu_graph_id", graph)
        self._binding = inner.io_binding()
        self._kept: list[Any] = []

        def value(array: np.ndarray[Any, Any], where: str = card.name) -> Any:
            self._kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, where, 0))
            return self._kept[-1]

        feeds: dict[str, np.ndarray[Any, Any]] = {
            "input_ids": np.random.default_rng(0).integers(2, min(shape.vocabulary, 4000), (1, length)),
            "past_lengths": np.full(1, past, np.int32),
            "lengths": np.full(1, length, np.int32),
            "logit_indices": np.full(1, length - 1, np.int64),
        }
        for name, array in feeds.items():
            self._binding.bind_ortvalue_input(name, value(array))
        # A graph holds this number as it was captured with; for decoding the largest there can be suits every step.
        total = np.array(CAPACITY if card.real and length == 1 else past + length, np.int32)
        self._binding.bind_ortvalue_input("total_length", value(total, "cpu"))
        self._logits = value(np.zeros((1, shape.vocabulary), np.float32))
        self._binding.bind_ortvalue_output("logits", self._logits)
        for layer in range(shape.layers):
            for kind in ("key", "value"):
                kept = value(np.zeros((1, shape.kv_heads, CAPACITY, shape.head), np.float16))
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", kept)
                self._binding.bind_ortvalue_output(f"present.{layer}.{kind}", kept)

    def run(self) -> None:
        self._inner.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()

    def logits(self) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._logits.numpy()
        return found


def _peers(
    record: Record,
    card: Card,
    of: str,
    shape: Shape,
    steps: dict[str, Callable[[], Any]],
    prompts: dict[str, Callable[[], Any]],
    *,
    whole: bool,
) -> None:
    """Adds torch's systems: one model, in several forms."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model = make_model(shape, card)
    forms: dict[str, tuple[Any, bool]] = {
        "torch, SDPA": (model, False),
        "torch, SDPA, one CUDA graph": (model, True),
    }
    for system, (form, graph) in forms.items():
        with record.attempt(f"{of}, {system}"):
            steps[system] = _Decoding(card, model, form, graph=graph).run
        with record.attempt(f"{of}, prompt, {system}"):
            prompts[system] = _prompt(card, form, shape, graph=graph)
    if not record.has_time(f"{of}, what torch compiles"):
        return
    # Compiling changes modules in place: the same weights in a second model.
    twin = make_model(shape, card, weights=model)
    for layer in twin.model.layers:
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            card.compile_module(module)
    system = "torch, SDPA, MLPs and norms compiled, one CUDA graph"
    with record.attempt(f"{of}, {system}"):
        started = time.perf_counter()
        steps[system] = _Decoding(card, twin, twin, graph=True).run
        record.say(f"{of}, {system}: ready after {time.perf_counter() - started:.1f} s")
    with record.attempt(f"{of}, prompt, {system}"):
        prompts[system] = _prompt(card, twin, shape, graph=True)
    if whole and record.has_time(f"{of}, torch.compile"):
        system = "torch, SDPA, torch.compile(reduce-overhead, fullgraph)"
        with record.attempt(f"{of}, {system}"):
            started = time.perf_counter()
            compiled = make_model(shape, card, weights=model)
            card.compile_module(compiled, mode="reduce-overhead", fullgraph=True)
            steps[system] = _Decoding(card, model, compiled, graph=False).run
            record.say(f"{of}, {system}: ready after {time.perf_counter() - started:.1f} s")


def make_model(shape: Shape, card: Card, *, weights: Any = None) -> Any:
    """A model of random float16 weights, made on the card; with `weights`, one that shares those of another model."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta" if weights is not None else card.name):
            model = Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    if weights is not None:
        model.load_state_dict(weights.state_dict(), assign=True)
        model.model.rotary_emb = weights.model.rotary_emb  # its buffers are no part of a state
        model.tie_weights()
    return model


def _cache_argument(model: Any) -> str:
    """What transformers calls it changed with 5.2x."""
    return "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"


class _Decoding:
    """A step of torch after PAST tokens, with a static cache. It waits for its answer."""

    def __init__(self, card: Card, reader: Any, model: Any, *, graph: bool) -> None:
        self._card = card
        self._cache = StaticCache(config=reader.config, max_cache_len=CAPACITY)
        kept = {_cache_argument(reader): self._cache, "use_cache": True}
        ids = torch.randint(2, min(reader.config.vocab_size, 4000), (1, PAST), device=card.name)
        reader(ids, **kept, logits_to_keep=1)
        token = torch.full((1, 1), 7, device=card.name)

        def step() -> torch.Tensor:
            found: torch.Tensor = model(token, **kept, logits_to_keep=1).logits
            return found

        self._reset()
        self._step = card.captured(step) if graph else step
        self._reset()

    def run(self) -> None:
        if self._count == CAPACITY - PAST - 8:
            self._reset()
        self._count += 1
        self._step()
        self._card.wait()

    def _reset(self) -> None:
        """Each step adds a token; attention always goes over the whole capacity, so that its time stays what it is."""
        self._count = 0
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(PAST)


def _prompt(card: Card, model: Any, shape: Shape, *, graph: bool) -> Callable[[], None]:
    ids = torch.randint(2, min(shape.vocabulary, 4000), (1, PAST), device=card.name)

    def step() -> torch.Tensor:
        kept = {_cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
        found: torch.Tensor = model(ids, **kept, logits_to_keep=1).logits
        return found

    taken = card.captured(step) if graph else step

    def run() -> None:
        taken()
        card.wait()

    return run
