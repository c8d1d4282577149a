"""What PyTorch's own exporters write goes through all lossless passes: every attention, Gelu and norm is fused.

Both exporters (torch.export based, and TorchScript based), opsets 17 to 23, attention as one call (SDPA) and spelled
out (eager), without a mask, with an added mask, and with a bool mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import CONFIGS, spread_weights
from torch import nn
from torch.nn import functional
from transformers import AutoModel, BertConfig, BertModel

from onnxpress.exporters.quiet import quiet
from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.dependencies import Group, attention_heads, follow_heads
from onnxpress.optimizers.heads import swap_last_axes
from onnxpress.optimizers.layers import find_layers
from onnxpress.optimizers.slicing import cut
from onnxpress.optimizers.targets import target

WIDTH, HEADS, LAYERS = 32, 4, 2
TOLERANCE = 1e-5  # float32, activations of size 1; seen: 8e-7
SHAPES = ((1, 1), (2, 7), (3, 20))
NORMS = ("LayerNormalization", "RMSNormalization")
UNFUSED = {"Softmax", "Erf", "Tanh", "ReduceMean", "Sqrt", "IsNaN"}


class EncoderLayer(nn.Module):
    """Attention and feed-forward with residuals. mask: None, "added" or "bool"."""

    def __init__(self, attention: str, mask: str | None, approximate: str = "none") -> None:
        super().__init__()
        self.attention, self.mask, self.approximate = attention, mask, approximate
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm_attention, self.norm_output = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = x.shape  # padding: (batch, length) int64, 1 where there is a token
        query, key, value = (
            layer(x).view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask: torch.Tensor | None = None
        if padding is not None:
            mask = padding[:, None, None, :].to(torch.bool).expand(batch, 1, length, length)
            if self.mask == "added":
                mask = (1.0 - mask.to(x.dtype)) * torch.finfo(x.dtype).min
        if self.attention == "sdpa":
            heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
            if mask is not None:
                scores = scores + mask if self.mask == "added" else scores.masked_fill(~mask, float("-inf"))
            heads = functional.softmax(scores, -1) @ value
        x = self.norm_attention(x + self.out(heads.transpose(1, 2).reshape(batch, length, WIDTH)))
        return self.norm_output(x + self.outer(functional.gelu(self.inner(x), approximate=self.approximate)))


class Encoder(nn.Module):
    """The last hidden states of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def export(
    module: nn.Module, example: dict[str, torch.Tensor], path: Path, *, opset: int, torchscript: bool = False
) -> Path:
    """Export plainly, as a user would."""
    axes: dict[str, Any]
    if torchscript:
        axes = {"dynamo": False, "dynamic_axes": {name: {0: "batch", 1: "length"} for name in example}}
    else:
        dynamic = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in example)
        axes = {"dynamo": True, "dynamic_shapes": dynamic, "verbose": False}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            path / "original.onnx",
            input_names=list(example),
            output_names=["y"],
            opset_version=opset,
            **axes,
        )
    return path / "original.onnx"


def pressed(path: Path) -> tuple[Graph, tuple[str, ...]]:
    """All lossless passes of the CPU target, in its order, and what they say."""
    graph = Graph(model=ir.load(path), signature=Signature(task="module", inputs=(), outputs=()))
    context = PassContext(target=target("cpu"))
    notes: list[str] = []
    for name in target("cpu").lossless:
        result = make_pass(name).apply(graph, context)
        graph = result.graph
        notes += result.notes
    ir.save(graph.model, path.with_name("pressed.onnx"))
    onnx.checker.check_model(path.with_name("pressed.onnx"))
    return graph, tuple(notes)


def assert_same(path: Path, feeds: list[dict[str, Any]]) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    original, given = (
        onnxruntime.InferenceSession(path.with_name(name), options, providers=["CPUExecutionProvider"])
        for name in ("original.onnx", "pressed.onnx")
    )
    for feed in feeds:
        (before,), (after,) = original.run(None, feed), given.run(None, feed)
        np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE)


