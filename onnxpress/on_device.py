"""Runs a bundle on its device, and checks it there. This file is the bundle's run.py.

    python run.py --self-test [--json]    files, golden outputs, latency and memory: one page, exit code 0 or 1
    python run.py "a text" […]            one JSON answer a line
    python run.py --chat                  a conversation with a language model, until the input ends
    python run.py --check [FOLDER]        files and signature alone, of this bundle or of another one

Needs Python 3.11 with onnxruntime, numpy and tokenizers; and cryptography for signatures and encrypted models. Nothing else of the
bundle is opened or imported before every file has the digest that bundle.json has of it and, with --signed-by, the digest that was
signed. Who can change run.py can change what it says: what comes from outside is checked by the run.py that is there already.
"""

import os
import sys

if __name__ == "__main__" and sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.")
if sys.path:  # what is imported below must not come from the bundle's folder
    here = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120  pathlib is not imported yet
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != here]
import argparse
import base64
import contextlib
import hashlib
import io
import json
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

DESCRIPTION, SCHEMA_VERSION = "bundle.json", 1
SIGNATURE, SIGNATURE_DIGEST = "model.sig", "model.sig.sha256"  # these two cannot be in what is signed
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_WORDS = {
    "name", "target", "task", "precision", "system", "machine", "providers", "threads", "requires", "budget", "chunks",
}  # fmt: skip
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_TIMED_SECONDS, _TIMED_CALLS = 2.0, 50
_interrupted = False


class BundleError(Exception):
    """The bundle is not whole, or not for this machine."""


