"""Twenty prompts of mixed kind and length."""

MIXED = [
    "The capital of France is",
    "Q: What is 2+2?\nA:",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8, 13,",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Le chat est assis sur",
    "水的化学式是",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are: first,",
    "A",
    "!!! ??? ...",
    "<html><head><title>",
    "Water boils at 100 degrees Celsius because",
    "To make bread you need flour, water, salt and",
    "In 1969, the first person to walk on the Moon was",
    "red green blue " * 20,
    "The quick brown fox jumps over the lazy dog. " * 30,
    "Translate to German: 'Good morning, how are you?'\nGerman:",
    "\n".join(f"{i} squared is {i * i}." for i in range(60)),
]
