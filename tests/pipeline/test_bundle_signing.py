"""A signature is checked before anything is loaded, is what OpenSSF's tool checks, and is refused when in any way wrong."""

from __future__ import annotations

import base64
import datetime
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tiny_artifacts import HERE, save_artifact

from onnxpress.bundle import bundle
from onnxpress.bundle_archive import unpacked
from onnxpress.cli import main
from onnxpress.errors import ArtifactError, RecipeError
from onnxpress.on_device import BundleError, canonical, check, digest_line
from onnxpress.on_device_update import UpdateError, back, update

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def save_key(path: Path, curve: ec.EllipticCurve, password: bytes | None = None) -> Any:
    """A private key at path, its public key beside it as .pub."""
    key = ec.generate_private_key(curve)
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return key


def certificate(
    name: str, key: Any, issuer: str, issuer_key: Any, *, signs: bool = True, **options: Any
) -> x509.Certificate:
    """options: authority (may issue others), start and end in days from now, purpose (its extended key usage)."""
    authority = options.get("authority", False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + options.get("start", -2) * DAY)
        .not_valid_after(NOW + options.get("end", 2) * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    usage["key_cert_sign" if authority else "digital_signature"] = signs
    usage["key_agreement"] = not signs
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    if authority:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    purpose = options.get("purpose", None if authority or not signs else ExtendedKeyUsageOID.CODE_SIGNING)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def save_pem(path: Path, *certificates: x509.Certificate) -> Path:
    path.write_bytes(b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates))
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    root, between = (save_key(folder / f"{name}.pem", ec.SECP256R1()) for name in ("root", "between"))
    signer = save_key(folder / "signer.pem", ec.SECP384R1())
    save_key(folder / "other.pem", ec.SECP256R1())
    save_pem(folder / "roots.pem", certificate("root", root, "root", root, authority=True))
    save_pem(folder / "other-roots.pem", certificate("root", between, "root", between, authority=True))
    middle = certificate("between", between, "root", root, authority=True)
    chains: dict[str, dict[str, Any]] = {
        "good": {},
        "expired": {"start": -20, "end": -1},
        "early": {"start": 1},
        "unfit": {"signs": False},
        "web": {"purpose": ExtendedKeyUsageOID.SERVER_AUTH},
    }
    for name, options in chains.items():
        save_pem(folder / f"{name}.chain", certificate("the signer", signer, "between", between, **options), middle)
    coding = certificate("between", between, "root", root, authority=True, purpose=ExtendedKeyUsageOID.CODE_SIGNING)
    save_pem(folder / "issuers.chain", certificate("the signer", signer, "between", between), coding)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_artifact(tmp_path_factory.mktemp("signed") / "tiny").path


@pytest.fixture
def signed(artifact: Path, keys: Path, tmp_path: Path) -> Callable[..., Path]:
    """The folder of a bundle, signed with a key and perhaps a chain."""

    def make(key: str = "signer", chain: str | None = None) -> Path:
        certificate = None if chain is None else keys / f"{chain}.chain"
        place = bundle(
            artifact, target=HERE, sign=keys / f"{key}.pem", certificate=certificate, out=tmp_path / "it.tar"
        )
        with tarfile.open(place) as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / f"tiny-{HERE}"

    return make


def test_a_key(signed: Callable[..., Path], keys: Path) -> None:
    folder = signed()
    assert check(folder, keys / "signer.pub")[1][1] == "by the key signer.pub"
    assert "there is a signature; --signed-by FILE" in check(folder)[1][1]
    with pytest.raises(BundleError, match=r"is not that of .*other\.pub"):
        check(folder, keys / "other.pub")
    with pytest.raises(BundleError, match="signed with a bare key"):
        check(folder, keys / "roots.pem")


