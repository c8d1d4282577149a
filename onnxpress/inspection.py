"""Shows what an artifact or an .onnx file consists of: signature, operators, sizes, placement, ledger."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from onnxpress.artifact import Artifact
from onnxpress.manifest import Json, Manifest, Runnable, Signature, TensorSpec
from onnxpress.runtime.session import Session


def inspect(path: Path, *, placement: bool, as_json: bool, providers: list[str] | None, allow_fallback: bool) -> int:
    """Print the findings; returns the exit code. Raises ArtifactError, and ProviderError with `placement`."""
    if path.suffix == ".onnx":
        findings = _of_file(path)
    else:
        artifact = Artifact.open(path)
        findings = _of_manifest(artifact.manifest)
        if placement:
            from onnxpress.runtime.loading import open_session

            session = open_session(artifact, providers=providers, allow_fallback=allow_fallback)
            say_fallback(session)
            findings["placement"] = session.placement()
    if as_json:
        print(json.dumps(findings, indent=1, ensure_ascii=False))
    else:
        print("\n".join(_lines(findings)))
    return 0


def say_fallback(session: Runnable) -> None:
    """What was asked for and is not what runs, on stderr; only a Session has something to say."""
    if isinstance(session, Session) and session.fallback_note:
        print(f"onnxpress: {session.fallback_note} It runs on: {', '.join(session.providers)}.", file=sys.stderr)


def _of_manifest(manifest: Manifest) -> dict[str, Json]:
    content: dict[str, Json] = json.loads(manifest.to_json())
    content.pop("digest")
    return content


def _of_file(path: Path) -> dict[str, Json]:
    from onnxpress.foreign import open_onnx

    graph = open_onnx(path, task=None, max_length=None).graph
    sizes = sorted(
        (
            (value.const_value.nbytes, name)
            for name, value in graph.model.graph.initializers.items()
            if value.const_value
        ),
        reverse=True,
    )
    return {
        "name": path.name,
        "signature": _signature(graph.signature),
        "operators": graph.operators(),
        "weight_bytes": graph.weight_bytes(),
        "largest_weights": [{"name": name, "bytes": size} for size, name in sizes[:10]],
    }


def _signature(signature: Signature) -> dict[str, Json]:
    def row(spec: TensorSpec) -> dict[str, Json]:
        return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "bounds": spec.bounds}

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
            lines.append(f"  {kind[:-1]} {spec['name']}: {spec['dtype']} {spec['shape']}")
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
    for row in findings.get("largest_weights", ()):
        lines.append(f"  {row['bytes']:>12,} {row['name']}")
    if "placement" in findings:
        lines.append("placement")
        lines += [f"  {provider}: {node}" for node, provider in findings["placement"].items()]
    return lines
