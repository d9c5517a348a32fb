"""Reports: their numbers are those of compute_*, the text of others is inert, nothing is fetched, and Chromium shows them."""

import base64
import contextlib
import hashlib
import html as html_module
import importlib.util
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TinyLM, random_tokens
from forged import edit

import devinterp
from devinterp.cli import main
from devinterp.errors import DevinterpInputError, PackageMissing, StorageError, StoreError
from devinterp.pictures.page import html
from devinterp.pictures.page.body import verdicts
from devinterp.pictures.page.charts import specifications
from devinterp.pictures.texts import texts_of
from devinterp.slt.report_runs import runs_of

SETTINGS = {"lr": 1e-3, "n_beta": 10.0, "localization": 5.0, "batch_size": 4, "num_draws": 30, "num_chains": 2,
            "num_init_loss_batches": 1, "batches_per_draw": 2, "progress": False, "chains_together": "sequential"}  # fmt: skip
DATA = random_tokens()
OBSERVABLES = {"code": DATA, "prose": random_tokens(seed=1)}
RESTRICTIONS = {"full": None, "a": {"mix.weight": None}, "b": {"out.weight": None}}
ATTACKS = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "javascript:alert(1)",
    "{{constructor.constructor('alert(1)')()}}", "datum.value'];alert(1)//", "\u2028alert(1)", "<!--<script>", "]]>", "&lt;b&gt;",
    "\x1b[2J\x00", "\u202etxt.exe",
)  # fmt: skip


