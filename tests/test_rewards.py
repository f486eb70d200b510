"""Rewards against answers of every kind that models give, with values decided by hand."""

import random
import time
from itertools import product

import pytest

import rewards
from core.values import words
from rewards import (
    REWARDS,
    accuracy_reward,
    extract_answer,
    format_reward,
    is_correct,
    length_reward,
    reflects,
    stated_option,
    stated_value,
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
CLOSER_A = {"options": ["A is closer", "B is closer"], "answer": "A"}
CLOCKWISE = {"options": ["clockwise", "counterclockwise"], "answer": "counterclockwise"}
COMPASS = {"options": ["north", "northeast", "east"], "answer": "northeast"}
SAME = {"options": ["Opposite direction", "Same direction"], "answer": "A"}
BURNT = {"options": ["raw", "burnt"], "answer": "burnt"}
WARM = {"options": ["20", "25", "30", "35"], "answer": "25"}
DEGREES = {"options": ["30 degrees", "60 degrees"], "answer": "60 degrees"}
NUMBERED = {"options": ["A. 3", "B. 2"], "answer": "A"}
REORDERED = {"options": ["B: plate", "A: cup"], "answer": "B"}
AXES = {"options": ["x-axis", "y-axis"], "answer": "y-axis"}
CLOCK = {"options": ["7 a.m.", "7 p.m."], "answer": "7 p.m."}
UNITS = {"options": ["5 m", "5 cm"], "answer": "5 m"}
LENGTHS = {"options": ["5 m", "6 m"], "answer": "5 m"}
SHARES = {"options": ["1/2", "1/4", "2"], "answer": "1/2"}
ROOTS = {"options": ["2√3", "√3", "3"], "answer": "2√3"}
CUBES = {"options": ["3 red cubes", "3 blue cubes"], "answer": "3 red cubes"}
BOTH = {"options": ["Both A and B", "None of the above", "red"], "answer": "None of the above"}
ZUO = {"options": ["左边", "右边"], "answer": "左边"}
SHI = {"options": ["是", "不是"], "answer": "不是"}
DUI = {"options": ["对", "错"], "answer": "错"}
LIANG = {"options": ["三个", "两个"], "answer": "两个"}
HIDARI = {"options": ["左", "右"], "answer": "左"}
OEN = {"options": ["왼쪽", "오른쪽"], "answer": "왼쪽"}
SLEVA = {"options": ["слева", "справа"], "answer": "слева"}
CANNOT = {"options": ["can move", "cannot move"], "answer": "cannot move"}
NUMBERS = {"options": ["2. cup", "1. plate", "3. lamp"], "answer": "plate"}
ON = {"options": ["on", "off"], "answer": "off"}
CORRECT = {"options": ["correct", "incorrect"], "answer": "incorrect"}
DASHED = {"options": ["1 - cat", "2 - dog"], "answer": "2 - dog"}
ANSWERED = {"options": ["Answer A: cat", "Answer B: dog"], "answer": "B"}
AGES = {"options": ["0-5", "6-10"], "answer": "6-10"}
ODDS = {"options": ["likely", "unlikely"], "answer": "unlikely"}
NEIN = {"options": ["ja", "nein"], "answer": "nein"}
THREE = {"options": [], "answer": "3"}
COLOUR = {"options": [], "answer": "red"}

# Row, whether the answer is right, and what stands inside the answer tag.
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
    (NO, 1, "no", "No.", "NO", "No, it is not.", "No, it isn't", "(B) no", "The answer is no",
     "no it isn't"),
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
    # options with a letter of their own, in any style and order
    (NUMBERED, 1, "3", "A", "three", "A. 3", "A: 3", "A 3", "A-3", "3."),
    (NUMBERED, 0, "2", "B", "B. 3", "A. 2", "3 or 2"),
    (REORDERED, 1, "B", "plate", "b: plate", "(B)", "B) plate", "B - plate"),
    (REORDERED, 0, "A", "cup", "(A) plate", "B: cup", "C"),
    (AXES, 1, "y-axis", "y axis", "B"),
    (AXES, 0, "x-axis", "A", "y", "axis"),
    (BOTH, 1, "None of the above", "none of the above.", "B"),
    (BOTH, 0, "Both A and B", "A", "A and B", "red", "not none of the above"),
    # options that are values, compared by value and unit
    (CLOCK, 1, "7 p.m.", "7 pm", "7pm", "B", "It is 7 p.m."),
    (CLOCK, 0, "7 a.m.", "7 am", "7", "A", "7 am or 7 pm"),
    (UNITS, 1, "5m", "5 m", "5 meters", "A", "(A) 5", "A. 5 m", "five metres"),
    (UNITS, 0, "5cm", "5", "B", "(B) 5m", "5 m or 5 cm", "5 km"),
    (LENGTHS, 1, "5", "5m", "five", "5.0 m", "It is 5 m long."),
    (LENGTHS, 0, "6", "5 cm", "5 m/s", "5 m^2", "5 m or 6 m"),
    (SHARES, 1, "0.5", r"\frac{1}{2}", "½", "A", "(A) 1/2", "A. 0.5", "50%"),
    (SHARES, 0, "1/4", "1", "2", "0.25", "1/2 or 1/4", "4", "B"),
    (ROOTS, 1, r"2\sqrt{3}", "2√{3}", "3.46410161514", "A"),
    (ROOTS, 0, "√3", "3", "2", "√3 or 2√3", "3.46"),
    (CUBES, 1, "3 red cubes", "three red cubes.", "A"),
    (CUBES, 0, "3", "3 blue cubes", "3 cubes", "B"),
    # scripts without spaces
    (ZUO, 1, "答案是左边", "左边", "左边。", "选A", "A", "答案：A", "选择A", "「左边」"),
    (ZUO, 0, "答案是右边", "选B", "不是左边", "左边和右边", "A或B", "左", "选A右边"),
    (ZUO, 0, "左边是错误的", "并非左边", "左边不对"),
    (SHI, 1, "不是", "B"),
    (SHI, 0, "是", "A"),
    (DUI, 1, "错", "B", "选B"),
    (DUI, 0, "对", "A"),
    (LIANG, 1, "2个", "有两个", "B"),
    (LIANG, 0, "3个", "三个", "两个或三个"),
    (HIDARI, 1, "答えは左です", "左です。", "Aです", "左側"),
    (HIDARI, 0, "右", "左ではない", "左右", "左ではありません"),
    (OEN, 1, "정답은 왼쪽입니다", "왼쪽이에요", "A입니다"),
    (OEN, 0, "오른쪽", "왼쪽이 아닙니다", "왼쪽이 아니다", "왼쪽 또는 오른쪽"),
    (SLEVA, 1, "Слева.", "Ответ: слева", "A"),
    (SLEVA, 0, "справа", "не слева", "слева или справа"),
    (CANNOT, 1, "cannot move", "can't move", "It can not move.", "B"),
    (CANNOT, 0, "can move", "It can move.", "A"),
    # words that turn an option into its opposite
    (CLOCKWISE, 1, "counter-clockwise", "anti-clockwise", "anticlockwise", "counter clockwise"),
    (CLOCKWISE, 0, "clockwise", "not counterclockwise"),
    (COMPASS, 1, "north-east", "north east", "northeast"),
    (COMPASS, 0, "north-west", "north", "east"),
    (SIDE, 0, "Is it left? No.", "Left? No.", "It isnt left", "anything but left", "❌ left",
     "all but left", "other than left", "far from left", "excluding left", "≠ left"),
    (BURNT, 1, "burnt", "It is burnt."),
    (BURNT, 0, "It isnt burnt"),
    (SAME, 1, "opposite direction", "They face in the opposite direction.", "A"),
    (SAME, 0, "They are not facing in the opposite direction", "same direction"),
    (CLOSER_A, 1, "A appears closer", "Point A appears to be closer", "A has less depth", "A"),
    (CLOSER_A, 0, "B appears closer", "B looks closer than A"),
    (ZUO, 1, "非常确定是左边", "没错，左边"),
    (ZUO, 0, "左边是錯的", "沒有左边"),
    (WARM, 1, "25 °C", "25°C", "B. 25 °C", "25 degrees Celsius"),
    (WARM, 0, "20 °C", "C. 25 °C"),
    # "right answer" names no side, and "based on" no state
    (SIDE, 1, "The right answer is B", "The right answer is left", "B is the right choice"),
    (SIDE, 0, "The right answer is A", "What is the right answer?", "right"),
    (SIDE | {"answer": "right"}, 0, "The right answer is unclear"),
    (CORRECT, 1, "The correct answer is B", "It is incorrect"),
    (CORRECT | {"answer": "correct"}, 0, "The correct answer is unclear"),
    (DUI, 1, "正确答案是B"),
    (ON, 1, "Based on the image, the light is off", "Based on the image, the answer is B"),
    (ON | {"answer": "on"}, 0, "Based on the image, it is unclear"),
    # denied in other words
    (SIDE, 0, "B is unlikely", "B is impossible", "B can be ruled out", "Eliminate B", "Left? Nope",
     "hardly left", "B is excluded", "every option but B", "anything but left", "nie left"),
    (ODDS, 1, "unlikely", "It is unlikely.", "B"),
    (ODDS, 0, "likely", "It is not unlikely"),
    (ZUO, 0, "除了左边", "排除A", "别选A"),
    (OEN, 0, "왼쪽 아님"),
    (NEIN, 1, "Nein, es ist nicht so", "nein"),
    # letters in other phrases
    (SIDE, 1, "B would be the answer", "B must be it"),
    (TABLE, 1, "The correct option is a", "I choose a", "A should be the answer", "select a"),
    (DASHED, 1, "dog", "2", "2 - dog"),
    (DASHED, 0, "cat", "1", "2 - cat"),
    (ANSWERED, 1, "dog", "B. dog", "B"),
    (ANSWERED, 0, "cat", "B. cat", "A"),
    (AGES, 1, "6 to 10", "6-10", "B"),
    (AGES, 0, "0 to 5", "6", "10"),
    # options with a number of their own
    (NUMBERS, 1, "1", "(1)", "plate", "1. plate", "the plate", "B"),
    (NUMBERS, 0, "2", "2. plate", "cup", "(2) cup", "1 or 2", "4"),
]
# fmt: on
ANSWERS = [(row, right, text) for row, right, *texts in ANSWERS for text in texts]


