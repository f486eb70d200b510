"""Rewards against responses of every kind seen in the field, with values decided by hand."""

import random
import time
from itertools import product

import pytest

import rewards
from rewards import (
    REWARDS,
    accuracy_reward,
    extract_answer,
    format_reward,
    is_correct,
    length_reward,
    lenient_answer,
    reflects,
    stated_number,
    stated_option,
)

SIDE = {"options": ["right", "left"], "answer": "left"}
SIDES = {"options": ["above", "left", "upper left", "right"], "answer": "left"}
COUNT = {"options": ["3", "2", "1", "0"], "answer": "(A)"}
TEN = {"options": ["1", "10", "11"], "answer": "10"}
DEPTH = {"options": ["table", "chair"], "answer": "(B)"}
TABLE = {"options": ["table", "chair"], "answer": "table"}
SQUARE = {"options": ["red square", "square", "circle"], "answer": "square"}
RED = {"options": ["red square", "square", "circle"], "answer": "red square"}
POINT = {"options": ["A is closer", "B is closer"], "answer": "(B)"}
LETTER = {"options": ["B", "A"], "answer": "B"}
NO = {"options": ["yes", "no"], "answer": "no"}
YES = {"options": ["yes", "no"], "answer": "yes"}
FALSE = {"options": ["true", "false"], "answer": "false"}
STILL = {"options": ["moved left", "did not move"], "answer": "did not move"}
COMMA = {"options": ["up, then left", "up"], "answer": "up, then left"}
STOP = {"options": ["It moved. Then it stopped.", "It is 3 p.m."], "answer": "(A)"}
LETTERED = {"options": ["(A) left", "(B) right"], "answer": "(A)"}
CLOSER = {"options": ["(A) is closer", "(B) is closer"], "answer": "(B)"}
DEGREES = {"options": ["30 degrees", "60 degrees"], "answer": "60 degrees"}
ANGLE = {"options": [], "answer": "140°"}
THREE = {"options": [], "answer": "3"}
THOUSAND = {"options": [], "answer": "1000"}
BELOW_ZERO = {"options": [], "answer": "-5"}
ROOT = {"options": [], "answer": "2√3"}
COLOUR = {"options": [], "answer": "red"}

