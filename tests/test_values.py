"""Open answers and the values in texts, in every form that models write them."""

import pytest

from core.values import agree, values, words
from rewards import accuracy_reward, is_correct, stated_value

# fmt: off
# The answer to an open question, whether a text is right, and texts.
OPEN = [
    ("140°", 1, "140", "140°", "140.0", "140 degrees", "140 deg", "140º", r"140^\circ",
     r"$140^{\circ}$", "x = 140", "∠ABC = 140°", "The answer is 140.", "１４０", "140度", "140^o"),
    ("140°", 0, "14", "-140", "1400", "140.5", "140 or 40", "180 - 40 = 140", "not 140", "(A)", "",
     "140 cm", "140%"),
    ("20°C", 1, "20 °C", "20", "20°", "20 degrees Celsius"),
    ("20°C", 0, "20°F", "21°C", "20 degrees Fahrenheit"),
    ("3", 1, "3", "three", "3 chairs", "3.000", "There are three.", "03", "+3", r"\boxed{3}"),
    ("3", 0, "3 or 4", "√3", "3π", "minus three", "33", "3 million", "C", "3²", "cos 3", "± 3",
     "at least 3", "3 more", "> 3", "v1.3"),
    # what computes on is no number
    ("3", 0, "1 + 1 = 3", "2 + 1 = 3", "2 + 1", "3-4", "3 of 5", "3 + x", "x + 3", "3x", "3/x"),
    ("6", 0, "2 x 3 = 6", "2 × 3 = 7", "3 + 3 = 6", "6.0 + PE + PF", "12 - 6 = 6"),
    ("1000", 1, "1000", "1,000", "1000.0", "１，０００", "a thousand", "$1,000$", r"1\,000",
     "1{,}000", "1e3", "1E3", "1.0e+3", "10^3", "10**3", "10³", r"10^{3}", "1 x 10^3",
     r"1 \times 10^{3}"),
    ("1000", 0, "1.000", "1,00", "1 000", "10,00", "1,000,000", "2 thousand", "1", "1e4", "1e-3"),
    ("-5", 1, "-5", "−5", "–5", "-5.0", "$-5$", "x=-5", "minus 5", "negative five"),
    ("-5", 0, "5", "- 6", "10-5", "five"),
    ("0", 1, "0", "zero", "-0", "0.0"),
    ("0", 0, "none", "O", "1e-9", ""),
    ("21", 1, "twenty one", "Twenty-one", "21.0"),
    ("21", 0, "twenty", "one", "20, 1", "twenty or one", "twenty two"),
    ("105", 1, "one hundred and five", "one hundred five"),
    ("1234", 1, "one thousand two hundred thirty-four",
     "one thousand, two hundred and thirty four"),
    ("1234", 0, "one thousand two hundred", "one thousand or two hundred thirty four"),
    ("3000000", 1, "3 million", "three million", "3,000,000", "3e6"),
    ("3000000", 0, "3", "3 thousand", "million"),
    ("24", 1, "two dozen", "2 dozen", "twenty-four"),
    ("三个", 1, "3个", "3", "有三个"),
    ("三个", 0, "两个", "3只"),
    ("12", 1, "十二个", "1२", "١٢", "۱۲"),
    ("2", 0, "十二个", "二十二个", "二十个", "2/7", "two sevenths", "2 ninths"),
    # a letter after a number
    ("70°F", 1, "70F", "70 F", "70 Fahrenheit", "70 degrees Fahrenheit", "70"),
    ("70°F", 0, "70C", "70°C", "-70F"),
    ("12A", 1, "12A", "12a", "The answer is 12A."),
    ("12A", 0, "12B", "13A"),
    ("3", 0, "3D", "a 3D view"),
    # a minus sign and its number apart; a difference that has no value
    ("-5", 1, "x = - 5", "- 5", "(- 5)"),
    ("5", 0, "x = - 5", "- 5"),
    ("(2, 3)", 0, "(2, - 3)"),
    ("90°-α", 1, "90° - α"),
    ("90°-α", 0, "90", "90°"),
    ("5-x", 0, "5"),
    ("10^{-3}", 1, "10⁻³", "0.001"),
    ("35°", 1, "∠1 = 35°", r"\angle 2 = 35", "x_1 = 35"),
    ("35°", 0, "∠35 = 1°"),
    # a sign before a letter
    ("-x", 1, "-x", "$-x$"),
    ("-x", 0, "x"),
    ("x", 0, "-x"),
    ("y = -x", 0, "y = x"),
    (r"-\frac{b}{a}", 0, r"\frac{b}{a}"),
    ("T-shirt", 1, "t-shirt", "T shirt"),
    # a letter or a Greek one makes another value
    ("3", 0, "3i", "3θ", r"3\alpha", r"\frac{3}{1}x"),
    ("4 Ω", 1, "4 ohms", "4"),
    # angles
    ("60°", 1, "∠A = 60°", "∠1 = ∠2 = 60°", "m∠A = 60°", r"\angle B = 60", "∠A is 60°"),
    # LaTeX text around a unit
    ("60°", 1, r"60\text{ degrees}", r"60 \text{ degrees}"),
    ("15%", 1, r"15 \text{ percent}"),
    ("20 m/s", 1, r"20 \text{ m/s}", r"20 \, \mathrm{m/s}"),
    ("20 m/s", 0, r"20 \text{ m}"),
    (r"2\sqrt{3}", 1, r"2\,\sqrt{3}", r"2\;\sqrt{3}"),
    # times, ratios and ranges
    ("7:30", 1, "The time is 7:30", "7:30 am", "It shows 7:30.", "07:30"),
    ("7:30", 0, "7:03", "8:30", "7:3"),
    ("3:05", 0, "3:5", "3:50"),
    ("1:2", 1, "1:2", "1∶2"),
    ("5", 0, "up to 5", "almost 5", "5 plus", "exceeds 5", "5 or greater", "5 and up"),
    # units and numbers in words
    ("100 N", 1, "100 newtons", "100"),
    ("4 V", 1, "4 volts"),
    ("4 V", 0, "4 newtons"),
    ("5 dm", 1, "5 decimeters"),
    ("3", 1, "三", "三人", "三つ"),
    ("6厘米", 1, "六厘米", "6 cm"),
    ("23", 0, "一百二十三个"),
    ("5", 0, "5 trillion"),
    ("红色", 1, "答案是红色", "答案：红色"),
    # LaTeX that is no markup
    ("3", 0, r"\pm 3", r"\geq 3", r"x \neq 3", r"\log 3", r"3 - \theta", "3 cubed", "根号3", "负3"),
    ("30°", 0, r"\sin 30^\circ", r"\tan 30", r"30^\circ - \alpha"),
    # words after the unit, and a unit that says nothing
    ("30°", 1, "30 (by symmetry)", "30 for the angle", "30 approximately", "30∘", r"30 ^ \circ",
     "It is most likely 30.", r"30^{\circ}", "thirty degrees"),
    ("12cm²", 1, "12 square units", "12 units", r"12\text{ units}"),
    ("5 m", 0, "5 m/unit"),
    # dates, currencies, roots and units in words
    ("4/2/2020", 1, "4/2/2020", "04/02/2020"),
    ("4/2/2020", 0, "6/3/2020", "2/1/2020"),
    ("$5", 1, "$5", "5", r"\boxed{\$5}"),
    ("$5", 0, "₹5", "€5"),
    ("2", 1, "cube root of 8"),
    ("√3", 1, "根号3"),
    ("5mm", 1, "5毫米"),
    ("5km", 1, "5千米", "5公里"),
    ("5 lbs", 1, "5 pounds"),
    ("25 mph", 1, "25 miles per hour"),
    # fractions and percent
    (r"\frac{1}{2}", 1, "1/2", "0.5", ".5", r"\frac12", r"\dfrac{1}{2}", r"$\frac{1}{2}$", "½",
     "50%", "half", "one half", "2/4", "5e-1", "1 / 2", r"\frac{1.0}{2.0}", r"\boxed{\frac{1}{2}}",
     r"\frac{1}2", r"\frac1{2}", "1÷2"),
    (r"\frac{1}{2}", 0, "2", "1", "1/3", "0.51", "1/2 or 1/3", "-1/2", "1 2", "1:2", "0{1}{2}",
     r"\frac{2}{1}"),
    ("3/4", 1, "three quarters", "three-fourths", "¾", "75 per cent"),
    ("3/4", 0, "three", "two quarters", "3 or 4", "a quarter"),
    ("3/2", 1, "three halves", "one and a half"),
    ("3", 0, "three halves", "three twelfths"),
    ("2/3", 1, "two thirds", "2 thirds"),
    ("2.5", 1, "2½", "2 1/2", r"2\frac{1}{2}", "5/2", "two and a half"),
    ("2.5", 0, "2", "1/2", "2 or 1/2"),
    ("-2.5", 1, "−2½", r"-2\frac{1}{2}", "-5/2"),
    ("-2.5", 0, "-1.5", "2½", "-2"),
    ("50%", 1, "50 %", "50", "50 percent", r"50\%", "0.5", "1/2"),
    ("50%", 0, "5%", "0.5%", "50 m", "50°"),
    ("1/3", 1, "0.3333333"),
    ("1/3", 0, "0.3333", "0.33"),
    # roots, powers and pi
    ("2√3", 1, "2√3", "2 √3", "$2√3$", "(2√3)", "The answer is 2√3.", "2√{3}", r"2\sqrt{3}",
     r"2 \sqrt{3}", "2sqrt(3)", "2 * sqrt(3)", "2*√3", "sqrt(12)", "√12", "2 root 3", "3.4641016"),
    ("2√3", 0, "2", "3", "23", "2√3 or 3√2", "√3", "3.46", "2√13", "2+√3", "3√2", "2 * 3"),
    ("(√{3}+1)小时", 1, "1+√3", "(√3+1)小时", r"\sqrt{3} + 1", "2.7320508"),
    ("(√{3}+1)小时", 0, "√3", "√3-1", "√4"),
    (r"\frac{3√{5}}{2}", 1, "3√5/2", "(3√5)/2", r"\frac{3}{2}\sqrt{5}", "1.5√5"),
    (r"\frac{3√{5}}{2}", 0, "3√5", "3/2", "√5/2"),
    (r"\sqrt{\frac{1}{4}}", 1, "1/2", "sqrt(1/4)"),
    (r"\sqrt[3]{8}", 1, "2", "∛8", "8^(1/3)"),
    ("π/4", 1, r"\frac{\pi}{4}", "pi/4", "0.25π", "( π ) / 4"),
    ("12π", 1, "12pi", "12 pi", r"12\pi", "12*pi", "12 * π", "π*12", r"4\pi \cdot 3", "37.699112"),
    ("12π", 0, "12", "π", "37.7", "12π²", "12+π", "1.2π", "12π - 1"),
    ("12πcm^{2}", 1, "12π cm^2", "12πcm²", "12π", r"12\pi \text{ cm}^2",
     "12π square centimeters"),
    ("12πcm^{2}", 0, "12π cm", "12π m²", "12 cm²"),
    ("x^2", 1, "x²", "x^{2}"),
    ("x^2", 0, "x^3", "x", "2"),
    # a unit may be missing and may not differ
    ("7 am", 1, "7 am", "7am", "7 AM", "7", "7 a.m.", "seven am", "7:00 a.m."),
    ("7 am", 0, "7 pm", "7pm", "7 p.m.", "8 am", "7:30 am", "7:00 pm"),
    ("5 m", 1, "5 m", "5m", "5", "5 meters", "five metres", r"5\text{ m}", "5米",
     "It is 5 m long."),
    ("5 m", 0, "5 cm", "5cm", "5 m^2", "5 square meters", "5 km", "5 feet", "5 m/s", "5 厘米",
     "5 in", "5 inches", "5 minutes", "5 miles", "over 5 m", "under 5 m"),
    ("5 kg", 1, "5 kilograms", "5kgs", "5 kilos"),
    ("5 kg", 0, "5 g", "5 grams", "5 lb"),
    ("5 seconds", 1, "5 s", "5 sec", "five second"),
    ("5 seconds", 0, "5 min", "5 hours", "5 ms"),
    ("3 feet", 1, "3 ft", "3 foot"),
    ("3 feet", 0, "3 inches", "3 fishes"),
    ("2 L", 1, "2 liters", "2 litre"),
    ("2 L", 0, "2 ml", "2 milliliters"),
    ("5 m³", 1, "5 cubic meters", "5 m^3", "5 立方米"),
    ("5 m³", 0, "5 square meters", "5 m"),
    ("5 km/h", 1, "5 km per hour", "5 kilometers per hour", "5 km / h", "5 km/hr"),
    ("5 km/h", 0, "5 m/s", "5 km", "5 mi/h"),
    ("5cm^2^", 1, "5 cm²", "5"),
    ("2 cats", 1, "2 cats", "2", "two cats", "There are 2 cats.", "2 cats in the image", "2 cat"),
    ("2 cats", 0, "2 dogs", "3 cats", "two dogs", "2 cats and 1 dog"),
    ("$5", 1, "5", "5 dollars", "$5.00"),
    ("$5", 0, "€5", "$50", "5 cents", "5 euros"),
    ("€5", 1, "5 euros", "5€"),
    # not values: compared by their words
    ("red", 1, "red", "Red.", "the red", "The answer is: **red**.", r"\boxed{red}", "it is red",
     "「red」"),
    ("red", 0, "not red", "red and blue", "blue", "", "infrared", "the"),
    ("3:4", 1, "3:4", "3 : 4"),
    ("3:4", 0, "3", "4", "4:3"),
    ("(3,4)", 1, "(3, 4)"),
    ("(3,4)", 0, "(4,3)", "3", "34"),
    ("3-4", 1, "3 - 4"),
    ("3-4", 0, "5-6", "-1", "3"),
    ("C++", 0, "C"),
    ("→", 1, "→"),
    ("→", 0, "←", ""),
    ("1e400", 0, "1", "inf", "1e399"),
    ("9^9^9^9", 0, "9", "9^9", "8^9^9^9"),
]
# fmt: on