@pytest.mark.parametrize("row, right, text", ANSWERS)
def test_a_tagged_answer_is_right_if_and_only_if_it_names_the_right_option_alone(row, right, text):
    assert accuracy_reward(f"so</think><answer>{text}</answer>", row) == right
    assert is_correct(text.strip(), row) == bool(right)


# Completions for SIDE by their accuracy and format rewards.
LONG = "left " * 10_000
# fmt: off
COMPLETIONS = {
    (1, 1): [
        "<think>look</think><answer>left</answer>", "look</think><answer>left</answer>",
        "look</think>\n\n<answer>\nleft\n</answer>\n", "</think><answer>left</answer>",
        " \n<think>\nline\nline\n</think> <answer>(B)\n left</answer> ",
        "<think></think><answer>left</answer>", "1 < 2</think><answer>left</answer>",
        f"{LONG}</think><answer>left</answer>",
    ],
    (0, 1): ["look</think><answer>right</answer>", "look</think><answer>no idea</answer>"],
    (1, 0): [
        # something is missing
        "<answer>left</answer>", "<think>look<answer>left</answer>",
        "look <answer>left</answer></think>",
        # something is too much
        "look</think><answer>left</answer> so left", "look</think> so <answer>left</answer>",
        "well <think>look</think><answer>left</answer>",
        "<think>a</think><think>b</think><answer>left</answer>",
        "<think><think>b</think></think><answer>left</answer>",
        "<think>b</think></think><answer>left</answer>",
        "<answer>left</answer><think>look</think>",
        "look</think><answer>left</answer><answer>left</answer>",
        "look</think><answer><think>left</think></answer>",
        # several answers: the last well-formed one counts
        "a</think><answer>right</answer><answer>left</answer>",
        "maybe <answer>right</answer></think><answer>left</answer>",
        "a</think><answer>left</answer><answer>right",
        "a</think><answer>left</answer> right</answer>",
        "a</think><answer>right<answer>left</answer></answer>",
        "a</think><answer><answer>left</answer>", "</answer><answer>left</answer>",
        "<answer>left</answer>" * 10_000,
    ],
    (0, 0): [
        "a</think><answer>left</answer><answer>right</answer>",
        "a</think><answer>left</answer><answer></answer>", f"<answer>{LONG}</answer>",
        # empty, or no tag
        "", " \n", "look</think><answer></answer>", "look</think><answer> \n </answer>",
        "left</think><answer></answer>", "<think>look</think>", "look</think> left",
        "look</think><answer>left", "look</think>left</answer>", "left",
        "look</think></answer>left<answer>", "look</think><answer>left<answer>",
        "look</think><answer>left</ answer>", "The answer is (B) left.", LONG,
    ],
}
# What stands without a tag, and the option of SIDE that it states.
FREE = {
    "left": [
        "left", "(B)", "The answer is (B) left.", r"The answer is \boxed{left}.", LONG,
        "The answer is 「left」。", "I do not know the colours. It is left.", "It is left.\n",
    ],
    "right": ["Right."],
    None: [
        "", " \n", "look", "left or right", "(A) right\n(B) left", "(A) left", "It is not left.",
        "I see a dog and a cat.", "This is a 3D image, e.g. of a 'dog' and a **cat**.",
        "It shows a cat, I'd say. There is a", "left or right? The cat is right there",
        "<p>An image.</p> <a href='b'>c'est d'accord</a>", "right " + LONG, LONG + "right",
    ],
}
# fmt: on


