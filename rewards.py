"""Rewards: rules that read the text of a completion, and nothing else.

Each is a pure function `(completion, row) -> float`; `row` holds at least `options` (a list of
texts, empty for open questions) and `answer` (the right option's text or letter, or a number).
Training adds up accuracy and format with equal weight (arXiv 2503.05132).

How this departs from the paper's code:
1. "Left", "left.", "(B) left" and "three" are right where "left", its option B and "3" are. There
   only the exact string was, and the model was punished for its spelling.
2. Without a tag the accuracy is 0. There free text was searched for letters, and the "a" of
   "I see a dog and a cat." was option (A).
3. What names two options is never right, so listing them all does not pay.
4. Doubled, nested and empty tags fail the format, a trailing newline does not.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any
from unicodedata import normalize

Row = Mapping[str, Any]

# Nothing that a model emits may make scoring slow. In characters:
MAX_ANSWER = 200  # an answer longer than the longest option by more than this is an essay
MAX_TEXT = 10_000  # of a longer text only the two ends are searched; 1024 tokens are about 5000


# --- rewards --------------------------------------------------------------------------------------


def extract_answer(completion: str) -> str | None:
    """Content of the last well-formed `<answer>…</answer>`, stripped; None where there is none."""
    start = completion.rfind("<answer>", 0, max(0, completion.rfind("</answer>")))
    if start < 0:
        return None
    start += len("<answer>")
    return completion[start : completion.find("</answer>", start)].strip()


def accuracy_reward(completion: str, row: Row) -> float:
    """1.0 if the last `<answer>…</answer>` states the right answer and no other, else 0.0."""
    answer = extract_answer(completion)
    return float(answer is not None and is_correct(answer, row))


def format_reward(completion: str, row: Row) -> float:
    """1.0 for `<think>…</think> <answer>…</answer>` and only whitespace around them, else 0.0.

    The prompt ends with `<think>`: a completion without one gets that one back. The answer must not
    be empty; what is thought is the model's own affair.
    """
    text = completion if "<think>" in completion else "<think>" + completion
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    thought, _, rest = text.strip().partition("</think>")
    before, _, tagged = rest.partition("<answer>")
    answer, _, after = tagged.partition("</answer>")
    in_order = thought.startswith("<think>") and not before.strip() and not after.strip()
    return float(in_order and answer.strip() != "")


def length_reward(completion: str, row: Row) -> float:
    """0.001 per token, the naive reward that made texts long and not thoughtful (arXiv 2503.05132).

    A function of text alone knows no tokenizer, so a token is a word between whitespace here.
    """
    return 0.001 * len(completion.split())


REWARDS: dict[str, Callable[[str, Row], float]] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "length": length_reward,
}


# --- what a text states, and whether it is right: one rule for training and for evaluation --------


def is_correct(answer_text: str, row: Row) -> bool:
    """Whether `answer_text`, without its tags, states the row's answer and no other."""
    options, answer = list(row.get("options") or []), row["answer"]
    if len(answer_text) > MAX_ANSWER + max(map(len, [answer, *options])):
        return False
    right = stated_option(answer, options)
    if right is not None:
        return stated_option(answer_text, options) == right
    number = stated_number(answer)
    if number is not None and _words(answer).split()[0] == number:
        return stated_number(answer_text) == number
    return _spelling(answer_text) == _spelling(answer) != ""


