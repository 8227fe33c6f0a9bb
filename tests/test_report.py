import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from align import report
from align.artifact import Artifact
from align.report import write_report

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


def pages(out):
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
    text = report.as_text(road["evaluate"].metrics["models"])
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("judge") > 1


def test_tables_have_only_the_columns_that_exist():
    table = report.results_table(
        {"base": {"perplexity": 9.0}, "sft": {"perplexity": 3.0, "brief_reward": HELD_OUT, "kl_to_base": 0.5}}
    )
    assert table.header == ["brief reward", "perplexity", "KL to base"]
    assert [str(cell) for cell in table.rows[0][1]] == ["–", "9.00", "–"]
    assert [str(cell) for cell in table.rows[1][1]] == ["0.500 [0.400, 0.600]", "3.00", "0.50"]
    assert report.parts_table({"base": {"perplexity": 9.0}}).header == []


def test_rewards_share_one_scale():
    """Sampled 0.5 [0.4, 0.6] and greedy 0.9 [0.8, 1.4] span 0.4 to 1.4, so the means lie at 10 % and 50 %."""
    greedy = {"mean": 0.9, "ci95": [0.8, 1.4], "n": 8}
    (_, (sampled, other)), *_ = report.results_table({"sft": {"gold_reward": HELD_OUT, "greedy_reward": greedy}}).rows
    assert sampled.span == (0.0, 10.0, 20.0)
    assert other.span == (40.0, 50.0, 100.0)


def test_page(tmp_path, road):
    write_report(tmp_path, "demo", road)
    html, markdown = pages(tmp_path)
    page = Page(html)
    assert page.count("h1") == 1
    assert page.count("figure") == 2  # sft and ppo
    assert page.count("svg") == 1 + 3  # loss; score, KL and length
    assert page.count("table") == page.count("caption") == 3
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


def test_page_is_self_contained(tmp_path, road):
    write_report(tmp_path, "demo", road)
    html, _ = pages(tmp_path)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert all(value.startswith("#") for name, value in attributes.items() if name in ("href", "src", "xlink:href"))
    assert "://" not in html
    assert "@import" not in html
    assert html.count("<style") == 1
    assert not set(report.COLORS) & set(re.findall(r"#\w{6}", html))
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
    html, markdown = pages(tmp_path)
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
    assert report.markdown("kl_to_sft is 0.5 – fine (really).") == "kl_to_sft is 0.5 – fine (really)."


def test_nothing_is_drawn_again_unless_something_changed(tmp_path, road, monkeypatch):
    drawn = []
    write_pages = report._write_pages
    monkeypatch.setattr(report, "_write_pages", lambda *arguments: (drawn.append(1), write_pages(*arguments)))
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


def test_missing_pieces(tmp_path, make, capsys):
    """A stage without history, an evaluation without rewards, reference and samples, a reward model alone."""
    models = {"sft": {"perplexity": 3.0}, "judge": {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "n": 4}}
    write_report(tmp_path, "demo", {"sft": make("sft", "sft"), "evaluate": make("evaluate", "evaluate", {"models": models})})
    assert "perplexity" in capsys.readouterr().out
    html, markdown = pages(tmp_path)
    assert Page(html).count("svg") == 0
    assert "Learning curves" not in html + markdown
    assert "Answers" not in html + markdown


def test_a_run_without_evaluation(tmp_path, make, capsys):
    write_report(
        tmp_path, "demo", {"sft": make("sft", "sft", history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}])}
    )
    assert json.loads((tmp_path / "results.json").read_text())["models"] == {}
    assert len(capsys.readouterr().out.splitlines()) == 3
    html, markdown = pages(tmp_path)
    assert Page(html).count("svg") == 1
    assert "No stage of this run measures models." in html
    assert "No stage of this run measures models." in markdown


def test_duration():
    assert [report.duration(s) for s in (0.4, 59.4, 59.6, 398, 3599.9, 7500)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "6 min 38 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
