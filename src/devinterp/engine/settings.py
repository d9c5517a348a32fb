"""Every setting of a run: its default, its range, its meaning. Written once, here; checked before any work."""

import difflib
import math
import warnings
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from devinterp.errors import InputTypeError, InputValueError, got
from devinterp.samplers import SAMPLERS, Sampler, TakesMetric

LARGEST_LR = 1e6
"""No model of float32 weights has a posterior so flat that a larger step is stable."""

WAYS = ("auto", "processes", "vmap", "sequential")
"""of computing chains together"""

Check = Callable[[str, Any], Any]


def integer(low: int, high: int | None = None, hint: str = "") -> Check:
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            wrong = InputTypeError if isinstance(value, bool) or not isinstance(value, Real) else InputValueError
            raise wrong(got(name, value, allowed, hint or f"Try {name}={max(low, 1)}."))
        whole = int(value)
        if whole < low or (high is not None and whole > high):
            raise InputValueError(got(name, value, allowed, hint or f"Try {name}={max(low, 1)}."))
        return whole

    return check


def number(
    hint: str,
    *,
    low: float = 0.0,
    above: float | None = None,
    high: float = math.inf,
    below: float | None = None,
    also: tuple[Any, ...] = (),
) -> Check:
    """A finite real number; `above` and `below` exclude the bound itself, `also` lists legal values that are no numbers."""
    bound = f"> {above:g}" if above is not None else f">= {low:g}"
    allowed = f"a finite number {bound}" + (f" and <= {high:g}" if math.isfinite(high) else "")
    allowed += f" and < {below:g}" if below is not None else ""
    allowed += "".join(f", or {value!r}" for value in also)

    def check(name: str, value: Any) -> Any:
        if value is None or isinstance(value, str):
            if value in also:
                return value
            raise InputTypeError(got(name, value, allowed, hint))
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputTypeError(got(name, value, allowed, hint))
        value = float(value)
        too_low = value <= above if above is not None else value < low
        too_high = value > high or (below is not None and value >= below)
        if not math.isfinite(value) or too_low or too_high:
            raise InputValueError(got(name, value, allowed, hint))
        return value

    return check


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputTypeError(got(name, value, "True or False", f"Try {name}={bool(value)}."))
    return value


def choice(*options: str, also: tuple[Any, ...] = ()) -> Check:
    def check(name: str, value: Any) -> Any:
        if value in also:
            return value
        if value not in options:
            listed = ", ".join(map(repr, (*options, *also)))
            close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.4) or options[:1]
            raise InputValueError(got(name, value, f"one of {listed}", f"Did you mean {close[0]!r}?"))
        return str(value)

    return check


