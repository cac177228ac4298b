"""How the features of queries, keys and values are encoded: one file a codec.

The rows are shuffled alike in all of them, by `scx.codecs.reference`. A third codec is
one more file with a subclass of FeatureCodec and one more name in `load`.
"""

from scx.codecs.interface import FeatureCodec


def load(name: str) -> type[FeatureCodec]:
    """The codec that SCX_CODEC names, one of `scx.keys.CODECS`."""
    from scx.codecs.affine import AffineCodec
    from scx.codecs.permutation import PermutationCodec

    return {codec.name: codec for codec in (PermutationCodec, AffineCodec)}[name]
