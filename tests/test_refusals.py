"""Never silently plain: what cannot run encoded is refused before weights load.

The models here are a config.json without weights, so a refusal that came later
than it should would fail with another error.
"""

import os
from types import SimpleNamespace

import pytest

from lab import tiny_models
from lab.engines import configure_each, in_new_process
from scx import codecs
from scx.errors import SCXUnsupportedError
from scx.keys import SCXConfig
from scx.plugin.architectures import encoded_architectures
from scx.plugin.refusals import model_obstacles, require_attention

DRAFTING = {
    "draft_model": ("LlamaForCausalLM", "llama"),
    "eagle": ("EagleLlamaForCausalLM", "llama"),
    "eagle3": ("Eagle3LlamaForCausalLM", "llama"),
    "medusa": ("MedusaModel", "medusa"),
}
"""Speculative methods with a draft model: its architecture and model type."""


def outcomes(cases, env):
    return in_new_process(configure_each, cases, env=env)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    return tiny_models.save_config(folder, "LlamaForCausalLM", "llama")


def rope(rope_type="default", **values):
    values |= {"rope_type": rope_type, "rope_theta": 1e4}
    return {"rope_parameters": values}


@pytest.fixture(scope="module")
def refusals(llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")

    def config(name, architecture, model_type, **values):
        folder = tiny_models.save_config(root / name, architecture, model_type, **values)
        return {"model": str(folder)}

    model = {"model": str(llama)}

    def speculating(method, draft=None):
        speculation = {"method": method, "model": draft, "num_speculative_tokens": 2}
        return model | {"speculative_config": speculation}, {}

    cases = {
        "no obstacle": (model, {}),
        "another architecture": (config("opt", "OPTForCausalLM", "opt"), {}),
        "alias": (config("alias", "TeleChat3ForCausalLM", "llama"), {}),
        "embedding": (config("embedding", "LlamaModel", "llama"), {}),
        "classifier": (config("cls", "LlamaForSequenceClassification", "llama"), {}),
        "classifier of a name in MODELS_CONFIG_MAP": (
            config("reranker", "Qwen3ForSequenceClassification", "qwen3", head_dim=32),
            {},
        ),
        "classifier of another class": (
            config("opts", "OPTForSequenceClassification", "opt"),
            {},
        ),
        "reward": (config("reward", "InternLM2ForRewardModel", "qwen2"), {}),
        "scaled queries": (
            config(
                "ministral",
                "Ministral3ForCausalLM",
                "mistral",
                llama_4_scaling={"original_max_position_embeddings": 64, "beta": 0.1},
            ),
            {},
        ),
        "model_impl": (model | {"model_impl": "transformers"}, {}),
        "dual chunk": (
            config(
                "dual",
                "Qwen2ForCausalLM",
                "qwen2",
                dual_chunk_attention_config={"chunk_size": 64, "local_size": 16},
            ),
            {},
        ),
        "encoder": (config("enc", "LlamaForCausalLM", "llama", is_causal=False), {}),
        "lora": (model | {"enable_lora": True}, {}),
        **{
            method: speculating(method, config(method, *draft)["model"])
            for method, draft in DRAFTING.items()
        },
        "custom_class": speculating("custom_class", "builtins.object"),
        "ngram": speculating("ngram"),
        "ngram_gpu": speculating("ngram_gpu"),
        "whole graphs, eager": (
            model
            | {"enforce_eager": True, "compilation_config": {"cudagraph_mode": "FULL"}},
            {},
        ),
        "whole graphs on a platform without": (
            model | {"compilation_config": {"cudagraph_mode": "FULL"}},
            {},
        ),
        "beyond the rotary table": (
            model | {"max_model_len": 2048},
            {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
        ),
        # vLLM's default is the scaled length here, of which its table has the half.
        "dynamic": (
            config("dynamic", "LlamaForCausalLM", "llama", **rope("dynamic", factor=2.0)),
            {},
        ),
        "deepseek": (
            config(
                "deepseek",
                "LlamaForCausalLM",
                "llama",
                **rope("deepseek_yarn", factor=2.0, original_max_position_embeddings=512),
            ),
            {},
        ),
        "three positions": (
            config("mrope", "Qwen2ForCausalLM", "qwen2", **rope(mrope_section=[4, 6, 6])),
            {},
        ),
        "by layer type": (
            config(
                "layers",
                "Qwen3ForCausalLM",
                "qwen3",
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "mllama4", "rope_theta": 1e6},
                },
            ),
            {},
        ),
        "dual batch": (model | {"ubatch_size": 2}, {}),
        "context parallel": (
            model | {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            {},
        ),
        "int8 cache": (model | {"kv_cache_dtype": "int8_per_token_head"}, {}),
        "fp8 cache": (model | {"kv_cache_dtype": "fp8"}, {}),
        "kv transfer": (
            model
            | {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            {},
        ),
        "kv offload": (
            model | {"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"},
            {},
        ),
        "late": (model, {"SCX_ENC_LAYERS": "1"}),
        "late off": (model, {"SCX_ENC_LAYERS": ""}),
    }
    results = outcomes(list(cases.values()), {"SCX_ENC_LAYERS": "0,3"})
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        "no obstacle",
        "alias",
        "classifier",
        "classifier of a name in MODELS_CONFIG_MAP",
        "embedding",
    ],
)
def test_what_fits_is_recorded(case, refusals):
    kind, record = refusals[case]
    assert kind == "configured"
    assert record["layers"] == [0, 3]
    assert record["secure_device"] == "cpu"


