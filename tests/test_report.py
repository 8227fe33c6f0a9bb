import base64
import hashlib
import json
import math
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.artifact import Artifact
from align.errors import AlignError
from align.progress import duration
from align.report import compare, draw, pages, tables, write_report
from align.report.answers import payload
from align.report.curves import Journey, Panel, Series, journeys, panels
from align.report.road import Stop, diagram, stops
from align.runner.locks import lock
from align.stages import PPO

EVIL = "<script>alert(1)</script>"
HELD_OUT = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 8}


def measured(mean, **more):
    """What `evaluate` writes of a policy."""
    return {
        "gold_reward": {"mean": mean, "ci95": [mean - 0.03, mean + 0.04], "n": 400},
        "greedy_reward": {"mean": mean + 0.1, "ci95": [mean + 0.07, mean + 0.14], "n": 400},
        "parts": {"gold": mean, "content": 0.25, "tone": 0.75},
        "perplexity": 6.5,
        "mean_completion_tokens": 22.4,
        "finished_share": 1.0,
        "kl_to_sft": 1.25,
        **more,
    }


@pytest.fixture
def make(tmp_path):
    """Build a finished stage: its folder, its history and its artifact."""

    def build(name, stage, metrics=None, history=(), samples=(), **more):
        identity = (name.encode().hex() + "0" * 64)[:64]
        folder = tmp_path / f"{name}-{identity[:8]}"
        folder.mkdir(exist_ok=True)
        for file, lines in (("metrics.jsonl", history), ("samples.jsonl", samples)):
            if lines:
                (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        fields = {"config": {"seed": 0}, "versions": {"align": "0.1.0"}, "created": "2026-11-22T15:00:00+00:00", "seconds": 2.5}
        return Artifact(f"demo-{name}", stage, identity, str(folder), metrics=metrics or {}, version=1, **fields | more)

    return build


LOSSES = [{"step": 0, "eval_loss": 4.0}, *({"step": s, "loss": 4.0 / s} for s in range(1, 20)), {"step": 19, "eval_loss": 1.0}]
ROLLOUTS = [
    {"step": s, "objective/scores": s / 10, "objective/kl": s / 5, "completions/mean_length": 30.0 - s, "loss/policy_avg": 0.0}
    for s in range(1, 9)
]
ANSWERS = {
    "prompt": [{"role": "user", "content": "Which color?"}],
    "columns": {"key": "blue"},
    "answers": {
        "sft": {"sampled": {"text": "Blue.", "reward": 0.25}, "greedy": {"text": "It is blue.", "reward": 0.75}},
        "ppo": {"sampled": {"text": ""}},
    },
}


@pytest.fixture
def road(make):
    """A small finished pipeline."""
    models = {
        "sft": measured(0.4, kl_to_sft=0.0),
        "ppo": measured(0.5, preference_accuracy=HELD_OUT),
        "judge": {"accuracy": 0.875, "accuracy_ci95": [0.85, 0.9], "n": 640},
    }
    return {
        "sft": make("sft", "sft", {"eval_loss": 1.0, "nested": {"no": 1}}, LOSSES, parents={"base": "some/base"}),
        "ppo": make("ppo", "ppo", {"eval_score": float("nan")}, ROLLOUTS, parents={"sft": "demo-sft@1"}),
        "evaluate": make("evaluate", "evaluate", {"models": models}, samples=[ANSWERS]),
    }


class Page(HTMLParser):
    """Tags with their attributes, and whether elements close in order."""

    VOID = ("meta", "br", "input", "link", "hr", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def written(out):
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def test_results_json(tmp_path, road, capsys):
    write_report(tmp_path, "demo", road)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seconds"] == 7.5
    assert results["models"] == road["evaluate"].metrics["models"]
    assert results["stages"]["sft"] == {
        "reference": "demo-sft@1",
        "path": road["sft"].path,
        "seconds": 2.5,
        "metrics": {"eval_loss": 1.0},
    }
    assert results["stages"]["ppo"]["metrics"] == {"eval_score": None}  # JSON has no NaN
    capsys.readouterr()
    write_report(tmp_path, "demo", road, as_json=True)
    assert json.loads(capsys.readouterr().out) == results


def test_stage_names_do_not_depend_on_the_keys(tmp_path, road):
    """`align report` hands over artifact names; the report is the same, and is not drawn again."""
    write_report(tmp_path, "demo", road)
    before = (tmp_path / "report.html").stat().st_mtime_ns
    write_report(tmp_path, "demo", {artifact.name: artifact for artifact in road.values()})
    assert (tmp_path / "report.html").stat().st_mtime_ns == before


def test_several_evaluations_are_merged(tmp_path, road, make):
    more = make("later", "evaluate", {"models": {"sft": {"perplexity": 3.0}, "dpo": measured(0.6)}})
    write_report(tmp_path, "demo", {**road, "later": more})
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    assert list(models) == ["sft", "ppo", "judge", "dpo"]
    assert (models["sft"]["perplexity"], models["sft"]["kl_to_sft"]) == (3.0, 0.0)


def test_printed_table(tmp_path, road, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    write_report(tmp_path, "demo", road)
    lines = capsys.readouterr().out.splitlines()
    header, sft, ppo, judge = lines[:4]
    titles = ["gold reward", "greedy reward", "perplexity", "tokens per answer", "KL to sft", "preference accuracy"]
    assert re.split(r"  +", header) == ["model", *titles, "reward-model accuracy", "content", "tone"]
    assert re.split(r"  +", ppo)[:3] == ["ppo", "0.500 [0.470, 0.540]", "0.600 [0.570, 0.640]"]
    assert sft.index("0.400") == ppo.index("0.500") == header.index("gold")
    assert "0.875 [0.850, 0.900]" in judge
    assert [line.rsplit("/")[-1] for line in lines[-3:]] == ["report.md", "report.html", "results.json"]


def test_printed_table_folds_in_a_narrow_terminal(road, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = tables.as_text(road["evaluate"].metrics["models"])
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("judge") > 1


def test_tables_have_only_the_columns_that_exist():
    table = tables.results_table(
        {"base": {"perplexity": 9.0}, "sft": {"perplexity": 3.0, "brief_reward": HELD_OUT, "kl_to_base": 0.5}}
    )
    assert table.header == ["brief reward", "perplexity", "KL to base"]
    assert [str(cell) for cell in table.rows[0][1]] == ["–", "9.00", "–"]
    assert [str(cell) for cell in table.rows[1][1]] == ["0.500 [0.400, 0.600]", "3.00", "0.50"]
    assert tables.parts_table({"base": {"perplexity": 9.0}}).header == []


def test_seeds_of_a_setting_are_one_row(tmp_path, make, capsys, monkeypatch):
    """Rewards 0.4, 0.5 and 0.9 have the mean 0.6 and the standard deviation sqrt((0.04 + 0.01 + 0.09) / 2) = 0.2646; of 0.25 and
    0.75 both ends are told. What one of the seeds has no number for has no mean.
    """
    monkeypatch.setenv("COLUMNS", "500")
    models = {"sft": measured(0.1), "dpo-beta-0.1-seed-0": measured(0.25), "dpo-beta-0.1-seed-1": measured(0.75, perplexity=8.5)}
    models |= {f"dpo-beta-0.05-seed-{seed}-after": measured(mean) for seed, mean in ((7, 0.4), (8, 0.5), (9, 0.9))}
    models["dpo-beta-0.05-seed-8-after"]["perplexity"] = float("nan")
    models["dpo-beta-0.3-seed-0"] = measured(0.5)  # the only seed
    write_report(tmp_path, "demo", {"evaluate": make("evaluate", "evaluate", {"models": models})})
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert {setting: len(found["models"]) for setting, found in settings.items()} == {"dpo-beta-0.1": 2, "dpo-beta-0.05-after": 3}
    assert settings["dpo-beta-0.1"]["models"] == ["dpo-beta-0.1-seed-0", "dpo-beta-0.1-seed-1"]
    assert settings["dpo-beta-0.1"]["metrics"]["gold_reward"] == {"mean": 0.5, "range": [0.25, 0.75]}
    assert settings["dpo-beta-0.1"]["metrics"]["perplexity"] == {"mean": 7.5, "range": [6.5, 8.5]}
    assert settings["dpo-beta-0.05-after"]["metrics"]["gold_reward"] == pytest.approx({"mean": 0.6, "sd": 0.264575}, rel=1e-6)
    assert "perplexity" not in settings["dpo-beta-0.05-after"]["metrics"]
    html, markdown = written(tmp_path)
    Page(html)
    assert "| dpo-beta-0.1 | 2 | 0.500 [0.250, 0.750] | 0.600 [0.350, 0.850] | 7.50 [6.50, 8.50] | 22.4 [22.4, 22.4] |" in markdown
    assert "| dpo-beta-0.05-after | 3 | 0.600 ± 0.265 | 0.700 ± 0.265 | – |" in markdown
    assert "Over seeds" in html
    assert "<td>0.600 <small>± 0.265</small></td>" in html
    assert re.search(
        r"^over seeds +seeds  gold reward .*\n.*\ndpo-beta-0.05-after +3  0.600 ± 0.265 ", capsys.readouterr().out, re.M
    )


def test_without_seeds_nothing_is_said_of_them(tmp_path, road):
    write_report(tmp_path, "demo", road)
    assert json.loads((tmp_path / "results.json").read_text())["settings"] == {}
    assert all("seeds" not in page for page in written(tmp_path))


def test_rewards_share_one_scale():
    """Sampled 0.5 [0.4, 0.6] and greedy 0.9 [0.8, 1.4] span 0.4 to 1.4, so the means lie at 10 % and 50 %."""
    greedy = {"mean": 0.9, "ci95": [0.8, 1.4], "n": 8}
    (_, (sampled, other)), *_ = tables.results_table({"sft": {"gold_reward": HELD_OUT, "greedy_reward": greedy}}).rows
    assert sampled.span == (0.0, 10.0, 20.0)
    assert other.span == (40.0, 50.0, 100.0)


def test_page(tmp_path, road):
    write_report(tmp_path, "demo", road)
    html, markdown = written(tmp_path)
    page = Page(html)
    assert page.count("h1") == 1
    assert page.count("figure") == 2 + 2 + 1  # curves of sft and ppo; rewards against KL and length; ppo's way
    assert page.count("svg") == 1 + (1 + 3) + 2 + 2  # the road; loss, score, KL and length; rewards; ppo's way
    assert page.count("table") == page.count("caption") == 4  # results, parts, the road, the judge
    for text in (
        "gold reward",
        "greedy reward",
        "[0.470, 0.540]",
        "demo-ppo@1",
        "some/base",
        "It is blue.",
        "Which color?",
        "seed: 0",
    ):
        assert text in html
        assert text in markdown
    assert "train: 4.000 → 0.211. held out: 4.000 → 1.000." in html
    assert "| sft | loss | train | 1–19 | 4.000 → 0.211 |" in markdown
    assert "| ppo | 0.500 [0.470, 0.540] | 0.600 [0.570, 0.640] | 6.50 | 22.4 | 1.25 | 0.500 [0.400, 0.600] | – |" in markdown
    assert "| sft | Blue. | 0.250 | It is blue. | 0.750 |" in markdown
    assert "| ppo | (nothing) | – | – | – |" in markdown


def test_the_links_at_the_top_come_in_the_order_of_the_page(tmp_path, road):
    write_report(tmp_path, "demo", road)
    html, _ = written(tmp_path)
    links = re.findall(r'<li><a href="#([a-z]+)">', html)
    assert {"curves", "price"} < set(links)
    assert links == re.findall(r'<h2 id="([a-z]+)"', html)


def test_page_is_self_contained(tmp_path, road):
    write_report(tmp_path, "demo", road)
    html, _ = written(tmp_path)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert all(value.startswith("#") for name, value in attributes.items() if name in ("href", "src", "xlink:href"))
    assert "://" not in html
    assert "@import" not in html
    assert html.count("<style") == 1
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert [a for t, a in page.tags if t == "script"] == [{"type": "application/json", "id": "data"}, {}]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'", "no other script can run"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert not set(draw.COLORS) & set(re.findall(r"#\w{6}", html))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', html)) <= set(ids)


def test_everything_is_escaped(tmp_path, make):
    turn = {"role": EVIL, "content": f"{EVIL} | a `b` ![x](http://example.org)\n# next"}
    answer = {"text": f"{EVIL} | cell\nline `code` *b* _i_ [l](javascript:x)", "reward": 0.5}
    lines = [
        {"prompt": prompt, "columns": {EVIL: EVIL}, "answers": {EVIL: {"sampled": answer, "greedy": answer}}}
        for prompt in ([turn], EVIL)
    ]
    metrics = measured(0.5) | {f"kl_to_{EVIL}": 1.0, f"{EVIL}_reward": HELD_OUT, "parts": {EVIL: 0.5}}
    hostile = {"config": {EVIL: f"{EVIL}\n\n```\n{EVIL}"}, "parents": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "created": EVIL}
    artifact = replace(make("evaluate", "evaluate", {"models": {EVIL: metrics}}, LOSSES, lines, **hostile), stage=EVIL, name=EVIL)
    write_report(tmp_path, EVIL, {EVIL: artifact, f"{EVIL}2": replace(artifact, identity="f" * 64)})
    html, markdown = written(tmp_path)
    assert EVIL.lower() not in (html + markdown).lower()
    assert "alert(1)" in html
    assert "alert(1)" in markdown
    Page(html)
    (row,) = {line for line in markdown.splitlines() if "cell<br>line" in line}
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    for escaped in (r"\|", r"\`code\`", r"\*b\*", r"\_i\_", r"\[l\]"):
        assert escaped in row
    assert r"!\[x\]" in markdown


def test_markdown_leaves_ordinary_text_alone():
    assert pages.markdown("kl_to_sft is 0.5 – fine (really).") == "kl_to_sft is 0.5 – fine (really)."


def test_nothing_is_drawn_again_unless_something_changed(tmp_path, road, monkeypatch):
    drawn = []
    write_pages = pages.write_pages
    monkeypatch.setattr(pages, "write_pages", lambda *arguments: (drawn.append(1), write_pages(*arguments)))
    write_report(tmp_path, "demo", road)
    write_report(tmp_path, "demo", road)
    assert len(drawn) == 1
    write_report(tmp_path, "demo", road | {"ppo": replace(road["ppo"], identity="f" * 64)})
    assert len(drawn) == 2
    (tmp_path / "results.json").write_text("{ cut")
    write_report(tmp_path, "demo", road)
    assert len(drawn) == 3
    (tmp_path / "report.md").unlink()
    write_report(tmp_path, "demo", road)
    assert len(drawn) == 4
    (tmp_path / "cut-1").mkdir()
    (tmp_path / "cut-1/config.yaml").write_text("stage: dpo\nmodel: sft\n")
    write_report(tmp_path, "demo", road)
    write_report(tmp_path, "demo", road)
    assert len(drawn) == 5, "a stage that was cut is on the road"
    (tmp_path / "preflight.json").write_text("[]")
    write_report(tmp_path, "demo", road)
    assert len(drawn) == 6


def test_missing_pieces(tmp_path, make, capsys):
    """A stage without history, an evaluation without rewards, reference and samples, a reward model alone."""
    models = {"sft": {"perplexity": 3.0}, "judge": {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "n": 4}}
    write_report(tmp_path, "demo", {"sft": make("sft", "sft"), "evaluate": make("evaluate", "evaluate", {"models": models})})
    assert "perplexity" in capsys.readouterr().out
    html, markdown = written(tmp_path)
    assert Page(html).count("svg") == 1  # the road
    assert "Learning curves" not in html + markdown
    assert "Answers" not in html + markdown


def test_a_run_without_evaluation(tmp_path, make, capsys):
    write_report(
        tmp_path, "demo", {"sft": make("sft", "sft", history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}])}
    )
    assert json.loads((tmp_path / "results.json").read_text())["models"] == {}
    assert len(capsys.readouterr().out.splitlines()) == 3
    html, markdown = written(tmp_path)
    assert Page(html).count("svg") == 2  # the road and the loss
    assert "No stage of this run measures models." in html
    assert "No stage of this run measures models." in markdown


