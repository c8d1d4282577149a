"""Encoders of BERT's kind with random weights: a float16 artifact, built for cuda by onnxpress, beside torch on the same card."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import roof
import torch
from card import Card
from record import Record
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

import onnxpress
from onnxpress.artifact import Artifact
from onnxpress.runtime.loading import open_session

Arrays = dict[str, np.ndarray[Any, Any]]
Answer = Callable[[], np.ndarray[Any, Any]]

SHAPES: dict[str, dict[str, int]] = {
    "minilm-l6": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
CASES = {"1 x 32": (1, 32), "1 x 128": (1, 128), "64 x 128": (64, 128), "64 x 16–128": (64, 128)}
MIXED = "64 x 16–128"  # lengths of real texts in one batch, padded to the longest
ALLOWED = 0.01  # largest difference of a number in embeddings of length 1 from torch's at float32


def measure(record: Record, card: Card, name: str, folder: Path, *, tiny: bool, whole: bool) -> None:
    """Milliseconds of a batch: with inputs and outputs on the card, and from numpy to numpy. whole: torch.compile of it all, too."""
    of = f"encoder {name}, float16"
    if not record.has_time(of):
        return
    config = TINY if tiny else SHAPES[name]
    model: Path | None = None
    session: Any = None
    with record.attempt(f"{of}, weights"):
        model = save_model(folder / name, config, vocabulary=200 if tiny else 30522)
    if model is None:
        return
    with record.attempt(f"{of}, onnxpress"):
        session = open_session(build(folder, name), providers=card.providers())
        record.say(f"{of}: the artifact is built and open")
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    encoders = _Encoders(card, model)
    for case, (batch, length) in CASES.items():
        if not record.has_time(f"{of}, {case}"):
            continue
        with record.attempt(f"{of}, {case}"):
            size = (min(batch, 4), min(length, 16)) if tiny else (batch, length)
            feeds = tokens(*size, 150 if tiny else 20000, mixed=case == MIXED)
            _measure_case(record, of, case, feeds, config, encoders, session, whole=whole)
        card.free()


def _measure_case(
    record: Record,
    of: str,
    case: str,
    feeds: Arrays,
    config: dict[str, int],
    encoders: _Encoders,
    session: Any,
    *,
    whole: bool,
) -> None:
    on_card: dict[str, Callable[[], Any]] = {}
    from_numpy: dict[str, Answer] = {}
    if session is not None:
        own = {spec.name: feeds.get(spec.name, np.zeros_like(feeds["input_ids"])) for spec in session.signature.inputs}
        output = session.output_names[0]
        from_numpy["onnxpress"] = lambda: session.run(own)[output]
        with record.attempt(f"{of}, {case}, onnxpress, on the card"):
            on_card["onnxpress"] = session.buffers(own).run if encoders.card.real else from_numpy["onnxpress"]
    if "onnxpress" in on_card and encoders.card.real:
        # Once alone: a peer that fails on the card can take the whole process's use of it along.
        for system, alone in record.take_turns(f"{of}, {case}, alone", on_card).items():
            record.add(of, f"{case}, alone", system, **{"ms on the card": alone})
    with torch.inference_mode():
        reference = _Torch(encoders, feeds, attention="eager", precise=True).answer()
        for system, options in _peers(whole=whole, padded=not feeds["attention_mask"].all()).items():
            if "compiled" in options and not record.has_time(f"{of}, {case}, {system}"):
                continue
            with record.attempt(f"{of}, {case}, {system}"):
                started = time.perf_counter()
                peer = _Torch(encoders, feeds, **options)
                peer.answer()
                on_card[system], from_numpy[system] = peer.run, peer.answer
                record.say(f"{of}, {case}, {system}: ready after {time.perf_counter() - started:.1f} s")
        differences: dict[str, float] = {}
        for system, answer in from_numpy.items():
            with record.attempt(f"{of}, {case}, {system}"):
                answer()
                found = float(np.abs(answer() - reference).max())  # of a replay
                if not found <= ALLOWED:
                    raise ValueError(f"answers differ from torch's float32 by {found:.3g}, {ALLOWED} is allowed")
                differences[system] = found
        right = {system: call for system, call in on_card.items() if system in differences}
        times = record.take_turns(f"{of}, {case}, on the card", right)
        outside = record.take_turns(f"{of}, {case}, numpy to numpy", {name: from_numpy[name] for name in differences})
    lengths = feeds["attention_mask"].sum(1)
    rate = roof.product_rate(record)
    for system, difference in differences.items():
        numbers: dict[str, Any] = {}
        if system in times:
            numbers["ms on the card"] = times[system]
            seconds = statistics.median(times[system]) / 1000
            numbers["texts/s"] = len(lengths) / seconds
            if rate is not None and len(lengths) > 1:
                numbers["of the product roof"] = operations(config, lengths) / seconds / 1e12 / rate
        if system in outside:
            numbers["ms numpy to numpy"] = outside[system]
        record.add(of, case, system, **numbers, difference=difference)


def _peers(*, whole: bool, padded: bool) -> dict[str, dict[str, Any]]:
    """Forms of torch. Rows that are all full can do without a mask, which lets its attention take other kernels: tried, too."""
    peers: dict[str, dict[str, Any]] = {
        "torch, eager attention": {"attention": "eager"},
        "torch, SDPA": {"attention": "sdpa"},
        "torch, SDPA, one CUDA graph": {"attention": "sdpa", "graph": True},
        "torch, SDPA, layers compiled, one CUDA graph": {"attention": "sdpa", "compiled": "layers", "graph": True},
    }
    if whole:
        peers["torch, SDPA, torch.compile(reduce-overhead)"] = {"attention": "sdpa", "compiled": "whole"}
    if not padded:
        peers["torch, SDPA without a mask, one CUDA graph"] = {"attention": "sdpa", "graph": True, "mask": False}
    return peers


class _Encoders:
    """Models on the card, each opened once."""

    def __init__(self, card: Card, folder: Path) -> None:
        self.card = card
        self._folder = folder
        self._open: dict[tuple[str, str, bool], _Embedding] = {}

    def get(self, attention: str, compiled: str, *, precise: bool) -> _Embedding:
        """compiled: "layers", "whole" or nothing. precise: in float32, as everything on the CPU."""
        key = (attention, compiled, precise)
        if key not in self._open:
            dtype = torch.float32 if precise or not self.card.real else torch.float16
            encoder = AutoModel.from_pretrained(
                self._folder, attn_implementation=attention, dtype=dtype, add_pooling_layer=False
            )
            module = _Embedding(encoder.eval().to(self.card.name))
            if compiled == "layers":
                for layer in encoder.encoder.layer:
                    self.card.compile_module(layer)
            elif compiled == "whole":
                self.card.compile_module(module, mode="reduce-overhead")
            self._open[key] = module
        return self._open[key]


class _Torch:
    """A text's mean state, of length 1, as onnxpress answers it. run: on the card, and waits. answer: from numpy to numpy."""

    def __init__(
        self,
        encoders: _Encoders,
        feeds: Arrays,
        *,
        attention: str,
        precise: bool = False,
        mask: bool = True,
        compiled: str = "",
        graph: bool = False,
    ) -> None:
        self._card = encoders.card
        self._feeds = {name: torch.from_numpy(array) for name, array in feeds.items()}
        if not mask:
            del self._feeds["attention_mask"]
        self._inputs = {name: tensor.to(self._card.name, copy=True) for name, tensor in self._feeds.items()}
        module = encoders.get(attention, compiled, precise=precise)

        def step() -> torch.Tensor:
            found: torch.Tensor = module(**self._inputs)
            return found

        self._step = self._card.captured(step) if graph else step

    def run(self) -> None:
        self._step()
        self._card.wait()

    def answer(self) -> np.ndarray[Any, Any]:
        for name, tensor in self._feeds.items():
            self._inputs[name].copy_(tensor)
        found: np.ndarray[Any, Any] = self._step().cpu().numpy()
        return found


