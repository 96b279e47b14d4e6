"""The study, its report and the `sedm` command."""
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sedm_kit import command, report
from sedm_kit.metrics import Difference, fd
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import sample_seeds
from sedm_kit.study import Arm, Plan, arms, mark_resolved, moment_control, run_arm, study
from sedm_kit.tuning import grid, lowest, parabola_minimum, world_stats
from sedm_kit.worlds import load_world

SMALL = dict(images=80, blocks=2, steps=6, micro_batch=40, diagnostics=0)


@pytest.fixture(scope="module")
def results():
    return study(Plan(**SMALL | {"diagnostics": 40}), progress=False)


def test_table_holds_every_sampler_of_every_solver(results):
    names = [(row["solver"], row["sampler"]) for row in results["table"]]
    assert names == [(solver, sampler) for solver in ("euler", "heun") for sampler in ("plain", "plain + moment map", "ES", "DG", "SEDM-G++")]
    assert {row["nfe"] for row in results["table"] if row["solver"] == "euler"} == {6}
    assert {row["nfe"] for row in results["table"] if row["solver"] == "heun"} == {11}
    for row in [*results["table"], results["floor"]]:
        assert row["fd_pixel"].n_blocks == row["fd_feature"].n_blocks == 2 and row["fd_pixel"].block_size == 80


def test_neutral_settings_change_nothing():
    results = study(Plan(**SMALL, solvers=("euler",), lam=1.0, w_dg=0.0), progress=False)
    for entry in results["differences"]:
        if "plain + moment map" not in (entry["first"], entry["second"]):
            assert entry["fd_pixel"].values == (0.0, 0.0) and report.verdict(entry, "fd_pixel") == "not resolved"


def test_numbers_are_those_of_the_seeds(results):
    world = load_world("digits")
    again = sample_seeds(world.denoiser, range(80), edm_sigmas(6), solver="heun", micro_batch=40)
    torch.testing.assert_close(results["previews"]["heun"]["plain"], again[:10], rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["midpoint", "rk3", "ab2", "dpmpp2m"])
def test_every_solver_can_be_studied(solver):
    found = study(Plan(**SMALL, solvers=(solver,), split_images=40), progress=False)
    assert [row["sampler"] for row in found["table"]] == ["plain", "plain + moment map", "ES"]  # no discriminator was trained on its samples
    assert set(found["curves"][solver]["plain"]) == set(range({"midpoint": 2, "rk3": 3}.get(solver, 1)))
    assert report.page(found, {}).count("<table") == 2


def test_given_values_replace_the_worlds(results):
    found = {arm.name: arm for arm in arms(load_world("digits"), "euler", Plan(steps=18, lam=1.5, w_dg=0.25))}
    assert (found["ES"].lam, found["ES"].w) == (1.5, 0.0) and (found["DG"].lam, found["DG"].w) == (1.0, 0.25)
    assert (found["SEDM-G++"].lam, found["SEDM-G++"].w) == (1.5, 0.25) and "given" in found["ES"].source
    assert "predicted" in next(row for row in results["table"] if row["sampler"] == "ES")["source"]  # 6 steps: the card speaks of 18


@pytest.mark.parametrize("world", ("digits", "patches"))
@pytest.mark.parametrize("solver", ("euler", "heun"))
def test_settings_were_chosen_on_other_seeds_than_those_reported(world, solver):
    card = load_world(world).card["tuned"][solver]
    plan = Plan()
    assert card["seeds"][0] > plan.seeds(plan.blocks - 1)[-1] and card["steps"] == plan.steps
    assert card["ES"]["w"] == 0 and card["DG"]["lambda"] == 1


