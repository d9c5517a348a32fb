"""What the commands print: settings, chains, estimates, tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import xarray as xr


def inert(text: str) -> str:
    """Text of others for a terminal: control characters are spelled out, lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_json(value: Any) -> None:
    """One line of plain ASCII; what is no number is null."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(key): plain(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        if isinstance(part, float) and not math.isfinite(part):
            return None
        return part if part is None or isinstance(part, str | int | float) else str(part)

    typer.echo(json.dumps(plain(value)))


def settings_of(samples: "xr.DataTree") -> dict[str, Any]:
    from devinterp.store.reader import metadata_of

    return dict(metadata_of(samples)["config"]["sampler"])


def chains_of(samples: "xr.DataTree") -> list[dict[str, Any]]:
    """What became of each chain; nothing of stores of devinterp 2.0, which kept no status."""
    from devinterp.store.schema import STATUS_MEANINGS

    ds = samples.to_dataset()
    if not {"chain_status", "diverged_at"} <= set(ds):
        return []
    found = zip(ds["chain_status"].values, ds["diverged_at"].values, strict=True)
    return [
        {"chain": chain, "status": STATUS_MEANINGS[status], "diverged_at": int(at) if at >= 0 else None}
        for chain, (status, at) in enumerate(found)
    ]


def estimates_of(samples: "xr.DataTree", result: "xr.Dataset") -> dict[str, Any]:
    """LLC with its error and what it was measured at; of every observable; verdicts on the chains."""
    from devinterp.slt.diagnosis import diagnose

    names = ("llc_mean", "llc_sem", "rhat", "ess_bulk")
    numbers = {name: float(result[name]) for name in names}
    observables = {}
    for name in result.observable.values if "llc_observable" in result else ():
        one = result.sel(observable=name)
        observables[str(name)] = {"llc": float(one.llc_observable), "sem": float(one.llc_observable_sem)}
    found = diagnose(samples)
    told = {name: result.attrs[name] for name in ("n_beta", "localization", "sampling_method") if name in result.attrs}
    lr = samples.attrs.get("metadata", {}).get("step_size", {}).get("lr")
    return {
        **numbers, **told, "lr": lr, "observables": observables, "dropped_chains": list(result.attrs["dropped_chains"]),
        "verdicts": found.verdict.values.tolist(), "sentences": found.attrs["sentences"],
    }  # fmt: skip


def print_settings(samples: "xr.DataTree") -> None:
    from devinterp.store.reader import metadata_of

    metadata = metadata_of(samples)
    typer.echo("settings")
    for name, value in metadata["config"]["sampler"].items():
        typer.echo(inert(f"  {name:<40} {value}"))
    if "model" in metadata:
        model = metadata["model"]
        typer.echo(f"  {'model':<40} {model['class']}, {model['parameters']:,} parameters")


def print_chains(samples: "xr.DataTree") -> None:
    from devinterp.store.schema import STATUS_MEANINGS

    ds = samples.to_dataset()
    typer.echo("chains")
    if not {"chain_status", "diverged_at", "step_loss"} <= set(ds):
        typer.echo(f"  {ds.sizes['chain']} chains, made by devinterp 2.0 (no status kept)")
        return
    for chain, (status, at) in enumerate(zip(ds["chain_status"].values, ds["diverged_at"].values, strict=True)):
        taken = int(ds["step_loss"].isel(chain=chain).notnull().sum())
        losses = ds["step_loss"].isel(chain=chain, step=slice(0, taken))
        span = f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}" if taken else "no step written yet"
        where = f" after {at} steps" if at >= 0 else ""
        typer.echo(f"  {chain}: {STATUS_MEANINGS[status]}{where}, {taken} of {ds.sizes['step']} steps written, {span}")


def print_summary(samples: "xr.DataTree", result: "xr.Dataset") -> None:
    step_size = samples.attrs.get("metadata", {}).get("step_size", {})
    typer.echo("")
    typer.echo(f"LLC    {float(result.llc_mean):.3f} ± {float(result.llc_sem):.3f} (standard error)")
    if "llc_observable" in result:
        for name in result.observable.values:
            one = result.sel(observable=name)
            typer.echo(f"       {float(one.llc_observable):.3f} ± {float(one.llc_observable_sem):.3f} on {name}")
    typer.echo(f"       R-hat {float(result.rhat):.3f}, effective sample size {float(result.ess_bulk):.0f} "
               f"of {result.sizes['chain'] * result.sizes['draw']} draws in {result.sizes['chain']} chains")  # fmt: skip
    if result.attrs["dropped_chains"]:
        typer.echo(f"       chains left out: {result.attrs['dropped_chains']}")
    typer.echo(f"at     n_beta {result.attrs['n_beta']:g}, localization {result.attrs.get('localization', 0):g}, "
               f"{result.attrs.get('sampling_method')}" + (f", lr {step_size['lr']:.3g}" if step_size else ""))  # fmt: skip
    typer.echo("       (compare LLCs at equal n_beta and localization only)")


def print_diagnosis(samples: "xr.DataTree") -> None:
    """Verdicts on the chains, and what to change."""
    from devinterp.slt.diagnosis import diagnose

    typer.echo("chains")
    for line in diagnose(samples).attrs["sentences"]:
        typer.echo(f"       {line}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        typer.echo("  ".join(cells).rstrip())