@pytest.mark.parametrize(
    "accuracy, form, completion",
    [(*key, text) for key, texts in COMPLETIONS.items() for text in texts],
)
def test_a_completion_scores_as_decided_by_hand(accuracy, form, completion):
    assert accuracy_reward(completion, SIDE) == accuracy
    assert format_reward(completion, SIDE) == form


@pytest.mark.parametrize("option, text", [(o, text) for o, texts in FREE.items() for text in texts])
def test_a_free_text_states_an_option_only_if_it_names_no_other(option, text):
    index = stated_option(text, SIDE["options"])
    assert (None if index is None else SIDE["options"][index]) == option


def test_numbers_and_longer_names_decide_in_free_text_too():
    assert stated_option("There are 3 dogs.", COUNT["options"]) == 0
    assert stated_option("There are 3 dogs and 5 cats.", COUNT["options"]) is None
    assert stated_option("There are 7 dogs.", COUNT["options"]) is None
    assert stated_option("The red square.", SQUARE["options"]) == 0
    assert stated_option("Point B", POINT["options"]) == 1


def test_an_option_is_named_by_its_own_letter_in_any_style():
    styles = ["{}: ", "{}) ", "({}) ", "{}.", "{}. ", "{} - ", "{} – ", "{} — ", "[{}] ", "{} | "]
    styles += [
        "{}、",
        "{}．",
        "{}：",
        "（{}）",
        "【{}】",
        "Option {}: ",
        "choice {}) ",
        "**{}.** ",
        "{}\t",
    ]
    for style in styles:
        for letters in ("AB", "BA", "ab", "CA"):
            options = [style.format(x) + o for x, o in zip(letters, ("cup", "plate"), strict=True)]
            for i, letter in enumerate(letters):
                own, other = ("cup", "plate") if i == 0 else ("plate", "cup")
                texts = (letter, f"({letter})", own, options[i], f"{letter}: {own}")
                assert [stated_option(text, options) for text in texts] == [i] * 5
                assert stated_option(f"{letter}) {other}", options) is None


