"""Text models of many architectures, exported by code that knows none of them, against PyTorch's eager attention."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import MAX_POSITIONS, VOCAB, OnnxRunner, add_pooling, load_text_model, save_model

from onnxpress.errors import SourceError
from onnxpress.exporters import ParityCheck, export

# Absolute positions: the fused graph needs no Transpose at all. Rotary ones turn queries and keys by head.
ABSOLUTE = ("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra")
ROTARY = {"modernbert": 4, "nomic-bert": 2, "qwen3": 2, "gemma2": 2}
OWN_ATTENTION = ("mpnet", "deberta-v2")

HEADS = (
    ("bert", tf.AutoModelForSequenceClassification, "text-classification", {"num_labels": 3}),
    ("roberta", tf.AutoModelForSequenceClassification, "text-classification", {"num_labels": 1}),
    ("qwen3", tf.AutoModelForSequenceClassification, "text-classification", {"num_labels": 2}),
    ("distilbert", tf.AutoModelForTokenClassification, "token-classification", {"num_labels": 5}),
    ("deberta-v2", tf.AutoModelForTokenClassification, "token-classification", {"num_labels": 5}),
    ("electra", tf.AutoModelForQuestionAnswering, "question-answering", {}),
    ("albert", tf.AutoModelForMaskedLM, "fill-mask", {}),
    # A sliding window of 8, and no parameter to do without a cache.
    ("mistral", tf.AutoModelForQuestionAnswering, "question-answering", {}),
    # Encoders with decoders: texts of one token are one shorter in the decoder.
    ("bart", tf.AutoModelForSequenceClassification, "text-classification", {"num_labels": 3}),
    ("bart", tf.AutoModelForQuestionAnswering, "question-answering", {"num_labels": 2}),
    ("bart", tf.AutoModel, "feature-extraction", {}),
    ("mbart", tf.AutoModelForQuestionAnswering, "question-answering", {"num_labels": 2}),  # squeezes a batch of one
    ("t5", tf.AutoModelForSequenceClassification, "text-classification", {"num_labels": 3}),
    ("t5", tf.AutoModelForTextEncoding, "feature-extraction", {}),
)


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_positions_export_fused_without_transposes(name, tmp_path):
    exported = export(save_model(tmp_path / "model", name))
    operators = exported.graph.operators()
    assert operators["Attention"] == 2
    assert "Transpose" not in operators
    assert "Reshape" not in operators
    assert exported.notes == ("attention: fused (2 Attention operators)",)
    _check(exported, tmp_path)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_export_fused(name, tmp_path):
    exported = export(save_model(tmp_path / "model", name))
    assert exported.graph.operators()["Attention"] == ROTARY[name]
    _check(exported, tmp_path)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_attention_outside_the_interface_exports_unfused_and_says_so(name, tmp_path):
    exported = export(save_model(tmp_path / "model", name))
    assert "Attention" not in exported.graph.operators()
    assert "computes attention by itself" in exported.notes[0]
    _check(exported, tmp_path)


@pytest.mark.parametrize(("name", "auto_class", "task", "more"), HEADS)
def test_heads(name, auto_class, task, more, tmp_path):
    exported = export(save_model(tmp_path / "model", name, auto_class, **more))
    assert exported.graph.signature.task == task
    _check(exported, tmp_path)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_last_end_token_is_read_of_single_texts_and_pairs_in_one_batch(name, tmp_path):
    folder = save_model(tmp_path / "model", name, tf.AutoModelForSequenceClassification, num_labels=3)
    runner = OnnxRunner(export(folder).graph.model, tmp_path)
    model = load_text_model(folder, tf.AutoModelForSequenceClassification)
    ids = np.array([[20, 3, 3, 21, 3, 0], [22, 23, 3, 0, 0, 0], [24, 3, 25, 3, 0, 0]])  # 3, 1 and 2 end tokens
    found = runner.run({"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)})["logits"]
    for row, tokens, length in zip(found, ids, (5, 3, 4), strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(tokens[None, :length])).logits[0].numpy()
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_signature_and_options_of_a_classifier(tmp_path):
    labels = {0: "bad", 1: "good"}
    folder = save_model(tmp_path / "model", "bert", tf.AutoModelForSequenceClassification, id2label=labels)
    exported = export(folder, task="sentiment-analysis")
    signature = exported.graph.signature
    assert signature.axes == {"batch": (1, 1024), "length": (1, MAX_POSITIONS)}
    assert [(spec.name, spec.dtype, spec.shape, spec.bounds) for spec in signature.inputs] == [
        ("input_ids", "int64", ("batch", "length"), (0, VOCAB - 1)),
        ("attention_mask", "int64", ("batch", "length"), (0, 1)),
        ("token_type_ids", "int64", ("batch", "length"), (0, 1)),
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.outputs] == [("logits", "float32", ("batch", 2))]
    assert exported.options == {
        "max_length": MAX_POSITIONS,
        "pad_token_id": 0,
        "labels": ["bad", "good"],
        "problem_type": "single_label_classification",
    }
    assert {path.name for path in exported.files} == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi_label_classification"),
    ],
)
def test_problem_type(more, kind, tmp_path):
    exported = export(save_model(tmp_path / "model", "bert", tf.AutoModelForSequenceClassification, **more))
    assert exported.options["problem_type"] == kind


@pytest.mark.parametrize(
    ("more", "declared", "activation"),
    [
        ({}, None, "sigmoid"),  # transformers' pipeline and sentence-transformers do so where nothing is said
        ({"problem_type": "regression"}, None, None),
        ({"problem_type": "regression"}, "Sigmoid", "sigmoid"),
        ({}, "Identity", None),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, None, None),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, None, None),
    ],
)
def test_cross_encoders_of_sentence_transformers(more, declared, activation, tmp_path):
    folder = _cross_encoder(tmp_path / "model", declared, **more)
    exported = export(folder)
    assert exported.graph.signature.task == "text-classification"
    assert exported.options.get("activation") == activation
    _check(exported, tmp_path)


def test_other_activations_are_left_to_the_user(tmp_path):
    exported = export(_cross_encoder(tmp_path / "tanh", "Tanh"))
    assert "activation" not in exported.options
    assert exported.notes[-1] == "sentence-transformers applies Tanh to the scores; here it is yours to apply"
    folder = _cross_encoder(tmp_path / "own", None, sentence_transformers={"activation_fn": "my_module.Scaled"})
    assert (
        export(folder).options["activation"] == "sigmoid"
    )  # code of a stranger's, which sentence-transformers does not run either
    (folder / "config_sentence_transformers.json").write_text("[]")
    with pytest.raises(SourceError, match="holds no object"):
        export(folder)


def _cross_encoder(folder, declared, **more):
    """As sentence-transformers 6 saves one: modules.json has one step."""
    save_model(folder, "bert", tf.AutoModelForSequenceClassification, num_labels=1, **more)
    add_pooling(folder)
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "sequence-classification"}')
    activation = {} if declared is None else {"activation_fn": f"torch.nn.{declared}"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder", **activation}))
    return folder


@pytest.mark.parametrize(
    ("declared", "inputs"),
    [
        (None, ["input_ids", "attention_mask", "token_type_ids"]),  # as transformers 4 took a class that says nothing
        (["input_ids", "attention_mask"], ["input_ids", "attention_mask"]),
        (["input_ids", "token_type_ids", "attention_mask"], ["input_ids", "attention_mask", "token_type_ids"]),
    ],
)
def test_token_types_are_an_input_where_the_tokenizer_gives_them(declared, inputs, tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    path = folder / "tokenizer_config.json"
    if declared is not None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": declared}))
    exported = export(folder)
    assert [spec.name for spec in exported.graph.signature.inputs] == inputs
    _check(exported, tmp_path)


def test_options_of_fill_mask_and_shapes_of_question_answering(tmp_path):
    filler = export(save_model(tmp_path / "filler", "bert", tf.AutoModelForMaskedLM))
    assert filler.options["mask_token"] == "[MASK]"
    assert filler.graph.signature.outputs[0].shape == ("batch", "length", VOCAB)
    answerer = export(save_model(tmp_path / "answerer", "bert", tf.AutoModelForQuestionAnswering))
    assert [(spec.name, spec.shape) for spec in answerer.graph.signature.outputs] == [
        ("start_logits", ("batch", "length")),
        ("end_logits", ("batch", "length")),
    ]


def test_tied_embeddings_are_stored_once(tmp_path):
    exported = export(save_model(tmp_path / "model", "bert", tf.AutoModelForMaskedLM))
    weights = exported.graph.model.graph.initializers
    assert sum(sorted(value.shape or ()) == [32, VOCAB] for value in weights.values()) == 1
    assert exported.graph.operators()["Transpose"] == 1


def test_weights_keep_their_names_and_lie_as_in_out(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    exported = export(folder)
    graph = exported.graph.model.graph
    original = load_text_model(folder).state_dict()["encoder.layer.0.intermediate.dense.weight"].numpy()
    stored = graph.initializers["encoder.layer.0.intermediate.dense.weight"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), original.T)
    names = [node.name for node in graph if node.op_type == "MatMul"]
    assert names[0] == "encoder.layer.0.attention.self.query"
    assert len(names) == len(set(names)) == 12


def test_exporting_twice_gives_the_same_bytes_and_nothing_of_this_machine(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        OnnxRunner(export(folder).graph.model, tmp_path / name)
    content = (tmp_path / "first" / "model.onnx").read_bytes()
    assert content == (tmp_path / "second" / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b"pkg." not in content


def test_maximum_length(tmp_path):
    folder = save_model(tmp_path / "model", "roberta")
    assert export(folder, max_length=16).options["max_length"] == 16
    with pytest.raises(SourceError, match=r"maximum length of 39 was asked for; .* takes 1 to 38 tokens"):
        export(folder, max_length=39)


@pytest.mark.parametrize(
    ("name", "saved", "task", "heads"),
    [
        ("bert", tf.AutoModelForMaskedLM, "text-classification", "feature-extraction, fill-mask"),
        ("bert", tf.AutoModel, "question-answering", "feature-extraction"),
        ("bert", tf.AutoModelForSequenceClassification, "fill-mask", "feature-extraction, text-classification"),
        ("bart", tf.AutoModel, "text-classification", "feature-extraction"),
    ],
)
def test_task_without_trained_head_is_refused(name, saved, task, heads, tmp_path):
    folder = save_model(tmp_path / "model", name, saved)
    with pytest.raises(SourceError, match=rf"no trained weights for {task}.*It has heads for {heads}\."):
        export(folder, task=task)


def test_missing_pooler_that_nobody_reads_is_no_reason_to_refuse(tmp_path):
    folder = save_model(tmp_path / "model", "bert", tf.AutoModelForMaskedLM)
    exported = export(folder, task="feature-extraction")
    assert exported.graph.signature.outputs[0].name == "last_hidden_state"
    _check(exported, tmp_path)


def _check(exported, folder) -> None:
    rows = ParityCheck(exported).check(OnnxRunner(exported.graph.model, folder))
    assert len(rows) == 14 * len(exported.graph.signature.outputs)
    assert max(row.max_rel for row in rows) < 2e-5
