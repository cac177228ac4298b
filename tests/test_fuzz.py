"""Any setting and any shape: the right result, or one clear line."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.root_keys import new_key_file
from scx import codecs, keys
from scx.devices.plain import PlainSecureLayer
from scx.errors import SCXConfigError
from scx.keys import CODECS, RootKey

# What a variable can hold: no null, and text that is not UTF-8 as Python reads it.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
DEVICES = [
    "cpu",
    "cpu:0",
    "cuda",
    "cuda:7",
    "meta",
    "xpu",
    "mps",
    "hpu",
    "vulkan",
    " CPU",
]


@pytest.fixture(scope="module")
def key_files(tmp_path_factory):
    """Paths of every kind by mode and size, only the first of which is right."""
    folder = tmp_path_factory.mktemp("keys")
    paths = [folder, folder / "none", folder / "key" / "below"]
    for mode, size in ((0o600, 32), (0o644, 32), (0o600, 31), (0o600, 0)):
        path = new_key_file(folder / f"{mode:o}-{size}", os.urandom(size))
        path.chmod(mode)
        paths.append(path)
    return [str(paths[3]), *map(str, paths)]


@settings(max_examples=300)
@given(data=st.data())
def test_all_variables_at_once_are_a_setting_or_one_clear_line(data, key_files):
    layers = st.lists(st.integers(0, 99)).map(lambda items: ",".join(map(str, items)))
    likely = {
        "SCX_ENC_LAYERS": st.one_of(layers, st.just("all")),
        "SCX_SECURE_DEVICE": st.sampled_from(DEVICES),
        "SCX_ENABLE_DEBUG": st.sampled_from(["1", "off", "TRUE", " no "]),
        "SCX_KEY_FILE": st.sampled_from(["", *key_files]),
        "SCX_HOST_THREADS": st.sampled_from(["", "1", " 16"]),
        "SCX_CODEC": st.sampled_from([*CODECS, "Affine", " permutation"]),
    }
    # Rarely is everything right by chance, so most values are likely ones.
    environ = {
        name: data.draw(st.one_of(values, values, values, TEXT), label=name)
        for name, values in likely.items()
        if data.draw(st.booleans())
    }
    try:
        config = keys.parse_config(environ)
        RootKey.load(config)
    except SCXConfigError as error:
        (line,) = str(error).splitlines()
        (name,) = [name for name in environ if line.startswith(f"{name}=")]
        value = environ[name].strip() if name == "SCX_KEY_FILE" else environ[name]
        assert line.startswith(f"{name}={value!r}: ")
        assert len(line) > len(f"{name}={value!r}: ")
        return
    assert config.codec in CODECS
    assert torch.zeros(1, device=config.secure_device).item() == 0
    assert config.enabled == bool(config.enc_layers)
    count = data.draw(st.integers(1, 120))
    if config.enc_layers != "all" and max(config.enc_layers, default=0) >= count:
        with pytest.raises(SCXConfigError, match=r"^SCX_ENC_LAYERS=.* this model has"):
            config.layers_of(count)
    else:
        assert set(config.layers_of(count)) <= set(range(count))


@st.composite
def shapes(draw):
    """One encoded layer of any model, and one step."""
    head_dim = draw(st.integers(1, 17))
    return SimpleNamespace(
        codec=draw(st.sampled_from([*CODECS])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        tokens=draw(st.sampled_from([0, 1, 2, 7, 33])),
        padding=draw(st.sampled_from([0, 1, 5])),
        hidden_size=draw(st.integers(1, 24)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(0, head_dim // 2)),
        is_neox_style=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def attention(q, k, v, kv_heads):
    """Causal attention, in whatever features q, k and v are given: (T, N x D)."""
    tokens, group = len(q), q.shape[1] // k.shape[1]
    k, v = (x.unflatten(1, (kv_heads, -1)).repeat_interleave(group, 1) for x in (k, v))
    q = q.unflatten(1, (kv_heads * group, -1))
    scores = torch.einsum("qhd,khd->hqk", q, k)
    sees = torch.ones(tokens, tokens).tril().bool()
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def reference(shape, hidden, weight, positions, angles):
    """The plain layer, in numpy and float64: rotation as complex multiplication."""
    query = shape.kv_heads * shape.group
    count = query + 2 * shape.kv_heads
    heads = (hidden @ weight).reshape(len(hidden), count, shape.head_dim)
    q, k, v = np.split(heads, [query, query + shape.kv_heads], axis=1)
    turned = []
    for part in (q, k):
        part = part.copy()
        half = shape.rotary_dim // 2
        if shape.is_neox_style:
            first, second = slice(0, half), slice(half, 2 * half)
        else:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        z = part[..., first] + 1j * part[..., second]
        z = z * np.exp(1j * angles[positions])[:, None]
        part[..., first], part[..., second] = z.real, z.imag
        turned.append(part)
    outputs = np.zeros_like(q)
    for t in range(len(q)):
        for n in range(query):
            scores = turned[1][: t + 1, n // shape.group] @ turned[0][t, n]
            weights = np.exp(scores - scores.max())
            outputs[t, n] = weights @ v[: t + 1, n // shape.group] / weights.sum()
    return outputs.reshape(len(q), query * shape.head_dim)


def strided(tensor):
    """The same values, of which no two are neighbours in memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@settings(max_examples=100, deadline=None)
@given(shape=shapes())
def test_an_encoded_layer_of_any_shape_is_the_plain_one(shape):
    random = np.random.default_rng(shape.seed)
    heads = shape.kv_heads * (shape.group + 2)
    hidden = random.standard_normal((shape.tokens, shape.hidden_size))
    weight = random.standard_normal((shape.hidden_size, heads * shape.head_dim))
    weight /= np.sqrt(shape.hidden_size * shape.head_dim)
    positions = random.integers(0, 64, shape.tokens)
    angles = np.outer(np.arange(64), random.random(shape.rotary_dim // 2))
    expected = reference(shape, hidden, weight, positions, angles)

    def tensor(array):
        result = torch.tensor(array).to(shape.dtype)
        return strided(result) if shape.strided else result

    features = codecs.load(shape.codec).derive(
        RootKey.draw(), 3, range(shape.kv_heads), shape.head_dim
    )
    table = tensor(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    query = shape.kv_heads * shape.group
    cpu = torch.device("cpu")
    layer = PlainSecureLayer(cpu, features, table, shape.is_neox_style, query)
    # Padding holds what was there before, which may be anything.
    padding = np.full((shape.padding, shape.hidden_size), np.nan)
    padded = tensor(np.concatenate([hidden, padding]))
    rows = layer.encode_rows(padded)
    places = tensor(np.concatenate([positions, np.zeros(shape.padding, int)])).long()
    q, k, v = layer.encode_features(tensor((rows @ tensor(weight)).numpy()), places)
    real = slice(shape.tokens)
    attended = q.new_full(q.shape, torch.nan)
    attended[real] = attention(q[real], k[real], v[real], shape.kv_heads)
    output = torch.zeros(len(q), query * shape.head_dim, dtype=shape.dtype)
    layer.decode_features(strided(attended) if shape.strided else attended, output)

    assert output.shape == (shape.tokens + shape.padding, query * shape.head_dim)
    # Sums of 24 products of about one, in float32, as the affine codec's maps of
    # condition 4 are in either type: 24 x 4 x 2^-24 is below 1e-5.
    torch.testing.assert_close(
        output[real].double(), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )
