"""Passes for the CUDA provider, tried on the CPU: equal answers on padded batches, and what is left alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from safetensors.numpy import load_file
from small_graphs import small_graph
from tiny_decoders import CONTEXT, make_model, save_decoder
from tiny_models import VOCAB, save_model

import onnxpress
from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.errors import ArtifactError, InputError, RecipeError
from onnxpress.exporters import Exported, ParityCheck, export
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import export_causal_lm
from onnxpress.graph import Graph
from onnxpress.graph_files import save
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.stand_in import in_float32
from onnxpress.optimizers.targets import target
from onnxpress.recipe import make_recipe
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import TOTAL_LENGTH, ModelStep
from onnxpress.runtime.session import Session
from onnxpress.workbench import check_types

CUDA = PassContext(target=target("cuda"))
PACKED, HEADS = "com.microsoft::Attention", "com.microsoft::MultiHeadAttention"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def exported(name: str) -> Exported:
        folder = save_model(tmp_path_factory.mktemp("model") / name, name, tf.AutoModelForTokenClassification)
        return export(folder, task="token-classification")

    return exported


def pressed(graph: Graph, *names: str) -> PassResult:
    for name in names:
        result = make_pass(name).apply(graph.clone(), CUDA)
        graph = result.graph
    return result


def opened(graph: Graph, folder: Path) -> Session:
    save(graph, folder / "model.onnx")
    return Session(folder / "model.onnx", signature=graph.signature)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_attention_over_padding_takes_lengths_and_its_projections(name: str, encoders: Any, tmp_path: Path) -> None:
    exported = encoders(name)
    layers = exported.graph.operators()["Attention"]
    parity = ParityCheck(exported)
    for names, operator in ((("cuda-attention",), HEADS), (("cuda-attention", "pack-attention"), PACKED)):
        result = pressed(exported.graph, *names)
        assert result.changes == layers
        assert result.graph.operators()[operator] == layers
        assert "Attention" not in result.graph.operators()
        assert "Where" not in result.graph.operators()  # the mask is gone
        parity.check(opened(result.graph, tmp_path))  # against PyTorch, padded and not


def test_what_hides_more_than_padding_stays(encoders: Any, tmp_path: Path) -> None:
    """ModernBERT has windows in two layers of three, which are wider than short texts."""
    exported = encoders("modernbert")
    result = pressed(exported.graph, "cuda-attention")
    assert result.changes == 2  # the first layer and every third look at everything
    assert result.graph.operators()["Attention"] == 2
    assert any("hides more than padding" in note for note in result.notes)
    ParityCheck(exported).check(opened(result.graph, tmp_path))


def test_rows_have_to_be_padded_on_the_right(encoders: Any, tmp_path: Path) -> None:
    graph = encoders("bert").graph
    session = opened(pressed(graph, "cuda-attention").graph, tmp_path)
    ids = np.full((2, 4), VOCAB - 1)
    feeds = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
    for wrong in ([[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [0, 0, 0, 0]]):
        with pytest.raises(InputError, match="padded on the right"):
            session.run({**feeds, "attention_mask": np.array(wrong)})
        assert opened(graph, tmp_path).run({**feeds, "attention_mask": np.array(wrong)})  # which the export takes
    assert session.run({**feeds, "attention_mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1]])})


def test_a_module_with_an_input_of_that_name_keeps_its_mask() -> None:
    """Nobody says there how it is padded."""
    graph = small_graph(
        """
        hidden = Cast<to=9>(attention_mask) rows = Unsqueeze(hidden, axes) kept = Where(rows, zero, lowest)
        full = Expand(kept, shape)
        y = Attention<q_num_heads=4, kv_num_heads=4>(x, x, x, full)
        """,
        inputs="float[batch,length,32] x, int64[batch,length] attention_mask",
        weights={
            "axes": np.array([1, 2]),
            "zero": np.float32(0),
            "lowest": np.float32(-1e9),
            "shape": np.array([1, 1, 1, 1]),
        },
        opset=23,
    )
    assert pressed(graph, "cuda-attention").changes == 0


@pytest.mark.parametrize("name", ["cuda-attention", "plain-attention"])
def test_attention_whose_keys_and_values_are_outputs_stays(name: str) -> None:
    heads = "float[batch,4,length,8]"
    graph = small_graph(
        "y, key, value = Attention<q_num_heads=4, kv_num_heads=4>(x, x, x)",
        outputs=f"float[batch,length,32] y, {heads} key, {heads} value",
        opset=23,
    )
    result = pressed(graph, name)
    assert result.changes == 0
    assert any("it carries past keys and values" in note for note in result.notes)


def masked(mask: str) -> Graph:
    """An encoder's signature, and attention over what `mask` hides of (batch, 1, length, length)."""
    graph = small_graph(
        f"""
        table = Gather(embedding, input_ids)
        {mask}
        scores = Where(allowed, zero, lowest)
        y = Attention<q_num_heads=4, kv_num_heads=4>(table, table, table, scores)
        """,
        inputs="int64[batch,length] input_ids, int64[batch,length] attention_mask",
        weights={
            "embedding": np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32),
            "axes": np.array([1, 2]),
            "column": np.array([1]),
            "zero": np.float32(0),
            "lowest": np.float32(-1e9),
            "separator": np.array(2),
        },
        opset=23,
    )
    inputs = tuple(
        TensorSpec(name=name, dtype="int64", shape=("batch", "length"), bounds=bounds)
        for name, bounds in (("input_ids", (0, 299)), ("attention_mask", (0, 1)))
    )
    signature = Signature(
        task="feature-extraction", inputs=inputs, outputs=(), axes={"batch": (1, 8), "length": (1, 16)}
    )
    return Graph(model=graph.model, signature=signature)


