"""What a bundle for browsers holds beside the artifact: a page that checks it and answers, and the libraries that it runs.

The libraries come from npm, whose own configuration says from where; they are kept in a cache, and compared with their
digests at each use. Nothing on the page is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxpress import __version__
from onnxpress.artifact import Artifact
from onnxpress.errors import InputError, MissingExtraError, OutputError, RecipeError
from onnxpress.runtime.loading import release_numbers
from onnxpress.runtime.tokenization import Tokenizer

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = ("index.html", "style.css", "page.js", "bundle.js", "golden.js", "text.js")
_ANSWERED = ("feature-extraction", "text-classification")  # tasks whose answers the page shows


@dataclass(frozen=True, kw_only=True)
class Package:
    """An npm package. license: of SPDX. integrity: as `npm view NAME@VERSION dist.integrity` says. members: path in the bundle by path in it."""

    name: str
    version: str
    license: str
    integrity: str
    members: Mapping[str, str]


RUNTIME = Package(
    name="onnxruntime-web",
    version="1.30.0",
    license="MIT",
    integrity="sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    members={  # the build for WebAssembly alone; .js, since not every web server knows what .mjs is
        "dist/ort.wasm.bundle.min.mjs": "vendor/onnxruntime-web.js",
        "dist/ort-wasm-simd-threaded.wasm": "vendor/ort-wasm-simd-threaded.wasm",
    },
)
TOKENIZERS = Package(
    name="@huggingface/tokenizers",
    version="0.2.0",
    license="Apache-2.0",
    integrity="sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    members={"dist/tokenizers.min.mjs": "vendor/tokenizers.js", "LICENSE": "vendor/tokenizers-LICENSE"},
)
PACKAGES = (RUNTIME, TOKENIZERS)

# What tokenizers are known to disagree about: the page compares its own with Python's by these.
_TEXTS = (
    "The cat sat on the mat.",
    "  spaces \t tabs\r\nand lines \u00a0 \u3000 ",
    "Crème brûlée à l'œuvre — naïve façade, cafe\u0301",
    "Ångström ﬁne ①②③ ½ Ⅷ ．，！ Straße ẞ İstanbul",
    "ΟΔΥΣΣΕΥΣ και Πηνελόπη",
    "Здравствуй, мир! שלום مرحبا بالعالم",
    "中文字符 日本語テキスト、한국어 𠀀𠀁",
    "हिन्दी தமிழ் ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 👍🏽 ❤️ 𝒳𝓎𝓏",
    "zero\u200bwidth soft\u00adhyphen \ufeffmark \ufffd control\x07\x7f",
    "don't can't we'll I'M",
    "3.14159 1,000,000 $5 100% a@b.co https://example.org/x?y=z#w",
    "~`!@#$%^&*()_+-={}[]|\\:\";'<>?,./",
    "[MASK]word [SEP] <s> </s> <unk> [PAD] <mask>",
    "a" * 101,
    "ǅ q\u0307\u0303",
)


def web_files(artifact: Artifact) -> dict[str, Path | bytes]:
    """The files by their path in the bundle, whose artifact lies in model/browser.

    Raises RecipeError for an artifact that no browser runs, MissingExtraError where the libraries cannot be had, OutputError
    where they cannot be kept.
    """
    manifest = artifact.manifest
    if manifest.task == "text-generation":
        raise RecipeError(
            f"{manifest.name} is a language model (text-generation), which bundles for browsers do not run; "
            "bundles for other devices do."
        )
    if release_numbers(manifest.minimum_onnxruntime) > release_numbers(RUNTIME.version):
        raise RecipeError(
            f"{manifest.name} needs ONNX Runtime {manifest.minimum_onnxruntime} or newer; bundles for browsers hold "
            f"{RUNTIME.version}. Make the bundle for another device."
        )
    files: dict[str, Path | bytes] = {name: _PAGE / name for name in _PAGE_FILES}
    for package in PACKAGES:
        files |= package_files(package)
    files |= _runtime_licenses()
    files["README.md"] = _readme(artifact).encode()
    if manifest.task in _ANSWERED:
        files["texts.json"] = _tokenized(artifact)
    return files


def package_files(package: Package) -> dict[str, bytes]:
    """What the page needs of a package, by path in the bundle. Raises MissingExtraError, OutputError."""
    with tarfile.open(fileobj=io.BytesIO(_tarball(package)), mode="r:gz") as archive:
        found = {place: archive.extractfile(f"package/{member}") for member, place in package.members.items()}
        return {place: file.read() for place, file in found.items() if file is not None}


def _tarball(package: Package) -> bytes:
    """The package as npm publishes it, from the cache, or fetched into it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxpress" / "npm"
    place = cache / f"{package.name.strip('@').replace('/', '-')}-{package.version}.tgz"  # as `npm pack` names it
    try:
        if place.is_file() and _fits(content := place.read_bytes(), package):
            return content
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=cache) as scratch:
            _fetch(package, scratch)
            fetched = Path(scratch) / place.name
            content = fetched.read_bytes() if fetched.is_file() else b""
            if not _fits(content, package):
                raise MissingExtraError(
                    f"npm gave another {package.name} {package.version} than the one that onnxpress knows: its digest is not "
                    f"{package.integrity}. Ask where npm is told to fetch from: npm config get registry."
                )
            fetched.replace(place)
    except OSError as error:
        raise OutputError(
            f"{cache} cannot keep {package.name}: {error.strerror or error}. Set XDG_CACHE_HOME to a folder that can be written."
        ) from None
    return content


