"""Times artifacts side by side on random token ids: taking turns, medians of several rounds.

Needs only the runtime, but for --against torch and onnx, which take the original from the artifact's recipe.
For comparisons with other tools see the benchmarks folder of the repository.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from onnxpress import machine
from onnxpress.artifact import Artifact
from onnxpress.errors import OutputError, UsageError
from onnxpress.inspection import say_fallback
from onnxpress.manifest import Arrays, Json, Manifest, Signature
from onnxpress.runtime.generator import Generator
from onnxpress.runtime.loading import load_artifact
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.timing import alternate, random_tokens

System = Callable[[Arrays], object]


def bench(
    path: Path,
    *,
    against: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
    json_file: Path | None,
    providers: Sequence[str] | None,
    allow_fallback: bool,
) -> int:
    """Print a table of median milliseconds; returns the exit code.

    against: folders of other artifacts, "torch" (the original in float32), "onnx" (its plain export on ONNX Runtime).
    """
    signature = Artifact.open(path).manifest.signature
    with tempfile.TemporaryDirectory(prefix="onnxpress-bench-") as scratch:
        systems: dict[str, System] = {}
        for item in (str(path), *against):
            if item in ("torch", "onnx"):
                systems[item] = _original(item, Artifact.open(path).manifest, Path(scratch))
            else:
                label, system = _artifact(Path(item), providers, allow_fallback)
                systems[label if label not in systems else item] = system
        rows = _time(systems, signature, batches, lengths, rounds)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"The figures cannot be written to {json_file}: {error.strerror}.") from None
    return 0


def _time(
    systems: dict[str, System], signature: Signature, batches: Sequence[int], lengths: Sequence[int], rounds: int
) -> list[dict[str, Json]]:
    rows: list[dict[str, Json]] = []
    for batch in batches:
        for length in lengths:
            feeds = random_tokens(signature, batch, length)
            times = alternate({label: partial(system, feeds) for label, system in systems.items()}, rounds=rounds)
            for label, milliseconds in times.items():
                rows.append({"system": label, "batch": batch, "length": length, "median_ms": round(milliseconds, 3)})
                print(f"{label:40} batch {batch:4} length {length:5} {milliseconds:10.2f} ms", flush=True)
    return rows


def _artifact(folder: Path, providers: Sequence[str] | None, allow_fallback: bool) -> tuple[str, System]:
    artifact = Artifact.open(folder)
    runner = load_artifact(artifact, providers=providers, allow_fallback=allow_fallback)
    say_fallback(runner.session)
    if isinstance(runner, Generator):
        raise UsageError(f"{folder} is a language model; `onnxpress generate` says how many tokens a second it gives.")
    if not isinstance(runner, TextRunner):
        raise UsageError(f"{folder} takes named arrays of any shape; bench times models that read token ids.")
    return f"{artifact.manifest.name} {artifact.manifest.precision}", runner.run_rows


def _original(kind: str, manifest: Manifest, scratch: Path) -> System:
    from onnxpress.exporters import export
    from onnxpress.runtime.session import Session
    from onnxpress.workbench import save

    model = manifest.recipe["model"]
    exported = export(model["source"], task=manifest.task, revision=model["revision"], max_length=model["max_length"])
    if kind == "torch":
        return exported.reference.run
    save(exported.graph, scratch / "model.onnx")
    return Session(scratch / "model.onnx", signature=exported.graph.signature).run