# What stands inside the answer tag, and whether it is right.
# fmt: off
ANSWERS = [
    # letters
    (SIDE, 1, "(B)", "B", "b", "b.", "B)", "[B]", "(b)", "**B**", "<B>", "B:", "Option B",
     "choice b"),
    (SIDE, 1, "option B.", "The answer is (B).", "Answer: B", "It's B", "I'd say B", "Ⓑ", "Ｂ",
     "（B）"),
    (SIDE, 0, "(A)", "A", "a", "C", "(C)", "AB", "A B", "A, B", "A/B", "A or B", "(A)(B)",
     "B and A"),
    (TABLE, 1, "A", "a", "(a)", "a)", "option a", "The answer is a", "A is correct", "A: table"),
    # texts
    (SIDE, 1, "left", "Left", "LEFT", "left.", " left \n", "'left'", "“left”", "left!", "the left"),
    (SIDE, 1, "The answer is left", "it's left", "It is on the left side of the cat.", "left side"),
    (SIDE, 1, r"\boxed{left}", r"$\boxed{\text{left}}$", r"\boxed{B}", "<b>left</b>", "*left*"),
    (SIDE, 1, "「left」", "left。", "【left】", "（left）", "ｌｅｆｔ", "«left»", "to the left、"),
    (SIDE, 0, "right", "leftmost", "lefty", "le ft", "", " ", "?", "()", "neither", "both",
     "links"),
    # letter and text
    (SIDE, 1, "(B) left", "B: left", "B. left", "B) left", "B left", "b left", "left (B)",
     "B, left"),
    (SIDE, 0, "(A) left", "(B) right", "A: left", "A left", "a left", "Option A left", "B-right"),
    (SIDE, 0, "(C) left", "The answer is A left", "left (A)"),
    # two options, all options
    (SIDE, 0, "left or right", "left, right", "left right", "left/right", "right and left",
     "left_right"),
    (SIDE, 0, "(A) right (B) left", "A. right\nB. left", "left, not right", "B, not A",
     "(B) left (A)"),
    # negations
    (SIDE, 0, "not left", "isn't left", "It is not on the left.", "left is wrong", "never left"),
    (SIDE, 0, "not B", "cannot be left", "anything except left", "No, left",
     "the opposite of left"),
    # an option inside another one
    (SIDES, 1, "left", "(B)", "to the left"),
    (SIDES, 0, "upper left", "the upper left", "upper-left", "left, upper left", "(C)", "(C) left"),
    (SQUARE, 1, "square", "the square", "a square", "B", "Square."),
    (SQUARE, 0, "red square", "the red square", "red square and square", "squares", "(A) square"),
    (RED, 1, "red square", "the red square", "a red  square", "Red-Square", "(A) red square"),
    (RED, 0, "square", "red", "red circle", "(B) red square"),
    # the article is no letter
    (DEPTH, 1, "a chair", "A chair", "a chair.", "It is a chair", "A chair is closer",
     "(B) a chair"),
    (DEPTH, 0, "a", "A", "a table", "(A) chair", "A: chair", "armchair", "chairs",
     "table or chair"),
    (DEPTH, 0, "I see a dog and a cat.", "The chair is closer than the table.", "a dog", "as a"),
    # options that are letters, and that hold them
    (LETTER, 1, "B", "b", "(B)", "B.", "point B"),
    (LETTER, 0, "A", "(A)", "a", "A or B"),
    (POINT, 1, "B", "(B)", "B is closer", "(B) B is closer", "Point B is closer.", "Point B"),
    (POINT, 0, "A", "A is closer", "(A) B is closer", "A is closer than B"),
    # options that are numbers
    (COUNT, 1, "3", "3.0", "03", "three", "Three", "3.", "+3", "(3)", "$3$", "３", "③",
     r"\boxed{3}"),
    (COUNT, 1, "3 chairs", "three chairs", "There are 3 chairs.", "3 (three)", "A", "(A) 3", "A 3"),
    (COUNT, 0, "2", "30", "33", "13", "3.5", "4", "-3", "−3", "minus 3", "twenty-three", "1,003"),
    (COUNT, 0, "3 or 2", "3, 2", "3 2 1 0", "3-4", "3/4", "3 of 5", "(B) 3", "B 3", "not 3", "two"),
    (COUNT, 0, "√3", "3²", "3½", "3π", "three hundred", "3 dozen", "at least 3", "more than 3"),
    (TEN, 1, "10", "ten", "10.0", "B", "10 dogs"),
    (TEN, 0, "1", "11", "1 0", "100", "one", "1 or 10"),
    # options that are negations
    (NO, 1, "no", "No.", "NO", "No, it is not.", "No, it isn't", "(B) no", "The answer is no"),
    (NO, 0, "yes", "not", "yes or no", "no chairs", "not no", "Yes, there is no doubt", "know"),
    (YES, 1, "yes", "Yes.", "Yes, it is.", "(A)"),
    (YES, 0, "no", "not yes", "yes/no", "No, yes"),
    (FALSE, 1, "False", "false.", "It is false"),
    (FALSE, 0, "true", "not false", "isn't false", "true or false"),
    (STILL, 1, "did not move", "It did not move.", "didn't move", "(B)", "Did not move"),
    (STILL, 0, "moved", "did move", "move", "moved left", "did not move, moved left"),
    (COMMA, 1, "up, then left", "up then left", "Up, then left.", "(A)"),
    (COMMA, 0, "up", "left", "then left"),
    # options of several sentences, with a letter of their own, with a unit
    (STOP, 1, "It moved. Then it stopped", "it moved. then it stopped!", "it moved then it stopped",
     "(A)"),
    (STOP, 0, "It moved.", "It is 3 p.m", "(B) It moved. Then it stopped."),
    (LETTERED, 1, "left", "A", "(A)", "(A) left", "A. left", "the left"),
    (LETTERED, 0, "right", "B", "(B) left", "(A) right", "left or right"),
    (CLOSER, 1, "B is closer", "(B) is closer.", "B"),
    (CLOSER, 0, "A is closer", "is closer", "A"),
    (DEGREES, 1, "60", "60°", "60 degrees", "sixty", "60.0", "B"),
    (DEGREES, 0, "30°", "6", "60 or 30", "degrees"),
    # open questions: numbers by value, the rest by spelling
    (ANGLE, 1, "140", "140°", "140.0", "140 degrees", "140º", r"140^\circ", r"$140^{\circ}$"),
    (ANGLE, 1, "x = 140", "∠ABC = 140°", "The answer is 140.", "１４０"),
    (ANGLE, 0, "14", "-140", "1400", "140.5", "140 or 40", "180 - 40 = 140", "not 140", "(A)", ""),
    (THREE, 1, "3", "three", "3 chairs", "3.000", "There are three."),
    (THREE, 0, "3 or 4", "√3", "3π", "minus three", "33", "3 million", "C", "3²"),
    (THOUSAND, 1, "1000", "1,000", "1000.0", "１，０００", "a thousand", "$1,000$"),
    (THOUSAND, 0, "1.000", "1,00", "1 000", "10,00", "1,000,000", "2 thousand", "1"),
    (BELOW_ZERO, 1, "-5", "−5", "–5", "-5.0", "$-5$", "x=-5"),
    (BELOW_ZERO, 0, "5", "- 6", "10-5", "five"),
    (ROOT, 1, "2√3", "2 √3", "$2√3$", "(2√3)", "The answer is 2√3."),
    (ROOT, 0, "2", "3", "23", "2√3 or 3√2", "√3"),
    (COLOUR, 1, "red", "Red.", "the red", "The answer is: **red**.", r"\boxed{red}", "it is red"),
    (COLOUR, 0, "not red", "red and blue", "blue", "", "infrared", "the"),
]
# fmt: on
ANSWERS = [(row, right, text) for row, right, *texts in ANSWERS for text in texts]


