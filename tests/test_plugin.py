"""Never silently plain and never another model, whatever registers what, and when.

Most cases stop at the configuration: a config.json without weights is enough.
"""

import os
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

import scx
from lab import tiny_models
from lab.engines import in_new_process
from scx import keys
from scx.errors import SCXConfigError, SCXNotEncodedError, SCXUnsupportedError
from scx.plugin import register
from scx.plugin.architectures import ARCHITECTURES, Trait
from scx.plugin.configure import configure

ON = {"SCX_ENC_LAYERS": "0"}
OTHER_CLASS = "lab.other_models:BiasedLlama"
GROUP = "vllm.general_plugins"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config.json that names these architectures: its folder."""
    root = tmp_path_factory.mktemp("configs")

    def folder(*architectures, model_type="llama"):
        path = root / "-".join((*architectures, model_type))
        if not path.exists():
            values = {"architectures": list(architectures)}
            tiny_models.save_config(path, architectures[0], model_type, **values)
        return str(path)

    return folder


def configured(model, **arguments):
    """The layers of the record, or the error's type and text."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        args = EngineArgs(model=model, skip_tokenizer_init=True, **arguments)
        vllm_config = args.create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    record = vllm_config.additional_config.get("scx")
    return record and record["layers"]


def assert_refused(outcome, *texts):
    assert outcome.startswith("SCXUnsupportedError: SCX_ENC_LAYERS='0' asks for"), outcome
    assert len(outcome.splitlines()) == 1
    for text in texts:
        assert text in outcome


# What registers after our plugin ran.


def register_late(llama, own, alias, opt):
    from vllm import ModelRegistry
    from vllm.model_executor.models import config as models_config

    class Replaced(models_config.VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config):
            calls.append(vllm_config.model_config.architecture)

    calls = []
    found = {"before": configured(llama)}
    ModelRegistry.register_model("BiasedLlama", OTHER_CLASS)
    found["own name"] = configured(own)
    found["override"] = configured(
        alias, model_class_overrides={"TeleChat3ForCausalLM": OTHER_CLASS}
    )
    for name in ("OPTForCausalLM", "LlamaForCausalLM"):
        models_config.MODELS_CONFIG_MAP[name] = Replaced
    found["replaced entry"] = configured(opt)
    found["replaced entry of an encoded one"] = configured(llama)
    found["calls"] = list(calls)
    ModelRegistry.register_model("LlamaForCausalLM", OTHER_CLASS)
    found["stock name"] = configured(llama)
    return found


def test_what_registers_late_is_seen(config):
    llama, alias = config("LlamaForCausalLM"), config("TeleChat3ForCausalLM")
    opt = config("OPTForCausalLM", model_type="opt")
    found = in_new_process(
        register_late, llama, config("BiasedLlama"), alias, opt, env=ON
    )
    assert found["before"] == found["replaced entry of an encoded one"] == [0]
    assert_refused(found["own name"], f"BiasedLlama is run by {OTHER_CLASS} here")
    assert_refused(found["override"], "TeleChat3ForCausalLM is run by", OTHER_CLASS)
    assert_refused(found["stock name"], "LlamaForCausalLM is run by", OTHER_CLASS)
    assert_refused(found["replaced entry"], "OPTForCausalLM is not encoded")
    assert found["calls"] == ["OPTForCausalLM", "LlamaForCausalLM"]


# What registered before it.


def register_early(llama, mistral):
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from lab.other_models import BiasedLlama

    ModelRegistry.register_model("MistralForCausalLM", BiasedLlama)
    load_general_plugins()
    stands = ModelRegistry.models["MistralForCausalLM"].model_cls is BiasedLlama
    return stands, configured(mistral), configured(llama)


def test_a_class_of_a_hardware_plugin_stays_and_is_refused(config):
    mistral = config("MistralForCausalLM", model_type="mistral")
    stands, refused, encoded = in_new_process(
        register_early, config("LlamaForCausalLM"), mistral, env=ON
    )
    assert stands
    assert_refused(refused, "MistralForCausalLM is run by", OTHER_CLASS)
    assert encoded == [0]


# Several architectures, ours among them, and configurations that are used again.


def configure_again(paths, opt):
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    found = {name: configured(path) for name, path in paths.items()}

    def again(path):
        args = EngineArgs(model=path, skip_tokenizer_init=True)
        model_config, outcomes = args.create_model_config(), []
        for _ in range(2):
            try:
                record = VllmConfig(model_config=model_config).additional_config["scx"]
                outcomes.append((record["layers"], model_config.hf_config.architectures))
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        return outcomes

    return found, again(opt), again(paths["stock"])


