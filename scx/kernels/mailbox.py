"""The memory through which the two halves of a trip to the host talk."""

from dataclasses import dataclass

import torch

from scx.kernels.protocol import CHUNKS, FLAG_STRIDE, MAX_CHUNK_ROWS, staging_rows


@dataclass(frozen=True)
class Mailbox:
    """Pinned memory that both sides map. The accelerator can write it at any time."""

    inbox: torch.Tensor
    """Rows from the accelerator, flat."""
    outbox: torch.Tensor
    """Rows for the accelerator, flat."""
    positions: torch.Tensor
    """int64, one per row of the inbox."""
    ready: torch.Tensor
    """int64, one cache line per chunk: the turn in which the chunk was sent."""
    done: torch.Tensor
    """int64, one cache line per chunk: the turn in which it was answered, or FORSAKEN."""
    request: torch.Tensor
    """int64 (1,): the hop, shifted by ROWS_BITS, and the number of rows."""

    @classmethod
    def allocate(cls, max_tokens: int, max_width: int, dtype: torch.dtype) -> "Mailbox":
        """For steps of at most `max_tokens` rows of `max_width` elements. Flags are 0."""
        chunks = max_tokens // MAX_CHUNK_ROWS + 2 * CHUNKS
        rows = staging_rows(max_tokens)

        def zeros(count: int, kind: torch.dtype) -> torch.Tensor:
            # The device is named because vLLM builds models under a default device.
            pinned = torch.cuda.is_available()
            return torch.zeros(count, dtype=kind, device="cpu", pin_memory=pinned)

        return cls(
            inbox=zeros(rows * max_width, dtype),
            outbox=zeros(rows * max_width, dtype),
            positions=zeros(rows, torch.int64),
            ready=zeros(chunks * FLAG_STRIDE, torch.int64),
            done=zeros(chunks * FLAG_STRIDE, torch.int64),
            request=zeros(1, torch.int64),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory."""
        return sum(tensor.nbytes for tensor in vars(self).values())
