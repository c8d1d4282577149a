"""Experts in blocks: operators and bytes, the numbers of the weights that they stand for, what is kept, and what is left alone."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_decoders import CONTEXT, make_model, step_on

from onnxpress.calibration import ActivationStream
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import export_causal_lm
from onnxpress.graph import Graph
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.experts import routers
from onnxpress.optimizers.rounding import Blocks, unpack
from onnxpress.optimizers.targets import target
from onnxpress.workbench import Workbench

pytestmark = pytest.mark.newest

CPU = target("cpu")
MOE, QMOE = "com.microsoft::MoE", "com.microsoft::QMoE"
EXPERTS = frozenset(f"model.layers.{layer}.mlp.experts" for layer in (0, 1))


@cache
def exported(name: str) -> Graph:
    model = make_model(name)
    return export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)


def quantized(name: str, precision: str, keep: frozenset[str] = frozenset(), **options: Any) -> PassResult:
    return make_pass(precision, options).apply(exported(name).clone(), PassContext(target=CPU, keep=keep))


def logits(graph: Graph, folder: Path) -> np.ndarray[Any, Any]:
    """After unequal prompts and after single tokens."""
    random, step = np.random.default_rng(0), step_on(graph, folder)
    parts = [[random.integers(0, 300, count).tolist() for count in counts] for counts in ((20, 3, 40), (1, 1, 1))]
    return np.concatenate([step.run(0, part).copy() for part in parts])


def error(graph: Graph, reference: np.ndarray[Any, Any], folder: Path) -> float:
    """Root mean square, beside that of the reference."""
    return float(np.sqrt(np.square(logits(graph, folder) - reference).mean() / np.square(reference).mean()))


def constant(node: ir.Node, place: int) -> np.ndarray[Any, Any]:
    value = node.inputs[place]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


@pytest.mark.parametrize(("precision", "bits"), [("int8-weights", 8), ("int4-weights", 4), ("int8-dynamic", 8)])
def test_no_float_copy_of_the_experts_is_left(precision: str, bits: int) -> None:
    result = quantized("qwen3-moe", precision)
    operators = result.graph.operators()
    assert (operators.get(MOE, 0), operators[QMOE]) == (0, 2)
    assert set(result.touched) >= EXPERTS
    assert f"2 mixtures of experts at {bits} bits, their routing in float" in result.notes
    initializers = result.graph.model.graph.initializers.values()
    stacks = [value for value in initializers if value.shape is not None and len(value.shape) == 3 and value.uses()]
    of_experts = [value for value in stacks if "experts" in str(value.name)]
    numbers = 2 * 4 * 3 * 64 * 32  # layers, experts, products, sizes
    assert sum(value.const_value.nbytes for value in of_experts if value.const_value) == numbers * bits // 8 + (
        numbers // 32 * 4  # scales
    )
    assert not [value for value in initializers if "experts" in str(value.name) and value not in of_experts]


@pytest.mark.parametrize("options", [{}, {"search": True}, {"block_size": 16}])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_blocks_answer_like_the_weights_they_stand_for(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    every = frozenset(
        str(node.name) for node in exported(name).model.graph if node.op_type in ("MatMul", "Gemm", "Gather")
    )
    pressed = quantized(name, "int8-weights", keep=every, **options).graph
    assert pressed.operators()[QMOE] == 2
    assert "com.microsoft::MatMulNBits" not in pressed.operators()
    same = exported(name).clone()
    rounded = {node.name: node for node in pressed.model.graph if node.op_type == "QMoE"}
    for node in same.model.graph:
        if node.op_type != "MoE":
            continue
        new = rounded[node.name]
        size = new.attributes["block_size"].as_int()
        for place, blocks, scales in ((2, 2, 3), (4, 5, 6)):
            of_scales = constant(new, scales)
            found = Blocks(
                packed=constant(new, blocks).reshape(-1, of_scales.shape[2], size),
                scales=of_scales.reshape(-1, of_scales.shape[2]),
                zero_points=None,
            )
            weight = unpack(found, bits=8, block_size=size).reshape(constant(node, place).shape)
            value = node.inputs[place]
            assert value is not None
            value.const_value = ir.tensor(weight, name=value.name)
    assert error(pressed, logits(same, tmp_path), tmp_path) < 0.02  # the kernel rounds activations to 8 bits


def test_more_bits_and_searched_ranges_lose_less(tmp_path: Path) -> None:
    reference = logits(exported("qwen3-moe"), tmp_path)
    plain = error(quantized("qwen3-moe", "int4-weights").graph, reference, tmp_path)
    searched = error(quantized("qwen3-moe", "int4-weights", search=True).graph, reference, tmp_path)
    kept = quantized("qwen3-moe", "int4-weights", keep=EXPERTS)
    assert {
        node.attributes["expert_weight_bits"].as_int() for node in kept.graph.model.graph if node.op_type == "QMoE"
    } == {8}
    eight = error(quantized("qwen3-moe", "int8-weights").graph, reference, tmp_path)
    assert eight < 0.05
    assert eight < error(kept.graph, reference, tmp_path) < plain < 0.5
    assert searched < plain


def test_what_is_kept_stays_in_float() -> None:
    for precision in ("int8-weights", "int8-dynamic"):
        graph = quantized("qwen3-moe", precision, keep=EXPERTS).graph
        assert (graph.operators()[MOE], graph.operators().get(QMOE, 0)) == (2, 0)


def test_experts_for_cuda_stay_in_float() -> None:
    result = make_pass("int4-weights").apply(exported("qwen3-moe").clone(), PassContext(target=target("cuda")))
    assert (result.graph.operators()[MOE], result.graph.operators().get(QMOE, 0)) == (2, 0)
    assert any("2 mixtures of experts stay in float" in note for note in result.notes)


def test_where_experts_are_no_operator_the_layers_that_choose_them_stay_in_float_too() -> None:
    """Llama 4's, which compute for themselves; and it is said that their weights stay in float."""
    found = routers(exported("llama4"))
    assert found
    assert all("router" in one for one in found), found
    for precision in ("int4-weights", "int8-dynamic"):
        result = quantized("llama4", precision, minimum_elements=16)
        assert not found & set(result.touched)
        assert any(re.search(r"stacks of weights .*, \d\d % of all, stay in float", note) for note in result.notes), (
            result.notes
        )
    for name in ("llama", "qwen3-moe", "deepseek-v3.2"):
        assert not any("stacks" in note for note in quantized(name, "int4-weights").notes)