@pytest.mark.parametrize("row, right, text", ANSWERS)
def test_a_tagged_answer_is_right_if_and_only_if_it_names_the_right_option_alone(row, right, text):
    assert accuracy_reward(f"so</think><answer>{text}</answer>", row) == right
    assert is_correct(text.strip(), row) == bool(right)


RIGHT, WRONG = "left", "right"
LONG = "left " * 10_000
# response to SIDE, accuracy, format, lenient answer
RESPONSES = [
    ("<think>look</think><answer>left</answer>", 1, 1, RIGHT),
    ("look</think><answer>left</answer>", 1, 1, RIGHT),
    ("look</think>\n\n<answer>\nleft\n</answer>\n", 1, 1, RIGHT),
    (" \n<think>\nline\nline\n</think> <answer>(B)\n left</answer> ", 1, 1, "(B)\n left"),
    ("<think></think><answer>left</answer>", 1, 1, RIGHT),
    ("</think><answer>left</answer>", 1, 1, RIGHT),
    ("look</think><answer>right</answer>", 0, 1, WRONG),
    ("look</think><answer>no idea</answer>", 0, 1, "no idea"),
    ("1 < 2</think><answer>left</answer>", 1, 1, RIGHT),
    # something missing
    ("<answer>left</answer>", 1, 0, RIGHT),
    ("<think>look<answer>left</answer>", 1, 0, RIGHT),
    ("look <answer>left</answer></think>", 1, 0, RIGHT),
    ("<think>look</think>", 0, 0, None),
    ("look</think> left", 0, 0, RIGHT),
    ("look</think><answer>left", 0, 0, RIGHT),
    ("look</think>left</answer>", 0, 0, RIGHT),
    ("look</think></answer>left<answer>", 0, 0, RIGHT),
    ("look</think><answer>left<answer>", 0, 0, RIGHT),
    ("look</think><answer>left</ answer>", 0, 0, RIGHT),
    # empty
    ("", 0, 0, None),
    (" \n", 0, 0, None),
    ("look</think><answer></answer>", 0, 0, ""),
    ("look</think><answer> \n </answer>", 0, 0, ""),
    ("left</think><answer></answer>", 0, 0, ""),
    # too much
    ("look</think><answer>left</answer> so left", 1, 0, RIGHT),
    ("look</think> so <answer>left</answer>", 1, 0, RIGHT),
    ("well <think>look</think><answer>left</answer>", 1, 0, RIGHT),
    ("<think>a</think><think>b</think><answer>left</answer>", 1, 0, RIGHT),
    ("<think><think>b</think></think><answer>left</answer>", 1, 0, RIGHT),
    ("<think>b</think></think><answer>left</answer>", 1, 0, RIGHT),
    ("<answer>left</answer><think>look</think>", 1, 0, RIGHT),
    ("look</think><answer>left</answer><answer>left</answer>", 1, 0, RIGHT),
    ("look</think><answer><think>left</think></answer>", 1, 0, "<think>left</think>"),
    # several answers: the last well-formed one counts
    ("a</think><answer>right</answer><answer>left</answer>", 1, 0, RIGHT),
    ("a</think><answer>left</answer><answer>right</answer>", 0, 0, WRONG),
    ("maybe <answer>right</answer></think><answer>left</answer>", 1, 0, RIGHT),
    ("a</think><answer>left</answer><answer>right", 1, 0, RIGHT),
    ("a</think><answer>left</answer> right</answer>", 1, 0, RIGHT),
    ("a</think><answer>right<answer>left</answer></answer>", 1, 0, RIGHT),
    ("a</think><answer><answer>left</answer>", 1, 0, RIGHT),
    ("</answer><answer>left</answer>", 1, 0, RIGHT),
    ("a</think><answer>left</answer><answer></answer>", 0, 0, ""),
    # no tag: only what is stated alone counts, and only leniently
    ("left", 0, 0, RIGHT),
    ("Right.", 0, 0, WRONG),
    ("(B)", 0, 0, RIGHT),
    ("The answer is (B) left.", 0, 0, RIGHT),
    (r"The answer is \boxed{left}.", 0, 0, RIGHT),
    ("The answer is 「left」。", 0, 0, RIGHT),
    ("I do not know the colours. It is left.", 0, 0, RIGHT),
    ("left or right", 0, 0, None),
    ("(A) right\n(B) left", 0, 0, None),
    ("(A) left", 0, 0, None),
    ("It is not left.", 0, 0, None),
    ("I see a dog and a cat.", 0, 0, None),
    ("This is a 3D image, e.g. of a 'dog' and a **cat**.", 0, 0, None),
    ("It shows a cat, I'd say. There is a", 0, 0, None),
    ("<p>An image.</p> <a href='b'>c'est d'accord</a>", 0, 0, None),
    ("<think>left or right? The cat is right there", 0, 0, None),
    ("<think>left or right?</think> It is left.", 0, 0, RIGHT),
    ("<think>It is left.</think>\n", 0, 0, RIGHT),
    # repetition
    (LONG, 0, 0, RIGHT),
    ("right " + LONG, 0, 0, None),
    (LONG + "right", 0, 0, None),
    (f"<answer>{LONG}</answer>", 0, 0, LONG.strip()),
    (f"{LONG}</think><answer>left</answer>", 1, 1, RIGHT),
    ("<answer>left</answer>" * 10_000, 1, 0, RIGHT),
]