PADDING = "kept = Cast<to=9>(attention_mask) wide = Unsqueeze(kept, axes) tall = Unsqueeze(wide, column) allowed = Squeeze(tall, column)"


@pytest.mark.parametrize(
    ("mask", "changes"),
    [
        (PADDING, 1),
        # One token among 300 that hides itself: random texts would seldom have it.
        (
            PADDING.replace("allowed =", "plain =")
            + " same = Equal(input_ids, separator) other = Not(same) others = Unsqueeze(other, axes) allowed = And(plain, others)",
            0,
        ),
    ],
)
def test_a_mask_that_hangs_on_tokens_stays(mask: str, changes: int) -> None:
    assert pressed(masked(mask), "cuda-attention").changes == changes


def test_attention_with_more_settings_is_not_packed() -> None:
    graph = small_graph(
        "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) y = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)",
        weights={name: np.eye(32, dtype=np.float32) for name in ("wq", "wk", "wv")},
        opset=23,
    )
    heads = pressed(graph, "cuda-attention").graph
    assert pressed(heads, "pack-attention").changes == 1
    node = next(node for node in heads.model.graph if node.op_type == "MultiHeadAttention")
    node.attributes.add(ir.AttrInt64("unidirectional", 1))
    result = pressed(heads, "pack-attention")
    assert result.changes == 0
    assert any("unidirectional" in note for note in result.notes)


