"""Prompts of an exact length, for any tokenizer.

The length of a text is the number of tokens that vLLM sees in it: those of
`tokenizer.encode(text)`, special tokens included. The text is made here from a seed:
entries of an invented logbook, with numbers and names drawn for each, so that prefix
caching finds nothing that two prompts share.
"""

import random
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

from scx.errors import SCXError

# A {name} stands for one of the choices of that name, {4} for a number of four digits.
SENTENCES = {
    "entry": [
        "Entry {5}, {place}. {fact} {fact} {fact}\n\n",
        "Entry {5}, written by {person}. {fact} {fact} {fact} {fact}\n\n",
        "Entry {5}. {fact} {remark} {fact} {fact} {remark}\n\n",
    ],
    "fact": [
        "{when}, {person} {moved} {3} {goods} from {place} to {place}.",
        "{when}, the {part} of {place} {failed} after {4} hours of use.",
        "Of the {4} {goods} at {place}, {2} were {state} and {2} were given away.",
        "{person} asked {person} why the {part} {failed}, and got {2} answers.",
        "The price of {goods} rose to {3} coins, while {place} sold {2} at {2}.",
        "{person} measured the {part} as {2}.{2} metres, and {person} as {2}.{2}.",
        "It took {2} people and {3} minutes to bring the {part} to {place}.",
        "If {3} more {goods} arrive {when}, {person} will open {place}.",
    ],
    "remark": [
        "Nobody at {place} wrote down the reason.",
        "This was {state} work, said {person}.",
        "The {part} was left as it was.",
        "{person} disagreed, and counted the {goods} again: {4}.",
        "See also entries {5} and {5}.",
    ],
}
WORDS = {
    "when": "on day {3}, before noon, in week {2}, at {2} degrees, after rain",
    "person": "the miller, Ada, an apprentice, the captain, Ilse, Tomas, the clerk, "
    "a visitor, two sailors, Noor, the inspector, old Bram",
    "place": "the north gate, the salt works, Harbour Street, the upper mill, "
    "warehouse {2}, the ferry, workshop {2}, the tower, Quay {2}, the dry dock",
    "goods": "barrels, maps, copper pipes, sacks of barley, lamps, ropes, clay bricks, "
    "letters, wheels, crates of pears, lenses, bells",
    "part": "main valve, crane, east window, clock, steam pump, roof, drive belt, "
    "compass, oven door, water wheel, signal wire, stair",
    "moved": "carried, sent, lent, rolled, returned, counted and shipped",
    "failed": "stopped, broke, bent, began to leak, slipped, froze, jammed",
    "state": "damp, careful, unlabelled, slow, spoiled, well kept, painted",
}
GRAMMAR = SENTENCES | {name: words.split(", ") for name, words in WORDS.items()}

# Where no cut has the exact length, as between a space and a digit, one a little
# before it has, with one of these after it.
NEARBY = 64
MARKS = ("", ".", " a", " a b")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers and of vLLM have it."""

    def encode(self, text: str, /) -> list[int]:
        """Token ids, special tokens included."""
        ...


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """The number of tokens that vLLM sees in a text."""
    return len(tokenizer.encode(text))


def make_prompt(tokenizer: Tokenizer, length: int, seed: int = 0) -> str:
    """A text of exactly `length` tokens. Texts of other lengths begin otherwise.

    Raises SCXError where there is none.
    """
    return _fit(_entries(f"{seed} {length}"), tokenizer, length)


def load_prompt(path: Path, tokenizer: Tokenizer, length: int, number: int = 0) -> str:
    """The text of a file, cut or continued to exactly `length` tokens.

    The file may have been made for another tokenizer or length. Number 0 is the file
    from its beginning; under any other number an entry drawn for it comes first.
    Raises SCXError for a file that cannot be read, and where no text has that length.
    """
    try:
        # Bytes: a translated line end could be another token.
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SCXError(
            f"no prompt in {path} ({error}): python data/make_prompts.py makes some"
        ) from error
    more = _entries(f"{number} {text}")
    first = [next(more), text] if number else [text]
    return _fit(chain(first, more), tokenizer, length)


def _entries(seed: str) -> Iterator[str]:
    """The endless text of a seed, in paragraphs of some 60 words."""
    source = random.Random(seed)  # noqa: S311 (nothing secret)

    def expand(text: str) -> str:
        return re.sub(r"\{(\w+)\}", choice, text)

    def choice(match: re.Match[str]) -> str:
        name = match[1]
        if name.isdecimal():
            digits = int(name)
            return str(source.randrange(10 ** (digits - 1), 10**digits))
        return expand(source.choice(GRAMMAR[name]))

    while True:
        # Facts and remarks begin with a capital.
        yield re.sub(r"(?<=\. )[a-z]", lambda match: match[0].upper(), expand("{entry}"))


def _fit(pieces: Iterator[str], tokenizer: Tokenizer, length: int) -> str:
    """The beginning of the joined pieces that has exactly `length` tokens."""
    fewest = count_tokens(tokenizer, "") + 1
    if length < fewest:
        raise SCXError(f"a prompt of {length} tokens: of this tokenizer, from {fewest}")
    text = next(pieces)
    while count_tokens(tokenizer, text) < length:
        # Twice as long before it is encoded again.
        enough = 2 * len(text)
        while len(text) < enough:
            text += next(pieces)

    # The text up to `low` has fewer tokens, that up to `high` has not, whether or not
    # the number grows with every character in between.
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(tokenizer, text[:middle]) < length:
            low = middle
        else:
            high = middle
    for end in range(high, max(0, high - NEARBY), -1):
        # A space at the end would be lost where the text of a file is stripped.
        stem = text[:end].rstrip()
        for mark in MARKS:
            if count_tokens(tokenizer, stem + mark) == length:
                return stem + mark
    raise SCXError(f"a prompt of {length} tokens: none was found for this tokenizer")
