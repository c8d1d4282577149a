"""Makes one file of an artifact, that a device unpacks, runs and checks by itself.

    NAME-DEVICE/manifest.json             a model package, as ONNX Runtime opens it: component.json has the variant
    NAME-DEVICE/model/DEVICE/             the artifact
    NAME-DEVICE/lib/onnxpress/            the runtime, pure Python
    NAME-DEVICE/run.py                    on_device.py: answers, and the self-test
    NAME-DEVICE/bundle.json               what the bundle is for, its budget, the digest of every file
    NAME-DEVICE/required_operators_and_types.config    for a reduced build of ONNX Runtime; where made on such a machine
    NAME-DEVICE/README.md

The same artifact gives the same bytes: files in the order of their names, without times and owners.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from onnxpress import __version__
from onnxpress.artifact import Artifact, check_outside
from onnxpress.devices import Device, check_fit, device, providers
from onnxpress.errors import ConversionError, OutputError, RecipeError
from onnxpress.on_device import DESCRIPTION, canonical, this_machine
from onnxpress.runtime.providers import CPU, PROVIDERS
from onnxpress.web import web_files

_CORE = ("__init__.py", "errors.py", "manifest.py", "artifact.py")  # what the runtime imports of onnxpress
_OPERATORS = "required_operators_and_types.config"
_LARGEST = 2**31  # bytes of a model in ONNX Runtime's own format, from which the list of operators is taken
_HERE = Path(__file__).parent

Source = Path | bytes


def bundle(
    artifact: Path | str,
    *,
    target: str,
    out: Path | str | None = None,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
) -> Path:
    """Write the bundle of an artifact for a device, and return its path.

    target: a name of devices.py. out: the file; by default NAME-DEVICE.tar (or .zip) beside the artifact. latency_ms, memory_mb: the
    budget that the self-test holds the device to: of one call with each golden input, and of the whole process.

    Raises RecipeError (an unknown device, an artifact that does not suit it), ArtifactError, OutputError.
    """
    facts = device(target)
    opened = Artifact.open(artifact)
    check_fit(target, opened.manifest)
    budget = {"latency_ms": latency_ms, "memory_mb": memory_mb}
    for name, value in budget.items():
        if value is not None and not 0 < value < float("inf"):
            raise RecipeError(f"{name} is {value!r}; it takes a number above 0.")
    if memory_mb is not None and facts.system == "windows":
        raise RecipeError(
            "A memory budget cannot be held to on Windows, which does not tell Python; leave memory_mb out."
        )
    if not facts.python and (latency_ms is not None or memory_mb is not None):
        raise RecipeError(f"A bundle for {target} has no self-test that could hold a budget; leave the budget out.")
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', opened.manifest.name).strip('.-') or 'model'}-{target}"
    place = Path(out) if out is not None else opened.path.parent / f"{name}.{facts.archive}"
    check_outside(place, opened.path, "the bundle")
    files = _contents(opened, target, facts)
    description = {
        "schema_version": 1,
        "name": opened.manifest.name,
        "task": opened.manifest.task,
        "precision": opened.manifest.precision,
        "target": target,
        "system": facts.system,
        "machine": facts.machine,
        "providers": list(providers(opened.manifest)),
        "threads": facts.threads,
        "artifact": f"model/{target}",
        "requires": _requirements(opened),
        "budget": {key: value for key, value in budget.items() if value is not None},
        "made_with": f"onnxpress {__version__}",
        "files": {path: _sha256(source) for path, source in sorted(files.items())},
    }
    files[DESCRIPTION] = canonical(description).encode()
    with _replacing(place) as file:
        (_write_zip if facts.archive == "zip" else _write_tar)(
            file, {f"{name}/{path}": files[path] for path in sorted(files)}
        )
    return place


def _contents(artifact: Artifact, target: str, facts: Device) -> dict[str, Source]:
    """Everything but bundle.json, by path in the bundle."""
    manifest = artifact.manifest
    provider = PROVIDERS[providers(manifest)[0]]
    variant = {"ep": provider.registered_as, "executor_info": {"ort": {"model_file": "model.onnx"}}}
    package = {
        "schema_version": "1.0",
        "package_name": manifest.name,
        "description": f"{manifest.task}, {manifest.precision}, for {target}",
        "components": {"model": "model"},
    }
    files: dict[str, Source] = {
        "manifest.json": _json(package),
        "model/component.json": _json({"variants": {target: variant}}),
        "README.md": _readme(artifact, target, facts).encode(),
    }
    for path in sorted(artifact.path.rglob("*")):
        name = path.relative_to(artifact.path).as_posix()
        if (
            path.is_file()
            and not path.is_symlink()
            and (name in manifest.files or name in ("manifest.json", "measured.json"))
        ):
            files[f"model/{target}/{name}"] = path
    weights = sum(entry.size for name, entry in manifest.files.items() if name.startswith("model.onnx"))
    here = this_machine() == (facts.system, facts.machine)  # ONNX Runtime chooses kernels by the machine that it is on
    if here and provider is CPU and weights < _LARGEST:
        files[_OPERATORS] = _required_operators(artifact)
    if facts.python:
        files["run.py"] = _HERE / "on_device.py"
        files |= {f"lib/onnxpress/{name}": _HERE / name for name in _CORE}
        files |= {f"lib/onnxpress/runtime/{path.name}": path for path in sorted((_HERE / "runtime").glob("*.py"))}
    return files | web_files(artifact) if target == "browser" else files


def _requirements(artifact: Artifact) -> list[str]:
    wheel = "onnxruntime" if providers(artifact.manifest) == ("cpu",) else "onnxruntime-gpu"
    packages = [f"{wheel}>={artifact.manifest.minimum_onnxruntime}", "numpy>=2.0", "tokenizers>=0.21"]
    return [*packages, "jinja2>=3.1.6"] if artifact.manifest.task == "text-generation" else packages


def _required_operators(artifact: Artifact) -> bytes:
    """ONNX Runtime's own list of what it runs after its optimizations, which its build takes (--include_ops_by_config)."""
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it says on stderr where it writes
    with tempfile.TemporaryDirectory(prefix="onnxpress-bundle-") as scratch:
        optimized, config = Path(scratch) / "model.ort", Path(scratch) / _OPERATORS
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.save_model_format", "ORT")
        disabled = artifact.manifest.session.get("disabled_optimizers", ())
        try:
            onnxruntime.InferenceSession(
                artifact.file("model.onnx"),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(disabled),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file open
                create_config_from_models([optimized], config, True)
        except Exception as error:  # ONNX Runtime's exceptions share no base
            raise ConversionError(f"ONNX Runtime cannot list what {artifact.path} needs: {error}") from None
        lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return ("\n".join(lines) + "\n").encode()


def _readme(artifact: Artifact, target: str, facts: Device) -> str:
    manifest = artifact.manifest
    lines = [
        f"# {manifest.name} for {target}",
        "",
        f"{manifest.task}, {manifest.precision}; made with onnxpress {__version__}.",
        "",
    ]
    if facts.python:
        lines += [
            "```",
            "python -m pip install " + " ".join(f'"{name}"' for name in _requirements(artifact)),
            "python run.py --self-test     # every file, the golden answers, latency and memory: exit code 0 or 1",
            'python run.py "a text"',
            "```",
            "",
            f"From Python: `sys.dont_write_bytecode = True; sys.path.insert(0, 'lib')`, then `onnxpress.load('model/{target}')`.",
        ]
    lines += [
        "The folder is a model package that ONNX Runtime opens by itself (OrtModelPackageApi; in Python `ModelPackageContext`),",
        f"component `model`. Golden inputs and outputs are in model/{target}/golden.safetensors.",
    ]
    return "\n".join(lines) + "\n"


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _sha256(source: Source) -> str:
    with _opened(source) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _replacing(place: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place when it is whole. Raises OutputError."""
    if place.is_dir():
        raise OutputError(f"{place} is a folder; --out names the bundle's file.")
    part = place.with_name(f".{place.name}.part-{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    except OSError as error:
        raise OutputError(f"The bundle {place} cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _write_tar(file: IO[bytes], files: Mapping[str, Source]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, source in files.items():
            entry = tarfile.TarInfo(path)
            entry.mode = 0o644
            with _opened(source) as content:
                entry.size = content.seek(0, io.SEEK_END)
                content.seek(0)
                archive.addfile(entry, content)


def _write_zip(file: IO[bytes], files: Mapping[str, Source]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path, source in files.items():
            entry = zipfile.ZipInfo(path)  # of the first day that a zip knows
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix, wherever it is made
            with _opened(source) as content, archive.open(entry, "w", force_zip64=True) as place:
                while block := content.read(2**20):
                    place.write(block)


def _opened(source: Source) -> io.BytesIO | io.BufferedReader:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
