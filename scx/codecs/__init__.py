"""What encodes: rows, and the features of queries, keys and values, one file per codec.

`rows` and `plain` serve all codecs. Another codec is one more file with a subclass of
FeatureCodec, and one more row in `scx.keys.CODECS`.
"""

import pkgutil

from scx.codecs.interface import FeatureCodec
from scx.keys import CODECS


def load(name: str) -> type[FeatureCodec]:
    """The codec that SCX_CODEC names, one of `scx.keys.CODECS`."""
    return pkgutil.resolve_name(CODECS[name])
