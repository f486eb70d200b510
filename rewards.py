"""Rewards: pure functions `(completion, row) -> float` that read text and nothing else.

`row` holds at least `options` (texts, empty for an open question) and `answer` (the right option's
text or letter, or the open answer). Training adds accuracy and format with equal weight (arXiv
2503.05132). How this departs from the paper's code:

1. An answer counts by what it states, not by its spelling. "Left." and "(B)" are right where
   option B is "left", and "1/2" is right where the answer is "0.5" (see core/values.py).
2. Without an `<answer>` tag the accuracy is 0. The paper's code searched free text for letters, so
   "I see a dog and a cat." counted as option (A).
3. An answer that names two options is wrong, so listing all options does not pay.
4. Doubled or nested tags and an empty answer fail the format. A trailing newline does not.
"""

import re
from collections.abc import Sequence
from unicodedata import normalize

from core.values import DENIAL, NEGATION, VOIDS_NUMBER, agree, values, words

# --- rewards --------------------------------------------------------------------------------------


def extract_answer(completion: str) -> str | None:
    """The stripped content of the last well-formed `<answer>…</answer>`, or None."""
    start = completion.rfind("<answer>", 0, max(0, completion.rfind("</answer>")))
    if start < 0:
        return None
    start += len("<answer>")
    return completion[start : completion.find("</answer>", start)].strip()


def accuracy_reward(completion: str, row: dict) -> float:
    """1.0 if the last `<answer>…</answer>` states the right answer and no other, else 0.0."""
    answer = extract_answer(completion)
    return float(answer is not None and is_correct(answer, row))


def format_reward(completion: str, row: dict) -> float:
    """1.0 for `<think>…</think> <answer>…</answer>` with only whitespace around them, else 0.0.

    The answer must not be empty. A `<think>` that ended the prompt is put in front.
    """
    text = completion if "<think>" in completion else "<think>" + completion
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    match = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    return float(match is not None and match[1].strip() != "")


def length_reward(completion: str, row: dict) -> float:
    """0.001 per word: the naive reward that made texts long, not thoughtful (arXiv 2503.05132)."""
    return 0.001 * len(completion.split())


REWARDS = {"accuracy": accuracy_reward, "format": format_reward, "length": length_reward}

# --- what an answer states: the same rules for training and for evaluation ------------------------

NAMED = " # "  # replaces the name of an option in a text
FILLER = re.compile(r" (?:final|answer|option|is|it|答  案|\.) ")
LETTERED = re.compile(r"\(?[A-H][).:] +\w")  # an open answer with its letter, "B. left"
CLOSED = ([*"abcdefgh"], ["yes", "no"], ["true", "false"])  # open answers, judged like options
# The letter in "A: cup", "a) cup", "(a) cup", "[A] cup", "A.cup", "A - cup", "Option A: cup" and
# where it is all, but none in "A: B". The digit in "1. cup", but none in "1.5 m".
OWN_LETTER = re.compile(
    r"\A\s*(?:(?:option|choice|answer) +)?[(\[【*]*"
    r"([A-Z]|\d(?=(?:[.):\]】、*]+\s*|\s+[-–—]\s+)[^\W\d]))"
    r"(?:\s*[)\]】*.:、|\t\n]+\s*|\s+[-–—]\s+|\s*\Z)(?!\s*[A-Z]\s*\Z)",
    re.IGNORECASE,
)


def is_correct(answer_text: str, row: dict) -> bool:
    """Whether `answer_text`, without its tags, states the row's answer and no other.

    Options, letters and yes or no are compared by index, open answers that begin with a number by
    value and unit, and other open answers by their words.
    """
    options, answer = list(row.get("options") or []), row["answer"]
    lettered = [answer] if LETTERED.match(answer) else []
    options = options or next((few for few in CLOSED if words(answer).strip(" .") in few), lettered)
    if len(answer_text) > 200 + max(map(len, [answer, *options])):
        return False  # an essay
    right = stated_option(answer, options)
    if right is not None:
        return stated_option(answer_text, options) == right
    value = open_value(answer)
    if value is not None:
        stated = values(words(answer_text))
        return bool(stated) and all(agree(one, value) for one in stated)
    said, expected = (FILLER.sub(" ", words(text)).split() for text in (answer_text, answer))
    return said == expected != []


