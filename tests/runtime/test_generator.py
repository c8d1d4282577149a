"""Generation on a tiny language model, against PyTorch's own `generate` and against itself in other company."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import CONTEXT, save_decoder
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM

import onnxpress
from onnxpress.errors import ArtifactError, InputError
from onnxpress.runtime import Generator
from onnxpress.runtime.detokenizer import Detokenizer, StopStrings
from onnxpress.runtime.generator import Piece, _Sequence
from onnxpress.runtime.sampler import Sampler, Sampling

pytestmark = pytest.mark.newest

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
PROMPTS = ["the end of the thing", "x", "in and in", "a man in the land and then some"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral with a window of 6 tokens: most of what is generated lies beyond it."""
    return save_decoder(tmp_path_factory.mktemp("model") / "tiny", "mistral", template=TEMPLATE)


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    return onnxpress.build(folder, precision="fp32", measure=False, out=folder.with_name("artifact")).path


@pytest.fixture(scope="module")
def shared(artifact: Path) -> Generator:
    runner = onnxpress.load(artifact)
    assert isinstance(runner, Generator)
    return runner


@pytest.fixture
def generator(shared: Generator) -> Generator:
    shared.reset()
    return shared


def ids_of(generator: Generator, text: str) -> list[int]:
    return list(generator.tokenizer.inner.encode(text).ids)


def test_greedy_text_is_pytorchs(generator: Generator, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for prompt, found in zip(PROMPTS, generator.generate(PROMPTS, max_new_tokens=60, ignore_eos=True), strict=True):
        ids = ids_of(generator, prompt)
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found.token_ids == expected[0, len(ids) :].tolist()
        assert (found.finish_reason, found.prompt_tokens) == ("length", len(ids))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 7, "top_p": 0.9, "repetition_penalty": 1.1}])
def test_a_batch_answers_as_each_prompt_alone(generator: Generator, options: dict[str, Any]) -> None:
    """More prompts than rows, of unequal lengths, that end at different times: rows change places on the way."""
    prompts = [prompt + "!" * (index % 5) for index, prompt in enumerate(PROMPTS * 6)]
    limits = {"max_new_tokens": 30, "stop": ["a", "b"], **options}
    together = generator.generate(prompts, **limits)
    assert len({len(item.token_ids) for item in together}) > 3
    for prompt, found in zip(prompts, together, strict=True):
        generator.reset()
        alone = generator.generate(prompt, **limits)[0]
        assert (found.text, found.token_ids, found.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "seed": 5}])