def test_each_configuration_is_seen_also_one_that_is_used_again(config):
    paths = {
        "stock": config("LlamaForCausalLM"),
        "ours": config("LlamaSCXForCausalLM"),
        "second": config("NotRegistered", "LlamaForCausalLM"),
        "first": config("LlamaForCausalLM", "OPTForCausalLM"),
        "not the first": config("OPTForCausalLM", "LlamaForCausalLM"),
    }
    opt = config("OPTForCausalLM", model_type="opt")
    found, refused, encoded = in_new_process(configure_again, paths, opt, env=ON)
    assert_refused(found.pop("not the first"), "OPTForCausalLM is not encoded")
    assert list(found.values()) == [[0]] * 4
    for outcome in refused:
        assert_refused(outcome, "OPTForCausalLM is not encoded")
    assert encoded == [([0], ["LlamaSCXForCausalLM"])] * 2


# Plugins that do not load at the first attempt.


def raises():
    raise RuntimeError("another plugin")


def try_again_after_another_plugin(llama, opt):
    import importlib.metadata

    found = importlib.metadata.entry_points(group=GROUP)
    another = EntryPoint("another", "tests.test_plugin:raises", GROUP)
    importlib.metadata.entry_points = lambda **_: [another, *found]
    return [configured(model) for model in (llama, opt, llama)]


def test_another_plugin_that_raises_does_not_leave_ours_out(config):
    opt = config("OPTForCausalLM", model_type="opt")
    first, refused, encoded = in_new_process(
        try_again_after_another_plugin, config("LlamaForCausalLM"), opt, env=ON
    )
    assert first == "RuntimeError: another plugin"
    assert_refused(refused, "OPTForCausalLM is not encoded")
    assert encoded == [0]


def try_again_after_ours(llama, opt):
    from vllm import ModelRegistry

    found = [configured(llama)]
    os.environ["SCX_ENC_LAYERS"] = "0"
    register_model, registered = ModelRegistry.register_model, []

    def fail_once(name, path):
        registered.append(name)
        if len(registered) == 3:
            raise RuntimeError("half way")
        register_model(name, path)

    type(ModelRegistry).register_model = lambda _, name, path: fail_once(name, path)
    return found + [configured(model) for model in (llama, opt, llama)]


def test_our_own_plugin_that_raised_half_way_is_called_again(config):
    opt = config("OPTForCausalLM", model_type="opt")
    malformed, half_way, refused, encoded = in_new_process(
        try_again_after_ours,
        config("LlamaForCausalLM"),
        opt,
        env={"SCX_ENC_LAYERS": "x"},
    )
    assert malformed.startswith("SCXConfigError: SCX_ENC_LAYERS='x'")
    assert half_way == "RuntimeError: half way"
    assert_refused(refused, "OPTForCausalLM is not encoded")
    assert encoded == [0]


def try_again_without_a_library(llama):
    import sys

    del scx.plugin.register
    sys.modules["scx.plugin.register"] = None  # its import raises
    found = [configured(llama) for _ in range(2)]
    del sys.modules["scx.plugin.register"]
    return [*found, configured(llama)]


def test_a_package_that_cannot_be_imported_is_missed_each_time(config):
    llama = config("LlamaForCausalLM")
    *missing, encoded = in_new_process(try_again_without_a_library, llama, env=ON)
    for found in missing:
        assert "scx.plugin.register" in found
    assert encoded == [0]


def look_up_without_a_seam(owner, name):
    from vllm.plugins import load_general_plugins

    delattr(getattr(__import__(owner, fromlist=["_"]), name[0]), name[1])
    try:
        load_general_plugins()
    except SCXUnsupportedError as error:
        return str(error)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("vllm.config", ("VllmConfig", "try_verify_and_update_config")),
        (
            "vllm.v1.worker.worker_base",
            ("WorkerWrapperBase", "initialize_from_config"),
        ),
    ],
)
def test_a_vllm_without_what_we_stand_at_is_refused_by_name(owner, name):
    message = in_new_process(look_up_without_a_seam, owner, name)
    assert message.startswith(f"this vLLM has no {'.'.join(name)}, without which")


def test_a_lookup_never_raises_and_the_call_does(monkeypatch):
    def fail():
        raise ImportError("no such library")

    monkeypatch.setattr(register, "join", fail)
    found = scx.init_vllm_plugin
    with pytest.raises(ImportError, match="no such library"):
        found()
    with pytest.raises(AttributeError, match="'scx' has no attribute 'other'"):
        scx.other  # noqa: B018


