"""Sessions on a card: what loads, where nodes run, captured graphs, and what is refused."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import VOCAB, save_model

import onnxpress
from onnxpress.errors import ProviderError
from onnxpress.runtime import CUDA, TensorRT, load
from onnxpress.runtime.session import Session


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model") / "tiny", "bert")
    return onnxpress.build(folder, target="cuda", precision="fp16", out=folder.with_name("artifact")).path


def opened(path: Path, **options: Any) -> Session:
    runner = load(path, providers=[CUDA(**options)])
    session = runner.session
    assert isinstance(session, Session)
    return session


def feeds(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, length + 1, batch)
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)
    ids = random.integers(5, VOCAB, (batch, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def only(answers: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = answers.values()
    return found


def test_the_provider_is_loaded_and_alone(encoder: Path) -> None:
    session = opened(encoder)
    assert session.providers == ("cuda",)
    assert session.captures
    placed = Counter(session.placement().values())
    assert placed["CUDAExecutionProvider"] > 0.8 * sum(placed.values()), (
        placed
    )  # the rest is arithmetic with shapes, or it were refused


def test_a_card_answers_like_the_cpu(encoder: Path) -> None:
    session, cpu = opened(encoder), load(encoder, providers=["cpu"]).session
    assert cpu.on_cpu
    for batch, length in ((1, 1), (1, 7), (3, 12), (16, 33)):
        given = feeds(batch, length)
        real = given["attention_mask"].astype(bool)  # hidden states of padding are nobody's answer
        expected, found = only(cpu.run(given))[real], only(session.run(given))[real]
        allowed = (
            4 * 2**-10 * float(np.abs(expected).max())
        )  # a few roundings to 11 bits: the CPU computes in float32 inside
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


def test_a_replay_answers_what_is_new_in_it(encoder: Path) -> None:
    captured, plain = opened(encoder), opened(encoder, graphs=False)
    assert captured.replays
    assert not plain.captures
    for seed in range(6):  # the first as it comes, the second captured, then replayed
        for shape in ((2, 9), (5, 16)):
            given = feeds(*shape, seed=seed)
            np.testing.assert_allclose(only(captured.run(given)), only(plain.run(given)), rtol=0, atol=1e-3)


def test_an_input_that_is_read_on_the_cpu_is_read_each_time(tmp_path: Path) -> None:
    """How many rows a Slice takes is no shape: what was captured would go on with the first number."""

    class Head(torch.nn.Module):
        def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(x.shape[0])
            return torch.where((rows < count)[:, None], x * 2, x)

    built = onnxpress.build(
        Head(), example_inputs=(torch.randn(8, 4), torch.tensor(3)), target="cuda", precision="fp32", out=tmp_path / "a"
    ).path
    session, cpu = opened(built), load(built, providers=["cpu"]).session
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    for count in (3, 3, 5, 3, 8):
        given = dict(zip(session.input_names, (x, np.array(count)), strict=True))
        np.testing.assert_allclose(only(session.run(given)), only(cpu.run(given)), rtol=0, atol=1e-6)


def test_two_sessions_in_two_threads(encoder: Path) -> None:
    """One captures new shapes while the other runs."""
    sessions, plain = [opened(encoder), opened(encoder)], opened(encoder, graphs=False)
    wrong: list[str] = []

    def ask(session: Session, first: int) -> None:
        for length in range(first, 40, 2):
            for seed in range(3):
                given = feeds(2, length, seed)
                try:
                    found = only(session.run(given))
                except Exception as error:
                    wrong.append(str(error))
                    return
                if np.abs(found - only(plain.run(given))).max() > 1e-3:
                    wrong.append(f"length {length}")

    threads = [threading.Thread(target=ask, args=(session, first)) for first, session in enumerate(sessions, start=1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_shapes_than_graphs(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxpress.runtime.session.MOST_GRAPHS", 20)
    session, plain = opened(encoder), opened(encoder, graphs=False)
    for length in range(1, 31):
        for seed in range(3):
            given = feeds(2, length, seed)
            np.testing.assert_allclose(only(session.run(given)), only(plain.run(given)), rtol=0, atol=1e-3)
    assert session.next_graph() is None


def test_threads_get_their_own_answers(encoder: Path) -> None:
    session, plain = opened(encoder), opened(encoder, graphs=False)
    inputs = [feeds(2, 11, seed) for seed in range(8)]
    expected = [only(plain.run(given)) for given in inputs]
    wrong: list[float] = []

    def ask() -> None:
        for _ in range(5):
            for given, wanted in zip(inputs, expected, strict=True):
                difference = float(np.abs(only(session.run(given)) - wanted).max())
                if difference > 1e-3:
                    wrong.append(difference)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_buffers_stay_on_the_card(encoder: Path) -> None:
    session, plain = opened(encoder), opened(encoder, graphs=False)
    buffers = session.buffers(feeds(3, 10))
    for seed in range(3):
        given = feeds(3, 10, seed)
        buffers.write(given)
        buffers.run()
        buffers.run()
        np.testing.assert_allclose(only(buffers.read()), only(plain.run(given)), rtol=0, atol=1e-3)


def test_tf32_is_off_unless_asked_for(tmp_path: Path) -> None:
    layer = torch.nn.Linear(512, 512)
    built = onnxpress.build(
        layer, example_inputs=(torch.randn(4, 512),), target="cuda", precision="fp32", out=tmp_path / "a"
    ).path
    x = {"input": np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)}
    exact = only(load(built, providers=["cpu"]).session.run(x))
    precise = np.abs(only(opened(built).run(x)) - exact).max()
    rough = np.abs(only(opened(built, tf32=True).run(x)) - exact).max()
    assert precise < 1e-5 < 1e-4 < rough


def test_a_device_that_does_not_exist(encoder: Path) -> None:
    with pytest.raises(ProviderError, match=r"\b99\b"):
        opened(encoder, device_id=99)


def test_a_memory_limit_that_the_model_or_a_batch_exceeds(tmp_path: Path) -> None:
    layer = torch.nn.Linear(512, 65536)  # 128 MiB of weights; a batch of 1,024 answers 256 MiB
    built = onnxpress.build(
        layer, example_inputs=(torch.randn(2, 512),), target="cuda", precision="fp32", out=tmp_path / "a"
    ).path
    with pytest.raises(ProviderError, match="memory"):
        opened(built, memory_limit=2**20)
    session = opened(built, memory_limit=320 * 2**20, graphs=False)
    (name,) = session.input_names
    with pytest.raises(ProviderError, match="memory"):
        session.run({name: np.zeros((1024, 512), np.float32)})
    assert only(session.run({name: np.zeros((1, 512), np.float32)})).shape == (1, 65536)


def test_tensorrt_without_its_libraries(encoder: Path) -> None:
    if not _tensorrt_is_missing():
        assert "tensorrt" in load(encoder, providers=[TensorRT(), CUDA()]).session.providers
        return
    with pytest.raises(ProviderError, match="libnvinfer"):
        load(encoder, providers=[TensorRT(), CUDA()])


def _tensorrt_is_missing() -> bool:
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError:
        return True
    return False


def test_what_has_no_kernel_on_the_card_is_refused_and_named(tmp_path: Path) -> None:
    """An artifact for CPUs: its integer products exist on the CPU alone, and a slow answer is no answer."""
    folder = save_model(tmp_path / "tiny", "bert", tf.AutoModelForSequenceClassification)
    built = onnxpress.build(folder, target="cpu", precision="int8-dynamic", keep_all=True, out=tmp_path / "a").path
    with pytest.raises(ProviderError, match=r"would run on the CPU.*--target cuda"):
        load(built, providers=["cuda"])
    allowed = load(built, providers=["cuda", "cpu"]).session
    assert allowed.providers == ("cuda", "cpu")
    noted = load(built, providers=["cuda"], allow_fallback=True).session
    assert "would run on the CPU" in noted.fallback_note


def test_a_module_with_pooling_runs_on_the_card_alone(tmp_path: Path) -> None:
    """ONNX Runtime has no CUDA kernel of opset 22's MaxPool."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(2)
    ).eval()
    built = onnxpress.build(
        network, example_inputs=(torch.randn(2, 3, 16, 16),), target="cuda", precision="fp32", out=tmp_path / "a"
    )
    assert opened(built.path).providers == ("cuda",)
