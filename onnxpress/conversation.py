"""`onnxpress generate`, `onnxpress chat` and a bundle's `run.py --chat`: language models on the terminal, token by token."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from onnxpress.errors import InputError, UsageError
from onnxpress.figures import print_json
from onnxpress.manifest import Json
from onnxpress.runtime import Generation, Generator, load
from onnxpress.runtime.generator import Piece

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HELP = "/reset forgets the conversation, /undo the last exchange, /exit or Ctrl-D ends; Ctrl-C stops an answer"


def open_generator(artifact: Any, **options: Any) -> Generator:
    """The artifact's Generator. Raises UsageError where it is another task's."""
    runner = load(artifact, **options)
    if not isinstance(runner, Generator):
        raise UsageError(f"{artifact} is for the task {runner.task}, not text-generation: use `onnxpress run`.")
    return runner


def generate(runner: Generator, prompts: list[str], *, as_json: bool, **options: Any) -> int:
    """Answer prompts: one of them as it comes, several together."""
    started = time.perf_counter()
    if as_json or len(prompts) * options.get("n", 1) > 1:
        generations = runner.generate(prompts, **options)
        seconds = time.perf_counter() - started
        if as_json:
            print_json([_described(item) for item in generations])
        else:
            for index, item in enumerate(generations):
                print(f"== {prompts[index // options.get('n', 1)]!r}\n{_visible(item.text)}")
            tokens = sum(len(item.token_ids) for item in generations)
            print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
        return 0
    _, whole = _show(runner.stream(prompts, **options), started)
    return 0 if whole else 130


def chat(runner: Generator, *, system: str | None, **options: Any) -> int:
    """A conversation, until the input ends; 1 where a message that was piped in got no answer."""
    if runner.template is None:
        raise InputError("This model has no chat template, so it cannot chat: give it a prompt to go on with.")
    first = [] if system is None else [{"role": "system", "content": system}]
    messages: list[dict[str, Json]] = list(first)
    runner.stream([[0]], **options)  # which says now what is wrong with the options
    if sys.stdin is None:  # it was closed
        return 0
    if isinstance(sys.stdin, io.TextIOWrapper):  # a terminal knows its own encoding
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8", errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # lines can be edited where there is such a library
            import readline  # noqa: F401
    print(_HELP, file=sys.stderr)
    failed = 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return failed
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends)", file=sys.stderr)
            continue
        if line == "/exit":
            return failed
        if line in ("/reset", "/undo"):
            messages = list(first) if line == "/reset" else messages[: max(len(first), len(messages) - 2)]
            continue
        if re.fullmatch(r"/[a-z]+", line):
            print(f"There is no {line}: {_HELP}", file=sys.stderr)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer, _ = _show(runner.stream(messages=messages, **options), time.perf_counter())
        except InputError as error:  # too long for the context, or refused by the template: the conversation goes on
            print(
                f"onnxpress: {str(error).rstrip('. ')}. /undo and /reset go back in the conversation.", file=sys.stderr
            )
            messages.pop()
            failed = int(not sys.stdin.isatty())
            continue
        messages.append({"role": "assistant", "content": answer})


def _show(pieces: Iterator[Piece], started: float) -> tuple[str, bool]:
    """Print an answer as it comes, then its speed; returns what was shown, and whether it is whole: Ctrl-C stops it."""
    text, count, first = "", 0, 0.0
    generation: Generation | None = None
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            count += 1
            text += piece.text
            print(_visible(piece.text), end="", flush=True)
            generation = piece.generation
    except KeyboardInterrupt:
        pass
    print(flush=True)
    now = time.perf_counter()
    speed = (count - 1) / (now - first) if count > 1 else 0.0
    if generation is None:
        print(f"[stopped; {speed:.1f} tokens/s]", file=sys.stderr)
    else:
        print(
            f"[{generation.finish_reason}; prompt {generation.prompt_tokens} tokens, {generation.cached_tokens} of them known, "
            f"{first - started:.2f} s; {len(generation.token_ids)} tokens, {speed:.1f} tokens/s]",
            file=sys.stderr,
        )
    return text, generation is not None


def _visible(text: str) -> str:
    """On a terminal, which does what control characters say, a sign in the place of each but ends of lines and tabs."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text


def _described(generation: Generation) -> Json:
    content = dataclasses.asdict(generation)
    if generation.logprobs is None:
        del content["logprobs"]
    return content