def stated_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the one option that `text` names by text, letter or value, else None.

    Each name in the text narrows down the options that it can mean: "(B) left" means left if left
    is B, and nothing otherwise. If one name contains another ("red square", "square"), the longer
    one counts. A negation in the same sentence as a name voids the answer.
    """
    spelled = text.strip().lower()
    for index, option in enumerate(options):
        if option.strip().lower() == spelled:
            return index
    names = _names(options)
    option_values = [open_value(_own_letter(option)[1]) for option in options]
    sentences = words(text).split(" . ")
    rest, meant, found = "".join(sentences), set(range(len(options))), []
    for name in sorted(names, key=len, reverse=True):
        if name in rest:
            rest, meant = rest.replace(name, NAMED), meant & names[name]
            found.append(name)
    for said in dict.fromkeys(values(rest)) if any(option_values) else []:
        meant &= {i for i, value in enumerate(option_values) if value and agree(said, value)}
        found.append(f" {said[0]} ")
    if not found or len(meant) != 1:
        return None
    index = meant.pop()
    if DENIAL.search(words(options[index])):  # "No, it is not" states "no"
        return None if f" not {NAMED}" in rest else index
    voids = VOIDS_NUMBER if option_values[index] else NEGATION
    if voids.search(words(options[index])):  # "wrong way": only words next to it count
        sentences = [re.sub("|".join(map(re.escape, found)), NAMED, s) for s in sentences]
        found = [NAMED]
    voided = any(voids.search(s) and any(name in s for name in found) for s in sentences)
    return None if voided else index


def _names(options: Sequence[str]) -> dict[str, set[int]]:
    """Each name that a text can use, as words, with the indices of the options it can mean.

    Names are texts and letters. An option's own letter ("B: cup") wins over its position. Letters
    up to F that no option has mean none, so "(C) left" names nothing where there are two options.
    """
    letters = [chr(ord("a") + index) for index in range(max(6, len(options)))]
    names: dict[str, set[int]] = {f" {letter} ": set() for letter in letters}
    own = [_own_letter(option)[0] for option in options]
    if len(set(own) - {""}) < len(options):
        own = letters
    elif set(own) <= set(letters):
        letters = own
    for index, option in enumerate(options):
        for letter in (letters[index], own[index]):
            names.setdefault(f" {letter} ", set()).add(index)
        for text in (option, _own_letter(option)[1]):
            names.setdefault(words(text).replace(" . ", ""), set()).add(index)
    names.pop("", None)
    return names


def _own_letter(option: str) -> tuple[str, str]:
    """The letter or digit that an option begins with, or "", and the rest of its text."""
    match = OWN_LETTER.match(option := normalize("NFKC", option))
    return (match[1].lower(), option[match.end() :]) if match else ("", option)


def open_value(answer: str) -> tuple[str, str] | None:
    """Number and unit of an answer that begins with its only number ("5 cm"), else None."""
    found = values(words(answer))
    begins = re.match(r"(?:.* = )? -?\d", words(answer))
    return found[0] if begins and len(found) == 1 and agree(found[0], found[0]) else None


def stated_value(text: str) -> str | None:
    """The one value that a free text states, with its unit ("It is 7 p.m.": "7 pm"), else None.

    Nouns are no units here: "There are 3 dogs." states "3".
    """
    found = [*dict.fromkeys(values(words(text)))]
    if not found or not all(agree(found[0], other) for other in found):
        return None
    number, unit = found[0]
    return f"{number} {unit}" if re.fullmatch("[°%]|[ap]m|[cmk]?m[23]?", unit) else number


# --- self-reflection ------------------------------------------------------------------------------

# Phrases with which a response turns back on itself (the "aha moment" of arXiv 2503.05132), as
# regular expressions for whole words in any case. Their share is logged, never rewarded.
REFLECTION_PHRASES = (
    r"wait(?! (?:for|at|in|on|to|until)\b)",  # not "people wait for a bus"
    r"hold on(?! to\b)",
    r"hm+",
    r"actually,",
    r"on second thoughts?",
    r"on closer (?:look|inspection)",
    r"let me (?:check|verify|re-?(?:consider|count|do|evaluate|examine|read|think))",
    r"(?:look|check|count|think)(?:ing)?(?: \w+){0,3} again",
    r"(?:re|double)[- ]?check(?:ing)?",
    r"i (?:made a mistake|was (?:wrong|mistaken))",
)
_REFLECTION = re.compile(rf"\b(?:{'|'.join(REFLECTION_PHRASES)})(?!\w)")


def reflects(completion: str) -> bool:
    """Whether the completion contains one of `REFLECTION_PHRASES`."""
    return _REFLECTION.search(completion.lower()) is not None
