"""Formulas of the documentation as MathML, which browsers draw themselves: no script, no network.

Two kinds: TeX between `$$`, and code spans that are formulas, as docstrings and notebooks have them: `τ ∝ ε^{−(r−2)}`. A code
span is taken for a formula if it has no word (of three letters or more), is no tuple, and has an operator or is one letter.
"""

import html
import re

from latex2mathml.converter import convert

DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
SPAN = re.compile(r"<pre.*?</pre>|<code>([^<]*)</code>", re.DOTALL)
OPERATOR = re.compile(r"^log |[_^=<>≥≤≠*/|√∇∂∏∫Σ‖⟨²³ᵀ−½→∘∈~…]|[α-ωΔ𝓛]")
PROGRAM = re.compile(r"""["'#\[{]$|["#]|\w=|\(\)|^\(.*,.*\)$|^[\d., …]+$|^[xyz]$|^-|^<|//|/$""")
WORD = re.compile(r"[A-Za-z]{3,}")
WORDS = ("log", "max", "min", "lim", "sin", "cos", "exp", "rank", "softmax")
NAMED = re.compile(rf"\b({'|'.join(WORDS)})(_\{{[^}}]*\}}|_\w)?")
CHARACTERS = {
    "𝓛": r"\mathcal{L}", "−": "-", "·": r"\cdot ", "‖": r"\Vert ", "⟨": r"\langle ", "⟩": r"\rangle ", "≥": r"\ge ", "≤": r"\le ",
    "≠": r"\ne ", "≡": r"\equiv ", "≈": r"\approx ", "∝": r"\propto ", "→": r"\to ", "∈": r"\in ", "∘": r"\circ ", "…": r"\dots ",
    "Σ": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∇": r"\nabla ", "∂": r"\partial ", "×": r"\times ", "±": r"\pm ",
    "½": r"\tfrac{1}{2}", "¼": r"\tfrac{1}{4}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "ᵀ": r"^{\mathsf{T}}", "%": r"\%",
    "*": "^{*}", "~": r"\sim ", "<": r"\lt ", ">": r"\gt ", "∞": r"\infty ",
}  # fmt: skip
ROOT = re.compile(r"√(?:\(((?:[^()]|\([^()]*\))*)\)|([A-Za-z0-9α-ω]+))")
POWER_OF_TEN = re.compile(r"(?<![\w.])(\d[\d.]*)e(-?)0?(\d+)\b")


def is_formula(text: str) -> bool:
    """Whether a code span is a formula rather than a piece of a program."""
    if PROGRAM.search(text) or set(WORD.findall(text)) - set(WORDS):
        return False
    return bool(OPERATOR.search(text)) or (len(text) == 1 and text.isalpha())


def tex(text: str) -> str:
    """A formula written with Unicode characters as TeX."""
    text = ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = POWER_OF_TEN.sub(lambda m: rf"{'' if m[1] == '1' else m[1] + '·'}10^{{{m[2]}{m[3]}}}", text)
    text = re.sub(r"_([A-Za-z]{2,}|\d+)", r"_{\\mathrm{\1}}", text)
    text = NAMED.sub(lambda match: rf"\operatorname{{{match[1]}}}{match[2] or ''}\,", text)
    return "".join(CHARACTERS.get(character, character) for character in text)


def _span(match: re.Match) -> str:
    text = html.unescape(match[1] or "")
    return convert(tex(text)) if match[1] and is_formula(text) else match[0]


def _display(match: re.Match) -> str:
    text = re.sub(r"\\big[lr]|\\Big[lr]", "", html.unescape(match[1]).strip())
    text = re.sub(r"\\(mathbb|mathcal|mathsf) (\w)", r"\\\1{\2}", text)  # the converter wants braces
    return convert(text, display="block")


def on_page_content(content: str, **_: object) -> str:
    """Called by MkDocs with the HTML of every page."""
    return SPAN.sub(_span, DISPLAY.sub(_display, content))