@pytest.mark.newest
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_language_model_without_query_seqlens(name: str, tmp_path: Path) -> None:
    """Unequal prompts, unequal further parts (row by row), single tokens: as the form for CPUs answers."""
    model = make_model(name)
    conventions = learn(model, positions=CONTEXT)
    random = np.random.default_rng(0)
    parts = [
        [random.integers(0, 300, count).tolist() for count in counts]
        for counts in ((20, 3, 90), (5, 30, 16), (4, 4, 4), (1, 1, 1))
    ]

    def logits(graph: Graph) -> np.ndarray:
        step = ModelStep(opened(graph, tmp_path), KeyValueCache(graph.signature.inputs, context=CONTEXT, budget=2**28))
        return np.concatenate([step.run(0, tokens).copy() for tokens in parts])

    plain = export_causal_lm(model, conventions, context=CONTEXT)
    uniform = export_causal_lm(model, conventions, context=CONTEXT, uniform_steps=True)
    fused = pressed(uniform, "fuse-skip-norm", "fuse-rotary", "pack-projections").graph
    expected = logits(plain)
    for graph in (uniform, fused):
        assert TOTAL_LENGTH in [spec.name for spec in graph.signature.inputs]
        attentions = [node for node in graph.model.graph if node.op_type == "GroupQueryAttention"]
        assert all(len(node.inputs) <= 10 for node in attentions)
        np.testing.assert_allclose(logits(graph), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.newest
def test_half_precision_halves_the_cache_and_leaves_no_casts_around_it(tmp_path: Path) -> None:
    model = make_model("qwen2")
    graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT, uniform_steps=True)
    steps = ("fuse-skip-norm", "fuse-rotary", "pack-projections", "fp16")
    result = pressed(graph, *steps).graph
    caches = [
        spec
        for spec in (*result.signature.inputs, *result.signature.outputs)
        if "key" in spec.name or "value" in spec.name
    ]
    assert len(caches) == 8
    assert {spec.dtype for spec in caches} == {"float16"}
    assert result.operators()["Cast"] == 1  # of the logits
    step = ModelStep(opened(result, tmp_path), KeyValueCache(result.signature.inputs, context=CONTEXT, budget=2**28))
    assert (
        step.cache.bytes_per_token * 2
        == KeyValueCache(graph.signature.inputs, context=CONTEXT, budget=1).bytes_per_token
    )
    assert np.isfinite(step.run(0, [[5, 6, 7], [8]])).all()
    assert {spec.dtype for spec in pressed(graph, *steps[:3], "bf16").graph.signature.inputs[5:]} == {"bfloat16"}


@pytest.mark.parametrize(
    ("kind", "precision", "message"),
    [
        (
            "cuda",
            "fp32",
            r"'fp32' does not go with text-generation on target 'cuda'; it takes: fp16, bf16, int8-weights, int4-weights",
        ),
        ("tensorrt", None, r"takes no language models.*--target cuda"),
    ],
)
def test_precisions_that_language_models_do_not_have(kind: str, precision: str | None, message: str) -> None:
    """At once where the task is given, else when it is known."""
    build = {"target": kind} | ({} if precision is None else {"precision": precision})
    recipe = make_recipe({"model": {"source": "x"}, "build": build})
    assert recipe.precision("feature-extraction") in target(kind).precisions
    with pytest.raises(RecipeError, match=message):
        recipe.precision("text-generation")
    with pytest.raises(RecipeError, match=message):
        make_recipe({"model": {"source": "x", "task": "text-generation"}, "build": build})


def test_an_int8_cache_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="cache of int8 does not go with target 'cuda'"):
        make_recipe({"model": {"source": "x"}, "build": {"target": "cuda", "cache": "int8"}})


@pytest.mark.newest
@pytest.mark.parametrize(("name", "precision"), [("gemma2", "bf16"), ("llama", "int4-weights-bf16")])
def test_a_language_model_in_bfloat16(name: str, precision: str, tmp_path: Path) -> None:
    """Tried here by a graph of float32 that rounds; the file itself is read, not run."""
    artifact = onnxpress.build(
        save_decoder(tmp_path / "model", name), target="cuda", precision=precision, keep_all=True, out=tmp_path / "a"
    )
    signature = artifact.manifest.signature
    cache = [spec for spec in (*signature.inputs, *signature.outputs) if ".key" in spec.name or ".value" in spec.name]
    assert {spec.dtype for spec in cache} == {"bfloat16"}
    assert (
        KeyValueCache(signature.inputs, context=CONTEXT, budget=1).bytes_per_token == 2 * 4 * 2 * 16
    )  # 2 layers, 2 heads of 16
    golden = load_file(artifact.path / "golden.safetensors")
    assert golden["input.tokens.past_key_values.0.key"].dtype == np.float32
    answers = golden["output.prompts.present.0.key"]
    np.testing.assert_array_equal(answers, torch.from_numpy(answers).bfloat16().float().numpy())
    assert "nothing has run it yet" in artifact.measured["note"]
    texts = DecoderWorkload(signature=signature, options=artifact.manifest.options, tokenizer_folder=artifact.path)
    past = next(texts.calibration())["past_key_values.0.key"]
    assert past.dtype == np.float32  # as a session on a card takes it
    with pytest.raises(ArtifactError, match="bfloat16 runs on a card"):
        onnxpress.load(artifact.path, providers=["cpu"])