def _setting(check: Check, meaning: str, default: Any = MISSING) -> Any:
    metadata = {"check": check, "meaning": meaning}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that changes the numbers of a run, apart from model, data, masks and loss function."""

    lr: float | str = _setting(
        number("Try lr='auto', or 1e-3 for a model of 14M parameters.", above=0.0, high=LARGEST_LR, also=("auto",)),
        "step size, or 'auto'",
    )
    n_beta: float = _setting(
        number("Try n_beta=default_nbeta(batch_size), or 30 for a language model."), "inverse temperature times n"
    )
    num_chains: int = _setting(integer(1), "independent chains, each started at the checkpoint", 4)
    num_draws: int = _setting(integer(1), "draws per chain", 200)
    batch_size: int = _setting(integer(1), "sequences per gradient micro-batch and per observable batch", 32)
    num_burnin_steps: int = _setting(integer(0), "steps before draws begin to count", 0)
    num_steps_bw_draws: int = _setting(integer(1), "steps per draw", 1)
    num_init_loss_batches: int = _setting(integer(1), "batches for init_loss", 32)
    init_seed: int = _setting(integer(0, 2**64 - 1), "seed of the noise and of the order of the batches", 100)
    batches_per_draw: int = _setting(integer(1), "batches per observable", 3)
    obs_seed: int = _setting(integer(0, 2**64 - 1), "fixes which sequences an observable uses", 1337)
    gradient_accumulation_steps: int = _setting(integer(1), "micro-batches averaged per step", 1)
    localization: float = _setting(
        number("Try localization=300 for a language model; 0 disables it."), "pull towards the initial weights", 0.0
    )
    noise_level: float = _setting(number("Try noise_level=1.0."), "standard deviation of the noise", 1.0)
    llc_weight_decay: float = _setting(number("Try llc_weight_decay=0.0."), "Gaussian prior centred at zero", 0.0)
    bounding_box_size: float | None = _setting(
        number("Try bounding_box_size=None, which disables it.", above=0.0, also=(None,)),
        "clamp weights to initial +- this radius",
        None,
    )
    sampling_method: str = _setting(choice(*SAMPLERS), "the sampler", "sgmcmc_sgld")
    sampling_method_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"check": lambda name, value: value, "meaning": "settings of the sampler"}
    )
    shuffle: bool = _setting(switch, "shuffle the sampling dataset", True)
    match_sampling_input_ids_across_chains: bool = _setting(switch, "all chains see the same batches in the same order", True)
    init_noise: float | None = _setting(
        number("Try init_noise=None, which adds none.", also=(None,)), "noise added once before sampling", None
    )
    save_metrics: bool = _setting(switch, "store per-step diagnostics", False)
    train_mode: bool = _setting(switch, "sample with dropout and batch-norm updates on", False)
    precision: str | None = _setting(
        choice("bf16", also=(None,)), "of the observables' forward passes; None = that of the model", None
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, item.metadata["check"](item.name, getattr(self, item.name)))
        object.__setattr__(
            self, "sampling_method_kwargs", check_sampler_kwargs(self.sampling_method, self.sampling_method_kwargs)
        )
        self._check_together()

    def _check_together(self) -> None:
        prior = self.localization + self.llc_weight_decay
        if self.n_beta == 0 and prior == 0:
            raise InputValueError(
                "n_beta=0 with localization=0 and llc_weight_decay=0: nothing holds the weights, the chain would be a "
                "random walk. Allowed: n_beta > 0, or n_beta=0 with a prior. Try localization=300 to sample the prior."
            )
        traits, in_metric = SAMPLERS[self.sampling_method].traits, issubclass(SAMPLERS[self.sampling_method], TakesMetric)
        if self.lr == "auto" and not traits.auto:
            raise InputValueError(
                f"lr='auto' with sampling_method={self.sampling_method!r}: must be a number > 0, since the stable step depends "
                "on the preconditioner. Try sampling_method='leimkuhler_matthews', or give lr."
            )
        least = 1.0 if in_metric else prior  # that the largest precision can be; a metric is scaled to 1
        if traits.auto and self.lr != "auto" and self.lr * least >= 4:  # type: ignore[operator]
            because = "in its metric" if in_metric else f"with localization + llc_weight_decay = {prior:g}"
            fix = f"Must be below that. Try lr={1 / least:.3g}, or lr='auto'."
            raise InputValueError(f"lr={self.lr}: {because} the chain diverges for every lr >= {4 / least:.3g}. {fix}")

    @property
    def num_steps(self) -> int:
        """Steps per chain; none is wasted after the last draw."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_bw_draws

    def draw_at(self, steps_taken: int) -> int | None:
        """The draw that belongs to the weights after `steps_taken` steps: d for burn-in + (d + 1) k."""
        past, rest = divmod(steps_taken - self.num_burnin_steps, self.num_steps_bw_draws)
        return past - 1 if rest == 0 and past >= 1 else None

    def steps_before_draw(self, draw: int) -> int:
        """Steps taken when `draw` is taken; the inverse of `draw_at`."""
        return self.num_burnin_steps + (draw + 1) * self.num_steps_bw_draws

    def sampler(self, lr: float) -> Sampler:
        made: Sampler = SAMPLERS[self.sampling_method](lr=lr, noise_level=self.noise_level, **self.sampling_method_kwargs)
        return made

    def stored(self) -> dict[str, Any]:
        return asdict(self)

    def warn_about(self) -> None:
        """Legal settings that a user rarely means. Each says what it does to the numbers."""
        if self.noise_level != 1:
            _warn(f"noise_level={self.noise_level}: the chain no longer samples the posterior (only 1.0 does).")
        if self.n_beta == 0:
            _warn("n_beta=0: the loss does not act, only the prior is sampled.")
        if self.n_beta == 1:
            _warn("n_beta=1: almost always too small to see the loss. Try n_beta=default_nbeta(batch_size).")
        if self.lr != "auto":
            self._warn_about_bias(float(self.lr))

    def _warn_about_bias(self, lr: float) -> None:
        largest = 1 / self.sampling_method_kwargs.get("eps", 0.1)
        gain = {"sgmcmc_sgld": 1.0, "rmsprop_sgld": largest, "adam_sgld": largest}
        bias = lr * gain.get(self.sampling_method, 0.0) * (self.localization + self.llc_weight_decay) / 4
        if bias > 0.05:
            up_to = "" if self.sampling_method == "sgmcmc_sgld" else "up to "
            _warn(
                f"lr={lr:g} with localization + llc_weight_decay = {self.localization + self.llc_weight_decay:g}: the "
                f"step size alone biases the variance of the weights by {up_to}{bias:.0%}. Try "
                "sampling_method='leimkuhler_matthews', which has no such bias, or a smaller lr."
            )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """How a run is carried out. That changes the last digits of numbers at most, so it is not part of what a run is."""

    chains_together: str = _setting(choice(*WAYS), f"how chains are computed: {', '.join(WAYS)}", "auto")
    reuse_prefix: bool = _setting(switch, "compute what lies before the moving weights once", True)
    compile: bool = _setting(switch, "losses through torch.compile", False)
    resume: bool = _setting(switch, "go on from the last commit of an interrupted run", True)
    checkpoint_every: float = _setting(
        number("Try 300.", low=0.0), "seconds between commits; 0 = at every chunk that is whole", 300.0
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            item.metadata["check"](item.name, getattr(self, item.name))


def settings_and_paths(**given: Any) -> tuple[Settings, Paths]:
    """The arguments of `sample` that are plain values, checked."""
    paths = Paths(**{item.name: given.pop(item.name) for item in fields(Paths) if item.name in given})
    return settings_of(**given), paths


def settings_of(
    *,
    sampling_method: Any = "sgmcmc_sgld",
    sampling_method_kwargs: Any = None,
    rmsprop_eps: Any = None,
    rmsprop_alpha: Any = None,
    **others: Any,
) -> Settings:
    """Settings from the arguments of `sample`, which has aliases for two settings of RMSprop."""
    known = [item.name for item in fields(Settings)]
    for name in others:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1) or known[:1]
            raise InputTypeError(got(name, others[name], "absent: no setting has this name", f"Did you mean {close[0]}?"))
    joined = gather_sampler_kwargs(
        sampling_method, sampling_method_kwargs, rmsprop_eps=rmsprop_eps, rmsprop_alpha=rmsprop_alpha
    )
    return Settings(sampling_method=sampling_method, sampling_method_kwargs=joined, **others)


