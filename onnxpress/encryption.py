"""Encrypts the files of an artifact at rest; they are decrypted in memory alone.

NAME.encrypted is a header, 32 bytes of salt, and the content in segments of 1 MiB, each with a tag of 16 bytes. A file's own key is
HKDF-SHA256 (RFC 5869) of the key, the salt and the file's name; a segment is sealed with ChaCha20-Poly1305 (RFC 8439), its nonce the
segment's number and whether it is the last, so that segments cannot be changed, moved, left out or cut off. Source of the construction:
STREAM (Hoang, Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption, CRYPTO 2015), as the file format age uses it.
The salt comes from the content and the key: the same content gives the same bytes, and shows as the same to who has both.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from onnxpress.errors import ArtifactError, MissingExtraError, UsageError

SUFFIX = ".encrypted"
KEY_BYTES = 32
_MAGIC = b"onnxpress encrypted 1\n"
_SALT, _TAG, _SEGMENT = 32, 16, 2**20


def read_key(source: str | bytes) -> bytes:
    """The 32 bytes of a key: themselves, or from "file:PATH", "env:NAME" or "command:LINE", which give 64 hexadecimal digits.

    Raises UsageError, which never shows the key.
    """
    if isinstance(source, bytes):
        content, where = source.hex(), "The key"
    else:
        kind, _, rest = source.partition(":")
        if kind not in _SOURCES or not rest:
            raise UsageError("A key is given as file:PATH, env:NAME or command:LINE, never itself.")
        content, where = _SOURCES[kind](rest), f"What {kind}: gave as key"
    try:
        key = bytes.fromhex(content.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UsageError(
            f"{where} is not {2 * KEY_BYTES} hexadecimal digits ({KEY_BYTES} bytes): openssl rand -hex {KEY_BYTES}"
        )
    return key


def encrypt(content: IO[bytes], place: IO[bytes], *, name: str, key: bytes) -> None:
    """Write a file encrypted. name: by which it will be read; content: can be read twice."""
    digest = hmac.new(key, name.encode() + b"\0", hashlib.sha256)
    while block := content.read(_SEGMENT):
        digest.update(block)
    content.seek(0)
    salt = digest.digest()
    cipher = _cipher(key, salt, name)
    place.write(_MAGIC + salt)
    number, block = 0, content.read(_SEGMENT)
    while True:
        following = content.read(_SEGMENT)
        place.write(cipher.encrypt(_nonce(number, last=not following), block, None))
        if not following:
            return
        number, block = number + 1, following


def decrypt(path: Path, *, name: str, key: bytes) -> bytearray:
    """The content of a file that `encrypt` wrote; twice its size is never held. Raises ArtifactError."""
    try:
        size = path.stat().st_size - len(_MAGIC) - _SALT
        segments = max(1, -(-size // (_SEGMENT + _TAG)))
        content = bytearray(max(0, size - segments * _TAG))
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC or size < _TAG:
                raise ArtifactError(f"{path} is not encrypted in a way that this onnxpress knows, or was changed.")
            cipher = _cipher(key, file.read(_SALT), name)
            for place, plain in _segments(file, cipher, segments, path):
                content[place : place + len(plain)] = plain
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None
    return content


def _segments(file: IO[bytes], cipher: Any, count: int, path: Path) -> Iterator[tuple[int, bytes]]:
    from cryptography.exceptions import InvalidTag

    for number in range(count):
        try:
            yield (
                number * _SEGMENT,
                cipher.decrypt(_nonce(number, last=number == count - 1), file.read(_SEGMENT + _TAG), None),
            )
        except InvalidTag:
            raise ArtifactError(
                f"{path} cannot be decrypted: the key is another one, or the file was changed."
            ) from None


def _cipher(key: bytes, salt: bytes, name: str) -> Any:
    try:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise MissingExtraError("Encrypted files need the package cryptography: pip install cryptography") from None
    derived = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=_MAGIC + name.encode()).derive(key)
    return ChaCha20Poly1305(derived)


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _from_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"The file that file: gives for the key cannot be read: {reason}.") from None


def _from_environment(name: str) -> str:
    if name not in os.environ:
        raise UsageError("The environment has no variable of the name that env: gives; it should hold the key.")
    return os.environ[name]


def _from_command(line: str) -> str:
    try:
        done = subprocess.run(shlex.split(line), stdout=subprocess.PIPE, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise UsageError(f"The command for the key failed with exit code {error.returncode}.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The command for the key cannot be run: {reason}.") from None
    return done.stdout


_SOURCES = {"file": _from_file, "env": _from_environment, "command": _from_command}
