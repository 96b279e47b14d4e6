"The page of a search: its sentences, and its table on a narrow screen."
import re
from types import SimpleNamespace

import pytest

from sedm_kit.metrics import Difference, Estimate
from sedm_kit.tuning_report import NARROW, tuned_page, tuned_sentences


@pytest.fixture
def found():
    difference = Difference([-0.2, -0.3], 60, unpaired_error=0.1)
    check = {"n": 120, "seeds": [120, 239]} | {space: {"best": 1.0, "plain": 1.2, "difference": difference} for space in ("pixel", "feature")}
    settings = {"by": "pixel", "groups": 10, "world": "digits", "solver": "euler", "sigmas": [80.0, 1.0, 0.0], "seeds": [0, 239, 240], "box": {"lambda": (0.98, 1.05)}, "fixed": {"w": 0.5}}
    return SimpleNamespace(best={"lambda": 1.0125}, error={"lambda": 0.004}, ci={"lambda": 0.009}, loss=Estimate([0.1, 0.3], 60), regret=0.01, ended="seeds", edges=[], cautions=[], resolved=False,
                           check=check, cost={"images": 9, "denoiser_evaluations": 162, "seconds": 1.0, "sampled_now": 9}, settings=settings, as_dict=lambda: {"regret": 0.01})


def test_what_a_better_choice_could_gain_is_explained(found):
    said = next(line for line in tuned_sentences(found) if "better choice could" in line)
    assert "about 0.01, 5.0 % of the predicted distance of 0.20 ± 0.10" in said
    assert "on average over all places that the error bars leave open" in said and "true optimum than at the one found" in said


def test_every_number_of_the_table_carries_its_name_where_columns_do_not_fit(found):
    document = tuned_page(found, {})
    assert NARROW in document and "@media (max-width:40rem)" in NARROW
    body = re.search(r'<table class="stack">.*?<tbody>(.*?)</tbody>', document).group(1)
    searched, fixed = [re.findall(r'<td data-name="([^"]*)">([^<]*)</td>', row) for row in body.split("</tr>")[:-1]]
    assert dict(searched) == {"parameter": "λ, divisor of ε", "best": "1.0125", "standard error": "0.004", "95 % interval": "1.0035 to 1.0215", "searched": "0.98 to 1.05"}
    assert dict(fixed)["best"] == "0.5" and dict(fixed)["searched"] == "fixed" and dict(fixed)["standard error"] == ""
    assert re.findall(r"<th>([^<]*)</th>", document) == [name for name, _ in searched]
