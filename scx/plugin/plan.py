"""What an engine encodes and how: one plan, the same in each of its processes.

The process that configures the engine makes it and writes its record into vLLM's
`additional_config`, which travels to every worker and is part of vLLM's compile-cache
key. A worker reads the record, which must agree with what it finds itself.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scx import codecs, devices
from scx.codecs.interface import FeatureCodec
from scx.devices.interface import SecureLayer
from scx.errors import SCXConfigError, SCXUnsupportedError
from scx.kernels.host import cores
from scx.keys import ENC_LAYERS, RootKey, SCXConfig, get_scx_config, layers_text
from scx.plugin.architectures import Architecture, architecture_of, encoded_architectures
from scx.plugin.identity import identity_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

RECORD = "scx"
"""The record's name in `additional_config`."""


@dataclass(frozen=True)
class EncodingPlan:
    """What is encoded, by which classes, and for which steps. It holds no secret."""

    config: SCXConfig
    architecture: Architecture
    layers: tuple[int, ...]
    """Indices in the whole model."""
    codec: type[FeatureCodec]
    device: type[SecureLayer]
    dtype: torch.dtype
    max_model_len: int
    max_step_tokens: int
    """The most rows of a step, padding to a captured size included."""
    record: dict[str, Any]
    """All that decides which graph is compiled, and what no worker can find out."""

    @classmethod
    def make(cls, config: SCXConfig, vllm_config: "VllmConfig") -> "EncodingPlan":
        """For an engine that this process configures.

        Raises SCXConfigError for layers that the model does not have, and
        SCXUnsupportedError for a model that no class encodes.
        """
        model_config = vllm_config.model_config
        record = _shared(config, model_config) | {
            "model": identity_of(model_config) if config.key_file else "",
            # Here, as the process of a data-parallel replica forgets the others.
            "ranks_here": cores.ranks_here(vllm_config.parallel_config),
        }
        return cls._of(config, vllm_config, record)

    @classmethod
    def read(cls, vllm_config: "VllmConfig") -> "EncodingPlan | None":
        """In a worker that builds a model, as its engine was configured; None if no layer
        is to be encoded.

        Raises SCXConfigError if this process has another setting than the one that
        configured the engine, and SCXUnsupportedError if the engine was not configured
        for encoding.
        """
        config, record = get_scx_config(), record_of(vllm_config)
        if record is None:
            if config.enabled:
                raise _unsupported(config)
            return None
        for name, value in _shared(config, vllm_config.model_config).items():
            if record[name] != value:
                raise SCXConfigError(
                    f"{name}={value!r} in this worker, but the engine was configured "
                    f"with {record[name]!r}: give each worker the same SCX_* variables "
                    "and package (with Ray: VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=SCX_)"
                )
        return cls._of(config, vllm_config, record)

    @classmethod
    def _of(
        cls, config: SCXConfig, vllm_config: "VllmConfig", record: dict[str, Any]
    ) -> "EncodingPlan":
        from vllm.platforms import current_platform

        model_config = vllm_config.model_config
        if (architecture := architecture_of(model_config)) is None:
            raise _unsupported(config)
        codec = codecs.load(config.codec)
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        return cls(
            config=config,
            architecture=architecture,
            layers=tuple(record["layers"]),
            codec=codec,
            device=devices.choose(
                config.secure_device, current_platform.is_cuda(), codec
            ),
            dtype=model_config.dtype,
            max_model_len=model_config.max_model_len,
            max_step_tokens=max(
                vllm_config.scheduler_config.max_num_batched_tokens, *captured
            ),
            record=record,
        )

    @property
    def workers(self) -> int:
        """Threads of this rank, if the host is the secure device."""
        allowed = cores.workers_for(cores.usable_cores(), self.record["ranks_here"])
        return self.config.host_threads or allowed

    def root_key(self) -> RootKey:
        """The root key of the engine's model, as this process has it."""
        return RootKey.load(self.config).for_model(self.record["model"])


def record_of(vllm_config: "VllmConfig") -> dict[str, Any] | None:
    """The record of an engine's plan, or None if no layer is to be encoded."""
    additional = vllm_config.additional_config
    return additional.get(RECORD) if isinstance(additional, dict) else None


def asked(config: SCXConfig) -> str:
    """What the user asked for, to begin an error with."""
    return f"{ENC_LAYERS}={layers_text(config.enc_layers)!r} asks for encoding"


def _unsupported(config: SCXConfig) -> SCXUnsupportedError:
    return SCXUnsupportedError(
        f"{asked(config)}, but this model is part of another architecture or was "
        f"configured without the plugin. Supported: {', '.join(encoded_architectures())}"
    )


def _shared(config: SCXConfig, model_config: "ModelConfig") -> dict[str, Any]:
    """What each process finds out by itself, and must agree on. Nothing secret."""
    return {
        "layers": list(config.layers_of(model_config.hf_text_config.num_hidden_layers)),
        "codec": config.codec,
        "secure_device": config.secure_device,
        "key_file": config.key_file is not None,
        "sources": _sources_hash(),
    }


@cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
