"""Shows what an artifact or an .onnx file consists of: signature, operators, sizes, placement, ledger."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from onnxpress.artifact import Artifact
from onnxpress.errors import UsageError
from onnxpress.figures import print_json
from onnxpress.manifest import Json, Manifest, Runnable, Signature, TensorSpec
from onnxpress.runtime.loading import open_session
from onnxpress.runtime.session import Session


def inspect(path: Path, *, placement: bool, as_json: bool, providers: list[str] | None, allow_fallback: bool) -> int:
    """Print the findings; returns the exit code. Raises UsageError, ArtifactError, and ProviderError with `placement`."""
    session: Session | None = None
    if path.suffix == ".onnx":
        session = Session(
            path,
            providers=providers or ("cpu",),
            allow_fallback=allow_fallback,
            disabled_optimizers=_fatal_optimizers(path),
        )
        findings = _of_file(path, session.signature)
    else:
        if (providers or allow_fallback) and not placement:
            raise UsageError("--provider and --allow-fallback say where --placement opens an artifact: give it too.")
        artifact = Artifact.open(path)
        findings = _of_manifest(artifact.manifest)
        findings["largest_weights"] = _largest_weights(artifact.file("model.onnx"))
        if placement:
            session = open_session(artifact, providers=providers, allow_fallback=allow_fallback)
    if session is not None:
        say_fallback(session)
    if session is not None and placement:
        findings["placement"] = session.placement()
    if as_json:
        print_json(findings)
    else:
        print("\n".join(_lines(findings)))
    return 0


def _fatal_optimizers(path: Path) -> tuple[str, ...]:
    """What must not touch the model of an .onnx file; nothing where it cannot be read, which a session has better words for."""
    import onnx_ir as ir  # the build extra

    from onnxpress.workbench import fatal_optimizers

    try:
        return fatal_optimizers(ir.load(path))
    except Exception:
        return ()


def say_fallback(session: Runnable) -> None:
    """What was asked for and is not what runs, on stderr; only a Session has something to say."""
    if isinstance(session, Session) and session.fallback_note:
        print(f"onnxpress: {session.fallback_note} It runs on: {', '.join(session.providers)}.", file=sys.stderr)


def _of_manifest(manifest: Manifest) -> dict[str, Json]:
    content: dict[str, Json] = json.loads(manifest.to_json())
    content.pop("digest")
    return content


def _of_file(path: Path, signature: Signature) -> dict[str, Json]:
    import onnx_ir as ir  # the build extra

    from onnxpress.graph import Graph

    graph = Graph(model=ir.load(path), signature=signature)
    return {
        "name": path.name,
        "signature": _signature(signature),
        "operators": graph.operators(),
        "weight_bytes": graph.weight_bytes(),
        "largest_weights": _largest_weights(path),
    }


def _largest_weights(path: Path) -> list[Json]:
    """The ten largest weights of an .onnx file by name, in bytes; none where the build extra is not installed."""
    try:
        import onnx_ir as ir
    except ModuleNotFoundError:
        return []
    weights = ir.load(path).graph.initializers
    sizes = [(value.const_value.nbytes, name) for name, value in weights.items() if value.const_value is not None]
    return [{"name": name, "bytes": size} for size, name in sorted(sizes, reverse=True)[:10]]


def _signature(signature: Signature) -> dict[str, Json]:
    def row(spec: TensorSpec) -> dict[str, Json]:
        found = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "bounds": spec.bounds}
        return found | ({"right_padded": True} if spec.right_padded else {})

    return {
        "task": signature.task,
        "inputs": [row(spec) for spec in signature.inputs],
        "outputs": [row(spec) for spec in signature.outputs],
        "axes": dict(signature.axes),
    }


def _lines(findings: dict[str, Any]) -> list[str]:
    lines = [str(findings["name"])]
    for key in ("target", "precision", "minimum_onnxruntime"):
        if key in findings:
            lines.append(f"  {key}: {findings[key]}")
    lines.append(f"  task: {findings['signature']['task']}")
    for kind in ("inputs", "outputs"):
        for spec in findings["signature"][kind]:
            padded = ", padded on the right" if spec.get("right_padded") else ""
            lines.append(f"  {kind[:-1]} {spec['name']}: {spec['dtype']} {spec['shape']}{padded}")
    for axis, (low, high) in findings["signature"]["axes"].items():
        lines.append(f"  {axis}: {low} to {high}")
    lines.append("operators")
    lines += [f"  {count:5} {name}" for name, count in sorted(findings["operators"].items(), key=lambda item: -item[1])]
    for row in findings.get("ledger", ()):
        quality = "" if row.get("quality") is None else f", {row['metric']} {row['quality']:.5g}"
        lines.append(f"pass {row['pass']}: {row['status']}, {row['changes']} changes{quality}: {row['reason']}")
        lines += [f"    {note}" for note in row["notes"]]
    if "files" in findings:
        lines.append("files")
        lines += [f"  {entry['size']:>12,} {name}" for name, entry in findings["files"].items()]
    if findings["largest_weights"]:
        lines.append("largest weights")
        lines += [f"  {row['bytes']:>12,} {row['name']}" for row in findings["largest_weights"]]
    if "placement" in findings:
        lines.append("placement")
        lines += [f"  {provider}: {node}" for node, provider in findings["placement"].items()]
    return lines
