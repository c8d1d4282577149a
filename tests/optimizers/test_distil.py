"""Distillation: cut students recover, padding never counts, resumes are exact, and bad input is one clear error."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_decoders import ARCHITECTURES
from tiny_models import CONFIGS

from onnxpress.errors import InputError, QualityError, RecipeError
from onnxpress.optimizers import divergence
from onnxpress.optimizers.distil import TASKS, DistilOptions, _Lesson, distil
from onnxpress.optimizers.training import TrainingOptions, train

HEADS = {
    "feature-extraction": tf.AutoModel,
    "text-classification": tf.AutoModelForSequenceClassification,
    "token-classification": tf.AutoModelForTokenClassification,
    "question-answering": tf.AutoModelForQuestionAnswering,
    "fill-mask": tf.AutoModelForMaskedLM,
    "text-generation": tf.AutoModelForCausalLM,
}
LONGER = TrainingOptions(epochs=4, batch_size=32, learning_rate=2e-3)


def encoder(task: str = "text-classification", **more: Any) -> Any:
    """Without dropout and with larger weights than usual, so that it learns, and cuts hurt, within seconds."""
    torch.manual_seed(1)
    config = CONFIGS["bert"](hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more)
    model = HEADS[task].from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def decoder(**more: Any) -> Any:
    torch.manual_seed(1)
    return tf.AutoModelForCausalLM.from_config(ARCHITECTURES["llama"](vocab_size=64, **more)).eval()


def model_for(task: str, **more: Any) -> Any:
    return decoder() if task == "text-generation" else encoder(task, **more)


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """One of tokens 10 to 12 and one of 20 to 22, anywhere among others: the sum of both, modulo 3."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = draw.integers(30, 60, size=draw.integers(3, 8)).tolist()
        first, second = draw.choice(len(ids), size=2, replace=False).tolist()
        one, two = index % 3, index // 3 % 3
        ids[first], ids[second] = 10 + one, 20 + two
        rows.append({"input_ids": [2, *ids, 3], "labels": (one + two) % 3})
    return rows


def chains(count: int, seed: int) -> list[dict[str, Any]]:
    """Text in which a token and the one before it say the next, but for one draw in ten."""
    draw = np.random.default_rng(seed)
    following = np.random.default_rng(0).integers(1, 64, size=(8, 64))
    rows = []
    for _ in range(count):
        ids = draw.integers(1, 64, size=2).tolist()
        while len(ids) < 24:
            ids.append(int(draw.integers(1, 64) if draw.random() < 0.1 else following[ids[-2] % 8, ids[-1]]))
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def taught(model: Any, rows: list[dict[str, Any]], task: str, epochs: int, learning_rate: float) -> Any:
    """A teacher, trained on the rows' labels."""
    lesson = _Lesson(model, model, task, DistilOptions(label_weight=1.0), None)
    options = TrainingOptions(epochs=epochs, batch_size=32, learning_rate=learning_rate)
    train(model, rows, options=options, collate=lesson.collate)
    return model


def cut(linears: list[tuple[Any, ...]], channels: int) -> None:
    """Leave the last so many channels between the given (up, …, down) linear layers."""
    for *ups, down in linears:
        for up in ups:
            up.weight = torch.nn.Parameter(up.weight.detach()[-channels:].clone())
            if up.bias is not None:
                up.bias = torch.nn.Parameter(up.bias.detach()[-channels:].clone())
        down.weight = torch.nn.Parameter(down.weight.detach()[:, -channels:].clone())


def smaller_encoder(teacher: Any, channels: int = 12, layers: tuple[int, ...] | None = None) -> Any:
    student = copy.deepcopy(teacher)
    body = getattr(student, "bert", student).encoder
    if layers is not None:
        body.layer = torch.nn.ModuleList(body.layer[index] for index in layers)
        student.config.num_hidden_layers = len(layers)
    cut([(layer.intermediate.dense, layer.output.dense) for layer in body.layer], channels)
    return student


