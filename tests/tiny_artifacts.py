"""Tiny ONNX files, a tokenizer and whole artifacts for tests of the runtime, made without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from onnxpress.artifact import Artifact, ArtifactWriter
from onnxpress.devices import DEVICES
from onnxpress.manifest import Json, Manifest, Signature, TensorSpec
from onnxpress.on_device import this_machine

# The device that this machine is.
HERE = next(name for name, facts in DEVICES.items() if (facts.system, facts.machine) == this_machine())

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "red",
    "dog",
    "ran",
    "to",
    "##s",
    "##ing",
    "house",
    "play",
    ".",
    ",",
    "?",
)
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
DIM = 6
MAX_LENGTH = 16

SIGNATURE = Signature(
    task="feature-extraction",
    inputs=(
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"), bounds=(0, len(VOCABULARY) - 1)),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length"), bounds=(0, 1)),
    ),
    outputs=(TensorSpec(name="embeddings", dtype="float32", shape=("batch", DIM)),),
    axes={"batch": (1, 64), "length": (1, MAX_LENGTH)},
)


def save_tokenizer(folder: Path) -> Path:
    """A WordPiece tokenizer that adds [CLS] and [SEP], with padding and truncation of its own that are to be ignored."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def weights(width: int = DIM) -> np.ndarray[Any, Any]:
    """The table behind the tiny models, float32 (vocabulary, width)."""
    return np.random.default_rng(3).normal(size=(len(VOCABULARY), width)).astype(np.float32)


def save_embedder(path: Path) -> Path:
    """embeddings = mean over the unmasked tokens of the table's rows."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], name="rows"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT, name="mask"),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"], name="mask3"),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"], name="kept"),
        helper.make_node("ReduceSum", ["kept", "length_axis"], ["sum"], keepdims=0, name="sum"),
        helper.make_node("ReduceSum", ["mask3", "length_axis"], ["count"], keepdims=0, name="count"),
        helper.make_node("Div", ["sum", "count"], ["embeddings"], name="mean"),
    ]
    constants = {"table": weights(), "last": np.array([2]), "length_axis": np.array([1])}
    return _save(path, nodes, constants, {"embeddings": ["batch", DIM]})


def save_per_token(path: Path, outputs: Mapping[str, int | None]) -> Path:
    """Each output is a table looked up by token; width None gives (batch, length), else (batch, length, width)."""
    nodes, constants, shapes = [], {}, {}
    for name, width in outputs.items():
        table = np.random.default_rng(len(name)).normal(scale=2.0, size=(len(VOCABULARY), width or 1))
        constants[f"{name}_table"] = (table if width else table[:, 0]).astype(np.float32)
        nodes.append(helper.make_node("Gather", [f"{name}_table", "input_ids"], [name], name=name))
        shapes[name] = ["batch", "length", *([width] if width else [])]
    nodes.append(helper.make_node("Identity", ["attention_mask"], ["unused"], name="unused"))
    return _save(path, nodes, constants, shapes)


def save_per_text(path: Path, labels: int) -> Path:
    """logits (batch, labels) = the table's row of the second token."""
    nodes = [
        helper.make_node("Gather", ["input_ids", "second"], ["token"], axis=1, name="token"),
        helper.make_node("Gather", ["table", "token"], ["logits"], name="logits"),
        helper.make_node("Identity", ["attention_mask"], ["unused"], name="unused"),
    ]
    return _save(path, nodes, {"table": weights(labels), "second": np.array(1)}, {"logits": ["batch", labels]})


def save_artifact(destination: Path, measured: Mapping[str, Json] | None = None, **changes: Any) -> Artifact:
    """A whole artifact of a tiny embedder, with golden outputs. changes: fields of the manifest."""
    with ArtifactWriter(destination) as writer:
        fill(writer.folder)
        writer.seal(manifest(**changes))
        writer.write_measured(measured or {}, "<html></html>")
        return writer.publish()


def fill(folder: Path) -> None:
    """Model, tokenizer and golden outputs."""
    save_tokenizer(folder)
    save_embedder(folder / "model.onnx")
    ids, mask = np.array([[2, 5, 6, 3], [2, 7, 3, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    feeds = {"input_ids": ids, "attention_mask": mask}
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tensors = {f"input.pair.{name}": array for name, array in feeds.items()}
    save_file({**tensors, "output.pair.embeddings": session.run(None, feeds)[0]}, folder / "golden.safetensors")


def manifest(**changes: Any) -> Manifest:
    """The tiny embedder's manifest; options are added to its own, other fields replaced."""
    options = {
        "max_length": MAX_LENGTH,
        "pad_token_id": 0,
        "golden_tolerance": {"embeddings": 1e-6},
        "dim": DIM,
        "pooled": True,
        "normalized": False,
    }
    content: dict[str, Any] = {
        "name": "tiny",
        "target": "cpu",
        "precision": "fp32",
        "signature": SIGNATURE,
        "session": {"disabled_optimizers": ["SkipLayerNormFusion"]},
        "recipe": {},
        "ledger": (),
        "versions": {},
        "minimum_onnxruntime": "1.30",
        "operators": {},
        "files": {},
    }
    return Manifest(**{**content, **changes, "options": {**options, **changes.get("options", {})}})


def _save(path: Path, nodes: list[Any], constants: Mapping[str, Any], outputs: Mapping[str, list[Any]]) -> Path:
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