def test_guessed_tokens_change_nothing_but_the_steps(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    """Of few tokens, so that some guesses come true and others do not."""
    few = dict.fromkeys((101, 102, 103), 1000.0)
    options: dict[str, Any] = {"max_new_tokens": 80, "logit_bias": few, **sampling}
    plain = generator.generate(PROMPTS[0], **options)[0]
    steps: list[int] = []
    run = generator._step.run

    def counted(first: int, tokens: Any, answers: Any = None) -> Any:
        steps.append(len(tokens[0]))
        return run(first, tokens, answers)

    monkeypatch.setattr(generator._step, "run", counted)
    generator.reset()
    guessed = generator.generate(PROMPTS[0], prompt_lookup=4, **options)[0]
    assert guessed.token_ids == plain.token_ids
    assert set(steps[1:]) >= {1, 5}
    assert len(steps) < 80
    monkeypatch.undo()
    follows = generator.generate(
        ids_of(generator, PROMPTS[0]) + plain.token_ids[:40], **options | {"max_new_tokens": 20}
    )[0]
    assert follows.cached_tokens >= len(ids_of(generator, PROMPTS[0])) + 39  # wrong guesses are not in the cache
    if not sampling:
        assert follows.token_ids == plain.token_ids[40:60]


@pytest.mark.parametrize("stop", [{"stop": ["e"]}, {"stop_token_ids": [101]}, {"max_new_tokens": 7}])
def test_guesses_end_where_the_answer_does(generator: Generator, stop: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "logprobs": 1, **stop}
    plain, guessed = (generator.generate(PROMPTS[0] * 3, prompt_lookup=count, **options)[0] for count in (0, 8))
    assert (guessed.text, guessed.token_ids, guessed.finish_reason) == (
        plain.text,
        plain.token_ids,
        plain.finish_reason,
    )
    assert guessed.logprobs is not None
    assert plain.logprobs is not None
    np.testing.assert_allclose(
        [item.logprob for item in guessed.logprobs], [item.logprob for item in plain.logprobs], atol=1e-4
    )


@pytest.mark.parametrize("count", [-1, 17, 2.0, True])
def test_prompt_lookup_takes_small_numbers(generator: Generator, count: Any) -> None:
    with pytest.raises(InputError, match="from 0 to 16"):
        generator.stream("x", prompt_lookup=count)


def test_hidden_states_are_refused_where_there_are_none(generator: Generator) -> None:
    with pytest.raises(InputError, match="build it again with --hidden-states"):
        generator.hidden_states("x")


def test_streaming_gives_the_same_in_pieces(generator: Generator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 3}
    whole = generator.generate(PROMPTS, **options)
    texts = [""] * len(PROMPTS)
    last: dict[int, Piece] = {}
    for piece in generator.stream(PROMPTS, **options):
        assert piece.index not in last or last[piece.index].generation is None
        texts[piece.index] += piece.text
        last[piece.index] = piece
    assert texts == [item.text for item in whole]
    assert all(last[index].generation is not None for index in range(len(PROMPTS)))


def test_several_samples_differ_and_repeat(generator: Generator) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 2.0, "seed": 5, "max_new_tokens": 20}
    first = [item.token_ids for item in generator.generate("the", **options)]
    assert len({tuple(ids) for ids in first}) == 3
    assert [item.token_ids for item in generator.generate(["x", "the"], **options)][3:] == first


def test_a_prompt_that_is_in_the_cache_is_not_computed_again(generator: Generator) -> None:
    prompt = ids_of(generator, "the man in the land and the thing in the end")
    first = generator.generate([prompt], max_new_tokens=8, ignore_eos=True)[0]
    assert first.cached_tokens == 0
    turn = [*prompt, *first.token_ids, *ids_of(generator, " and then")]
    again = generator.generate([turn], max_new_tokens=12)[0]
    assert again.cached_tokens == len(prompt) + 7  # the last token of the answer was never read
    other = generator.generate([[*prompt[:10], 5, 6]], max_new_tokens=4)[0]
    assert other.cached_tokens == 10
    generator.reset()
    fresh = generator.generate([turn], max_new_tokens=12)[0]
    assert fresh.cached_tokens == 0
    assert fresh.token_ids == again.token_ids


def test_conversations_in_turn_keep_their_caches(artifact: Path, generator: Generator) -> None:
    several = onnxpress.load(artifact)
    assert isinstance(several, Generator)
    texts = [ids_of(generator, start + " the end of the land and the man") for start in "ABCDE"]
    for turn in range(3):
        for index, text in enumerate(texts[:4]):
            found = several.generate([text], max_new_tokens=6, ignore_eos=True)[0]
            generator.reset()
            assert found.token_ids == generator.generate([text], max_new_tokens=6, ignore_eos=True)[0].token_ids
            assert found.cached_tokens == (len(text) - 2 if turn else 0)
            texts[index] = [*text, *found.token_ids, 7]
    together = several.generate(texts[:3], max_new_tokens=6, ignore_eos=True)
    assert [item.cached_tokens for item in together] == [len(text) - 2 for text in texts[:3]]
    assert several._cache.rows == 4
    # A fifth takes the place of the one that has waited longest.
    assert several.generate([texts[4]], max_new_tokens=2)[0].cached_tokens == 0
    assert several._cache.rows == 4
    known = [max(several._cache.usable(row, text) for row in range(4)) for text in texts]
    assert [length > 0 for length in known] == [True, True, True, False, True]