@pytest.mark.parametrize("completion, accuracy, form, lenient", RESPONSES)
def test_a_response_scores_as_decided_by_hand(completion, accuracy, form, lenient):
    assert accuracy_reward(completion, SIDE) == accuracy
    assert format_reward(completion, SIDE) == form
    assert lenient_answer(completion, SIDE) == lenient


@pytest.mark.parametrize(
    "completion, row, lenient",
    [
        ("There are 3 dogs.", THREE, "3"),
        ("<think>2 and 1</think> Three.", THREE, "3"),
        ("3 dogs and 2 cats", THREE, None),
        ("No dogs", THREE, None),
        ("There are 3 dogs.", COUNT, "3"),
        ("There are 3 dogs and 5 cats.", COUNT, None),
        ("There are 7 dogs.", COUNT, None),
        ("The red square.", SQUARE, "red square"),
        ("Point B", POINT, "B is closer"),
    ],
)
def test_without_a_tag_the_only_thing_stated_is_the_lenient_answer(completion, row, lenient):
    assert accuracy_reward(completion, row) == 0
    assert lenient_answer(completion, row) == lenient


def test_the_content_of_the_last_well_formed_answer_is_extracted():
    assert extract_answer("<answer>a</answer> <answer>\n b \n</answer>") == "b"
    assert extract_answer("<answer>a<answer>b</answer>c</answer>") == "b"
    assert extract_answer("<answer> </answer>") == ""
    assert extract_answer("<answer>a") is extract_answer("a</answer>") is extract_answer("") is None
    assert extract_answer("</answer><answer>") is None


def test_every_spelling_of_an_answer_names_the_same_right_option():
    for answer in ("left", "(B)", "B", "b.", "(B) left", "Left"):
        row = {"options": ["right", "left"], "answer": answer}
        assert [is_correct(text, row) for text in ("left", "B", "right", "A")] == [1, 1, 0, 0]


