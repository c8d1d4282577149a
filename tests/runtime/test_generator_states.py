"""Generation with layers that keep a state of one size, which can be copied and forgotten but not cut back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import save_decoder
from transformers import AutoModelForCausalLM

import onnxpress
from onnxpress.errors import InputError
from onnxpress.runtime import Generator

pytestmark = pytest.mark.newest

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
PROMPTS = ["the end of the thing", "x", "in and in", "a man in the land and then some"]


@pytest.fixture(scope="module", params=["qwen3.5", "lfm2", "mamba2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("model") / "tiny", request.param, template=TEMPLATE)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Generator:
    artifact = onnxpress.build(
        folder, task="text-generation", precision="fp32", measure=False, out=folder.with_name("artifact")
    )
    runner = onnxpress.load(artifact.path)
    assert isinstance(runner, Generator)
    return runner


@pytest.fixture
def generator(shared: Generator) -> Generator:
    shared.reset()
    return shared


def test_greedy_text_is_pytorchs(generator: Generator, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for prompt, found in zip(PROMPTS, generator.generate(PROMPTS, max_new_tokens=60, ignore_eos=True), strict=True):
        ids = list(generator.tokenizer.inner.encode(prompt).ids)
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found.token_ids == expected[0, len(ids) :].tolist()


def test_a_batch_answers_as_each_prompt_alone(generator: Generator) -> None:
    """More prompts than rows, that end at different times: rows change places, and begin anew with others' states in them."""
    prompts = [prompt + "!" * (index % 5) for index, prompt in enumerate(PROMPTS * 6)]
    limits: dict[str, Any] = {"max_new_tokens": 30, "stop": ["a", "b"], "temperature": 1.5, "seed": 7}
    together = generator.generate(prompts, **limits)
    assert len({len(item.token_ids) for item in together}) > 3
    for prompt, found in zip(prompts, together, strict=True):
        generator.reset()
        alone = generator.generate(prompt, **limits)[0]
        assert (found.text, found.token_ids) == (alone.text, alone.token_ids)


def test_what_was_read_is_used_again_as_a_whole_or_not_at_all(generator: Generator) -> None:
    first = generator.generate([5, 6, 7, 8], max_new_tokens=5, ignore_eos=True)[0]
    read = [5, 6, 7, 8, *first.token_ids[:-1]]  # the last one was not read
    longer = [*read, 9, 10]
    again = generator.generate(longer, max_new_tokens=5, ignore_eos=True)[0]
    assert again.cached_tokens == len(read)
    other = generator.generate([*read[:-1], 11, 12], max_new_tokens=5, ignore_eos=True)[0]
    assert other.cached_tokens == 0
    for prompt, found in ((longer, again), ([*read[:-1], 11, 12], other)):
        generator.reset()
        assert generator.generate(prompt, max_new_tokens=5, ignore_eos=True)[0].token_ids == found.token_ids


def test_a_prompt_is_read_once_for_all_its_samples(generator: Generator) -> None:
    found = generator.generate("the end of", n=3, temperature=1.0, seed=3, max_new_tokens=6, ignore_eos=True)
    count = len(generator.tokenizer.inner.encode("the end of").ids)
    assert [item.cached_tokens for item in found] == [0, count, count]
    generator.reset()
    assert generator.generate("the end of", temperature=1.0, seed=3, max_new_tokens=6, ignore_eos=True)[0] == found[0]
    assert len({tuple(item.token_ids) for item in found}) == 3


def test_samples_of_one_prompt_repeat(generator: Generator) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 1, "max_new_tokens": 10, "ignore_eos": True}
    found = generator.generate("the end", **options)
    assert len({item.text for item in found}) == 3
    assert [item.text for item in generator.generate("the end", **options)] == [item.text for item in found]


def test_an_interrupted_step_leaves_no_wrong_prefix(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [5, 6, 7, 8, 9, 10]
    wanted = generator.generate(prompt, max_new_tokens=5, ignore_eos=True)[0].token_ids
    generator.reset()
    stream = generator.stream(prompt[:-1], max_new_tokens=50, ignore_eos=True)
    next(stream)
    bound = next(iter(generator._step._bound.values()))
    run = bound.binding.run

    def interrupted(**options: Any) -> None:
        run(**options)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(bound.binding), "run", lambda _, **options: interrupted(**options))
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    assert generator.generate(prompt, max_new_tokens=5, ignore_eos=True)[0].token_ids == wanted


def test_guessing_is_refused(generator: Generator) -> None:
    with pytest.raises(InputError, match="prompt_lookup needs a cache that can be cut back"):
        generator.generate("x", prompt_lookup=4)