def test_conversations_with_one_beginning_keep_their_own_rows(artifact: Path, generator: Generator) -> None:
    """A system prompt that is most of each: none takes the row of another while there are free ones."""
    several = onnxpress.load(artifact)
    assert isinstance(several, Generator)
    system = [*range(5, 45)]
    texts = [[*system, 50 + index, 60 + index] for index in range(5)]
    for turn in range(2):
        for index, text in enumerate(texts[:4]):
            found = several.generate([text], max_new_tokens=6, ignore_eos=True)[0]
            generator.reset()
            assert found.token_ids == generator.generate([text], max_new_tokens=6, ignore_eos=True)[0].token_ids
            assert found.cached_tokens == (len(text) - 2 if turn else len(system) if index else 0)
            texts[index] = [*text, *found.token_ids, 7]
    # A fifth takes the row of the one that has waited longest, though all share as much with it.
    assert several.generate([texts[0]], max_new_tokens=2)[0].cached_tokens == len(texts[0]) - 2
    assert several.generate([texts[4]], max_new_tokens=2)[0].cached_tokens == len(system)
    known = [max(several._cache.usable(row, text) for row in range(4)) for text in texts]
    assert [length > len(system) for length in known] == [True, False, True, True, True]


def test_a_conversation_that_outgrows_the_budget_keeps_its_own_row(
    artifact: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxpress.runtime.cache._GROWTH", 16)
    small = onnxpress.load(artifact, cache_bytes=4 * 32 * generator._cache.bytes_per_token)
    assert isinstance(small, Generator)
    for first in range(4):
        small.generate([[*range(50 * first + 5, 50 * first + 25)]], max_new_tokens=8)
    assert small._cache.rows == 4
    last = [*range(155, 175), *range(5, 20)]
    found = small.generate([last], max_new_tokens=8, ignore_eos=True)[0]
    assert small._cache.rows == 2
    assert found.cached_tokens == 20
    assert found.token_ids == generator.generate([last], max_new_tokens=8, ignore_eos=True)[0].token_ids


def test_without_budget_a_new_conversation_takes_the_row(artifact: Path, generator: Generator) -> None:
    small = onnxpress.load(artifact, cache_bytes=128 * generator._cache.bytes_per_token)
    assert isinstance(small, Generator)
    for prompt in PROMPTS[:3]:
        generator.reset()
        found = small.generate(prompt, max_new_tokens=40)[0]
        assert found.token_ids == generator.generate(prompt, max_new_tokens=40)[0].token_ids
        assert small._cache.rows == 1


def test_chat_turns_know_the_conversation(generator: Generator) -> None:
    messages = [{"role": "user", "content": "the man"}]
    answer = generator.generate(messages=messages, max_new_tokens=10)[0]
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "and then?"}]
    turn = generator.generate(messages=messages, max_new_tokens=10)[0]
    assert turn.cached_tokens >= len(ids_of(generator, "[user]the man\n[assistant]")) - 1
    several = generator.generate(messages=[messages, messages[:1]], max_new_tokens=10)
    assert [item.token_ids for item in several] == [turn.token_ids, answer.token_ids]


def test_stops_are_not_part_of_the_answer(generator: Generator) -> None:
    whole = generator.generate("the end", max_new_tokens=40, ignore_eos=True)[0]
    middle = whole.text[len(whole.text) // 2 :][:3]
    cut = generator.generate("the end", max_new_tokens=40, ignore_eos=True, stop=middle)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(middle)]
    token = whole.token_ids[5]
    ended = generator.generate("the end", max_new_tokens=40, stop_token_ids=[token], ignore_eos=True)[0]
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    assert ended.finish_reason == "stop"


def test_stops_may_be_special_tokens(generator: Generator) -> None:
    special = {"logit_bias": {1: 1e6}, "max_new_tokens": 6, "ignore_eos": True}
    ended = generator.generate("the end", stop="<|begin|>", **special)[0]
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("", [], "stop")
    whole = generator.generate("the end", stop=None, stop_token_ids=None, **special)[0]
    assert len(whole.token_ids) == 6


