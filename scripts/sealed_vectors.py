"""Writes docs/sealed-format.json: blocks that another program can open.

    python -m scripts.sealed_vectors

The salts are drawn anew each time, as in use.
"""

import json
from pathlib import Path

from scx.keys import RootKey
from scx.sealed.format import Seal, context_of

FILE = Path(__file__).parent.parent / "docs" / "sealed-format.json"
_ROOT = bytes(range(32))
_FACTS = {"model": "00112233" * 4, "parallel": {"rank": 0}}
# In the last three, field boundaries move: no two may share a key or a name.
_TENANTS = (None, '""', '"alice"', '"bob"', '"a"name', '"a"', 'name"a"')


def vectors() -> list[dict[str, object]]:
    root = RootKey(_ROOT).for_model(_FACTS["model"])
    made = []
    for number, tenant in enumerate(_TENANTS):
        seal, block = Seal(root, context_of(_FACTS), tenant), bytes([number]) * 36
        plain = bytes(range(number * 8))
        made.append(
            {
                "root_key": _ROOT.hex(),
                "facts": _FACTS,
                "tenant": tenant,
                "block": block.hex(),
                "plain": plain.hex(),
                "name": seal.name(block),
                "sealed": b"".join(seal.seal(block, memoryview(plain))).hex(),
            }
        )
    return made


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