def test_what_no_axis_can_show_is_left_out_and_counted(tmp_path, make):
    """Of each history three of six values, NaN, 1e308 and -1e308, between which no float is; of three models one."""
    values = [3.0, float("nan"), 1e308, -1e308, 2.0, 1.0]
    losses = [{"step": step, "loss": value, "eval_loss": float("inf")} for step, value in enumerate(values, 1)]
    policy = [
        {"step": step, "objective/scores": value, "objective/kl": 0.1 * step, "completions/mean_length": 9.0}
        for step, value in enumerate(values, 1)
    ]
    models = {"sft": measured(0.4), "dpo": measured(0.5), "lost": measured(1e308, kl_to_sft=-1e308)}
    artifacts = {
        "sft": make("sft", "sft", {"probe/stories/perplexity_before": 4.0, "probe/stories/perplexity": float("nan")}, losses),
        "ppo": make("ppo", "ppo", history=policy),
        "evaluate": make("evaluate", "evaluate", {"models": models}),
    }
    write_report(tmp_path, "demo", artifacts)
    html, markdown = written(tmp_path)
    said = re.findall(r"left out, as NaN, infinite or larger than any axis: ([^<]*)<", html)
    assert said == ["9 of the values", "3 of the values", "lost", "lost", "3 of the batches", "3 of the batches"]
    assert "| sft | loss | train | 1–6 | 3.000 → 1.000 (left out, as NaN, infinite or larger than any axis: 3 of" in markdown
    assert "| sft | loss | held out | – | – (left out, as NaN, infinite or larger than any axis: 6 of" in markdown
    assert "nan%" not in html