@pytest.mark.parametrize(
    "answer, right, text", [(answer, right, t) for answer, right, *texts in OPEN for t in texts]
)
def test_an_open_answer_is_right_if_its_value_is_and_its_unit_does_not_contradict(
    answer, right, text
):
    row = {"options": [], "answer": answer}
    assert accuracy_reward(f"so</think><answer>{text}</answer>", row) == right
    assert is_correct(text.strip(), row) == bool(right)


def test_every_open_answer_is_right_itself():
    for answer, *_ in OPEN:
        assert is_correct(answer, {"options": [], "answer": answer})


@pytest.mark.parametrize("answer, right, text", [
    ("A", 1, "A"), ("A", 1, r"\boxed{A}"), ("B", 1, "B. left"), ("B", 1, "(B) the cube"),
    (r"\boxed{B}", 1, "The correct answer is B"), ("B", 1, "答案是B"), ("(B)", 1, "Therefore, B"),
    ("A", 0, "B"), ("A", 0, "A or B"), ("A", 0, "not A"), ("A", 0, "A is closer than B"),
    ("vitamin A", 0, "vitamin"), ("a-b", 0, "b-a"), ("a dog", 1, "dog"), ("dog", 1, "It is a dog."),
    ("no", 1, "No, it is not."), ("Yes", 1, "Yes, it is."), ("yes", 0, "no"),
    ("yes", 0, "yes or no"), ("B", 1, "B. 25 °C"),
    ("B. left", 1, "B"), ("B. left", 1, "left"), ("B. left", 0, "A"), ("(B) 5 cm", 1, "5 cm"),
    ("(B) 5 cm", 0, "6 cm"), ("x - 5", 0, "5"),
])  # fmt: skip
def test_an_open_letter_or_yes_or_no_is_judged_like_an_option(answer, right, text):
    assert is_correct(text, {"answer": answer}) == bool(right)
    assert is_correct(answer, {"answer": answer})