@pytest.mark.newest
def test_bfloat16_answers_like_pytorch_in_bfloat16(tmp_path: Path) -> None:
    """Both are far less exact than float32; neither is further from it than the other by much."""
    model = make_model("llama")
    graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT, uniform_steps=True)
    half = pressed(graph, "fuse-skip-norm", "fuse-rotary", "pack-projections", "bf16").graph
    tokens = np.random.default_rng(0).integers(0, 300, 60).tolist()

    def logits(graph: Graph) -> np.ndarray:
        step = ModelStep(opened(graph, tmp_path), KeyValueCache(graph.signature.inputs, context=CONTEXT, budget=2**28))
        parts = [step.run(0, [tokens[:40]]), *(step.run(0, [[token]]).copy() for token in tokens[40:])]
        return np.concatenate(parts[1:])

    exact = logits(graph)
    with torch.inference_mode():
        rounded = model.bfloat16()(torch.tensor([tokens])).logits[0, 40:].float().numpy()
    ours = np.abs(logits(in_float32(half)) - exact).mean()
    theirs = np.abs(rounded - exact).mean()
    assert 0.5 * theirs < ours < 1.2 * theirs


def test_a_module_in_bfloat16_is_tried_here(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU6())
    artifact = onnxpress.build(
        layer, example_inputs=(torch.ones(2, 8),), target="cuda", precision="bf16", out=tmp_path / "a"
    )
    row = artifact.manifest.ledger[-1]
    assert row["status"] == "kept"
    assert 0.999 < row["quality"] < 1  # it did round
    assert any("in float32: Clip" in note for note in row["notes"])


def test_a_file_whose_types_do_not_fit_is_found(tmp_path: Path) -> None:
    graph = pressed(
        small_graph("y = MatMul(x, w)", inputs="float[batch,8] x", weights={"w": np.eye(8, dtype=np.float32)}), "bf16"
    ).graph
    save(graph, tmp_path / "good.onnx")
    check_types(tmp_path / "good.onnx", graph)
    for node in graph.model.graph:
        if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.BFLOAT16.value:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16.value)
    save(graph, tmp_path / "bad.onnx")
    with pytest.raises(ArtifactError, match="Type"):
        check_types(tmp_path / "bad.onnx", graph)


@pytest.mark.newest
def test_a_language_model_in_float32_is_refused(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model", "llama")
    with pytest.raises(RecipeError, match="still in float32"):
        onnxpress.build(model, target="cuda", only=["fold"], out=tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


POOL = "c = Conv(x, w) y = MaxPool<kernel_shape=[2,2]>(c)"
WEIGHT = {"w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)}


def test_pooling_gets_a_version_that_has_a_cuda_kernel(tmp_path: Path) -> None:
    graph = small_graph(POOL, inputs="float[batch,3,8,8] x", weights=WEIGHT, opset=23)
    result = pressed(graph, "cuda-opset")
    assert result.changes == 2
    assert result.graph.model.opset_imports[""] == 21
    x = {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    answers = []
    for index, one in enumerate((graph, result.graph)):
        save(one, tmp_path / f"{index}.onnx")
        answers.append(Session(tmp_path / f"{index}.onnx").run(x)["y"])
    np.testing.assert_array_equal(*answers)


def test_an_opset_that_is_needed_stays() -> None:
    attention = "flat = MaxPool<kernel_shape=[1]>(x) y = Attention<q_num_heads=4, kv_num_heads=4>(flat, flat, flat)"
    result = pressed(small_graph(attention, inputs="float[batch,length,32] x", opset=23), "cuda-opset")
    assert result.changes == 0
    assert result.notes == ("Attention is newer than opset 21",)
    relu = small_graph("y = Relu(x)", inputs="float[batch,8] x", opset=23)
    assert pressed(relu, "cuda-opset").changes == 0
    older = small_graph(POOL, inputs="float[batch,3,8,8] x", weights=WEIGHT, opset=18)
    assert pressed(older, "cuda-opset").changes == 0
    assert isinstance(older.model, ir.Model)
