"""Language models on a card: the cache stays there, steps are replayed, and rows of unequal lengths do not disturb each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from tiny_decoders import save_decoder

import onnxpress
from onnxpress.artifact import Artifact
from onnxpress.runtime import CUDA, Generator, load
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.device import DeviceArray
from onnxpress.runtime.loading import verify_golden
from onnxpress.runtime.model_step import ModelStep

CONTEXT = 1024
PROMPTS = ["the cat in the house", "a", "then the mat ran in and the red dog sat on it, and on, and on", "ant in tin"]


def built(folder: Path, name: str, precision: str) -> Path:
    longer = {"max_position_embeddings": CONTEXT} if name in ("llama", "gemma2") else {}
    model = save_decoder(folder / "model", name, **longer)
    return onnxpress.build(model, target="cuda", precision=precision, keep_all=True, out=folder / "artifact").path


@pytest.fixture(scope="module", params=["fp16", "int4-weights"])
def artifact(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("llama"), "llama", request.param)


def opened(path: Path, **options: Any) -> Generator:
    runner = load(path, providers=[CUDA(**options)])
    assert isinstance(runner, Generator)
    return runner


def allowed(artifact: Path) -> float:
    """Of the largest logit: what rounding to 11 bits makes of it; with 4-bit weights the CPU rounds activations to 8 bits, too."""
    return 0.08 if Artifact.open(artifact).manifest.precision == "int4-weights" else 0.03


def followed(generator: Generator, texts: list[list[int]], parts: list[list[int]]) -> list[np.ndarray]:
    """Logits of every step: texts are read in the given parts, rows side by side."""
    session = generator.session
    cache = KeyValueCache(session.signature.inputs, context=generator.context, budget=2**28, memory=session.memory)
    step = ModelStep(session, cache)
    read = [0] * len(texts)
    found = []
    for counts in zip(*parts, strict=True):
        new = [text[at : at + count] for text, at, count in zip(texts, read, counts, strict=True)]
        found.append(step.run(0, new).copy())
        read = [at + count for at, count in zip(read, counts, strict=True)]
    return found


def test_steps_like_the_cpu(artifact: Path) -> None:
    """Prompts of unequal lengths, one of them in two parts, then single tokens: captured, not captured, and on the CPU."""
    random = np.random.default_rng(0)
    texts = [random.integers(2, 300, 80).tolist() for _ in range(3)]
    parts = [[20, 10, *[1] * 20], [13, 1, *[1] * 20], [1, 1, *[1] * 20]]
    cpu = load(artifact, providers=["cpu"])
    assert isinstance(cpu, Generator)
    assert cpu.session.on_cpu
    expected = followed(cpu, texts, parts)
    for options in ({}, {"graphs": False}):
        found = followed(opened(artifact, **options), texts, parts)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=allowed(artifact) * float(np.abs(one).max()))


def test_the_cache_lies_on_the_card(artifact: Path) -> None:
    generator = opened(artifact)
    assert generator.session.captures
    generator.generate("the", max_new_tokens=3, ignore_eos=True)
    assert all(isinstance(array, DeviceArray) for array in generator._cache.arrays.values())


def test_a_batch_answers_as_each_prompt_alone(artifact: Path) -> None:
    """Rows end at different times and change places; the cache grows past its first size."""
    generator = opened(artifact)
    limits = [40, 300, 90, 5]
    alone = [
        generator.generate(prompt, max_new_tokens=limit, ignore_eos=True)[0]
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    generator.reset()
    for _ in range(2):  # the second time most of each prompt is in the cache
        together = generator.generate(PROMPTS, max_new_tokens=300, ignore_eos=True)
        for one, other, limit in zip(alone, together, limits, strict=True):
            same = np.array(one.token_ids[:limit]) == np.array(other.token_ids[:limit])
            assert same[:5].all()  # later, near ties may fall otherwise: one row and several are rounded differently
    assert together[2].cached_tokens > 0


def test_stops_and_samples(artifact: Path) -> None:
    generator = opened(artifact)
    first = generator.generate("the cat", n=5, temperature=1.0, seed=3, max_new_tokens=12)
    again = generator.generate("the cat", n=5, temperature=1.0, seed=3, max_new_tokens=12)
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in again]


def test_a_long_prompt_in_chunks(artifact: Path) -> None:
    prompt = np.random.default_rng(1).integers(2, 300, 700).tolist()
    generator, cpu = opened(artifact), load(artifact, providers=["cpu"])
    assert isinstance(cpu, Generator)
    assert cpu.session.on_cpu
    one = followed(generator, [prompt], [[512, 180, 1, 1]])
    other = followed(cpu, [prompt], [[512, 180, 1, 1]])
    for found, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed(artifact) * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral", "gpt2", "phi4-partial-rotary"])
def test_architectures(name: str, tmp_path: Path) -> None:
    path = built(tmp_path, name, "fp16")
    random = np.random.default_rng(0)
    texts = [random.integers(2, 300, 40).tolist() for _ in range(2)]
    parts = [[9, 1, 1, 1, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1]]
    cpu = load(path, providers=["cpu"])
    assert isinstance(cpu, Generator)
    assert cpu.session.on_cpu
    for one, other in zip(followed(cpu, texts, parts), followed(opened(path), texts, parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=0.03 * float(np.abs(one).max()))


@pytest.mark.parametrize(("name", "precision"), [("llama", "bf16"), ("gemma2", "bf16"), ("llama", "int4-weights-bf16")])
def test_bfloat16(name: str, precision: str, tmp_path: Path) -> None:
    """The cache is bfloat16 there, which numpy does not have: golden outputs, and steps like the float16 model's on the CPU.

    Both are built for cuda: a language model for CPUs wants a newer ONNX Runtime than the GPU wheel may have.
    """
    path = built(tmp_path, name, precision)
    generator = opened(path)
    assert verify_golden(Artifact.open(path), generator.session)
    assert {array.dtype for array in generator._cache.arrays.values()} == {"bfloat16"}
    kind = "int4-weights" if precision.startswith("int4") else "fp16"
    other_build = onnxpress.build(
        tmp_path / "model", target="cuda", precision=kind, keep_all=True, out=tmp_path / "half"
    )
    exact = load(other_build.path, providers=["cpu"])
    assert isinstance(exact, Generator)
    assert exact.session.on_cpu
    random = np.random.default_rng(0)
    texts = [random.integers(2, 300, 40).tolist() for _ in range(2)]
    parts = [[9, 1, 1, 1, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1]]
    for one, other in zip(followed(exact, texts, parts), followed(generator, texts, parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=0.1 * float(np.abs(one).max()))
    together = generator.generate(PROMPTS, max_new_tokens=300, ignore_eos=True)  # rows grow, end and change places
    assert [len(answer.token_ids) for answer in together] == [300] * len(PROMPTS)


def test_greedy_text_like_transformers(tmp_path: Path) -> None:
    path = built(tmp_path, "llama", "fp16")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    generator = opened(path)
    for prompt in PROMPTS:
        ids = generator.tokenizer.inner.encode(prompt).ids
        import torch

        with torch.inference_mode():
            expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[
                0, len(ids) :
            ]
        found = generator.generate(ids, max_new_tokens=8, ignore_eos=True)[0].token_ids
        assert found[:4] == expected[:4].tolist()