def _fetch(package: Package, folder: str) -> None:
    npm = shutil.which("npm")
    what = f"A bundle for browsers holds {package.name} {package.version}, which npm fetches once"
    if npm is None:
        raise MissingExtraError(f"{what}; npm is not on the PATH: install it (Debian: apt-get install npm).")
    wanted = f"{package.name}@{package.version}"
    command = [npm, "pack", wanted, "--pack-destination", folder, "--ignore-scripts"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        said = re.findall(r"^npm (?:error|ERR!) (.+)$", done.stderr, re.MULTILINE)[:3] or [
            f"exit code {done.returncode}"
        ]
        raise MissingExtraError(f"{what}, and could not: {'; '.join(said)}. Try it yourself: npm pack {wanted}")


def _fits(content: bytes, package: Package) -> bool:
    """Source of the form: Subresource Integrity, W3C."""
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode() == package.integrity


def _runtime_licenses() -> dict[str, Path | bytes]:
    """onnxruntime-web is published without the text of its license; the wheel, made of the same sources, has it."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise MissingExtraError("onnxruntime is not installed: pip install 'onnxpress[cpu]'.")
    folder = Path(found.origin).parent
    return {f"vendor/onnxruntime-{name}": folder / name for name in ("LICENSE", "ThirdPartyNotices.txt")}


def _tokenized(artifact: Artifact) -> bytes:
    """Texts with the tokens that Python's tokenizer gives them."""
    options = artifact.manifest.options
    tokenizer = Tokenizer.from_folder(
        artifact.path, max_length=options["max_length"], pad_token_id=options["pad_token_id"]
    )
    samples = []
    for text in (*_TEXTS, "word, " * options["max_length"]):
        try:
            encoding = tokenizer.encode([text])[0]
        except InputError:  # a vocabulary that has no token for it
            continue
        samples.append({"text": text, "ids": encoding.ids, "type_ids": encoding.type_ids})
    return (json.dumps(samples, sort_keys=True) + "\n").encode()


def _readme(artifact: Artifact) -> str:
    manifest = artifact.manifest
    return f"""# {manifest.name} in the browser

{manifest.task}, {manifest.precision}; made with onnxpress {__version__}.

Serve this folder with any web server, over https, or on your own machine:

    python3 -m http.server 8000 --bind 127.0.0.1      # then open http://localhost:8000

The page compares every file with bundle.json, runs the golden inputs, and says whether the model answers as it did when it
was built. It loads nothing from elsewhere. With the headers `Cross-Origin-Opener-Policy: same-origin` and
`Cross-Origin-Embedder-Policy: require-corp` it runs on several threads.

It contains {" and ".join(f"{package.name} {package.version} ({package.license})" for package in PACKAGES)};
their licences are in vendor/.
"""
