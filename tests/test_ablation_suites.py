"""The suites of ablations without their trainings: cells, files, tables, pages and what the switches build."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gresbox.structures import GresTarget

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def modules():
    """The programs, which are no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import ablate, aml_cost
        from benchmarks.suites import aml, aml_tuning, igvg, suite

        yield SimpleNamespace(ablate=ablate, aml_cost=aml_cost, aml=aml, tuning=aml_tuning, igvg=igvg, suite=suite)


@pytest.fixture(params=["instalign", "igvg", "aml", "aml_tuning"])
def chosen(request, modules):
    return modules.ablate.SUITES[request.param]


def cell_of(suite, name, seed, value=50.0):
    """A finished cell with invented numbers."""
    names = {
        *suite.metrics,
        "F1",
        "CoverAcc",
        "seconds",
        "no_target_share",
        *("occlusion", "gaussian_noise", "blur", "colour_shift"),
    }
    scores = dict.fromkeys((*names, "haze", "low_light", "block_dropout"), value + seed)
    curve = [{"step": step, "seconds": 2.0 * step, "gIoU": value + step} for step in (1, 2, 3)]
    shares = dict.fromkeys(("weak", "candidate", "masked", "target_hidden"), 0.1)
    about = {"variant": name, "seed": seed, "steps": 3, "batch": 4, "environment": {"threads": 1}}
    return {
        **about,
        "scores": {**scores, "samples": 10.0},
        "curve": curve,
        "shares": shares,
        "CoverAcc_of_first_points": [1.0] * 10,
        "start": {"steps": 9.0, "gIoU": 60.0},
    }


def write_cells(suite, folder):
    for name, seed in suite.cells:
        path = suite.cell_file(folder, name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell_of(suite, name, seed)))


def test_cells_are_every_variant_with_every_seed(chosen):
    assert len(set(chosen.cells)) == len(chosen.cells) == len(chosen.variants) * len(chosen.seeds)
    assert [name for name, seed in chosen.cells[: len(chosen.variants)]] == list(chosen.variants)
    assert all(variant.base in chosen.variants for variant in chosen.variants.values())


def test_the_published_cells_are_found(modules):
    found = modules.ablate.SUITES["instalign"].finished(modules.suite.RESULTS)
    assert {name: len(cells) for name, cells in found.items()} == dict.fromkeys(modules.ablate.SUITES["instalign"].variants, 3)
    page = modules.ablate.SUITES["instalign"].page(modules.ablate.SUITES["instalign"], found)
    assert page == (ROOT / "docs" / "ablation.md").read_text()


def test_numbers_name_cells(modules):
    suite = modules.ablate.SUITES["instalign"]
    assert suite.chosen("3/24") == suite.chosen("3") == [("none", 0)]
    assert suite.chosen("1,8-9") == [("default", 0), ("nt_sentence", 0), ("default", 1)]
    assert suite.chosen("1-24") == suite.cells


@pytest.mark.parametrize("text", ["0", "25", "5-3", "a", "1-", "", "1,", "2/45"])
def test_wrong_numbers_are_refused(modules, text):
    with pytest.raises(SystemExit, match=r"24 cells|in 1-24"):
        modules.ablate.SUITES["instalign"].chosen(text)


def test_a_difference_within_the_spread_is_no_difference(modules):
    assert modules.suite.compared([10.0, 14.0], [10.0, 12.0]) == "12.0 ± 2.8 (=)"
    assert modules.suite.compared([10.0, 10.5], [14.0, 15.0]) == "10.2 ± 0.4 (-4.2)"
    assert modules.suite.compared([10.0], [14.0, 15.0]) == "10.0 (one seed)"
    assert modules.suite.compared([10.0, 12.0], None) == "11.0 ± 1.4"