# Layers that another plugin changed.


def what_runs_is_refused():
    """By what was changed: what is said of a layer, or None."""
    from torch import nn
    from vllm.model_executor.models.qwen3 import Qwen3Attention

    from scx.models.base import _require_stock
    from scx.models.qwen3_scx import Qwen3SCXAttention
    from tests.ropes import ROPES, build

    class Mine(Qwen3Attention):
        pass

    def forward(self, *args):
        return args

    def say(found=Qwen3Attention, rotary=None, norm=None, **more):
        layer = Qwen3SCXAttention.__new__(Qwen3SCXAttention)
        nn.Module.__init__(layer)
        layer.rotary_emb = rotary or build(ROPES["default"])
        layer.q_norm, layer.k_norm = nn.Identity(), nn.Identity()
        for each in (layer.q_norm, layer.k_norm):
            type(each).__module__, type(each).forward.__module__ = "vllm.x", "vllm.x"
        layer.qkv_proj = layer.o_proj = layer.attn = nn.Identity()
        layer.q_size = layer.kv_size = 4
        if norm:
            layer.k_norm = norm
        for name, part in more.items():
            setattr(layer, name, part) if part else delattr(layer, name)
        try:
            _require_stock(found, layer)
        except SCXUnsupportedError as error:
            return str(error)

    rope = build(ROPES["default"])
    patched = build(ROPES["default"])
    patched._forward_method = forward
    said = {
        "nothing": say(),
        "longrope": say(rotary=build(ROPES["longrope"])),
        "a subclass": say(found=Mine),
        "another class of vLLM's": say(found=type(rope)),
        "RoPE by another class": say(rotary=type("Mine", (type(rope),), {})),
        "RoPE's method": say(rotary=patched),
        "a norm": say(norm=nn.LayerNorm(4)),
        "another part": say(gate=nn.Identity()),
        "a part less": say(o_proj=None),
    }
    Qwen3Attention.forward = forward
    return said | {"its method": say()}


def test_a_layer_that_another_plugin_changed_is_refused_by_name():
    said = in_new_process(what_runs_is_refused)
    assert said.pop("nothing") is said.pop("longrope") is None
    assert "not the class that is encoded" in said.pop("another class of vLLM's")
    assert said.pop("a part less") == (
        "Qwen3Attention has no o_proj in this vLLM, on which the encoded attention "
        "relies: use a version that was run, or unset SCX_ENC_LAYERS"
    )
    assert said.pop("another part") == (
        "Qwen3Attention has a gate in this vLLM, which the encoded attention would leave "
        "out: use a version that was run, or unset SCX_ENC_LAYERS"
    )
    for what, line in said.items():
        assert "which another plugin put in the place of vLLM's own" in line, what
        assert len(line.splitlines()) == 1


# Ranks, each of which may be on a node of its own.


def ranks_say(*records, patience=60):
    """What each rank raises, or None; a record "-" is a rank without this package."""
    from datetime import timedelta
    from unittest import mock

    from torch.distributed import HashStore

    store = HashStore()

    def say(rank):
        if records[rank] == "-":
            return None
        try:
            register.require_alike(store, rank, len(records), records[rank])
        except SCXNotEncodedError as error:
            return str(error)

    with (
        mock.patch.object(register, "PATIENCE", timedelta(seconds=patience)),
        ThreadPoolExecutor(len(records)) as pool,
    ):
        return list(pool.map(say, range(len(records))))


def test_ranks_that_encode_alike_serve():
    record = {"layers": [0, 3], "codec": "affine"}
    assert ranks_say(record | {"ranks_here": 1}, record | {"ranks_here": 2}) == [None] * 2
    assert ranks_say(None, None, None) == [None] * 3
    assert ranks_say(None, "-") == [None] * 2


@pytest.mark.parametrize("other", [None, {"layers": [0]}, "-"])
def test_a_rank_that_encodes_does_not_serve_beside_one_that_does_not(other):
    record = {"layers": [0, 1]}
    patience = 0.5 if other == "-" else 60
    alone, beside = ranks_say(record, other, patience=patience)
    assert alone.startswith("rank 1 ")
    assert "give each node the same SCX_* variables and package" in alone
    assert (beside is None) == (other in (None, "-"))


# The backstop: what was loaded, however it was chosen.


