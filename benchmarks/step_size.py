"""LLC of the demo's last checkpoint against the step size: SGLD and Leimkuhler-Matthews, at equal sampling time.

    python benchmarks/step_size.py        (after `make demo`; 10 to 15 minutes on two cores)

A step size smaller by k takes k steps between draws and k times the burn-in, so all points sample for the same time lr x steps and
differ in the number of gradients alone.
"""

import datetime
import multiprocessing

from demo_checkpoint import ROOT, SETTINGS, load, machine, record

import devinterp
from devinterp.engine.progress import logger

METHODS = {"sgmcmc_sgld": "SGLD", "leimkuhler_matthews": "Leimkuhler-Matthews"}
FRACTIONS = (1, 2, 4, 8)
EXTRA = {"sgmcmc_sgld": (16,), "leimkuhler_matthews": ()}
CHAINS, DRAWS, BURN_IN = 4, 60, 25


def measure(method: str, auto: float) -> list[dict]:
    import torch

    torch.set_num_threads(1)
    model, tokens = load()
    rows = []
    for fraction in (*FRACTIONS, *EXTRA[method]):
        result = devinterp.llc(
            model, tokens, sampling_method=method, lr=auto / fraction, num_chains=CHAINS, num_draws=DRAWS,
            num_steps_bw_draws=fraction, num_burnin_steps=BURN_IN * fraction, progress=False, **SETTINGS,
        )  # fmt: skip
        rows.append(
            {
                "lr": auto / fraction,
                "gradients": CHAINS * (BURN_IN + DRAWS) * fraction,
                "llc": float(result.llc_mean),
                "sem": float(result.llc_sem),
                "rhat": float(result.rhat),
            }
        )
        print(METHODS[method], rows[-1], flush=True)
    return rows


def main() -> None:
    logger.setLevel("WARNING")
    model, tokens = load()
    samples = devinterp.sample(model, tokens, {}, sampling_method="leimkuhler_matthews", lr="auto", num_chains=1, num_draws=1,
                               num_burnin_steps=BURN_IN, progress=False, **SETTINGS)  # fmt: skip
    auto = samples.attrs["metadata"]["step_size"]["lr"]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = dict(zip(METHODS, pool.starmap(measure, [(method, auto) for method in METHODS]), strict=True))
    plot(rows, auto)
    record("Step size", table(rows, auto))


def table(rows: dict[str, list[dict]], auto: float) -> str:
    reference = rows["leimkuhler_matthews"][len(FRACTIONS) - 1]["llc"]
    lines = [
        f"`python benchmarks/step_size.py`, {datetime.date.today()}, {machine()} (one thread a process). Demo checkpoint 1200, "
        f"n_beta {SETTINGS['n_beta']:g}, localization {SETTINGS['localization']:g}, {CHAINS} chains x {DRAWS} draws, equal "
        f'sampling time; `lr="auto"` is {auto:.3g}. Deviation from Leimkuhler-Matthews at the smallest lr.',
        "",
        "| sampler | lr | gradients | LLC | deviation | R-hat |",
        "|---|---|---|---|---|---|",
    ]
    for method, name in METHODS.items():
        for row in rows[method]:
            lr = f"{row['lr']:.3g}" + (" (auto)" if row["lr"] == auto else "")
            lines.append(
                f"| {name} | {lr} | {row['gradients']} | {row['llc']:.3f} ± {row['sem']:.3f} | "
                f"{row['llc'] / reference - 1:+.1%} | {row['rhat']:.3f} |"
            )
    return "\n".join(lines)


def plot(rows: dict[str, list[dict]], auto: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for method, name in METHODS.items():
        lrs, values, errors = ([row[key] for row in rows[method]] for key in ("lr", "llc", "sem"))
        axis.errorbar(lrs, values, yerr=[2 * error for error in errors], fmt="o-", capsize=3, label=name)
    axis.axvline(auto, color="0.7", linestyle=":", label='lr="auto"')
    axis.set_xscale("log")
    axis.set_xlabel("step size lr")
    axis.set_ylabel("local learning coefficient")
    axis.set_title("Equal sampling time; bars: two standard errors", fontsize=10)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    path = ROOT / "benchmarks" / "step_size.png"
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