def padding(batch: int, length: int) -> Any:
    """(batch, length) int64: each row four tokens shorter than the one before."""
    rows = np.arange(batch)[:, None]
    return (np.arange(length)[None, :] < np.maximum(1, length - 4 * rows)).astype(np.int64)


def layer_case(attention: str, mask: str | None, opset: int, *, torchscript: bool, path: Path, **more: Any) -> Graph:
    """Export one layer, press it, compare."""
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 5, WIDTH)}
    if mask is not None:
        example["padding"] = torch.ones(2, 5, dtype=torch.int64)
    export(EncoderLayer(attention, mask, **more), example, path, opset=opset, torchscript=torchscript)
    graph, notes = pressed(path / "original.onnx")
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((*shape, WIDTH)).astype(np.float32)} for shape in SHAPES]
    if mask is not None:
        feeds = [{**feed, "padding": padding(*shape)} for feed, shape in zip(feeds, SHAPES, strict=True)]
    assert_same(path / "original.onnx", feeds)
    assert not any("miss" in note for note in notes)
    return graph


def assert_fused(graph: Graph, layers: int) -> None:
    operators = graph.operators()
    assert operators["Attention"] == layers
    assert operators["Gelu"] == layers
    assert sum(operators.get(norm, 0) for norm in NORMS) >= 2 * layers
    assert not UNFUSED & set(operators)
    assert "Transpose" not in operators
    for node in graph.model.graph:
        if node.op_type == "Attention":
            assert node.attributes["q_num_heads"].as_int() == HEADS
            assert node.attributes["kv_num_heads"].as_int() == HEADS