def test_what_only_looks_like_a_letter_of_its_own_is_none():
    for options in (["A>B", "B>A"], ["3:4", "4:3"], ["1.5 m", "2.5 m"], ["x-axis", "y-axis"]):
        assert [stated_option(option, options) for option in options] == [0, 1]
        assert [stated_option(letter, options) for letter in ("A", "(B)")] == [0, 1]
        assert stated_option(f"(A) {options[1]}", options) is None


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
            texts = (option, option.upper(), f"{option}.", f"({letter})", f"{letter}) {option}")
            assert [stated_option(text, row["options"]) for text in texts] == [i] * 5


def test_no_option_is_stated_where_two_are_or_letter_and_text_disagree():
    for row in (SIDE, SIDES, COUNT, TEN, DEPTH, SQUARE, NO, STILL, COMMA):
        options = row["options"]
        for (i, one), (j, other) in product(enumerate(options), repeat=2):
            if i != j:
                assert stated_option(f"{one} or {other}", options) is None
                assert stated_option(f"({'ABCD'[i]}) {other}", options) is None
        assert stated_option(", ".join(options), options) is None


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
def test_a_hundred_thousand_hard_characters_score_in_linear_time(text):
    options = ["left", "right", "upper left", "red square", "a", "no", "on the red", "it"]
    row, open_row = {"options": [*options, *"0123"], "answer": "left"}, THREE
    functions = [
        *(lambda text, reward=reward: reward(text, row) for reward in REWARDS.values()),
        lambda text: accuracy_reward(text, open_row),
        lambda text: stated_option(text, row["options"]),
        stated_value,
        reflects,
    ]
    for function, scored in product(functions, (text, f"<answer>{text}</answer>")):
        words.cache_clear()
        start = time.process_time()  # other processes may be busy
        function(scored)
        assert time.process_time() - start < 0.3  # 0.04 is usual; one quadratic step takes seconds


