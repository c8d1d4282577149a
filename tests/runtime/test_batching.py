"""Chunks hold rows of like length; answers come in order, alone or in lanes, with the same numbers."""

from __future__ import annotations

import io
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_artifacts import MAX_LENGTH, SIGNATURE, VOCABULARY, WORDS, save_embedder, save_tokenizer

from onnxpress.errors import InputError
from onnxpress.manifest import Arrays
from onnxpress.runtime import CPU, Embedder, Session, TruncationWarning
from onnxpress.runtime.batching import plan, run_chunks
from onnxpress.runtime.tokenization import Tokenizer

OPTIONS = {"dim": 6, "pooled": True, "normalized": False}


def texts(count: int) -> list[str]:
    random = np.random.default_rng(5)
    plain = [word for word in WORDS if word.isalpha()]
    return [" ".join(random.choice(plain, size=random.integers(1, MAX_LENGTH - 2))) for _ in range(count)]


class Counting:
    """Any runnable that is no Session: remembers the shapes it got and the threads that called."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, inner: Session) -> None:
        self.inner = inner
        self.shapes: list[tuple[int, ...]] = []
        self.threads: set[str] = set()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self.shapes.append(feeds["input_ids"].shape)
        self.threads.add(threading.current_thread().name)
        return self.inner.run(feeds)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(save_embedder(tmp_path / "model.onnx"), signature=SIGNATURE, providers=[CPU(threads=2)])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path), max_length=MAX_LENGTH)


def test_plan_groups_like_lengths() -> None:
    chunks = plan([3, 10, 3, 9, 100, 1], 20)
    assert [chunk.tolist() for chunk in chunks] == [[4], [1, 3], [2, 0, 5]]
    assert plan([], 20) == []


@pytest.mark.parametrize("tokens", [1, 17, 256, 10**9])
def test_plan_keeps_the_limit_and_every_row(tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 300).tolist()
    chunks = plan(lengths, tokens)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(300))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[row] for row in chunk) <= tokens
    longest = [max(lengths[row] for row in chunk) for chunk in chunks]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("tokens_per_chunk", [1, 40, 100, 10**6])
def test_answers_do_not_depend_on_chunks_or_padding(
    session: Session, tokenizer: Tokenizer, tokens_per_chunk: int
) -> None:
    given = texts(60)
    alone = np.stack([Embedder(session, tokenizer, OPTIONS).embed([text])[0] for text in given])
    found = Embedder(session, tokenizer, OPTIONS, tokens_per_chunk=tokens_per_chunk).embed(given)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


def test_any_runnable_runs_serially(session: Session, tokenizer: Tokenizer) -> None:
    given, counting = texts(30), Counting(session)
    found = Embedder(counting, tokenizer, OPTIONS, tokens_per_chunk=32).embed(given)
    assert len(counting.shapes) > 5
    assert counting.threads == {threading.current_thread().name}
    assert all(rows == 1 or rows * length <= 32 for rows, length in counting.shapes)
    np.testing.assert_array_equal(found, Embedder(session, tokenizer, OPTIONS, tokens_per_chunk=32).embed(given))


def test_a_runner_on_one_thread_starts_no_lanes(session: Session) -> None:
    single = Session(session.path, signature=SIGNATURE, providers=[CPU(threads=1)])
    callers: list[set[str]] = []
    for runnable in (session, single):
        seen: set[str] = set()

        def inputs(row: int, seen: set[str] = seen) -> Arrays:
            seen.add(threading.current_thread().name.split("_")[0])
            return {name: np.full((1, 2), 1, np.int64) for name in ("input_ids", "attention_mask")}

        run_chunks(runnable, range(8), inputs)
        callers.append(seen)
    assert callers == [{"onnxpress-lane"}, {threading.current_thread().name}]


def test_eight_threads_through_one_runner(session: Session, tokenizer: Tokenizer) -> None:
    given = texts(40)
    runner = Embedder(session, tokenizer, OPTIONS, tokens_per_chunk=48)
    expected = runner.embed(given)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: runner.embed(given), range(24)):
            np.testing.assert_array_equal(found, expected)


def test_an_error_in_a_lane_reaches_the_caller(session: Session) -> None:
    def inputs(row: int) -> Arrays:
        return {name: np.full((1, 2), 99 if row == 5 else 1, np.int64) for name in ("input_ids", "attention_mask")}

    with pytest.raises(InputError, match="values from 99"):
        run_chunks(session, range(8), inputs)


def test_lanes_work_after_a_fork(session: Session, tokenizer: Tokenizer) -> None:
    """As servers do: load, answer, then fork workers. The worker opens its own session."""
    given = texts(20)
    expected = Embedder(session, tokenizer, OPTIONS, tokens_per_chunk=32).embed(given)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        own = Session(session.path, signature=SIGNATURE, providers=[CPU(threads=2)])
        sender.send(Embedder(own, tokenizer, OPTIONS, tokens_per_chunk=32).embed(given))

    process = context.Process(target=child, daemon=True)
    process.start()
    try:
        assert receiver.poll(30), "the forked child did not answer"
        np.testing.assert_array_equal(receiver.recv(), expected)
    finally:
        process.kill()
        process.join()


def test_rows_that_are_tokenized_already(session: Session, tokenizer: Tokenizer) -> None:
    ids = np.random.default_rng(1).integers(5, len(VOCABULARY), (37, 8))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    runner = Embedder(session, tokenizer, OPTIONS, tokens_per_chunk=32)
    np.testing.assert_allclose(
        runner.run_rows(feeds)["embeddings"], session.run(feeds)["embeddings"], rtol=0, atol=1e-6
    )


def test_truncation_is_warned_of_once_a_call(session: Session, tokenizer: Tokenizer) -> None:
    given = ["the cat", "the dog " * 20, "a mat " * 9]
    with pytest.warns(TruncationWarning) as caught:
        Embedder(session, tokenizer, OPTIONS).embed(given)
    assert len(caught) == 1
    assert str(caught[0].message) == ("2 of 3 texts were longer than 16 tokens and were cut; the longest lost 26.")
    assert caught[0].filename == __file__


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Slow(Counting):
    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        time.sleep(0.3)
        return super().run(feeds)


@pytest.fixture
def slow(session: Session) -> Iterator[Slow]:
    return Slow(session)


def test_long_work_shows_progress_on_a_terminal_only(
    slow: Slow,
    session: Session,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["the cat"] * 5
    Embedder(slow, tokenizer, OPTIONS, tokens_per_chunk=1).embed(given)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    Embedder(session, tokenizer, OPTIONS, tokens_per_chunk=1).embed(given)
    assert terminal.getvalue() == ""
    Embedder(slow, tokenizer, OPTIONS, tokens_per_chunk=1).embed(given)
    assert "5/5" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_no_more_rows_than_the_model_takes() -> None:
    chunks = plan([3] * 50 + [9] * 4, 1000, 32)
    assert [len(chunk) for chunk in chunks] == [32, 22]
    assert sorted(int(row) for chunk in chunks for row in chunk) == list(range(54))
