"""Reads units and currencies: which dimension they have and how large they are, so that 5 m is 500 cm but not 5 cm."""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache

Unit = tuple[tuple[tuple[str, int], ...], Fraction]  # the powers of its dimensions, its size

_NAMES: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, **sizes: str) -> None:
    for size, unit_names in ((Fraction(key.replace("_", "/").lstrip("x")), value) for key, value in sizes.items()):
        _NAMES.update(dict.fromkeys(unit_names.split(), (dimension, size)))


_define("length", x1="m meter meters metre metres 米", x1_100="cm centimeter centimeters centimetre centimetres 厘米",
        x1_1000="mm millimeter millimeters millimetre millimetres 毫米", x254_10000="inch inches",
        x1000="km kilometer kilometers kilometre kilometres 千米 公里", x3048_10000="ft foot feet",
        x9144_10000="yd yard yards", x1609344_1000="mile miles mi",
        x1_1000000="μm um micrometer micrometers micron microns", x1_1000000000="nm nanometer nanometers")  # fmt: skip
_define("time", x1="s sec secs second seconds 秒", x60="min mins minute minutes 分钟", x3600="h hr hrs hour hours 小时",
        x86400="day days 天", x604800="week weeks", x1_1000="ms millisecond milliseconds")  # fmt: skip
_define("mass", x1="g gram grams 克", x1000="kg kilogram kilograms 千克 公斤", x1_1000="mg milligram milligrams",
        x1000000="tonne tonnes 吨", x45359237_100000="lb lbs", x45359237_1600000="oz ounce ounces")  # fmt: skip
_define("calendar", x1="month months 个月", x12="year years yr yrs")
_define("dollar", x1="$ dollar dollars usd us$", x1_100="cent cents ¢")
for _name, _words in {
    "euro": "€ euro euros eur", "sterling": "£ gbp", "yuan": "元 yuan cny rmb ¥ 人民币", "yen": "yen jpy",
    "rupee": "₹ rupee rupees inr",
    "won": "₩ won krw", "angle": "° degree degrees deg 度", "percent": "% percent",
    "volume": "l liter liters litre litres", "charge": "coulomb coulombs", "force": "n newton newtons",
    "energy": "j joule joules", "power": "watt watts", "voltage": "volt volts", "current": "ampere amperes",
    "resistance": "ω ohm ohms", "temperature": "kelvin kelvins", "celsius": "℃ celsius °c",
    "fahrenheit": "℉ fahrenheit °f", "amount": "mol mole moles",
}.items():  # fmt: skip
    _define(_name, x1=_words)
_define("volume", x1_1000="ml milliliter milliliters millilitre millilitres",
        x3785411784_1000000000="gal gallon gallons",
        x946352946_1000000000="qt quart quarts", x473176473_1000000000="pt pint pints",
        x473176473_2000000000="cup cups")  # fmt: skip
_SYMBOLS = {"N": "force", "J": "energy", "W": "power", "V": "voltage", "A": "current", "Ω": "resistance",
            "K": "temperature",
            "Hz": "frequency", "Pa": "pressure", "T": "flux", "C": "charge", "F": "capacity", "eV": "electronvolt",
            "L": "volume", "rad": "radian", "mol": "amount"}  # fmt: skip
_PREFIXES = {"": Fraction(1), "k": Fraction(1000), "M": Fraction(10**6), "G": Fraction(10**9), "m": Fraction(1, 1000),
             "μ": Fraction(1, 10**6), "µ": Fraction(1, 10**6), "n": Fraction(1, 10**9)}  # fmt: skip
_SPEEDS = re.compile(r"\b(?:mph|kmph|kph|kmh)\b", re.IGNORECASE)
_WORDY = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3}
_PIECE = re.compile(
    r"\s*(/|\bper\b|每|[*·]|(?:[A-Za-zμµΩω°]+|[$€£¥₹₩%¢℃]|[\u4e00-\u9fff]+)\$?|\^?\s*\{?\s*-?\d\s*\}?)", re.IGNORECASE
)


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """Return the unit that a text names (`m/s^2`, `square feet`, `$`), or None where a word in it is no known unit."""
    text = re.sub(r"[«»(),.]", " ", text).strip()
    text = re.sub(r"^(?:degrees?|°)\s*(?=(?:celsius|fahrenheit|[CF])$)", "°", text, flags=re.IGNORECASE)
    text = re.sub(r"^°(?=celsius$|fahrenheit$)", "", text, flags=re.IGNORECASE)
    text = _SPEEDS.sub(lambda speed: "mile/hour" if speed[0].lower() == "mph" else "km/hour", text)
    powers: Counter[str] = Counter()
    size = Fraction(1)
    position, side, wordy, last = 0, 1, 1, None
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None:
            return None
        position, word = piece.end(), piece[1].strip()
        if word in ("/", "per", "每"):
            side = -1
        elif word in ("*", "·", ""):
            continue
        elif word.lower() in _WORDY:
            if word.lower() in ("squared", "cubed") and last:
                powers[last[0]] += (_WORDY[word.lower()] - 1) * side
                size *= last[1] ** ((_WORDY[word.lower()] - 1) * side)
            else:
                wordy = _WORDY[word.lower()]
        elif word.lstrip("^ {-")[:1].isdigit():
            if last is None:
                return None
            power = int(re.sub(r"[^\d-]", "", word))
            powers[last[0]] += (power - 1) * side
            size *= last[1] ** ((power - 1) * side)
        else:
            last = _base(word)
            if last is None:
                return None
            powers[last[0]] += wordy * side
            size *= last[1] ** (wordy * side)
            wordy = 1
    return tuple(sorted((name, power) for name, power in powers.items() if power)), size


def _base(word: str) -> tuple[str, Fraction] | None:
    if word in _SYMBOLS:
        return _SYMBOLS[word], Fraction(1)
    if word in _NAMES:
        return _NAMES[word]
    if len(word) > 1 and word[1:] in _SYMBOLS and word[0] in _PREFIXES:
        return _SYMBOLS[word[1:]], _PREFIXES[word[0]]
    return None if len(word) == 1 else _NAMES.get(word.lower())