def test_certificates(signed: Callable[..., Path], keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = signed(chain="good")
    assert check(folder, keys / "roots.pem")[1][1] == "by CN=the signer"
    assert check(folder, keys / "signer.pub")[1][1] == "by the key signer.pub", "who has the key may go by it"
    with pytest.raises(BundleError, match=r"does not lead to one of .*other-roots\.pem"):
        check(folder, keys / "other-roots.pem")
    for chain, said in (
        ("expired", "is valid from .*Sign the bundle again, or set the clock"),
        ("early", "is valid from"),
        ("unfit", "may not sign: it lacks the key usage digitalSignature"),
        ("web", "is for other purposes: its extended key usage lacks codeSigning"),
    ):
        with pytest.raises(RecipeError, match=said):
            signed(chain=chain)
        with monkeypatch.context() as careless:  # somebody else's tool signed
            careless.setattr("onnxpress.signing.check_certificate", lambda _: None)
            folder = signed(chain=chain)
        with pytest.raises(BundleError, match=said):
            check(folder, keys / "roots.pem")
    assert check(signed(chain="issuers"), keys / "roots.pem"), "authorities may be for code signing alone"


@pytest.mark.parametrize("chain", [None, "good"])
def test_it_is_what_the_standards_own_tool_checks(signed: Callable[..., Path], keys: Path, chain: str | None) -> None:
    folder = signed(chain=chain)
    mode = (
        ["key", "--public_key", keys / "signer.pub"]
        if chain is None
        else ["certificate", "--certificate_chain", keys / "roots.pem"]
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "model_signing",
        "verify",
        *mode,
        "--signature",
        folder / "model.sig",
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr
    (folder / "README.md").write_text("changed")
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_what_the_standards_own_tool_signs_is_checked_here(signed: Callable[..., Path], keys: Path) -> None:
    folder = signed()
    for name in ("model.sig", "model.sig.sha256"):
        (folder / name).unlink()
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "model_signing", "sign", "key"),
            *("--private_key", keys / "other.pem", "--signature", folder / "model.sig", folder),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "model.sig.sha256").write_bytes(digest_line((folder / "model.sig").read_bytes()))
    assert check(folder, keys / "other.pub")[1][1] == "by the key other.pub"


def test_the_same_bytes_each_time(artifact: Path, keys: Path, tmp_path: Path) -> None:
    first, second = (bundle(artifact, target=HERE, sign=keys / "signer.pem", out=tmp_path / f"{n}.tar") for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()


def test_what_was_changed_and_described_anew_is_not_what_was_signed(signed: Callable[..., Path], keys: Path) -> None:
    folder = signed()
    (folder / "README.md").write_text("changed")
    description = json.loads((folder / "bundle.json").read_text())
    description["files"]["README.md"] = __import__("hashlib").sha256(b"changed").hexdigest()
    (folder / "bundle.json").write_text(canonical(description))
    assert check(folder)[1]
    with pytest.raises(BundleError, match="was changed after it was signed"):
        check(folder, keys / "signer.pub")


def signed_bytes(signature: bytes) -> tuple[bytes, bytes]:
    """Payload and signature as bytes: base64 can spell the same bytes in more than one way (the last character's
    spare bits), and the length of a signature, so whether it has any, differs from one to the next.
    """
    envelope = json.loads(signature)["dsseEnvelope"]
    return base64.b64decode(envelope["payload"]), base64.b64decode(envelope["signatures"][0]["sig"])


def test_a_flipped_bit_of_the_signature_is_seen_by_all_and_never_accepted(
    signed: Callable[..., Path], keys: Path
) -> None:
    folder = signed(chain="good")
    whole = (folder / "model.sig").read_bytes()
    draw = random.Random(3)
    accepted = 0
    for _ in range(300):
        place = draw.randrange(len(whole))
        broken = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        (folder / "model.sig").write_bytes(broken)
        with pytest.raises(BundleError, match=r"model\.sig was changed"):
            check(folder)
        (folder / "model.sig.sha256").write_bytes(digest_line(broken))
        try:
            check(folder, keys / "roots.pem")
        except BundleError:
            continue
        accepted += 1
        assert signed_bytes(whole) == signed_bytes(broken)
        (folder / "model.sig.sha256").write_bytes(digest_line(whole))
    assert accepted < 30, "white space, names that nobody reads, spare bits of base64"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"dsseEnvelope": 1, "verificationMaterial": 2}']
)
def test_what_is_no_signature(signed: Callable[..., Path], keys: Path, content: bytes) -> None:
    folder = signed()
    (folder / "model.sig").write_bytes(content)
    (folder / "model.sig.sha256").write_bytes(digest_line(content))
    with pytest.raises(BundleError, match="is no signature of the form"):
        check(folder, keys / "signer.pub")


