"""What is compared, on what, and the records that a comparison leaves."""

import errno
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lab.cli import UsageError

LAYERS = r"off|all|\d{1,9}(?:,\d{1,9})*"
DEVICE = r"[a-z]+(?::\d+)?"
CODEC = "permutation"
"""Of arms and records that do not say another."""


@dataclass(frozen=True)
class Arm:
    """One setting of the plugin."""

    name: str
    layers: str
    """As in SCX_ENC_LAYERS; empty is off."""
    device: str
    """As in SCX_SECURE_DEVICE."""
    codec: str = CODEC
    """As in SCX_CODEC."""


NATIVE = Arm("native", "", "cpu")


def parse_arm(text: str) -> Arm:
    """The arm that LAYERS[@DEVICE][+CODEC] names. Raises UsageError."""
    match = re.fullmatch(rf"({LAYERS})(?:@({DEVICE}))?(?:\+([a-z]+))?", text)
    if match is None or (match[1] == "off" and (match[2] or match[3])):
        raise UsageError(
            f"arm {text!r}: allowed are LAYERS, LAYERS@DEVICE and LAYERS@DEVICE+CODEC, "
            "such as 0,27 or all@cuda+affine, and off"
        )
    layers, device, codec = match[1], match[2] or "cpu", match[3] or CODEC
    if layers == "off":
        return Arm("off", "", device)
    if layers != "all":
        layers = ",".join(map(str, sorted({int(layer) for layer in layers.split(",")})))
    name = f"{layers}@{device}" + ("" if codec == CODEC else f"+{codec}")
    return Arm(name, layers, device, codec)


@dataclass(frozen=True)
class Workload:
    """Prompts of equal size that are handed over at once."""

    name: str
    prompts: int
    input_tokens: int
    """Of each prompt."""
    output_tokens: int
    """For each prompt."""

    @property
    def counted_tokens(self) -> int:
        """The tokens of a run that its speed counts.

        Output alone where the name starts with ``decode``, else input and output.
        """
        decode = self.name.startswith("decode")
        return self.prompts * (self.output_tokens + (0 if decode else self.input_tokens))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mixed", 64, 1024, 128),
        Workload("prefill", 16, 1024, 1),
        Workload("decode1", 1, 32, 256),
        Workload("decode64", 64, 32, 256),
    )
}


def parse_workload(text: str) -> Workload:
    """A known workload, or the one that NAME=PROMPTSxINPUT+OUTPUT says.

    Raises UsageError.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    match = re.fullmatch(r"([A-Za-z][\w.-]*)=([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
    if match is None:
        raise UsageError(
            f"workload {text!r}: allowed are {', '.join(WORKLOADS)} and "
            "NAME=PROMPTSxINPUT+OUTPUT, such as long=1x32768+1"
        )
    return Workload(match[1], *map(int, match.groups()[1:]))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that must be equal for two speeds to be compared."""

    model: str
    """The name of the model's folder."""
    num_hidden_layers: int
    """Of the model."""
    engine_args: dict[str, Any]
    in_process: bool
    """Whether the engine runs in the process that asks it."""
    warmups: int
    seed: int
    versions: dict[str, str]
    accelerator: str
    """The GPU's name, or the CPU's where there is no GPU."""
    cores: int
    """Those that this process may use."""
    commit: str | None
    """Of this package; None outside a checkout."""
    dirty: bool | None
    """Whether a tracked file differs from the commit; None outside a checkout."""
    host: dict[str, Any] | None = None
    """As `lab.provenance.host` says; None in older records."""


@dataclass(frozen=True, kw_only=True)
class Record(Setting):
    """What one arm did on one workload in all rounds of one comparison."""

    started: str
    """When the comparison began. Equal rounds of its arms ran next to each other."""
    arm: str
    layers: str
    device: str
    codec: str = CODEC
    workload: str
    prompts: int
    input_tokens: int
    """Of each prompt."""
    output_tokens: int
    """For each prompt."""
    counted_tokens: int
    """The tokens of one run that its speed counts: see Workload."""
    build_seconds: float
    """For the engine, weights, compilation and profiling included."""
    seconds: list[float]
    """Of each round."""
    tokens_per_second: float
    """The median over the rounds."""
    tokens_per_second_min: float
    tokens_per_second_max: float
    cpu_ratio: list[float]
    """CPU seconds of the arm's processes over wall seconds, for each round."""
    ttft_seconds: float | None
    """To the first token: the median over all requests; None where vLLM does not say."""
    tpot_seconds: float | None
    """For each token after the first, likewise."""
    crossed_bytes: int | None
    """Between accelerator and secure device in all rounds; None where none is encoded."""
    utc: str
    """When the workload was finished."""

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each round."""
        return [self.counted_tokens / seconds for seconds in self.seconds]

    @property
    def sized_workload(self) -> str:
        size = f"{self.prompts}x{self.input_tokens}+{self.output_tokens}"
        return f"{self.workload} {size}"

    @property
    def encoded_layers(self) -> int:
        """How many."""
        if self.layers == "all":
            return self.num_hidden_layers
        return len(self.layers.split(",")) if self.layers else 0

    @property
    def setting(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(Setting)}


def append_record(record: Record, path: Path) -> None:
    """Add one line, whole or not at all, and in one write, for who interrupts it.

    Raises UsageError where it cannot be written, as on a full disk.
    """
    line = json.dumps(asdict(record)).encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            # On a disk that is nearly full it takes a part, and does not say so.
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def read_records(path: Path) -> list[Record]:
    """All records of a file. Raises UsageError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is no record of this benchmark: {error}"
            ) from error
    return records