def test_a_stop_string_before_half_a_character_is_the_reason_to_stop() -> None:
    inner = Tokenizer(models.BPE({"a": 0, ".": 1, "ĠÃ": 2}, []))  # the last is a space and half of a character
    inner.decoder = decoders.ByteLevel()
    sequence = _Sequence(
        index=0,
        prompt=[0],
        limit=2,
        limit_reason="length",
        sampler=Sampler(Sampling(), [0], vocabulary=3),
        detokenizer=Detokenizer(inner, [0]),
        stops=StopStrings((". ",)),
        ends=frozenset(),
        logprobs=None,
        lookup=None,
    )
    assert sequence.take(np.eye(3, dtype=np.float32)[1]).text == ""
    last = sequence.take(np.eye(3, dtype=np.float32)[2]).generation
    assert last is not None
    assert (last.text, last.finish_reason) == ("", "stop")


def test_logprobs_are_those_of_the_tokens(generator: Generator) -> None:
    found = generator.generate("the", max_new_tokens=6, logprobs=2, ignore_eos=True)[0]
    assert found.logprobs is not None
    assert [item.token_id for item in found.logprobs] == found.token_ids
    for item in found.logprobs:
        assert item.top[0] == (item.token_id, item.logprob)  # greedy
        assert item.logprob > item.top[1][1]


def test_the_context_ends_an_answer(generator: Generator) -> None:
    prompt = [5] * (CONTEXT - 10)
    found = generator.generate([prompt], ignore_eos=True)[0]
    assert (found.finish_reason, len(found.token_ids)) == ("context", 10)
    with pytest.raises(InputError, match=rf"context of {CONTEXT} leaves 10"):
        generator.generate([prompt], max_new_tokens=11)
    with pytest.raises(InputError, match=rf"The prompt has {CONTEXT} tokens, and the model's context is {CONTEXT}"):
        generator.generate([[5] * CONTEXT])


def test_a_budget_bounds_the_cache(artifact: Path) -> None:
    whole = onnxpress.load(artifact)
    assert isinstance(whole, Generator)
    small = onnxpress.load(artifact, cache_bytes=3 * 128 * whole._cache.bytes_per_token)
    assert isinstance(small, Generator)
    answers = small.generate(PROMPTS * 2, max_new_tokens=40)
    assert small._cache.rows == 3
    assert [item.token_ids for item in answers] == [
        item.token_ids for item in whole.generate(PROMPTS * 2, max_new_tokens=40)
    ]
    tiny = onnxpress.load(artifact, cache_bytes=1000)
    assert isinstance(tiny, Generator)
    with pytest.raises(InputError, match="raise cache_bytes, or ask for fewer tokens"):
        tiny.generate("the")
    for nothing in (0, -1, 0.5):
        with pytest.raises(InputError, match=r"cache_bytes is .*; it takes a whole number from 1 on"):
            onnxpress.load(artifact, cache_bytes=nothing)  # type: ignore[arg-type]


def test_an_answer_that_nobody_waits_for_leaves_the_generator_whole(generator: Generator) -> None:
    expected = generator.generate("the end", max_new_tokens=20)[0]
    stream = generator.stream(["the end", "x"], max_new_tokens=20)
    next(stream)
    stream.close()
    assert generator.generate("the end", max_new_tokens=20)[0].token_ids == expected.token_ids


def test_an_open_stream_is_not_waited_for_by_its_own_thread(generator: Generator) -> None:
    stream = generator.stream("the end", max_new_tokens=20)
    next(stream)
    for call in (lambda: generator.generate("x"), generator.reset):
        with pytest.raises(InputError, match="begun in this thread is still open"):
            call()
    stream.close()
    assert generator.generate("x", max_new_tokens=3)