def test_whatever_the_options_each_is_named_by_its_text_its_letter_and_both():
    for row in (SIDE, SIDES, COUNT, TEN, DEPTH, SQUARE, POINT, NO, FALSE, STILL, COMMA):
        for i, option in enumerate(row["options"]):
            letter = "ABCD"[i]
            for said in (
                option,
                option.upper(),
                f"{option}.",
                f"({letter})",
                f"{letter}) {option}",
            ):
                assert stated_option(said, row["options"]) == i, said


def test_no_option_is_stated_where_two_are_or_letter_and_text_disagree():
    for row in (SIDE, SIDES, COUNT, TEN, DEPTH, SQUARE, NO, STILL, COMMA):
        options = row["options"]
        for (i, one), (j, other) in product(enumerate(options), repeat=2):
            if i != j:
                assert stated_option(f"{one} or {other}", options) is None
                assert stated_option(f"({'ABCD'[i]}) {other}", options) is None
        assert stated_option(", ".join(options), options) is None


def test_a_number_is_stated_by_its_value():
    assert stated_number("about 1,250.50 m") == "1250.5"
    assert stated_number("-0.0") == "0" and stated_number(".5") == "0.5"
    assert stated_number("Forty-two!") == "42" and stated_number("twelve") == "12"
    assert stated_number("1 and 1.0 and one") == "1"
    assert stated_number("none") is stated_number("1 2") is stated_number("b2") is None


def test_numbers_beyond_every_numeric_type_are_compared_digit_by_digit():
    row = {"options": [], "answer": "9" * 150}
    assert is_correct("9" * 150 + ".0", row) and not is_correct("9" * 149 + "8", row)
    assert accuracy_reward(f"<answer>{'9' * 100_000}</answer>", row) == 0
    assert accuracy_reward("<answer>1e999</answer>", row) == 0
    assert accuracy_reward("<answer>inf</answer>", row) == 0


def test_an_essay_is_no_answer_but_a_long_option_is():
    option = "the robot turned to the door and " * 10 + "stopped"
    row = {"options": [option, "it did not"], "answer": option}
    assert is_correct(option.upper(), row) and is_correct(f"(A) {option}.", row)
    assert not is_correct("well, " * 50 + "left", SIDE)


def test_nothing_is_right_where_the_row_has_no_answer():
    assert not any(is_correct(text, {"options": [], "answer": ""}) for text in ("", "?", "left"))


def test_length_is_rewarded_with_a_thousandth_per_word():
    assert length_reward("one two\n three", SIDE) == pytest.approx(0.003)
    assert length_reward(" ", SIDE) == 0


def test_rewards_are_found_by_name_and_are_pure():
    assert list(REWARDS) == ["accuracy", "format", "length"]
    row = {"options": ("right", "left"), "answer": "left"}
    for reward in REWARDS.values():
        first = reward("x</think><answer>left</answer>", row)
        assert type(first) is float and first == reward("x</think><answer>left</answer>", row)
    assert row == {"options": ("right", "left"), "answer": "left"}


@pytest.mark.parametrize(
    "text",
    ["But wait! I can", "Wait, let me look again", "wait", "HMM...", "Hm, no", "Let me re-check it"]
    + ["Actually, it is red", "on second thought", "look at it again", "Let me check", "hold on."]
    + ["I made a mistake", "double-check", "Counting once more. Let me count again", "re-check"],
)
def test_turning_back_on_oneself_is_reflection(text):
    assert reflects(text) and reflects(f"First.\n{text}")


@pytest.mark.parametrize(
    "text",
    ["", "People wait for a bus", "a waiter is waiting", "It is actually red", "awaits", "hmong"]
    + ["Let me read the question", "He holds on to it, hold on to it", "again", "a check pattern"],
)
def test_ordinary_words_are_no_reflection(text):
    assert not reflects(text)


# Repeated to 100 000 characters; "·" stands for a space.
HARD = """
    <answer> </answer> <answer>left</answer> <think> </think> <answer><think> ( () [{( 9 9, 9. .9
    1,000 1/2· - -1· a a· a. A·B·C·D· left· left.· not·left· not· no· the· n't a' option·a· a·is·
    twenty- twenty·one· <a· </a> e.g. \\boxed{ ^{\\circ wait· wait·for· let·me· hmmx· look·x· · _ ''
    \u0315\u0300 \ufdfa İ ß 「左」 ３ 😀 ½ √ √1· Ⓐ \u200b \x00
""".split()


