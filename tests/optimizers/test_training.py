"""Training: deterministic, resumed bit for bit after a kill, and refused in one sentence where it cannot be."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mortal
import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import CONFIGS

from onnxpress.errors import InputError, OnnxpressError, OutputError, QualityError
from onnxpress.optimizers.training import TrainingOptions, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")


OPTIONS = TrainingOptions(epochs=2, batch_size=4, learning_rate=1e-3, seed=3)


def small_model() -> Any:
    torch.manual_seed(1)
    return tf.AutoModelForSequenceClassification.from_config(CONFIGS["bert"](num_labels=2))


def examples(count: int = 18, seed: int = 0) -> list[dict[str, Any]]:
    """Whether token 10 or token 11 stands somewhere in a row."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = [2, *(int(token) for token in generator.integers(12, 60, size=generator.integers(2, 8))), 3]
        ids[1] = 10 + index % 2
        rows.append({"input_ids": ids, "labels": index % 2})
    return rows


def collate(items: list[Any]) -> dict[str, torch.Tensor]:
    length = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), length, dtype=torch.int64)
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def length(item: Any) -> int:
    return len(item["input_ids"])


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class KilledError(Exception):
    pass


def kill_at(step: int) -> Any:
    def progress(text: str) -> None:
        if text.startswith(f"step {step} of"):
            raise KilledError

    return progress


def test_it_learns_says_where_it_is_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model, said = small_model(), list[str]()
    options = dataclasses.replace(OPTIONS, epochs=6, learning_rate=5e-3)
    summary = train(
        model, examples(), options=options, collate=collate, evaluation=examples(10, seed=5), metrics=accuracy,
        best="accuracy", progress=said.append,
    )  # fmt: skip
    assert summary.steps == 30
    assert [entry["step"] for entry in summary.evaluations] == [5, 10, 15, 20, 25, 30]
    assert max(entry["accuracy"] for entry in summary.evaluations) == 1.0
    assert summary.best_step in {entry["step"] for entry in summary.evaluations if entry["accuracy"] == 1.0}
    assert summary.loss < 0.7
    assert len(said) == 30
    assert said[0].startswith("step 1 of 30")
    assert not model.training
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_seed_decides_and_the_processs_random_numbers_go_on() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(5)
        model = small_model()
        torch.manual_seed(5)
        train(model, examples(), options=dataclasses.replace(OPTIONS, seed=seed), collate=collate)
        assert torch.equal(torch.rand(3), expected)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_every_epoch_has_all_examples_in_batches_of_like_lengths() -> None:
    data = [{**example, "number": number} for number, example in enumerate(examples(66))]

    def epochs(by_length: bool) -> list[list[list[int]]]:
        seen: list[list[int]] = []

        def watching(items: list[Any]) -> dict[str, torch.Tensor]:
            seen.append([item["number"] for item in items])
            return collate(items)

        train(small_model(), data, options=OPTIONS, collate=watching, length=length if by_length else None)
        assert len(seen) == 34
        return [seen[:17], seen[17:]]

    def padding(batches: list[list[int]]) -> int:
        sizes = [[length(data[number]) for number in batch] for batch in batches]
        return sum(max(batch) * len(batch) - sum(batch) for batch in sizes)

    first, second = epochs(by_length=True)
    by_chance, _ = epochs(by_length=False)
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [4] * 16 + [2]
        assert sorted(itertools.chain(*batches)) == list(range(66))
        assert padding(batches) < padding(by_chance) / 2
    as_sets = [{frozenset(batch) for batch in batches} for batches in (first, second)]
    assert len(as_sets[0] & as_sets[1]) < 4, "batches are made anew, not only put in another order"


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_kill_and_a_resume_give_the_weights_of_an_uninterrupted_run(tmp_path: Path, step: int) -> None:
    more: dict[str, Any] = {
        "collate": collate, "evaluation": examples(6, seed=5), "metrics": accuracy, "best": "accuracy", "length": length,
    }  # fmt: skip
    straight = small_model()
    expected = train(straight, examples(), options=OPTIONS, **more)
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "run", checkpoint_every=3)
    with pytest.raises(KilledError):
        train(small_model(), examples(), options=options, progress=kill_at(step), **more)
    resumed, said = small_model(), list[str]()
    summary = train(
        resumed, examples(), options=dataclasses.replace(options, resume=True), progress=said.append, **more
    )
    assert len(said) == 10 - {2: 0, 4: 3, 6: 5, 8: 6}[step]
    assert same(resumed, straight)
    assert (summary.best_step, summary.steps) == (expected.best_step, expected.steps)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not list(tmp_path.rglob("training_args.bin"))


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "run")
    again = dataclasses.replace(options, resume=True)

    def another(text: str) -> None:
        with pytest.raises(OutputError, match="Another training is at work in"):
            train(small_model(), examples(), options=again, collate=collate)

    train(small_model(), examples(), options=options, collate=collate, progress=another)
    train(small_model(), examples(), options=again, collate=collate)


