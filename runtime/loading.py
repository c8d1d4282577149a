"""Opens an artifact with the right runner for its task, and checks golden outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from onnxpress.artifact import Artifact
from onnxpress.errors import ArtifactError, GoldenError
from onnxpress.manifest import Runnable
from onnxpress.runtime import chat_template
from onnxpress.runtime.chat_template import ChatTemplate
from onnxpress.runtime.embedder import Embedder
from onnxpress.runtime.fill_mask import FillMask
from onnxpress.runtime.generator import CACHE_BYTES, Generator
from onnxpress.runtime.module_runner import ModuleRunner
from onnxpress.runtime.providers import Provider
from onnxpress.runtime.question_answerer import QuestionAnswerer
from onnxpress.runtime.session import Session
from onnxpress.runtime.tensor_file import tensors_of
from onnxpress.runtime.text_classifier import TextClassifier
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.runtime.token_classifier import TokenClassifier
from onnxpress.runtime.tokenization import TOKENIZER, Tokenizer
from onnxpress.runtime.wheel import check_wheel

MODEL, GOLDEN = "model.onnx", "golden.safetensors"
_MASKED = 500  # the least size of a golden answer that stands for infinity

RUNNERS: Mapping[str, type[TextRunner]] = {
    runner.task: runner for runner in (Embedder, TextClassifier, TokenClassifier, QuestionAnswerer, FillMask)
}

Runner = TextRunner | Generator | ModuleRunner


def load(
    path: Path | str,
    *,
    providers: Sequence[str | Provider] | None = None,
    allow_fallback: bool = False,
    verify: bool = True,
    key: str | bytes | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Runner:
    """Open an artifact: Embedder, TextClassifier, TokenClassifier, QuestionAnswerer, FillMask, Generator or ModuleRunner.

    providers: e.g. ("cuda", "cpu"), or options such as CPU(threads=2); None is what the artifact was built for. verify: check all digests.
    key: of an encrypted artifact, its 32 bytes or where to find them: "file:PATH", "env:NAME", "command:LINE".
    cache_bytes: for a language model, the most memory for keys and values. Raises ArtifactError, ProviderError.
    """
    artifact = Artifact.open(path, verify=verify, key=key)
    return load_artifact(artifact, providers=providers, allow_fallback=allow_fallback, cache_bytes=cache_bytes)


def load_artifact(
    artifact: Artifact,
    *,
    providers: Sequence[str | Provider] | None = None,
    allow_fallback: bool = False,
    cache_bytes: int = CACHE_BYTES,
) -> Runner:
    """As `load`, for an artifact that is open."""
    manifest = artifact.manifest
    session = open_session(artifact, providers=providers, allow_fallback=allow_fallback)
    if manifest.task == "module":
        return ModuleRunner(session)
    if manifest.task not in (*RUNNERS, Generator.task):
        raise ArtifactError(
            f"{artifact.path} is for the task {manifest.task!r}; this onnxpress runs: {', '.join(RUNNERS)}, "
            f"{Generator.task}, module."
        )
    try:
        return _text_runner(artifact, session, cache_bytes)
    except KeyError as error:
        raise ArtifactError(f"{artifact.path} lacks the option {error}; build it again.") from None


def _text_runner(artifact: Artifact, session: Session, cache_bytes: int) -> Runner:
    manifest = artifact.manifest
    options = manifest.options
    if TOKENIZER not in manifest.files:
        raise ArtifactError(f"{artifact.path} has no {TOKENIZER}, so it cannot take text.")
    tokenizer = Tokenizer.from_content(
        artifact.read(TOKENIZER),
        max_length=options["max_length"],
        pad_token_id=options["pad_token_id"],
        where=artifact.path / TOKENIZER,
    )
    if manifest.task == Generator.task:
        names = [name for name in chat_template.FILES if name in manifest.files]
        template = ChatTemplate.from_files({name: artifact.read(name) for name in names}, where=artifact.path)
        return Generator(session, tokenizer, options, template, cache_bytes=cache_bytes)
    # What the build found necessary goes before what it found fastest, which is a CPU's.
    fastest = artifact.measured.get("tokens_per_chunk") if session.on_cpu else None
    chunk = manifest.session.get("tokens_per_chunk") or fastest
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ArtifactError(f"{artifact.path} asks for chunks of {chunk!r} tokens, which is no number; build it again.")
    return RUNNERS[manifest.task](session, tokenizer, options, tokens_per_chunk=chunk)


def open_session(
    artifact: Artifact, *, providers: Sequence[str | Provider] | None = None, allow_fallback: bool = False
) -> Session:
    """The artifact's graph, without a runner. Raises ArtifactError, ProviderError."""
    manifest = artifact.manifest
    if MODEL not in manifest.files:
        raise ArtifactError(f"{artifact.path} has no {MODEL}; build it again.")
    check_onnxruntime(manifest.minimum_onnxruntime, artifact.path)
    return Session(
        artifact.path / MODEL,
        content=None if artifact.key is None else partial(_model_files, artifact),
        signature=manifest.signature,
        providers=manifest.session.get("providers", ("cpu",)) if providers is None else providers,
        allow_fallback=allow_fallback,
        disabled_optimizers=manifest.session.get("disabled_optimizers", ()),
        exact_products=manifest.session.get("exact_products", False),
        flash_attention=manifest.session.get("flash_attention", True),
        half_floats=manifest.session.get("half_floats", False),
        cache_key=manifest.files[MODEL].sha256,
    )


