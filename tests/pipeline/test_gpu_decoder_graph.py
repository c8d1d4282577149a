"""The graph that benchmarks/gpu writes is the one that the product builds, and computes Qwen2."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers as tf
from tiny_decoders import CONTEXT, VOCABULARY, save_decoder

import onnxpress

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import decoder_graph

SHAPE = decoder_graph.Shape(
    layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=VOCABULARY, tied=False, context=CONTEXT
)
PRECISIONS = {16: "fp16", 4: "int4-weights"}


def described(model: onnx.ModelProto) -> dict[str, Any]:
    """What a graph is made of: operators with their attributes, inputs and outputs, and the sizes of its large constants."""
    operators: Counter[str] = Counter()
    for node in model.graph.node:
        names = sorted(attribute.name for attribute in node.attribute if attribute.name not in DEFAULTS)
        operators[f"{node.domain}::{node.op_type} {' '.join(names)} of {len(node.input)}"] += 1
    values = [*model.graph.input, *model.graph.output]
    types = [value.type.tensor_type for value in values]
    return {
        "operators": operators,
        "values": {
            value.name: (kind.elem_type, [axis.dim_param or axis.dim_value for axis in kind.shape.dim])
            for value, kind in zip(values, types, strict=True)
        },
        "weights": Counter(
            (item.data_type, tuple(item.dims)) for item in model.graph.initializer if np.prod(item.dims) > 1000
        ),
    }


# Attributes that the exporter writes although they are what is meant without them.
DEFAULTS = ("allowzero", "axis", "alpha", "beta", "transA")


@pytest.mark.newest
@pytest.mark.parametrize("bits", PRECISIONS)
def test_it_is_what_a_build_for_cuda_gives(bits: int, tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "qwen2")
    built = onnxpress.build(
        folder,
        out=tmp_path / "built",
        task="text-generation",
        target="cuda",
        precision=PRECISIONS[bits],
        keep_all=True,
        measure=False,
        samples=8,
        calibration_samples=4,
    )
    path, signature = decoder_graph.write(SHAPE, bits, tmp_path / "written")
    ours, theirs = described(onnx.load(path, load_external_data=False)), described(onnx.load(built.path / "model.onnx"))
    assert ours["operators"] == theirs["operators"]
    assert ours["values"] == theirs["values"]
    assert ours["weights"] == theirs["weights"]
    assert signature == built.manifest.signature


def test_it_computes_qwen2(tmp_path: Path) -> None:
    """A prompt, then a step, against transformers with the same weights; float16 against float32."""
    path, _ = decoder_graph.write(SHAPE, 16, tmp_path)
    weights = tmp_path / decoder_graph.WEIGHTS
    large = np.random.default_rng(5).normal(0, 0.2, weights.stat().st_size // 2)  # or attention is nearly uniform
    large.astype(np.float16).tofile(weights)
    model = torch_model(weights, path)
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (1, 12))
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits[0].numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    capacity = (1, SHAPE.kv_heads, 16, SHAPE.head)
    kept = {f"{layer}.{kind}": np.zeros(capacity, np.float16) for layer in range(2) for kind in ("key", "value")}
    found: list[Any] = []
    for past, length in ((0, 11), (11, 1)):
        feeds = {
            "input_ids": ids[:, past : past + length],
            "past_lengths": np.array([past], np.int32),
            "lengths": np.array([length], np.int32),
            "logit_indices": np.arange(length),
            "total_length": np.array(past + length, np.int32),
            **{f"past_key_values.{name}": array for name, array in kept.items()},
        }
        names = ["logits", *(f"present.{name}" for name in kept)]
        logits, *presents = session.run(names, feeds)
        kept = dict(zip(kept, presents, strict=True))
        found.extend(logits)
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.array(found), expected, atol=0.02 * float(np.abs(expected).max()))


def torch_model(weights: Path, graph: Path) -> Any:
    """transformers' Qwen2 at float32 with the weights that the graph reads."""
    numbers = np.fromfile(weights, np.float16).astype(np.float32)
    (bias,) = (item for item in onnx.load(graph, load_external_data=False).graph.initializer if item.name == "bias")
    query, width = SHAPE.heads * SHAPE.head, (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(numbers[: rows * columns].reshape(rows, columns).copy())

    model = tf.Qwen2ForCausalLM(
        tf.Qwen2Config(
            vocab_size=SHAPE.vocabulary,
            hidden_size=SHAPE.hidden,
            intermediate_size=SHAPE.intermediate,
            num_hidden_layers=SHAPE.layers,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.kv_heads,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
        )
    ).eval()
    state: dict[str, torch.Tensor] = {}
    packed = matrix(SHAPE.hidden, width).T.split([query, *[(width - query) // 2] * 2])
    biases = torch.from_numpy(onnx.numpy_helper.to_array(bias).astype(np.float32)).split([len(part) for part in packed])
    for layer in range(SHAPE.layers):
        prefix = f"model.layers.{layer}."
        for name, part, added in zip("qkv", packed, biases, strict=True):
            state[f"{prefix}self_attn.{name}_proj.weight"] = part
            state[f"{prefix}self_attn.{name}_proj.bias"] = added
        state[f"{prefix}self_attn.o_proj.weight"] = matrix(query, SHAPE.hidden).T
        for name in ("gate", "up"):
            state[f"{prefix}mlp.{name}_proj.weight"] = matrix(SHAPE.hidden, SHAPE.intermediate).T
        state[f"{prefix}mlp.down_proj.weight"] = matrix(SHAPE.intermediate, SHAPE.hidden).T
    state["model.embed_tokens.weight"] = state["lm_head.weight"] = matrix(SHAPE.vocabulary, SHAPE.hidden)
    kept = model.load_state_dict(state, strict=False)
    assert not kept.unexpected_keys
    assert all("norm" in name for name in kept.missing_keys)  # ones, as in the graph
    return model
