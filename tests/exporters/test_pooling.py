"""Poolings against formulas in numpy on PyTorch's hidden states, through the exported graph."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import MAX_POSITIONS, OnnxRunner, add_pooling, load_text_model, save_model

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters import ParityCheck, export

IDS = np.arange(4, 34).reshape(3, 10)
LENGTHS = np.array([10, 4, 1])
MASK = (np.arange(10)[None] < LENGTHS[:, None]).astype(np.int64)

FORMULAS = {
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(0),
    "mean": lambda rows: rows.mean(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / np.sqrt(len(rows)),
    "weightedmean": lambda rows: np.average(rows, axis=0, weights=np.arange(1, len(rows) + 1)),
    "lasttoken": lambda rows: rows[-1],
}
OLDER = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@pytest.mark.parametrize("mode", FORMULAS)
def test_each_mode(mode, tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"embedding_dimension": 32, "pooling_mode": mode}))
    found, hidden = _embed(folder, tmp_path)
    expected = np.stack([FORMULAS[mode](rows[:length]) for rows, length in zip(hidden, LENGTHS, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(hidden).max())


def test_two_modes_in_the_older_spelling_are_concatenated_in_their_order(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    older = dict.fromkeys(OLDER.values(), False) | {OLDER["mean"]: True, OLDER["cls"]: True}
    add_pooling(folder, ("Pooling", {"word_embedding_dimension": 32, **older}))
    found, hidden = _embed(folder, tmp_path)
    expected = [np.r_[rows[0], rows[:length].mean(0)] for rows, length in zip(hidden, LENGTHS, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(hidden).max())


def test_dense_and_normalize(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    dense = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}), ("Dense", dense), ("Normalize", {}))
    torch.manual_seed(1)
    weights = {"linear.weight": torch.randn(8, 32) * 0.2, "linear.bias": torch.randn(8)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    exported = export(folder)
    assert exported.options["dim"] == 8
    assert exported.options["pooled"] is True
    assert exported.options["normalized"] is True
    assert exported.graph.signature.outputs[0].shape == ("batch", 8)
    found, hidden = _embed(folder, tmp_path)
    means = np.stack([rows[:length].mean(0) for rows, length in zip(hidden, LENGTHS, strict=True)])
    expected = np.tanh(means @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy())
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))


def test_decoder_with_last_token_pooling(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    add_pooling(folder, ("Pooling", {"pooling_mode": "lasttoken"}), ("Normalize", {}))
    exported = export(folder)
    assert exported.graph.operators()["Attention"] == 2
    rows = ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    assert max(row.max_rel for row in rows) < 2e-5


def test_declared_length_is_the_maximum(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    exported = export(folder)
    assert exported.options["max_length"] == 24
    assert exported.graph.signature.axes["length"] == (1, 40)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("Pooling", {}), ("WordWeights", {})], "a step of type sentence_transformers.models.WordWeights"),
        ([("Pooling", {"pooling_mode": "median"})], "asks for the pooling median; known are cls, max"),
        ([("Pooling", {"include_prompt": False})], "include_prompt is false"),
        ([("Normalize", {})], "begin with something else than one Pooling"),
        ([("Pooling", {}), ("Dense", {"use_residual": True})], "Dense step with a residual"),
    ],
)
def test_unknown_steps_are_refused(steps, message, tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, *steps)
    with pytest.raises(ConversionError, match=message):
        export(folder)


_WAYS = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_TYPE = "sentence_transformers.base.modules.transformer.Transformer"


@pytest.mark.parametrize(
    ("kind", "declared", "message"),
    [
        (_TYPE, {"modality_config": {**_WAYS, "message": {"format": "flat"}}}, "by the tokenizer's chat template"),
        (_TYPE, {"modality_config": {"text": {"method_output_name": "pooler_output"}}}, "takes pooler_output of"),
        (_TYPE, {"modality_config": {"text": {"method_output_name": ["hidden_states", 1]}}}, "takes .'hidden_states', 1"),
        (_TYPE, {"module_output_name": "sentence_embedding"}, "for sentence_embedding"),
        (_TYPE, {"processing_kwargs": {"text": {"max_length": 16}}}, "called with max_length"),
        ("custom_st.Transformer", {}, "begins with a step of type custom_st.Transformer"),
        ("sentence_transformers.models.Router", {}, "begins with a step of type sentence_transformers.models.Router"),
        (_TYPE, {"modality_config": _WAYS, "module_output_name": "token_embeddings", "processing_kwargs": {"text": {}}}, ""),
        (_TYPE, {}, ""),
    ],
)  # fmt: skip
def test_other_ways_to_read_texts_are_refused(kind, declared, message, tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}))
    steps = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**steps[0], "type": kind}, *steps[1:]]))
    (folder / "sentence_bert_config.json").write_text(json.dumps(declared))
    if not message:
        assert export(folder).options["pooled"]
        return
    with pytest.raises(ConversionError, match=message):
        export(folder)


def test_steps_of_other_packages_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}))
    content = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(content.replace("sentence_transformers.models.Pooling", "my_code.Pooling"))
    with pytest.raises(ConversionError, match=r"a step of type my_code\.Pooling"):
        export(folder)


def test_older_names_of_the_file_are_read(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}))
    (folder / "sentence_distilbert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    exported = export(folder)
    assert exported.options["max_length"] == 20
    assert any("lower-cases first" in note for note in exported.notes)


def test_models_whose_positions_are_angles_take_what_is_declared(tmp_path):
    folder = save_model(tmp_path / "model", "nomic-bert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}))
    assert export(folder).options["max_length"] == MAX_POSITIONS
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4 * MAX_POSITIONS}))
    for exported in (export(folder), export(folder, max_length=3 * MAX_POSITIONS)):
        assert exported.options["max_length"] in (4 * MAX_POSITIONS, 3 * MAX_POSITIONS)
        ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    table = save_model(tmp_path / "table", "bert")
    add_pooling(table, ("Pooling", {"pooling_mode": "mean"}))
    (table / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4 * MAX_POSITIONS}))
    assert export(table).options["max_length"] == MAX_POSITIONS


def test_pickled_dense_weights_and_foreign_activations_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    dense = {"in_features": 32, "out_features": 8, "activation_function": "os.system"}
    add_pooling(folder, ("Pooling", {}), ("Dense", dense))
    with pytest.raises(SourceError, match=r"The weights of .*2_Dense cannot be read"):
        export(folder)
    save_file({"linear.weight": torch.ones(8, 32), "linear.bias": torch.ones(8)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(ConversionError, match=r"has the activation os\.system"):
        export(folder)
    save_file({"linear.weight": torch.ones(8, 31)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(SourceError, match=r"2_Dense are not those that its config\.json describes"):
        export(folder)


def test_garbled_pooling_files_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", None))
    with pytest.raises(SourceError, match=r"1_Pooling/config\.json cannot be read as JSON"):
        export(folder)
    outside = [{"type": "models.Transformer", "path": ""}, {"type": "models.Pooling", "path": "../1_Pooling"}]
    for steps in ({}, [3], [{"path": ""}], outside):
        (folder / "modules.json").write_text(json.dumps(steps))
        with pytest.raises(SourceError, match=r"modules\.json is no list of steps"):
            export(folder)


def _embed(folder, scratch):
    exported = export(folder)
    found = OnnxRunner(exported.graph.model, scratch).run({"input_ids": IDS, "attention_mask": MASK})["embeddings"]
    with torch.no_grad():
        answer = load_text_model(folder)(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK))
    return found, answer.last_hidden_state.numpy()


def test_truncate_dim_keeps_the_first_numbers(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}), ("Normalize", {}))
    whole, _ = _embed(folder, tmp_path)
    (folder / "config_sentence_transformers.json").write_text('{"truncate_dim": 8}')
    exported = export(folder)
    assert (exported.options["dim"], exported.options["normalized"]) == (8, False)
    found, _ = _embed(folder, tmp_path)
    np.testing.assert_allclose(found, whole[:, :8], rtol=0, atol=1e-6)


def test_a_dense_step_that_names_no_activation_has_tanh(tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    dense = {"in_features": 32, "out_features": 8, "bias": False}
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}), ("Dense", dense))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    found, hidden = _embed(folder, tmp_path)
    expected = [np.tanh(rows[:length].mean(0) @ weight.numpy().T) for rows, length in zip(hidden, LENGTHS, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            ("Dense", {"in_features": 32, "out_features": 8, "module_output_name": "scores"}),
            "a residual or on single tokens",
        ),
        (("Normalize", {"module_input_name": "token_embeddings"}), "a Normalize step on something else"),
    ],
)
def test_steps_on_something_else_are_refused(step, said, tmp_path):
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}), step)
    with pytest.raises(ConversionError, match=said):
        export(folder)