def test_a_free_text_states_the_only_value_in_it():
    assert stated_value("There are 3 dogs.") == stated_value("Three.") == "3"
    assert stated_value("about 1,250.50 m") == "1250.5 m" and stated_value("It is 7 p.m.") == "7 pm"
    assert stated_value("-0.0") in ("0", "-0") and stated_value(".5") == "0.5"
    assert stated_value("Forty-two!") == "42" and stated_value("twelve") == "12"
    assert stated_value("1 and 1.0 and one") == "1"
    for text in ("none", "No dogs", "1 2", "b2", "3 dogs and 2 cats", "not 3", "1 + 1", ""):
        assert stated_value(text) is None


def test_numbers_equal_to_a_millionth_are_equal_and_huge_ones_raise_nothing():
    row = {"options": [], "answer": "9" * 150}
    assert is_correct("9" * 150 + ".0", row) and not is_correct("9" * 149, row)
    assert is_correct("1000000.5", {"options": [], "answer": "1000000"})
    assert not is_correct("1000002", {"options": [], "answer": "1000000"})
    for text in ("9" * 100_000, "1e999", "inf", "nan", "9**9**9**9", "1/0", "(" * 200, "√-1"):
        assert accuracy_reward(f"<answer>{text}</answer>", {"options": [], "answer": "3"}) == 0


def test_only_arithmetic_is_evaluated():
    for text in ("len('abc')", "3 if 1 else 0", "[3][0]", "__import__('os').getpid()", "3 or 1"):
        assert not is_correct(text, {"options": [], "answer": "3"})


def test_text_becomes_words_with_one_decimal_number_for_each_value():
    assert words("The box: 2√{3} CM²") == " box  3.46410161513775  cm2 "
    assert words("He isn't 21-2. It's 3D!") == " he  is  not  ?21-2  .  it  dim3  . "
    assert values(words("two cats, 5 km/h")) == [("2", "cat"), ("5", "kmperh")]
    assert agree(("50", "%"), ("0.5", "")) and not agree(("0.5", "%"), ("50", ""))
