"""The choice of a secure device, and what each of them is to the rest of the package."""

import dataclasses
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
from scx.errors import SCXUnsupportedError
from scx.keys import CODECS, RootKey

DEVICES = {
    "plain": ("PlainSecureLayer", False, False),
    "host": ("HostSecureLayer", True, False),
    "accelerator": ("AcceleratorSecureLayer", True, True),
}
"""By module: the class, and whether it runs in graphs and is the accelerator itself."""


class Unfused(PermutationCodec):
    """A codec without fused kernels for the host."""

    host_kernels = ""


RANK = Rank(
    num_heads=4,
    hidden_size=32,
    dtype=torch.float32,
    max_tokens=16,
    is_neox_style=True,
    accelerator=torch.device("cpu"),
    secure_device=torch.device("cpu"),
    workers=1,
)
TABLES = [torch.randn(16, 8), torch.randn(1, 8)]


def test_the_accelerator_of_a_rank_is_refused_by_its_number():
    accelerator = torch.device("cuda:2")
    rank = dataclasses.replace(RANK, accelerator=accelerator, secure_device=accelerator)
    with pytest.raises(SCXUnsupportedError, match="is the accelerator of this rank"):
        PlainSecureLayer.build([], [], rank)


def class_of(module):
    if module == "accelerator":
        pytest.importorskip("triton")
    return getattr(importlib.import_module(f"scx.devices.{module}"), DEVICES[module][0])


@pytest.mark.parametrize(
    ("secure_device", "is_cuda", "codec", "chosen"),
    [
        ("cpu", True, PermutationCodec, "host"),
        ("cpu:0", True, PermutationCodec, "host"),
        ("cuda", True, PermutationCodec, "accelerator"),
        ("cuda", True, Unfused, "accelerator"),
        # What the fused kernels do not do.
        ("cpu", True, Unfused, "plain"),
        # Devices that have none.
        ("cuda:1", True, PermutationCodec, "plain"),
        ("xpu", True, PermutationCodec, "plain"),
        ("cpu", False, PermutationCodec, "plain"),
        ("cuda", False, PermutationCodec, "plain"),
    ],
)
def test_the_device_is_the_one_that_serves(secure_device, is_cuda, codec, chosen):
    assert devices.choose(secure_device, is_cuda, codec) is class_of(chosen)


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_is_fused_beside_a_gpu(name):
    assert devices.choose("cpu", True, codecs.load(name)) is class_of("host")


@pytest.mark.parametrize("module", DEVICES)
def test_no_device_is_derived_from_another(module):
    secure = class_of(module)
    assert secure.__bases__ == (SecureLayer,)
    assert (secure.in_graphs, secure.on_accelerator) == DEVICES[module][1:]


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
    shifts = made.encode_queries(heads) @ made.encode_keys(heads).T - heads @ heads.T
    assert bool((shifts.abs() > 1e-3).any()) == codec.shifts_scores
    torch.testing.assert_close(shifts, shifts[:, :1].expand(4, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("module", ["plain", "host"])
def test_layers_that_share_a_table_share_its_copy(module):
    shared, other = TABLES
    root = RootKey.draw()
    features = [PermutationCodec.derive(root, i, range(1), 8) for i in range(3)]
    layers = class_of(module).build(features, [shared, other, shared], RANK)
    if module == "plain":
        first, second, third = (layer._cos_sin_cache for layer in layers)
        assert first is third
        assert (len(first), len(second)) == (16, 1)
    else:
        own = layers[0]._host.workers._own
        assert own.rotary_rows.tolist() == [[0, 16], [16, 17], [0, 16]]
        assert torch.equal(torch.tensor(own.cos_sin), torch.cat([shared, other]))
        layers[0]._host.close()


class Echo(SecureLayer):
    """A fourth device, which hides nothing."""

    in_graphs = False

    @classmethod
    def build(cls, features, tables, rank):
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
    layers = devices.build(device, features, TABLES, RANK, 60.0)
    assert [type(layer) for layer in layers] == [device, device]
    if device is Echo:
        assert watched == [{3: layers[0], 5: layers[1]}]
    assert threading.active_count() - before == (device is Echo)
    assert bool(watched) == (device is Echo)


def test_layers_are_built_with_a_codec_each():
    root = RootKey.draw()
    features = {i: PermutationCodec.derive(root, i, range(1), 8) for i in (3, 5)}
    layers = devices.build(PlainSecureLayer, features, TABLES, RANK, 60.0)
    for layer, key in zip(layers, features.values(), strict=True):
        assert torch.equal(layer.features.key, key.key)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        layers[0].__reduce__()