class Hostile:
    """A tokenizer every token of which is an attack."""

    def decode(self, ids: list[int]) -> str:
        return "".join(ATTACKS[i % len(ATTACKS)] for i in ids)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two checkpoints, three restrictions each, in one folder."""
    folder = tmp_path_factory.mktemp("stores")
    for number in (10, 200):
        model = TinyLM(seed=number)
        for name, masks in RESTRICTIONS.items():
            path = folder / f"step-{number}_{name}.zarr"
            devinterp.sample(model, DATA, OBSERVABLES, param_masks=masks, output_path=path, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def page(stores, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert devinterp.report(stores, path, sampling_task="code", sequences=3) == path
    return path


def values_of(path: Path) -> dict:
    text = re.search(r'<script type="application/json" id="values">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1]
    return json.loads(text)


def test_runs_are_read_from_the_names_of_a_folder(stores, page):
    values = values_of(page)
    assert values["checkpoints"] == ["step-10", "step-200"]
    assert values["steps"] == [10, 200]
    assert [(run["checkpoint"], run["restriction"]) for run in values["runs"]] == [
        (checkpoint, name) for checkpoint in ("step-10", "step-200") for name in ("full", "a", "b")
    ]


def test_numbers_of_runs_are_those_of_compute_llc_and_diagnose(stores, page):
    for run in values_of(page)["runs"]:
        store = stores / f"{run['checkpoint']}_{run['restriction']}.zarr"
        result, found = devinterp.compute_llc(store), devinterp.diagnose(store)
        assert (run["llc"], run["sem"]) == (float(result.llc_mean), float(result.llc_sem))
        assert run["observables"]["prose"][:2] == [
            float(result[name].sel(observable="prose")) for name in ("llc_observable", "llc_observable_sem")
        ]
        assert run["verdicts"] == found.verdict.values.tolist()
        assert run["sentences"] == devinterp.describe(found).split("\n")
        np.testing.assert_allclose(run["traces"], found.trace, rtol=1e-4)
        assert run["rhat"] == float(found.rhat_matched)


def test_texts_and_their_llcs(stores, page):
    values = values_of(page)
    result = devinterp.compute_llc(stores / "step-200_full.zarr", per="token")
    texts = values["texts"][1]
    assert [(text["observable"], text["sequence"]) for text in texts] == [(o, n) for o in ("code", "prose") for n in range(3)]
    for text in texts:
        at = {f"batch_{text['observable']}": text["sequence"]}
        np.testing.assert_allclose(text["values"]["llc"], result[f"llc_token_{text['observable']}"].isel(at), rtol=1e-4)
        np.testing.assert_allclose(text["values"]["sem"], result[f"llc_token_{text['observable']}_sem"].isel(at), rtol=1e-4)
        assert text["tokens"] == texts_of(result[f"input_ids_{text['observable']}"].isel(at).values.tolist(), None)


def test_influences_are_those_of_compute_bif(stores, page):
    found = values_of(page)["influences"][0]
    result = devinterp.compute_bif(stores / "step-10_full.zarr", correlation_method="sequence", progress=False)
    starts = result.attrs["observables"]
    rows = [starts[one["observable"]] + one["sequence"] for one in found["sequences"]]
    np.testing.assert_allclose(found["matrix"], result.influences.values[np.ix_(rows, rows)], rtol=1e-4)
    tokens = devinterp.compute_bif(stores / "step-10_full.zarr", progress=False)
    for pair in found["pairs"][:5]:
        one, other = pair["sides"]
        at = {"batch_1": starts[one["observable"]] + one["sequence"], "batch_2": starts[other["observable"]] + other["sequence"],
              "target_position": one["position"], "target_position_T": other["position"]}  # fmt: skip
        assert abs(pair["value"] - float(tokens.influences.sel(at))) < 1e-6
    between = found["tokens"]
    shown = list(dict.fromkeys(index for _, _, index in between["rows"]))
    size = len(shown) * between["length"]
    hundredths = np.frombuffer(base64.b64decode(between["hundredths"]), np.int8).reshape(size, size)
    places = [starts[name] + sequence for name, sequence, _ in between["rows"]]
    expected = tokens.influences.values[np.ix_(places, places)].transpose(0, 2, 1, 3).reshape(size, size)
    assert np.abs(hundredths / 100 - expected).max() <= 0.005 + 1e-6


def test_sequences_with_equal_tokens_do_not_influence_each_other(tmp_path):
    same = random_tokens(8)
    samples = devinterp.sample(TinyLM(), DATA, {"x": same, "y": same}, **SETTINGS)
    found = values_of(devinterp.report(samples, tmp_path / "r.html", sequences=8))["influences"][0]
    assert len(found["sequences"]) == 8, "those of y are those of x"
    ids = {}
    for name in "xy":
        for number, row in enumerate(samples[f"input_ids_{name}"].values):
            ids.setdefault(row.tobytes(), []).append((name, number))
    index = {(name, sequence): at for name, sequence, at in found["tokens"]["rows"]}
    assert all(len({index[place] for place in places}) == 1 for places in ids.values())


def test_responses_are_those_of_compute_susceptibilities(stores, page):
    found = values_of(page)["responses"][1]
    runs = {name: stores / f"step-200_{name}.zarr" for name in RESTRICTIONS}
    options = {"include_sampling_task": True, "estimator": "one_chain", "standardize": True}
    means = devinterp.compute_susceptibilities(runs, "code", mean_over="dataset", **options)["susceptibilities"].to_dataset()
    tokens = devinterp.compute_susceptibilities(runs, "code", **options)["susceptibilities"].to_dataset()
    np.testing.assert_allclose(found["means"], means.sus, rtol=1e-4)
    np.testing.assert_allclose(found["errors"], means.sus_sem, rtol=1e-4)
    assert found["components"] == ["a", "b"]
    by_sequence = devinterp.compute_susceptibilities(runs, "code", mean_over="sequence", **options)["susceptibilities"]
    np.testing.assert_allclose(found["by_sequence"], by_sequence.sus, rtol=1e-4)
    for text in found["tokens"]:
        number = found["observables"].index(text["observable"])
        rows = (tokens.dataset_id.values == number) & (tokens.batch.values == text["sequence"])
        np.testing.assert_allclose(text["values"]["b"], tokens.sus.sel(wr="b").values[rows], rtol=1e-4)
    assert found["points"]["of"] == tokens.sizes["sus_flat"]


def test_without_a_sampling_task_the_report_says_what_is_missing(stores, tmp_path):
    values = values_of(devinterp.report(stores, tmp_path / "r.html"))
    assert "sampling_task=, one of code, prose" in values["responses"][0]


class Elements(HTMLParser):
    """What a browser would make elements and attributes of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)