def test_a_long_history_is_no_large_page_and_loses_no_peak(tmp_path, make):
    """Of 5,001 batches a point of the way is the mean of 26; a curve keeps the one wild value of its 5,001."""
    history = [
        {"step": s, "loss": math.sin(s), "objective/scores": math.cos(s), "objective/kl": s % 7, "completions/mean_length": s % 11}
        for s in range(5_001)
    ]
    history[1234]["loss"] = 50.0
    artifact = make("ppo", "ppo", history=history)
    loss = draw.thinned(panels(Path(artifact.path))[0].series[0].points)
    assert len(loss) <= 502
    assert (1234, 50.0) in loss
    assert (loss[0][0], loss[-1][0]) == (0, 5_000)
    way = journeys(Path(artifact.path))[0]
    assert (len(way.points), way.batches) == (193, 26)
    assert way.points[0] == pytest.approx((sum(s % 7 for s in range(26)) / 26, sum(map(math.cos, range(26))) / 26))
    write_report(tmp_path, "demo", {"ppo": artifact})
    assert "a point is the mean of 26 batches" in written(tmp_path)[0]
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_a_history_that_a_kill_has_cut_is_read_up_to_there(tmp_path, make):
    artifact = make("sft", "sft", history=LOSSES)
    with (Path(artifact.path) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert panels(Path(artifact.path)) == panels(Path(make("again", "sft", history=LOSSES).path))
    write_report(tmp_path, "demo", {"sft": artifact})


@pytest.mark.parametrize("file", ["metrics.jsonl", "curvature/curvature.json"])
@pytest.mark.parametrize("content", [b'{"a": \n', b"[1]\n", b"\xff\n"])
def test_a_damaged_file_is_named(tmp_path, make, file, content):
    artifact = make("sft", "sft", {"learning_rate": 1e-3}, LOSSES)
    path = Path(artifact.path) / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + content)
    with pytest.raises(AlignError, match=f"{re.escape(str(path))}\\S* is damaged"):
        write_report(tmp_path, "demo", {"sft": artifact})
    assert not list(tmp_path.glob("report.*"))


