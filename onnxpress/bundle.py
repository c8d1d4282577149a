"""Makes one file of an artifact, that a device unpacks, runs and checks by itself.

    NAME-DEVICE/manifest.json             a model package, as ONNX Runtime opens it: component.json has the variant
    NAME-DEVICE/model/DEVICE/             the artifact
    NAME-DEVICE/lib/onnxpress/            the runtime, pure Python
    NAME-DEVICE/run.py                    on_device.py: answers, and the self-test
    NAME-DEVICE/run.cpp                   on_device.cpp: the golden answers from C++; on the CPU, where nothing is encrypted
    NAME-DEVICE/update.py                 on_device_update.py: puts the next bundle in this one's place
    NAME-DEVICE/bundle.json               what the bundle is for, its budget, the digest of every file, the parts of large ones
    NAME-DEVICE/model.sig                 the signature of all other files, and beside it its own digest; if it is signed
    NAME-DEVICE/sbom.cdx.json, LICENSES.md    what is in it and what it needs, under which licences
    NAME-DEVICE/required_operators_and_types.config    for a reduced build of ONNX Runtime; where made on such a machine
    NAME-DEVICE/README.md

The same artifact gives the same bytes: files in the order of their names but for bundle.json, which comes first, without times and
owners.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxpress import __version__
from onnxpress.artifact import Artifact, check_outside
from onnxpress.bundle_archive import (
    Source,
    folder_name,
    known_parts,
    named_chunks,
    opened,
    read_bundle,
    replacing,
    sent,
    sha256,
    size,
    write_tar,
    write_zip,
)
from onnxpress.chunks import LARGEST
from onnxpress.devices import Device, check_fit, device, providers
from onnxpress.encryption import SUFFIX, encrypt, read_key
from onnxpress.errors import ConversionError, OutputError, RecipeError
from onnxpress.manifest import Manifest
from onnxpress.materials import bill_of_materials, licences
from onnxpress.on_device import (
    DESCRIPTION,
    SCHEMA_VERSION,
    SIGNATURE,
    SIGNATURE_DIGEST,
    canonical,
    digest_line,
    this_machine,
)
from onnxpress.runtime.providers import CPU, PROVIDERS
from onnxpress.signing import Signer
from onnxpress.web import PACKAGES, web_files

# What the runtime imports of onnxpress.
_CORE = ("__init__.py", "errors.py", "manifest.py", "artifact.py", "encryption.py", "whole.py")
_CHAT = ("conversation.py", "figures.py")
_OPERATORS = "required_operators_and_types.config"
_LARGEST = 2**31  # bytes of a model in ONNX Runtime's own format, from which the list of operators is taken
_HERE = Path(__file__).parent


def bundle(
    artifact: Path | str,
    *,
    target: str,
    out: Path | str | None = None,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
    sign: Path | str | None = None,
    certificate: Path | str | None = None,
    encrypt_with: str | bytes | None = None,
    delta: Path | str | None = None,
) -> Path:
    """Write the bundle of an artifact for a device, and return its path.

    target: a name of devices.py. out: the file; by default NAME-DEVICE.tar (or .zip) beside the artifact. latency_ms, memory_mb: the
    budget that the self-test holds the device to: of one call with each golden input, and of the whole process. sign, certificate: as
    signing.Signer takes them. encrypt_with: a key as encryption.read_key takes it. delta: a bundle that the device has; what is written
    (NAME-DEVICE.delta.tar) then holds only what that one lacks, for update.py.

    Raises RecipeError (an unknown device, an artifact that does not suit it, a key that cannot sign), ArtifactError, OutputError.
    """
    facts = device(target)
    source = Artifact.open(artifact)
    check_fit(target, source.manifest)
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
    if not facts.python and encrypt_with is not None:
        raise RecipeError(f"A bundle for {target} brings nothing that decrypts; leave the encryption out.")
    if facts.archive != "tar" and delta is not None:
        raise RecipeError(f"A bundle for {target} is a zip, which is put in its place whole; leave --delta out.")
    if certificate is not None and sign is None:
        raise RecipeError("A certificate needs its key to sign with: --sign KEY.")
    signer = None if sign is None else Signer(Path(sign), None if certificate is None else Path(certificate))
    known = None if delta is None else known_parts(read_bundle(Path(delta)))
    name = folder_name(source.manifest.name, target)
    place = (
        Path(out)
        if out is not None
        else source.path.parent / f"{name}{'' if delta is None else '.delta'}.{facts.archive}"
    )
    if place.suffix != f".{facts.archive}":
        raise RecipeError(f"A bundle for {target} is a {facts.archive}; {place} has to end in .{facts.archive}.")
    if delta is not None and place.exists() and place.samefile(delta):
        raise RecipeError(f"{place} is the bundle of --delta, which would be gone: choose another --out.")
    check_outside(place, source.path, "the bundle")
    with contextlib.ExitStack() as stack:
        files = _contents(source, target, facts)
        if encrypt_with is not None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxpress-bundle-")))
            _encrypt(files, f"model/{target}/", source, read_key(encrypt_with), scratch)
        elif target != "browser" and providers(source.manifest) == ("cpu",):
            files["run.cpp"] = _HERE / "on_device.cpp"
        requires = _requirements(source, secured=signer is not None or encrypt_with is not None) if facts.python else []
        packages = PACKAGES if target == "browser" else ()
        options = "" if signer is None else " --signed-by KEY.pem"
        options += "" if encrypt_with is None else " --key file:KEY"
        readme = _readme(source, target, facts, requires, options) + (
            _CPP_WORDS.format(target=target) if "run.cpp" in files else ""
        )
        files.setdefault("README.md", readme.encode())
        digests = {path: sha256(content) for path, content in files.items()}
        files["LICENSES.md"] = licences(source, requires, packages).encode()
        files["sbom.cdx.json"] = _json(bill_of_materials(source, target, requires, packages, digests))
        digests |= {path: sha256(files[path]) for path in ("LICENSES.md", "sbom.cdx.json")}
        described = _describe(source, target, facts, requires, budget, files, digests)
        head = {DESCRIPTION: canonical(described).encode()}
        if signer is not None:
            head[SIGNATURE] = signer.sign(name, {**digests, DESCRIPTION: sha256(head[DESCRIPTION])})
            head[SIGNATURE_DIGEST] = digest_line(head[SIGNATURE])
        write = write_zip if facts.archive == "zip" else write_tar
        with replacing(place) as file:
            write(
                file, ((f"{name}/{path}", content) for path, content in (*head.items(), *sent(files, described, known)))
            )
    return place


def _describe(
    source: Artifact,
    target: str,
    facts: Device,
    requires: list[str],
    budget: Mapping[str, float | None],
    files: Mapping[str, Source],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """What bundle.json says."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": source.manifest.name,
        "task": source.manifest.task,
        "precision": source.manifest.precision,
        "target": target,
        "system": facts.system,
        "machine": facts.machine,
        "providers": list(providers(source.manifest)),
        "threads": facts.threads,
        "artifact": f"model/{target}",
        "requires": requires,
        "budget": {key: value for key, value in budget.items() if value is not None},
        "made_with": f"onnxpress {__version__}",
        "files": digests,
        "sizes": {path: size(content) for path, content in files.items()},
        "chunks": {
            path: [name for name, _ in named_chunks(content)]
            for path, content in files.items()
            if size(content) > LARGEST
        },
    }