def test_pages_and_pictures_are_made_of_finished_cells(chosen, modules, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_cells(chosen, tmp_path / "results")
    modules.ablate.write_page(chosen, tmp_path / "results", tmp_path / "docs")
    page = (tmp_path / "docs" / f"{chosen.page_file}.md").read_text()
    for picture in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (tmp_path / "docs" / picture).stat().st_size > 1000
    for variant in chosen.variants.values():
        assert f"| {variant.title} | 51.0 ± 1.0" in page
    assert "nan" not in page
    assert chosen.metrics[0] in capsys.readouterr().out


def test_cells_of_two_budgets_make_no_table(modules):
    suite = modules.ablate.SUITES["igvg"]
    cells = [cell_of(suite, "default", 0), {**cell_of(suite, "default", 1), "steps": 9}]
    with pytest.raises(SystemExit, match="must have one budget"):
        modules.suite.budget_of({"default": cells})
    with pytest.raises(SystemExit, match="got no cell"):
        modules.suite.budget_of({})


def test_finished_cells_are_not_run_again(modules, tmp_path, capsys):
    suite = modules.ablate.SUITES["igvg"]
    write_cells(suite, tmp_path)
    modules.ablate.run_cells(suite, suite.cells, {}, tmp_path)
    assert capsys.readouterr().out.count("done before") == len(suite.cells)


@pytest.mark.parametrize(("given", "steps"), [({}, 250), ({"steps": 3}, 3)])
def test_a_variant_may_have_its_own_steps(modules, tmp_path, monkeypatch, capsys, given, steps):
    suite, budgets = modules.ablate.SUITES["aml"], []
    monkeypatch.setattr(
        modules.ablate, "run", lambda suite, name, seed, budget, folder: budgets.append(budget) or cell_of(suite, name, seed)
    )
    modules.ablate.run_cells(suite, [("igvg_tiny-aml", 0)], given, tmp_path)
    assert [(budget.steps, budget.batch) for budget in budgets] == [(steps, 16)]


def test_cells_of_igvg_start_from_a_trained_encoder(modules, tmp_path):
    with pytest.raises(SystemExit, match="--start must be the folder of a trained igvg_tiny"):
        modules.igvg.pretrained_encoder(tmp_path)
    model = modules.igvg.create(modules.igvg.VARIANTS["default"])
    model.save_pretrained(str(tmp_path))
    metrics = {"steps": 9.0, "batch": 4, "seed": 0, "gIoU": 60.0, "cIoU": 50.0}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    weights, about = modules.igvg.pretrained_encoder(tmp_path)
    assert about == {"model": "igvg_tiny", "steps": 9.0, "batch": 4, "seed": 0, "gIoU": 60.0}
    modules.igvg.create(modules.igvg.VARIANTS["none"]).encoder.load_state_dict(weights)


def test_every_switch_of_igvg_builds_another_model(modules):
    configs = {name: modules.igvg.create(variant).config for name, variant in modules.igvg.VARIANTS.items()}
    assert len({repr(config) for config in configs.values()}) == len(configs)
    assert configs["no_minimap"].loss_weights.minimap == 0 and configs["topk"].distance_weight == 0


def test_rows_of_the_papers_tables(modules):
    """Table 6: STS, DSPS, ITQ; Table 8: global, instance and negative supervision."""
    configs = {name: modules.igvg.create(variant).config for name, variant in modules.igvg.VARIANTS.items()}
    switches = {name: (c.text_selection, c.distance_weight > 0, c.inject_text) for name, c in configs.items()}
    rows = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    assert [switches[name] for name in ("none", "sts", "sts_dsps", "default")] == rows
    masks = {name: (c.loss_weights.merged > 0, c.loss_weights.instance > 0) for name, c in configs.items()}
    assert [masks[name] for name in ("global", "instance", "no_negative", "default")] == [
        (True, False),
        (False, True),
        (True, True),
        (True, True),
    ]
    assert [configs[name].loss_weights.unmatched > 0 for name in ("instance", "no_negative", "default")] == [False, False, True]


def test_shuffled_masking_hides_as_many_blocks_per_picture(modules):
    class Given(torch.nn.Module):
        block = 8

        def forward(self, images, visual, tokens, valid, *, targets=None, generator=None):
            removed = torch.zeros(images.shape[0], 64, 64, dtype=torch.bool)
            removed[0, :8, :24] = True
            removed[1, 8:16, :] = True
            return images, removed, torch.zeros(images.shape[0], 1, 1)

    images, target = torch.ones(3, 3, 64, 64), GresTarget(torch.ones(1, 64, 64, dtype=torch.bool))
    masking = modules.aml.ShuffledMasking(Given())
    draws = [masking(images, None, None, targets=[target] * 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for masked, removed, _ in draws:
        assert removed[:, ::8, ::8].sum((1, 2)).tolist() == [3, 8, 0]
        assert torch.equal(removed, removed[:, ::8, ::8].repeat_interleave(8, 1).repeat_interleave(8, 2))
        assert torch.equal(masked[:, 0] == 0, removed)
    assert torch.equal(draws[0][1], draws[1][1]) and not torch.equal(draws[0][1], draws[2][1])
    assert masking.shares["masked"] == pytest.approx(11 / 192)
    assert masking.shares["target_hidden"] == pytest.approx(11 / 192)


def test_curves_are_read_at_equal_time(modules):
    plain = {"curve": [{"seconds": 10.0, "gIoU": 1.0}, {"seconds": 20.0, "gIoU": 5.0}]}
    masked = {"curve": [{"seconds": 12.0, "gIoU": 2.0}, {"seconds": 24.0, "gIoU": 8.0}]}
    assert modules.aml.equal_time(plain, masked) == (20.0, 5.0, 6.0)
    assert modules.aml.at_time(masked["curve"], 5.0) == 2.0
    assert modules.aml.at_time(masked["curve"], 50.0) == 8.0


def test_the_page_of_some_models_names_those(modules):
    suite = modules.ablate.SUITES["aml"]
    found = {name: [{**cell_of(suite, name, seed), "start": None} for seed in (0, 1)] for name in suite.variants if "caris" in name}
    page = suite.page(suite, found)
    assert "3 steps for `caris_tiny`;" in page and "IGVG starts" not in page


def test_the_log_gives_curve_and_shares(modules):
    log = [
        {"kind": "train", "step": 5, "seconds": 1.0, "aml/masked": 0.25, "loss": 3.0},
        {"kind": "evaluation", "step": 5, "gIoU": 10.0},
        {"kind": "train", "step": 10, "seconds": 2.5, "aml/masked": 0.75, "loss": 2.0},
        {"kind": "evaluation", "step": 10, "gIoU": 20.0},
    ]
    assert modules.aml.curve_of(log)[1] == {"step": 10, "seconds": 2.5, "gIoU": 20.0}
    assert modules.aml.shares_of(log) == {"masked": 0.5}


def test_a_tenth_of_the_training_samples_is_held_out(modules):
    assert modules.tuning.split(9, 10, 1000) == (90, range(90, 100))
    assert modules.tuning.split(700, 16, 1000) == (11200, range(11200, 12200))


def test_the_page_has_the_measured_cost_of_a_masked_step(modules, tmp_path):
    page = ROOT / "docs" / "aml.md"
    copy = tmp_path / "aml.md"
    copy.write_text(page.read_text())
    report = json.loads(modules.aml_cost.RESULT.read_text())
    assert modules.aml_cost.write_page(report, copy) == copy.read_text() == page.read_text()
    report["time"]["processor"]["aml_seconds"] = 999.0
    assert "| AML | 999.00 |" in modules.aml_cost.write_page(report, copy)