@pytest.mark.parametrize(
    ("case", "error", "texts"),
    [
        (
            "another architecture",
            "SCXUnsupportedError",
            ["OPTForCausalLM is not encoded", "LlamaForCausalLM", "Qwen3ForCausalLM"],
        ),
        (
            "classifier of another class",
            "SCXUnsupportedError",
            ["OPTForSequenceClassification is not encoded"],
        ),
        (
            "reward",
            "SCXUnsupportedError",
            ["InternLM2ForRewardModel is not encoded"],
        ),
        (
            "beyond the rotary table",
            "SCXUnsupportedError",
            ["max_model_len=2048", "has 1024 positions: set it to 1024 at most"],
        ),
        ("dynamic", "SCXUnsupportedError", ["max_model_len=2048", "1024 at most"]),
        ("deepseek", "SCXUnsupportedError", ["rope_type='deepseek_yarn'", "longrope"]),
        ("three positions", "SCXUnsupportedError", ["mrope_section in rope_parameters"]),
        ("by layer type", "SCXUnsupportedError", ["rope_type='mllama4' is not encoded"]),
        ("scaled queries", "SCXUnsupportedError", ["llama_4_scaling of the queries"]),
        ("model_impl", "SCXUnsupportedError", ["model_impl='transformers'"]),
        ("dual chunk", "SCXUnsupportedError", ["dual chunk attention is not encoded"]),
        ("encoder", "SCXUnsupportedError", ["encoder-only attention"]),
        ("lora", "SCXUnsupportedError", ["LoRA picks adapters by row"]),
        *(
            (method, "SCXUnsupportedError", [f"method {method!r} may draft with a model"])
            for method in (*DRAFTING, "custom_class")
        ),
        ("dual batch", "SCXUnsupportedError", ["leave out enable_dbo and ubatch_size"]),
        (
            "context parallel",
            "SCXUnsupportedError",
            ["decode_context_parallel_size merges outputs of several keys"],
        ),
        ("int8 cache", "SCXUnsupportedError", ["kv_cache_dtype='int8_per_token_head'"]),
        ("kv transfer", "SCXUnsupportedError", ["SCX_KEY_FILE"]),
        ("kv offload", "SCXUnsupportedError", ["the KV connector lmcache"]),
        ("late", "SCXConfigError", ["SCX_ENC_LAYERS='1'", "then '0,3'"]),
        ("late off", "SCXConfigError", ["SCX_ENC_LAYERS=''", "then '0,3'"]),
    ],
)
def test_refused_in_one_line_that_says_what_to_do(case, error, texts, refusals):
    kind, message = refusals[case]
    assert kind == error, message
    assert len(message.splitlines()) == 1
    assert "SCX_ENC_LAYERS='" in message
    for text in texts:
        assert text in message


