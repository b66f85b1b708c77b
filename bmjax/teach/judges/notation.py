"""Rewrites the many notations of mathematics as one: LaTeX, Unicode and plain text become the same characters.

`normal_form` keeps the value. Commands become symbols (`\\pi` is π, `\\cdot` is *, `\\left` goes), full-width and
vulgar characters plain ones, thousands separators go, and text is marked: `\\text{ or }` is «or». What it does not
know stays as a command, which no reader of values accepts.
"""

import re
import unicodedata

_OPENING, _CLOSING = "([{⦃", ")]}⦄"
LONGEST = 2_000  # characters of a value; a longer one is not read

_GREEK = dict(zip(
    ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "mu", "nu", "xi", "pi",
     "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Xi", "Sigma", "Phi",
     "Psi", "Omega"),
    "αβγδεζηθικμνξπρστυφχψωΓΔΘΞΣΦΨΩ",
    strict=True,
))  # fmt: skip

_SYMBOLS = {
    **_GREEK, "lambda": "λ", "Lambda": "Λ", "varepsilon": "ε", "vartheta": "θ", "varphi": "φ", "varpi": "π",
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "mp": "∓", "infty": "∞", "infin": "∞",
    "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "ne": "≠", "neq": "≠", "lt": "<",
    "gt": ">", "cup": "∪", "cap": "∩", "in": "∈", "to": "→", "rightarrow": "→", "emptyset": "∅", "varnothing": "∅",
    "langle": "(", "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "lfloor": "⌊", "rfloor": "⌋",
    "lceil": "⌈", "rceil": "⌉", "degree": "°", "circ": "∘", "lbrace": "⦃", "rbrace": "⦄", "lbrack": "[", "rbrack": "]",
    "approx": "≈", "equiv": "=", "land": " «and» ", "lor": " «or» ", "wedge": " «and» ", "vee": " «or» ", "quad": " ",
    "qquad": " ", "colon": ":", "prime": "'", "backslash": "∖", "setminus": "∖", "euro": "€", "pounds": "£",
}  # fmt: skip
_DROPPED = {
    "left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle",
    "limits",
    "middle", "boldsymbol", "mathstrut", "hfill", "large", "Large", "mathit", "mathbf", "bf", "bm", "it", "rm",
    "nonumber", "mathord", "biggl", "biggr", "mathsf", "scriptstyle", "null", "phantom", "hspace", "ensuremath",
}  # fmt: skip
_RENAMED = {"dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "dbinom": "\\binom", "tbinom": "\\binom"}
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‒": "-", "﹣": "-", "⁻": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*",
    "∙": "*", "•": "*", "÷": "/", "∕": "/", "⁄": "/", "√": "\\sqrt ", "，": ",", "；": ";", "：": ":", "（": "(",
    "）": ")", "［": "[", "］": "]", "。": ".", "ℝ": "\\mathbb{R}", "∛": "\\sqrt[3] ",
    "⩽": "≤", "≦": "≤", "⩾": "≥", "≧": "≥", "º": "°", "˚": "°", "⟨": "(",
    "⟩": ")", "〈": "(", "〉": ")", "∶": ":", "¥": "¥", "￥": "¥", "、": ",", "’": "'", "‘": "'", "′": "'", "∣": "|",
    "\u200b": "", "\u2061": "", "\u2062": "*", "\u2064": "+", "\ufeff": "", "\u200e": "",
})  # fmt: skip
_VULGAR = {character: unicodedata.normalize("NFKC", character).replace("⁄", "/") for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"

_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = re.compile(f"[{_SUBSCRIPTS}]+")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|tt|up)|mbox|hbox|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)\*?[ ]*")
_THIN = re.compile(r"(?:\\[,;:> ]|~|[\u00a0\u2006-\u200a\u202f\u205f\u3000])")
_GROUPS = r"\d{1,3}(?:%s\d{3})+(?![\d]|%s\d)"
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,⁠])" + _GROUPS % ("⁠", "⁠"))
_QUOTED_THOUSANDS = re.compile(r"(?<![\d.,'])" + _GROUPS % ("'", "'"))
_COMMA_THOUSANDS = re.compile(r"(?<![\d.,])(?:" + _GROUPS % (",", ",") + r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d]|,\d))")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|dot|bar)\s*\{?(\d+)\}?")
_DOTTED_CYCLE = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_ELLIPSIS = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,12}?)(\d{1,6}?)\3{2,9}\s?(?:\.\.\.|…|\\[lc]?dots\b)")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z_\\\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?)(\d{1,6})(?![\w.])")
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# 70k, $1.2M, 3bn people: thousands and more by a letter.
COUNTED = re.compile(
    r"(?P<sign>[-−+]?)\s?(?P<currency>(?:US)?\\?\$|[€£¥₹₩])?\s?(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)\s?"
    r"(?P<letter>[kK]|M|mn|B|bn)(?P<rest> [A-Za-z]{3,})?"
)
COUNT_ZEROS = {"k": 3, "K": 3, "M": 6, "mn": 6, "B": 9, "bn": 9}
_MONEY_COUNTED = re.compile(r"([$€£¥₹₩] ?\d+(?:\.\d+)?) ?([kK]|[mM]|mn|B|bn)(?![A-Za-z0-9])")
_OVER = re.compile(r"(\{?)\s*([^{}\\]{1,40}?)\s*\\(over|choose)(?![a-z])\s*([^{}\\]{1,40}?)\s*(\}|$)")
_RUPEES = re.compile(r"\bRs\.?\s*(?=\d)")
_MODULO = re.compile(r"(?:\\pmod\s*|\(\s*(?:\\bmod|\\mod|«mod»|mod)\s*)\{?\s*(\w+)\s*\}?\)?")
_LEADING_ARROW = re.compile(r"^\s*(?:\\(?:therefore|[rR]ightarrow|Longrightarrow|implies)(?![a-zA-Z])|[∴⇒→])\s*")
_GROUPED = re.compile(r"[-+]?[$€£]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_DELIMITED = re.compile(
    r"\$\$(.*?)\$\$|(?<!\\)\$(?=\S)([^$]*?)(?<=[^\s\\])\$(?!\d)|(?<!\\)\$(?=\s)([^$]*?)(?<=\s)\$(?!\d)", re.DOTALL
)
_NUMBER_WORD = re.compile(
    r"(?<![\w.])(\d+(?:\.\d+)?)«?\s*«?(hundred|thousand|million|billion|trillion)(?![A-Za-z])»?", re.IGNORECASE
)
_FEET = re.compile(r"(?<![\w.])(\d{1,2})' ?(\d{1,2})(?:\"|'')?$")
_FOOT = re.compile(r"(?<![\w.])(\d+) ?«?(?:ft|feet|foot)»?\.? ?(\d+) ?«?in»?\.?$")
_HOURS = re.compile(r"(?<![\w.])(\d+) ?h(?:rs?)? ?(\d+) ?m(?:ins?)?$")
_FUNCTION_WORDS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "lg", "exp", "arcsin", "arccos", "arctan", "sinh", "cosh",
    "tanh", "max", "min", "gcd", "lcm", "det", "deg", "sqrt", "cis",
}  # fmt: skip


