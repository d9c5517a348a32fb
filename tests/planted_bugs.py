"""Plant each of these bugs in a copy of the package and see that some test goes red.

    python tests/planted_bugs.py [name ...]        (or: make planted-bugs)

A bug that no test notices, or a line that is no longer there to be changed, makes the command fail.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST_SECONDS = 600
"""of the tests of one bug"""


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    right: str
    wrong: str
    tests: str
    """those that should notice, to be quick"""


LAWS, CHAIN, MODEL, LLC = "tests/test_laws.py", "tests/test_chain.py", "tests/test_model_untouched.py", "tests/test_llc.py"
SGLD, LM = "samplers/sgld.py", "samplers/leimkuhler_matthews.py"
BIF, SUS, DEAD = "tests/test_bif.py", "tests/test_susceptibilities.py", "tests/test_dead_heads.py"
IDENTITY, FUNCTIONS, CODE = "tests/test_identity.py", "tests/test_fingerprints.py", "store/kinds.py"
SPREAD, ORIGIN = "tests/test_several_devices.py", "tests/test_origin.py"
FAST, PLACE = "tests/test_fast_paths.py", "tests/test_placement.py"
STRANGERS, ATTRIBUTES = "tests/test_strangers.py", "tests/test_hostile_metadata.py"
NAMES, DOORS, GUARD = "tests/test_hostile_names.py", "tests/test_no_side_doors.py", "store/guard.py"
RESUME, CRASHES = "tests/test_resume.py", "tests/test_crashes.py"
OBJECTS = "tests/test_object_stores.py"
DIAGNOSIS, CALIBRATION = "tests/test_diagnosis.py", "tests/test_calibration.py"
ERRORS, CONTROL, PATTERNS = "tests/test_error_bars.py", "tests/test_control.py", "tests/test_patterning.py"
RMS, LOOP, WALKER = "samplers/rmsprop_sgld.py", "engine/chain.py", "engine/walker.py"
PLM, NHT = "samplers/preconditioned_leimkuhler_matthews.py", "samplers/sgnht.py"
SWEEP, ORIGIN = "tests/test_sweep.py", "tests/test_origin.py"
PICTURES, REPORT, PAGE = "tests/test_pictures.py", "tests/test_report.py", "pictures/page/html.py"
AWAY = "tests/test_executors.py"
SAMPLERS, METRIC = "tests/test_samplers.py", "tests/test_metric.py"
MASKS, OTHER = "tests/test_masks.py", "tests/test_other_models.py"
OBJECTIVE, TRIALS = "engine/objective.py", "engine/trials.py"
FORMS, CONVERT = "slt/conversion.py", "tests/test_conversion.py"

BUGS = [
    Bug("noise scaled by lr", SGLD, "self.lr**0.5 * xi", "self.lr * xi", LAWS),
    Bug("drift without 1/2", SGLD, "gain = 0.5 * self.lr", "gain = self.lr", LAWS),
    Bug("noise 2 % too large", SGLD, "self.noise_level * self.lr**0.5", "1.02 * self.noise_level * self.lr**0.5", LAWS),
    Bug("fresh noise only", LM, "(state.xi + xi)", "(2**0.5 * xi)", LAWS),
    Bug("half noise of the last step lost", LM, "gain), LeimkuhlerMatthewsState(xi)", "gain), LeimkuhlerMatthewsState(0 * xi)", LAWS),
    Bug("rmsprop noise with G, not sqrt(G)", RMS, "(self.lr * preconditioner).sqrt()", "self.lr**0.5 * preconditioner", LAWS),
    Bug("rmsprop squares the whole force", RMS, "g, t = force.gradient", "g, t = force.total()", LAWS),
    Bug("rmsprop correction off by one", RMS, "self.alpha ** (t + 1)", "self.alpha**t", LAWS),
    Bug("noise with M, not sqrt(M)", PLM, "* rate**0.5 *", "* self.lr**0.5 * force.metric *", METRIC),
    Bug("heat counted in equal parts", NHT, "(4 + state.thermostat) / (8 + 4 * state.thermostat)", "0.5", SAMPLERS),
    Bug("friction without its heat", NHT, "(self.friction * (2 + thermostat))", "(2 * self.friction)", SAMPLERS),
    Bug("momenta forgotten", NHT, "SGNHTState(momentum, thermostat)", "SGNHTState(0 * momentum, thermostat)", SAMPLERS),
    Bug("adam without its average", "samplers/adam_sgld.py", "- gain * force.n_beta * remembered", "", SAMPLERS),
    Bug("adam squares the average", "samplers/adam_sgld.py", "(1 - self.beta2) * g * g", "(1 - self.beta2) * average**2", SAMPLERS),
    Bug("the metric stays behind", "slt/planning.py", "metric=found.metric", "metric=None", METRIC),
    Bug("a metric of diagonals with their sign", "engine/metric.py", "squares.addcmul_(curvature.gradient, curvature.gradient,",
        "squares.addcmul_(curvature.gradient, curvature.gradient.sign(),", METRIC),
    Bug("the metric not scaled", "engine/metric.py", "metric.div_(stiffest)", "metric", METRIC),
    Bug("step size by the weights' own curvature", "engine/curvature.py", "self.apply(shift) if metric is None else", "self.apply(shift) if True else", METRIC),
    Bug("n_beta left out", "samplers/base.py", "self.n_beta * self.gradient", "1.0 * self.gradient", LAWS),
    Bug("localization to zero", "engine/posterior.py", "(weights - anchor).mul_", "(weights - 0 * anchor).mul_", LAWS),
    Bug("localization 2 % off", "engine/posterior.py", "mul_(self.localization)", "mul_(1.02 * self.localization)", LAWS),
    Bug("weight decay forgotten", "engine/posterior.py", "if self.weight_decay:", "if False:", LAWS),
    Bug("draw one step early", "engine/settings.py", "steps_taken - self.num_burnin_steps, self",
        "steps_taken + 1 - self.num_burnin_steps, self", CHAIN),
    Bug("loss after the step", LOOP, "        metrics = None if last or not watch.alive else walker.step()\n",
        "        metrics = None if last or not watch.alive else walker.step()\n        losses = walker.differentiate(t)\n", CHAIN),
    Bug("observables at other weights", WALKER, "forward.losses(moved, b, buffers, s, r)",
        "forward.losses({}, b, buffers, s, r)", CHAIN),
    Bug("baseline on another batch", "engine/baseline.py", "plan.settings.steps_before_draw(draw))",
        "plan.settings.steps_before_draw(draw) - 1)", CHAIN),
    Bug("burn-in averaged in", "engine/settings.py", "return past - 1 if rest == 0 and past >= 1 else None",
        "return steps_taken if steps_taken < self.num_draws else None", LLC),
    Bug("dropout left on", "engine/checkpoint.py", "self.model.train(self.train_mode)", "self.model.train(True)", MODEL),
    Bug("training flags not put back", "engine/checkpoint.py", "module.training = training", "pass", MODEL),
    Bug("a mask ignored", "engine/selection.py", "None if mask is None else mask.bool()", "None if True else mask.bool()", LAWS),
    Bug("masters in bfloat16", "engine/selection.py", "torch.float64 if wide else torch.float32",
        "torch.float64 if wide else pieces[0].parameter.dtype", LAWS),
    Bug("seed + chain", "engine/seeds.py", 'hashlib.blake2b(repr(what).encode(), digest_size=8).digest()',
        '(sum(w for w in what if isinstance(w, int)) % 2**63).to_bytes(8, "little")', LAWS),
    Bug("micro-batches summed", WALKER, "(losses[0].numel() * count)", "losses[0].numel()", CHAIN),
    Bug("gradient of the last micro-batch only", WALKER, "        for j, batch in enumerate(batches):\n",
        "        for j, batch in enumerate(batches):\n            self.gradient.zero_()\n", CHAIN),
    Bug("last incomplete batch kept", "engine/batches.py", "self.rows.num_rows // self.batch_size",
        "-(-self.rows.num_rows // self.batch_size)", CHAIN),
    Bug("epochs not reshuffled", "engine/batches.py", '"batches", epoch, stream', '"batches", 0, stream', CHAIN),
    Bug("init noise moves the anchor", WALKER, "self.weights[:, block.where], block.anchor, self",
        "self.weights[:, block.where], self.weights[0, block.where].clone(), self", LAWS),
    Bug("no bounding box", WALKER, "if box is not None:", "if False:", LAWS),
    Bug("unpaired baseline", "slt/llc.py", '.load() if "baseline_loss" in ds else', ".load() if False else", LLC),
    Bug("diverged chains averaged in", "store/samples.py", "if status[chain] != COMPLETE]", "if False]", LLC),
    Bug("errors of shared batches ignored", "analysis/uncertainty.py", "return float(np.fmax(each, of_mean))", "return float(each)", LLC),
    Bug("autocorrelation ignored", "analysis/uncertainty.py", "return float(np.fmax(each, of_mean))", "return float(trace.std() / trace.size**0.5)", LLC),
    Bug("stale store returned", "store/runs.py", "lines = differences(stored, fingerprint)", "lines: list[str] = []", "tests/test_store.py"),
    Bug("rows overwritten at the tail", "store/writer.py", "start, held = self._written[name], ", "start, held = 0, ", "tests/test_store.py"),
    Bug("curvature at the checkpoint alone", "engine/step_size.py", "precision = max(at_checkpoint.precision, largest)", "precision = at_checkpoint.precision",
        "tests/test_curvature.py"),
    Bug("covariance over N, not N - 1", "analysis/moments.py", "(observations - groups) ** 0.5", "observations**0.5", BIF),
    Bug("traces not centred", "analysis/moments.py", "    for _ in range(2):\n", "    for _ in range(0):\n", BIF),
    Bug("sequences and tokens of a pair exchanged", "slt/bif_results.py", ".swapaxes(2, 3)\n            yield", ".swapaxes(2, 4)\n            yield", BIF),
    Bug("observables in the order of sampling", "store/traces.py", "return sorted(known)", "return list(known)", BIF),
    Bug("tokens told one position early", "slt/bif_results.py", "ids[n // length, n % length + first]", "ids[n // length, n % length]", BIF),
    Bug("two-chain without the whole model", "analysis/susceptibility.py", "self.g / self.count * (full.d", "0 * self.g / self.count * (full.d", SUS),
    Bug("susceptibility with the other sign", "analysis/susceptibility.py", "(self.gd - self.g * self.d / self.count)", "(self.g * self.d / self.count - self.gd)", SUS),
    Bug("baseline of the sampling stream", "slt/suites.py", 'f"init_loss_{suite.task}" if known', '"init_loss" if known', SUS),
    Bug("norms that couple the heads", "engine/discovery/probe.py", "return value.detach() if isinstance(value, Tensor) else value", "return value", DEAD),
    Bug("slope of a soft cap forgotten", "engine/vocabulary.py", "by_logits *= slope", "pass", FAST),
    Bug("scale of logits forgotten in the gradient", "engine/vocabulary.py", "by_logits *= scale", "pass", FAST),
    Bug("losses without logits unproven", "engine/proof.py", "good = worst <= self.loss_tolerance and", "good = True or", FAST),
    Bug("outputs of the last batch replayed", "engine/prefix.py", "if key not in self._batches:", "if not self._batches:", FAST),
    Bug("shared modules replayed", "engine/prefix.py", "for module in finished if calls[module] == 1)", "for module in finished)", FAST),
    Bug("waits at every step", LOOP, "PATIENCE_ELSEWHERE = 64", "PATIENCE_ELSEWHERE = 1", FAST),
    Bug("divergence dated at the look", LOOP, "yield Diverged(chain, first)", "yield Diverged(chain, t)", FAST),
    Bug("chains of a vmap share their noise", WALKER, "row.normal_(generator=rng)", "row.normal_(generator=rngs[0])", PLACE),
    Bug("a diverged chain ends its group", LOOP, "if not watch.alive:", "if len(watch.alive) < len(chains):", PLACE),
    Bug("pieces stay on the first device", "engine/selection.py", "leaf.to(self.parameter.device, self", "leaf.to(self", SPREAD),
    Bug("anchors stay on their device", "engine/selection.py", ".to(self.device)\n", "\n", SPREAD),
    Bug("models made side by side", "engine/origin.py", "        with _LOADING:\n            model = self.make()", "        model = self.make()", ORIGIN),
    Bug("no baseline where chains are done", "slt/running.py", "if runs[i].needs_baseline", "if walkers[i]", PLACE),
    Bug("a death takes all chains", "engine/dispatch.py", "yield from attempt(again)", "break", PLACE),
    Bug("stores opened unseen", "store/reader.py", "    check_store(folder, ours=ours)\n", "", STRANGERS),
    Bug("links followed", GUARD, "\n            if entry.is_symlink():", "\n            if False:", STRANGERS),
    Bug("pipes let in", GUARD, "\n                if not entry.is_file(follow_symlinks=False):", "\n                if False:", STRANGERS),
    Bug("format 2 beside format 3", GUARD, 'if entry.name in (".zgroup", ".zarray", ".zattrs", ".zmetadata"):', "if False:", STRANGERS),
    Bug("any codec", GUARD, "if names not in CODECS:", "if not names:", STRANGERS),
    Bug("any data type", GUARD, 'if declared.get("data_type") not in NUMBERS:', 'if "data_type" not in declared:', STRANGERS),
    Bug("depth not looked at", GUARD, "if _too_deep(declared):", "if False:", STRANGERS),
    Bug("recursion not caught", GUARD, "except (ValueError, RecursionError) as error:", "except ValueError as error:", STRANGERS),
    Bug("a store of any size", GUARD, "if totals.bytes_declared > allowed:", "if False:", STRANGERS),
    Bug("any number of chunks", GUARD, "if totals.chunks_declared > max(", "if 0 > max(", STRANGERS),
    Bug("chunks of any size", GUARD, "if chunk > MOST_CHUNK_BYTES:", "if False:", STRANGERS),
    Bug("coordinates of any size", GUARD, "and whole > MOST_COORDINATE_BYTES", "and False", STRANGERS),
    Bug("growth not looked at", GUARD, "decoded > MOST_CHUNK_GROWTH * size", "False", STRANGERS),
    Bug("decodes to more than declared", GUARD, "if decoded > array.chunk_bytes:", "if False:", STRANGERS),
    Bug("the first frame only", "store/frames.py", " or _end(file, start + width) + (4 if descriptor & 4 else 0) != size", "", STRANGERS),
    Bug("frames of unknown size", GUARD, "if decoded is None:\n", "if decoded is None:\n        return\n", STRANGERS),
    Bug("names of a store raw", GUARD, 'f" at {shown(inside)}"', 'f" at {inside}"', STRANGERS),
    Bug("only OSError is a StoreError", "store/reader.py", "except Exception as error:", "except OSError as error:", ATTRIBUTES),
    Bug("attributes scale losses", "store/reader.py", '"mask_and_scale": False', '"mask_and_scale": True', ATTRIBUTES),
    Bug("NaN is an n_beta", "store/metadata.py", "and abs(value) < 1e300", "", ATTRIBUTES),
    Bug("True is a number", "store/metadata.py", "and not isinstance(value, bool) ", "", ATTRIBUTES),
    Bug("observables unchecked", "store/metadata.py", '    _check_observables(config.get("observables", []))\n', "", ATTRIBUTES),
    Bug("parts unchecked", "store/metadata.py", "        if name in metadata:\n", "        if False:\n", ATTRIBUTES),
    Bug("layout unchecked", "store/samples.py", "    _check_layout(samples)\n", "", ATTRIBUTES),
    Bug("a status without meaning", "store/samples.py", "sorted(set(status) - set(range(len(STATUS_MEANINGS))))", "[]", ATTRIBUTES),
    Bug("other sizes gone on with", "store/runs.py", "if size != sizes.get(str(dim))", "if False", ATTRIBUTES),
    Bug("escapes in settings", "cli/printing.py", "if c.isprintable() or c", "if True or c", NAMES),
    Bug("a path is a URL", "store/reader.py", "return LocalStore(folder, read_only=True)", "return os.fspath(path)", NAMES),
    Bug("URLs made as folders", "store/writer.py", ":(//|:)", ":(//////|::::)", NAMES),
    Bug("observables by their own name", "engine/observables.py", "    return mapped\n", "    return name\n", NAMES),
    Bug("restrictions with slashes", "slt/weight_restrictions.py", 'or "/" in name', "", NAMES),
    Bug("restrictions with escapes", "slt/weight_restrictions.py", "or not name.isprintable()", "", NAMES),
    Bug("temporary names by the run", "store/writer.py", 'Path(private) / "store"', 'path.parent / f".{path.name}.partial"', NAMES),
    Bug("folders for everybody", "store/writer.py", "        made.mkdir()\n", "        made.mkdir()\n        made.chmod(0o777)\n", NAMES),
    Bug("links to nothing filled", "store/writer.py", "is_other = path.is_symlink()  # to nothing", "is_other = False", NAMES),
    Bug("the path of the store in the store", "store/runs.py", '"device": device_type,',
        '"device": str(device.type), "from": __import__("os").getcwd(),', DOORS),
    Bug("checks as asserts", GUARD, 'if declared.get("data_type") not in', 'if __debug__ and declared.get("data_type") not in', DOORS),
    Bug("a checksum left out", "store/writer.py", "checksum=True", "checksum=False", "tests/test_bit_flips.py"),
    Bug("the path of a store forgotten", "slt/planning.py", "        if computed\n", "        if False\n", PLACE),
    Bug("architecture not compared", "store/identity.py", '"architecture of the model": source.architecture,', "", IDENTITY),
    Bug("ties not compared", "store/identity.py", '"tied weights": source.ties,', "", IDENTITY),
    Bug("device type not compared", "store/identity.py", '"device type": device_type,', "", IDENTITY),
    Bug("shape of a dataset forgotten", "engine/rows.py", 'digest.update(told.encode())', "pass", IDENTITY),
    Bug("captured values not read", CODE, "for name, held in _captured(function)}", "for name, held in ()}", FUNCTIONS),
    Bug("globals not followed", CODE, "for name in use.globals if name in home}", "for name in ()}", FUNCTIONS),
    Bug("functions known by the name they claim", CODE, 'str(home.get("__name__", ""))', "function.__module__", FUNCTIONS),
    Bug("rows of half a chunk lost", "store/writer.py", "                self.append(name, row)", "                pass", RESUME),
    Bug("rows over the border of a chunk", "store/writer.py", "min(chunk - at % chunk,", "min(chunk,", RESUME),
    Bug("noise from its beginning again", "engine/state.py", "rng.set_state(state.clone())", "state.clone()", RESUME),
    Bug("last noise of a step lost", "engine/state.py", "walker.kept[name].copy_(vector)", "pass", RESUME),
    Bug("statistics start again", "engine/state.py", "walker.buffers[name].copy_(buffer)", "pass", RESUME),
    Bug("the dead walk on", "engine/state.py", "watch.diverged = {int(chain): at for chain, at in", "_ = {int(chain): at for chain, at in", RESUME),
    Bug("steps of a preconditioner forgotten", "engine/state.py", 'if numbers["sampler"]:', "if False:", RESUME),
    Bug("damage not looked for", "store/runs.py", 'not RunFolder(path).damage(known.metadata["identity"]["num_chains"])', "True", RESUME),
    Bug("a damaged part kept", "store/runs.py", "if damaged or lost or", "if lost or", RESUME),
    Bug("another machine's lease ignored", "store/lock.py", "return time.time() - self.seen < STALE_SECONDS", "return False", RESUME),
    Bug("the dead keep their lease", "store/lock.py", "return self.boot == started(self.pid)", "return True", RESUME),
    Bug("ignored signals heard", "engine/stopping.py", " if signal.getsignal(number) is not signal.SIG_IGN]", "]", f"{RESUME}::test_signals_that_are_ignored_stay_ignored"),
    Bug("signals not heard", "engine/stopping.py", "stop.signal = number", "pass", RESUME),
    Bug("nothing committed at a signal", "store/commits.py", "if kind is GeneratorExit and self.part is not None:", "if False:", RESUME),
    Bug("commits that are not due", "store/commits.py", "time.monotonic() - self._last >= self.every:", "True:", RESUME),
    Bug("chunks not synced", "store/folder.py", "            sync_all(files, self.store)", "            pass", CRASHES),
    Bug("states not synced", "store/durable.py", "        if durable:\n            os.fsync(file.fileno())\n    return total", "    return total", CRASHES),
    Bug("completed before its data", "store/writer.py", "            sync_tree(self.path)\n            mark", "            mark", CRASHES),
    Bug("a record before its state", "store/folder.py", "            os.replace(partial, path)\n", "", CRASHES),
    Bug("half a record believed", "store/durable.py", "    return content if whole else None", "    return content", CRASHES),
    Bug("a folder of somebody else mended", "store/folder.py", "if is_new or not self.store.exists():", "if not self.store.exists():", NAMES),
    Bug("names that leave the store", "store/folder.py", 'and ".." not in name', "", RESUME),
    Bug("objects of others written over", "store/objects.py", 'mode: Any = "create" if seen is None else {"e_tag": seen}', 'mode: Any = "overwrite"', OBJECTS),
    Bug("what was found in the way counts as seen", "store/objects.py", "there = self.look(name)", "there = self.read(name)", OBJECTS),
    Bug("a fresh marker ignored", "store/marker.py", "if not dead and silent < STALE_SECONDS:", "if dead is False:", OBJECTS),
    Bug("completed before its data, far away", "store/mirror.py", "        for part in self.folder.parts().values():\n            self._copy_part(part, settled=True)\n        store =", "        self._put_root()\n        for part in self.folder.parts().values():\n            self._copy_part(part, settled=True)\n        store =", OBJECTS),
    Bug("removed states count as there", "store/mirror.py", "            self._there.pop(name, None)  # one", "            # one", OBJECTS),
    Bug("the longer run told before what it runs again", "store/mirror.py", "            for part in parts.values():\n                self._copy_part(part, settled=True)\n            if", "            if", OBJECTS),
    Bug("an older working folder used", "store/mirror.py", "if not self._is_newest:", "if not self.folder.path.exists():", OBJECTS),
    Bug("chunks of a stranger not looked at", "store/remote_reader.py", "if file is not None or not array.compressed:", "if False:", OBJECTS),
    Bug("order of sets", CODE, "*sorted(map(reader.of, value)))", "*map(reader.of, value))", IDENTITY),
    Bug("errors about no mean", "analysis/susceptibility.py", "_centred(_beside(g, d)) * _centred(d)", "_beside(g, d) * _centred(d)", ERRORS),
    Bug("error of the full run forgotten", "analysis/susceptibility.py", "g.mean(axis=(0, 1)) * full_error", "0 * full_error", ERRORS),
    Bug("errors of tokens averaged", "slt/suite_errors.py", "total += d.mean(axis=2) * (there", "total = 0 * total + d.mean(axis=2) * (there", SUS),
    Bug("every draw independent", "analysis/uncertainty.py", "np.sqrt(time / draws)", "np.sqrt(1 / draws)", ERRORS),
    Bug("lags of one trace only", "analysis/influence_errors.py", "(row_lags @ column_lags.T)", "(row_lags @ row_lags.T)[:, : len(column_lags)]", ERRORS),
    Bug("shared batches not counted", "analysis/influence_errors.py", "    if chains > 1:\n", "    if False:\n", ERRORS),
    Bug("Gaussian losses assumed", "analysis/influence_errors.py", "variance.clamp_min_(0)",
        "((1 - influences.square()).square() / rows.shape[1] if correlation else variance)", ERRORS),
    Bug("a control with its loss", "slt/control.py", "replace(inputs.settings, n_beta=0.0)", "inputs.settings", CONTROL),
    Bug("a control at its own step size", "slt/control.py", 'at_step_size(control, metadata_of(samples)["step_size"]["lr"])', "control", CONTROL),
    Bug("a control without a prior", "slt/control.py", "if settings.localization + settings.llc_weight_decay == 0:", "if False:", CONTROL),
    Bug("weights the other way", "slt/patterning.py", "1 + alpha * found.direction", "1 - alpha * found.direction", PATTERNS),
    Bug("rows that do not sum to zero", "slt/patterning.py", "chi = summing_to_zero(chi)", "pass", PATTERNS),
    Bug("noise taken for response", "slt/patterning.py", "predicted - noise", "predicted + 0 * noise", PATTERNS),
    Bug("origin of a configuration compared", CODE, "if name not in NOT_OF_CONFIGS", "if True", IDENTITY),
    Bug("noise of shared batches left in R-hat", "analysis/chains.py", "own: Trace = trace - trace.mean(axis=0, keepdims=True) + trace.mean()", "own: Trace = trace", DIAGNOSIS),
    Bug("a climb hidden by its own autocorrelation", "analysis/chains.py", "about, found = _about_line(trace), []", "about, found = trace, []", DIAGNOSIS),
    Bug("more effective draws than draws", "analysis/chains.py", 'min(ess(series, "mean"), series.size)', 'ess(series, "mean")', DIAGNOSIS),
    Bug("freedom of all draws for an error of their mean", "analysis/chains.py", "return max(found)", "return max(found)[0], found[0][1]", DIAGNOSIS),
    Bug("many looks taken for one", "analysis/verdicts.py", "change.is_sure(self.looks)", "change.is_sure()", DIAGNOSIS),
    Bug("few effective draws taken for many", "analysis/verdicts.py", "hidden = max(2 * Change.of(self.trace).error, Change.of(self.trace.mean(axis=0, keepdims=True)).smallest_sure())", "hidden = 2 * Change.of(self.trace).error", DIAGNOSIS),
    Bug("noise of batches taken for spikes' room", "analysis/chains.py", "(chain > limit)", "(chain > 3 * limit)", DIAGNOSIS),
    Bug("variance of batches left in", "analysis/llc.py", " - batch_variance", "", LLC),
    Bug("bias of the step size doubled", "analysis/step_size.py", "self.trace / 8", "self.trace / 4", LLC),
    Bug("errors of tokens halved", "slt/llc_parts.py", "+ standard_errors(traces.values)", "+ standard_errors(traces.values) / 2", LLC),
    Bug("trace without its size", "engine/curvature.py", "curvature.first_quotient * plan.selection.size", "curvature.first_quotient", "tests/test_curvature.py"),
    Bug("weights lie anywhere in a file", "engine/cargo.py", "ALIGNMENT = 64", "ALIGNMENT = 1", AWAY),
    Bug("tied weights untied on the way", "engine/cargo.py", "if at.start not in tied:", "if True:", AWAY),
    Bug("a worker's weights not compared", "engine/cargo.py", "if checkpoint.digest_as_found != self.digest:", "if False:", AWAY),
    Bug("noise of another kind of device", "engine/cargo.py", "if there.type != self.device_type:", "if False:", AWAY),
    Bug("two workers on one task", "engine/board.py", "if self._stop.exists() or read_place(self._file)[0] != self._token:", "if self._stop.exists():", AWAY),
    Bug("what was sent is left", "engine/dispatch.py", "with tempfile.TemporaryDirectory(prefix=\"devinterp-\", dir=parent, ignore_cleanup_errors=True) as folder:\n            yield Path(folder).absolute()", "yield Path(tempfile.mkdtemp(dir=parent))", AWAY),
    Bug("trace of a shifted Hessian", "engine/curvature.py", "    if plan.metric is not None:\n        return Spectrum(largest)\n",
        "    trace = curvature.first_quotient * plan.selection.size\n    if plan.metric is not None:\n        return Spectrum(largest)\n", "tests/test_curvature.py"),
    Bug("pilots that left the neighbourhood taken", "slt/pilots.py", "if excess > limit:", "if False:",
        f"{CALIBRATION}::test_chains_that_leave_the_neighbourhood_are_not_taken"),
    Bug("too little signal ends the search", "slt/calibration.py", "settled[-1].works or WEAK in settled[-1].fault", "settled[-1].works", f"{CALIBRATION}::test_too_little_signal_is_no_end_of_the_search"),
    Bug("far fewer draws than accuracy takes", "slt/calibration.py", "(SPARE * accuracy)", "(2 * accuracy)", f"{CALIBRATION}::test_more_is_aimed_at_than_accuracy_asks_for"),
    Bug("the run is part of its pilot", "slt/pilots.py", "look * SEEDS_APART", "(look - 1) * SEEDS_APART", CALIBRATION),
    Bug("half the burn-in", "slt/pilots.py", "(2 * math.log1p(", "(4 * math.log1p(",
        f"{CALIBRATION}::test_settling_steps_leave_what_they_say"),
    Bug("sick at the first look", "slt/pilots.py", 'if row["verdict"] in ("healthy", "diverged") or', "if True or",
        f"{CALIBRATION}::test_a_pilot_that_looks_sick_gets_another_look"),
    Bug("the weakest localization not tried", "slt/calibration.py", "if last.works or not last", "if True or not last",
        f"{CALIBRATION}::test_the_weakest_localization_that_settles_is_taken_and_gives_the_exact_value"),
    Bug("step sizes from short pilots", "slt/pilots.py", "length < burn_in and", "length < 0 and",
        f"{CALIBRATION}::test_step_sizes_see_curvature_that_grows_all_through_the_burn_in"),
    Bug("step sizes of a shorter burn-in", "slt/pilots.py", "(length == SHORT_PILOT or burn_in <= self.max_steps)", "length == SHORT_PILOT",
        f"{CALIBRATION}::test_pilots_are_as_long_as_the_burn_in_that_they_lead_to"),
    Bug("two chains where there are few directions", "engine/step_size.py", "math.ceil(PILOT_DIRECTIONS / plan.selection.size)", "0", "tests/test_curvature.py"),
    Bug("the curvature where a pilot ends alone", "engine/step_size.py", "max(seen, key=lambda found: found.precision)", "seen[-1]", "tests/test_curvature.py"),
    Bug("flat checkpoints like any other", "engine/step_size.py", "            looks = PILOT_LOOKS\n", "            pass\n", "tests/test_curvature.py"),
    Bug("long runs not tried", "slt/calibration.py", "        if long.works:\n", "        if True:\n", f"{CALIBRATION}::test_long_runs_are_tried_at_their_length"),
    Bug("disagreement taken for noise", "analysis/verdicts.py", ".is_sure(self.looks) and not alone:", ".is_sure(self.looks):", DIAGNOSIS),
    Bug("workers started where none may be", "engine/dispatch.py", "if multiprocessing.current_process().daemon:", "if False:", PLACE),
    Bug("the first token predicted from padding", OBJECTIVE, ", attended[:, : self.positions].bool()]", "]", MASKS),
    Bug("positions of tokens moved by padding", OBJECTIVE, "(attended.cumsum(1) - 1).clamp(min=0)", "torch.ones_like(attended).cumsum(1) - 1", MASKS),
    Bug("labels of the decoder masked by the input", OBJECTIVE, "and not self.of_decoder:", "and True:", MASKS),
    Bug("labels of masked tokens shifted", TRIALS, "found = Objective(rows.length, 0)", "pass", MASKS),
    Bug("models that look ahead taken", TRIALS, "batch.form == IDS and looks_ahead(checkpoint, batch)", "False", MASKS),
    Bug("the model's own loss not asked", TRIALS, "        _check_own_loss(checkpoint, found, tried)\n", "        pass\n", MASKS),
    Bug("padding not tried", TRIALS, "    _check_padding(checkpoint, found, rows)\n", "", MASKS),
    Bug("padding in the mean that is differentiated", WALKER, "if self.counted is None:\n            return losses.sum()", "if True:\n            return losses.sum()", MASKS),
    Bug("micro-batches weigh alike", WALKER, "self.counted.sum((-2, -1))).sum()", "(count * (losses != 0).sum())).sum()", MASKS),
    Bug("padding stored as 0", "engine/batch.py", 'losses.masked_fill(~counted, float("nan"))', "losses", MASKS),
    Bug("curvature with padding", "engine/curvature.py", "mean_loss(losses, batch.counted) * share", "losses.mean() * share", MASKS),
    Bug("targets of others in the head", "engine/vocabulary.py", "hidden[counted], targets[counted]", "hidden[counted], targets[counted].flip(0)", MASKS),
    Bug("short sequences weigh alike", "slt/llc.py", 'weight = count / count.mean("batch")', "weight = 1.0", MASKS),
    Bug("influences averaged over padding", "slt/bif_blocks.py", "count = (~left_out).view", "count = torch.ones_like(left_out).view", MASKS),
    Bug("columns not compared", "engine/rows.py", "for name, column in self.columns.items()})", 'for name, column in self.columns.items() if name == "input_ids"})', OTHER),
    Bug("fewer logits than tokens taken", "engine/checkpoint.py", "if logits.shape[1] != tokens:", "if False:", "tests/test_bad_models.py"),
    Bug("numbers that are not finite taken", "engine/rows.py", "            _check_finite(shown, block, start)\n", "            pass\n", OTHER),
    Bug("a revision is left out", "engine/origin.py", "self.source, revision=self.revision, trust_remote_code=False, output_loading_info=True", "self.source, trust_remote_code=False, output_loading_info=True", ORIGIN),
    Bug("made-up weights are taken", "engine/origin.py", "if random := sorted(", "if random := sorted([])[:0] and sorted(", ORIGIN),
    Bug("checkpoints sorted as text", "engine/origin.py", "key=lambda item: (item[0], item[1].name)", "key=lambda item: item[1].name", ORIGIN),
    Bug("a relative path stays relative", "engine/origin.py", "return Pretrained(str(path.absolute()))", "return Pretrained(str(path))", ORIGIN),
    Bug("a sweep's checkpoints mislabelled", "slt/sweep_results.py", "{dim: np.asarray(list(parts), dtype=object)}", "{dim: np.asarray(sorted(parts), dtype=object)}", SWEEP),
    Bug("what failed is taken as stored", "store/sweeps.py", "known = sweep.failed.get(checkpoint) or", "known = None and", SWEEP),
    Bug("other settings beside one another", "store/sweeps.py", "name not in FREE and made_with.get(name) != settings[name]", "False", SWEEP),
    Bug("other settings in a sweep's folder", "slt/sweep_study.py", "        if lines:\n            raise RunMismatchError(str(self.folder), lines)", "        if False:\n            raise RunMismatchError(str(self.folder), lines)", SWEEP),
    Bug("two checkpoints share a file", "store/sweeps.py", "if file in seen:", "if False:", SWEEP),
    Bug("a linked store in a sweep is followed", "store/sweeps.py", "if path.is_symlink():", "if False:", SWEEP),
    Bug("a stopped sweep takes the next", "slt/sweeps.py", "if stop.signal is None:\n        work()", "work()", SWEEP),
    Bug("bars of one standard error", "pictures/training.py", "[2 * error for error in errors]", "[1 * error for error in errors]", PICTURES),
    Bug("LLCs of two settings in one picture", "pictures/training.py", "if len(seen) > 1 or any(", "if any(", PICTURES),
    Bug("values one token to the left", "pictures/texts.py", "np.concatenate([[np.nan], np.asarray(values, dtype=np.float64)])",
        "np.concatenate([np.asarray(values, dtype=np.float64), [np.nan]])", PICTURES),
    Bug("a sequence with itself drawn", "pictures/influence.py", "np.where(np.equal.outer(rows, columns), np.nan, values)", "values", PICTURES),
    Bug("clusters of opposites", "pictures/influence.py", 'sign = -1 if "sign reversed"', 'sign = 1 if "sign reversed"', PICTURES),
    Bug("text of others as HTML", PAGE, "html.escape(shown, quote=True)", "shown", REPORT),
    Bug("data that ends its script", PAGE, '.replace("<", "\\\\u003c")', "", REPORT),
    Bug("a page that may load", PAGE, "default-src 'none'; script-src", "default-src *; script-src", REPORT),
    Bug("a report of two settings", "slt/report_runs.py", "if len(groups) > 1:", "if False:", REPORT),
    Bug("a file of others replaced", "slt/report.py", "path.exists() and not _is_report(path)", "False", REPORT),
    Bug("table draw by draw", FORMS, 'transpose("chain", "draw").values.ravel()', 'transpose("draw", "chain").values.ravel()', CONVERT),
    Bug("table without the checkpoint's losses", FORMS, '["sampling_loss", "baseline_loss", "init_loss"]', '["sampling_loss", "init_loss"]', CONVERT),
    Bug("steps of converted stores from 0", FORMS, '"step": 1,', '"step": 0,', CONVERT),
    Bug("converted store never complete", FORMS, "    writer.finish()", "    pass", CONVERT),
    Bug("unfinished run converted", FORMS, "    status_of_chains(ds)\n    if form", "    if form", CONVERT),
    Bug("notes among the JSON", "cli/options.py", 'from {self.data!r}", err=True)', 'from {self.data!r}")', "tests/test_cli.py"),
]  # fmt: skip


def check(bug: Bug, folder: Path) -> str:
    """What became of the bug: 'caught by ...', or what is wrong."""
    shutil.copytree(ROOT / "src" / "devinterp", folder / "devinterp")
    path = folder / "devinterp" / bug.file
    text = path.read_text()
    if text.count(bug.right) != 1:
        return f"NOT PLANTED: {bug.file} has {text.count(bug.right)} times {bug.right!r}"
    path.write_text(text.replace(bug.right, bug.wrong))
    command = [
        sys.executable,
        "-m",
        "pytest",
        bug.tests,
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-k",
        "not store_2_0",
    ]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    where = "import devinterp; print(devinterp.__file__)"
    used = subprocess.run([sys.executable, "-c", where], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    if not used.stdout.startswith(str(folder)):
        return f"NOT TESTED: {used.stdout.strip()} was used"
    code, told = tests_of(command, environment, folder / "told")
    if code == 0:
        return "NOT CAUGHT"
    if code is None:
        return f"caught: no end within {LONGEST_SECONDS} s"
    red = [line.split(" - ")[0] for line in told.split("\n") if line.startswith(("FAILED", "ERROR"))]
    return f"caught by {red[0].split('::')[-1]}" if red else f"NOT TESTED: {told[-300:]}"


def tests_of(command: list[str], environment: dict[str, str], told: Path) -> tuple[int | None, str]:
    """Exit code (None: did not end) and output, to a file: what a planted bug leaves running would hold a pipe open."""
    with told.open("w+") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, told.read_text(errors="replace")


def main() -> None:
    chosen = [bug for bug in BUGS if not sys.argv[1:] or bug.name in sys.argv[1:]]
    missed = 0
    for bug in chosen:
        with tempfile.TemporaryDirectory() as folder:
            result = check(bug, Path(folder))
        missed += not result.startswith("caught")
        print(f"{bug.name:<40} {result}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} planted bugs caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
