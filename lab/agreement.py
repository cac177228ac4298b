"""What a fused form of a codec and the codec itself may differ by."""

import torch

from scx.codecs.permutation import PermutationCodec


def assert_same(ours, theirs, features):
    """A permutation moves features; in other codecs sums may have another order, which
    shows in the last place, or in a float32 whose sum nearly cancels."""
    if isinstance(features, PermutationCodec):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    else:
        last_place = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=last_place, atol=1e-5)
