"""Run an engine and record what its accelerator holds.

The recorder is a set of forward hooks on the accelerator's own modules: what a
module is given has crossed to the accelerator, what it returns is there. It
knows nothing of the codec or of the secure device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from scx.errors import SCXUnsupportedError
from scx.plugin.plan import EncodingPlan

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""The architectures of which `scx.audit.public_model` knows what attention is given."""


@dataclass(frozen=True)
class Border:
    """One encoded layer in one step, beside `Step.hidden`, `k` and `v`."""

    rows: torch.Tensor
    """Input of qkv_proj (T, H), in the order in which it was sent."""
    qkv: torch.Tensor
    """Output of qkv_proj (T, (N + 2M) x D), in that order."""
    q: torch.Tensor
    """Queries given to the attention (T, N, D)."""
    attention: torch.Tensor
    """Output of the attention (T, N, D)."""
    output: torch.Tensor
    """Input of o_proj (T, N x D)."""


@dataclass(frozen=True)
class Step:
    """One forward pass over T rows. All tensors are copies on the CPU, of the
    engine's dtype; the dictionaries are by layer, the first three over all layers.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """Input of the attention layer (T, H), in the order of the batch."""
    k: dict[int, torch.Tensor] = field(default_factory=dict)
    """Keys given to the attention (T, M, D), which writes them to the KV cache."""
    v: dict[int, torch.Tensor] = field(default_factory=dict)
    """Values, likewise."""
    border: dict[int, Border] = field(default_factory=dict)
    """The encoded layers."""


@dataclass(frozen=True)
class Capture:
    """All that was recorded."""

    layers: tuple[int, ...]
    """The encoded layers."""
    num_layers: int
    codec: str
    alone: list[list[Step]]
    """The steps of each request that ran alone: its prefill, then rows one by one."""
    together: list[Step]
    """The steps of all requests as one batch, under the same key."""

    def ids(self, request: int) -> torch.Tensor:
        """The tokens (T,) whose keys and values the cache holds for a request."""
        return torch.cat([step.input_ids for step in self.alone[request]])


class Recorder:
    """Hooks on a loaded model; `steps` grows by one with each forward pass."""

    def __init__(self, model: Any, encoded: Sequence[int]) -> None:
        self.steps: list[Step] = []
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self.num_layers = len(model.model.layers)
        for index, layer in enumerate(model.model.layers):
            self._watch(index, layer.self_attn, index in encoded)

    def take(self) -> list[Step]:
        """The steps so far, which are then forgotten here."""
        steps, self.steps = self.steps, []
        return steps

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("input_ids", "positions"), args, strict=False)) | kwargs
        self.steps.append(Step(_copy(named["input_ids"]), _copy(named["positions"])))

    def _watch(self, index: int, attention: Any, encoded: bool) -> None:
        head_dim = attention.head_dim
        parts: dict[str, torch.Tensor] = {}

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("positions", "hidden_states"), args, strict=False)) | kwargs
            self.steps[-1].hidden[index] = _copy(named["hidden_states"])

        def project(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            parts.update(rows=_copy(args[0]), qkv=_copy(result[0]))

        def attend(_: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> None:
            q, k, v, out = (
                _copy(heads).reshape(
                    -1, heads.numel() // len(args[0]) // head_dim, head_dim
                )
                for heads in (*args[:3], result)
            )
            self.steps[-1].k[index], self.steps[-1].v[index] = k, v
            parts.update(q=q, attention=out)

        def leave(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.steps[-1].border[index] = Border(**parts, output=_copy(args[0]))
            parts.clear()

        self._handles += [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.attn.register_forward_hook(attend),
        ]
        if encoded:
            self._handles += [
                attention.qkv_proj.register_forward_hook(project),
                attention.o_proj.register_forward_pre_hook(leave),
            ]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def record(
    model: str,
    prompts: Sequence[list[int]],
    new_tokens: int,
    **engine_args: Any,
) -> Capture:
    """Run `prompts` (token ids) through an engine of this process and record it.

    The variables of SCX must be set, and name a layer. Each prompt runs alone, then
    all run in one batch; `new_tokens` follow each. Raises SCXUnsupportedError for a
    model that is not one of KNOWN.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=model,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        max_model_len=max(map(len, prompts)) + new_tokens,
        **engine_args,
    )
    vllm_config = llm.llm_engine.vllm_config
    plan: Any = EncodingPlan.read(vllm_config)
    norms = getattr(vllm_config.model_config.hf_text_config, "qk_norm", False)
    if plan.architecture.name not in KNOWN or norms:
        raise SCXUnsupportedError(
            f"--model {model!r}: the attacks calculate what attention is given, and know "
            f"how for {', '.join(KNOWN)} only, without norms of queries and keys: use "
            "one of them"
        )
    (recorder,) = llm.apply_model(lambda loaded: Recorder(loaded, plan.layers))
    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )

    def run(batch: Sequence[list[int]]) -> list[Step]:
        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in batch]
        llm.generate(inputs, params, use_tqdm=False)
        return recorder.take()

    alone = [run([prompt]) for prompt in tqdm(prompts, desc="capture", unit="prompt")]
    together = run(prompts)
    recorder.remove()
    capture = Capture(plan.layers, recorder.num_layers, plan.codec.name, alone, together)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return capture