def test_nothing_refers_to_an_address_and_only_two_scripts_may_run(page):
    text = page.read_text("utf-8")
    tags = Elements(text).tags
    for name, attributes in tags:
        assert name not in ("link", "iframe", "img", "object", "embed", "base", "form", "audio", "video"), name
        assert not {"src", "action", "srcset", "background"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
        assert not any(key.startswith("on") for key in attributes)
    policy = next(
        attributes["content"] for name, attributes in tags if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = re.findall(r"'sha256-([^']+)'", policy)
    assert hashes == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2
    ours = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?:|[\"'(=]//\w", ours), "an address outside of Vega's own code"
    assert "http" not in scripts[1]


def renamed(stores: Path, folder: Path) -> Path:
    """A copy whose texts are attacks, as a stranger could send it."""
    shutil.copytree(stores / "step-10_full.zarr", folder / "run")

    def change(declared):
        metadata = declared["attributes"]["metadata"]
        metadata["model"]["class"] = "</title></script><script>alert(1)</script>"
        metadata["config"]["sampler"] |= {"<b>": ATTACKS[0], "sampling_method": ATTACKS[0], "device": {"<i>": ATTACKS[1]}}
        metadata["versions"] = {ATTACKS[1]: ATTACKS[2]}

    edit(folder / "run", change)
    return folder / "run"


def hostile_report(stores: Path, folder: Path) -> Path:
    full = renamed(stores, folder)
    others = {ATTACKS[3]: stores / "step-10_a.zarr", ATTACKS[4]: stores / "step-10_b.zarr"}
    runs = {(ATTACKS[0], "full"): full, **{(ATTACKS[0], name): path for name, path in others.items()},
            (ATTACKS[1], "full"): stores / "step-200_full.zarr"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # runs whose settings are text cannot be compared with the others, which here is not the point
        patch.setattr("devinterp.slt.suites._check_same", lambda *_: None)
        return devinterp.report(runs, folder / "r.html", tokenizer=Hostile(), sampling_task="code", title=ATTACKS[0])


def test_hostile_names_tokens_and_settings_are_text(stores, tmp_path):
    text = hostile_report(stores, tmp_path).read_text("utf-8")
    for attack in ("<script>alert", "<img src=x", "<svg onload", "onerror=alert(1)>"):
        assert attack not in text, attack
    assert html_module.escape(ATTACKS[0]) in text
    elements = Elements(text)
    assert [name for name, _ in elements.tags].count("script") == 3
    assert not {"img", "svg", "b", "i"} & {name for name, _ in elements.tags} - {"b", "i"}
    assert "\x1b" not in text
    assert "\x00" not in text
    values = values_of(tmp_path / "r.html")
    assert values["checkpoints"] == [ATTACKS[0], ATTACKS[1]], "names are kept as they are, as data"
    assert any(ATTACKS[0] in text["tokens"][1:] + text["tokens"][:1] for text in values["texts"][0])


def test_charts_hold_no_text_of_stores_and_fixed_expressions():
    """A name can only be a value of a row: specifications are the same for all reports, and have no place for one."""
    charts = specifications()
    assert charts == specifications()
    text = json.dumps(charts)
    assert "http" not in text
    expressions = sorted(set(re.findall(r'"(?:filter|expr|test|calculate)": "([^"]*)"', text)))
    assert expressions == ["datum.series", "isValid(datum.group)", "isValid(datum.value)"]
    assert not re.search(r'"(url|href|image|html)"', text)


def test_json_cannot_end_its_script_and_has_no_nan():
    attack = {"x": "</script><!--", "y": [float("nan"), 1.5, float("inf")], "z": "\u2028 & \ud800"}
    text = html.data(attack)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": "</script><!--", "y": [None, 1.5, None], "z": "\u2028 & \ud800"}


def test_equal_verdicts_of_many_runs_are_said_once():
    def run(name, verdicts, reasons):
        advice = ["" if verdict == "healthy" else f"advice on {verdict}" for verdict in verdicts]
        return {
            "name": name,
            "restriction": "full",
            "llc": math.nan,
            "verdicts": verdicts,
            "reasons": reasons,
            "advice": advice,
        }

    runs = [run(f"step{i}", ["spiky", "spiky"], [f"reason {i}"] * 2) for i in range(5)]
    runs += [run("good", ["healthy"] * 2, ["", ""]), run("late", ["healthy", "diverged"], ["", "after 3 steps"])]
    text = verdicts({"runs": runs, "full": "full"}, ["a note"]).text
    assert "1 of 7 runs are healthy" in text
    assert "6 are not:" in text
    assert text.count("Try advice on spiky.") == 1
    assert "<b>5 runs</b>: spiky." in text
    for i in range(5):
        assert f"<b>step{i}</b>: all chains (reason {i})" in text
    assert "<b>late</b>: diverged, chain 1 (after 3 steps). Try advice on diverged." in text
    assert "a note" in text


def test_html_of_any_text_is_text():
    shown = html.tag("p", ATTACKS[1], data_v='"x" onload="y', class_="a").text
    (name, attributes), *rest = Elements(shown).tags
    assert (name, attributes, rest) == ("p", {"data-v": '"x" onload="y', "class": "a"}, [])
    assert Elements(shown).words == [ATTACKS[1]]
    assert html.tag("b", None, 3, html.Raw("<i></i>")).text == "<b>None3<i></i></b>"


def test_runs_of_a_dict_a_list_and_a_single_store(stores, tmp_path):
    one = runs_of(stores / "step-10_full.zarr")
    assert [(run.checkpoint, run.restriction) for run in one.runs] == [("step-10_full", "full")]
    listed = runs_of([stores / "step-10_full.zarr", stores / "step-10_full.zarr.run", stores / "step-10_a.zarr"])
    assert [(run.checkpoint, run.restriction) for run in listed.runs] == [("step-10", "full"), ("step-10", "a")]
    named = runs_of({"x": stores / "step-10_full.zarr", ("y", "a"): stores / "step-10_a.zarr"})
    assert [run.name for run in named.runs] == ["x", "y, a"]


def test_a_name_with_underscores_is_a_checkpoint_unless_its_weights_say_otherwise(stores, tmp_path):
    for new, old in (("run", "step-10_full"), ("run_a", "step-10_a"), ("run_b", "step-200_full"), ("run_10", "step-200_a")):
        shutil.copytree(stores / f"{old}.zarr", tmp_path / new)
    (tmp_path / "notes.txt").write_text("")
    found = runs_of(tmp_path)
    assert [(run.checkpoint, run.restriction) for run in found.runs] == [
        ("run", "full"), ("run", "a"), ("run_10", "full"), ("run_b", "full")
    ]  # fmt: skip


def test_a_sweep_brings_its_names_its_sampling_task_and_what_failed(tmp_path):
    def gone():
        raise OSError("no such checkpoint")

    checkpoints = {"a_b": lambda: TinyLM(seed=1), "step_7": lambda: TinyLM(seed=2), "lost": gone}
    with pytest.warns(UserWarning, match="lost"):
        tree = devinterp.sweep(
            checkpoints, DATA, OBSERVABLES, output_path=tmp_path / "sweep", weight_restrictions=RESTRICTIONS,
            sampling_task="prose", **SETTINGS,
        )  # fmt: skip
    named = [(checkpoint, name) for checkpoint in ("a_b", "step_7") for name in ("full", "a", "b")]
    for given in (tree, tmp_path / "sweep"):
        values = values_of(devinterp.report(given, tmp_path / "r.html"))
        assert [(run["checkpoint"], run["restriction"]) for run in values["runs"]] == named
        assert values["responses"][0]["task"] == "prose"
        assert "Left out: lost" in (tmp_path / "r.html").read_text("utf-8")
    result = devinterp.compute_llc(tree)
    for run in values["runs"]:
        assert run["llc"] == float(result.llc_mean.sel(checkpoint=run["checkpoint"], restriction=run["restriction"]))
    from devinterp import pictures

    ax = pictures.plot_llc_over_checkpoints(result)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["full", "a", "b"]


def test_what_is_left_out_is_told(stores, tmp_path):
    shutil.copytree(stores / "step-10_full.zarr", tmp_path / "good")
    shutil.copytree(stores / "step-10_full.zarr", tmp_path / "running")
    status = tmp_path / "running" / "chain_status"
    shutil.rmtree(status / "c", ignore_errors=True)  # as a run that has only begun
    devinterp.compute_bif(tmp_path / "good", output_path=tmp_path / "bif", progress=False)
    found = runs_of(tmp_path)
    assert [run.name for run in found.runs] == ["good"]
    assert set(found.left_out) == {"running", "bif"}
    assert "not finished" in found.left_out["running"]
    text = devinterp.report(tmp_path, tmp_path / "r.html").read_text("utf-8")
    assert "Left out: running" in text


def test_a_diverged_chain_has_its_verdict_and_the_others_their_llc(stores, tmp_path):
    ds = devinterp.sample(TinyLM(), DATA, OBSERVABLES, **SETTINGS).to_dataset().load()
    ds["chain_status"] = ds["chain_status"].copy(data=[2, 1])
    gone = ds.copy()
    gone["chain_status"] = ds["chain_status"].copy(data=[2, 2])
    values = values_of(devinterp.report({"x": ds, "y": gone}, tmp_path / "r.html"))
    assert values["runs"][0]["verdicts"][0] == "diverged"
    assert values["runs"][0]["llc"] == float(devinterp.compute_llc(ds, on_diverged="drop").llc_mean)
    assert values["runs"][1]["llc"] is None
    assert values["texts"][1] == []
    assert values["influences"][1] is None
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "No influences at y: no chain is left" in text
    assert "No text at y: no chain is left" in text


def test_wrong_arguments_are_refused_before_anything_is_computed(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("devinterp.slt.report.values_of", lambda *_: pytest.fail("computed"))
    (tmp_path / "mine.html").write_text("<html>years of work</html>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.html").symlink_to("elsewhere.html")
    other = devinterp.sample(TinyLM(), DATA, OBSERVABLES, **(SETTINGS | {"localization": 7.0}))
    run = stores / "step-10_full.zarr"
    calls = [
        (lambda: devinterp.report(run, "mine.html"), "an earlier report"),
        (lambda: devinterp.report(run, "link.html"), "an earlier report"),
        (lambda: devinterp.report(run, "nowhere/r.html"), "a folder that is there"),
        (lambda: devinterp.report(run, "x" * 5000), "output_path="),
        (lambda: devinterp.report(run, "a\0b"), "output_path="),
        (lambda: devinterp.report(run, 3), "output_path=3"),
        (lambda: devinterp.report(run, tokenizer="gpt2"), "tokenizer='gpt2'"),
        (lambda: devinterp.report(run, title=3), "title=3"),
        (lambda: devinterp.report(run, sequences=0), "sequences=0"),
        (lambda: devinterp.report(run, estimator="three_chain"), "estimator='three_chain'"),
        (lambda: devinterp.report(run, sampling_task="pile"), "sampling_task='pile'"),
        (lambda: devinterp.report({"a": run, "b": other}), "runs of 2 settings, whose LLCs cannot be compared"),
        (lambda: devinterp.report({("a", "b", "c"): run}), "samples="),
        (lambda: devinterp.report({"a": run, ("a", "full"): run}), "different names"),
        (lambda: devinterp.report([run, run]), "another name"),
        (lambda: devinterp.report("empty"), "no run can be reported"),
        (lambda: devinterp.report("nowhere"), "is not a store"),
        (lambda: devinterp.report({}), "no run can be reported"),
    ]
    for call, message in calls:
        with pytest.raises((DevinterpInputError, StoreError), match=message):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.html", "empty", "link.html"}
    assert "years of work" in (tmp_path / "mine.html").read_text()


def test_an_earlier_report_is_replaced_whole_or_not_at_all(stores, tmp_path, monkeypatch):
    path = devinterp.report(stores / "step-10_full.zarr", tmp_path / "r.html", title="first")
    devinterp.report(stores / "step-10_full.zarr", path, title="second")
    assert "<title>second</title>" in path.read_text("utf-8")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        devinterp.report(stores / "step-10_full.zarr", path, title="third")
    assert "<title>second</title>" in path.read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("name", ["altair", "vl_convert"])
def test_what_is_not_installed_is_named(stores, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PackageMissing, match=r"pip install 'devinterp\[report\]'"):
        devinterp.report(stores, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_command_line(stores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["devinterp", "report", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code)
        return 0

    assert call(stores, "-o", "r.html", "--sampling-task", "code", "--sequences", "2", "--title", "mine") == 0
    assert "report in " in capsys.readouterr().out
    assert "<title>mine</title>" in Path("r.html").read_text("utf-8")
    assert len(values_of(tmp_path / "r.html")["texts"][0]) == 4
    assert call(*stores.glob("step-10_*"), "-o", "r.html") == 0
    assert values_of(tmp_path / "r.html")["checkpoints"] == ["step-10"]
    capsys.readouterr()
    assert call("nowhere") == 1
    assert "'nowhere' is not a store" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert call(stores, "--tokenizer", "nowhere/tokenizer") == 2
    assert "--tokenizer=" in capsys.readouterr().err


def test_importing_and_help_load_no_altair():
    code = "import sys; import devinterp.slt.report; assert not {'altair', 'vl_convert', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ABSENT = (
    "no chromium (apt-get install chromium)"
    if CHROMIUM is None
    else "no playwright"
    if importlib.util.find_spec("playwright") is None
    else ""
)
in_browser = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Tab:
    """A page that is open, with all that it asked for and complained of."""

    def __init__(self, browser, path: Path, scheme: str = "light", width: int = 1200):
        self.page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("DIALOG " + dialog.message), dialog.dismiss()))
        self.page.goto(path.as_uri(), wait_until="load")

    def all_drawn(self) -> int:
        """Every chart is brought into view and waited for."""
        charts = self.page.locator(".chart")
        for number in range(charts.count()):
            charts.nth(number).scroll_into_view_if_needed()
            self.page.wait_for_function(
                "n => { const c = document.querySelectorAll('.chart')[n]; return c.dataset.drawn || c.textContent.includes('Nothing to show'); }",
                arg=number, timeout=20_000,
            )  # fmt: skip
        return charts.count()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_charts_are_drawn_and_nothing_is_asked_for(browser, page, scheme):
    tab = Tab(browser, page, scheme)
    assert tab.all_drawn() == 7
    assert tab.page.locator(".chart svg, .chart canvas").count() >= 7
    assert tab.requests == [page.as_uri()]
    assert not tab.complaints
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    tab.page.click("#theme")
    tab.page.wait_for_function(
        "[...document.querySelectorAll('.chart')].every(c => Number(c.dataset.drawn) >= 2)", timeout=20_000
    )
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    assert not tab.complaints


@in_browser
def test_tables_sort(browser, page):
    tab = Tab(browser, page).page
    columns = tab.locator("#runs thead th").all_inner_texts()
    llc = [run["llc"] for run in values_of(page)["runs"]]
    column = columns.index("LLC")

    def shown() -> list[float]:
        return [float(row.locator("td").nth(column).get_attribute("data-v")) for row in tab.locator("#runs tbody tr").all()]

    assert shown() == llc
    tab.locator("#runs thead th button").nth(column).click()
    assert shown() == sorted(llc)
    assert tab.locator("#runs thead th").nth(column).get_attribute("aria-sort") == "ascending"
    tab.locator("#runs thead th button").nth(column).press("Enter")
    assert shown() == sorted(llc, reverse=True)
    tab.locator("#runs thead th button").nth(1).click()
    names = [row.locator("td").nth(1).inner_text() for row in tab.locator("#runs tbody tr").all()]
    assert names == sorted(names)


@in_browser
def test_a_run_is_shown_by_a_click_and_the_text_by_pointing(browser, page):
    values, tab = values_of(page), Tab(browser, page)
    tab.page.locator("#runs tbody tr").nth(4).click()
    assert tab.page.locator("#run-sentences li").all_inner_texts() == values["runs"][4]["sentences"]
    assert tab.page.input_value("#run") == "4"
    text = values["texts"][1][0]
    token = tab.page.locator("#texts .text").first.locator("span").nth(3)
    token.hover()
    shown = tab.page.locator("#tip").inner_text()
    assert text["tokens"][3] in shown
    assert "position 3" in shown
    assert f"{text['values']['llc'][2]:.4g}" in shown.replace("+", "")
    assert "loss at the checkpoint" in shown
    tab.page.select_option("#text-measure", label="susceptibility of b (z-score)")
    token.hover()
    expected = values["responses"][1]["tokens"][0]["values"]["b"][2]
    assert f"{expected:+.4g}" in tab.page.locator("#tip").inner_text()
    token = tab.page.locator("#texts .text").first.locator("span").nth(3)
    token.click()
    other = tab.page.locator("#texts .text").nth(1).locator("span").nth(2)
    other.hover()
    between = values["influences"][1]["tokens"]
    index = {(name, sequence): at for name, sequence, at in between["rows"]}
    size = (max(index.values()) + 1) * between["length"]
    matrix = np.frombuffer(base64.b64decode(between["hundredths"]), np.int8).reshape(size, size)
    row, column = index["code", 0] * between["length"] + 2, index["code", 1] * between["length"] + 1
    assert (
        f"correlation with the token clicked: {matrix[row, column] / 100:+.4g}".replace("+0 ", "0 ")
        in tab.page.locator("#tip").inner_text()
    )
    assert tab.page.locator("#texts .picked").count() == 1
    assert not tab.complaints


@in_browser
def test_charts_tell_their_numbers_by_pointing(browser, page):
    tab = Tab(browser, page)
    tab.all_drawn()
    bar = tab.page.locator("#responses .mark-rect path").first
    bar.hover()
    tip = tab.page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    means = values_of(page)["responses"][1]["means"]
    text = tip.inner_text().replace("\u2212", "-")
    found = float(re.search(r"mean \(z-score\)\s*([+-][\d.e-]+)", text)[1])
    assert min(abs(found - mean) for row in means for mean in row) < 5e-3 * abs(found)


@in_browser
def test_hostile_text_runs_nothing_in_a_browser(browser, stores, tmp_path):
    path = hostile_report(stores, tmp_path)
    tab = Tab(browser, path)
    tab.all_drawn()
    for select, count in (("#run", 4), ("#text-checkpoint", 2), ("#point-kind", 2), ("#influence-order", 2)):
        for number in range(count):
            tab.page.select_option(select, str(number))
    for place in ("#texts span >> nth=3", "#responses .mark-rect path >> nth=0", "#llc-whole .mark-symbol path >> nth=0"):
        if tab.page.locator(place).count():
            tab.page.locator(place).hover(force=True)
            tab.page.wait_for_timeout(100)
    assert tab.page.title() == html.inert(ATTACKS[0]).replace("&lt;", "<").replace("&gt;", ">")
    assert tab.page.evaluate("document.scripts.length") == 3
    assert (
        tab.page.locator("main img, main b b, main svg[onload], #vg-tooltip-element img, #vg-tooltip-element script").count()
        == 0
    )
    assert ATTACKS[0] in tab.page.locator("#run option").first.inner_text()
    assert tab.requests == [path.as_uri()]
    assert not tab.complaints, tab.complaints


@in_browser
def test_the_policy_itself_stops_what_would_slip_through(browser, page, tmp_path):
    """Planted: elements that the escaping would never let by, and a server that would hear of them."""
    text, planted = page.read_text("utf-8"), tmp_path / "planted.html"
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        attack = f"<img src='{address}/x' onerror=alert(1)><script>alert(2)</script><link rel=stylesheet href='{address}/y'>"
        attack += f"<script src='{address}/z'></script><iframe src='{address}/f'></iframe>"
        planted.write_text(text.replace("<main>", "<main>" + attack), "utf-8")
        tab = Tab(browser, planted)
        with contextlib.suppress(TimeoutError):
            while True:  # Chromium opens a connection for a frame before it looks at the policy, and then says nothing on it
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(2)
                    heard.append(connection.recv(100))
    assert not any(heard), heard
    assert not [complaint for complaint in tab.complaints if complaint.startswith("DIALOG")]
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


@in_browser
def test_a_narrow_screen_shows_everything_without_sideways_scrolling(browser, page):
    tab = Tab(browser, page, width=400)
    tab.all_drawn()
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")


def sweep_of(folder: Path, checkpoints: int, components: int) -> dict:
    """A sweep of full size: stores are made once and their losses varied, since only sizes matter here."""
    torch.manual_seed(0)
    data = random_tokens(64, 65)
    settings = SETTINGS | {"num_draws": 100, "num_chains": 4, "batch_size": 16}
    one = (
        devinterp.sample(TinyLM(), data, {"code": data, "prose": random_tokens(64, 65, seed=1)}, **settings).to_dataset().load()
    )
    rng, runs = np.random.default_rng(0), {}
    for checkpoint in range(checkpoints):
        for number in range(components):
            name = "full" if number == 0 else f"l{number // 4}h{number % 4}"
            losses = {
                n: one[n] + rng.normal(0, 0.05, one[n].shape).astype("f4") for n in ("loss_code", "loss_prose", "sampling_loss")
            }
            runs[f"step-{2**checkpoint}", name] = one.assign(losses)
    return runs


def opening(browser, path: Path) -> tuple[float, float]:
    """Seconds until tables and text are there, and until the first chart below them is drawn."""
    began = time.monotonic()
    tab = Tab(browser, path).page
    assert tab.locator("#runs tbody tr").count() == 80
    assert tab.locator("#texts span").count() > 0
    opened = time.monotonic() - began
    tab.locator("#llc-whole").scroll_into_view_if_needed()
    tab.wait_for_selector("#llc-whole svg")
    drawn = time.monotonic() - began
    tab.context.close()
    return opened, drawn


@in_browser
def test_a_whole_sweep_is_small_and_opens(browser, tmp_path, monkeypatch):
    """8 checkpoints, the whole model and 9 components, 4 chains of 100 draws, 2 observables of 32 sequences of 64 tokens."""
    monkeypatch.setattr("devinterp.slt.suites._check_same", lambda *_: None)  # one run's metadata for all
    began = time.monotonic()
    path = devinterp.report(sweep_of(tmp_path, 8, 10), tmp_path / "sweep.html", sampling_task="code")
    size, took = path.stat().st_size / 2**20, time.monotonic() - began
    opened, drawn = opening(browser, path)
    print(f"report of 8 x 10 runs: {size:.1f} MiB, made in {took:.0f} s; opens in {opened:.2f} s, chart after {drawn:.2f} s")
    assert size < 15
    tab = Tab(browser, path)
    assert tab.all_drawn() == 7
    assert not tab.complaints
    tab.page.context.close()
