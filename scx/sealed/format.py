"""The format of a sealed block, as docs/sealed-format.md has it."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from scx.keys import KEY_BYTES, RootKey, framed

MAGIC = b"scxseal1"
SALT_BYTES, TAG_BYTES = 32, 16
OVERHEAD = len(MAGIC) + SALT_BYTES + TAG_BYTES
# Each file has a key of its own, which encrypts once.
_NONCE = bytes(12)
# cryptography holds the interpreter's lock over a call, and the scheduler needs it too.
# Between pieces a file is read or written, which lets go of it.
_PIECE_BYTES = 1 << 18


class RefusedError(Exception):
    """These bytes are not what this key sealed under this identity."""


def context_of(facts: Mapping[str, Any]) -> str:
    """64 hexadecimal digits for what blocks are exchangeable within: SHA-256 of JSON."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Seal:
    """Seals and opens the blocks of one tenant, in one context.

    `root` is the root key of the model; `tenant` None is a tenant of its own.
    """

    def __init__(self, root: RootKey, context: str, tenant: str | None) -> None:
        fields = () if tenant is None else (tenant,)
        self._key = RootKey(root.derive("seal", *fields, length=KEY_BYTES))
        self._name_key = self._key.derive("name", length=KEY_BYTES)
        self._identity = ("scx-sealed", 1, self._key.fingerprint, context)

    def name(self, block: bytes) -> str:
        """64 hexadecimal digits: HMAC-SHA256 of the block's identity."""
        identity = framed(*self._identity, block.hex())
        return hmac.digest(self._name_key, identity, "sha256").hex()

    def seal(self, block: bytes, plain: memoryview) -> Iterator[bytes]:
        """What the file of `block` holds, in pieces. `plain` is flat and of bytes."""
        salt = secrets.token_bytes(SALT_BYTES)
        encryptor = self._cipher(salt).encryptor()
        encryptor.authenticate_additional_data(self._bound(block, len(plain)))
        yield MAGIC + salt
        for piece in _pieces(plain):
            yield encryptor.update(piece)
        yield encryptor.finalize() + encryptor.tag

    def open(self, block: bytes, file: BinaryIO, plain: memoryview) -> None:
        """Write what `seal` was given to `plain`, which has its length.

        Raises RefusedError for anything but the whole file, after which `plain` holds
        nothing of use.
        """
        header = file.read(len(MAGIC) + SALT_BYTES)
        if len(header) < len(MAGIC) + SALT_BYTES or not header.startswith(MAGIC):
            raise RefusedError("it has another format")
        decryptor = self._cipher(header[len(MAGIC) :]).decryptor()
        decryptor.authenticate_additional_data(self._bound(block, len(plain)))
        for piece in _pieces(plain):
            sealed = file.read(len(piece))
            if len(sealed) < len(piece):
                raise RefusedError("it has another length")
            piece[:] = decryptor.update(sealed)
        # A byte more, so that a longer file is seen.
        tag = file.read(TAG_BYTES + 1)
        if len(tag) != TAG_BYTES:
            raise RefusedError("it has another length")
        try:
            decryptor.finalize_with_tag(tag)
        except InvalidTag:
            raise RefusedError("its tag is wrong") from None

    def _cipher(self, salt: bytes) -> Cipher[GCM]:
        key = self._key.derive("file", salt.hex(), length=KEY_BYTES)
        return Cipher(AES(key), GCM(_NONCE))

    def _bound(self, block: bytes, length: int) -> bytes:
        return framed(*self._identity, block.hex(), length)


def _pieces(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _PIECE_BYTES):
        yield view[start : start + _PIECE_BYTES]