def test_duration():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 398, 3599.9, 7500)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "6 min 38 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


# -- what is compared ------------------------------------------------------------------------------------------------------------


def rows_with(*rewards):
    """One row a tuple: the rewards of the models a, b, c …"""
    return [
        {
            "turns": [("user", "?")],
            "columns": "",
            "answers": {n: {"sampled": {"text": "x", "reward": r}} for n, r in zip("abc", row, strict=False)},
        }
        for row in rewards
    ]


def test_win_rates(make):
    """a beats b on two of four prompts, ties once, loses once: (2 + 1/2) / 4 = 62.5 %. Wilson's interval with z² = 3.84: the
    middle (0.625 + 3.84 / 8) / (1 + 3.84 / 4) = 0.564, on each side 1.96 (0.625 x 0.375 / 4 + 3.84 / 64)^½ / 1.96 = 0.344. Three
    wins of three are no certainty: the lower end is 3 / (3 + 3.84) = 0.44.
    """
    ((name, prompts, table),) = compare.win_rates([(make("evaluate", "evaluate"), rows_with((3, 1), (2, 1), (1, 1), (0, 1)))])
    assert (name, prompts, table.header) == ("demo-evaluate", 4, ["a", "b"])
    (_, (same, wins)), (_, (loses, _)) = table.rows
    assert str(same) == "–"
    assert str(wins) == "62% [22%, 91%]"
    assert loses.text == "38%"
    ((_, _, table),) = compare.win_rates([(make("evaluate", "evaluate"), rows_with((3, 1), (2, 1), (4, 1)))])
    assert str(table.rows[0][1][1]) == "100% [44%, 100%]"
    assert compare.win_rates([(make("evaluate", "evaluate"), rows_with((None, 1), (None, 2)))]) == [], "one model has rewards"