def _model_files(artifact: Artifact) -> dict[str, bytes | bytearray]:
    names = [name for name in artifact.manifest.files if name == MODEL or name.startswith(f"{MODEL}.")]
    return {name: artifact.read(name) for name in names}


def check_onnxruntime(needed: str, what: object) -> None:
    """Raise ArtifactError where the ONNX Runtime that is installed is older than `what` needs."""
    wheel = check_wheel()
    import onnxruntime

    if release_numbers(onnxruntime.__version__) < release_numbers(needed):
        raise ArtifactError(
            f"{what} needs ONNX Runtime {needed} or newer; {onnxruntime.__version__} is installed: pip install --upgrade {wheel}"
            + (
                " (it is published a release behind onnxruntime; builds with --target cuda ask for less)."
                if "gpu" in wheel
                else "."
            )
        )


def release_numbers(version: str) -> tuple[int, ...]:
    """(1, 30) of 1.30.2: what ONNX Runtime's versions are compared by."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True, kw_only=True)
class GoldenRow:
    """How far one golden output is from what the build saw: its `golden_difference`, and what is allowed."""

    case: str
    output: str
    difference: float
    tolerance: float


def verify_golden(artifact: Artifact, session: Runnable) -> list[GoldenRow]:
    """Run the golden inputs and compare. Raises GoldenError naming the output, ArtifactError for a garbled file."""
    options = artifact.manifest.options
    tolerances, sizes = options.get("golden_tolerance", {}), options.get("golden_size", {})
    rows = []
    for case, arrays in sorted(golden_cases(artifact).items()):
        found = session.run(arrays["input"])
        for name, expected in arrays["output"].items():
            if name not in tolerances or name not in found:
                raise ArtifactError(
                    f"{artifact.path} has a golden output {name} that is not the model's; build it again."
                )
            row = GoldenRow(
                case=case,
                output=name,
                difference=golden_difference(found[name], expected, float(sizes.get(name, math.inf))),
                tolerance=float(tolerances[name]),
            )
            if not row.difference <= row.tolerance:
                raise GoldenError(
                    f"{artifact.path} does not answer here as it did when it was built: output {name} of golden case {case} "
                    f"differs by {row.difference:.3g}, {row.tolerance:.3g} is allowed. Build it for this machine (targets: "
                    "onnxpress build --help), or check the versions with `onnxpress doctor`."
                )
            rows.append(row)
    return rows


def golden_cases(artifact: Artifact) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """{case: {"input": {name: array}, "output": {name: array}}}."""
    path = artifact.path / GOLDEN
    cases: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for key, array in tensors_of(artifact.read(GOLDEN), where=path).items():
        kind, _, rest = key.partition(".")
        case, _, name = rest.partition(".")
        if kind not in ("input", "output") or not name:
            raise ArtifactError(f"{path} holds {key!r}, which is no golden input or output; build the artifact again.")
        cases.setdefault(case, {"input": {}, "output": {}})[kind][name] = array
    if not cases:
        raise ArtifactError(f"{path} holds nothing to check the artifact by; build it again.")
    return cases


def golden_difference(found: np.ndarray, expected: np.ndarray, size: float = math.inf) -> float:
    """Largest absolute difference of floats; of other numbers the share that is not equal.

    size: what is expected to be larger (a mask, -1e9) may differ by as large a share of itself as a number of this size. An expected
    infinity is a masked answer, for which any of its sign from 500 on will do. Infinite where the shapes differ, NaN where one side has one.
    """
    if found.shape != expected.shape:
        return float("inf")
    other = found != expected
    if not np.issubdtype(expected.dtype, np.floating):
        return float(other.mean()) if other.size else 0.0
    other &= ~(np.isinf(expected) & (found * np.sign(expected) >= _MASKED))
    one, wanted = found[other].astype(np.float64), expected[other].astype(np.float64)
    difference = np.abs(one - wanted)
    larger = np.isfinite(wanted) & (np.abs(wanted) > size)
    difference[larger] *= size / np.abs(wanted[larger])
    return float(difference.max(initial=0.0))