def _encrypt(files: dict[str, Source], prefix: str, artifact: Artifact, key: bytes, scratch: Path) -> None:
    """Put encrypted files in the place of the artifact's, but for its manifest and measurements."""
    for number, name in enumerate(artifact.manifest.files):
        source = files.pop(prefix + name)
        place = scratch / str(number)
        with opened(source) as content, place.open("wb") as file:
            encrypt(content, file, name=name, key=key)
        files[prefix + name + SUFFIX] = place


def _contents(artifact: Artifact, target: str, facts: Device) -> dict[str, Source]:
    """Everything but bundle.json, by path in the bundle."""
    manifest = artifact.manifest
    provider = PROVIDERS[providers(manifest)[0]]
    variant = {"ep": provider.registered_as, "executor_info": {"ort": {"model_file": facts.model}}}
    package = {
        "schema_version": "1.0",
        "package_name": manifest.name,
        "description": f"{manifest.task}, {manifest.precision}, for {target}",
        "components": {"model": "model"},
    }
    files: dict[str, Source] = {
        "manifest.json": _json(package),
        "model/component.json": _json({"variants": {target: variant}}),
    }
    for name in (*manifest.files, "manifest.json", "measured.json"):
        path = artifact.path / name
        if path.is_symlink():
            raise RecipeError(f"{path} is a link; a bundle is made of plain files: copy the artifact.")
        if path.is_file():
            files[f"model/{target}/{name}"] = path
    weights = sum(entry.size for name, entry in manifest.files.items() if name.startswith("model.onnx"))
    here = this_machine() == (facts.system, facts.machine)  # ONNX Runtime chooses kernels by the machine that it is on
    if facts.model == "model.ort":
        if weights >= _LARGEST:
            raise RecipeError(
                f"{manifest.name} has {weights / 1e9:.1f} GB of weights; ONNX Runtime's own format holds 2 GiB."
            )
        files = {path: source for path, source in files.items() if not path.startswith(f"model/{target}/model.onnx")}
        files[f"model/{target}/model.ort"], files[_OPERATORS] = _optimized(artifact, elsewhere=not here)
    elif here and provider is CPU and weights < _LARGEST:
        _, files[_OPERATORS] = _optimized(artifact, elsewhere=False)
    if facts.python:
        files["run.py"] = _HERE / "on_device.py"
        if facts.archive == "tar":
            files["update.py"] = _HERE / "on_device_update.py"  # for POSIX systems
        core = _CORE + _CHAT * (manifest.task == "text-generation")
        files |= {f"lib/onnxpress/{name}": _HERE / name for name in core}
        files |= {f"lib/onnxpress/runtime/{path.name}": path for path in sorted((_HERE / "runtime").glob("*.py"))}
    return files | web_files(artifact) if target == "browser" else files