def test_rewards_against_their_price():
    kl, length = compare.clouds({"sft": measured(0.4, kl_to_sft=0.0), "ppo": measured(0.5), "judge": {"accuracy": 0.9}})
    assert (kl.title, kl.x_title) == ("gold reward against KL to sft", "KL to sft, nats an answer")
    assert kl.points[1] == ("ppo", 1.25, 0.5, 0.47, 0.54)
    assert [point.x for point in length.points] == [22.4, 22.4]


def test_forgetting_is_measured_from_the_parent(make):
    stages = {
        "sft": make(
            "sft", "sft", {"probe/stories/perplexity_before": 4.0, "probe/stories/perplexity": 5.0}, config={"model": "base"}
        ),
        "evaluate": make("evaluate", "evaluate", config={"models": {"start": "base", "tuned": "sft"}}),
    }
    table = compare.forgetting(stages, {"start": {"perplexity": 10.0}, "tuned": {"perplexity": 12.0}})
    assert [(stage, *map(str, cells)) for stage, cells in table.rows] == [
        ("sft", "probe stories", "4.00", "5.00", "+25%"),
        ("sft", "the evaluation's rows", "10.00", "12.00", "+20%"),
    ]
    ruined = compare.forgetting(stages, {"start": {"perplexity": 10.0}, "tuned": {"perplexity": 5.6e19}})
    assert str(ruined.rows[1][1][3]) == "+5.6e+20%"


