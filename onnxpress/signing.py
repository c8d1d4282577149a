"""Signs a bundle's digests in the form of OpenSSF Model Signing 1.0, which `model_signing verify` and run.py check.

Source of the form: https://github.com/sigstore/model-transparency. The signature is RFC 6979's, so the same files and key give the same
bytes. It is written here and not by the package model-signing, since that signs folders, and not the same way twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxpress.errors import MissingExtraError, RecipeError
from onnxpress.on_device import (
    PAYLOAD_TYPE,
    SIGNATURE,
    SIGNATURE_DIGEST,
    BundleError,
    check_certificate,
    hash_of,
    pre_authentication,
)

PASSWORD = "ONNXPRESS_SIGNING_PASSWORD"  # the variable's name


class Signer:
    """A private key in PEM form; certificate: the signer's, in PEM form, and behind it those between it and a root.

    A key with a password takes it from the variable ONNXPRESS_SIGNING_PASSWORD. Raises RecipeError for what cannot sign.
    """

    def __init__(self, key: Path, certificate: Path | None = None) -> None:
        try:
            from cryptography import x509
            from cryptography.hazmat.primitives import serialization
        except ImportError:
            raise MissingExtraError("Signing needs the package cryptography: pip install 'onnxpress[secure]'") from None
        content, chain = _read(key), b"" if certificate is None else _read(certificate)
        password = os.environ.get(PASSWORD)
        try:
            self._key: Any = serialization.load_pem_private_key(content, password.encode() if password else None)
            self._hash = hash_of(self._key)
        except TypeError:
            what = "has no password, and one was given" if password else "is protected by a password"
            raise RecipeError(f"The signing key {key} {what}: see the variable {PASSWORD}.") from None
        except BundleError as error:
            raise RecipeError(f"{key}: {error} openssl ecparam -name prime256v1 -genkey -noout -out key.pem") from None
        except Exception as error:  # cryptography has many
            what = (
                "cannot be opened with the password given"
                if password
                else "cannot be read as a private key in PEM form"
            )
            raise RecipeError(f"{key} {what}: {error}") from None
        try:
            self._chain = x509.load_pem_x509_certificates(chain) if certificate else []
            for one in self._chain[:1]:
                check_certificate(one)
        except BundleError as error:
            raise RecipeError(str(error)) from None
        except Exception as error:
            raise RecipeError(f"{certificate} cannot be read as certificates in PEM form: {error}") from None
        if self._chain and self._chain[0].public_key() != self._key.public_key():
            raise RecipeError(f"The first certificate of {certificate} is not that of the key {key}.")

    def sign(self, name: str, digests: Mapping[str, str]) -> bytes:
        """The signature of files, by path, with their SHA-256: a Sigstore bundle."""
        resources = [{"name": path, "algorithm": "sha256", "digest": digests[path]} for path in sorted(digests)]
        root = hashlib.sha256(b"".join(bytes.fromhex(digests[path]) for path in sorted(digests))).hexdigest()
        serialization = {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE, SIGNATURE_DIGEST],
        }
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": "https://model_signing/signature/v1.0",
            "predicate": {"serialization": serialization, "resources": resources},
        }
        payload = json.dumps(statement, sort_keys=True).encode()
        bundle = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {**self._material(), "tlogEntries": []},
            "dsseEnvelope": {
                "payload": _base64(payload),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": _base64(self._signature(pre_authentication(payload))), "keyid": ""}],
            },
        }
        return (json.dumps(bundle, indent=1, sort_keys=True) + "\n").encode()

    def _signature(self, content: bytes) -> bytes:
        from cryptography.hazmat.primitives.asymmetric import ec

        return bytes(self._key.sign(content, ec.ECDSA(self._hash, deterministic_signing=True)))

    def _material(self) -> dict[str, Any]:
        from cryptography.hazmat.primitives import serialization

        if self._chain:
            raw = [_base64(one.public_bytes(serialization.Encoding.DER)) for one in self._chain]
            return {"x509CertificateChain": {"certificates": [{"rawBytes": one} for one in raw]}}
        pem = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return {"publicKey": {"hint": hashlib.sha256(pem).hexdigest()}}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}.") from None


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