def test_a_perfect_responder_scores_one_and_a_random_one_chance():
    rng = random.Random(1)
    kinds = [["left", "right"], ["above", "below"], ["0", "1", "2", "3"], ["a dog", "a cat"]]
    perfect, lucky, chance = 0, 0, 0
    for _ in range(2000):
        options = rng.sample(kind := rng.choice(kinds), len(kind))
        right, said = rng.randrange(len(options)), rng.randrange(len(options))
        row = {"options": options, "answer": rng.choice([options[right], f"({'ABCD'[right]})"])}
        style = rng.choice(["({0})", "{0}", "{1}", "({0}) {1}", "{0}: {1}.", "The answer is {1}."])
        answer = style.format("ABCD"[said], options[said])
        perfect += accuracy_reward(f"x</think><answer>{options[right]}</answer>", row)
        lucky += accuracy_reward(f"x</think><answer>{answer}</answer>", row)
        chance += 1 / len(options)
    assert perfect == 2000
    assert lucky / 2000 == pytest.approx(chance / 2000, abs=0.035)  # 3 standard errors


def test_random_texts_raise_nothing_and_tagging_an_answer_twice_changes_nothing():
    rng = random.Random(2)
    pieces = ["<answer>", "</answer>", "<think>", "</think>", "\n", "\\boxed{", "upper ", "a "]
    pieces += "left right (A) B 3 1,000 - . √ ½ 「 ' } ^ / \\frac{ ( * π % not no".split()
    for _ in range(1000):
        text = "".join(rng.choices([*pieces, " "], k=rng.randrange(12)))
        for row in (SIDES, COUNT, NO, THREE, COLOUR):
            right, answer = accuracy_reward(text, row), extract_answer(text)
            assert right == float(answer is not None and is_correct(answer, row))
            assert format_reward(text, row) in (0.0, 1.0)
            if answer is not None:
                again = f"{text}<answer>{answer}</answer>"
                assert accuracy_reward(again, row) == right and format_reward(again, row) == 0
        assert isinstance(stated_value(text), str | None)


def test_every_reflection_phrase_is_a_whole_word_expression_of_its_own():
    assert len(set(rewards.REFLECTION_PHRASES)) == len(rewards.REFLECTION_PHRASES)
    assert all(phrase == phrase.lower() for phrase in rewards.REFLECTION_PHRASES)
