"""The comparison with PyTorch: what it looks at, and that it sees mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import VOCAB, OnnxRunner, save_model

from onnxpress.errors import ParityError
from onnxpress.exporters import ParityCheck, export
from onnxpress.exporters.verify import text_cases
from onnxpress.manifest import Signature, TensorSpec


class Masked(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(torch.arange(4) > 2, float("-inf"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(save_model(tmp_path_factory.mktemp("model"), "bert"))


class Altered:
    """A runner whose answers are changed."""

    def __init__(self, runner, change) -> None:
        self._runner, self._change, self.input_names = runner, change, runner.input_names

    def run(self, feeds):
        return self._change(self._runner.run(feeds), feeds)


def test_text_cases_cover_lengths_batches_and_padding():
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"), bounds=(0, 9))
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length"), bounds=(0, 1))
    signature = Signature(
        task="feature-extraction", inputs=(ids, mask), outputs=(), axes={"batch": (1, 8), "length": (1, 40)}
    )
    cases = text_cases(signature, pad_token_id=1)
    shapes = {(1, 1), (3, 1), (1, 2), (1, 20), (3, 20), (1, 40), (3, 40)}
    assert {case.feeds["input_ids"].shape for case in cases} == shapes
    assert len({case.name for case in cases}) == len(cases) == 14
    assert any((case.feeds["attention_mask"] == 0).any() for case in cases)
    for case in cases:
        tokens, real = case.feeds["input_ids"], case.feeds["attention_mask"].astype(bool)
        assert (tokens[real] != 1).all()
        assert (tokens[~real] == 1).all()
        assert real[:, 0].all()
        assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding on the right


def test_text_cases_close_with_the_token_that_the_original_wants():
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"), bounds=(0, 9))
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length"), bounds=(0, 1))
    axes = {"batch": (1, 8), "length": (1, 40)}
    signature = Signature(task="text-classification", inputs=(ids, mask), outputs=(), axes=axes)
    for case in text_cases(signature, pad_token_id=1, closing_token_id=0):
        tokens, real = case.feeds["input_ids"], case.feeds["attention_mask"].astype(bool)
        ends = real.sum(axis=1) - 1
        twice = real.all() and tokens.shape[1] > 1
        assert ((tokens == 0).sum(axis=1) == 1 + twice).all()
        assert (tokens[np.arange(len(tokens)), ends] == 0).all()
        assert (tokens[real] != 1).all()


def test_an_original_that_refuses_random_tokens(exported):
    class Refusing:
        input_names = ("input_ids", "attention_mask", "token_type_ids")

        def run(self, feeds):
            raise ValueError("not these")

    with pytest.raises(ParityError, match=r"itself refuses random tokens.*ValueError: not these"):
        ParityCheck(replace(exported, reference=Refusing()))


def test_a_small_error_is_named_with_output_case_and_numbers(exported, tmp_path):
    def change(answers, feeds):
        answers["last_hidden_state"][0, 0, 0] += 1e-3
        return answers

    runner = Altered(OnnxRunner(exported.graph.model, tmp_path), change)
    with pytest.raises(ParityError, match=r"last_hidden_state .* batch 1, length 1, seed 0 .*differs by up to 0\.001"):
        ParityCheck(exported).check(runner)


def test_not_a_number_is_an_error(exported, tmp_path):
    def change(answers, feeds):
        answers["last_hidden_state"][0, 0, 0] = np.nan
        return answers

    with pytest.raises(ParityError, match="differs by up to nan"):
        ParityCheck(exported).check(Altered(OnnxRunner(exported.graph.model, tmp_path), change))


@pytest.mark.parametrize(("place", "number"), [(3, 5.0), (3, np.inf), (0, -np.inf)])
def test_an_infinity_is_like_itself_alone(place, number, tmp_path):
    exported = export(Masked(), example_inputs=torch.randn(2, 4))

    def change(answers, feeds):
        answers["output_0"][0, place] = number
        return answers

    ParityCheck(exported).check(OnnxRunner(exported.graph.model, tmp_path))
    with pytest.raises(ParityError, match="differs by up to inf"):
        ParityCheck(exported).check(Altered(OnnxRunner(exported.graph.model, tmp_path), change))


class Filled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(torch.arange(4) > 2, -1e9)


def test_a_mask_allows_the_others_nothing(tmp_path):
    exported = export(Filled(), example_inputs=torch.randn(2, 4))

    def changed(place, by):
        def change(answers, feeds):
            answers["output_0"][0, place] += by
            return answers

        return Altered(OnnxRunner(exported.graph.model, tmp_path), change)

    ParityCheck(exported).check(changed(3, 64.0))  # the next number of float32
    for place, by in ((0, 0.01), (3, 1e6), (3, 1e9)):
        with pytest.raises(ParityError, match="differs by up to"):
            ParityCheck(exported).check(changed(place, by))


class Distances(torch.nn.Module):
    """Squared, of few points far from each other: what should be 0 is what adding large numbers leaves."""

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        squares = (points**2).sum(-1)
        return squares[:, :, None] + squares[:, None] - 2 * points @ points.transpose(1, 2)


def test_few_large_numbers_are_no_masks(tmp_path):
    torch.manual_seed(0)
    exported = export(Distances(), example_inputs=100 * torch.randn(1, 3, 3))

    def other(answers, feeds):
        places = np.arange(3)
        answers["output_0"][:, places, places] += 0.01
        return answers

    ParityCheck(exported).check(Altered(OnnxRunner(exported.graph.model, tmp_path), other))


def test_another_shape_is_an_error(exported, tmp_path):
    def change(answers, feeds):
        return {name: array[:, :, 1:] for name, array in answers.items()}

    with pytest.raises(ParityError, match=r"has the shape \(1, 1, 31\) where the original's has \(1, 1, 32\)"):
        ParityCheck(exported).check(Altered(OnnxRunner(exported.graph.model, tmp_path), change))


def test_padding_is_not_compared_and_attention_to_padding_is_noticed(exported, tmp_path):
    runner = OnnxRunner(exported.graph.model, tmp_path)

    def spoil_padding(answers, feeds):
        answers["last_hidden_state"][feeds["attention_mask"] == 0] = np.nan
        return answers

    assert ParityCheck(exported).check(Altered(runner, spoil_padding))

    class Unmasked:
        input_names = runner.input_names

        def run(self, feeds):
            return runner.run({**feeds, "attention_mask": np.ones_like(feeds["attention_mask"])})

    with pytest.raises(ParityError, match="padded"):
        ParityCheck(exported).check(Unmasked())


@pytest.mark.parametrize("name", ["bert", "fnet"])
def test_answers_that_hang_on_padding_are_said_to(name, tmp_path):
    """FNet mixes tokens with the padding beside them, in PyTorch too."""
    folder = save_model(tmp_path / "model", "bert")
    if name == "fnet":
        torch.manual_seed(0)
        config = tf.FNetConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=40
        )
        tf.FNetModel(config).save_pretrained(folder)
    exported = export(folder)
    check = ParityCheck(exported)
    check.check(OnnxRunner(exported.graph.model, tmp_path))
    assert any("hang on the padding beside it" in note for note in check.notes) == (name == "fnet")