def test_an_interrupt_between_layers_gives_no_wrong_prefix(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ([*range(5, 25)], [*range(30, 50)])
    expected = [item.token_ids for item in generator.generate([first, second], max_new_tokens=6, ignore_eos=True)]
    cache = generator._cache

    class Interrupting(dict):  # type: ignore[type-arg]
        def values(self) -> Any:
            yield next(iter(super().values()))
            raise KeyboardInterrupt

    whole = cache.arrays
    monkeypatch.setattr(cache, "arrays", Interrupting(whole))
    with pytest.raises(KeyboardInterrupt):
        cache.swap(0, 1)
    monkeypatch.setattr(cache, "arrays", whole)
    again = [generator.generate([prompt], max_new_tokens=6, ignore_eos=True)[0] for prompt in (first, second)]
    assert [item.token_ids for item in again] == expected


def test_threads_wait_for_each_other(generator: Generator) -> None:
    expected = [item.token_ids for item in generator.generate(PROMPTS, max_new_tokens=15)]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = generator.generate(PROMPTS[index], max_new_tokens=15)[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(PROMPTS))] == expected


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "Give either prompts or messages"),
        (("x",), {"messages": [{"role": "user", "content": "x"}]}, "Give either prompts or messages"),
        (("",), {}, "Prompt 0 is empty"),
        (([],), {}, "No prompt was given"),
        ((["ok", ""],), {}, "Prompt 1 is empty"),
        (([[]],), {}, "Prompt 0 has no tokens"),
        (([[1, 320]],), {}, "token id 320; the model has 0 to 319"),
        (([[-1]],), {}, "token id -1"),
        (([3.5],), {}, "Prompt 0 is a float"),
        ((["ok", None],), {}, "Prompt 1 is a NoneType"),
        (("\ud83d",), {}, "half a character"),
        (("x",), {"temperature": -1}, "temperature is -1; it takes 0"),
        (("x",), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (("x",), {"n": 0}, "n is 0"),
        (("x",), {"stop": [""]}, "stop takes strings"),
        (("x",), {"logprobs": -1}, "logprobs is -1"),
        (("x",), {"logprobs": True}, "logprobs is True"),
        (("x",), {"warmth": 1}, "Unknown option 'warmth'"),
        (("x",), {"logit_bias": {400: 1.0}}, "logit_bias names the token 400"),
        (("x",), {"template_variables": {"tools": []}}, "go with messages"),
        (("x",), {"stop": 5}, "stop takes strings"),
        (("x",), {"stop_token_ids": 5}, "stop_token_ids takes a list"),
        (("x",), {"stop_token_ids": ["a"]}, "stop_token_ids takes a list"),
        ((b"hello",), {}, "Prompt 0 is a int"),
        ((5,), {}, "The prompts are a int"),
        ((np.zeros((2, 2), np.int64),), {}, "The prompts are a ndarray"),
        ((), {"messages": 5}, "Messages are a list"),
        ((), {"messages": []}, "Messages are a list"),
        ((), {"messages": [{"role": "user", "content": "\ud83d"}]}, "half a character"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    generator: Generator, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator.stream(*arguments, **options)


def test_a_model_without_a_template_says_so(artifact: Path) -> None:
    runner = onnxpress.load(artifact)
    assert isinstance(runner, Generator)
    runner.template = None
    with pytest.raises(InputError, match="has no chat template"):
        runner.generate(messages=[{"role": "user", "content": "x"}])


def test_an_artifact_without_a_tokenizer_says_so(artifact: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        onnxpress.load(copy)


def test_options_may_be_numpys_numbers(generator: Generator) -> None:
    plain = {"max_new_tokens": 5, "temperature": 2.0, "top_k": 9, "seed": 3}
    numpys = {"max_new_tokens": np.int8(5), "temperature": np.float32(2), "top_k": np.int32(9), "seed": np.uint64(3)}
    one, other = (generator.generate("the end", **options)[0] for options in (plain, numpys))
    assert one.token_ids == other.token_ids


def test_ids_may_be_an_array(generator: Generator) -> None:
    ids = ids_of(generator, "the end")
    one, other, third = generator.generate([np.array(ids), ids, "the end"], max_new_tokens=5)
    assert one.token_ids == other.token_ids == third.token_ids
    assert generator.generate(np.array(ids), max_new_tokens=5)[0].token_ids == one.token_ids