def described(architecture, quantization=None, model_impl="auto"):
    """As much of a ModelConfig as is looked at."""
    from vllm.model_executor.models import ModelRegistry

    return SimpleNamespace(
        model_impl=model_impl,
        architecture=architecture,
        quantization=quantization,
        runner_type="generate",
        convert_type="none",
        max_model_len=8192,
        hf_config=SimpleNamespace(architectures=[architecture]),
        hf_text_config=SimpleNamespace(),
        registry=ModelRegistry,
    )


@pytest.mark.parametrize("quantization", ["bitsandbytes", "modelopt", "torchao"])
def test_quantised_weights_that_were_not_run_are_refused_by_name(quantization):
    """Where this suite runs, vLLM itself refuses most of them before."""
    (obstacle,) = model_obstacles(described("LlamaForCausalLM", quantization))
    assert obstacle == (
        f"quantization={quantization!r} was never run encoded: use AWQ, GPTQ, fp8 or "
        "compressed-tensors, or weights that are not quantised"
    )


@pytest.mark.parametrize("model_impl", ["transformers", "terratorch"])
def test_other_implementations_of_models_are_refused_by_name(model_impl):
    """Here vLLM refuses terratorch before, because its package is missing."""
    described_model = described("LlamaForCausalLM", model_impl=model_impl)
    (obstacle,) = model_obstacles(described_model)
    assert obstacle == (
        f"model_impl={model_impl!r} does not use vLLM's model classes: leave it out"
    )


@pytest.mark.parametrize(
    "architecture",
    [
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLForSequenceClassification",
        "NotInTheRegistryForCausalLM",
        "PhiMoEForCausalLM",
    ],
)
def test_models_around_an_encoded_one_are_refused_by_name(architecture):
    """Those of images need packages that this environment lacks to get this far."""
    (obstacle,) = model_obstacles(described(architecture))
    assert obstacle == (
        f"{architecture} is not encoded: use one of "
        f"{', '.join(encoded_architectures())}, or unset SCX_ENC_LAYERS"
    )


@pytest.mark.parametrize(
    ("architecture", "fact", "why"),
    [
        ("Olmo2ForCausalLM", "", "vLLM runs it in classes of transformers"),
        ("SeedOssForCausalLM", "", "vLLM runs it in classes of transformers"),
        ("Starcoder2ForCausalLM", "", "vLLM runs it in classes of transformers"),
        ("DeepseekV3ForCausalLM", "use_mla", "its cache holds latents, from which"),
        ("MambaForCausalLM", "is_attention_free", "its layers have states in place"),
        ("JambaForCausalLM", "is_hybrid", "some of its layers have states in place"),
    ],
)
def test_other_seams_are_refused_by_name_with_the_reason(architecture, fact, why):
    model_config = described(architecture)
    setattr(model_config, fact or "use_mla", bool(fact))
    (obstacle,) = model_obstacles(model_config)
    assert obstacle.startswith(f"{architecture} is not encoded, as {why}")


@pytest.mark.parametrize(
    "case",
    [
        "ngram",
        "ngram_gpu",
        "fp8 cache",
        "whole graphs, eager",
        "whole graphs on a platform without",
    ],
)
def test_not_refused(case, refusals):
    assert refusals[case][0] == "configured"


AFFINE = {"SCX_ENC_LAYERS": "0", "SCX_CODEC": "affine"}
TWO_RANKS = {"tensor_parallel_size": 2}
ON = {"SCX_ENC_LAYERS": "0"}


def assert_fp8_is_refused(kind, message):
    assert kind == "SCXUnsupportedError"
    assert "kv_cache_dtype='fp8'" in message
    assert "SCX_CODEC='affine'" in message


def test_fp8_cache_with_a_codec_that_stretches(llama):
    case = ({"model": str(llama), "kv_cache_dtype": "fp8"}, {})
    assert_fp8_is_refused(*outcomes([case], AFFINE)[0])


