"""Tokens as text, and the values that a result has for them."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from devinterp.errors import InputTypeError, InputValueError, got
from devinterp.pictures.style import check_one_run

if TYPE_CHECKING:
    import xarray as xr

Floats = npt.NDArray[np.float64]

Z_SCORE, NATS_SQUARED = "z-score", "nats²"


@dataclass(frozen=True)
class TokenValues:
    """One sequence: the text of each token and its value (NaN for the first, which nothing predicts)."""

    texts: tuple[str, ...]
    values: Floats
    errors: Floats | None
    label: str
    """what the values are, with their unit"""


def texts_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token's part of the text; without a tokenizer its number.

    Decoded after the token before it, since tokenizers of the SentencePiece kind drop the space in front of a first token.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    if not hasattr(tokenizer, "decode"):
        raise InputTypeError(
            got("tokenizer", tokenizer, "one with decode(ids), or None", "Try AutoTokenizer.from_pretrained(name).")
        )
    known: dict[tuple[int, ...], str] = {}

    def decoded(*part: int) -> str:
        if part not in known:
            known[part] = str(tokenizer.decode(list(part)))
        return known[part]

    found = []
    for number, token in enumerate(ids):
        before = ids[number - 1] if number else None
        alone = decoded(token)
        if before is None:
            found.append(alone)
            continue
        both, first = decoded(before, token), decoded(before)
        found.append(both[len(first) :] if both.startswith(first) and len(both) > len(first) else alone)
    return found


KINDS = ("letters after a space", "letters", "digits", "space", "line break", "punctuation", "other")


def kind_of(text: str) -> str:
    """What kind of text a token is."""
    inner = text.strip()
    if not inner:
        return "line break" if "\n" in text else "space" if text else "other"
    if inner.isalpha():
        return "letters after a space" if text[0].isspace() else "letters"
    if inner.isdigit():
        return "digits"
    return "punctuation" if all(unicodedata.category(c)[0] in "PS" for c in inner) else "other"


def token_values(
    result: "xr.Dataset | xr.DataTree",
    sequence: int,
    tokenizer: Any = None,
    observable: str | None = None,
    component: str | None = None,
    query: Any = 0,
) -> TokenValues:
    """The values that a result has for the tokens of one sequence. Arguments as in `plot_tokens`."""
    for table in _tables(result):
        check_one_run("result", [dim for dim in table.dims if dim in MANY], set())
    datasets = result if isinstance(result, Mapping) else {}
    if "susceptibilities" in datasets:
        sus, context = (datasets[name].to_dataset() for name in ("susceptibilities", "context"))
        return _of_susceptibilities(sus, context, sequence, tokenizer, observable, component)
    names = [str(name) for name in result] if hasattr(result, "data_vars") else []
    if any(name.startswith("llc_token_") for name in names):
        return _of_llc(result, names, sequence, tokenizer, observable)
    if "influences" in names and "target_position" in result["influences"].dims:
        return _of_influences(result, sequence, tokenizer, query)
    fix = "Pass what compute_llc(per='token'), compute_susceptibilities() or compute_bif() for tokens returned."
    raise InputTypeError(got("result", names or type(result), "a result with values of single tokens", fix))


MANY = ("checkpoint", "restriction")
"""Dims of the results of a sweep"""


def _tables(result: Any) -> "list[xr.Dataset]":
    if hasattr(result, "subtree"):
        return [node.to_dataset() for node in result.subtree]
    return [result] if hasattr(result, "data_vars") else []


def _of_llc(result: Any, names: list[str], sequence: int, tokenizer: Any, observable: str | None) -> TokenValues:
    known = [name.removeprefix("llc_token_") for name in names if name.startswith("llc_token_") and not name.endswith("_sem")]
    name = _chosen("observable", observable, known)
    _check_number("sequence", sequence, result.sizes[f"batch_{name}"])
    one = result.isel({f"batch_{name}": sequence})
    texts = texts_of(one[f"input_ids_{name}"].values.tolist(), tokenizer)
    errors = _after_first(one[f"llc_token_{name}_sem"].values)
    return TokenValues(tuple(texts), _after_first(one[f"llc_token_{name}"].values), errors, "LLC of the token (dimensionless)")


def _of_susceptibilities(
    sus: "xr.Dataset", context: "xr.Dataset", sequence: int, tokenizer: Any, observable: str | None, component: str | None
) -> TokenValues:
    if "target_position" not in sus.coords:
        raise InputValueError("result: these are means over tokens. Compute them with mean_over=None.")
    names = list(sus.attrs["dataset_id_to_name"])
    name = _chosen("observable", observable, names)
    wr = _chosen("component", component, [str(each) for each in sus.wr.values])
    number = names.index(name)
    rows = np.flatnonzero((sus.dataset_id.values == number) & (sus.batch.values == sequence))
    of_text = (context.dataset_id.values == number) & (context.batch.values == sequence)
    if not rows.size:
        _check_number("sequence", sequence, int(sus.batch.values[sus.dataset_id.values == number].max()) + 1)
    one = sus.isel(sus_flat=rows).sel(wr=wr)
    errors = _after_first(one["sus_sem"].values) if "sus_sem" in one else None
    texts = texts_of(context.input_ids.values[of_text].tolist(), tokenizer)
    return TokenValues(tuple(texts), _after_first(one["sus"].values), errors, f"susceptibility of {wr} ({unit_of(sus)})")


def _of_influences(result: Any, sequence: int, tokenizer: Any, query: Any) -> TokenValues:
    rows = result.batch_1.values.tolist()
    if sequence not in rows:
        raise InputValueError(
            got("sequence", sequence, f"one of the result's batch_1 ({len(rows)} sequences)", "See result.batch_1.")
        )
    if "query" in result["influences"].dims:
        _check_number("query", query, result.sizes["query"])
        one = result.isel(query=query).sel(batch_1=sequence)
        where = int(one.query_batch), int(one.query_target_position)
    else:
        if not (isinstance(query, Sequence) and len(query) == 2):
            fix = "It says on which token the influence is. Try query=(0, 5)."
            raise InputValueError(got("query", query, "a pair (sequence, target_position)", fix))
        where = int(query[0]), int(query[1])
        one = result.sel(batch_1=sequence, batch_2=where[0], target_position_T=where[1])
    ids = result.input_ids.values
    of_query = texts_of(ids[where[0]].tolist(), tokenizer)[where[1]]
    errors = _after_first(one["influences_sem"].values) if "influences_sem" in one else None
    label = f"{measure_of(result)} with {of_query!r} at position {where[1]} of sequence {where[0]}"
    return TokenValues(
        tuple(texts_of(ids[sequence].tolist(), tokenizer)), _after_first(one["influences"].values), errors, label
    )


def unit_of(sus: "xr.Dataset") -> str:
    """Of susceptibilities."""
    return Z_SCORE if "sus_std" in sus else NATS_SQUARED


def measure_of(result: "xr.Dataset") -> str:
    """Of influences, with its unit."""
    measure = str(result.attrs.get("measure", "correlation"))
    return measure.replace("covariance", "covariance (nats²)")


def _after_first(values: Any) -> Floats:
    return np.concatenate([[np.nan], np.asarray(values, dtype=np.float64)])


def _chosen(argument: str, given: str | None, known: Sequence[str]) -> str:
    if given is None:
        return known[0]
    if given not in known:
        raise InputValueError(got(argument, given, f"one of {list(known)}", "Choose one of them."))
    return given


def _check_number(argument: str, value: Any, count: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value < count:
        raise InputValueError(got(argument, value, f"a whole number from 0 to {count - 1}", "Choose one of them."))