def test_a_signature_of_another_payload_is_not_taken(signed: Callable[..., Path], keys: Path) -> None:
    folder = signed()
    bundle_of_signature = json.loads((folder / "model.sig").read_text())
    payload = json.loads(base64.b64decode(bundle_of_signature["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"].pop()
    bundle_of_signature["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (folder / "model.sig").write_text(json.dumps(bundle_of_signature))
    (folder / "model.sig.sha256").write_bytes(digest_line((folder / "model.sig").read_bytes()))
    with pytest.raises(BundleError, match="is not that of"):
        check(folder, keys / "signer.pub")


def test_a_signature_that_is_demanded(signed: Callable[..., Path], keys: Path, tmp_path: Path) -> None:
    folder = signed()
    for key, code in (
        (keys / "signer.pub", 0),
        (keys / "other.pub", 1),
        (tmp_path / "none", 1),
        (keys / "good.chain", 1),
    ):
        command = [sys.executable, folder / "run.py", "--self-test", "--signed-by", key]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stdout
        assert ("runtime" in done.stdout) == (code == 0), "nothing is loaded before the signature is good"
        assert "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, folder / "run.py", "the cat", "--signed-by", keys / "other.pub"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not that of" in done.stderr
    (folder / "model.sig").unlink()
    with pytest.raises(BundleError, match=r"model\.sig is missing"):
        check(folder)
    (folder / "model.sig.sha256").unlink()
    with pytest.raises(BundleError, match="is not signed, and a signature is demanded"):
        check(folder, keys / "signer.pub")


def test_verify_and_python(artifact: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = bundle(artifact, target=HERE, sign=keys / "signer.pem", out=tmp_path / "it.tar")
    assert main(["verify", str(place), "--signed-by", str(keys / "signer.pub")]) == 0
    assert "by the key signer.pub" in capsys.readouterr().out
    assert main(["verify", str(place), "--signed-by", str(keys / "other.pub")]) == 2
    assert "is not that of" in capsys.readouterr().err
    assert main(["verify", str(artifact), "--signed-by", str(keys / "other.pub")]) == 2
    assert "is no bundle, and bundles alone are signed" in capsys.readouterr().err
    with unpacked(place, keys / "signer.pub") as (folder, _, _):
        shutil.copytree(folder, tmp_path / "there")
    readme = (tmp_path / "there" / "README.md").read_text()
    assert "--signed-by KEY.pem" in readme
    example = readme.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(tmp_path / "there"))
    example = example.replace("KEY.pem", str(keys / "signer.pub"))
    done = subprocess.run([sys.executable, "-B", "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_keys_that_cannot_sign(artifact: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sign(key: Path, chain: Path | None = None) -> Path:
        return bundle(artifact, target=HERE, sign=key, certificate=chain, out=tmp_path / "it.tar")

    (tmp_path / "text").write_text("no key")
    wrong = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "rsa").write_bytes(wrong.private_bytes(*form))
    save_key(tmp_path / "k1.pem", ec.SECP256K1())
    save_key(tmp_path / "secret.pem", ec.SECP256R1(), password=b"a word")
    for key, chain, said in (
        (tmp_path / "nothing", None, "cannot be read: No such file"),
        (tmp_path / "text", None, "cannot be read as a private key in PEM form"),
        (tmp_path / "rsa", None, "P-256, P-384 or P-521; this one is of another kind"),
        (tmp_path / "k1.pem", None, "this one is secp256k1"),
        (tmp_path / "secret.pem", None, "is protected by a password: see the variable ONNXPRESS_SIGNING_PASSWORD"),
        (keys / "other.pem", keys / "good.chain", "is not that of the key"),
        (keys / "signer.pem", tmp_path / "text", "cannot be read as certificates in PEM form"),
    ):
        with pytest.raises(RecipeError, match=said):
            sign(key, chain)
    monkeypatch.setenv("ONNXPRESS_SIGNING_PASSWORD", "a word")
    sign(tmp_path / "secret.pem")
    with pytest.raises(RecipeError, match="has no password, and one was given"):
        sign(keys / "signer.pem")
    monkeypatch.setenv("ONNXPRESS_SIGNING_PASSWORD", "another")
    with pytest.raises(RecipeError, match="cannot be opened with the password given"):
        sign(tmp_path / "secret.pem")
    with pytest.raises(RecipeError, match="needs its key to sign with"):
        bundle(artifact, target=HERE, certificate=keys / "good.chain")
    with (
        pytest.raises(ArtifactError, match="is not signed"),
        unpacked(bundle(artifact, target=HERE), keys / "signer.pub"),
    ):
        pass


def test_an_archive_that_was_packed_again_is_not_verified(artifact: Path, keys: Path, tmp_path: Path) -> None:
    place = bundle(artifact, target=HERE, sign=keys / "signer.pem", out=tmp_path / "it.tar")
    whole = place.read_bytes()
    with tarfile.open(place) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    name = f"tiny-{HERE}"
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w") as archive:
        archive.addfile(entry := tarfile.TarInfo(f"{name}/run.py"), io.BytesIO())
    by_hand = io.BytesIO()
    with tarfile.open(fileobj=by_hand, mode="w") as archive:
        archive.add(tmp_path / "there" / name, name)
    end = whole.rstrip(b"\0")
    tricks = (
        whole + evil.getvalue(),  # another archive behind it
        end + bytes(-len(end) % 512) + b"garbage" + bytes(505) + evil.getvalue(),  # which other programs skip over
        by_hand.getvalue(),
        whole + b"more",
    )
    for number, content in enumerate(tricks):
        (tmp_path / "trick.tar").write_bytes(content)
        said = r"was packed again, or something was added|is no bundle"
        with pytest.raises(ArtifactError, match=said), unpacked(tmp_path / "trick.tar", keys / "signer.pub"):
            pytest.fail(f"{number} was accepted")
    assert entry.size == 0
    with unpacked(place, keys / "signer.pub"):
        pass
    with unpacked(tmp_path / "there" / name, keys / "signer.pub"):
        pass


@pytest.mark.parametrize("path", ["../outside", "/outside", "it/../../outside", "it\\outside"])
def test_nothing_is_unpacked_elsewhere(path: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    with tarfile.open(tmp_path / "inside" / "it.tar", "w") as archive:
        entry = tarfile.TarInfo(path)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    with (
        pytest.raises(ArtifactError, match="is no bundle that can be read: it holds"),
        unpacked(tmp_path / "inside" / "it.tar"),
    ):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["inside"]


def test_an_update_is_checked_by_the_bundle_that_is_there(artifact: Path, keys: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"

    def put(place: Path, **options: str) -> Path:
        with place.open("rb") as file:
            return update(there, file, **options)

    unsigned = bundle(artifact, target=HERE, out=tmp_path / "unsigned.tar")
    signed_one = bundle(artifact, target=HERE, sign=keys / "signer.pem", latency_ms=1e6, out=tmp_path / "signed.tar")
    with pytest.raises(UpdateError, match=r"No run\.py is here that could check"):
        put(signed_one, signed_by=str(keys / "signer.pub"))
    put(unsigned)
    first = (there / "current").resolve()
    for place, key, said in (
        (unsigned, "signer", "is not signed, and a signature is demanded"),
        (signed_one, "other", "is not that of"),
    ):
        with pytest.raises(UpdateError, match=said):
            put(place, signed_by=str(keys / f"{key}.pub"))
        assert (there / "current").resolve() == first
        assert len(list((there / "releases").iterdir())) == 1
    second = put(signed_one, signed_by=str(keys / "signer.pub"))
    with pytest.raises(UpdateError, match="is not signed"):
        back(there, signed_by=str(keys / "signer.pub"))
    assert (there / "current").resolve() == second.resolve()
    assert back(there) == first