class _Embedding(torch.nn.Module):
    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            mean = states.mean(1)
        else:
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean.float(), dim=-1)


def tokens(batch: int, length: int, most: int, *, mixed: bool) -> Arrays:
    """Random ids, int64 (batch, length). mixed: rows from an eighth of `length` on, evenly, one of them full, in any order."""
    random = np.random.default_rng(0)
    lengths = random.permutation(np.linspace(length // 8, length, batch).round()) if mixed else np.full(batch, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return {"input_ids": random.integers(5, most, (batch, length)) * mask, "attention_mask": mask}


def operations(config: dict[str, int], lengths: np.ndarray[Any, Any]) -> float:
    """Multiplications and additions that the tokens of a batch need; padding needs none."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    products = 2.0 * (4 * hidden * hidden + 2 * hidden * wide) * lengths.sum()
    attention = 2.0 * 2 * hidden * (lengths.astype(np.float64) ** 2).sum()
    return float(config["num_hidden_layers"] * (products + attention))


def save_model(folder: Path, config: dict[str, int], *, vocabulary: int) -> Path:
    """A folder with random weights and a tokenizer of a few words, which nothing here asks. Kept where it is there already."""
    if not (folder / "modules.json").is_file():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=vocabulary, **config), add_pooling_layer=False).save_pretrained(folder)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        inner = Tokenizer(
            models.WordPiece({word: index for index, word in enumerate([*special, "a"])}, unk_token="[UNK]")
        )
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
        PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
        save_pooling(folder, config["hidden_size"])
    return folder


def save_pooling(folder: Path, width: int) -> None:
    """What sentence-transformers writes for the mean of the states, of length 1."""
    steps = ("Transformer", "Pooling", "Normalize")
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{step}" if index else "",
            "type": f"sentence_transformers.models.{step}",
        }
        for index, step in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def build(folder: Path, name: str) -> Artifact:
    """The artifact that `onnxpress build --target cuda` gives, in folder/NAME-cuda. Kept where it is there already."""
    out = folder / f"{name}-cuda"
    if (out / "manifest.json").is_file():
        return Artifact.open(out)
    return onnxpress.build(
        folder / name,
        out=out,
        task="feature-extraction",
        target="cuda",
        precision="fp16",
        keep_all=True,  # speed is asked for: with random weights there is no quality to lose
        measure=False,
        samples=24,
        calibration_samples=16,
    )
