"""Passages of the language reference that comes with Python, without their last word.

They are read from `pydoc_data.topics` of the running Python when a task asks for them,
so nothing is downloaded and nothing is copied. Another version of Python may have
others.
"""

import random
import re
from pydoc_data.topics import topics
from typing import Any

SEED = 0
WORDS = range(15, 41)
"""How long a passage may be."""


def passages() -> list[dict[str, str]]:
    """`text`, all but the last word, and `word`, in an order that a seed has drawn."""
    paragraphs = dict.fromkeys(
        paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n")
    )
    found = list(dict.fromkeys(filter(None, map(last_word, paragraphs))))
    random.Random(SEED).shuffle(found)  # noqa: S311 (nothing secret)
    return [{"text": text, "word": word} for text, word in found]


def last_word(paragraph: str) -> tuple[str, str] | None:
    """The longest beginning of whole sentences whose last word is a plain one, split.

    None where there is none, or where the paragraph is no running text.
    """
    if re.search(r"^[^A-Za-z\"]", paragraph, re.MULTILINE):
        return None
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split()))
    for count in range(len(sentences), 0, -1):
        beginning = " ".join(sentences[:count])
        match = re.fullmatch(r"(.*) ([a-z]{3,})\.", beginning)
        if match and len(beginning.split()) in WORDS:
            return match[1], match[2]
    return None


def load(**_: Any) -> dict[str, Any]:
    """The passages as lm-eval's only split; it passes the task's metadata along."""
    from datasets import Dataset

    return {"test": Dataset.from_list(passages())}
