"""The nouns that an artifact carries: tensor specifications, the signature, and the manifest.

Plain dataclasses over JSON, so that a device without the build extra can read them. Reading and writing
files is the artifact's business, not this module's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from onnxpress.errors import ArtifactError

SCHEMA_VERSION = 1

Json = Any  # a value that json.loads can give
Arrays = Mapping[str, np.ndarray[Any, Any]]


class Runnable(Protocol):
    """Whatever answers named arrays with named arrays: an ONNX Runtime session or the PyTorch original."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that `run` takes."""
        ...

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output.

    shape holds numbers and names of symbolic axes; dtype is numpy's name ("float32", "int64");
    bounds, for integer inputs, is the inclusive range of allowed values (token ids: 0 … vocabulary - 1). right_padded: of a mask
    (batch, length), whether each row has to be ones and then zeros, the first a one.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bounds: tuple[int, int] | None = None
    right_padded: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a graph takes and gives; axes maps each symbolic axis to its inclusive (minimum, maximum)."""

    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Digest and size (bytes) of one file of an artifact."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known about an artifact and does not depend on the moment or the machine's speed.

    options are the task's: labels, max_length, pooling and the like. session holds what ONNX Runtime has to be
    told (disabled_optimizers, exact_products, flash_attention, half_floats, tokens_per_chunk, providers where they are not the CPU's). ledger has one row a pass. files maps each file's relative path to its digest.
    """

    name: str
    target: str
    precision: str
    signature: Signature
    options: Mapping[str, Json]
    session: Mapping[str, Json]
    recipe: Mapping[str, Json]
    ledger: tuple[Mapping[str, Json], ...]
    versions: Mapping[str, str]
    minimum_onnxruntime: str
    operators: Mapping[str, int]
    files: Mapping[str, FileEntry]
    schema_version: int = SCHEMA_VERSION

    @property
    def task(self) -> str:
        """The task's name, e.g. feature-extraction."""
        return self.signature.task

    def to_json(self) -> str:
        """Text of manifest.json: sorted keys, and a digest over all the rest so that edits show."""
        content = dataclasses.asdict(self)
        content["digest"] = _digest(content)
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """Read manifest.json; `where` names the file in errors. Raises ArtifactError."""
        try:
            content = json.loads(text)
            json.dumps(content, ensure_ascii=False).encode()  # half a character can hide behind an escape
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{where} is not valid JSON ({error}); the artifact is corrupt: build it again."
            ) from None
        if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
            raise ArtifactError(f"{where} is not an onnxpress manifest: it has no schema_version.")
        if content["schema_version"] > SCHEMA_VERSION:
            raise ArtifactError(
                f"{where} has schema version {content['schema_version']}; this onnxpress reads up to "
                f"{SCHEMA_VERSION}. Upgrade onnxpress, or build the artifact again with this version."
            )
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise ArtifactError(
                f"{where} was changed after the build: its digest does not fit its content. Build the artifact again."
            )
        try:
            signature = content["signature"]
            if not all(isinstance(content[name], dict) for name in ("files", "options", "session")):
                raise TypeError("files, options and session are objects")
            return cls(
                **{
                    **content,
                    "signature": Signature(
                        task=signature["task"],
                        inputs=tuple(_specs(signature["inputs"])),
                        outputs=tuple(_specs(signature["outputs"])),
                        axes={name: (low, high) for name, (low, high) in signature["axes"].items()},
                    ),
                    "ledger": tuple(content["ledger"]),
                    "files": {path: FileEntry(**entry) for path, entry in content["files"].items()},
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{where} lacks or garbles a field ({error}); build the artifact again.") from None


def _specs(rows: Iterable[Mapping[str, Json]]) -> Iterable[TensorSpec]:
    for row in rows:
        bounds = row["bounds"]
        yield TensorSpec(
            name=row["name"],
            dtype=row["dtype"],
            shape=tuple(row["shape"]),
            bounds=None if bounds is None else (bounds[0], bounds[1]),
            right_padded=bool(row.get("right_padded", False)),
        )


def _digest(content: Mapping[str, Json]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