def require(record, model, layers, monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", layers)
    vllm_config = SimpleNamespace(additional_config={"scx": record} if record else {})
    register.require_encoded(vllm_config, SimpleNamespace(get_model=lambda: model))


def loaded(encoded, layers=4):
    """A model of our class, of which the first `encoded` layers are encoded."""
    from torch import nn

    from scx.models.attention import SCXAttention
    from scx.models.llama_scx import LlamaSCXForCausalLM

    def layer(i):
        attention = SCXAttention() if i < encoded else nn.Module()
        return SimpleNamespace(self_attn=attention)

    model = LlamaSCXForCausalLM.__new__(LlamaSCXForCausalLM)
    nn.Module.__init__(model)
    # The second of two pipeline stages does not have the others.
    model.model = SimpleNamespace(
        start_layer=0,
        end_layer=layers,
        layers=[layer(i) if i < layers else object() for i in range(8)],
    )
    return model


RECORD = {"layers": [0, 1, 6]}


@pytest.mark.parametrize(
    ("layers", "record", "model"),
    [
        ("0", None, object()),
        ("all", RECORD, object()),
        ("", RECORD, object()),
        ("0", None, 4),
        ("0,1,6", RECORD, 1),
    ],
    ids=["variables", "both", "record", "no record", "one layer plain"],
)
def test_a_worker_with_another_model_does_not_serve(layers, record, model, monkeypatch):
    if isinstance(model, int):
        model = loaded(model)
    with pytest.raises(SCXNotEncodedError) as error:
        require(record, model, layers, monkeypatch)
    assert len(str(error.value).splitlines()) == 1
    assert f".{type(model).__name__} was loaded, which" in str(error.value)


def test_a_worker_with_our_model_serves(monkeypatch):
    require(RECORD, loaded(2), "0,1,6", monkeypatch)


def test_with_encoding_off_no_model_is_looked_at(monkeypatch):
    monkeypatch.setenv("SCX_ENC_LAYERS", "")
    vllm_config = SimpleNamespace(additional_config={})
    register.require_encoded(vllm_config, worker=None)


def serve_unseen(model, log, arguments):
    """An engine whose configuration we did not see, as where another plugin undid it."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    from vllm.config import VllmConfig
    from vllm.plugins import load_general_plugins

    from lab.engines import engine as start

    load_general_plugins()
    ours = VllmConfig.try_verify_and_update_config
    VllmConfig.try_verify_and_update_config = ours.__wrapped__
    try:
        start(model, skip_tokenizer_init=True, load_format="dummy", **arguments)
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_real_engine_with_a_plain_model_does_not_serve(config, tmp_path):
    kind, message = in_new_process(
        serve_unseen, config("LlamaForCausalLM"), tmp_path / "log", {}, env=ON
    )
    assert kind == "SCXNotEncodedError"
    assert "layers (0,) were to be encoded" in message
    assert "vllm.model_executor.models.llama.LlamaForCausalLM was loaded" in message


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_nor_does_one_in_processes_of_its_own(runner, config, tmp_path):
    env = ON | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    # An embedder would need a tokenizer in the first process.
    arguments = {"runner": runner, "tensor_parallel_size": 2}
    arguments |= {"convert": "classify"} if runner == "pooling" else {}
    model, log = config("LlamaForCausalLM"), tmp_path / "log"
    kind, _ = in_new_process(serve_unseen, model, log, arguments, env=env)
    assert kind == "RuntimeError"
    made = "LlamaForSequenceClassification" if runner == "pooling" else "LlamaForCausalLM"
    assert f".{made} was loaded, which does not encode them" in log.read_text()


def test_our_classes_are_those_of_the_table():
    """Each is a subclass of the stock class in whose place it runs, and of no other; and
    what it does to queries and keys before RoPE is among its row's traits."""
    from scx.models.attention import SCXAttention

    for architecture in ARCHITECTURES:
        our_class = pkgutil.resolve_name(architecture.encoded)
        assert our_class.__bases__[1] is pkgutil.resolve_name(architecture.stock)
        attention, traits = our_class.attention_class, architecture.traits
        has_norms = attention.norms is not SCXAttention.norms
        assert has_norms == bool({Trait.HEAD_NORMS, Trait.PROJECTION_NORMS} & traits)
        if attention.turns is not SCXAttention.turns:
            assert Trait.ROPE_BY_LAYER in traits


def test_a_changed_setting_is_still_refused(monkeypatch):
    monkeypatch.setattr("scx.plugin.configure.register", lambda: None)
    monkeypatch.setattr(keys, "_config_of_process", keys.parse_config(ON))
    monkeypatch.setenv("SCX_ENC_LAYERS", "3")
    with pytest.raises(SCXConfigError, match="SCX_ENC_LAYERS='3'"):
        configure(SimpleNamespace(model_config=None))
