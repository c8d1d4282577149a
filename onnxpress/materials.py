"""What is in a bundle and what it needs: the bill of materials (CycloneDX 1.6, JSON), and notes on licences."""

from __future__ import annotations

import importlib.metadata
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from onnxpress import __version__
from onnxpress.artifact import Artifact
from onnxpress.web import Package

_OURS = "Apache-2.0"
# SPDX expressions, as the packages state them.
_PACKAGES = {
    "onnxruntime": "MIT",
    "onnxruntime-gpu": "MIT",
    "onnxruntime-ep-openvino": "MIT",
    "numpy": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
    "tokenizers": "Apache-2.0",
    "tqdm": "MPL-2.0 AND MIT",
    "jinja2": "BSD-3-Clause",
    "cryptography": "Apache-2.0 OR BSD-3-Clause",
}
# Model cards write these in small letters.
_SPDX = {
    name.lower(): name for name in ("Apache-2.0", "MIT", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-NC-4.0", "CC-BY-SA-4.0")
}
_TEXTS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)", re.IGNORECASE)


def bill_of_materials(
    artifact: Artifact, target: str, requires: Sequence[str], packages: Sequence[Package], digests: Mapping[str, str]
) -> dict[str, Any]:
    """CycloneDX of a bundle. requires: for pip; packages: of npm, which it holds; digests: SHA-256 of its files, by path.

    Without the two files that say what is in it, this one and LICENSES.md.
    """
    manifest = artifact.manifest
    root = f"{manifest.name}-{target}"
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "description": f"{manifest.task}, {manifest.precision}",
        **({} if (stated := _stated(artifact)) is None else {"licenses": [stated]}),
        "modelCard": {
            "modelParameters": {
                "task": manifest.task,
                "inputs": [{"format": str(spec)} for spec in manifest.signature.inputs],
                "outputs": [{"format": str(spec)} for spec in manifest.signature.outputs],
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(artifact)},
        },
        "components": [_file(path, digest) for path, digest in sorted(digests.items()) if path.startswith("model/")],
    }
    runtime: dict[str, Any] = {
        "type": "library",
        "bom-ref": "onnxpress",
        "name": "onnxpress",
        "version": __version__,
        "licenses": [{"expression": _OURS}],
        "components": [
            _file(path, digest)
            for path, digest in sorted(digests.items())
            if not path.startswith(("model/", "vendor/"))
        ],
    }
    others = [*(_required(requirement) for requirement in requires), *(_held(package) for package in packages)]
    components = [model, runtime, *others]
    references = [component["bom-ref"] for component in components]
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "onnxpress", "version": __version__}]},
            "component": {"type": "application", "bom-ref": root, "name": root},
        },
        "components": components,
        "dependencies": [
            {"ref": root, "dependsOn": references},
            *({"ref": reference, "dependsOn": []} for reference in references),
        ],
    }
    name = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(content, sort_keys=True))  # of the content: no clock, no chance
    return {**content, "serialNumber": f"urn:uuid:{name}"}


def licences(artifact: Artifact, requires: Sequence[str], packages: Sequence[Package]) -> str:
    """Markdown for people: what is here, what is installed beside it, and the texts that the model came with."""
    manifest = artifact.manifest
    stated = manifest.options.get("license")
    source = manifest.recipe.get("model", {}).get("source") or "not told"
    model = f"{stated}, as its model card states" if stated else "not stated by the checkpoint: ask who gave it to you"
    lines = [
        "# Licences",
        "",
        "What this folder holds:",
        "",
        f"- the model {manifest.name} (made of: {source}), with its tokenizer: {model}.",
        f"- of onnxpress {__version__} what runs it there: {_OURS}, text below.",
        *(f"- {package.name} {package.version}: {package.license}, texts in vendor/." for package in packages),
    ]
    if requires:
        lines += ["", "What is installed beside it, and is not in this folder:", ""]
        lines += [f"- {requirement}: {_PACKAGES[_package_name(requirement)]}" for requirement in requires]
    texts = {name: artifact.read(name).decode(errors="replace") for name in manifest.files if _TEXTS.match(name)}
    texts = {f"The model's {name}": text for name, text in texts.items()} | {"Of onnxpress": _our_text()}
    for title, text in texts.items():
        lines += ["", f"## {title}", "", *(f"    {line}".rstrip() for line in text.strip("\n").splitlines())]
    return "\n".join(lines) + "\n"


def _stated(artifact: Artifact) -> dict[str, Any] | None:
    stated = artifact.manifest.options.get("license")
    if not stated:
        return None
    return {"license": {"id": _SPDX[stated]} if stated in _SPDX else {"name": stated}}


def _metrics(artifact: Artifact) -> list[dict[str, str]]:
    """What the last pass that was judged came to, against the original."""
    judged = [row for row in artifact.manifest.ledger if row.get("metrics")]
    return (
        [{"type": name, "value": f"{value:.6g}"} for name, value in sorted(judged[-1]["metrics"].items())]
        if judged
        else []
    )


def _held(package: Package) -> dict[str, Any]:
    purl = f"pkg:npm/{package.name.replace('@', '%40')}@{package.version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
        "licenses": [{"expression": package.license}],
        "components": [{"type": "file", "bom-ref": path, "name": path} for path in sorted(package.members.values())],
    }


def _required(requirement: str) -> dict[str, Any]:
    name = _package_name(requirement)
    return {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}",
        "name": name,
        "purl": f"pkg:pypi/{name}",
        "scope": "required",
        "licenses": [{"expression": _PACKAGES[name]}],
        "properties": [{"name": "onnxpress:requirement", "value": requirement}],
    }


def _package_name(requirement: str) -> str:
    return requirement.partition(">=")[0]


def _file(path: str, digest: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": path, "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _our_text() -> str:
    found = importlib.metadata.files("onnxpress") or []
    text = next((path.read_text(encoding="utf-8") for path in found if path.name == "LICENSE"), None)
    return f"{_OURS}: https://www.apache.org/licenses/LICENSE-2.0" if text is None else text
