"""Answers in text: questions with choices taken apart, and what a model wrote reduced to what can be compared.

The rules are those of LLM-Adapters (Hu et al. 2023), whose files and scores the commonsense and arithmetic
benchmarks of fine-tuning papers go back to. Strings in, strings and numbers out; no model is needed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, DataError

__all__ = [
    "KINDS",
    "Question",
    "answer_kind",
    "answer_names",
    "check_kind",
    "extract_choice",
    "extract_letter",
    "extract_number",
    "grade",
    "parse_question",
]

TOLERANCE = 1e-3  # of a number, as LLM-Adapters has it
# what commonsense tasks may answer; a model is free to name a choice that its question does not have
_FAMILIES = ("true|false", "solution[12]", "answer[1-5]", "ending[1-4]", "option[12]")
_FORMAT = re.compile(r"\s*Answer format:\s*(\S+)\s*$")
_LEAD = re.compile(r"^Please [^:]*:\s*")
_NUMBER = re.compile(r"-?\d+\.?\d*")
_STATED = re.compile(r"answer is:?\s*\(?([A-E])\b")


@dataclass(frozen=True)
class Question:
    """A question with choices.

    Attributes:
        text: the question.
        choices: the texts to choose from.
        names: how an answer calls them, such as answer1.
    """

    text: str
    choices: tuple[str, ...]
    names: tuple[str, ...]


def answer_names(instruction: str) -> tuple[str, ...]:
    """What an instruction allows as answer.

    Raises:
        DataError: if it does not end with its answer format.

    Example:
        >>> answer_names("Please choose ... Answer format: option1/option2")
        ('option1', 'option2')
    """
    found = _FORMAT.search(instruction)
    if found is None:
        raise DataError(
            f"instruction {_short(instruction)} does not end with its answer format; expected for example "
            "'Answer format: answer1/answer2'."
        )
    return tuple(found[1].split("/"))


def parse_question(instruction: str) -> Question:
    """Take an instruction of the commonsense files apart.

    Raises:
        DataError: if the answer format or the text of a choice is missing.

    Example:
        >>> parse_question("Please answer with true or false, question: is ice cold?\\n\\nAnswer format: true/false")
        Question(text='is ice cold?', choices=('true', 'false'), names=('true', 'false'))
        >>> parse_question("Please choose: The sky is Option1: blue Option2: green Answer format: option1/option2")
        Question(text='The sky is', choices=('blue', 'green'), names=('option1', 'option2'))
    """
    names = answer_names(instruction)
    rest = _FORMAT.sub("", _LEAD.sub("", instruction))
    if set(names) == {"true", "false"}:
        return Question(rest.strip(), names, names)
    parts = []
    for name in names:
        before, mark, rest = rest.partition(f"{name.capitalize()}:")
        if not mark:
            raise DataError(f"instruction {_short(instruction)} names {name}, but has no '{name.capitalize()}:'.")
        parts.append(before.strip())
    return Question(parts[0], (*parts[1:], rest.strip()), names)


def extract_choice(text: str, reference: str) -> str:
    """The first name of a choice in a text, "" if there is none.

    Args:
        text: what the model wrote.
        reference: the right answer; it says which names there are (answer1 to answer5, for example).

    Raises:
        DataError: if the reference is no name of a choice.

    Example:
        >>> extract_choice("the correct answer is answer3, not answer1", "answer2")
        'answer3'
    """
    family = next((family for family in _FAMILIES if re.fullmatch(family, reference)), None)
    if family is None:
        raise DataError(
            f"answer {reference!r} is no name of a choice; expected true, false, or solution, answer, ending or option "
            "with a number. For other answers use kind number or letter."
        )
    found = re.search(family, text)
    return found[0] if found else ""


def extract_number(text: str) -> float:
    """The last number of a text, without thousands separators; infinity if there is none.

    Example:
        >>> extract_number("3 boxes of 400 make 1,200. The answer is 1,200.")
        1200.0
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else math.inf


def extract_letter(text: str) -> str:
    """The letter of the last "the answer is", else the first capital from A to E, "" if there is none.

    LLM-Adapters has the second rule only, which takes the B of "But" for an answer. Of the 252 answers in its aqua
    file that state a letter, that rule reads 204 rightly, and both rules together all.

    Example:
        >>> extract_letter("Before tax it costs 20. The answer is (C).")
        'C'
        >>> extract_letter("D) 64 m")
        'D'
    """
    stated = _STATED.findall(text)
    if stated:
        return str(stated[-1])
    found = re.search("[A-E]", text)
    return found[0] if found else ""


def _grade_choice(text: str, reference: str) -> tuple[bool, bool]:
    found = extract_choice(text, reference)
    return found == reference, bool(found)


def _grade_number(text: str, reference: str) -> tuple[bool, bool]:
    try:
        wanted = float(str(reference).replace(",", ""))
    except ValueError as error:
        raise DataError(f"answer {reference!r} is no number; for letters use kind letter.") from error
    found = extract_number(text)
    return abs(found - wanted) <= TOLERANCE, math.isfinite(found)


def _grade_letter(text: str, reference: str) -> tuple[bool, bool]:
    if not re.fullmatch("[A-E]", reference):
        raise DataError(f"answer {reference!r} is no letter from A to E; for numbers use kind number.")
    found = extract_letter(text)
    return found == reference, bool(found)


# which answers there are: choices of commonsense tasks, numbers of arithmetic ones, letters of aqua and mathqa
KINDS: dict[str, Callable[[str, str], tuple[bool, bool]]] = {
    "commonsense": _grade_choice,
    "number": _grade_number,
    "letter": _grade_letter,
}


def answer_kind(reference: str) -> str:
    """The kind of answers that a file has, by the right answer of one of its rows.

    Example:
        >>> [answer_kind(text) for text in ("answer2", "true", "18.0", "C")]
        ['commonsense', 'commonsense', 'number', 'letter']
    """
    try:
        float(reference)
    except ValueError:
        return "letter" if reference in ("A", "B", "C", "D", "E") else "commonsense"
    return "number"


def check_kind(kind: str) -> None:
    """Raise `ConfigError` for a kind of answers that is unknown."""
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown; expected one of {', '.join(KINDS)}.")


def grade(kind: str, text: str, reference: Any) -> tuple[bool, bool]:
    """Whether a text gives the right answer, and whether it gives any.

    Args:
        kind: commonsense, number or letter.
        text: what the model wrote.
        reference: the right answer as the file has it.

    Raises:
        ConfigError: if the kind is unknown.
        DataError: if the reference is not of that kind.

    Example:
        >>> grade("number", "7 - 3 = 4 crayons. The answer is 4.", "4.0")
        (True, True)
    """
    check_kind(kind)
    return KINDS[kind](text, str(reference))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
