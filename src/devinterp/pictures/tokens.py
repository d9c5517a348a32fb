"""Text whose tokens are coloured by a value: their LLC, their influence, or the susceptibility of a component to them."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from devinterp.pictures.style import axes_of, diverging, limit_of
from devinterp.pictures.texts import kind_of, texts_of, token_values

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.font_manager import FontProperties

LINE_HEIGHT = 2.2
"""in widths of a letter"""
CHARACTER_WIDTH = 0.602
"""of the monospaced font of matplotlib, in its size"""
INCHES_PER_CHARACTER = 0.1


def plot_tokens(
    result: "xr.Dataset | xr.DataTree",
    sequence: int = 0,
    *,
    tokenizer: Any = None,
    observable: str | None = None,
    component: str | None = None,
    query: Any = 0,
    width: int = 72,
    ax: "Axes | None" = None,
) -> "Axes":
    """The text of one sequence, each token on the colour of its value; negative ones are underlined, for print.

    The first token has no value (nothing predicts it) and stays without colour.

    Args:
        result: of `compute_llc(samples, per="token")`, of `compute_susceptibilities`, or of `compute_bif` for tokens (with
            `queries`, or whole).
        sequence: its number in the observable; of influences, the number in `batch_1`.
        tokenizer: what has `decode(ids)`; None shows the numbers of the tokens.
        observable: of LLCs and susceptibilities; None = the first.
        component: of susceptibilities; None = the first.
        query: of influences: the number of the query, or, in a whole matrix, (sequence, target_position).
        width: characters in a line.
        ax: where to draw; None = a new figure.

    Returns:
        The Axes.

    Raises:
        DevinterpInputError: the result has no such values.
        PackageMissing: matplotlib is not installed.
    """
    found = token_values(result, sequence, tokenizer, observable, component, query)
    pieces = list(_laid_out(found.texts, width))
    lines = 1 + max(piece.line for piece in pieces)
    ax = axes_of(ax, (width * INCHES_PER_CHARACTER + 0.4, 0.9 + lines * LINE_HEIGHT * INCHES_PER_CHARACTER))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = limit_of(found.values)
    scale = ScalarMappable(Normalize(-limit, limit), diverging(behind_text=True))
    _draw(pieces, found.values, scale, ax)
    ax.set_xlim(0, width)
    ax.set_ylim(lines * LINE_HEIGHT, 0)
    ax.set_aspect("equal", anchor="NW")
    ax.axis("off")
    bar = ax.figure.colorbar(
        scale, ax=ax, orientation="horizontal", location="top", aspect=40, shrink=0.6, extend="both", pad=0.02
    )
    bar.set_label(_plain(f"{found.label}; underlined: negative"), fontsize="small")
    bar.ax.tick_params(labelsize="small")
    return ax


def token_kinds(result: "xr.DataTree", tokenizer: Any) -> npt.NDArray[Any]:
    """For every row of susceptibilities, what kind of text its token is.

    To be used as `plot_projection(tree, kinds=token_kinds(tree, tokenizer))`.

    Args:
        result: of `compute_susceptibilities`, of single tokens.
        tokenizer: what has `decode(ids)`.

    Returns:
        Names such as "letters after a space", "digits" or "punctuation", shape (sus_flat,).
    """
    sus, context = result["susceptibilities"].to_dataset(), result["context"].to_dataset()
    where = {
        key: number
        for number, key in enumerate(zip(context.dataset_id.values, context.batch.values, context.position.values, strict=True))
    }
    rows = [where[key] for key in zip(sus.dataset_id.values, sus.batch.values, sus.target_position.values, strict=True)]
    texts = texts_of(context.input_ids.values.tolist(), tokenizer)
    return np.array([kind_of(texts[row]) for row in rows], dtype=object)


@dataclass(frozen=True)
class Piece:
    """A part of a token within one line."""

    token: int
    text: str
    line: int
    column: int
    columns: int


def _laid_out(texts: tuple[str, ...], width: int) -> Iterator[Piece]:
    """Line breaks of the text break the line, after a sign for them; long lines are broken between tokens where possible."""
    line = column = 0
    for number, text in enumerate(texts):
        if column and column + _columns(text) > width >= _columns(text):
            line, column = line + 1, 0
        part, start = "", column
        for character in text:
            shown = {"\n": "↵", "\t": "→", "\r": "␍"}.get(character, character)
            size = _columns(shown)
            if column + size > width:
                if part:
                    yield Piece(number, part, line, start, column - start)
                part, line, start, column = "", line + 1, 0, 0
            part += shown
            column += size
            if character == "\n":
                yield Piece(number, part, line, start, column - start)
                part, line, start, column = "", line + 1, 0, 0
        if part or not text:
            yield Piece(number, part, line, start, column - start)


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _draw(pieces: list[Piece], values: npt.NDArray[Any], scale: Any, ax: "Axes") -> None:
    """Letters are outlines in the axes' own units, so that they fit their boxes in a figure of any size."""
    from matplotlib.collections import PathCollection
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    font, letters = FontProperties(family="monospace"), []
    upright = Affine2D().scale(1, -1)
    for piece in pieces:
        top, value = piece.line * LINE_HEIGHT, values[piece.token]
        if np.isfinite(value) and piece.columns:
            box = Rectangle((piece.column + 0.04, top + 0.1), piece.columns - 0.08, LINE_HEIGHT - 0.3, linewidth=0)
            box.set_facecolor(scale.to_rgba(value))
            box.set_gid(str(piece.token))
            ax.add_patch(box)
            if value < 0:
                low = top + LINE_HEIGHT - 0.22
                ax.plot([piece.column + 0.1, piece.column + piece.columns - 0.1], [low, low], color="black", linewidth=0.8)
        text = _in_font(piece.text, font)
        if text.strip():
            path = TextPath((0, 0), text, size=1 / CHARACTER_WIDTH, prop=font, usetex=False)
            letters.append(path.transformed(upright + Affine2D().translate(piece.column, top + 0.72 * LINE_HEIGHT)))
    joined = Path.make_compound_path(*letters)
    ax.add_collection(PathCollection([joined], facecolor="black", linewidth=0), autolim=False)


def _in_font(text: str, font: "FontProperties") -> str:
    """A box for each character that the font lacks, and for control characters; no character starts a formula."""
    from matplotlib.font_manager import findfont, get_font

    face = get_font(findfont(font))
    known = (c if c == " " or (c.isprintable() and face.get_char_index(ord(c))) else "□" for c in text)
    return "".join(known).replace("$", r"\$")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