def normal_form(text: str, thousands: bool = True) -> str:
    """Return the one notation of a value. Without `thousands`, `1,234` stays two numbers."""
    text = text[: LONGEST + 1].strip()
    text = re.sub(f"(\\d?)\\s?([{''.join(_VULGAR)}])", lambda m: f"{m[1]}{' ' if m[1] else ''}{_VULGAR[m[2]]}", text)
    text = _OVER.sub(lambda m: f"{m[1]}\\{'frac' if m[3] == 'over' else 'binom'}{{{m[2]}}}{{{m[4]}}}{m[5]}", text)
    text = _RUPEES.sub("₹", text)
    text = _RAISED.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = _LOWERED.sub(lambda run: f"_{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = text.replace("\\\\", "⏎").replace("\\$", "＄").replace("\\mathrm{~", "\\mathrm{")
    text = re.sub(r"(?<=\d),\\!\s*(?=\d{3})", ",", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = _THIN.sub("⁠", text)
    text = _LEADING_ARROW.sub("", _without_delimiters(text)).translate(_UNICODE)
    text = unicodedata.normalize("NFKC", text).translate(_UNICODE)  # ＄ becomes the currency's $
    text = text.replace("\\!", "").replace("{,}", ",").replace("\\%", "%").replace("\\#", "#")
    text = text.replace("\\{", "⦃").replace("\\}", "⦄").replace("\\&", "&").replace("\\_", "_").replace("\\|", "|")
    text = re.sub(r"\\[()\[\]]", "", text)

    # Text first, for its words are no variables.
    for _ in range(3):
        text = _TEXT.sub(_marked, text)
    text = _SPACED_THOUSANDS.sub(lambda run: run[0].replace("⁠", ""), text)
    text = text.replace("⁠", " ")
    text = _QUOTED_THOUSANDS.sub(lambda run: run[0].replace("'", ""), text)
    if thousands:
        text = re.sub(r"(?<=\d),\s*(?=\d)", lambda m: "," if m[0] == "," else ", ", text)
        text = _COMMA_THOUSANDS.sub(lambda run: run[0].replace(",", ""), text)

        text = text.replace(" ", "") if _GROUPED.fullmatch(text) else text
    text = _MONEY_COUNTED.sub(lambda m: f"{m[1]}*10^{{{COUNT_ZEROS.get(m[2], 6)}}}", text)
    text = re.sub(r"\+ ?/ ?-", "±", text)
    text = re.sub(r"(?<![A-Za-z\\])inf(?:inity)?(?![A-Za-z])", "∞", text)
    text = re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", "∪", text)
    text = _MODULO.sub(r"(«mod» \1)", text)
    text = re.sub(r"(?<![\w)} ])(\s*)(?:negative|minus)\s+(?=[\d.\\∞])", r"\1-", text, flags=re.IGNORECASE)
    text = _NUMBER_WORD.sub(lambda m: f"({m[1]}*10^{{{_ZEROS[m[2].casefold()]}}})", text)
    text = re.sub(r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*", text)
    text = _HOURS.sub(r"\1 hours \2 minutes", text)
    text = _FOOT.sub(r"\1 feet \2 inches", _FEET.sub(r"\1 feet \2 inches", text))
    text = _REPEATING.sub(_repeating, _ELLIPSIS.sub(_repeating, _DOTTED_CYCLE.sub(r"\\overline{\1\2\3}", text)))
    text = _COMMAND.sub(_symbol, text)
    text = re.sub(r"\^\s*(?:\{\s*∘\s*\}|∘)", "°", text)
    text = _SCIENTIFIC.sub(r"\1*10^{\2\3}", text)
    text = text.replace("**", "^").replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("->", "→")
    text = re.sub(r"\s+", " ", text).strip()
    while len(text) > 1 and text[0] == "{" and _closes_at_end(text):
        text = text[1:-1].strip()
    return re.sub(r"[\s.,;:!]+$", "", text) if not re.search(r"[\w)\]}⦄]!$", text) else text


def _without_delimiters(text: str) -> str:
    """Drop the dollar signs around mathematics; one before a number that none closes is the currency's."""
    text = _DELIMITED.sub(lambda span: next(group for group in span.groups() if group is not None), text)
    return re.sub(r"\$(?=\s?[-−–]?\s?\.?\d)", "＄", text).replace("$", "")


def _marked(found: re.Match[str]) -> str:
    words = found[1].strip().strip("{}").strip(" ⁠~.")
    if not words:
        return " "
    if words in _FUNCTION_WORDS:
        return f"\\{words} "
    # Numbers inside of text are numbers: \text{$5} and \text{3 or 5}.
    if re.fullmatch(r"[A-Z]", words) or re.search(r"\d", words):
        return f" {words} "
    return f" «{words}» "


def _symbol(command: re.Match[str]) -> str:
    name = command[1]
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if name in _DROPPED:
        return ""
    return _RENAMED.get(name, "\\" + name) + " "


def _repeating(decimal: re.Match[str]) -> str:
    """Write 0.1\\overline{6} as the fraction that it is."""
    whole, fixed, cycle = decimal[1] or "0", decimal[2], decimal[3]
    if len(whole + fixed + cycle) > 100:
        return decimal[0]
    denominator = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    return f"({int(whole + fixed + cycle) - int(whole + fixed)}/{denominator})"


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position == len(text) - 1
    return False


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at separators outside of all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    bars = False
    while position < len(text):
        character = text[position]
        depth += (character in _OPENING) - (character in _CLOSING)
        bars ^= character == "|"
        if text.startswith("\\begin", position):
            depth += 1
        elif text.startswith("\\end", position):
            depth -= 1
        match = separator.match(text, position) if depth <= 0 and not bars else None
        if match and match[0].strip():
            parts.append(text[start:position].strip())
            position = start = match.end()
        else:
            position += 1
    return [*parts, text[start:].strip()]


def matching_bracket(text: str, start: int) -> int:
    """Return where the bracket at `start` closes; intervals may close with another bracket."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        if depth == 0:
            return position
    return -1
