"""Key files, and the root key that an engine derives from one."""

import secrets
from pathlib import Path
from types import SimpleNamespace

from scx.keys import RootKey, SCXConfig
from scx.plugin.identity import identity_of


def new_key_file(path: Path, content: bytes | None = None) -> Path:
    """For its owner alone; random, if no content is given."""
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(32) if content is None else content)
    return path


def identity(model: Path) -> str:
    """Of a folder, from transformers' configuration in place of vLLM's."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    return identity_of(SimpleNamespace(model=model, revision=None, hf_text_config=config))


def root_key(key_file: Path, model: Path) -> RootKey:
    config = SCXConfig((0,), "cpu", False, key_file)
    return RootKey.load(config).for_model(identity(model))