@pytest.mark.parametrize("file", ["trainer_state.json", "model.safetensors"])
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path, file: str) -> None:
    straight = small_model()
    train(straight, examples(), options=OPTIONS, collate=collate)
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "run", checkpoint_every=3)
    with pytest.raises(KilledError):
        train(small_model(), examples(), options=options, collate=collate, progress=kill_at(5))
    cut = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(tmp_path / "run" / "checkpoint-3", cut)
    with (cut / file).open("r+b") as whole:
        whole.truncate(100)
    resumed = small_model()
    train(resumed, examples(), options=dataclasses.replace(options, resume=True), collate=collate)
    assert same(resumed, straight)


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    def never_better(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": 0.5}

    options = dataclasses.replace(OPTIONS, epochs=6, patience=2)
    more: dict[str, Any] = {
        "collate": collate, "evaluation": examples(4), "metrics": never_better, "best": "accuracy",
    }  # fmt: skip
    summary = train(small_model(), examples(), options=options, **more)
    assert (summary.stopped_early, summary.steps, summary.best_step) == (True, 15, 5)
    options = dataclasses.replace(options, checkpoints=tmp_path / "run")
    with pytest.raises(KilledError):
        train(small_model(), examples(), options=options, progress=kill_at(12), **more)
    resumed = train(small_model(), examples(), options=dataclasses.replace(options, resume=True), **more)
    assert (resumed.stopped_early, resumed.steps, resumed.best_step) == (True, 15, 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate (0.001, now 0.002)"),
        ({"data": 19}, "training data"),
        ({"identity": {"teacher": "other"}}, "teacher (first, now other)"),
        ({"evaluation": 5}, "evaluation data"),
    ],
)
def test_a_resume_with_something_else_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "run", checkpoint_every=2)

    def run(options: TrainingOptions, **more: Any) -> None:
        given = {"data": 18, "evaluation": 4, "identity": {"teacher": "first"}, **more}
        train(
            small_model(), examples(given["data"]), options=options, collate=collate, identity=given["identity"],
            evaluation=examples(given["evaluation"]), progress=kill_at(3),
        )  # fmt: skip

    with pytest.raises(KilledError):
        run(options)
    again = dataclasses.replace(options, resume=True, learning_rate=change.pop("learning_rate", 1e-3))
    with pytest.raises(InputError, match="cannot be resumed") as error:
        run(again, **change)
    assert named in str(error.value)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="nothing to resume"):
        train(small_model(), examples(), options=options, collate=collate)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "training.json").write_text("{")
    with pytest.raises(InputError, match=r"broken/training.json, .* cannot be read"):
        train(
            small_model(), examples(), collate=collate,
            options=dataclasses.replace(OPTIONS, checkpoints=tmp_path / "broken", resume=True),
        )  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        train(
            small_model(), examples(), options=dataclasses.replace(OPTIONS, checkpoints=tmp_path / "full"),
            collate=collate,
        )  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(
            small_model(), examples(), options=dataclasses.replace(OPTIONS, checkpoints=tmp_path / "file"),
            collate=collate,
        )  # fmt: skip


def test_a_full_disk_is_named_and_what_was_saved_before_stays(tmp_path: Path) -> None:
    """Whatever file meets the limit: weights, optimizer or state, each written by another library."""
    resource = pytest.importorskip("resource")
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "run")
    train(small_model(), examples(), options=options, collate=collate)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "run" / "checkpoint-10").iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, then in (("model.safetensors", "and resume, which begins at the start"), ("optimizer.pt", "and resume,")):
        options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 1000, before[1]))
        try:
            with pytest.raises(OutputError, match=rf"Writing a checkpoint into .*{name} failed: .*Free space, {then}"):
                train(small_model(), examples(), options=options, collate=collate)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        resumed, straight = small_model(), small_model()
        train(resumed, examples(), options=dataclasses.replace(options, resume=True), collate=collate)
        train(straight, examples(), options=OPTIONS, collate=collate)
        assert same(resumed, straight)


def test_a_loss_that_is_no_number_stops_at_its_step() -> None:
    seen = []

    def broken(model: Any, batch: Any) -> Any:
        outputs = model(**batch)
        seen.append(0)
        return outputs["loss"] * (float("nan") if len(seen) == 3 else 1.0), outputs

    with pytest.raises(QualityError, match="at step 3 the loss"):
        train(small_model(), examples(), options=OPTIONS, collate=collate, compute_loss=broken)


def test_a_training_that_failed_at_once_leaves_nothing_to_resume(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=1e30, checkpoints=tmp_path / "run")
    with pytest.raises(QualityError, match="not finite"):
        train(small_model(), examples(), options=options, collate=collate)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_said() -> None:
    def infinite_gradient(model: Any, batch: Any) -> Any:
        outputs = model(**batch)
        return (model.classifier.bias * 0).sqrt().sum(), outputs  # 0, with a gradient of nan

    options = dataclasses.replace(OPTIONS, max_steps=1)
    with pytest.raises(QualityError, match="weights"):
        train(small_model(), examples(), options=options, collate=collate, compute_loss=infinite_gradient)


