"""Functions of the caller's: other ones have other fingerprints, equal ones equal ones, and nothing is guessed."""

import copy
import functools
import importlib
import itertools
import random
import sys
import threading
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from devinterp.store.fingerprints import Unreadable, fingerprint


def per_token(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


SCALE = 2.0
TABLE = {"scale": [1.0, 2.0]}
Pair = namedtuple("Pair", "a b")


def scaled(x):
    return x * SCALE


def by_global(model, ids):
    return scaled(per_token(model, ids))


def recursive(n):
    return 1 if n == 0 else mutual(n - 1)


def mutual(n):
    return recursive(n)


class Loss:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, model, ids):
        return self.scale * per_token(model, ids)

    def method(self, model, ids):
        return self(model, ids)


class OtherLoss(Loss):
    def __call__(self, model, ids):
        return self.scale * per_token(model, ids) ** 2


def captured(value, use=lambda held, losses: losses):
    def loss_fn(model, ids, use=use):
        return use(value, per_token(model, ids))

    return loss_fn


def with_default(scale):
    return lambda model, ids, scale=scale: scale * per_token(model, ids)


def with_keyword(scale):
    def loss_fn(model, ids, *, scale=scale):
        return scale * per_token(model, ids)

    return loss_fn


def power(model, ids, exponent=1.0):
    return per_token(model, ids) ** exponent


def torch_module(change=lambda module: None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
    with torch.no_grad():
        change(module)
    return module


FUNCTIONS = [
    ("code", lambda model, ids: per_token(model, ids), lambda model, ids: per_token(model, ids) * 1),
    ("constant", lambda model, ids: 2 * per_token(model, ids), lambda model, ids: 3 * per_token(model, ids)),
    ("type of a constant", lambda model, ids: 2 * per_token(model, ids), lambda model, ids: 2.0 * per_token(model, ids)),
    ("inner function", lambda m, i: (lambda x: x + 1)(per_token(m, i)), lambda m, i: (lambda x: x + 2)(per_token(m, i))),
    ("attribute", lambda m, i: per_token(m, i).exp(), lambda m, i: per_token(m, i).log()),
    ("default", with_default(1.0), with_default(2.0)),
    ("keyword default", with_keyword(1.0), with_keyword(2.0)),
    ("captured number", captured(1.0), captured(2.0)),
    ("captured dict", captured({"a": 1, "b": 2}), captured({"a": 2, "b": 1})),
    ("captured set", captured({"a", "b"}), captured({"a", "c"})),
    ("captured tuple for a list", captured([1, 2]), captured((1, 2))),
    ("where strings end", captured(["a", "bc"]), captured(["ab", "c"])),
    ("captured tensor", captured(torch.zeros(3)), captured(torch.tensor([0.0, 0.0, 1e-45]))),
    ("conjugate", captured(torch.ones(2) * 1j), captured((torch.ones(2) * 1j).conj())),
    ("dtype of a tensor", captured(torch.zeros(4)), captured(torch.zeros(4, dtype=torch.int32))),
    ("shape of an array", captured(np.zeros((2, 3))), captured(np.zeros((3, 2)))),
    ("captured function", captured(1, scaled), captured(1, power)),
    ("captured C function", captured(1, torch.add), captured(1, torch.mul)),
    ("function of numpy", captured(np.exp), captured(np.log)),
    ("partial: function", functools.partial(power), functools.partial(by_global)),
    ("partial: arguments", functools.partial(captured, 1), functools.partial(captured, 2)),
    ("partial: keywords", functools.partial(power, exponent=1.0), functools.partial(power, exponent=2.0)),
    ("method", Loss().method, Loss().__call__),
    ("object of a method", Loss(1.0).method, Loss(2.0).method),
    ("state of an object", Loss(1.0), Loss(2.0)),
    ("class of an object", Loss(1.0), OtherLoss(1.0)),
    ("named tuple", captured(Pair(1, 2)), captured(Pair(2, 1))),
    ("namespace", captured(SimpleNamespace(a=1)), captured(SimpleNamespace(a=2))),
    ("module: weight", captured(torch_module()), captured(torch_module(lambda m: m[0].bias.add_(1)))),
    ("module: setting", captured(torch_module()), captured(torch_module(lambda m: setattr(m[1], "p", 0.2)))),
    ("module: training flag", captured(torch_module()), captured(torch_module(lambda m: m.train()))),
    ("loss module", nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)),
    ("cached function", functools.lru_cache(scaled), functools.lru_cache(power)),
]


