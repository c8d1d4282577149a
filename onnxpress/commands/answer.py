"""run, generate and chat: what an artifact answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxpress.commands.options import add_key, add_providers, command, others
from onnxpress.errors import InputError, UsageError
from onnxpress.figures import print_json

if TYPE_CHECKING:
    from onnxpress.manifest import Json
    from onnxpress.runtime import Generator


def add_run(commands: Any) -> None:
    """`onnxpress run`."""
    parser = command(commands, "run", _run, "answer with an artifact")
    parser.add_argument("artifact", type=Path, help="an artifact's folder")
    parser.add_argument("--text", action="append", default=[], help="a text (repeatable)")
    parser.add_argument(
        "--pair", action="append", default=[], help="the second text of each --text; a question's context"
    )
    parser.add_argument("--file", type=Path, help="a file with one text a line; - for standard input")
    parser.add_argument("--top-k", type=int, help="how many answers (question-answering, fill-mask)")
    parser.add_argument(
        "--prompt-name", help="a prompt of an embedding model, put before each text: query, document, …"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    add_providers(parser)
    add_key(parser)


def _run(options: argparse.Namespace) -> int:
    from onnxpress.inspection import say_fallback
    from onnxpress.runtime import Embedder, Generator, ModuleRunner, load

    runner = load(options.artifact, providers=options.provider, allow_fallback=options.allow_fallback, key=options.key)
    say_fallback(runner.session)
    if isinstance(runner, Generator):
        raise UsageError("This artifact is a language model: use `onnxpress generate` or `onnxpress chat`.")
    if isinstance(runner, ModuleRunner):
        raise UsageError(
            "This artifact takes named arrays, not text: use Python, onnxpress.load(path).run({name: array})."
        )
    texts = list(options.text)
    if options.file is not None:
        texts += _lines(options.file)
    if not texts:
        raise InputError('No text was given: use --text "…", or --file FILE with one text a line.')
    samples: list[Any] = texts
    if options.pair:
        if len(options.pair) != len(texts):
            raise InputError(f"{len(texts)} texts and {len(options.pair)} --pair were given; each text needs one pair.")
        samples = list(zip(texts, options.pair, strict=True))
    if options.prompt_name is None:
        answers = runner.answer_texts(samples, top_k=options.top_k)
    elif isinstance(runner, Embedder):
        answers = runner.answer_texts(samples, top_k=options.top_k, prompt=options.prompt_name)
    else:
        raise UsageError(f"--prompt-name goes with embedding models; this artifact is for {runner.task}.")
    if options.json:
        print_json({"artifact": str(options.artifact), "task": runner.task, "answers": answers})
    else:
        for sample, answer in zip(samples, answers, strict=True):
            print(f"{_shown(sample)}\n  {_answer_line(answer)}")
    return 0


def add_generate(commands: Any) -> None:
    """`onnxpress generate`."""
    parser = command(commands, "generate", _generate, "continue prompts with a language model")
    parser.add_argument("artifact", type=Path, help="an artifact's folder")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt (repeatable; they run together)")
    parser.add_argument("--file", type=Path, help="a file that is one prompt; - for standard input")
    parser.add_argument("--n", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--logprobs", type=int, help="with --json: log-probabilities, and of so many likeliest tokens")
    parser.add_argument("--json", action="store_true", help="one JSON document: text, token_ids, finish_reason, …")
    _add_sampling(parser)


def _generate(options: argparse.Namespace) -> int:
    from onnxpress.conversation import generate

    prompts = list(options.prompt)
    if options.file is not None:
        prompts.append(_text(options.file))
    if not prompts:
        raise InputError('No prompt was given: use --prompt "…", or --file FILE (- for standard input).')
    if options.logprobs is not None and not options.json:
        raise UsageError("--logprobs are shown with --json; give it too.")
    return generate(_generator(options), prompts, as_json=options.json, **_chosen(options, "prompt", "file", "json"))


def add_chat(commands: Any) -> None:
    """`onnxpress chat`."""
    parser = command(commands, "chat", _chat, "talk with a language model")
    parser.add_argument("artifact", type=Path, help="an artifact's folder")
    parser.add_argument("--system", help="the system message")
    _add_sampling(parser)


def _chat(options: argparse.Namespace) -> int:
    from onnxpress.conversation import chat

    return chat(_generator(options), system=options.system, **_chosen(options, "system"))


def _chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What was given for the Generator."""
    return {name: value for name, value in others(options, *_OPENING, *names).items() if value is not None}


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, help="tokens of an answer at most (default 256)")
    own = "default: as the model's generation_config.json says, else"
    parser.add_argument(
        "--temperature", type=float, help=f"0: nothing is drawn, the likeliest token is taken ({own} 0)"
    )
    parser.add_argument("--top-k", type=int, help=f"draw from the k likeliest tokens, 0: from all ({own} 0)")
    parser.add_argument("--top-p", type=float, help=f"draw from the likeliest tokens of this probability ({own} 1)")
    parser.add_argument("--min-p", type=float, help=f"no token below this share of the likeliest one's ({own} 0)")
    parser.add_argument("--repetition-penalty", type=float, help=f"divides what was there already ({own} 1: off)")
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, help="taken off the logit of what the answer has (default 0)"
    )
    parser.add_argument(
        "--frequency-penalty", type=float, default=0.0, help="the same for each time that it has it (default 0)"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the answer (repeatable)")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end token")
    parser.add_argument(
        "--prompt-lookup", type=int, default=0, help="guess so many tokens at a time from the text so far (default 0)"
    )
    parser.add_argument("--cache-mb", type=int, default=2048, help="most memory for keys and values (default 2048)")
    add_providers(parser)
    add_key(parser)


