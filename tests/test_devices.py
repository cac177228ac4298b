"""The choice of a secure device, and what each of them is to the rest of the package."""

import importlib
import threading

import pytest
import torch

from scx import codecs, devices
from scx.codecs.interface import FeatureCodec
from scx.codecs.permutation import PermutationCodec
from scx.devices import watchdog
from scx.devices.interface import Rank, SecureLayer, Traffic
from scx.devices.plain import PlainSecureLayer
from scx.keys import CODECS, RootKey

DEVICES = {
    "plain": ("PlainSecureLayer", False, False, True),
    "host": ("HostSecureLayer", True, False, False),
    "accelerator": ("AcceleratorSecureLayer", True, True, False),
}
"""By module: the class, and whether it runs in graphs, is the accelerator itself, and
norms heads."""


class Unfused(PermutationCodec):
    """A codec without fused kernels for the host."""

    host_kernels = ""


RANK = Rank(
    num_heads=4,
    hidden_size=32,
    dtype=torch.float32,
    max_tokens=16,
    cos_sin_cache=torch.randn(16, 8),
    is_neox_style=True,
    secure_device=torch.device("cpu"),
    workers=1,
)


def class_of(module):
    if module == "accelerator":
        pytest.importorskip("triton")
    return getattr(importlib.import_module(f"scx.devices.{module}"), DEVICES[module][0])


@pytest.mark.parametrize(
    ("secure_device", "is_cuda", "codec", "norms", "chosen"),
    [
        ("cpu", True, PermutationCodec, False, "host"),
        ("cpu:0", True, PermutationCodec, False, "host"),
        ("cuda", True, PermutationCodec, False, "accelerator"),
        ("cuda", True, Unfused, False, "accelerator"),
        # What the fused kernels do not do.
        ("cpu", True, PermutationCodec, True, "plain"),
        ("cuda", True, PermutationCodec, True, "plain"),
        ("cpu", True, Unfused, False, "plain"),
        # Devices that have none.
        ("cuda:1", True, PermutationCodec, False, "plain"),
        ("xpu", True, PermutationCodec, False, "plain"),
        ("cpu", False, PermutationCodec, False, "plain"),
        ("cuda", False, PermutationCodec, False, "plain"),
    ],
)
def test_the_device_is_the_one_that_serves(secure_device, is_cuda, codec, norms, chosen):
    found = devices.choose(secure_device, is_cuda, codec, norms)
    assert found is class_of(chosen)


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_is_fused_beside_a_gpu(name):
    assert devices.choose("cpu", True, codecs.load(name), False) is class_of("host")


@pytest.mark.parametrize("module", DEVICES)
def test_no_device_is_derived_from_another(module):
    secure = class_of(module)
    assert secure.__bases__ == (SecureLayer,)
    facts = secure.in_graphs, secure.on_accelerator, secure.norms_heads
    assert facts == DEVICES[module][1:]


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_says_what_it_is(name):
    codec = codecs.load(name)
    assert issubclass(codec, FeatureCodec)
    assert codec.name == name
    importlib.import_module(f"scx.kernels.host.{codec.host_kernels}")
    made = codec.derive(RootKey.draw(), 0, range(1), 8)
    heads = torch.randn(4, 8)
    survive = sorted(made.encode_keys(heads).flatten().tolist()) == sorted(
        heads.flatten().tolist()
    )
    assert survive == codec.moves_only


class Echo(SecureLayer):
    """A fourth device, which hides nothing."""

    in_graphs = False

    @classmethod
    def build(cls, features, norms, rank):
        return [cls() for _ in features]

    def encode_rows(self, hidden_states):
        return hidden_states

    def encode_features(self, qkv, positions):
        return qkv, qkv, qkv

    def decode_features(self, attention, output):
        output.copy_(attention)

    @property
    def traffic(self):
        return Traffic()


class Beside(Echo):
    on_accelerator = True


@pytest.mark.parametrize("device", [Echo, Beside])
def test_another_device_needs_no_more_than_its_class(device, monkeypatch):
    """It is watched and reported, unless the accelerator would have to be asked."""
    watched = []
    monkeypatch.setattr(watchdog, "watch", watched.append)
    root = RootKey.draw()
    features = {i: PermutationCodec.derive(root, i, range(1), 8) for i in (3, 5)}
    before = threading.active_count()
    layers = devices.build(device, features, [(), ()], RANK, 60.0)
    assert [type(layer) for layer in layers] == [device, device]
    if device is Echo:
        assert watched == [{3: layers[0], 5: layers[1]}]
    assert threading.active_count() - before == (device is Echo)
    assert bool(watched) == (device is Echo)


def test_layers_are_built_with_a_codec_each():
    root = RootKey.draw()
    features = {i: PermutationCodec.derive(root, i, range(1), 8) for i in (3, 5)}
    layers = devices.build(PlainSecureLayer, features, [(), ()], RANK, 60.0)
    for layer, key in zip(layers, features.values(), strict=True):
        assert torch.equal(layer.features.key, key.key)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        layers[0].__reduce__()