def hard_texts(length=100_000):
    texts = [(unit.replace("·", " ") * length)[:length] for unit in [*HARD, "\n"]]
    texts += [" ".join(map(str, range(length // 5)))[:length], "h" + "m" * length]
    texts += ["left" + " " * length, "a" + " " * length, "look " + "x" * length]
    texts += ["".join(map(chr, range(32, 0xD800)))]
    rng = random.Random(0)
    alphabet = "left right not <answer> </answer> < > a 3 , ( .".split() + [" ", "\n"]
    texts.append("".join(rng.choices(alphabet, k=length))[:length])
    return texts


@pytest.mark.parametrize("text", hard_texts(), ids=lambda text: ascii(text[:12]))
def test_a_hundred_thousand_hard_characters_score_in_under_50_ms(text):
    options = "left right upper·left red·square square a 10 no on·the·red it".split()
    options = [option.replace("·", " ") for option in options] + list(map(str, range(16)))
    row, open_row = {"options": options, "answer": "left"}, {"options": [], "answer": "3"}
    calls = [
        lambda text: [reward(text, row) for reward in REWARDS.values()],
        lambda text: accuracy_reward(text, open_row),
        lambda text: lenient_answer(text, row),
        lambda text: lenient_answer(text, open_row),
        lambda text: stated_option(text, options),
        lambda text: stated_number(text),
        lambda text: is_correct(text, row),
        lambda text: extract_answer(text),
        lambda text: reflects(text),
    ]
    for call in calls:
        for wrapped in (text, f"<answer>{text}</answer>"):
            fastest = float("inf")
            for _ in range(3):
                start = time.process_time()  # other processes may be busy
                call(wrapped)
                fastest = min(fastest, time.process_time() - start)
                if fastest < 0.05:
                    break
            assert fastest < 0.05


def random_rows(number, seed=0):
    rng = random.Random(seed)
    kinds = [["left", "right"], ["above", "below"], ["0", "1", "2", "3"], ["a dog", "a cat"]]
    for _ in range(number):
        options = rng.sample(kind := rng.choice(kinds), len(kind))
        index = rng.randrange(len(options))
        yield (
            {"options": options, "answer": rng.choice([options[index], f"({'ABCD'[index]})"])},
            index,
        )


def test_a_perfect_responder_scores_one_and_a_random_one_chance():
    rng = random.Random(1)
    perfect, chance, luck = [], [], []
    for row, index in random_rows(2000):
        options = row["options"]
        said = rng.randrange(len(options))
        letter, text = "ABCD"[said], options[said]
        style = rng.choice(["({0})", "{0}", "{1}", "({0}) {1}", "{0}: {1}.", "The answer is {1}."])
        perfect.append(accuracy_reward(f"x</think><answer>{options[index]}</answer>", row))
        luck.append(accuracy_reward(f"x</think><answer>{style.format(letter, text)}</answer>", row))
        chance.append(1 / len(options))
    assert sum(perfect) == 2000
    assert sum(luck) / 2000 == pytest.approx(sum(chance) / 2000, abs=0.035)  # 3 standard errors


def test_random_texts_raise_nothing_and_tagging_an_answer_twice_changes_nothing():
    rng = random.Random(2)
    pieces = [
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "left",
        "right",
        "(A)",
        "B",
        "a ",
        "not ",
    ]
    pieces += [
        "3",
        "1,000",
        "-",
        ".",
        " ",
        "\n",
        "√",
        "½",
        "「",
        "'",
        "\\boxed{",
        "}",
        "upper ",
        "no ",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        for row in (SIDES, COUNT, NO, THREE, COLOUR):
            right = accuracy_reward(text, row)
            assert right in (0.0, 1.0) and format_reward(text, row) in (0.0, 1.0)
            answer = extract_answer(text)
            assert right == float(answer is not None and is_correct(answer, row))
            if answer is not None:
                again = f"{text}<answer>{answer}</answer>"
                assert accuracy_reward(again, row) == right and format_reward(again, row) == 0
            assert lenient_answer(text, row) is None or isinstance(lenient_answer(text, row), str)


def test_every_reflection_phrase_is_a_whole_word_expression_of_its_own():
    assert len(set(rewards.REFLECTION_PHRASES)) == len(rewards.REFLECTION_PHRASES)
    assert all(phrase == phrase.lower() for phrase in rewards.REFLECTION_PHRASES)