def test_an_own_loss_is_what_is_minimized() -> None:
    def to_three(model: Any, batch: Any) -> Any:
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        return ((outputs["logits"] - 3.0) ** 2).mean(), outputs

    model = small_model()
    options = dataclasses.replace(OPTIONS, epochs=12, learning_rate=1e-2, schedule="cosine")
    train(model, examples(), options=options, collate=collate, compute_loss=to_three)
    batch = collate(examples())
    del batch["labels"]
    with torch.no_grad():
        assert float((model(**batch)["logits"] - 3.0).abs().mean()) < 0.2


def test_autocast() -> None:
    model, kinds = small_model(), set()
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *call: kinds.add(call[2].dtype))
    options = dataclasses.replace(OPTIONS, precision="bf16")
    summary = train(model, examples(), options=options, collate=collate)
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert np.isfinite(summary.loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 trains on CUDA")
def test_half_precision_needs_a_device() -> None:
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        train(small_model(), examples(), options=dataclasses.replace(OPTIONS, precision="fp16"), collate=collate)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is a positive"),
        ({"batch_size": True}, "batch_size is a positive"),
        ({"max_steps": -1}, "max_steps is a positive"),
        ({"learning_rate": 0.0}, "learning_rate is a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup": 1.0}, "warmup is a number of at least 0 and below 1"),
        ({"weight_decay": "a"}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"schedule": "step"}, "linear, cosine, constant"),
        ({"precision": "int8"}, "fp32, bf16, fp16"),
        ({"processes": 0}, "processes is a positive"),
        ({"processes": 3}, "batch_size is 32, which 3 processes cannot share evenly"),
        ({"resume": True}, "need a folder"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingOptions(**wrong)


LINE = [{"x": x, "labels": 2 * x} for x in range(8)]
TWO = dataclasses.replace(OPTIONS, processes=2)


def test_where_one_process_is_killed_the_others_end_too() -> None:
    with pytest.raises(OnnxpressError, match=r"One of the 2 processes ended early.*Signal 9"):
        train(mortal.Line(), LINE, options=TWO, collate=mortal.killed_in_the_second_process)


def test_what_one_of_the_processes_raises_is_raised(tmp_path: Path) -> None:
    data = [{"x": x, "labels": float("nan") if x == 5 else x} for x in range(8)]
    options = dataclasses.replace(TWO, checkpoints=tmp_path / "run")
    with pytest.raises(QualityError, match=r"at step . the loss held numbers that are not finite"):
        train(mortal.Line(), data, options=options, collate=mortal.collate)
    assert not (tmp_path / "run").exists(), "other options may begin anew there"


def test_what_only_this_process_knows_is_not_shared() -> None:
    with pytest.raises(InputError, match=r"cannot be handed to other processes.*or processes=1"):
        train(mortal.Line(), LINE, options=TWO, collate=lambda items: mortal.collate(items))


def test_processes_do_not_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"started in 2 processes by a launcher.*Start it once"):
        train(mortal.Line(), LINE, options=TWO, collate=mortal.collate)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with devices there is one process a device")
def test_two_processes_go_on_after_a_kill_and_keep_the_best_epoch(tmp_path: Path) -> None:
    """Checkpoints, evaluation and the best epoch are those of one process; 8 rows are batches of 4, two a process."""
    more: dict[str, Any] = {"collate": mortal.collate, "evaluation": LINE[:5], "length": mortal.size}
    models = []
    for processes in (1, 2):
        torch.manual_seed(0)
        models.append(mortal.Line())
        options = dataclasses.replace(
            OPTIONS, epochs=4, learning_rate=0.3, processes=processes, checkpoints=tmp_path / str(processes)
        )
        if processes == 2:
            with pytest.raises(KilledError):
                train(copy.deepcopy(models[1]), LINE, options=options, progress=kill_at(5), **more)
            options = dataclasses.replace(options, resume=True)
        summary = train(models[-1], LINE, options=options, **more)
        assert summary.steps == 8
    assert torch.allclose(models[0].linear.weight, models[1].linear.weight, rtol=1e-6)
    assert torch.allclose(models[0].linear.bias, models[1].linear.bias, rtol=1e-6)


def test_data_that_cannot_be() -> None:
    with pytest.raises(InputError, match="training set is empty"):
        train(small_model(), [], options=OPTIONS, collate=collate)
    with pytest.raises(InputError, match="evaluation set is empty"):
        train(small_model(), examples(), options=OPTIONS, collate=collate, evaluation=[])
    with pytest.raises(InputError, match="patience needs"):
        train(small_model(), examples(), options=dataclasses.replace(OPTIONS, patience=1), collate=collate)
    with pytest.raises(InputError, match="no metrics"):
        train(small_model(), examples(), options=OPTIONS, collate=collate, evaluation=examples(), best="accuracy")


def test_the_identity_is_json_that_names_the_options(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, checkpoints=tmp_path / "run")
    train(small_model(), examples(), options=options, collate=collate)
    written = json.loads((tmp_path / "run" / "training.json").read_text())
    assert written["learning_rate"] == 1e-3
    assert "checkpoints" not in written
