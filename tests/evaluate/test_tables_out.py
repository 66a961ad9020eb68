"""The report for a spreadsheet, LaTeX and JSON."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest

from fap.evaluate.groups import groups_of
from fap.evaluate.tables_out import csv_file, groups_json, reports_json, tex, tex_file
from tests.evaluate.reports import report_of, result
from tests.evaluate.test_groups import BASE, seeds

ODD = "a_b & 50% $x$ #1 {\\~^} <|> é \n"


def test_the_csv_has_every_metric_of_every_set() -> None:
    results = {
        "clean": {**result(0.1), "ece": 0.25},
        "imagenet_c/fog/3": result(),
        "attack/pgd10/0.5": result(count=7),
        "folder/a,b": result(),
    }
    first, plain = report_of(results, seed=4), report_of(results, name=ODD, trained=False)
    rows = list(csv.DictReader(io.StringIO(csv_file(groups_of([first, plain])).decode())))
    assert len(rows) == 2 * 4 * 4
    of_clean = rows[0] | {}
    assert of_clean == {
        **{"group": "1", "checkpoint": "tiny.safetensors", "name": "tiny", "seed": "4"},
        **{"step": "5", "weights": "raw", "bn": "main", "set": "clean", "corruption": ""},
        **{"severity": "", "attack": "", "eps_255": "", "metric": "loss", "value": "1.0"},
        "count": "50",
    }
    where = [(r["set"], r["corruption"], r["severity"], r["attack"], r["eps_255"]) for r in rows]
    assert ("imagenet_c", "fog", "3", "", "") in where
    assert ("attack", "", "", "pgd10", "0.5") in where
    assert ("folder/a,b", "", "", "", "") in where
    assert float(next(r["value"] for r in rows if r["metric"] == "top1")) == 0.1
    assert next(r["value"] for r in rows if r["metric"] == "ece") == "0.25"
    last = rows[-1]
    assert (last["group"], last["name"], last["seed"], last["step"]) == ("2", ODD, "", "")


def test_latex_breaks_long_heads_at_their_commas() -> None:
    groups = groups_of([*seeds("a", BASE, method="vanilla"), *seeds("b", BASE)])
    text = tex_file(groups).decode()
    seeds_of_b = r"\shortstack[r]{b,\\3 seeds (0, 1, 2),\\step 5"
    assert seeds_of_b + "}" in text
    assert seeds_of_b + r",\\difference} \\" in text


def test_latex_is_escaped_and_every_line_has_as_many_cells() -> None:
    reports = [
        *seeds("base", BASE, method="vanilla"),
        *[replace(one, name=ODD) for one in seeds("x", {0: 0.6, 1: 0.62, 2: 0.63})],
    ]
    text = tex_file(groups_of(reports)).decode()
    assert text.isascii()
    tables = re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) == 2
    for columns, body in tables:
        lines = [line for line in body.splitlines() if not line.startswith("\\")]
        assert lines
        for line in lines:
            assert line.endswith(r" \\")
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
            # Nothing that LaTeX would act on but what was meant.
            assert not re.search(r"(?<!\\)[#%_]", line)
            n_open, n_closed = (len(re.findall(rf"(?<!\\)\{b}", line)) for b in "{}")
            assert n_open == n_closed
        assert [*re.findall(r"\\\w*rule", body)] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert r"top-1 accuracy & 52.00 $\pm$ 2.00 & 61.67 $\pm$ 1.53 & +9.67" in text
    assert "fog" not in tables[0][1]
    assert "fog" in tables[1][1]


@pytest.mark.parametrize(("text", "expected"), [
    ("a_b", r"a\_b"),
    ("50% & {x}", r"50\% \& \{x\}"),
    ("\\$#", r"\textbackslash{}\$\#"),
    ("é", r"\textbackslash{}xe9"),
    ("a\nb", "a b"),
    ("1 ± 2", r"1 $\pm$ 2"),
])  # fmt: skip
def test_what_latex_would_act_on(text: str, expected: str) -> None:
    assert tex(text) == expected


def test_the_json_of_groups() -> None:
    reports = [*seeds("base", BASE, method="vanilla"), *seeds("ours", {0: 0.61, 1: 0.62, 2: 0.63})]
    base, ours = json.loads(groups_json(groups_of(reports)))
    assert (base["group"], ours["group"], ours["seeds"]) == (1, 2, [0, 1, 2])
    assert "minus_first_group" not in base
    top1 = ours["rows"]["top-1 accuracy"]
    assert (top1["mean"], top1["std"]) == (pytest.approx(62), pytest.approx(1))
    assert top1["seeds"] == {"0": 61, "1": 62, "2": 63}
    gap = ours["minus_first_group"]["top-1 accuracy"]
    assert gap["mean"] == pytest.approx(10)
    assert gap["d_z"] == pytest.approx(10)
    assert gap["n"] == 3 and gap["paired"]
    loss = ours["minus_first_group"]["loss"]
    assert loss["low"] is None
    assert loss["why_no_interval"] == "every seed has the same difference"


def test_json_has_no_nan_and_the_order_of_the_checkpoints() -> None:
    undefined = report_of({"clean": {**result(), "ece": float("nan")}})
    (group,) = json.loads(groups_json(groups_of([undefined])), parse_constant=pytest.fail)
    assert group["rows"]["calibration error (ECE)"]["mean"] is None
    a, b = seeds("a", {0: 0.5, 1: 0.5}), seeds("b", {0: 0.5}, optim__lr=0.3)
    mixed = [a[0], *b, a[1]]
    trees = json.loads(reports_json(groups_of(mixed), mixed))
    assert [(tree["name"], tree["group"]) for tree in trees] == [("a", 1), ("b", 2), ("a", 1)]


def test_json_has_no_nan() -> None:
    reports = [report_of({"clean": {**result(), "loss": float("nan")}})]
    (tree,) = json.loads(reports_json(groups_of(reports), reports), parse_constant=refuse)
    assert tree["results"]["clean"]["loss"] is tree["summary"]["loss"] is None


def refuse(word: str) -> None:
    raise ValueError(word)
