"""Times artifacts side by side: taking turns, medians of several rounds.

Models that answer a text are timed in milliseconds a batch of random token ids, modules on their golden inputs, repeated to a batch;
language models in tokens a second: those of the prompts until every answer has begun, then new tokens. Needs only the runtime, but for --against torch and onnx, which take the original from the artifact's recipe.
For comparisons with other tools see the benchmarks folder of the repository.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from onnxpress import machine
from onnxpress.artifact import Artifact
from onnxpress.errors import OutputError, UsageError
from onnxpress.inspection import say_fallback
from onnxpress.manifest import Arrays, Json, Manifest
from onnxpress.runtime.generator import MOST_ROWS, Generator
from onnxpress.runtime.loading import golden_cases, load_artifact
from onnxpress.runtime.module_runner import ModuleRunner
from onnxpress.runtime.session import Session
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.timing import random_tokens, rounds_of

System = Callable[[Arrays], object]
Case = tuple[dict[str, Json], Arrays]  # sizes to show, and inputs of them
_BATCHES, _LENGTHS = (1, 32), (32, 128)
_PROMPT_BATCHES, _PROMPT_LENGTHS, _NEW_TOKENS = (1, 4), (128, 1024), 64


def bench(
    path: Path,
    *,
    against: Sequence[str],
    batches: Sequence[int] | None,
    lengths: Sequence[int] | None,
    rounds: int,
    json_file: Path | None,
    providers: Sequence[str] | None,
    allow_fallback: bool,
) -> int:
    """Print a table of medians, each with its fastest and slowest round; returns the exit code.

    against: folders of other artifacts; of models that answer a text also "torch" (the original in float32) and "onnx" (its plain
    export on ONNX Runtime). batches, lengths: of the inputs, or of the prompts; None is a choice that suits the task.
    Raises UsageError and InputError.
    """
    first = Artifact.open(path)
    if first.manifest.task == Generator.task:
        rows = _time_generators((str(path), *against), batches, lengths, rounds, providers, allow_fallback)
        _write(json_file, rows)
        return 0
    of_arrays = first.manifest.task == ModuleRunner.task
    if of_arrays and lengths is not None:
        raise UsageError(f"{path} takes named arrays, which have no --length.")
    with tempfile.TemporaryDirectory(prefix="onnxpress-bench-") as scratch:
        systems: dict[str, System] = {}
        on_cpu = True  # all artifacts so far
        for item in (str(path), *against):
            if item in ("torch", "onnx"):
                systems[item if on_cpu else f"{item} (on the CPU)"] = _original(item, first.manifest, Path(scratch))
            else:
                artifact = first if item == str(path) else Artifact.open(Path(item))
                label, system, its_on_cpu = _artifact(artifact, providers, allow_fallback)
                on_cpu = on_cpu and its_on_cpu
                systems[label if label not in systems else item] = system
        cases = _module_cases(first, batches) if of_arrays else _text_cases(first, batches, lengths)
        rows = _time(systems, cases, rounds)
    _write(json_file, rows)
    return 0


def _write(json_file: Path | None, rows: list[dict[str, Json]]) -> None:
    if json_file is None:
        return
    try:
        json_file.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The figures cannot be written to {json_file}: {error.strerror}.") from None


def _time_generators(
    folders: Sequence[str],
    batches: Sequence[int] | None,
    lengths: Sequence[int] | None,
    rounds: int,
    providers: Sequence[str] | None,
    allow_fallback: bool,
) -> list[dict[str, Json]]:
    systems: dict[str, Generator] = {}
    for folder in folders:
        if folder in ("torch", "onnx"):
            raise UsageError(f"--against {folder} is not for language models: give folders of other artifacts.")
        artifact = Artifact.open(Path(folder))
        runner = load_artifact(artifact, providers=providers, allow_fallback=allow_fallback)
        if not isinstance(runner, Generator):
            raise UsageError(
                f"{folder} is for the task {runner.task}; beside a language model only others can be timed."
            )
        say_fallback(runner.session)
        label = f"{artifact.manifest.name} {artifact.manifest.precision}"
        systems[label if label not in systems else folder] = runner
    context = min(runner.context for runner in systems.values())
    chosen = lengths or sorted({max(1, min(length, context // 2)) for length in _PROMPT_LENGTHS})
    random = np.random.default_rng(0)
    rows: list[dict[str, Json]] = []
    longest = context - 2  # two new tokens, so that there is a time between them
    if max(chosen) > longest:
        raise UsageError(
            f"--length {max(chosen)}: with a context of {context} tokens, prompts of at most {longest} can be timed."
        )
    most = max(batches or _PROMPT_BATCHES)
    if not all(runner.fits(most, min(context, max(chosen) + _NEW_TOKENS)) for runner in systems.values()):
        raise UsageError(
            f"--batch {most}: so many answers are not generated together; at most {MOST_ROWS} are, as memory allows."
        )
    for batch in batches or _PROMPT_BATCHES:
        for length in chosen:
            speeds: dict[str, list[tuple[float, float]]] = {label: [] for label in systems}
            for number in range(rounds + 1):
                for label, runner in systems.items():
                    prompts = random.integers(0, runner.vocabulary, (batch, length)).tolist()
                    speed = _tokens_a_second(runner, prompts)
                    if number:  # the first is not counted
                        speeds[label].append(speed)
            for label, found in speeds.items():
                (prompt, prompts_of), (new, news_of) = map(_median_and_rounds, zip(*found, strict=True))
                rows.append({
                    "system": label, "batch": batch, "length": length,
                    "prompt": prompt, "new": new, "prompt_rounds": prompts_of, "new_rounds": news_of,
                })  # fmt: skip
                print(
                    f"{label:40} batch {batch:4} length {length:5} {prompt:10.1f} prompt tokens/s {_spread(prompts_of)} "
                    f"{new:10.1f} new tokens/s {_spread(news_of)}",
                    flush=True,
                )
    return rows


def _tokens_a_second(runner: Generator, prompts: list[list[int]]) -> tuple[float, float]:
    """Of prompts, until all answers have begun, and of new tokens after that."""
    count = min(_NEW_TOKENS, runner.context - len(prompts[0]))
    begun: set[int] = set()
    runner.reset()
    start = time.perf_counter()
    first, tokens = start, 0
    for piece in runner.stream(prompts, max_new_tokens=count, ignore_eos=True, temperature=0, repetition_penalty=1):
        if len(begun) == len(prompts):
            tokens += 1
        elif piece.index not in begun:
            begun.add(piece.index)
            first = time.perf_counter()
    return sum(map(len, prompts)) / (first - start), tokens / (time.perf_counter() - first)


def _text_cases(artifact: Artifact, batches: Sequence[int] | None, lengths: Sequence[int] | None) -> Iterator[Case]:
    manifest = artifact.manifest
    closing = manifest.options.get("closing_token_id")
    longest = manifest.signature.axes["length"][1]
    chosen = lengths or sorted({min(length, longest) for length in _LENGTHS})
    if max(chosen) > longest:
        raise UsageError(f"--length {max(chosen)}: {artifact.path} takes texts of at most {longest} tokens.")
    for batch in batches or _BATCHES:
        for length in chosen:
            feeds = random_tokens(manifest.signature, batch, length, closing_token_id=closing)
            yield {"batch": batch, "length": length}, feeds


def _module_cases(artifact: Artifact, batches: Sequence[int] | None) -> Iterator[Case]:
    """Golden inputs, repeated along the first axis where that may have any size."""
    inputs = artifact.manifest.signature.inputs
    golden = next(iter(golden_cases(artifact).values()))["input"]
    axis = next((spec.shape[0] for spec in inputs if spec.shape), None)
    if not isinstance(axis, str):
        if batches is not None:
            raise UsageError(f"{artifact.path} takes arrays of one size: leave --batch out.")
        yield {}, golden
        return
    for batch in batches or _BATCHES:
        repeated = {
            spec.name: np.resize(array, (batch, *array.shape[1:])) if spec.shape[:1] == (axis,) else array
            for spec, array in ((spec, golden[spec.name]) for spec in inputs)
        }
        yield {"batch": batch}, repeated


def _time(systems: dict[str, System], cases: Iterable[Case], rounds: int) -> list[dict[str, Json]]:
    rows: list[dict[str, Json]] = []
    for sizes, feeds in cases:
        times = rounds_of({label: partial(system, feeds) for label, system in systems.items()}, rounds=rounds)
        for label, found in times.items():
            median, of_rounds = _median_and_rounds(found)
            rows.append({"system": label, **sizes, "median_ms": median, "rounds_ms": of_rounds})
            shown = " ".join(f"{name} {size:5}" for name, size in sizes.items())
            print(f"{label:40} {shown} {median:10.2f} ms {_spread(of_rounds)}", flush=True)
    return rows


def _median_and_rounds(found: Sequence[float]) -> tuple[float, list[float]]:
    return round(statistics.median(found), 3), [round(value, 3) for value in found]


def _spread(of_rounds: Sequence[float]) -> str:
    return f"({min(of_rounds):.4g}–{max(of_rounds):.4g})"


def _artifact(artifact: Artifact, providers: Sequence[str] | None, allow_fallback: bool) -> tuple[str, System, bool]:
    """Its name, what is timed, and whether that is on the CPU."""
    runner = load_artifact(artifact, providers=providers, allow_fallback=allow_fallback)
    say_fallback(runner.session)
    if isinstance(runner, Generator):
        raise UsageError(f"{artifact.path} is a language model; it can be timed beside other language models only.")
    run = runner.run_rows if isinstance(runner, TextRunner) else runner.run
    on_cpu = not isinstance(runner.session, Session) or runner.session.on_cpu
    return f"{artifact.manifest.name} {artifact.manifest.precision}", run, on_cpu


def _original(kind: str, manifest: Manifest, scratch: Path) -> System:
    from onnxpress.exporters import export
    from onnxpress.exporters.source import is_factory
    from onnxpress.graph_files import save
    from onnxpress.runtime.session import Session

    model = manifest.recipe["model"]
    if kind == "onnx" and model["source"].endswith(".onnx"):
        return Session(model["source"]).run
    if is_factory(model["source"]) or manifest.task == ModuleRunner.task:
        raise UsageError(
            f"The original of {manifest.name} is made by {model['source']}, and no function is called because an artifact names it: "
            f"build it with --precision fp32, and give --against that artifact."
        )
    exported = export(model["source"], task=manifest.task, revision=model["revision"], max_length=model["max_length"])
    if kind == "torch":
        return exported.reference.run
    save(exported.graph, scratch / "model.onnx")
    return Session(scratch / "model.onnx", signature=exported.graph.signature).run