def _requirements(artifact: Artifact, *, secured: bool) -> list[str]:
    """What the device needs beside Python, for pip."""
    first = providers(artifact.manifest)[0]
    wheel = "onnxruntime" if first in ("cpu", "openvino") else "onnxruntime-gpu"
    packages = [f"{wheel}>={artifact.manifest.minimum_onnxruntime}", "numpy>=2.0", "tokenizers>=0.21", "tqdm>=4.66"]
    packages += ["onnxruntime-ep-openvino>=1.8"] * (first == "openvino")
    packages += ["jinja2>=3.1.6"] * (artifact.manifest.task == "text-generation")
    return [*packages, "cryptography>=45.0.2"] if secured else packages


def _optimized(artifact: Artifact, *, elsewhere: bool) -> tuple[bytes, bytes]:
    """The model in ONNX Runtime's own format, after its optimizations, and its own list of what that needs.

    Its build takes the list (--include_ops_by_config). elsewhere: without what it would choose for this machine's processor, and with
    what it would choose for one that multiplies signed numbers.
    """
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it says on stderr where it writes
    with tempfile.TemporaryDirectory(prefix="onnxpress-bundle-") as scratch:
        model, config = Path(scratch) / "model.ort", Path(scratch) / _OPERATORS
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(model)
        options.add_session_config_entry("session.save_model_format", "ORT")
        if elsewhere:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry("session.qdqisint8allowed", "1")
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
                create_config_from_models([model], config, True)
        except Exception as error:  # ONNX Runtime's exceptions share no base
            if shutil.disk_usage(scratch).free < artifact.file("model.onnx").stat().st_size:
                raise OutputError(
                    f"There is no room in {tempfile.gettempdir()} for the model in ONNX Runtime's own format: free some, or set TMPDIR to another folder."
                ) from None
            raise ConversionError(f"ONNX Runtime cannot write {artifact.path} in its own format: {error}") from None
        lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        return model.read_bytes(), ("\n".join(lines) + "\n").encode()


def _readme(artifact: Artifact, target: str, facts: Device, requires: list[str], options: str) -> str:
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
            "python -m pip install " + " ".join(f'"{name}"' for name in requires),
            *["# onnxruntime-gpu for this device comes from NVIDIA, with JetPack; PyPI has none for it"]
            * (facts.machine == "aarch64" and requires[0].startswith("onnxruntime-gpu")),
            f"python run.py --self-test{options}     # every file, the golden answers, latency and memory: exit code 0 or 1",
            f"python run.py {_example(manifest)[0]}{options}",
            *[f"python run.py --chat{options}     # where it has a chat template"]
            * (manifest.task == "text-generation"),
            "```",
            *_SIGNED_WORDS * ("--signed-by" in options),
            "",
            "From Python, after the same checks:",
            "",
            "```python",
            "import runpy",
            "",
            f'model = runpy.run_path("FOLDER/run.py")["load"]({_load_arguments(options)})  # FOLDER: this one',
            f"print({_example(manifest)[1]})",
            "```",
            "",
        ]
    if "--key" not in options:  # encrypted, it opens through run.py alone
        lines += [
            "The folder is a model package that ONNX Runtime opens by itself (OrtModelPackageApi; in Python `ModelPackageContext`),",
            f"component `model`. Golden inputs and outputs are in model/{target}/golden.safetensors.",
        ]
    return "\n".join(lines) + "\n"


_CPP_WORDS = """
From C++17, with ONNX Runtime and nlohmann/json; run.cpp opens the model and compares its golden answers, here as it is done on Linux:

```sh
g++ -std=c++17 run.cpp -o ../run -I "$ONNXRUNTIME/include" -L "$ONNXRUNTIME/lib" -lonnxruntime
LD_LIBRARY_PATH="$ONNXRUNTIME/lib" ../run model/{target}
```
"""
_SIGNED_WORDS = (
    "",
    "KEY.pem is the signer's public key, or certificates that the signer's must lead to. It has to come another way than this folder, and to",
    "lie outside of it.",
    "The form is OpenSSF Model Signing: `model_signing verify key --public_key KEY.pem --signature model.sig .` checks the same.",
)


def _example(manifest: Manifest) -> tuple[str, str]:
    """An answer, asked for on the command line and from Python."""
    if manifest.task == "module":
        return "--check", f"model.run({{{', '.join(f'{spec.name!r}: …' for spec in manifest.signature.inputs)}}})"
    if manifest.task == "text-generation":
        return '"A text"', 'model.generate(["A text"])[0].text'
    if manifest.task == "question-answering":
        return '"A question" --pair "Its context"', 'model.answer_texts([("A question", "Its context")])'
    text = f"A {manifest.options.get('mask_token', '')} text" if manifest.task == "fill-mask" else "A text"
    return f'"{text}"', f'model.answer_texts(["{text}"])'


def _load_arguments(options: str) -> str:
    """The command line's options as arguments of `load`."""
    given = {"--signed-by": 'signed_by="KEY.pem"', "--key": 'key="file:KEY"'}
    return ", ".join(argument for option, argument in given.items() if option in options)


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
