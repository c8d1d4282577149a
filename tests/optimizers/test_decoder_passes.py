"""Passes over a language model's attentions and norms: operators before and after, equal answers, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_decoders import CONTEXT, make_model

from onnxpress.calibration import Calibration
from onnxpress.errors import RecipeError
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import export_causal_lm
from onnxpress.graph import Graph
from onnxpress.graph_files import save
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.targets import target
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session
from onnxpress.workbench import Workbench

pytestmark = pytest.mark.newest

ATTENTION = "com.microsoft::GroupQueryAttention"


@cache
def exported(name: str) -> Graph:
    model = make_model(name)
    return export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)


def pressed(name: str, *passes: str) -> list[PassResult]:
    results, graph = [], exported(name).clone()
    for step in passes:
        results.append(make_pass(step).apply(graph, PassContext(target=target("cpu"))))
        graph = results[-1].graph.clone()
    return results


def logits(graph: Graph, folder: Path) -> np.ndarray[Any, Any]:
    """After unequal prompts, after unequal further parts up to the last position, and after single tokens."""
    save(graph, folder / "model.onnx")
    session = Session(folder / "model.onnx", signature=graph.signature)
    step = ModelStep(session, KeyValueCache(graph.signature.inputs, context=CONTEXT, budget=2**28))
    random = np.random.default_rng(0)
    found = [step.run(0, [random.integers(0, 300, count).tolist() for count in counts]).copy()
             for counts in ((20, 3, 110), (5, 30, 16), (1, 1, 1))]  # fmt: skip
    return np.concatenate(found)


def counts(graph: Graph, *names: str) -> tuple[int, ...]:
    operators: Mapping[str, int] = graph.operators()
    return tuple(operators.get(name, 0) for name in names)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "glm4", "cohere"])
def test_answers_stay_as_they_were(name: str, tmp_path: Path) -> None:
    before = logits(exported(name), tmp_path)
    for result in pressed(name, "fuse-skip-norm", "fuse-rotary", "pack-projections"):
        after = logits(result.graph, tmp_path)
        np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())


def test_sums_and_norms_become_one_operator() -> None:
    (result,) = pressed("llama", "fuse-skip-norm")
    names = ("SimplifiedLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
    assert counts(exported("llama"), *names) == (5, 0)
    assert counts(result.graph, *names) == (1, 4)  # the first norms the embeddings, which are no sum
    assert result.changes == 4
    assert any("its input is no sum" in note for note in result.notes)


def test_a_sum_that_broadcasts_is_left_alone() -> None:
    """Norms of queries and keys stand on reshaped values, norms with a mean are another operator."""
    (result,) = pressed("qwen3", "fuse-skip-norm")
    assert result.changes == 4
    assert pressed("gpt2", "fuse-skip-norm")[0].changes == 0


def test_rotary_embeddings_and_projections_go_into_the_attention() -> None:
    rotary, packed = pressed("qwen2", "fuse-rotary", "pack-projections")
    assert (rotary.changes, packed.changes) == (2, 2)
    assert counts(rotary.graph, "com.microsoft::RotaryEmbedding", "MatMul") == (0, 14)
    assert counts(packed.graph, "MatMul", ATTENTION) == (10, 2)
    attention = next(node for node in packed.graph.model.graph if node.op_type == "GroupQueryAttention")
    assert attention.inputs[1] is None
    assert attention.inputs[2] is None
    names = set(packed.graph.model.graph.initializers)
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names


def test_attentions_that_do_not_fit_say_why() -> None:
    rotary, packed = pressed("gpt2", "fuse-rotary", "pack-projections")
    assert (rotary.changes, packed.changes) == (0, 0)
    assert any("not turned by a RotaryEmbedding" in note for note in rotary.notes)
    rotary, packed = pressed("qwen3", "fuse-rotary", "pack-projections")
    assert (rotary.changes, packed.changes) == (2, 0)
    assert any("do not come from linear layers directly" in note for note in packed.notes)
    (packed,) = pressed("llama", "pack-projections")  # without fuse-rotary first
    assert packed.changes == 0


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "gpt2"])
def test_the_scale_of_an_attention_goes_into_its_queries(name: str, tmp_path: Path) -> None:
    """Into weights and biases, norms, or where neither is there alone (phi3, gpt-neox, gpt2) into a node."""
    before = logits(exported(name), tmp_path)
    rotary, scaled, packed = pressed(name, "fuse-rotary", "scale-queries", "pack-projections")
    attentions = [node for node in packed.graph.model.graph if node.op_type == "GroupQueryAttention"]
    assert scaled.changes == len(attentions) == 2
    assert {node.attributes["scale"].value for node in attentions} == {1.0}
    added = counts(scaled.graph, "Mul")[0] - counts(rotary.graph, "Mul")[0]
    assert added == (2 if name in ("phi3", "gpt-neox", "gpt2") else 0)
    np.testing.assert_allclose(logits(packed.graph, tmp_path), before, atol=2e-5 * np.abs(before).max())


def test_shared_weights_are_not_scaled_for_one_of_their_readers(tmp_path: Path) -> None:
    """Layers of one weight keep it, and their queries are scaled by a node; a norm that layers share is small, and copied."""
    for name, weight in (("llama", "self_attn.q_proj"), ("qwen3", "self_attn.q_norm")):
        model = make_model(name)
        layers = [layer.get_submodule(weight) for layer in model.model.layers]
        layers[1].weight = layers[0].weight
        graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)
        make_pass("deduplicate").apply(graph, PassContext(target=target("cpu")))
        before = logits(graph, tmp_path)
        muls = counts(graph, "Mul")[0]
        result = make_pass("scale-queries").apply(graph, PassContext(target=target("cpu")))
        assert counts(result.graph, "Mul")[0] - muls == (2 if name == "llama" else 0)
        np.testing.assert_allclose(logits(result.graph, tmp_path), before, atol=2e-5 * np.abs(before).max())


def test_what_is_scaled_or_packed_already_is_left_alone() -> None:
    assert pressed("opt", "scale-queries")[0].changes == 0  # its queries are scaled by the model
    *_, late = pressed("qwen2", "fuse-rotary", "pack-projections", "scale-queries")
    assert late.changes == 0
    assert any("its projections are packed" in note for note in late.notes)


def cached_in_int8(name: str, folder: Path, keep: frozenset[str] = frozenset()) -> PassResult:
    """Calibrated on other tokens than `logits` reads."""
    graph = exported(name).clone()
    random = np.random.default_rng(1)

    def inputs() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for length in (128, 60, 128):
            feeds = {
                spec.name: np.zeros(
                    (1, *(length if axis == "capacity" else axis for axis in spec.shape[1:])), np.float32
                )
                for spec in graph.signature.inputs
                if spec.name.startswith("past_key_values")
            }
            yield feeds | {
                "input_ids": random.integers(0, 300, (1, length)),
                "past_lengths": np.zeros(1, np.int32),
                "lengths": np.full(1, length, np.int32),
                "logit_indices": np.array([length - 1]),
            }

    observe = Calibration(Workbench(folder / "work", target("cpu")).open, inputs)
    for step in ("fuse-rotary", "pack-projections"):
        graph = make_pass(step).apply(graph, PassContext(target=target("cpu"))).graph
    context = PassContext(target=target("cpu"), observe=observe, keep=keep)
    return make_pass("int8-cache").apply(graph, context)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_cache_of_int8_answers_nearly_alike(name: str, tmp_path: Path) -> None:
    """One step of 8 bits is 0.8 % of a channel's largest value; these random models' attention is all but a choice, which tips."""
    result = cached_in_int8(name, tmp_path)
    assert result.changes == 2
    kinds = {spec.dtype for spec in result.graph.signature.inputs if spec.name.startswith("past_key_values")}
    assert (
        kinds == {spec.dtype for spec in result.graph.signature.outputs if spec.name.startswith("present")} == {"int8"}
    )
    before, after = logits(exported(name), tmp_path), logits(result.graph, tmp_path)
    assert 0 < np.square(after - before).mean() < 0.05**2 * np.square(before).mean()


def test_layers_that_are_kept_have_a_float_cache(tmp_path: Path) -> None:
    first = next(node for node in exported("llama").model.graph if node.op_type == "GroupQueryAttention")
    result = cached_in_int8("llama", tmp_path, keep=frozenset({str(first.outputs[0].name)}))
    kinds = [spec.dtype for spec in result.graph.signature.inputs if spec.name.startswith("past_key_values")]
    assert kinds == ["float32", "float32", "int8", "int8"]
    assert np.isfinite(logits(result.graph, tmp_path)).all()


def test_a_cache_of_another_kind_stays(tmp_path: Path) -> None:
    once = cached_in_int8("llama", tmp_path)
    context = PassContext(target=target("cpu"), observe=lambda *_: {})
    assert make_pass("int8-cache").apply(once.graph, context).changes == 0
    half = make_pass("fp16").apply(exported("llama").clone(), PassContext(target=target("cuda"))).graph
    with pytest.raises(RecipeError, match="takes a cache of float32"):
        make_pass("int8-cache").apply(half, context)


def test_a_cache_of_int8_needs_calibration_inputs() -> None:
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        make_pass("int8-cache").apply(exported("llama").clone(), PassContext(target=target("cpu")))


def last_logits(graph: Graph, lengths: list[int], folder: Path) -> np.ndarray[Any, Any]:
    """After first prompts of these lengths, all in one step."""
    save(graph, folder / "model.onnx")
    session = Session(folder / "model.onnx", signature=graph.signature)
    step = ModelStep(session, KeyValueCache(graph.signature.inputs, context=CONTEXT, budget=2**28))
    random = np.random.default_rng(1)
    return step.run(0, [random.integers(0, 300, length).tolist() for length in lengths]).copy()


def in_blocks(name: str, *, block_size: int = 32) -> Graph:
    graph, context = exported(name).clone(), PassContext(target=target("cpu"))
    for step in ("fuse-rotary", "pack-projections"):
        graph = make_pass(step).apply(graph, context).graph
    return make_pass("int4-weights", {"block_size": block_size}).apply(graph, context).graph


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "cohere", "mixtral", "gpt-neox"])
def test_prompts_read_int8_copies_and_short_steps_the_blocks(name: str, tmp_path: Path) -> None:
    blocks = in_blocks(name)
    both = make_pass("int8-prompts").apply(blocks.clone(), PassContext(target=target("cpu")))
    for lengths in ([1], [7], [2, 1, 2], [20, 5]):  # below 8 tokens, or with padding
        np.testing.assert_array_equal(
            last_logits(both.graph, lengths, tmp_path), last_logits(blocks, lengths, tmp_path)
        )
    if name == "mixtral":
        return  # a rounding that tips the choice of experts makes the answer jump, here and in int8-dynamic
    # For prompts it is as far from the blocks as int8-dynamic with weights of as many bits is from float.
    dynamic = make_pass("int8-dynamic").apply(exported(name).clone(), PassContext(target=target("cpu-avx2"))).graph
    for lengths in ([8], [60], [1] * 8, [20, 20]):
        found = []
        for before, after in ((blocks, both.graph), (exported(name), dynamic)):
            reference = last_logits(before, lengths, tmp_path)
            difference = last_logits(after, lengths, tmp_path) - reference
            found.append(float(np.sqrt(np.square(difference).mean() / np.square(reference).mean())))
        assert 0 < found[0] < 2 * found[1], (lengths, found)
        assert found[0] < 0.2, (lengths, found)


def test_memory_behind_the_tokens_does_not_decide_a_dynamic_scale(tmp_path: Path) -> None:
    """GroupQueryAttention writes nothing at padding: what was in memory stays there, any number or none."""
    graph = exported("gemma2").clone()
    dynamic = make_pass("int8-dynamic").apply(graph, PassContext(target=target("cpu"))).graph
    body = dynamic.model.graph
    cleaned = [node.outputs[0] for node in body if node.op_type == "Where" and "without_padding" in str(node.name)]
    assert len(cleaned) == 2
    body.outputs.extend(cleaned)
    save(dynamic, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    feeds: dict[str, Any] = {
        spec.name: np.zeros((3, *(64 if axis == "capacity" else axis for axis in spec.shape[1:])), np.float32)
        for spec in graph.signature.inputs
        if spec.name.startswith("past_key_values")
    }
    for counts in ([6, 6, 6], [6, 1, 3]):  # the first leaves its numbers in the memory of the second
        last = np.array(counts) - 1 + np.arange(3) * 6
        given = {"input_ids": np.full((3, 6), 7), "past_lengths": np.zeros(3, np.int32), "logit_indices": last}
        found = session.run(feeds | given | {"lengths": np.array(counts, np.int32)})
        for value in cleaned:
            for row, count in zip(found[str(value.name)], counts, strict=True):
                assert (row[:count] != 0).all()
                assert (row[count:] == 0).all()


def test_what_prompts_and_single_tokens_share_is_there_once() -> None:
    blocks = in_blocks("qwen2")
    result = make_pass("int8-prompts", {"from_tokens": 5}).apply(blocks.clone(), PassContext(target=target("cpu")))
    names = ("MatMulNBits", "DynamicQuantizeMatMul", "GatherBlockQuantized", "GroupQueryAttention", "Size")
    count = [sum(node.op_type == name for node in result.graph.model.graph) for name in names]
    assert count == [1, 0, 1, 0, 1]  # the output layer, whose rows are answers, and the table
    (choice,) = (node for node in result.graph.model.graph if node.op_type == "If")
    many, few = choice.attributes["then_branch"].as_graph(), choice.attributes["else_branch"].as_graph()
    assert [sum(node.op_type == name for node in many) for name in names] == [0, 10, 0, 2, 0]
    assert [sum(node.op_type == name for node in few) for name in names] == [10, 0, 0, 2, 0]
    assert result.changes == 10
    copies = [
        item.const_value.numpy()
        for name, item in result.graph.model.graph.initializers.items()
        if name.endswith("_8bit")
    ]
    assert len(copies) == 10
    assert all(np.abs(copy).max() == 63 for copy in copies)  # exact on CPUs without VNNI too
    assert [value.name for value in result.graph.model.graph.outputs] == [
        value.name for value in blocks.model.graph.outputs
    ]


def test_layers_that_are_kept_stay_in_blocks_for_prompts_too(tmp_path: Path) -> None:
    blocks = in_blocks("qwen2")
    products = [str(node.name) for node in blocks.model.graph if node.op_type == "MatMulNBits"]
    down = frozenset(name for name in products if "down" in name)
    assert len(down) == 2
    result = make_pass("int8-prompts").apply(blocks.clone(), PassContext(target=target("cpu"), keep=down))
    assert result.changes == 8
    assert result.graph.operators()["com.microsoft::MatMulNBits"] == 10 + 2 + 1
    every = make_pass("int8-prompts").apply(blocks.clone(), PassContext(target=target("cpu"), keep=frozenset(products)))
    assert every.changes == 0
    before = last_logits(blocks, [40], tmp_path)
    whole = make_pass("int8-prompts").apply(blocks.clone(), PassContext(target=target("cpu"))).graph
    errors = [np.square(last_logits(graph, [40], tmp_path) - before).mean() for graph in (whole, result.graph)]
    assert 0 < errors[1] < errors[0]


def test_int8_prompts_are_for_language_models() -> None:
    with pytest.raises(RecipeError, match="from_tokens is 2 or more, not 0"):
        make_pass("int8-prompts", {"from_tokens": 0})
    graph = exported("llama").clone()
    assert make_pass("int8-prompts").apply(graph, PassContext(target=target("cpu"))).changes == 0  # nothing in blocks
    for value in list(graph.model.graph.inputs):
        if value.name == "logit_indices":
            value.name = "something_else"
    with pytest.raises(RecipeError, match="is for language models"):
        make_pass("int8-prompts").apply(graph, PassContext(target=target("cpu")))