@pytest.mark.parametrize("name", ["qwen3-moe", "glm4-moe", "granite-moe"])
def test_the_layers_that_choose_experts_stay_in_float(name: str) -> None:
    found = routers(exported(name))
    assert len(found) == exported(name).operators()[MOE]
    assert all("gate" in one or "router" in one for one in found), found
    for precision in ("int4-weights", "int8-dynamic"):
        result = quantized(name, precision, minimum_elements=16)
        assert not found & set(result.touched)
        left = {str(node.name) for node in result.graph.model.graph if node.op_type in ("MatMul", "Gemm")}
        assert found <= left


def test_widths_that_no_block_divides_stay_in_float() -> None:
    graph = exported("qwen3-moe").clone()
    for node in graph.model.graph:
        if node.op_type == "MoE":
            for place, axis in ((2, 1), (4, 2)):
                value = node.inputs[place]
                assert value is not None
                cut = constant(node, place).take(range(40 if axis == 1 else 20), axis=axis)
                value.const_value, value.shape = ir.tensor(cut, name=value.name), ir.Shape(cut.shape)
    result = make_pass("int4-weights").apply(graph, PassContext(target=CPU))
    assert result.graph.operators()[MOE] == 2
    assert any("no block size divides its input widths 64 and 20; kept in float" in note for note in result.notes)


def test_error_feedback_goes_on_around_rounded_experts(tmp_path: Path) -> None:
    graph = exported("qwen3-moe").clone()
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        spec.name: np.zeros((2, *(64 if axis == "capacity" else axis for axis in spec.shape[1:])), np.float32)
        for spec in graph.signature.inputs
        if spec.name.startswith("past_key_values")
    } | {
        "input_ids": random.integers(0, 300, (2, 40)),
        "past_lengths": np.zeros(2, np.int32),
        "lengths": np.full(2, 40, np.int32),
        "logit_indices": np.arange(80),
    }
    stream = partial(
        ActivationStream, open_session=Workbench(tmp_path / "work", CPU).open, inputs=lambda: iter([feeds])
    )
    result = make_pass("int4-weights", {"method": "gptq"}).apply(graph, PassContext(target=CPU, stream=stream))
    assert result.graph.operators()[QMOE] == 2
    assert "experts are rounded to the nearest: gptq does not follow which tokens reach which" in result.notes
    reference = logits(exported("qwen3-moe"), tmp_path)
    plain = quantized("qwen3-moe", "int4-weights").graph
    assert error(result.graph, reference, tmp_path) < error(plain, reference, tmp_path)


def test_experts_are_between_the_copies_for_prompts(tmp_path: Path) -> None:
    blocks = quantized("qwen3-moe", "int4-weights").graph
    both = make_pass("int8-prompts").apply(blocks.clone(), PassContext(target=CPU)).graph
    kinds = [node.op_type for node in both.model.graph if node.op_type in ("If", "QMoE")]
    assert kinds == ["If", "QMoE", "If", "QMoE"]
    assert both.operators()[QMOE] == 2
    step, same = step_on(both, tmp_path), step_on(blocks, tmp_path)
    for part in ([[5, 6, 7], [8]], [[9], [10]]):  # padded, and short: no int8 copy is read
        np.testing.assert_array_equal(step.run(0, part).copy(), same.run(0, part).copy())