def gather_sampler_kwargs(method: Any, given: Any, **aliases: Any) -> dict[str, Any]:
    """`sampling_method_kwargs` joined with the aliases `rmsprop_alpha` and `rmsprop_eps`."""
    if given is not None and not isinstance(given, dict):
        raise InputTypeError(got("sampling_method_kwargs", given, "a dict or None", "Try {'eps': 0.1}."))
    joined = dict(given or {})
    for alias, value in aliases.items():
        if value is None:
            continue
        name = alias.removeprefix("rmsprop_")
        if method != "rmsprop_sgld":
            fix = f"Remove {alias}, or take sampling_method='rmsprop_sgld'."
            raise InputValueError(got(alias, value, f"None with sampling_method={method!r}", fix))
        if name in joined:
            raise InputValueError(got(alias, value, f"None when sampling_method_kwargs has {name!r}", "Give it once."))
        joined[name] = value
    return joined


def check_sampler_kwargs(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The sampler's own settings, checked against the fields of its dataclass."""
    given = dict(given)
    if given.get("add_grad_correction"):
        fix = "Remove it: no released version had this term."
        raise InputValueError(got("sampling_method_kwargs['add_grad_correction']", True, "False", fix))
    given.pop("add_grad_correction", None)
    known = {item.name: item for item in fields(SAMPLERS[method]) if item.name not in ("lr", "noise_level")}
    for name, value in given.items():
        shown = f"sampling_method_kwargs[{name!r}]"
        if name not in known:
            allowed = f"absent: {method} takes {sorted(known) or 'no settings of its own'}"
            raise InputValueError(got(shown, value, allowed, "lr and noise_level are arguments of their own."))
        default = known[name].default
        if isinstance(default, bool):
            given[name] = switch(shown, value)
        else:
            given[name] = number(f"Try {default}.", **known[name].metadata)(shown, value)
    if given.get("bias_correction") and given.get("alpha") == 1.0:
        fix = "Try alpha=0.99, or bias_correction=False."
        raise InputValueError(got("sampling_method_kwargs['alpha']", 1.0, "below 1 with bias_correction", fix))
    return given