def configure_with_sleep_mode(model):
    """The record with vLLM's own backend, and what is said of another."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from scx.errors import SCXUnsupportedError
    from scx.plugin.configure import configure

    # As on a GPU; a CPU's engine refuses it before anyone looks at layers.
    type(current_platform).is_sleep_mode_available = lambda self: True
    arguments = EngineArgs(model, skip_tokenizer_init=True, enable_sleep_mode=True)
    vllm_config = arguments.create_engine_config()
    # Another plugin may set it: it is no argument of an engine.
    vllm_config.model_config.sleep_mode_backend = "snapshots"
    with pytest.raises(SCXUnsupportedError) as refused:
        configure(vllm_config)
    return vllm_config.additional_config["scx"], str(refused.value)


def test_sleep_mode(llama):
    env = {"SCX_ENC_LAYERS": "0,3"}
    record, message = in_new_process(configure_with_sleep_mode, str(llama), env=env)
    assert record["layers"] == [0, 3]
    assert "sleep_mode_backend='snapshots' may copy or lose the keys" in message


def configure_with_graphs(cases):
    from vllm.platforms import current_platform

    # As on a GPU.
    type(current_platform).support_static_graph_mode = lambda self: True
    return configure_each(cases)


def test_whole_graphs_where_vllm_takes_them(llama, tmp_path):
    """Of a step that waits for Python: here the host's fused kernels are not used."""
    whole = {"compilation_config": {"cudagraph_mode": "FULL"}}
    pooled = {"runner": "pooling", "convert": "embed"}
    cases = [{}, {"enforce_eager": True}, pooled]
    results = in_new_process(
        configure_with_graphs,
        [({"model": str(llama)} | whole | case, {}) for case in cases],
        env={"SCX_ENC_LAYERS": "0"},
    )
    (refused, message), *others = results
    assert refused == "SCXUnsupportedError"
    assert message == (
        "SCX_ENC_LAYERS='0' asks for encoding, but cudagraph_mode=FULL captures the "
        "secure step, which synchronises with the host: leave it out, or use PIECEWISE "
        "or NONE"
    )
    assert [kind for kind, _ in others] == ["configured", "configured"]


def test_weights_that_bring_scales_for_an_fp8_cache(tmp_path):
    """vLLM may take fp8 only while it builds the layers, after its configuration."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    quantized = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": scheme | {"symmetric": True},
    }
    folder = tiny_models.save_config(
        tmp_path / "scaled", "LlamaForCausalLM", "llama", quantization_config=quantized
    )
    assert_fp8_is_refused(*outcomes([({"model": str(folder)}, {})], AFFINE)[0])


BUILT = {
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
    "has_sink": False,
    "impl": SimpleNamespace(logits_soft_cap=None),
    "kv_cache_dtype": "auto",
}
"""As much of vLLM's Attention as is looked at."""