def test_reward_models(make):
    stages = {"judge": make("judge", "reward", {"eval_accuracy": 0.8, "eval_accuracies/chosen_longer": 0.9})}
    evaluated = {"other": {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "n": 9, "calibration_error": 0.05}}
    table = compare.judges(stages, evaluated)
    assert table.header == ["held-out pairs ranked right", "calibration error", "right where the longer is chosen"]
    assert [str(cell) for cell in dict(table.rows)["other"]] == ["0.700 [0.600, 0.800]", "0.050", "–"]
    assert [str(cell) for cell in dict(table.rows)["judge"]] == ["0.800", "–", "0.900"]


# -- the road --------------------------------------------------------------------------------------------------------------------


def test_the_road_shows_what_is_not_finished(tmp_path, make):
    stages = {name: make(name, "sft", config={"model": model}) for name, model in (("a", "x/y"), ("b", "a"))}
    cut = tmp_path / "c-12345678"
    cut.mkdir()
    (cut / "config.yaml").write_text("stage: ppo\nmodel: b\ndata: [a/rows.jsonl]\n")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "c-12345678.json").write_text(json.dumps({"state": "failed", "memory_gb": 1.5}))
    road = stops(tmp_path, stages)
    assert [(stop.name, stop.state, stop.memory_gb, stop.needs) for stop in road] == [
        ("a", "finished", None, ()),
        ("b", "finished", None, ("a",)),
        ("c", "failed", 1.5, ("b", "a")),
    ]
    drawn = diagram(road)
    assert [(stop.name, x) for stop, x, _ in drawn.boxes] == [("a", 0), ("b", 200), ("c", 400)]
    assert len(drawn.arrows) == 2, "c needs a, but b says so already"
    write_report(tmp_path, "demo", stages)
    html, markdown = written(tmp_path)
    assert 'class="failed"' in html
    assert "| 3 | c | ppo | failed | – | 1.5 GB |" in markdown


def test_the_road_shows_what_runs_and_what_was_killed_as_it_ran(tmp_path, make):
    done = make("sft", "sft", {}, LOSSES)
    cut = tmp_path / "ppo-1"
    cut.mkdir()
    (cut / "config.yaml").write_text("stage: ppo\nmodel: sft\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/ppo-1.json").write_text(json.dumps({"state": "running"}))
    assert stops(tmp_path, {"sft": done})[-1].state == "interrupted"
    with lock(cut):
        assert stops(tmp_path, {"sft": done})[-1].state == "running"


def test_an_arrow_is_no_word_that_happens_to_be_a_stages_name(tmp_path, make):
    """The defaults of PPO hold "reward" (kl_in) and "sft" (ptx_rows), and a hub id may begin as a stage is called."""
    config = PPO(model="base", data="pairs/rows.jsonl", reward_funcs="length_band(low=1, high=9)").model_dump(mode="json")
    stages = {name: make(name, "sft", config={"model": "sft/x"}) for name in ("base", "sft", "reward", "pairs")}
    road = stops(tmp_path, {**stages, "ppo": make("ppo", "ppo", config=config)})
    assert {stop.name: stop.needs for stop in road if stop.needs} == {"ppo": ("base", "pairs")}