def answers(model: Any, rows: list[dict[str, Any]], name: str = "logits") -> torch.Tensor:
    """Answers in batches of one length, so that nothing is padded; the rows' own order."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]]))[name] for row in rows])


def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    return float((answers(model, rows).argmax(-1) == torch.tensor([row["labels"] for row in rows])).float().mean())


def kl(teacher: Any, student: Any, rows: list[dict[str, Any]]) -> float:
    """Mean KL(teacher || student) in nats, in float64 and by its definition."""
    theirs, ours = (answers(model, rows).double().log_softmax(-1) for model in (teacher, student))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.fixture(scope="module")
def classifier() -> Any:
    return taught(encoder(num_labels=3), questions(1500, 0), "text-classification", 8, 2e-3)


def test_a_classifier_with_a_quarter_of_its_channels_recovers(classifier: Any) -> None:
    held_out = questions(240, 7)
    before = copy.deepcopy(classifier.state_dict())
    assert accuracy(classifier, held_out) > 0.95
    student = smaller_encoder(classifier)
    assert accuracy(student, held_out) < 0.7
    assert kl(classifier, student, held_out) > 0.5
    unlabelled = [{"input_ids": row["input_ids"]} for row in questions(600, 3)]
    summary = distil(
        classifier, student, unlabelled, task="text-classification", options=DistilOptions(training=LONGER)
    )
    assert accuracy(student, held_out) > 0.93
    assert kl(classifier, student, held_out) < 0.15
    assert summary.after < summary.before / 2
    assert summary.training.steps == 4 * 19
    assert not student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


def test_a_language_model_without_a_layer_recovers() -> None:
    teacher = taught(decoder(), chains(400, 0), "text-generation", 4, 5e-3)
    student = copy.deepcopy(teacher)
    del student.model.layers[0]
    student.model.layers[0].self_attn.layer_idx = 0
    student.config.num_hidden_layers = 1
    cut([(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj) for layer in student.model.layers], 48)
    held_out = chains(40, 5)
    apart = kl(teacher, student, held_out)
    options = DistilOptions(training=TrainingOptions(epochs=4, batch_size=32, learning_rate=5e-3))
    distil(teacher, student, chains(300, 3), task="text-generation", options=options, layers=[1])
    assert apart > 0.3
    assert kl(teacher, student, held_out) < apart / 3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with devices there is one process a device")
def test_two_processes_give_what_one_gives() -> None:
    """Of texts of unequal lengths, so that the processes have unequal numbers of tokens; 64 texts are 8 whole batches."""
    teacher = encoder("token-classification", num_labels=3)
    rows = [{"input_ids": row["input_ids"]} for row in questions(64, 3)]
    students, said = [], list[str]()
    for processes in (1, 2):
        students.append(smaller_encoder(teacher, channels=12, layers=(1,)))
        training = TrainingOptions(epochs=2, batch_size=8, learning_rate=2e-3, processes=processes)
        summary = distil(
            teacher, students[-1], rows, task="token-classification", options=DistilOptions(training=training),
            layers=[1], progress=said.append,
        )  # fmt: skip
        assert summary.training.steps == 16
    assert [text.split(",")[0] for text in said] == [f"step {step} of 16" for step in range(1, 17)] * 2
    one, two = (dict(student.named_parameters()) for student in students)
    for name in one:
        if not name.endswith("key.bias"):  # a bias of keys changes no answer, so that its gradient is noise alone
            assert torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name
    first, second = (torch.cat([answers(student, [row]).flatten() for row in rows]) for student in students)
    assert torch.allclose(first, second, rtol=0, atol=1e-5)  # of answers up to 4
    assert float((first - torch.cat([answers(teacher, [row]).flatten() for row in rows])).abs().max()) > 0.1


def test_embeddings_recover() -> None:
    teacher = encoder("feature-extraction")
    student = smaller_encoder(teacher, channels=12, layers=(1,))
    examples = [{"input_ids": row["input_ids"]} for row in questions(300, 3)]
    held_out = questions(60, 7)

    def cosine() -> float:
        with torch.no_grad():
            ours, theirs = (
                torch.stack([mean(model(torch.tensor([row["input_ids"]])).last_hidden_state)[0] for row in held_out])
                for model in (student, teacher)
            )
        return float(torch.cosine_similarity(ours, theirs).mean())

    def mean(states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        weights = torch.ones(states.shape[:2]) if mask is None else mask.float()
        return (states * weights[..., None]).sum(1) / weights.sum(1)[:, None]

    before = cosine()
    options = DistilOptions(training=LONGER)
    distil(teacher, student, examples, task="feature-extraction", options=options, layers=[1], pooling=mean)
    assert before < 0.9
    assert 1 - cosine() < (1 - before) / 4


def test_a_linear_head_behind_a_pooling_stays_and_is_listened_to() -> None:
    teacher = encoder("feature-extraction")
    student = smaller_encoder(teacher, channels=12, layers=(1,))
    examples = [{"input_ids": row["input_ids"]} for row in questions(300, 3)]
    torch.manual_seed(2)
    head = torch.nn.Linear(teacher.config.hidden_size, 3)
    with torch.no_grad():
        head.weight.mul_(5)  # so that answers differ

    def logits(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.float()[..., None]
        answer: torch.Tensor = head((states * weights).sum(1) / weights.sum(1))
        return answer

    weight = head.weight.detach().clone()
    more: dict[str, Any] = {"task": "text-classification", "layers": [1], "pooling": logits}
    kind = "single_label_classification"
    options = DistilOptions(hidden_weight=0.0, training=LONGER)
    summary = distil(teacher, student, examples, options=options, problem_type=kind, **more)
    assert summary.after < summary.before / 2
    assert torch.equal(head.weight, weight)
    with pytest.raises(RecipeError, match="label_weight needs a model with a head of its own"):
        distil(teacher, student, examples, options=DistilOptions(label_weight=1.0), **more)


def test_neither_dropout_nor_the_embeddings_take_part() -> None:
    teacher = encoder()
    students = []
    for rate in (0.0, 0.5):
        student = smaller_encoder(teacher)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        options = DistilOptions(training=TrainingOptions(epochs=1, batch_size=8))
        distil(teacher, student, questions(32, seed=1), task="text-classification", options=options)
        students.append(student)
    one, other = (student.state_dict() for student in students)
    assert all(torch.equal(one[name], other[name]) for name in one)
    trained, whole = students[0].bert, teacher.bert
    assert torch.equal(trained.embeddings.word_embeddings.weight, whole.embeddings.word_embeddings.weight)
    assert not torch.equal(trained.encoder.layer[0].output.dense.bias, whole.encoder.layer[0].output.dense.bias)
    assert all(parameter.requires_grad for parameter in students[0].parameters())


def test_hidden_states_are_those_that_the_kept_layers_read() -> None:
    teacher = encoder("feature-extraction")
    rows = [{"input_ids": row["input_ids"]} for row in questions(12, 0)]
    options = DistilOptions()
    student = copy.deepcopy(teacher)
    lesson = _Lesson(teacher, student, "feature-extraction", options, None)
    lesson.check(rows, None)
    batch = lesson.collate(rows)
    assert lesson.loss(student, batch)[0].item() == 0.0
    student = smaller_encoder(teacher, channels=48, layers=(1,))
    lesson = _Lesson(teacher, student, "feature-extraction", options, None)
    lesson.check(rows, [1])
    without = _Lesson(teacher, student, "feature-extraction", DistilOptions(hidden_weight=0.0), None)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        loss = float(lesson.loss(student, batch)[0] - without.loss(student, batch)[0])
        theirs = teacher(**batch, output_hidden_states=True).hidden_states
        ours = student(**batch, output_hidden_states=True).hidden_states
    expected = []
    for mine, wanted in ((ours[0], theirs[1]), (ours[1], theirs[2])):
        normal = [
            (part - part.mean(-1, keepdim=True)) / part.std(-1, correction=0, keepdim=True) for part in (mine, wanted)
        ]
        expected.append(float((normal[0] - normal[1])[real].square().mean()))
    assert loss == pytest.approx(np.mean(expected), rel=1e-4)


KINDS = ("single_label_classification", "multi_label_classification", "regression")


@pytest.mark.parametrize(
    ("task", "kind"), [(task, kind) for task in TASKS for kind in (KINDS if task == "text-classification" else (None,))]
)
def test_padding_does_not_count_and_equals_have_no_loss(task: str, kind: str | None) -> None:
    more = {"num_labels": 3, "problem_type": kind} if kind else {}
    teacher = model_for(task, **more)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    rows = [{"input_ids": row["input_ids"]} for row in questions(6, 0)]
    lesson = _Lesson(teacher, student, task, DistilOptions(temperature=3.0), None)
    lesson.check(rows, None)
    batch = lesson.collate(rows)
    padded = {name: torch.nn.functional.pad(tensor, (0, 9), value=0) for name, tensor in batch.items()}
    with torch.no_grad():
        loss, more_padding = (float(lesson.loss(student, inputs)[0]) for inputs in (batch, padded))
        nothing = float(lesson.loss(teacher, batch)[0])
    assert loss > 1e-3
    assert more_padding == pytest.approx(loss, abs=1e-6)
    assert nothing == pytest.approx(0.0, abs=1e-7)


def test_divergences_are_those_of_their_definitions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def by_definition(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        p, q = (logits.double().div(3.0).softmax(-1) for logits in (theirs, ours))
        return 9.0 * (p * (p / q).log()).sum(-1)

    found = divergence.of_tokens({"logits": student}, {"logits": teacher}, real, 3.0)
    assert float(found) == pytest.approx(float(by_definition(student, teacher)[real].mean()), rel=1e-5)
    ours, theirs = student[..., 0], teacher[..., 0]
    spans = {"start_logits": ours, "end_logits": ours}, {"start_logits": theirs, "end_logits": theirs}
    whole = by_definition(ours[:1], theirs[:1]), by_definition(ours[1:, :3], theirs[1:, :3])
    assert float(divergence.of_spans(*spans, real, 3.0)) == pytest.approx(float(torch.cat(whole).mean()), rel=1e-5)
    classes = divergence.of_classes({"logits": student[0]}, {"logits": teacher[0]}, real, 3.0)
    assert float(classes) == pytest.approx(float(by_definition(student[0], teacher[0]).mean()), rel=1e-5)
    both = torch.stack([student[0], torch.zeros(5, 7)], -1), torch.stack([teacher[0], torch.zeros(5, 7)], -1)
    labels = divergence.of_labels({"logits": student[0]}, {"logits": teacher[0]}, real, 3.0)
    assert float(labels) == pytest.approx(float(by_definition(*both).mean()), rel=1e-5)


def test_a_vocabulary_in_parts_gives_the_same_gradient_and_survives_padding_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(3, 6, 11)
    real = torch.rand(3, 6) < 0.6
    gradients, losses = [], []
    for at_once in (2**24, 25):  # all rows, two rows
        monkeypatch.setattr(divergence, "_NUMBERS_AT_ONCE", at_once)
        torch.manual_seed(1)
        logits = torch.randn(3, 6, 11).masked_fill(~real[..., None], torch.nan).requires_grad_()
        loss = divergence.of_tokens({"logits": logits}, {"logits": teacher}, real, 2.0)
        loss.backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
    assert torch.isfinite(gradients[0]).all()
    assert not gradients[0][~real].any()


def test_labels_add_the_task_s_own_loss(classifier: Any) -> None:
    rows = questions(8, 1)
    student = smaller_encoder(classifier)
    losses = []
    for weight in (0.0, 0.5):
        lesson = _Lesson(classifier, student, "text-classification", DistilOptions(label_weight=weight), None)
        lesson.check(rows, None)
        with torch.no_grad():
            losses.append(float(lesson.loss(student, lesson.collate(rows))[0]))
    logits, gold = answers(student, rows), torch.tensor([row["labels"] for row in rows])
    own = float(torch.nn.functional.cross_entropy(logits, gold))
    assert losses[1] - losses[0] == pytest.approx(0.5 * own, rel=1e-4)


class _StoppedError(Exception):
    pass


def test_a_resume_after_a_kill_gives_the_same_weights_and_refuses_another_lesson(
    classifier: Any, tmp_path: Path
) -> None:
    rows = questions(48, 1)
    training = TrainingOptions(epochs=1, batch_size=8, checkpoints=tmp_path / "whole", checkpoint_every=2)
    options = DistilOptions(training=training)
    whole, halved = smaller_encoder(classifier), smaller_encoder(classifier)
    distil(classifier, whole, rows, task="text-classification", options=options)

    def stop(text: str) -> None:
        if text.startswith("step 4 "):
            raise _StoppedError

    killed = dataclasses.replace(options, training=dataclasses.replace(training, checkpoints=tmp_path / "killed"))
    with pytest.raises(_StoppedError):
        distil(classifier, halved, rows, task="text-classification", options=killed, progress=stop)
    again = dataclasses.replace(killed, training=dataclasses.replace(killed.training, resume=True))
    other = dataclasses.replace(again, temperature=5.0)
    with pytest.raises(InputError, match=r"resumed with another temperature \(2.0, now 5.0\)"):
        distil(classifier, smaller_encoder(classifier), rows, task="text-classification", options=other)
    with pytest.raises(InputError, match="training data"):
        distil(classifier, smaller_encoder(classifier), rows[1:], task="text-classification", options=again)
    steps: list[str] = []
    resumed = smaller_encoder(classifier)
    distil(classifier, resumed, rows, task="text-classification", options=again, progress=steps.append)
    assert steps[0].startswith(("step 3 ", "step 5 "))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


_ONE_OF_TWO = """
import sys, torch
from pathlib import Path
from test_distil import TrainingOptions, DistilOptions, distil, encoder, questions, smaller_encoder
teacher = encoder(num_labels=3)
student = smaller_encoder(teacher)
rows = [{"input_ids": row["input_ids"]} for row in questions(32, 1)]
options = DistilOptions(training=TrainingOptions(epochs=1, batch_size=8, learning_rate=2e-3))
summary = distil(teacher, student, rows, task="text-classification", options=options)
assert summary.training.steps == 2, summary
torch.save(student.state_dict(), Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
"""


def test_two_processes_train_one_student(tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "one.py").write_text(_ONE_OF_TWO)
    paths = [str(here), str(here.parent), *sys.path]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "one.py", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    start = smaller_encoder(encoder(num_labels=3)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], start[name]) for name in first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "speech"}, "no distillation for the task 'speech'"),
        ({"examples": []}, "no examples"),
        ({"examples": [{"input_ids": []}]}, "Example 0"),
        ({"examples": [{"input_ids": [2]}, {"input_ids": [2, 99]}]}, "Example 1 .* 0 to 98"),
        ({"examples": [{"input_ids": [2], "labels": 1}, {"input_ids": [2]}]}, "Example 1 has input_ids; the first one"),
        ({"examples": [{"input_ids": [2] * 41}]}, "teacher .* 41 tokens"),
        ({"layers": [0, 2]}, r"layers is \[0, 2\]; .* 0 to 1"),
        ({"layers": [1, 0]}, "in order"),
        ({"layers": [0]}, "2 layers"),
        ({"task": "question-answering"}, "as a model for question-answering"),
        ({"pooling": lambda states, mask: states[:, 0]}, "as a model for text-classification"),
        ({"pooling": torch.nn.Identity(), "task": "token-classification"}, "goes with feature-extraction and text-cl"),
        ({"options": DistilOptions(label_weight=1.0)}, "no labels"),
    ],
)
def test_bad_input_is_one_clear_error(given: dict[str, Any], message: str) -> None:
    teacher = encoder(num_labels=3)
    student = copy.deepcopy(teacher)
    usual = {"task": "text-classification", "examples": [{"input_ids": [2, 30, 3]}], **given}
    with pytest.raises((InputError, RecipeError), match=message):
        distil(teacher, student, usual.pop("examples"), **usual)
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in student.state_dict().items())


def test_a_student_that_does_not_fit_its_teacher_is_refused() -> None:
    teacher, rows = encoder(num_labels=3), [{"input_ids": [2, 30, 3]}]
    with pytest.raises(InputError, match=r"shape \[2, 2\] where its teacher answers \[2, 3\]"):
        distil(teacher, encoder(num_labels=2), rows, task="text-classification")
    with pytest.raises(InputError, match="share weights"):
        distil(teacher, teacher, rows, task="text-classification")
    wider = tf.AutoModelForSequenceClassification.from_config(
        tf.BertConfig(**{**teacher.config.to_dict(), "hidden_size": 64})
    )
    with pytest.raises(InputError, match="of width 32, the student 3 of width 64"):
        distil(teacher, wider, rows, task="text-classification")
    broken = copy.deepcopy(teacher)
    broken.classifier.weight = torch.nn.Parameter(torch.zeros(3, 31))
    with pytest.raises(InputError, match=r"The student .* does not answer"):
        distil(teacher, broken, rows, task="text-classification")


def test_a_loss_that_is_no_number_stops() -> None:
    teacher = encoder(num_labels=3)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.classifier.bias[0] = torch.nan
    with pytest.raises(QualityError, match="at step 1 the loss"):
        distil(teacher, student, [{"input_ids": [2, 30, 3]}], task="text-classification")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0; it is a number above 0"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1.0"),
        ({"label_weight": float("nan")}, "label_weight is nan"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DistilOptions(**options)