@pytest.mark.parametrize(
    ("built", "codec", "text"),
    [
        ({}, "affine", ""),
        ({"has_sink": True}, "permutation", ""),
        ({"has_sink": True}, "affine", "this model has attention sinks"),
        ({"impl": SimpleNamespace(logits_soft_cap=50.0)}, "permutation", ""),
        ({"impl": SimpleNamespace(logits_soft_cap=50.0)}, "affine", "has capped scores"),
        ({"attn_type": "encoder_only"}, "permutation", "of type 'encoder_only'"),
        (
            {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"},
            "permutation",
            "reads the cache of model.layers.0.self_attn.attn",
        ),
        ({"kv_cache_dtype": "fp8"}, "permutation", ""),
        ({"kv_cache_dtype": "fp8"}, "affine", "kv_cache_dtype='fp8' clips"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, "permutation", "kv_cache_dtype='fp8_ds_mla'"),
        ({"kv_cache_dtype": "octave_3"}, "permutation", "kv_cache_dtype='octave_3' may"),
    ],
)
def test_the_attention_that_a_layer_got_is_looked_at_once_more(built, codec, text):
    config = SCXConfig((0,), "cpu", False, None, codec)
    plan = SimpleNamespace(config=config, codec=codecs.load(codec))
    attention = SimpleNamespace(**(BUILT | built))
    if not text:
        require_attention(attention, plan)
        return
    with pytest.raises(SCXUnsupportedError) as caught:
        require_attention(attention, plan)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_codec_or_several_ranks_would_get_wrong_is_refused_by_row(tmp_path):
    def model(architecture, model_type, **values):
        folder = tmp_path / architecture
        tiny_models.save_config(folder, architecture, model_type, **values)
        return {"model": str(folder)}

    capped = model("Gemma2ForCausalLM", "gemma2", head_dim=64)
    sinks = model("GptOssForCausalLM", "gpt_oss")
    normed = model("OlmoeForCausalLM", "olmoe")
    cases = [(capped, {}), (sinks, {}), (normed, {}), (normed | TWO_RANKS, {})]
    for codec, variables in (("permutation", ON), ("affine", AFFINE)):
        results = outcomes(cases, variables)
        said = [message for kind, message in results if kind == "SCXUnsupportedError"]
        assert "OlmoeForCausalLM norms queries and keys over all ranks" in said.pop()
        if codec == "permutation":
            assert said == []
            continue
        for line, what in zip(said, ("capped scores", "attention sinks"), strict=True):
            assert f"has {what}, and SCX_CODEC='affine' shifts the scores" in line
            assert line.endswith("use the permutation codec")


def test_layer_beyond_the_model(llama):
    ((kind, message),) = outcomes(
        [({"model": str(llama)}, {})], {"SCX_ENC_LAYERS": "0,4"}
    )
    assert kind == "SCXConfigError"
    assert message == "SCX_ENC_LAYERS='4': this model has the layers 0 to 3"


def test_turned_on_after_a_plain_engine_was_configured(llama):
    cases = [
        ({"model": str(llama)}, {}),
        ({"model": str(llama)}, {"SCX_ENC_LAYERS": "0"}),
    ]
    plain, late = outcomes(cases, {})
    assert plain == ("configured", None)
    assert late[0] == "SCXConfigError"
    assert "start a new process" in late[1]


def build_in_worker_without_variables(model):
    """What a remote worker meets that was not given our variables."""
    from lab.engines import engine
    from scx import keys
    from scx.plugin import register

    configure = register.configure

    def configure_and_forget(vllm_config):
        configure(vllm_config)
        os.environ["SCX_ENC_LAYERS"] = ""
        keys.pin_config()

    register.configure = configure_and_forget
    try:
        engine(model, skip_tokenizer_init=True, load_format="dummy")
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_worker_without_our_variables_does_not_run_plain(llama):
    env = {"SCX_ENC_LAYERS": "0"}
    kind, message = in_new_process(build_in_worker_without_variables, llama, env=env)
    assert kind == "SCXConfigError"
    assert "layers=[] in this worker" in message


def copied_to_ray_workers():
    """Our variables among those that vLLM copies to workers of Ray's on other nodes."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    return {name for name in get_env_vars_to_copy() if name.startswith("SCX_")}


def test_the_variable_that_the_readme_names_takes_ours_to_ray_workers():
    ours = {
        "SCX_ENC_LAYERS": "0",
        "SCX_SECURE_DEVICE": "cpu",
        "SCX_CODEC": "affine",
        "SCX_KEY_FILE": "/run/scx.key",
        "SCX_ENABLE_DEBUG": "1",
    }
    prefixes = {"VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "SCX_"}
    assert in_new_process(copied_to_ray_workers, env=ours) == set()
    assert in_new_process(copied_to_ray_workers, env=ours | prefixes) == set(ours)


def run_a_stale_graph(model, compiled):
    """What a wrong compiled graph does: the layer's operator is never called."""
    from vllm.model_executor.models.llama import LlamaAttention

    from lab.engines import engine, greedy
    from scx.models.llama_scx import LlamaSCXAttention

    LlamaSCXAttention.forward = LlamaAttention.forward
    stage = "start"
    try:
        llm = engine(
            model,
            skip_tokenizer_init=True,
            load_format="dummy",
            enforce_eager=not compiled,
        )
        stage = "first step"
        greedy(llm, [[1, 2, 3]])
    except Exception as error:
        return stage, type(error).__name__, str(error)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_that_ran_plain_stops_the_engine_before_it_answers(compiled, llama):
    env = {"SCX_ENC_LAYERS": "1"}
    stage, kind, message = in_new_process(run_a_stale_graph, llama, compiled, env=env)
    # vLLM's CPU worker runs no profiling pass when it is eager.
    assert stage == ("start" if compiled else "first step")
    assert kind == "SCXNotEncodedError"
    assert "layer 1 ran without its secure device" in message