def test_files_are_complete_and_strict(results, tmp_path):
    page = report.write_report(results, tmp_path / "new" / "folder")
    stored = json.loads((page.parent / "results.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert stored["plan"]["images"] == 80 and stored["environment"]["torch"] and len(stored["table"]) == 10
    text = page.read_text()
    pictures = [p.name for p in page.parent.glob("*.png")]
    second = (page.parent / "diagnostics.html").read_text()
    assert text.count("<figure") >= 8 and second.count("<figure") >= 10 and len(pictures) == text.count("<figure") + second.count("<figure")
    for one, other in ((text, "diagnostics.html"), (second, "report.html")):
        assert re.findall(r'(?:src|href)="((?!data:|#)[^"]*)"', one) == [other], "the pages must not need any other file than each other"
        assert all(re.search('alt="[^"]', tag) for tag in re.findall(r"<img[^>]*>", one)) and "url(" not in one and "@import" not in one


def test_the_diagnostics_page_says_what_was_measured(results, tmp_path):
    found = results["diagnostics"]
    assert found["sizes"]["seeds"] == [3_000_000, 3_000_039] and not found["failed"] and found["norms"]["euler"]["n"] == 160  # norms: the study's own runs
    for name, stages in results["curves"]["heun"].items():
        torch.testing.assert_close(found["norms"]["heun"]["arms"][name][1]["ratio"], stages[1]["norm"]["ratio"], rtol=0, atol=0)
    page = report.write_report(results, tmp_path)
    text, stored = (tmp_path / "diagnostics.html").read_text(), json.loads((tmp_path / "results.json").read_text())["diagnostics"]
    assert page.name == "report.html" and len(stored["findings"]) > 10 and stored["failed"] == {}
    assert all(html.escape(said["evidence"]) in text and html.escape(said["claim"]) in text for said in stored["findings"])


def test_a_failed_diagnostic_is_visible_and_loses_nothing(results, tmp_path, monkeypatch):
    def failing(*args, **settings):
        raise RuntimeError("no memory for this")
    monkeypatch.setattr("sedm_kit.checkup.delta_t", failing)
    found = study(Plan(**SMALL | {"diagnostics": 8, "solvers": ("euler",), "split_images": 10}), progress=False)
    assert "no memory for this" in found["diagnostics"]["failed"]["delta"] and len(found["table"]) == 5
    monkeypatch.setattr(report, "diagnostic_figures", failing)
    report.write_report(found, tmp_path)
    text, stored = (tmp_path / "diagnostics.html").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert text.count("no memory for this") == 2 and set(stored["diagnostics"]["failed"]) == {"delta", "figures"} and len(stored["table"]) == 5 and (tmp_path / "report.html").exists()


def test_a_study_without_diagnostics_has_one_page(results, tmp_path):
    report.write_report(results, tmp_path)
    report.write_report({key: value for key, value in results.items() if key != "diagnostics"}, tmp_path)
    assert not list(tmp_path.glob("diagnostics*")) and "diagnostics.html" not in (tmp_path / "report.html").read_text()
    assert Plan(diagnostics=0).diagnostics == 0
    for wrong in (-1, 7, 2.5):
        with pytest.raises(ValueError, match="diagnostics must be"):
            Plan(diagnostics=wrong)


def test_report_follows_the_numbers(results):
    rows = {row["sampler"]: row for row in results["table"] if row["solver"] == "euler"}
    text = " ".join(report.in_short(results, "euler"))
    assert report.number(rows["plain"]["fd_pixel"]) in text
    better, worse = ([{**e, "fd_pixel": Difference([sign * 1.0, sign * 1.01], 80), "resolved": {**e["resolved"], "fd_pixel": True}} for e in results["differences"]] for sign in (-1, 1))
    said = [report.in_short(dict(results, differences=some), "euler")[1] for some in (better, worse)]
    assert "ES lower by 1.00" in said[0] and "ES higher by 1.00" in said[1]


def test_holms_rule_against_a_textbook_example():
    "p = .01, .04, .03 and .005: by Holm at 5 % only .005 and .01 are found, though all four are below .05."
    from scipy import stats
    def with_p(p):
        t = stats.t.isf(p / 2, 1)  # two blocks: one degree of freedom
        return Difference([t + 1.0, t - 1.0], 10)  # mean t, standard error 1
    entries = [{"fd_pixel": with_p(0.01), "fd_feature": with_p(0.04), "shape": with_p(0.03)},
               {"fd_pixel": with_p(0.005), "fd_feature": Difference([0.0, 0.0], 10), "shape": Difference([0.0, 0.0], 10)}]
    mark_resolved(entries, alpha=0.075)  # six tests here: .075 / 6 = .0125 stands for the example's .05 / 4
    assert entries[0]["resolved"] == {"fd_pixel": True, "fd_feature": False, "shape": False}
    assert entries[1]["resolved"] == {"fd_pixel": True, "fd_feature": False, "shape": False}


@pytest.mark.parametrize("first, message", [(2_000_000, "were chosen on seeds 2000000"), (999_000, "trained on samples of seeds 1000000"), (2_999_900, "diagnostics sample seeds 3000000")])
def test_seeds_that_were_used_before_are_refused(first, message):
    with pytest.raises(ValueError, match=message):
        study(Plan(first_seed=first, images=1000, blocks=5), progress=False)


def test_the_drift_split_has_error_bars(results):
    for row in results["split"]:
        assert row["total"].n_blocks == 5 and abs(row["total"].mean - row["discretisation"].mean - row["network"].mean) < 1e-12
        assert row["network"].ci > 0 and f"{row['total'].mean:+.3f} ± {row['total'].ci:.3f}" in " ".join(report.in_short(results, row["solver"]))


def test_figures_of_an_earlier_study_go_away(results, tmp_path):
    report.write_report(results, tmp_path)
    (tmp_path / "mine.png").write_bytes(b"not ours")
    assert list(tmp_path.glob("diagnostics-norms-heun.png"))
    only = {**{key: value for key, value in results.items() if key != "diagnostics"}, "plan": {**results["plan"], "solvers": ("euler",)}, **{key: [row for row in results[key] if row["solver"] == "euler"] for key in ("table", "differences", "split")}}
    report.write_report(only, tmp_path)
    assert not list(tmp_path.glob("*heun*")) and (tmp_path / "mine.png").exists()


def test_a_failing_write_leaves_nothing_half_written(results, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(source, target)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space"):
        report.write_report({key: value for key, value in results.items() if key != "diagnostics"}, tmp_path)
    assert all(p.stat().st_size for p in tmp_path.iterdir()) and not list(tmp_path.glob(".*")) and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("words, message", [
    (["study", "--world", "mnist"], "--world: unknown 'mnist'; known: digits, patches"),
    (["study", "--solver", "euler,rk9"], "--solver: unknown 'rk9'; known: euler, heun, "),
    (["study", "--steps", "0"], "--steps: expected a whole number, 1 or above, got '0'"),
    (["study", "--steps", "2.5"], "--steps: expected a whole number, 1 or above, got '2.5'"),
    (["study", "--solver", "euler,euler"], "different names"),
    (["study", "--device", "tpu"], "'cpu' or 'cuda', got 'tpu'"),
    (["study", "--lambda", "0"], "--lambda: expected a number above 0; 1 is neutral, got '0'"),
    (["study", "--lambda", "nan"], "above 0; 1 is neutral, got 'nan'"),
    (["study", "--lambda", "-1"], "above 0; 1 is neutral, got '-1'"),
    (["study", "--w-dg", "inf"], "--w-dg: expected a number, 0 (no guidance) or above, got 'inf'"),
    (["study", "--w-dg", "-2"], "or above, got '-2'"),
    (["study", "--images", "1"], "--images: expected a whole number, 2 or above, got '1'"),
    (["study", "--images", "0"], "2 or above, got '0'"),
    (["study", "--blocks", "1"], "--blocks: expected a whole number, 2 or above"),
    (["study", "--threads", "0"], "--threads: expected a whole number, 1 or above, got '0'"),
    (["study", "--micro-batch", "x"], "--micro-batch: expected a whole number, 1 or above, got 'x'"),
    (["study", "--diagnostics", "3"], "diagnostics must be 0 (none) or at least 8 images, got 3"),
    (["study", "--seed", "-1"], "--seed: expected a whole number, 0 or above, got '-1'"),
    (["study", "--out"], "--out: expected one argument"),
    (["study", "--mysterious", "1"], "unrecognized arguments: --mysterious 1   ('sedm study --help' tells more)"),
    (["tune", "--seeds", "-4"], "--seeds: expected a whole number, 80 or above, got '-4'"),
    (["tune", "--threads", "0"], "--threads: expected a whole number, 1 or above"),
    (["tune", "--tolerance", "nan"], "--tolerance: expected a share of the distance, 0 or above and below 1, got 'nan'"),
    (["tune", "--tolerance", "-0.1"], "below 1, got '-0.1'"),
    (["tune", "--by", "pixels"], "--by: unknown 'pixels'; known: pixel, feature"),
    (["tune", "--solver", "euler,heun"], "unknown solver 'euler,heun'"),
    (["studdy"], "unknown command 'studdy'"),
])
def test_mistakes_give_one_line(words, message, capsys, tmp_path):
    assert command.main([words[0], *(["--out", str(tmp_path / "out")] if words[0] != "studdy" else []), *words[1:]]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing")
def test_missing_cuda_is_said(capsys):
    assert command.main(["study", "--device", "cuda"]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_an_unwritable_folder_is_said_before_work_starts(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(command, "run_study", lambda plan: pytest.fail("work had started"))
    assert command.main(["study", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write to the output folder" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["study", "--help"])
    text = capsys.readouterr().out
    for option in ("--world", "--solver", "--steps", "--images", "--lambda", "--w-dg", "--device", "--out", "--blocks", "--seed", "--diagnostics"):
        assert re.search(rf"{option} .*", text), option
    assert "_" not in re.sub(r"sedm_study", "", text)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_lists_choices_and_says_every_default_once(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: )" not in text and "()" not in text and "False" not in text and "SUPPRESS" not in text and "--pdb" not in text
    for option, action in command.parser_of(command.COMMANDS[name])._option_string_actions.items():
        if choices := command.choices_of(command.COMMANDS[name], action.dest):
            assert f"(choices: {', '.join(choices)}" in text, option
            assert action.default is None or all(part in command.CHOICES[action.dest] for part in action.default.split(",")), option
        assert action.default in (None, False, "==SUPPRESS==") or f"default: {action.default}" in action.help, option


def test_defaults_pass_their_own_checks():
    for function in command.COMMANDS.values():
        for action in command.parser_of(function)._actions:
            if action.type is not None and action.default is not None and action.option_strings:
                assert action.type(str(action.default)) == action.default


def test_warnings_are_lines_of_the_command_each_once(tmp_path, capsys, monkeypatch):
    def noisy(plan):
        for text in ("careful", "careful", "twice"):
            warnings.warn(text)
        raise ValueError("stopped")
    monkeypatch.setattr(command, "run_study", noisy)
    assert command.main(["study", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "sedm study: warning: careful\nsedm study: warning: twice\nsedm study: stopped\n"


@pytest.mark.parametrize("field, least", [("threads", 1), ("micro_batch", 1), ("split_images", 4)])
def test_a_plan_names_the_field_that_is_wrong(field, least):
    with pytest.raises(ValueError, match=f"^{field} must be at least {least}, got {least - 1}$"):
        Plan(**{field: least - 1})


def test_the_control_suits_the_number_of_images(results):
    sources = {row["sampler"]: row["source"] for row in results["table"]}
    assert "principal mode" in sources["plain + moment map"]  # 80 images are too few for 64 x 64 covariances
    world = load_world("digits")
    plain = run_arm(world, "euler", Arm("plain"), Plan(images=1400, blocks=2, steps=3), keep=True)
    moved = moment_control(world, plain)
    assert "full covariance" in moved.arm.source
    real = world_stats(world, world.train)["pixel"]
    assert all(fd(after["pixel"], real) < 0.2 * fd(before["pixel"], real) for before, after in zip(plain.stats, moved.stats))


def run_command(*words, cwd, **settings):
    return subprocess.Popen([sys.executable, "-c", "import sys; from sedm_kit.command import main; sys.exit(main())", *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def test_the_command_works_from_another_folder(tmp_path):
    process = run_command("study", "--images", "40", "--blocks", "2", "--steps", "4", "--solver", "euler", "--out", "here", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "SEDM-G++" in out and (tmp_path / "here" / "report.html").is_file()


def test_an_interrupted_study_leaves_no_files(tmp_path):
    process = run_command("study", "--images", "2000", "--out", "here", cwd=tmp_path)
    seen = ""
    while "img" not in seen and process.poll() is None:  # the bar shows that work has begun
        seen += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_the_grids_lowest_point():
    lambdas, weights = np.array([0.98, 1.0, 1.02, 1.04]), np.array([0.0, 1.0])
    surface = {"pixel": (lambdas[:, None] - 1.013 + 0.01 * weights) ** 2 + 0.1 * weights, "lambdas": lambdas, "weights": weights}
    found = lowest(surface)
    assert found["w"] == 0.0 and abs(found["lambda"] - 1.013) < 1e-9
    assert abs(lowest(surface, weights=[1.0])["lambda"] - 1.003) < 1e-9
    assert parabola_minimum([0, 1, 2], [3, 2, 1]) == 2
    with pytest.raises(ValueError, match="at least 3"):
        parabola_minimum([0, 1], [1, 2])


def test_the_grid_measures_what_sampling_by_hand_does():
    world = load_world("digits")
    surface = grid(world, range(80), edm_sigmas(4), lambdas=[1.0, 1.05], weights=[0.0], micro_batch=40, progress=False)
    images = sample_seeds(world.denoiser, range(80), edm_sigmas(4), solver="euler", scaling=1.05, micro_batch=40).flatten(1)
    train = world.train.flatten(1).double()
    a, b = np.cov(images.T), np.cov(train.T)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()  # trace of the root of a product, the textbook way
    by_hand = ((images.mean(0) - train.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * cross
    assert abs(surface["pixel"][1, 0] - by_hand) < 1e-5 * by_hand
    assert surface["n"] == 80
