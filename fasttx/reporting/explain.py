"""The label of one text and the attributions of its words, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Callable

from fasttx.reporting import page, plots
from fasttx.reporting.attributions import Explanation
from fasttx.reporting.escaping import escaped
from fasttx.reporting.findings import percent
from fasttx.terminal import one_line

ATTRIBUTION_NOTE = (
    "Shades and numbers are integrated gradients (Sundararajan et al., 2017): what each word adds, "
    "in logits, to the lead of the predicted label over the next one, to the label itself where a "
    "text may have several, or to the number that was fitted, compared with a text of "
    "as many unknown words. Words not in the vocabulary (dotted) add nothing by definition. They "
    "describe this model, not the world, and say little about words that act together."
)
ATTENTION_NOTE = (
    "A row is a word that looks, a column one that is looked at; blue is much, on one scale for "
    "all maps of a text (square root). They show where a head gathers values from. They do not "
    "show what it does with them, what later layers undo, or why the label was chosen: attention "
    "is no explanation (Jain and Wallace, 2019)."
)

# 256-colour backgrounds under black: from faint to full, for and against the label.
_FOR = (195, 153, 117, 75)
_AGAINST = (230, 223, 216, 209)


def pieces(
    found: Explanation, word: Callable[[str, bool, float, float], str], cut: Callable[[str], str]
) -> str:
    """The text from its words, by `word(text, known, attribution, share of the largest)`.

    Where truncation left words out, `cut` gets a remark with their number.
    """
    scale = max(float(abs(found.attributions).max(initial=0.0)), 1e-12)
    shown = [
        word(*each, each[2] / scale)
        for each in zip(found.words, found.known.tolist(), found.attributions.tolist(), strict=True)
    ]
    if found.words_left_out:
        shown.insert(found.left_out_at, cut(f"[{found.words_left_out:,} words not read]"))
    return " ".join(shown)


# --- for a terminal -------------------------------------------------------------------------------


def coloured(found: Explanation) -> str:
    """The words for a terminal: blue for the label, orange against it."""

    def word(text: str, known: bool, value: float, share: float) -> str:
        level = int(abs(share) * (len(_FOR) + 0.999))
        if not level:
            return one_line(text)
        colour = (_FOR if value > 0 else _AGAINST)[level - 1]
        return f"\x1b[30;48;5;{colour}m{one_line(text)}\x1b[0m"

    return pieces(found, word, lambda cut: cut)


def plain(found: Explanation) -> str:
    """One line for each word, the strongest first: `word +0.12`."""
    return "\n".join(f"{one_line(word)} {value:+.2f}" for word, value in found.ranked())


def terminal(found: Explanation, colours: bool) -> str:
    sure = "" if found.probability is None else percent(found.probability, 2)
    head = f"{one_line(found.label)}  {sure or f'{found.margin:.4f}'}"
    foot = (
        f"{one_line(found.margin_name)} {found.margin:+.2f}: as many unknown words "
        f"{found.baseline_margin:+.2f}, these words {found.attributions.sum():+.2f}"
        + (" (logits)" if sure else "")
    )
    body = coloured(found) if colours else plain(found)
    return "\n\n".join(part for part in (head, body, foot) if part)


# --- for a page -----------------------------------------------------------------------------------


def shaded(found: Explanation) -> str:
    """The words as the model read them, shaded by attribution, the number as a tooltip."""

    def word(text: str, known: bool, value: float, share: float) -> str:
        classes, style = [] if known else ["unknown"], ""
        if abs(share) >= 0.03:  # a fainter shade cannot be seen
            classes.append("for" if value > 0 else "against")
            style = f' style="--a:{0.6 * abs(share):.2f}"'
        kind = f' class="{" ".join(classes)}"' if classes else ""
        return f'<span{kind}{style} title="{value:+.3f}">{escaped(text)}</span>'

    text = pieces(found, word, lambda cut: f'<span class="cut">{cut}</span>')
    return f'<p class="text">{text or "(no words)"}</p>'


def strongest(found: Explanation, count: int = 5) -> str:
    """The strongest words for and against the label."""
    ranked = found.ranked()
    raising, lowering = f"For {found.label}", "against it"
    if found.probability is None:
        raising, lowering = f"Raising {found.label}", "lowering it"
    sides = (
        (raising, [w for w in ranked if w[1] > 0]),
        (lowering, [w for w in ranked if w[1] < 0]),
    )
    parts = [
        f"{side}: " + ", ".join(f"“{word}” {value:+.2f}" for word, value in words[:count])
        for side, words in sides
        if words
    ]
    return page.paragraph("; ".join(parts)) if parts else ""


def article(found: Explanation, about: str) -> str:
    """A text with its label, and its words shaded by attribution."""
    name = found.margin_name if found.rival is None else f"Margin over {found.rival}"
    sums = (
        f"{name}: {found.margin:+.2f}; of as many unknown words: "
        f"{found.baseline_margin:+.2f}; the words add {found.attributions.sum():+.2f}."
    )
    return (
        f"<article><h3>{escaped(found.heading())}</h3>{page.paragraph(about, 'kicker')}"
        f"{shaded(found)}{strongest(found)}{page.paragraph(sums)}</article>"
    )


def attention(draw: Callable[..., plots.Picture], name: str, what: str, found: Explanation) -> str:
    """The attention maps of one text; "" for a model without layers or a text without words."""
    if not found.attention.size:
        return ""
    words = [found.words[i] for i in found.mapped]
    drawn = draw(name, f"{what}: attention maps", plots.attention_maps, found.attention, words)
    n = len(words)
    which = (
        f"its {n} words"
        if n == len(found.words)
        else (
            f"its words {found.mapped.start + 1} to {found.mapped.stop}, the window that says most"
        )
    )
    if n > plots.MOST_WORDS:
        which = f"of {which}, the {plots.MOST_WORDS} that receive most attention, in their order"
    heading = f"{what}: {found.heading()}; {which}"
    heads = found.attention.shape[1]
    return f"<h3>{escaped(heading)}</h3>" + page.figure(
        drawn, "", f"{max(20, 7 * heads)}rem", f"{14 * heads}rem", wide=heads > 4
    )


def html(found: Explanation, run: str) -> str:
    """One page: the shaded text, every word's number, the attention maps."""
    heading = found.heading(2)
    maps = attention(plots.picture, "attention", "This text", found)
    rows = [[word, f"{value:+.3f}"] for word, value in found.ranked()]
    body = [
        f'<p class="kicker">{escaped(f"fasttx, run {run}")}</p>',
        f"<h1>{escaped(heading)}</h1>",
        article(found, f"{len(found.words)} words"),
        page.paragraph(ATTRIBUTION_NOTE),
        f"<details><summary>{len(rows)} words by what they add</summary>",
        page.table(("word", "logits" if found.probability is not None else found.label), rows),
        "</details>",
    ]
    if maps:
        layers, heads = found.attention.shape[:2]
        title = f"Where {layers} layers of {heads} heads look"
        note = page.paragraph(ATTENTION_NOTE)
        body.append(page.section("attention", "Attention maps", title, note, maps))
    return page.document(heading, "\n".join(body))