@pytest.mark.parametrize("mask", [None, "added", "bool"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_torchscript_exporter_at_opset_17(attention: str, mask: str | None, tmp_path: Path) -> None:
    assert_fused(layer_case(attention, mask, 17, torchscript=True, path=tmp_path), 1)


@pytest.mark.parametrize(
    ("attention", "mask", "opset"),
    [
        ("sdpa", None, 18),
        ("sdpa", "added", 18),
        ("sdpa", "bool", 18),
        ("eager", "added", 18),
        ("eager", "bool", 18),
        ("sdpa", "bool", 20),
        ("eager", "added", 21),
        ("sdpa", None, 23),
        ("sdpa", "bool", 23),
        ("eager", "bool", 23),
    ],
)
def test_current_exporter(attention: str, mask: str | None, opset: int, tmp_path: Path) -> None:
    assert_fused(layer_case(attention, mask, opset, torchscript=False, path=tmp_path), 1)


@pytest.mark.parametrize(("opset", "torchscript"), [(17, True), (18, False), (20, False)])
def test_the_tanh_form_of_gelu_is_told_apart(opset: int, torchscript: bool, tmp_path: Path) -> None:
    graph = layer_case("sdpa", None, opset, torchscript=torchscript, path=tmp_path, approximate="tanh")
    assert_fused(graph, 1)
    (gelu,) = [node for node in graph.model.graph if node.op_type == "Gelu"]
    assert gelu.attributes["approximate"].as_string() == "tanh"


@pytest.mark.parametrize(("attention", "opset"), [("sdpa", 18), ("eager", 18), ("sdpa", 23)])
def test_bert(attention: str, opset: int, tmp_path: Path) -> None:
    """A transformers model, exported without any help, padded rows included."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    example = {"input_ids": torch.randint(0, 100, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    export(BertModel(config, add_pooling_layer=False), example, tmp_path, opset=opset)
    graph, notes = pressed(tmp_path / "original.onnx")
    assert_fused(graph, LAYERS)
    assert not any("miss" in note for note in notes)
    masks = {node.inputs[3] for node in graph.model.graph if node.op_type == "Attention"}
    assert len(masks) == 1  # built once, read by every layer
    random = np.random.default_rng(0)
    feeds = [{"input_ids": random.integers(0, 100, shape), "attention_mask": padding(*shape)} for shape in SHAPES]
    assert_same(tmp_path / "original.onnx", feeds)


@pytest.mark.parametrize(
    ("model", "attention", "opset"),
    [
        ("bert", "eager", 17),  # TorchScript's exporter: whether the mask has one head or all is not known
        ("bert", "sdpa", 17),
        ("bert", "eager", 18),
        ("bert", "sdpa", 18),
        ("bert", "eager", 23),
        ("bert", "sdpa", 23),
        ("modernbert", "eager", 18),  # queries and keys are turned, so that attention is not fused
        ("modernbert", "sdpa", 18),
        ("mpnet", "eager", 18),  # a bias for each head, the same in all layers
    ],
)
def test_heads_go_whether_their_attention_is_fused_or_not(
    model: str, attention: str, opset: int, tmp_path: Path
) -> None:
    """A file without some heads answers like one whose output projections read zeros from them."""
    torch.manual_seed(0)
    module = AutoModel.from_config(CONFIGS[model](), attn_implementation=attention)
    spread_weights(module)
    example = {"input_ids": torch.randint(5, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    path = export(Encoder(module), example, tmp_path, opset=opset, torchscript=opset == 17).rename(
        tmp_path / "exported.onnx"
    )
    random = np.random.default_rng(0)
    feeds = [{"input_ids": random.integers(5, 99, shape), "attention_mask": padding(*shape)} for shape in SHAPES]
    for passes in (("fold", "fuse-attention"), ("fold",)):
        if opset == 17 and len(passes) == 1:
            continue  # sizes are not known well enough
        graph = Graph(model=ir.load(path), signature=Signature(task="module", inputs=(), outputs=()))
        for name in passes:
            graph = make_pass(name).apply(graph, PassContext(target=target("cpu"))).graph
        swap_last_axes(graph)
        groups: dict[ir.Node, Group] = {}
        for node in graph.model.graph:
            if attention_heads(node) is not None and not any(
                node.outputs[0] in group.cuts for group in groups.values()
            ):
                groups[node] = follow_heads(node, [0, 2])
        one_operator = (attention, opset) == ("sdpa", 23) or (len(passes) == 2 and model != "modernbert")
        assert {node.op_type for node in groups} == {"Attention" if one_operator else "Softmax"}
        assert len(find_layers(graph)) == module.config.num_hidden_layers
        projections = [weight for group in groups.values() for weight in with_zeros(group)]
        assert len(projections) == module.config.num_hidden_layers
        ir.save(graph.model, tmp_path / "original.onnx")
        for node in groups:
            cut(graph, follow_heads(node, [0, 2]))
        assert [weight.shape for weight in projections] == [(WIDTH // 2, WIDTH)] * len(projections)
        ir.save(graph.model, tmp_path / "pressed.onnx")
        onnx.checker.check_model(tmp_path / "pressed.onnx")
        assert_same(tmp_path / "original.onnx", feeds)


def with_zeros(group: Group) -> Iterator[ir.Value]:
    """The weights that read what a group loses, which from now on are zeros there."""
    for value, (_, lost) in group.cuts.items():
        for use in value.uses():
            weight = use.node.inputs[1] if use.node.op_type == "MatMul" and use.idx == 0 else None
            if weight is not None and weight.is_initializer() and len(weight.shape or ()) == 2:
                array = weight.const_value.numpy().copy()  # type: ignore[union-attr]
                array[sorted(lost)] = 0
                weight.const_value = ir.tensor(array, name=weight.name)
                yield weight


def test_the_libraries_underneath_log_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a handler, Python writes warnings that are logged to the standard error stream."""
    layer_case("eager", "added", 17, torchscript=True, path=tmp_path)
    assert capfd.readouterr().err == ""