@pytest.mark.parametrize(("one", "other"), [f[1:] for f in FUNCTIONS], ids=[f[0] for f in FUNCTIONS])
def test_other_functions_have_other_fingerprints(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


@pytest.mark.parametrize("name", ["SCALE", "scaled", "per_token"])
def test_globals_are_followed_through_the_functions_that_use_them(name, monkeypatch):
    before = fingerprint(by_global)
    monkeypatch.setitem(globals(), name, 3.0 if name == "SCALE" else power)
    assert fingerprint(by_global) != before


def test_modules_of_the_callers_are_followed(monkeypatch, tmp_path):
    (tmp_path / "my_losses.py").write_text("SCALE = 2\nUNUSED = 1\ndef focal(x):\n    return x * SCALE\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_losses

    def uses(model, ids):
        return my_losses.focal(per_token(model, ids))

    def imports(model, ids):
        from my_losses import focal

        return focal(per_token(model, ids))

    before = fingerprint(uses), fingerprint(imports)
    monkeypatch.setattr(my_losses, "UNUSED", 2)
    assert (fingerprint(uses), fingerprint(imports)) == before
    monkeypatch.setattr(my_losses, "SCALE", 3)
    assert fingerprint(uses) != before[0]
    assert fingerprint(imports) != before[1]

    def with_import():
        from importlib import import_module

        return import_module("my_losses")

    assert fingerprint(lambda: getattr(torch, "ones"))  # noqa: B009
    for reaches in (
        lambda name: getattr(my_losses, name),
        lambda: vars(my_losses),
        lambda: my_losses.__dict__,
        lambda: globals()["SCALE"],
        lambda: importlib.import_module("my_losses"),
        lambda: eval("SCALE"),
        with_import,
    ):
        with pytest.raises(Unreadable, match="anything"):
            fingerprint(reaches)
    monkeypatch.delitem(sys.modules, "my_losses")
    with pytest.raises(Unreadable, match="my_losses"):
        fingerprint(imports)


def test_what_only_looks_like_a_function_of_an_installed_package_is_read():
    def cross_entropy(model, ids):
        return per_token(model, ids)

    one = functools.wraps(F.cross_entropy)(cross_entropy)

    def cross_entropy(model, ids):
        return 2 * per_token(model, ids)

    other = functools.wraps(F.cross_entropy)(cross_entropy)
    assert fingerprint(one) != fingerprint(other)


def test_what_contains_itself_is_read():
    assert fingerprint(recursive) != fingerprint(mutual)
    one, other = [1], [2]
    one.append(one)
    other.append(other)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one)) != fingerprint(other)
    owner = SimpleNamespace()
    owner.method = functools.partial(captured, owner)
    assert fingerprint(owner) == fingerprint(copy.deepcopy(owner))


UNREADABLE = [threading.Lock(), itertools.count(), (i for i in range(3)), torch.Generator(), np.random.default_rng(0), object(),
              random.Random(0).random, torch.zeros(2, 2).to_sparse()]  # fmt: skip


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda v: type(v).__name__)
def test_what_cannot_be_compared_is_not_guessed(value):
    with pytest.raises(Unreadable, match="value: "):
        fingerprint(captured(value))
    with pytest.raises(Unreadable):
        fingerprint(Loss([{"x": value}]))


class Sly:
    @property
    def __dict__(self):
        raise RuntimeError("no")


def test_what_fails_when_it_is_read_is_unreadable():
    with pytest.raises(Unreadable, match="value: a Sly, which fails with RuntimeError"):
        fingerprint(captured(Sly()))


def test_long_code_is_read_like_short_code():
    """Where more than 255 constants come first, instructions have prefixes."""
    filler = "\n    ".join(f"x = {number}.5" for number in range(300))
    home = {"__name__": "mine", "__package__": "json"}
    exec(f"def uses(x):\n    {filler}\n    from . import decoder\n    import mine_too\n    return x", home)
    with pytest.raises(Unreadable, match="mine_too"):
        fingerprint(home["uses"])