# Options of `generate` and `chat` that are not the Generator's own.
_OPENING = ("artifact", "provider", "allow_fallback", "key", "cache_mb")


def _generator(options: argparse.Namespace) -> Generator:
    from onnxpress.conversation import open_generator
    from onnxpress.inspection import say_fallback

    if options.cache_mb < 1:
        raise UsageError(f"--cache-mb takes a positive whole number, not {options.cache_mb}.")
    runner = open_generator(
        options.artifact,
        providers=options.provider,
        allow_fallback=options.allow_fallback,
        key=options.key,
        cache_bytes=options.cache_mb * 2**20,
    )
    say_fallback(runner.session)
    own = runner.options.get("sampling", {})
    if said := ", ".join(f"{name} {value}" for name, value in own.items() if getattr(options, name) is None):
        print(
            f"tokens are chosen by the model's generation_config.json ({said}) where nothing else is given",
            file=sys.stderr,
        )
    return runner


def _text(path: Path) -> str:
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The file {path} cannot be read as UTF-8 text: {error}.") from None


def _lines(path: Path) -> list[str]:
    # Not splitlines: it also cuts at form feeds and the like, which stand within texts.
    return [line for line in _text(path).replace("\r\n", "\n").split("\n") if line.strip()]


def _shown(sample: str | tuple[str, str]) -> str:
    text = sample if isinstance(sample, str) else " | ".join(sample)
    return text if len(text) <= 100 else text[:99] + "…"


def _answer_line(answer: Json) -> str:
    if isinstance(answer, list) and answer and isinstance(answer[0], float):
        head = ", ".join(f"{value:.4f}" for value in answer[:8])
        return f"[{head}{', …' if len(answer) > 8 else ''}] ({len(answer)} numbers; --json prints all)"
    if isinstance(answer, list):
        return "\n  ".join(_answer_line(item) for item in answer) if answer else "(nothing found)"
    if isinstance(answer, dict):
        parts = (f"{key}: {_short(value)}" for key, value in answer.items() if key not in ("scores", "truncated"))
        return ", ".join(parts) + (", input truncated" if answer.get("truncated") else "")
    return str(answer)


def _short(value: Json) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
