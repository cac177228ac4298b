"""The sealed format against a second program, its vectors, and forgers."""

import hmac
import io
import json
import os
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from scx.keys import RootKey
from scx.sealed.format import OVERHEAD, RefusedError, Seal, context_of

VECTORS = json.loads(
    (Path(__file__).parent.parent / "docs" / "sealed-format.json").read_text()
)
ROOT, CONTEXT = RootKey(bytes(range(32))), context_of({"model": "abcd"})
BLOCK = bytes(36)


# The second program: docs/sealed-format.md, with nothing of scx.


def frame(*fields):
    texts = [field.encode() for field in fields]
    return b"".join(struct.pack(">I", len(text)) + text for text in texts)


def derive(key, *fields, length=32):
    info = b"scx-vllm v2" + frame(*fields)
    return HKDF(SHA256(), length, None, info).derive(key)


def keys_of(vector):
    facts = vector["facts"]
    digest = Hash(SHA256())
    digest.update(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
    model_key = derive(bytes.fromhex(vector["root_key"]), "model", facts["model"])
    tenant = [] if vector["tenant"] is None else [vector["tenant"]]
    key = derive(model_key, "seal", *tenant)
    key_id = derive(key, "fingerprint", length=8).hex()
    identity = ["scx-sealed", "1", key_id, digest.finalize().hex(), vector["block"]]
    return key, identity


def sealed_by(seal, block, plain):
    return b"".join(seal.seal(block, memoryview(plain)))


def opened(seal, block, length, sealed):
    plain = bytearray(length)
    seal.open(block, io.BytesIO(sealed), memoryview(plain))
    return bytes(plain)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["tenant"]))
def test_the_vectors_open_in_a_second_program_and_in_ours(vector):
    key, identity = keys_of(vector)
    name = hmac.digest(derive(key, "name"), frame(*identity), "sha256")
    assert name.hex() == vector["name"]
    sealed, plain = (bytes.fromhex(vector[name]) for name in ("sealed", "plain"))
    assert sealed[:8] == b"scxseal1"
    cipher = AESGCM(derive(key, "file", sealed[8:40].hex()))
    bound = frame(*identity, str(len(plain)))
    assert cipher.decrypt(bytes(12), sealed[40:], bound) == plain

    root = RootKey(bytes.fromhex(vector["root_key"])).for_model(vector["facts"]["model"])
    ours = Seal(root, context_of(vector["facts"]), vector["tenant"])
    block = bytes.fromhex(vector["block"])
    assert ours.name(block) == vector["name"]
    assert opened(ours, block, len(plain), sealed) == plain


def test_tenants_of_the_vectors_differ_in_every_key():
    assert len({keys_of(vector)[0] for vector in VECTORS}) == len(VECTORS)


# Forgers.


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=40), st.none() | st.text())
def test_what_is_sealed_opens(plain, block, tenant):
    tenant = None if tenant is None else json.dumps(tenant)
    sealed = sealed_by(Seal(ROOT, CONTEXT, tenant), block, plain)
    assert len(sealed) == len(plain) + OVERHEAD
    assert opened(Seal(ROOT, CONTEXT, tenant), block, len(plain), sealed) == plain


@pytest.mark.parametrize("more", [-1, 0, 5])
def test_a_block_of_several_pieces_is_one_message(more):
    seal, plain = Seal(ROOT, CONTEXT, None), os.urandom((1 << 19) + more)
    sealed = sealed_by(seal, BLOCK, plain)
    cipher = AESGCM(derive(seal._key._secret, "file", sealed[8:40].hex()))
    bound = frame(*map(str, seal._identity), BLOCK.hex(), str(len(plain)))
    assert cipher.decrypt(bytes(12), sealed[40:], bound) == plain
    assert opened(seal, BLOCK, len(plain), sealed) == plain
    with pytest.raises(RefusedError):
        opened(seal, BLOCK, len(plain), sealed[:-1] + bytes([sealed[-1] ^ 1]))


@given(st.binary(max_size=99), st.data())
def test_a_changed_shortened_or_lengthened_file_is_refused(plain, data):
    seal = Seal(ROOT, CONTEXT, None)
    sealed = sealed_by(seal, BLOCK, plain)
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    for forged in (bytes(flipped), cut, sealed + b"\0"):
        with pytest.raises(RefusedError):
            opened(seal, BLOCK, len(plain), forged)
    # Nor does an honest length of a file that was cut help.
    if len(cut) >= OVERHEAD:
        with pytest.raises(RefusedError):
            opened(seal, BLOCK, len(cut) - OVERHEAD, cut)


@pytest.mark.parametrize(
    ("other", "block"),
    [
        (Seal(RootKey(bytes(32)), CONTEXT, None), BLOCK),
        (Seal(ROOT, context_of({"model": "abce"}), None), BLOCK),
        (Seal(ROOT, CONTEXT, ""), BLOCK),
        (Seal(ROOT, CONTEXT, None), BLOCK[:-1] + b"\1"),
    ],
    ids=["key", "context", "tenant", "block"],
)
def test_another_identity_has_another_name_and_opens_nothing(other, block):
    seal = Seal(ROOT, CONTEXT, None)
    sealed = sealed_by(seal, BLOCK, b"secret")
    assert other.name(block) != seal.name(BLOCK)
    with pytest.raises(RefusedError):
        opened(other, block, 6, sealed)


def test_no_two_files_share_a_salt_or_a_byte_of_ciphertext_by_design():
    seal = Seal(ROOT, CONTEXT, None)
    files = {sealed_by(seal, BLOCK, bytes(64)) for _ in range(100)}
    assert (
        len({file[8:40] for file in files}) == len({file[40:] for file in files}) == 100
    )