def test_an_arrow_goes_round_the_boxes_between():
    """b and c are made from a, d from b, and e from c and d: the arrow from c passes the column of d beside it."""
    made = {"a": (), "b": ("a",), "c": ("a",), "d": ("b",), "e": ("c", "d")}
    drawn = diagram([Stop(name, "sft", "finished", None, None, needs) for name, needs in made.items()])
    places = {stop.name: (x, y) for stop, x, y in drawn.boxes}
    assert (places["d"][1], places["c"][1]) == (places["b"][1], 80), "d stands behind b"
    (long,) = [arrow for arrow in drawn.arrows if "H" in arrow]
    assert f"{places['d'][0]} {places['c'][1] + 31}H{places['d'][0] + 148}" in long


def test_a_hundred_rounds_are_drawn():
    """Each round's pairs are sampled from the policy before, and its policy is trained from both: the paths back double in each."""
    road = [Stop("m0", "sft", "finished", None, None, ())]
    for i in range(1, 101):
        road.append(Stop(f"s{i}", "pairs", "finished", None, None, (f"m{i - 1}",)))
        road.append(Stop(f"m{i}", "dpo", "finished", None, None, (f"m{i - 1}", f"s{i}")))
    assert len(diagram(road).arrows) == 200, "m1 needs m0, but s1 says so already"


def test_findings_are_in_the_report(tmp_path, make):
    """A held-out loss that rises from its lowest while the training loss falls; and what the preflight found."""
    held = [{"step": s, "eval_loss": v} for s, v in ((0, 4.0), (10, 1.0), (20, 2.0), (30, 3.0))]
    train = [{"step": s, "loss": 4.0 / s, "learning_rate": 1e-3} for s in range(1, 31)]
    (tmp_path / "preflight.json").write_text(json.dumps([{"stage": "sft", "level": "warning", "message": f"rows {EVIL}"}]))
    write_report(tmp_path, "demo", {"sft": make("sft", "sft", history=[*train, *held], config={"learning_rate": 1e-3})})
    html, markdown = written(tmp_path)
    for page in (html, markdown):
        assert "overfit" in page
        assert "learns its rows by heart" in page
        assert "Preflight" in page
        assert EVIL not in page
    assert "best step 10," in html, "a count is whole"
    # What reads as a sentence is folded; the words beside it take no more room than they need, so that all of it fits.
    table = html.partition("Findings, each with what to do")[2].partition("</table>")[0]
    assert re.findall(r'<td( class="long")?>(?:sft|warning|rows)', table) == ["", "", ' class="long"']


# -- answers ---------------------------------------------------------------------------------------------------------------------