def canonical(description: dict[str, Any]) -> str:
    """The one text of bundle.json: its digest is that of all the rest, so that every changed character shows."""
    rest = {name: value for name, value in description.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
    return json.dumps({**rest, "digest": digest}, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def read_description(folder: Path) -> dict[str, Any]:
    """bundle.json. Raises BundleError where one character of it was changed."""
    path = folder / DESCRIPTION
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BundleError(f"{path} is no plain file. Copy the bundle again, into an empty folder.")
    try:
        text = path.read_bytes()
        description: dict[str, Any] = json.loads(text)
        whole = (
            isinstance(description, dict)
            and canonical(description).encode() == text
            and isinstance(description["files"], dict)
            and f"{description['artifact']}/manifest.json" in description["files"]
            and set(description) >= _WORDS
        )
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.") from None
    except (ValueError, RecursionError, TypeError, KeyError):
        whole = False
    if not whole:
        raise BundleError(f"{path} was changed after the bundle was made. Copy the bundle again.")
    if description.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has the schema version {description.get('schema_version')}; this run.py reads {SCHEMA_VERSION}. Use that bundle's own."
        )
    return description


def check_files(folder: Path, description: dict[str, Any]) -> int:
    """Compare all files with the description; returns their number. Raises BundleError for one that differs, lacks, or is foreign."""
    entries = description["files"]
    found = dict(_files(folder))
    found.pop(DESCRIPTION, None)
    _check_signature_file(found.pop(SIGNATURE, None), found.pop(SIGNATURE_DIGEST, None))
    for what, names in (("is missing", set(entries) - set(found)), ("is not of the bundle", set(found) - set(entries))):
        if names:
            raise BundleError(f"{folder}: {min(names)!r} {what}. Copy the bundle again, into an empty folder.")
    for name, path in sorted(found.items()):
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.") from None
        if digest != entries[name]:
            raise BundleError(f"{path} was changed after the bundle was made. Copy the bundle again.")
    return len(found)


def _check_signature_file(signature: Path | None, digest: Path | None) -> None:
    """A signature that was damaged shows also where nobody asks whose it is."""
    if signature is None and digest is None:
        return
    if signature is None or digest is None:
        missing = SIGNATURE if signature is None else SIGNATURE_DIGEST
        raise BundleError(f"{missing} is missing beside the other file of the signature. Copy the bundle again.")
    if digest.read_bytes() != digest_line(signature.read_bytes()):
        raise BundleError(f"{signature} was changed after the bundle was made. Copy the bundle again.")


def digest_line(signature: bytes) -> bytes:
    """What `sha256sum model.sig` prints."""
    return f"{hashlib.sha256(signature).hexdigest()}  {SIGNATURE}\n".encode()


def check_signature(folder: Path, description: dict[str, Any], trusted: Path) -> str:
    """Whether who is trusted signed these very files, which `check_files` has compared with the description; returns who it was.

    trusted: PEM file with a public key, or with the certificates that the signer's must lead to. The format is OpenSSF Model Signing 1.0
    (a DSSE envelope with an in-toto statement of all digests, in a Sigstore bundle). Raises BundleError.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise BundleError("A signature is checked with cryptography: python -m pip install cryptography") from None
    path = folder / SIGNATURE
    if not path.is_file():
        raise BundleError(f"{folder} is not signed, and a signature is demanded (--signed-by {trusted}).")
    try:
        bundle = json.loads(path.read_bytes())
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        statement = json.loads(payload)
        signed = {
            str(entry["name"]): (entry["algorithm"], entry["digest"]) for entry in statement["predicate"]["resources"]
        }
        is_ours = envelope["payloadType"] == PAYLOAD_TYPE and "model_signing/signature/v1" in statement["predicateType"]
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        is_ours = False
    if not is_ours:
        raise BundleError(f"{path} is no signature of the form of OpenSSF Model Signing 1.0.")
    key, signer = _trusted_key(trusted, material)
    try:
        key.verify(signature, pre_authentication(payload), ec.ECDSA(hash_of(key)))
    except InvalidSignature:
        raise BundleError(
            f"The signature of {folder} is not that of {trusted}: the key is another, or the signature was changed."
        ) from None
    files = {**description["files"], DESCRIPTION: hashlib.sha256((folder / DESCRIPTION).read_bytes()).hexdigest()}
    if signed != {name: ("sha256", digest) for name, digest in files.items()}:
        raise BundleError(f"{folder} was changed after it was signed: its files are not those of {path}.")
    return signer


def pre_authentication(payload: bytes) -> bytes:
    """What of a payload is signed. Source: DSSE 1.0, PAE (https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md)."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def hash_of(key: Any) -> Any:
    """The hash that goes with an elliptic curve. Raises BundleError for keys that the standard does not take."""
    from cryptography.hazmat.primitives import hashes

    fitting: dict[str, Any] = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in fitting:
        raise BundleError(
            f"A signing key has to be of the curve P-256, P-384 or P-521; this one is {curve or 'of another kind'}."
        )
    return fitting[curve]()


def _trusted_key(trusted: Path, material: Any) -> tuple[Any, str]:
    """The key to check with, and whose it is: that of the file, or of a certificate that those of the file vouch for today."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        pem = trusted.read_bytes()
    except OSError as error:
        raise BundleError(f"The key {trusted} cannot be read: {error.strerror or error}.") from None
    try:
        if b"BEGIN CERTIFICATE" not in pem:
            return serialization.load_pem_public_key(pem), f"the key {trusted.name}"
        roots = x509.load_pem_x509_certificates(pem)
    except Exception as error:  # cryptography has many
        raise BundleError(f"{trusted} holds neither a public key nor certificates in PEM form: {error}") from None
    try:
        entries = material["x509CertificateChain"]["certificates"]
        chain = [
            x509.load_der_x509_certificate(base64.b64decode(entry["rawBytes"], validate=True)) for entry in entries
        ]
        signer = chain[0]
    except (ValueError, TypeError, KeyError, IndexError, x509.InvalidVersion):
        raise BundleError(
            f"The bundle was signed with a bare key; {trusted} holds certificates. Give the public key."
        ) from None
    return _vouched_for(signer, chain[1:], roots, trusted), signer.subject.rfc4514_string()


def check_certificate(signer: Any) -> None:
    """Raise BundleError for a certificate that is not valid now, or may not sign."""
    import datetime

    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    try:
        name = signer.subject.rfc4514_string()
        usage: dict[Any, Any] = {extension.oid: extension.value for extension in signer.extensions}
    except Exception as error:  # cryptography has many
        raise BundleError(f"The signer's certificate cannot be read: {error}") from None
    if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
        raise BundleError(
            f"The signer's certificate ({name}) is valid from {signer.not_valid_before_utc:%Y-%m-%d} to "
            f"{signer.not_valid_after_utc:%Y-%m-%d}; here it is {now:%Y-%m-%d}. Sign the bundle again, or set the clock."
        )
    may, purposes = usage.get(x509.KeyUsage.oid), usage.get(x509.ExtendedKeyUsage.oid)
    if (may is None and purposes is None) or (may is not None and not may.digital_signature):
        raise BundleError(f"The certificate {name} may not sign: it lacks the key usage digitalSignature.")
    if purposes is not None and x509.oid.ExtendedKeyUsageOID.CODE_SIGNING not in purposes:
        raise BundleError(f"The certificate {name} is for other purposes: its extended key usage lacks codeSigning.")


def _vouched_for(signer: Any, between: list[Any], roots: list[Any], trusted: Path) -> Any:
    """The public key of a certificate that is valid now, may sign, and leads to a root. Raises BundleError."""
    import datetime

    from cryptography import x509
    from cryptography.x509 import verification

    check_certificate(signer)
    now, name = datetime.datetime.now(datetime.UTC), signer.subject.rfc4514_string()
    any_leaf = verification.ExtensionPolicy.permit_all()
    policy = verification.PolicyBuilder().store(verification.Store(roots)).time(now)
    # The web's policy for authorities, but for their extended key usage, which the web wants to be its own.
    authorities = verification.ExtensionPolicy.webpki_defaults_ca().may_be_present(
        x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, None
    )
    policy = policy.extension_policies(ca_policy=authorities, ee_policy=any_leaf)
    try:
        policy.build_client_verifier().verify(signer, between)
    except verification.VerificationError as error:
        raise BundleError(f"The signer's certificate ({name}) does not lead to one of {trusted}: {error}") from None
    return signer.public_key()


def this_machine() -> tuple[str, str]:
    """System and processor, as devices are told apart."""
    machine = platform.machine().lower()
    return platform.system().lower(), _MACHINES.get(machine, machine)


def check_machine(description: dict[str, Any]) -> str:
    """This machine in words. Raises BundleError where the bundle is for another kind."""
    system, machine = this_machine()
    wanted = (description["system"], description["machine"])
    if (system, machine) != wanted:
        raise BundleError(
            f"This bundle is for {description['target']} ({' '.join(wanted)}); this machine is {system} {machine}. Make one for it: "
            "onnxpress bundle --target …"
        )
    return f"{platform.node() or 'this machine'}, {system} {machine}, {os.cpu_count()} cores, Python {platform.python_version()}"


def check(folder: Path, signed_by: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Compare a bundle's files with its description and, where who signed is given, with what was signed.

    Returns the description, and in words what was found. Nothing of the bundle is run. Raises BundleError.
    """
    description = read_description(folder)
    found = [f"{check_files(folder, description)} files have the digests of {DESCRIPTION}"]
    if signed_by is not None:
        found.append(f"by {check_signature(folder, description, signed_by)}")
    elif (folder / SIGNATURE).is_file():
        found.append("there is a signature; --signed-by FILE checks whose it is")
    return description, found


def open_artifact(folder: Path, description: dict[str, Any], key: str | None = None) -> tuple[Any, Any]:
    """The artifact and the runner of its task, with the bundle's own runtime. Raises BundleError where a package is missing.

    key: where that of an encrypted model is found, as `onnxpress.load` takes it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # which its wheels have switched on
    try:
        import numpy  # noqa: F401
        import onnxruntime  # noqa: F401
        import tokenizers  # noqa: F401  these with their bytecode: what is imported below has none
    except ImportError as error:
        raise _missing(error, description) from None
    sys.dont_write_bytecode = True
    # Bytecode that lies in the bundle was not compared: it is not read.
    sys.pycache_prefix = str(folder / "no-bytecode")
    library = str(folder / "lib")
    if library not in sys.path:
        sys.path.insert(0, library)
    try:
        from onnxpress.artifact import Artifact
        from onnxpress.runtime.loading import load_artifact
        from onnxpress.runtime.providers import CPU

        # Its files have just been compared.
        artifact = Artifact.open(folder / description["artifact"], verify=False, key=key)
        providers = [
            CPU(threads=description["threads"]) if name == "cpu" else name for name in description["providers"]
        ]
        return artifact, load_artifact(artifact, providers=providers)
    except ImportError as error:
        raise _missing(error, description) from None


def _missing(error: ImportError, description: dict[str, Any]) -> BundleError:
    if not isinstance(error, ModuleNotFoundError):
        return BundleError(f"{error.name or 'A package'} is here and cannot be imported: {error}")
    needed = " ".join(f'"{name}"' for name in description["requires"])
    return BundleError(f"{error.name or error} cannot be imported here: python -m pip install {needed}")


class Verdict:
    """Lines of (what, found, good); whether all are good."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, bool]] = []

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return all(good for _, _, good in self.lines)

    def add(self, what: str, found: str, good: bool = True) -> None:
        """One line more."""
        self.lines.append((what, found, good))


def self_test(folder: Path, *, signed_by: Path | None = None, key: str | None = None) -> Verdict:
    """Check a bundle, from its files to its speed; the first thing that fails ends it."""
    verdict = Verdict()
    try:
        description, found = check(folder, signed_by)
        verdict.add(
            "bundle",
            f"{description['name']} for {description['target']}: {description['task']}, {description['precision']}",
        )
        for what, words in zip(("files", "signature"), found, strict=False):
            verdict.add(what, words)
        verdict.add("machine", check_machine(description))
        artifact, runner = open_artifact(folder, description, key)
        _check_answers(verdict, artifact, runner.session)
        _check_speed(verdict, artifact, runner.session, description["budget"])
    except BundleError as error:
        verdict.add("failed", str(error), False)
    except Exception as error:  # an OnnxpressError of the runtime, or what nobody thought of: a verdict in any case
        verdict.add("failed", f"{error}" if _is_ours(error) else f"{type(error).__name__}: {error}", False)
    return verdict


def _check_answers(verdict: Verdict, artifact: Any, session: Any) -> None:
    import onnxruntime

    from onnxpress.runtime.loading import verify_golden

    verdict.add("runtime", f"ONNX Runtime {onnxruntime.__version__}, {', '.join(session.providers)}")
    for row in verify_golden(artifact, session):
        difference = f"difference {row.difference:.3g} (allowed {row.tolerance:.3g})"
        verdict.add(f"golden {row.case}", f"{row.output}: {difference}")


def _check_speed(verdict: Verdict, artifact: Any, session: Any, budget: dict[str, float]) -> None:
    from onnxpress.runtime.loading import golden_cases

    for case, arrays in sorted(golden_cases(artifact).items()):
        took = _milliseconds(partial(session.run, arrays["input"]))
        shape = " x ".join(str(size) for size in next(iter(arrays["input"].values())).shape)
        _compare(verdict, f"latency {case}", took, "ms", budget.get("latency_ms"), f", inputs of {shape}")
    peak = _peak_megabytes()
    if peak is not None:
        _compare(verdict, "memory", peak, "MB", budget.get("memory_mb"), " at most, Python and all")
    elif "memory_mb" in budget:
        verdict.add("memory", "this system does not say how much was used", False)


def _compare(verdict: Verdict, what: str, found: float, unit: str, allowed: float | None, more: str) -> None:
    limit = "no budget" if allowed is None else f"allowed {allowed:g}"
    verdict.add(
        what,
        f"{found:.3g} {unit}{more} ({limit})" if found < 1 else f"{found:.1f} {unit}{more} ({limit})",
        allowed is None or found <= allowed,
    )


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call, after one that does not count."""
    call()
    durations: list[float] = []
    while not durations or (sum(durations) < _TIMED_SECONDS and len(durations) < _TIMED_CALLS):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return 1000 * statistics.median(durations)


def _peak_megabytes() -> float | None:
    # Of Linux, where the other figure may be that of the process that started this one.
    status = Path("/proc/self/status")
    if status.is_file() and "VmHWM:" in (text := status.read_text()):
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files. Raises BundleError for links, devices, and folders that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise BundleError(
            f"{error.filename} cannot be read: {error.strerror}. Copy the bundle again, into an empty folder."
        )

    for root, folders, names in os.walk(folder, onerror=unreadable):
        for name in [*names, *(each for each in folders if (Path(root) / each).is_symlink())]:
            path = Path(root) / name
            if path.is_symlink() or not path.is_file():
                raise BundleError(
                    f"{path} is no plain file, and not of the bundle. Copy the bundle again, into an empty folder."
                )
            yield path.relative_to(folder).as_posix(), path


def _is_ours(error: Exception) -> bool:
    return any(kind.__name__ == "OnnxpressError" for kind in type(error).__mro__)


def load(folder: Path | str | None = None, *, signed_by: Path | str | None = None, key: str | None = None) -> Any:
    """The runner of a bundle's task, as `onnxpress.load` gives it, after all checks. folder: by default that of this file.

    Raises BundleError, and the runtime's own errors.
    """
    place = Path(__file__).resolve().parent if folder is None else Path(folder)
    description, _ = check(place, None if signed_by is None else Path(signed_by))
    check_machine(description)
    return open_artifact(place, description, key)[1]


def _answers(runner: Any, texts: list[str], pairs: list[str]) -> Iterator[Any]:
    if pairs and len(pairs) != len(texts):
        raise BundleError(f"{len(texts)} texts and {len(pairs)} --pair were given; each text needs one pair.")
    from onnxpress.runtime.generator import Generator
    from onnxpress.runtime.module_runner import ModuleRunner

    if isinstance(runner, ModuleRunner):
        raise BundleError("This model takes arrays, not text: use it from Python, as README.md says.")
    if isinstance(runner, Generator):
        if pairs:
            raise BundleError("This model goes on with texts, which have no pairs: leave --pair out.")
        yield from (generation.text for generation in runner.generate(texts))
    else:
        yield from runner.answer_texts(list(zip(texts, pairs, strict=True)) if pairs else texts)


def _chat(runner: Any) -> int:
    from onnxpress.runtime.generator import Generator

    if not isinstance(runner, Generator):
        raise BundleError("This model generates no text, so it cannot chat.")
    from onnxpress.conversation import chat

    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which stops an answer, and not the program
    try:
        return chat(runner, system=None)
    except BrokenPipeError:  # nobody reads the answers any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--pair", action="append", default=[], help="the second text of each; a question's context")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--check", nargs="?", type=Path, const=Path(__file__).resolve().parent, metavar="FOLDER")
    parser.add_argument("--signed-by", type=Path, metavar="FILE", help="PEM: the signer's public key, or certificates")
    parser.add_argument("--key", metavar="SOURCE", help="of an encrypted model: file:PATH, env:NAME or command:LINE")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON")
    options = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # Windows has others
    if (bool(options.texts), options.chat, options.self_test, bool(options.check)).count(True) != 1:
        parser.error("give a text, --chat, --self-test or --check")
    if options.pair and not options.texts:
        parser.error("--pair goes with texts")
    if options.json and not options.self_test:
        parser.error("--json goes with --self-test; answers are JSON as they are")
    code = 0
    try:
        if options.chat:
            return _chat(load(signed_by=options.signed_by, key=options.key))
        if options.check:
            lines = iter(check(options.check, options.signed_by)[1])
        elif options.self_test:
            verdict = self_test(folder, signed_by=options.signed_by, key=options.key)
            if _interrupted:  # while a package was loaded, which makes an error of its own of it
                raise KeyboardInterrupt
            lines, code = _page(verdict, as_json=options.json), 0 if verdict.good else 1
        else:
            answers = _answers(load(signed_by=options.signed_by, key=options.key), options.texts, options.pair)
            lines = (json.dumps(answer, ensure_ascii=False) for answer in answers)
        for line in lines:
            if (failed := _print(line)) is not None:  # what a bundle is found to be does not hang on who reads it
                code = 2 if options.texts and not isinstance(failed, BrokenPipeError) else code
                break
    except KeyboardInterrupt:
        _say("Interrupted.")
        return 130
    except Exception as error:
        if not _interrupted and not isinstance(error, BundleError) and not _is_ours(error):
            raise
        _say("Interrupted." if _interrupted else error)
        return 130 if _interrupted else 2
    return code


def _interrupt(*_: Any) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _page(verdict: Verdict, *, as_json: bool) -> Iterator[str]:
    """The lines of a verdict."""
    if as_json:
        lines = [{"what": what, "found": found, "good": good} for what, found, good in verdict.lines]
        yield json.dumps({"good": verdict.good, "lines": lines})
        return
    for what, found, good in verdict.lines:
        yield f"{'ok  ' if good else 'BAD '} {what:<16} {found}"
    yield f"verdict: {'good' if verdict.good else 'NOT GOOD'}"


def _say(text: object) -> None:
    """Whoever listened may be gone, and the exit code says it too."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(text, file=sys.stderr)


def _print(line: str) -> OSError | None:
    """Print a line; returns why it could not be."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is held still goes nowhere
        if not isinstance(error, BrokenPipeError):
            _say(f"Nothing more can be printed: {error.strerror}.")
        return error
    return None


if __name__ == "__main__":
    sys.exit(main())