def stated_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the one option that `text` names, by its text or letter; None for none or several.

    Where options contain one another ("square", "red square") the longest counts. A negation in the
    same sentence makes it None, and so does any other number beside an option that is a number.
    """
    spelled = text.strip().lower()
    for index, option in enumerate(options):
        if spelled == option.strip().lower():
            return index
    texts = [_words(option).removesuffix(" . ") for option in options]
    # "Dr. Smith" is also "Dr Smith", and the option "(A) left" also "left".
    bare = [_words(OWN_LETTER.sub("", option)).replace(" . ", "") for option in options]
    # At least A to F: the "C" of "(C) left" contradicts "left" even where there are two options.
    letters = [f" {letter} " for letter in ascii_lowercase[: max(6, len(options))]]
    words, named = _words(text), set()
    for names in (texts, bare, letters):  # texts first: the options may be "A" and "B" themselves
        for name in sorted(filter(None, names), key=len, reverse=True):
            if name in words:
                named |= {index for index, other in enumerate(names) if other == name}
                words = words.replace(name, NAMED)
    if len(named) != 1 or max(named) >= len(options):
        return None
    index = named.pop()
    option_words = bare[index].split()
    if len(option_words) == 1 and _is_number(option_words[0]):
        other_number = any(map(_is_number, words.split()))
        return None if other_number or _spoiled(words, NEGATIONS | QUALIFIERS) else index
    if not NEGATIONS.isdisjoint(option_words):  # "No, it is not" states "no", "not false" does not
        return None if f" not {NAMED}" in words else index
    return None if _spoiled(words, NEGATIONS) else index


def stated_number(text: str) -> str | None:
    """The one number that `text` states ("three chairs": "3"); None for none or several."""
    words = _words(text)
    numbers = set(filter(_is_number, words.split()))
    if len(numbers) != 1:
        return None
    number = numbers.pop()
    words = words.replace(f" {number} ", NAMED)
    return None if _spoiled(words, NEGATIONS | QUALIFIERS) else number


def lenient_answer(completion: str, row: Row) -> str | None:
    """What a response answers even if it has no tag; for evaluation, never for training.

    The tagged answer where there is one. Otherwise the text after `</think>` (the whole response
    if nothing stands there) is searched: the only option that it states, as the option's text, or
    for an open question the only number; None for none or several.
    """
    answer = extract_answer(completion)
    if answer is not None:
        return answer
    text = completion.rpartition("</think>")[2].strip() or completion
    options = row.get("options")
    if not options:
        return stated_number(text)
    index = stated_option(text, options)
    return None if index is None else options[index]


# --- words ----------------------------------------------------------------------------------------
# Texts are compared as words: lower case, no punctuation, no articles, numbers by their value. One
# string holds them, each with a space on both sides (" red  square "): then `in` finds one text in
# another at the boundaries of words, in linear time.

# One character at a time: normalising a whole string is quadratic in its combining marks.
FOLD = {c: normalize("NFKC", chr(c)) for c in [*range(0xFF01, 0xFF5F), *range(0x2460, 0x24EA)]}
FOLD |= str.maketrans("’º。−–‐‑", "'°.----", "\u200b\ufeff")
FOLD |= dict.fromkeys(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹½⅓⅔¼¾"), "^")

UNITS = "one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: i for i, word in enumerate(["zero", *UNITS, *TEENS])}
VALUES |= {word: 10 * i for i, word in enumerate(TENS, start=2)}
VALUES |= {f"{t}-{u}": VALUES[t] + VALUES[u] for t in TENS for u in UNITS}
# "two dozen" are two numbers then, and never taken for 2.
VALUES |= {"half": 0.5, "dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6}

NEGATIONS = frozenset(
    "not no never neither nor none non cannot except instead opposite wrong incorrect false".split()
)
# Beside one of these a number is not the value: "√3", "3π", "minus 3", "more than 3".
QUALIFIERS = frozenset(
    "√ ^ ± ≤ ≥ π pi sqrt root squared minus negative than more least most".split()
)

# The "a" that is no letter of an option: in "a chair", "a 3D view", "a **chair**", and where a text
# was cut off after "there is a". It is one in "a", "option a", "A is closer", "A or B", "A left".
ARTICLE = re.compile(
    r"""
      (?<![Oo]ption\ )(?<![Cc]hoice\ )(?<![Aa]nswer\ )(?:
        \b(?<!<)[AaI]\ +(?=[^\W\d_]{2}|[0-9]+[-A-Za-z])
        (?!(?i:is|was|and|or|nor|vs|because)\b)
        (?!(?i:left|right|above|below|yes|no|true|false)\b(?!\ +\w))
      | \ba\ +(?=["'`*“‘])
      | (?<=\w\ )(?<!nswer\ is\ )a\s*\Z )
    """,
    re.VERBOSE,
)
NOISE = re.compile(
    r"""
      \b(?:the|an)\b
    | (?:\b[a-z])?'(?:s|d|m|ll|re|ve)\b | \b[a-z]'(?=[a-z])  # the letters of "I'd", "c'est",
    | (?<=[0-9])[a-z]\b | \b(?:e\.g|i\.e)\b                  # "3D", "e.g."
    | </[a-z]> | <[a-z](?:\ [^<>]*)?>(?=[^<])                # and HTML
    | \^\{?\\circ | (?<=[0-9]\ )degrees?\b                   # 140^\circ, 140 degrees
    """,
    re.VERBOSE,
)
OWN_LETTER = re.compile(r"\A\s*(?:\([A-Z]\)|[A-Z][.):])\s+(?=\S)")
TOKEN = re.compile(
    rf"""
      (?:(?<!\w)-)?(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)(?:/[0-9]+)?
    | (?:{"|".join(TENS)})-(?:{"|".join(UNITS)})\b
    | [^\W\d_][^\W_]*  # a word
    | [√^±≤≥]
    | [.!?;\n]+        # the end of a sentence
    """,
    re.VERBOSE,
)
NAMED = " # "  # put where an option or a number was named


def _words(text: str) -> str:
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT // 2] + "\n" + text[-MAX_TEXT // 2 :]
    text = ARTICLE.sub(" ", text.translate(FOLD)).lower().replace("n't", " not")
    text = re.sub(r"\bno +(?=[^\W\d_])", "not ", text)  # "no chairs" is not the answer "no"
    tokens = TOKEN.findall(NOISE.sub(" ", text))
    canonical = {token: f" {_canonical(token)} " for token in set(tokens)}
    return "".join([canonical[token] for token in tokens])


def _canonical(token: str) -> str:
    """One spelling for each number, and "." for the end of a sentence.

    Digits stay text, as int() and float() have their limits.
    """
    if token[-1] in ".!?;\n":
        return "."
    token = str(VALUES.get(token, token))
    if not _is_number(token):
        return token
    whole, _, decimals = token.lstrip("-").replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return "-" + number if token[0] == "-" and number != "0" else number


def _is_number(word: str) -> bool:
    return word[-1] in "0123456789" and not word[0].isalpha()


def _spoiled(words: str, spoilers: frozenset[str]) -> bool:
    """Whether a sentence that names something also holds a word that may turn it round."""
    return any(
        NAMED in sentence and not spoilers.isdisjoint(sentence.split())
        for sentence in words.split(" . ")
    )


FILLER = re.compile(r"\b(?:the|an?|final|answer|option|is|it)\b[\s:]+|\\(?:boxed|text)\b")


def _spelling(text: str) -> str:
    """Open answers that are no number ("red", "2√3") are compared with their symbols."""
    text = FILLER.sub(" ", text.translate(FOLD).lower())
    return "".join(text.split()).strip(".,:;!?'\"`*$()[]{}「」『』【】《》“”‘’«»、")


# --- self-reflection ------------------------------------------------------------------------------

# What says that a response turns back on itself (the "aha moment" of arXiv 2503.05132): regular
# expressions for whole words, in any case. Measured and reported, never rewarded.
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
    """Whether the completion holds one of `REFLECTION_PHRASES`."""
    return _REFLECTION.search(completion.lower()) is not None