NASTY = ("</script><script>document.title = 'hacked'</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "\u2028 & ' \" \\")


def many(count):
    """An evaluation's samples of `count` prompts, the nasty texts among them."""
    draw = random.Random(0)
    for number in range(count):
        text = NASTY[number] if number < len(NASTY) else f"Answer {number} to it."
        given = {model: {"sampled": {"text": f"{model}: {text}", "reward": draw.random()}} for model in ("sft", "ppo")}
        yield {"prompt": [{"role": "user", "content": f"Question {number}? {text}"}], "answers": given}


def test_answers_survive_their_way_into_the_page(make):
    rows = [
        {"turns": [("user", text)], "columns": "", "answers": {text: {"sampled": {"text": text, "reward": None}}}} for text in NASTY
    ]
    written = payload([(make("evaluate", "evaluate"), rows)])
    assert not re.search("[<>&\u2028]", written)
    (read,) = json.loads(written)
    assert [row["turns"][0][1] for row in read["rows"]] == list(NASTY)


def test_an_answer_neither_turns_letters_round_nor_steers_a_terminal(make):
    rows = [{"turns": [], "columns": "", "answers": {"a": {"sampled": {"text": "\u202etxt.\u2066exe", "reward": None}}}}]
    (read,) = json.loads(payload([(make("evaluate", "evaluate"), rows)]))
    assert read["rows"][0]["answers"]["a"]["sampled"]["text"] == "\\u202etxt.\\u2066exe"
    assert pages.markdown("\x1b[2J\u202egone") == "\\x1b\\[2J\\u202egone"


def test_what_a_model_says_of_nan_is_kept_and_a_reward_that_is_none_is_null(make):
    rewards = (math.nan, math.inf, -math.inf, 0.5)
    rows = [{"answers": {"ppo": {"greedy": {"text": "np.isNaN, Infinity", "reward": reward}}}} for reward in rewards]
    written = payload([(make("evaluate", "evaluate"), rows)])
    found = json.loads(written, parse_constant=pytest.fail)[0]["rows"]  # JSON.parse knows no such constants
    answers = [row["answers"]["ppo"]["greedy"] for row in found]
    assert [answer["reward"] for answer in answers] == [None, None, None, 0.5]
    assert {answer["text"] for answer in answers} == {"np.isNaN, Infinity"}


def test_ten_thousand_answers_are_no_ten_thousand_elements(tmp_path, make):
    models = {"sft": measured(0.4), "ppo": measured(0.5)}
    write_report(tmp_path, "demo", {"evaluate": make("evaluate", "evaluate", {"models": models}, samples=many(5000))})
    html, markdown = written(tmp_path)
    assert len(Page(html).tags) < 400
    assert "The first 20 of 5000 prompts" in markdown


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_in_a_browser(tmp_path, make):
    """Drawn, filtered, ordered and grown in a real browser; what models wrote stays text, and nothing complains."""
    from browser import Browser

    models = {"sft": measured(0.4), "ppo": measured(0.5)}
    write_report(tmp_path, "demo", {"evaluate": make("evaluate", "evaluate", {"models": models}, samples=many(5000))})
    with Browser(tmp_path / "report.html") as page:
        assert page("document.title") == "demo · report"
        assert page("document.querySelectorAll('#cases details').length") <= 40
        assert page("document.getElementById('count').textContent").startswith("5000 of 5000 prompts")
        assert page("document.images.length") == 0
        order = (
            "(o => { order.value = o; order.dispatchEvent(new Event('change'));"
            "return +document.querySelector('.mark').textContent })"
        )
        assert page(f"{order}('best')") > 0.95 > 0.05 > page(f"{order}('worst')")
        filtered = "(w => { filter.value = w; filter.dispatchEvent(new Event('input')); })"
        page(f"{filtered}('question 4321')")
        assert page("new Promise(done => setTimeout(() => done(document.getElementById('count').textContent), 300))").startswith(
            "1 of"
        )
        assert "Question 4321?" in page("document.querySelector('#cases .prompt').textContent")
        page(f"{filtered}('document.title')")
        text = page("new Promise(done => setTimeout(() => done(document.querySelector('#cases').textContent), 300))")
        assert NASTY[0] in text
        assert page("document.querySelectorAll('#cases script, #cases img').length") == 0
        assert page.problems == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_long_names_leave_room_on_a_phone(tmp_path, make):
    """The column of names stays in sight as a table scrolls: where it was as wide as the screen, no value was ever seen."""
    from browser import Browser

    models = {"sft": measured(0.4), "a-model-of-a-name-that-is-as-long-as-those-of-sweeps": measured(0.5)}
    samples = [{**row, "answers": dict(zip(models, row["answers"].values(), strict=True))} for row in many(3)]
    write_report(tmp_path, "demo", {"evaluate": make("evaluate", "evaluate", {"models": models}, samples=samples)})
    with Browser(tmp_path / "report.html") as page:
        page.narrow(400)
        assert page("document.documentElement.scrollWidth") <= 400
        assert page("Math.max(...[...document.querySelectorAll('tbody th')].map(name => name.offsetWidth))") < 200


def test_a_long_name_leaves_room_in_a_plot():
    """And keeps its end, in which the branches of a sweep differ."""
    assert draw.brief("sft") == "sft"
    assert draw.brief("a-name-of-twenty-seven-char") == "a-name-of-tw…ty-seven-char"
    points = [compare.Point(f"{'long-' * 20}{end}", x, 0.5, 0.4, 0.6) for x, end in ((1.0, "a"), (2.0, "b"))]
    drawn = draw.cloud(compare.Cloud("gold", "KL", points), 0)
    assert "long-a<" in drawn
    assert "long-b<" in drawn
    assert "long-" * 4 not in drawn


def test_a_plot_of_a_loss_that_hardly_moves_has_whole_numbers_at_its_axis():
    """DPO's starts at ln 2, and at its usual rates the first logged ones differ by 1e-5."""
    points = [(0.0, 0.693147), (8.0, 0.693124)]
    drawn = draw.curve(Panel("loss", [Series("train", points, 0)]), 1)
    assert ">0.693148<" in drawn
    assert "e−" not in drawn


def test_a_plot_of_ppos_way_names_what_goes_up():
    assert ">score<" in draw.journey(Journey("KL", [(0.0, 0.1), (1.0, 0.2), (2.0, 0.3)], 0, 1), 0)
