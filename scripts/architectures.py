"""The architectures that docs/compatibility.md lists, from the package's own table.

python -m scripts.architectures    writes them into docs/compatibility.md
"""

from lab.tables import as_markdown
from scripts.compatibility import DOCS
from scripts.gpu_tests import insert
from scx import codecs
from scx.keys import CODECS
from scx.plugin.architectures import ARCHITECTURES, Architecture
from scx.plugin.refusals import clashes

BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"


def row(architecture: Architecture) -> dict[str, str]:
    serving = [name for name in CODECS if not clashes(codecs.load(name), architecture)]
    return {
        "architecture": architecture.name,
        "attention, beyond RoPE and softmax": ", ".join(
            sorted(trait.value for trait in architecture.traits)
        ),
        "codecs": ", ".join(serving),
    }


def table() -> str:
    return as_markdown([row(architecture) for architecture in ARCHITECTURES])


def main() -> None:
    document = DOCS / "compatibility.md"
    document.write_text(insert(document.read_text(), f"\n{table()}\n", BEGIN, END))


if __name__ == "__main__":
    main()
