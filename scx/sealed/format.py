"""The format of a sealed block, as docs/sealed-format.md has it: bytes in, bytes out."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from scx.keys import KEY_BYTES, RootKey, framed

MAGIC = b"scxseal1"
SALT_BYTES, TAG_BYTES = 32, 16
OVERHEAD = len(MAGIC) + SALT_BYTES + TAG_BYTES
# Each file has a key of its own, which encrypts once.
_NONCE = bytes(12)


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

    def seal(self, block: bytes, plain: bytes | memoryview) -> tuple[bytes, bytes]:
        """What the file of `block` holds: the header, then the ciphertext and its tag."""
        salt = secrets.token_bytes(SALT_BYTES)
        bound = self._bound(block, len(plain))
        return MAGIC + salt, self._cipher(salt).encrypt(_NONCE, plain, bound)

    def open(self, block: bytes, length: int, sealed: bytes) -> bytes:
        """The `length` bytes that `seal` was given; RefusedError for anything else."""
        header = len(MAGIC) + SALT_BYTES
        if len(sealed) != length + OVERHEAD or not sealed.startswith(MAGIC):
            raise RefusedError("it has another length or format")
        cipher = self._cipher(sealed[len(MAGIC) : header])
        data = memoryview(sealed)[header:]
        try:
            return cipher.decrypt(_NONCE, data, self._bound(block, length))
        except InvalidTag:
            raise RefusedError("its tag is wrong") from None

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(self._key.derive("file", salt.hex(), length=KEY_BYTES))

    def _bound(self, block: bytes, length: int) -> bytes:
        return framed(*self._identity, block.hex(), length)
