"""Texts as words, and the values among them.

`words("The box: 2√{3} CM²")` is " box  3.46410161513775  cm2 ": lower case, no punctuation, no
articles, and every value in plain text, Unicode or LaTeX as one decimal number. Each word stands
between spaces, so that `in` finds one text in another at the boundaries of words. " . " separates
sentences.
"""

import ast
import math
import operator
import re
from functools import lru_cache
from unicodedata import normalize

MAX_TEXT = 5000  # characters; only the two ends of a longer text are read

DENIAL = re.compile(" (?:not|no|never|neither|nor|none|nein|non|нет|否|い  い  え) ")
NEGATION = re.compile(
    " (?:not|no|never|neither|nor|none|non|except|instead|opposite|wrong|incorrect|false|nope"
    "|hardly|unlikely|impossible|excluded?|eliminated?|ruled?  out|не|nicht|keine?|pas|jamais|nunca"
    "|não|nie|değil|δεν|ليس|לא|[≠¬✗✘❌]) "
)
# A number next to one of these is not the value: "3 + x", "more than 3", "sin 30".
VOIDS_NUMBER = re.compile(
    NEGATION.pattern
    + r"| (?:[+^/±≤≥<>\\]|pi|sqrt|cbrt|sin|cos|tan|cot|log|ln|than|more|less|fewer) "
    r"| (?:(?:at  (?:least|most)|up  to|almost|nearly|exceeds?|plus|or  greater"
    r"|and  (?:up|above|over)) |(?:over|under|above|below)  -?\d)"
)


@lru_cache(maxsize=256)  # the completions of a group share their row
def words(text: str) -> str:
    """`text` as words, in the format that the top of this file describes."""
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT // 2] + "\n" + text[-MAX_TEXT // 2 :]
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", text.translate(FOLD)).replace("⁻", "-")
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"(?<=\d)[¼-¾⅐-⅞]", r" \g<0>", text))
    # Character by character: normalising a whole text is quadratic in its combining marks.
    folded = {ord(c): folded for c in set(text) if len(folded := normalize("NFKC", c)) <= 3}
    text = re.sub(ARTICLE, " ", text.translate(folded)[: 2 * MAX_TEXT]).lower()
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    tokens = ((match["value"], match[0]) for match in TOKEN.finditer(text))
    return "".join(f" {_number(value) if value else word} " for value, word in tokens)


def values(text: str) -> list[tuple[str, str]]:
    """Number and unit of each value in `text`, which `words` made. The unit is what follows."""
    found = []
    for sentence in text.split(" . "):
        void = VOIDS_NUMBER.search(sentence)
        for number, unit in VALUE.findall(sentence):
            unit = re.sub(PLURAL, "", " ".join(unit.split()))
            found.append(("nan" if void or "?" in number else number, unit))
    return found


