"""Reads what a reply states as its answer: the only module that knows boxes, "the answer is", bold type and 答案.

Every judge asks here. `after_reasoning` drops the thought; an `Answer` lists the statements of the rest, the best one
first: boxes, tags, "the answer is", `####`, then bold type. What a statement means is the judges' matter.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bmjax.teach.record import is_whole

LONGEST_ANSWER = 20_000  # characters; an answer stands at the end of a reply
_LONGEST_STATEMENT = 1_000
_MOST_STATEMENTS = 12  # the last ones; a reply that states more is no answer

# Tags of reasoning: bmjax's own, and those of other models.
_THOUGHTS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
)  # fmt: skip

Anchor = Literal["box", "tag", "stated", "bold", "whole"]


@dataclass(frozen=True)
class Statement:
    """A part of a reply that states an answer.

    Attributes:
        text: the statement to the end of its sentence.
        anchor: what marks it; "whole" is a reply that is hardly more than an answer.
        start: position in the reply.
        line: the statement to the end of its line, for answers that hold a full stop.
    """

    text: str
    anchor: Anchor
    start: int
    line: str


def after_reasoning(reply: str) -> str | None:
    """Return the text after the last closed thought; None while a thought is still open."""
    reply = re.sub(r"</?(?:think|thinking|thought|reasoning)>", lambda tag: tag[0].lower(), reply, flags=re.IGNORECASE)
    for opening, closing in _THOUGHTS:
        if opening in reply or closing in reply:
            thought, closed, rest = reply.rpartition(closing)
            reply = rest if closed else reply
            if opening in reply:
                return None
    return reply.strip()


def is_cut(finish_reason: str | None) -> bool:
    """Return whether a reply ended before its writer was done."""
    return not is_whole(finish_reason)


# "The answer is not 12", unless it goes on to "but 13".
_REJECTED = re.compile(
    r"\banswer(?:[*_]{0,3}[:：][*_]{0,3}|\s+(?:is|was))?\s*(?:(?:definitely|clearly|certainly|therefore)\s+)?"
    r"(?:\bnot\b|n['’]t\b|cannot\s+be\b|can['’]t\s+be\b)(?:(?!\bbut\b|\brather\b|\binstead\b)[^.,;:\n—]|\.(?=\d)|,(?=\d))*"
    r"(?!,?\s*(?:but|rather|instead)\b)(?=[.,;:\n—]|$)"
    r"|\bwrong\s+(?:answer|option|choice)\s+(?:is|was)\b[^.;\n]*"
    r"|^\W*(?:(?:it(?:['’]s|\s+is)|definitely|certainly)\s+)?not\s+(?:(?!\bbut\b)[^.,;:\n—])*[.\s*]*$",
    re.IGNORECASE,
)


def _blanked(found: re.Match[str]) -> str:
    return " " * len(found[0])


@dataclass(frozen=True)
class Answer:
    """A whole reply without its reasoning."""

    text: str

    @cached_property
    def tail(self) -> str:
        """The end of the text, which is all that is searched, with blanks for what "is not the answer"."""
        return _REJECTED.sub(_blanked, self.text[-LONGEST_ANSWER:])

    @cached_property
    def statements(self) -> list[Statement]:
        """What the reply states, the best first: the last of the strong anchors, the whole of it, the last bold."""
        strong = [*_boxes(self.tail), *_tags(self.tail), *_stated(self.tail)]
        strong = sorted(strong, key=lambda item: -item.start)[:_MOST_STATEMENTS]
        text = self.tail.strip()
        whole = [Statement(text, "whole", 0, text)] if self.is_short and text else []
        return [*strong, *whole, *_bold(self.tail)[:_MOST_STATEMENTS]]

    @property
    def is_short(self) -> bool:
        """Whether the reply is one line of a few words, which is then the answer."""
        return 0 < len(self.text) <= 200 and "\n" not in self.text.strip()


# Boxes. Two of them with nothing but a joining word between them are one answer.
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*$")
_BARE_BOX = re.compile(r"\\boxed\s+(?:\\[a-zA-Z]+|[0-9]+|[a-zA-Z])")
_JOINER = re.compile(
    r"[\s$\\()\[\].*]*(?:,|;|、|，|and|or|和|或|\\text\{\s*(?:and|or)\s*\})[\s$\\()\[\].*,]*"
    r"(?:(?:and|or)\b[\s$\\()\[\].*]*)?(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?[\s$\\()\[\]*]*"
)


# \\boxed{A}\\boxed{B} are the two options of one answer.
_LETTER_BOX = re.compile(r"[A-J](?:, [A-J])*|\\text\{[A-J]\}")


def last_boxed(text: str) -> str | None:
    """Return the content of the last complete \\boxed{...}, or None."""
    spans = _box_spans(text)
    return text[spans[-1][1] : spans[-1][2]] if spans else None


def _box_spans(text: str) -> list[tuple[int, int, int]]:
    """Find (start, start of content, end of content) of the outermost complete boxes, in one pass over the text."""
    open_braces: list[tuple[int, int]] = []  # position of the brace, start of the command that owns it or -1
    spans: list[tuple[int, int, int]] = []
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        if brace[0] == "{":
            command = _BOX.search(text, max(0, brace.start() - 16), brace.start())
            open_braces.append((brace.start(), command.start() if command else -1))
        elif open_braces:
            opening, start = open_braces.pop()
            if start >= 0 and text[opening + 1 : brace.start()].strip(" $\\.,"):
                while spans and spans[-1][0] > start:
                    spans.pop()
                spans.append((start, opening + 1, brace.start()))
    if not spans:
        for bare in _BARE_BOX.finditer(text):
            content = bare.start() + len("\\boxed")
            spans.append((bare.start(), content, bare.end()))
    return spans


def _boxes(text: str) -> list[Statement]:
    statements: list[Statement] = []
    end = -1
    for start, opening, closing in _box_spans(text):
        content = text[opening:closing].strip()[:_LONGEST_STATEMENT]
        between = text[end:start] if end >= 0 and start - end <= 40 else None
        letters = _LETTER_BOX.fullmatch(content) and statements and _LETTER_BOX.fullmatch(statements[-1].text)
        if between is not None and (_JOINER.fullmatch(between) or (letters and not between.strip(" $~"))):
            content = f"{statements.pop().text}, {content}"[:_LONGEST_STATEMENT]
        statements.append(Statement(content, "box", start, content))
        end = closing + 1
    return statements


_TAG = re.compile(r"<(?:final_)?(answer|result)>(.{1,1000}?)</(?:final_)?\1>", re.DOTALL | re.IGNORECASE)


_JSON_ANSWER = re.compile(
    r'"(?:final[_ ]?)?answer"\s*:\s*(?:"((?:[^"\\\n]|\\.){1,1000})"|(-?\d[\d.eE+-]*))(?=\s*[,}])', re.IGNORECASE
)


def _tags(text: str) -> list[Statement]:
    """Find <answer>...</answer>, unless a better anchor stands inside."""
    tags = ((tag, tag[2].strip()) for tag in _TAG.finditer(text) if "\\boxed" not in tag[2])
    found = [Statement(content, "tag", tag.start(), content) for tag, content in tags if content]
    # JSON says where its value ends.
    for pair in _JSON_ANSWER.finditer(text):
        content = (pair[1] if pair[1] is not None else pair[2]).strip()
        if content and "\\" not in content:
            found.append(Statement(content, "tag", pair.end(), content))
    return found


# "The answer is ...", `#### ...` and 答案. The mark of emphasis around the words has been blanked before.
_VERB = r"(?:\b(?:is|are|was|be|equals?|reads|would be|should be|must be|comes out (?:to be|as|to))\b|[=:：→⇒]|->|=>)"
_STATED = re.compile(
    r"""(?P<answer>
      \b(?:answers?|ans\.?)["']?                            # answer is, "answer": , Ans:
      (?:\s*\([^()\n]{1,40}\)|\s+(?:to|of|for|in|choice|option|letter|key|value|here|now|then|thus|therefore|that|we|
         should|would|must|will|can|only|indeed|simply|actually)\b[^.\n:=?]{0,80}?)?,?\s*"""
    + _VERB
    + r"""
    | \b(?:correct|right|best|final|chosen|my)\s+(?:option|choice|letter|statement|result|value|solution)s?
      (?:\s+(?:to|of|for|in|here|therefore)\b[^.\n:=?]{0,60}?)?,?\s*"""
    + _VERB
    + r"""
    | ^[ \t#]*(?:(?:the|final|correct|my)\s+)*(?:answers?|results?|solution|conclusion)[ \t]*[:：][ \t]*
    | ^[ \t]*\#{1,6}[ \t]*(?:(?:the|final|correct)\s+)*(?:answer|result)[ \t]*$
    | ^[ \t]*(?:the\s+)?final\s+(?:answer|result)[ \t]*$
    | \b(?:la\s+respuesta|die\s+(?:\w{3,12}\s+)?antwort|la\s+r[ée]ponse|a\s+resposta|la\s+risposta)
      (?:\s+(?:correcta|finale?|final|est\u00e1|corretta|correcte))?\s*(?:\b(?:es|ist|lautet|est|[ée]|è)\b|[:=])
    | \b(?:actually|correction|scratch\s+that|corrected|make\s+that|on\s+second\s+thought)\b[,:]?\s*
      (?:no,?\s*)?(?:it(?:'s|\ is|\ should\ be)\s*)?(?=(?:[-−$]{0,2}\d[\d.,/]*%?|\(?(?-i:[A-J])\)?)[.!)*\s]*$)
    | ответ\s*[:—–-]
    | (?:最终|正确|参考|最后的?)?(?:答案|答え|正解|정답)\s*(?:应该|应当|应)?(?:[是为選选就即は은]{1,2})?\s*[:：]?
    | (?:故|因此|所以|本题|综上所述[,，]?|综上[,，]?|應|应|应该)(?:正确)?(?:本题)?(?:答案)?(?:应该?|應)?
      [选選](?:择|项)?(?:的?是|为)?\s*[:：]?
    | (?:正确(?:的)?(?:选项|说法|结论)(?:的)?|选项|选择)\s*(?:是|为|[:：])
    | 正确的\s*(?:是|为|有)\s*[:：]?
    )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
# 24 is the final answer
_NAMED_ANSWER = re.compile(
    r"(\$[^$\n]{1,200}\$|(?<![\w.,])[-−]?[$€£]?\d[\d.,/]*%?(?:\s+[a-z]+){0,2}?)\s+(?:is|are)\s+(?:therefore\s+|thus\s+|indeed\s+)?"
    r"(?:the|our|my)\s+(?:(?:final|correct|right|only|desired|required)\s+)*answer\b",
    re.IGNORECASE,
)
_HASH = re.compile(r"^[ \t]*####[ \t]*(?![ \t]*#)([^\n]{1,200})$", re.MULTILINE)
# A markdown heading of the same four marks: a numbered one, or one in words.
_HEADING = re.compile(
    r"^\s*\d+[.):]\s+\S|(?<![\\A-Za-z{])[A-Za-z]{3,}\s+[A-Za-z(\d]|[:：]\s*$|^\s*(?:step|part|case)\b", re.I
)
_DOUBT = re.compile(
    r"(?:\b(?:if|whether|suppose|unless|assume|assuming|is|was|why|when|what|not|nor"
    r"|(?:might|may|could)\s+(?:\w+\s+)?(?:think|say|guess|believe|assume|conclude))\b(?:\W+\w+){0,2}\W*)$",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\s*(?:(?:definitely|clearly|therefore|certainly)\s+)?(?:not\b|n't\b|\?)", re.IGNORECASE)
_INSTEAD = re.compile(r"\b(?:but|rather|instead)\b(?:\s+(?:rather|is))?", re.IGNORECASE)
_REPEATED_VERB = re.compile(
    r"^\s*(?:is|are|[=:：]|be|therefore|thus|simply|just|clearly|indeed|definitely|then|now|,)\s+", re.I
)
# A sentence ends at a stop that no digit or closing letter follows.
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z]\.[A-Za-z])(?<!\\)(?:[.!?](?=\s+\S|\s*$)|[。！？])")
_EMPHASIS = re.compile(
    r"(?<![0-9)])\*|\*(?![0-9(])|(?<=[^0-9*])\*{2,3}|\*{2,3}(?=[^0-9*])"
    r"|(?<![A-Za-z0-9\\}])__?(?=\S)|(?<=\S)__?(?![A-Za-z0-9{\\])|`{1,3}"
)


def plain(text: str) -> str:
    """Blank markdown's marks of emphasis and code, keeping every position."""
    return _EMPHASIS.sub(lambda mark: " " * len(mark[0]), text)


def _stated(text: str) -> list[Statement]:
    unmarked = plain(text)
    statements = []
    for anchor in _STATED.finditer(unmarked):
        if _DOUBT.search(unmarked, max(0, anchor.start() - 30), anchor.start()) and _is_doubtful(unmarked, anchor):
            continue
        # The statement is the rest of the line, else the next line that holds something.
        begin = anchor.end()
        rest = re.compile(r"[\s:：]*").match(unmarked, begin)
        begin = rest.end() if rest else begin
        line = unmarked[begin : begin + _LONGEST_STATEMENT].partition("\n")[0]
        if line.strip() in ("$$", "\\[", "["):
            line = unmarked[begin : begin + _LONGEST_STATEMENT].partition("\n\n")[0].replace("\n", " ")
        line = _REPEATED_VERB.sub("", line)
        if _NEGATED.match(line):
            instead = _INSTEAD.search(line)
            if instead is None:
                continue
            line = line[instead.end() :]
        stop = _first_stop(line)
        sentence = line[:stop].strip()
        if sentence and line[stop : stop + 1] != "?":
            statements.append(Statement(sentence, "stated", begin, line.strip()))
    for named in _NAMED_ANSWER.finditer(unmarked):
        doubtful = _DOUBT.search(unmarked, max(0, named.start() - 30), named.start()) and _is_doubtful(unmarked, named)
        if not doubtful and not re.match(r"[^.\n]*\?", unmarked[named.end() :]):
            statements.append(Statement(named[1].strip(), "stated", named.start(1), named[1].strip()))
    statements += [
        Statement(hashed[1].strip(), "stated", hashed.start(1), hashed[1].strip())
        for hashed in _HASH.finditer(unmarked)
        if not _HEADING.search(hashed[1])
    ]
    return statements


def _is_doubtful(text: str, anchor: re.Match[str]) -> bool:
    """Return whether "if the answer is", "is the answer" stands here, rather than "what is asked. The answer is"."""
    before = text[max(0, anchor.start() - 30) : anchor.start()]
    return not re.search(r"[.\n!?;:：。，]\s*(?:\w+,?\s+){0,2}$", before) and not re.search(
        r"\b(?:then|so|therefore|hence|thus),?\s+(?:the\s+|my\s+)?(?:\w+\s+)?$", before, re.IGNORECASE
    )


def _first_stop(line: str) -> int:
    """Return where the first sentence of a line ends. Stops inside mathematics, numbers and `B.` do not count."""
    for stop in _SENTENCE_END.finditer(line):
        head = line[: stop.start()]
        if len(re.findall(r"\$\$?", head)) % 2 == 0 and head.count("\\(") == head.count("\\)"):
            return stop.start()
    return len(line)


_BOLD = re.compile(
    r"\*\*(?!\s)([^*\n]{1,200}?)\*\*(?!\s*[:：])|__(?!\s)([^_\n]{1,200}?)__|<(?:b|strong)>([^<\n]{1,200})</|\\(?:textbf|mathbf)\{([^{}\n]{1,200})\}"
)


def _bold(text: str) -> list[Statement]:
    """Find bold type that is no heading, the last first."""
    statements = []
    for bold in _BOLD.finditer(text):
        content = next(group for group in bold.groups() if group is not None).strip()
        heading = content.endswith((":", "：")) or re.match(r"(?:step|part|case|note|solution)\b", content, re.I)
        if content and not heading:
            statements.append(Statement(content, "bold", bold.start(), content))
    return statements[::-1]
