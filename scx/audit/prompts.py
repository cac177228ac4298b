"""The texts of an audit: built-in prompts, and public text for the adversary."""

from pathlib import Path
from typing import Any

import torch

from scx.errors import SCXError

BUILT_IN = (
    # Long ones: known prefixes of up to 64 tokens leave a rest to recover.
    (
        "The patient, a retired bus driver of 71, came to the clinic on Tuesday "
        "because of pain in his left knee. He said that it had begun in March, after "
        "he helped his daughter to move house, and that stairs had become difficult. "
        "He takes tablets for high blood pressure and is allergic to penicillin. On "
        "examination the joint was warm and slightly swollen, and bending it beyond "
        "ninety degrees hurt. An x-ray showed that the space between the bones was "
        "narrow on the inner side. We talked about exercise, weight and pain relief, "
        "and agreed that an operation is not needed now. He will see the "
        "physiotherapist twice a week, keep a diary of the pain, and come back in six "
        "weeks. If the knee locks or swells suddenly he is to call us the same day. A "
        "letter was sent to his family doctor, with copies of the pictures, and his "
        "daughter was told about the plan by telephone."
    ),
    (
        "To: the board. Subject: third quarter, confidential. Revenue rose to 41.7 "
        "million, six per cent more than last year, but the margin fell because steel "
        "and freight became dearer. The plant in Porto will close by the end of May; "
        "112 people work there, and 40 of them will be offered a place in Lyon. We "
        "have not told the union yet and intend to do so on the ninth. The bank has "
        "agreed to extend the loan for two years if we keep debt below three times "
        "earnings. Two buyers have asked about the packaging unit. The first offers "
        "18 million in cash, the second 22 million in shares, and our advisers prefer "
        "the cash. Please do not forward this note, and send your questions to the "
        "finance office before Friday at noon."
    ),
    (
        "import csv\n"
        "\n"
        "\n"
        "def totals(path, column):\n"
        '    """Sum a column of a file by customer."""\n'
        "    result = {}\n"
        "    with open(path, newline='') as file:\n"
        "        for row in csv.DictReader(file):\n"
        "            name = row['customer'].strip().lower()\n"
        "            result[name] = result.get(name, 0.0) + float(row[column])\n"
        "    return result\n"
        "\n"
        "\n"
        "def report(path):\n"
        "    for name, value in sorted(totals(path, 'amount').items()):\n"
        "        print(f'{name:20} {value:10.2f}')\n"
        "\n"
        "\n"
        "if __name__ == '__main__':\n"
        "    report('orders.csv')\n"
    ),
    "My password for the archive is seven green bottles and a ladder.",
    "What is the boiling point of water on a mountain of 3000 metres?",
    "Translate to French: the train to the coast leaves at half past nine.",
    "Dear Ms Alvarez, thank you for your letter of 14 February about the roof.",
    "Write a short poem about a lighthouse that has lost its lamp.",
    "The recipe needs two eggs, 200 grams of flour, a pinch of salt and some milk.",
    "SELECT name, salary FROM staff WHERE office = 'Rome' ORDER BY salary DESC;",
    "Explain in one sentence why the sky is blue and sunsets are red.",
    "She opened the door slowly, and the dog, which had waited all day, ran out.",
)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts in `path`, one per line, or the built-in ones if it is None."""
    if path is None:
        return BUILT_IN
    prompts = tuple(line for line in path.read_text().splitlines() if line.strip())
    if not prompts:
        raise SCXError(f"--prompts {path}: no prompt in it; it holds one a line")
    return prompts


def public_text(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Token ids (n,) of text that everybody has: Python's own reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    # No token is longer than this on average.
    ids = tokenizer.encode(text[: 16 * tokens], add_special_tokens=False)
    return torch.tensor(ids[:tokens])