def agree(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two values have equal numbers, and no two units that differ. 50% is also 0.5."""
    (a, unit_a), (b, unit_b) = one, other
    if any(x != y for x, y in zip(unit_a.split(), unit_b.split(), strict=False)):
        return False
    as_shares = [float(n) / (100 if unit == "%" else 1) for n, unit in (one, other)]
    return any(math.isclose(*pair, rel_tol=1e-6) for pair in [(float(a), float(b)), as_shares])


# --- values ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _number(expression: str) -> str:
    """The value of `expression` as a decimal number, or `expression` after a "?" if it has none.

    A sum of two plain numbers has none: "3-4" is a range and "1 + 1" an unfinished calculation.
    """
    unclosed = expression.count("(") - expression.count(")")
    source = expression.lstrip("+").removeprefix("(" * unclosed).removesuffix(")" * -unclosed)
    try:
        if len(source) <= 200 and not re.search(r"\d/\d+/\d\d", source):  # a date
            tree = ast.parse(source.strip().replace("^", "**"), mode="eval")
            if math.isfinite(value := _evaluate(tree.body)):
                return f"{value:.15g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        pass
    return "?" + expression.replace(" ", "")


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATIONS |= {ast.Div: operator.truediv, ast.Pow: math.pow}


def _evaluate(node: ast.expr) -> float:
    """Evaluate numbers, pi, roots and arithmetic. Floats bound the size and time of a power."""
    match node:
        case ast.Constant(int() | float() as number):
            return float(number)
        case ast.Name("pi"):
            return math.pi
        case ast.Call(ast.Name("sqrt" | "cbrt" as root), [operand]):
            return getattr(math, root)(_evaluate(operand))
        case ast.UnaryOp(ast.USub(), operand):
            return -_evaluate(operand)
        case ast.BinOp(ast.Constant(), ast.Add() | ast.Sub(), ast.Constant()):
            raise ValueError("a range or a calculation")
        case ast.BinOp(left, sign, right) if type(sign) in OPERATIONS:
            return OPERATIONS[type(sign)](_evaluate(left), _evaluate(right))
    raise ValueError("not arithmetic")


# --- one spelling for each word and value ---------------------------------------------------------

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES = f"{ONES} fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {word: i for i, word in enumerate(ONES)} | {w: 10 * i for i, w in enumerate(TENS, 2)}
HAN = "一二三四五六七八九"
NUMBERS |= {digit: i for i, digit in enumerate(HAN, 1)} | {"两": 2}
LARGE = dict(dozen=12.0, hundred=1e2, thousand=1e3, million=1e6, billion=1e9, trillion=1e12)
SMALL = rf"(?:(?:{'|'.join(TENS)})[- ](?:{'|'.join(ONES[1:10])})|{'|'.join([*ONES, *TENS])})\b"
TIMES = rf"(?:(?:{SMALL}|\d+(?:\.\d+)?) )?(?:{'|'.join(LARGE)})\b"
NUMBER_WORDS = (
    rf"\b(?:{TIMES}(?:,? (?:and )?{TIMES})*(?: (?:and )?{SMALL})?|{SMALL})"
    rf"|(?<![百千万零十两{HAN}])(?:[{HAN}]?十[{HAN}]?|[{HAN}两])"
    r"(?=[个個只隻张張条把辆本块位匹棵人名度厘毫米つ]|$)"
)


def _digits(match: re.Match) -> str:
    """Number words as digits, such as "105" for "one hundred and five"."""
    total = part = 0
    for word in re.findall(r"[\d.]+|\w+", match[0]):
        if LARGE.get(word, 0) >= 1000:
            total, part = total + (part or 1) * LARGE[word], 0
        elif word in LARGE:
            part = (part or 1) * LARGE[word]
        elif "十" in word:
            tens, _, ones = word.partition("十")
            part += 10 * NUMBERS.get(tens, 1) + NUMBERS.get(ones, 0)
        elif word != "and":
            part += NUMBERS[word] if word in NUMBERS else float(word)
    return f"{total + part:.15g}"


PARTS = {"halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12}
UNITS = dict(sec="s", second="s", minute="min", min="min", hr="h", hour="h", foot="ft", feet="ft")
UNITS |= dict(inche="inch", mile="mi", yard="yd", kilo="kg", kg="kg", pound="lb", ounce="oz")
UNITS |= dict(year="yr", yr="yr", newton="n", volt="v", joule="j", watt="w", kelvin="k", ohm="ω")
HAN_UNITS = {"厘米": "cm", "公分": "cm", "毫米": "mm", "千米": "km", "公里": "km", "米": "m"}
LATEX = dict(pm="±", mp="±", ge="≥", geq="≥", le="≤", leq="≤", gt=">", lt="<", ne="≠", neq="≠")
LATEX |= dict(alpha="α", beta="β", gamma="γ", theta="θ", phi="φ", angle="∠", triangle="△")
LATEX |= {name: f" {name} " for name in ("sin", "cos", "tan", "cot", "log", "ln", "not")}

FOLD = str.maketrans("’º˚∘。÷−–‐‑∶", "'°°°./----:", "\u200b\ufeff")
FOLD |= {zero + i: str(i) for zero in map(ord, "٠۰०") for i in range(10)}  # digits of other scripts
PLURAL = re.compile(r"(?:(?<=\w\w\w)|(?<=\b[ckm]m)|(?<=\bkg)|(?<=\blb))s\b")
# The "a" of "a chair", "a 3D view" and of a text cut off after "there is a" is no option's letter.
# It is one in "a", "option a", "A is closer", "A or B" and "A left".
ARTICLE = re.compile(
    r"(?<![Oo]ption )(?<![Cc]hoice )(?<![Aa]nswer )(?:"
    r"\b(?<!<)[AaI] +(?=['\"`*“‘]*[^\W\d_]{2}|\d+[-A-Za-z])"
    r"(?!(?i:is|was|has|would|should|must|and|or|nor|vs|as|in|because|since|appear|look|seem)s?\b)"
    r"(?!(?i:left|right|above|below|yes|no|true|false)\b(?! +\w))"
    r"|(?<=\w )(?<!nswer is )(?<!ption is )(?<!hoice is )(?<!hoose )(?<!elect )a\s*\Z)"
)
REWRITES = [  # applied in this order
    (r" ?\\(?:text|math|boxed)[a-z]* *\{ ?([^{}]*)\}", r" \1"),  # \text{cm}
    (r" ?\^? ?\{? ?\\(?:circ|degree)(?![a-z]) ?\}?|\^\{?°\}?", "°"),
    (rf"\\({'|'.join(LATEX)})(?![a-z])", lambda match: LATEX[match[1]]),
    (r"\b(?:anti|counter)[- ]?(?=clock-?wise)", "counter"),
    (r"\b(north|south)[- ](?=(?:east|west)\b)", r"\1"),
    (r"\b(?:(?:any|every)(?:thing)?|all)(?: options?)? but\b", " not "),
    (r"\b(?:other than|excluding|far from)\b", " not "),
    (r"\b(?:right|correct) (?=(?:answer|option|choice)\b)|\bbased on\b|正[确確](?=答案|选项)", " "),
    (r"[没沒][错錯]|非常|(?<=答案)[是为為]", " "),  # "not wrong", "very" and "is" deny nothing
    (r"(?:\A|(?<=[=(,])) *- +(?=[\d.√\\])", "-"),  # "x = - 5"
    (r"(?<=[\d°)}]) ?- ?(?=[α-ωa-z]\b)", " ± "),  # "90 - x" has no value
    (r"(?:∠ ?|_)\{?\w{1,3}\}?(?=(?: ?= ?∠ ?\w{1,3}){0,2}(?: ?= ?| is )-?\d)", " "),  # "∠1 = 35°"
    (r"(?:\b[a-z])?'(?:s|d|m|ll|re|ve)\b|\b[a-z]'(?=[a-z])|\b(?:e\.g|i\.e|the|an)\b", " "),
    (r"</\w[^<>]*>|<\w[^<>]*>(?=[^<])", " "),  # HTML
    (r"\bcan(?:no|')t\b", "can not"),
    (r"\b(is|are|was|were|do|does|did|has|have)nt\b", r"\1 not "),  # not "burnt"
    (r"n't\b|ない|ません|[不没沒非错錯]|아[니닙님]|排除|除了|[别別](?=选|選)", " not "),
    (r"\bno +(?=[^\W\d_])(?!(?:it|there|he|she|they)\b)", "not "),  # "no chairs" states no "no"
    (NUMBER_WORDS, _digits),
    (r"(?<=\d) +and +half\b", " 1/2"),
    (r"\b(?:one |1 |a )?half\b", "1/2"),
    (rf"\b(\d+)[- ]({'|'.join(PARTS)})s?\b", lambda match: f"{match[1]}/{PARTS[match[2]]}"),
    (r"\b(?:minus|negative) |[负負](?=\d)", "-"),
    (r"\b([ap])\.m\b\.?", r"\1m"),
    (r"(?<![\d:.])(\d\d?) ?: ?([0-5]\d)(?![\d:])", r"(\1+\2/60)"),  # 7:30
    (r"(?<=\d)\^\{?o\b\}?|(?<=\d) ?deg(?:rees?)?\b|度", "°"),
    (r"(?<=[\d°]) ?°? ?([cf])(?:elsius|ahrenheit)?\b", r"° \1deg"),  # no option's letter
    (r"(?<=\d) ?(?:per ?cent|pct)\b", "%"),
    (r"\b(?:([cdkm])(?:enti|eci|ilo|illi))?([mgl])(?:eter|etre|ram|iter|itre)s?\b", r"\1\2"),
    (rf"(\d ?|/ ?|\bper )({'|'.join(UNITS)})s?\b", lambda match: match[1] + UNITS[match[2]]),
    (r"(?<=\d) in(?=\W*\Z)", " inch"),
    (r"\beuros?\b", "€"),
    ("|".join(HAN_UNITS), lambda match: f" {HAN_UNITS[match[0]]} "),
    (r"(?<![a-z])mph\b", "mi/h"),
    (r"(?:square|sq\.?) *f(?:ee|oo|)t\b", "ft^2"),
    (r"(?:square|sq\.?|平方) *([ckm]?m)\b", r"\1^2"),
    (r"(?:cubic|立方) *([ckm]?m)\b", r"\1^3"),
    (r"\\times|\\cdot|[×·⋅]| x(?= ?10 ?\^)", "*"),
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"(?<=\d) to (?=\d)", "-"),
    (r" squared\b", "^2"),
    (r" cubed\b", "^3"),
    (r"(?<=[\d})]) ?([xyzα-ορ-ψ])\b|(?<=\d)(i)\b", r"^\1\2"),  # "3x" is not 3
    (r"\A([^$]*)\$ ?([\d.,]*\d)([^$]*)\Z", r"\1\2 dollar\3"),  # one $ is not LaTeX
    (r"([€£¥₹₩₽₺₫₪]) ?([\d.,]*\d)", r"\2 \1"),
    (r"\bcube root(?: of)? ", "cbrt"),
    (r"√|\\sqrt|根号|\b(?:square )?root(?: of)? ", "sqrt"),
    (r"π|\\pi\b", "pi "),
    (r"sqrt\[3\]|∛", "cbrt"),
    *2  # for a root in a fraction and a fraction in a root
    * [
        (r"(sqrt|cbrt|\^) *(?:\{([^{}]*)\}|(-?\d+(?:\.\d+)?|pi\b))", r"\1(\2\3)"),
        (r"\\[dtc]?frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))", r"((\1\2)/(\3\4))"),
    ],
    (r"(?<![\d.])(\d+) *\(\((\d+)\)/\((\d+)\)\)", r"(\1+\2/\3)"),  # 2\frac{1}{2}
    (r"(?<![\d.])(\d+) +(\d+)[/⁄](\d+)\b", r"(\1+\2/\3)"),  # 2½
    (r"\{,\}", ","),
    (r"\\(?!frac)(?:[a-z]+|[;:! ]|,(?!\d))?|\*\*|\$", ""),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"(?<![\d.])0+(?=\d)", ""),
    (r"(?<=[\d)i}]) ?(?:(?:square|sq\.?|cubic) )?units?\b(?!/)", " "),
    (r" *\{", "("),
    (r"\}", ")"),
    (r"⁄", "/"),
    (r"(?<=[a-z])(?<!pi)\^\(?(-?\d)\)?\^?", r"\1"),  # cm^2
    (r"(\d\)? *[a-z]+)(?: ?/ ?| per )(?=[a-z])", r"\1per"),  # m/s
    (r"\b([23])d\b", r"dim\1"),  # "a 3D view" has no value
    ("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af])", r" \1 "),
    (r"[!;\n]+|\.(?!\d)", " . "),  # not "?", because "Left? No." denies it
    (r"[ ?]+|\s", " "),
    (r"(?<=[\d)i]) ?(?=pi\b|sqrt\(|cbrt\()|(?<=[\d)])(?=\()|(?<=\))(?=\d)", "*"),
]
# Compiled here, so that the first answer is not slower than the others.
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]
NUMERAL = r"(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?"
TERM = rf"(?:-?(?:sqrt|cbrt)?\(\ ?){{0,9}}-?(?:{NUMERAL}|pi\b)(?:\ ?\)){{0,9}}"
TOKEN = re.compile(
    rf"""
      (?P<value> (?<![\w.]) (?:(?<!\))\+)? {TERM} (?:(?:\ ?[-+*/^]\ ?|\ (?=\d)) {TERM})* (?!\.\d) )
    | (?<![^\s(=,])-(?=\(*[a-z∞](?!\w))      # the sign of "-x"
    | [^\W_]+(?:\.\d+)*                       # a word, a version "1.2.3"
    | [^\w\s,:'"`*()\[\]_#&|~«»“”‘「」『』【】《》、-]  # a symbol
    """,
    re.VERBOSE,
)
# After one of these words there is no unit any more.
PROSE = "is are was in on of because since so and as at by for from to with when where which total "
PROSE += "exactly approx approximately most likely"
STOP = rf"(?:[.#]|{PROSE.replace(' ', '|')}) "
VALUE = re.compile(rf" (-?{NUMERAL}|\?\S+) ((?: (?!{STOP}|[?]|-?\d)\S+ )*)")
