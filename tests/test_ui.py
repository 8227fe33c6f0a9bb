"""The page of `align ui`: a blind vote becomes a preference row, what models say stays text; in a browser where there is one."""

import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import Browser
from helpers import llama
from transformers import AutoModelForSequenceClassification

from align.artifact import Artifact
from align.chat.speaker import Decoding
from align.chat.ui import Speakers, build, launch
from align.cli import main
from align.commands.ui import policies
from align.data import load_rows
from align.models import save_model
from align.progress import harmless
from align.registry import Registry

GREEDY = Decoding(8, temperature=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("ui")
    for seed, name in [*enumerate(("one", "two", "three")), (0, "again")]:
        save_model(llama(seed), tokenizer, root / name)
    save_model(AutoModelForSequenceClassification.from_config(llama(0).config), tokenizer, root / "labels")
    said = {"task": "classification", "labels": ["cat", "mat"], "max_length": 64, "task_args": {}}
    (root / "labels" / "task.json").write_text(json.dumps(said))
    return root


@pytest.fixture
def page(folders, tmp_path, request):
    """The running page's address, and where its votes go."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "report.html").write_text(
        "<h1>The <em>report</em></h1><script>top.document.title = 'taken'</script>"
    )
    votes = tmp_path / "votes.jsonl"
    names = [str(folders / name) for name in getattr(request, "param", ("one", "two"))]
    built = build(names, votes=votes, runs=tmp_path / "runs", decoding=GREEDY)
    yield launch(built, "127.0.0.1"), votes, names
    built.close()


def test_a_blind_vote_becomes_a_preference_row(page):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    address, votes, names = page
    client = Client(address, verbose=False)
    _, shown, left, right, *_ = client.predict(*names, "How <b>are</b> you?", "Be brief.", 0.0, 1.0, 0, 8, api_name="/ask")
    assert left != right
    assert shown[0]["content"][0]["text"] == "How &lt;b&gt;are&lt;/b&gt; you?"
    *_, verdict, _ = client.predict(api_name="/right")
    (row,) = load_rows(votes, "preference").rows
    assert (harmless(row.chosen[0].content), harmless(row.rejected[0].content)) == (right, left)
    assert [message.content for message in row.prompt] == ["Be brief.", "How <b>are</b> you?"]
    assert all(f"**{name}**" in verdict for name in names)
    with pytest.raises(AppError, match="Ask something first"):  # a second click, before the buttons are off
        client.predict(api_name="/left")
    assert len(load_rows(votes, "preference").rows) == 1


@pytest.mark.parametrize("page", [("one", "again")], indirect=True)
def test_the_same_answer_twice_is_not_voted_on(page):
    from gradio_client import Client

    address, votes, names = page
    client = Client(address, verbose=False)
    _, _, left, right, said = client.predict(*names, "Hi", "", 0.0, 1.0, 0, 8, api_name="/ask")
    assert left == right
    assert said == "Both say the same."
    client.predict(api_name="/left")
    assert not votes.exists()


@pytest.mark.parametrize("page", [("one", "labels")], indirect=True)
def test_a_tasks_answer_is_not_voted_on(page):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    address, votes, names = page
    client = Client(address, verbose=False)
    *_, left, right, said = client.predict(*names, "Hi", "", 0.0, 1.0, 0, 8, api_name="/ask")
    assert {left, right} & {"cat", "mat"}
    assert "there is no vote" in said
    assert all(f"**{name}**" in said for name in names)
    with pytest.raises(AppError, match="Ask something first"):
        client.predict(api_name="/left")
    assert not votes.exists()


def test_a_question_that_cannot_be_answered_is_taken_back(page):
    """The models read 512 tokens: a message that is longer would be in the way of every later one."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    address, _, names = page
    client = Client(address, verbose=False)
    how = ["", 0.0, 1.0, 0, 8]
    for ask in ([names[0]], "/talk"), (names, "/ask"):
        with pytest.raises(AppError, match="begin anew, or ask something shorter"):
            client.predict(*ask[0], "Hello! " * 200, *how, api_name=ask[1])
        _, shown, *_ = client.predict(*ask[0], "Hello!", *how, api_name=ask[1])
        assert [turn["content"][0]["text"] for turn in shown if turn["role"] == "user"] == ["Hello!"]
        with pytest.raises(AppError, match="must be numbers"):
            client.predict(*ask[0], "Hello!", *how[:-1], None, api_name=ask[1])


def test_an_answer_that_fails_is_told_and_its_question_taken_back(page, monkeypatch):
    """As where a GPU's memory is full: the page waited for ever, and said nothing."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    def full(*asked):
        raise RuntimeError("out of <memory>\nand more")

    monkeypatch.setattr("align.chat.ui.Speaker.answer", full)
    address, _, names = page
    client = Client(address, verbose=False)
    how = ["", 0.0, 1.0, 0, 8]
    for ask in ([names[0]], "/talk"), (names, "/ask"):
        job = client.submit(*ask[0], "Hello!", *how, api_name=ask[1])
        with pytest.raises(AppError, match=r"RuntimeError: out of &lt;memory&gt;$"):
            job.result()
        assert not any("…" in str(part) for part in job.outputs()[-1])


def test_an_answer_without_words_is_told_as_one(page, monkeypatch):
    from gradio_client import Client

    address, _, names = page
    monkeypatch.setattr("align.chat.speaker.Speaker.answer", lambda *args: iter(["", " "]))
    client = Client(address, verbose=False)
    how = ["", 0.0, 1.0, 0, 8]
    *_, shown = client.predict(names[0], "Hi", *how, api_name="/talk")
    assert [turn["content"][0]["text"] for turn in shown] == ["Hi", "(empty)"]
    *_, left, right, said = client.predict(*names, "Hi", *how, api_name="/ask")
    assert (left, right, said) == ("(empty)", "(empty)", "Both say the same.")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_what_is_refused_is_told_in_one_place(page):
    """`Error` stood half hidden over where votes go."""
    with Browser(page[0]) as tab:
        press(tab, "Compare blind")
        say(tab, "compare-said", "Hello! " * 200)
        tab.wait("document.querySelector('.toast-body')?.textContent.includes('ask something shorter')")
        tab.wait("document.querySelector('#verdict').textContent.includes('Votes go to')")
        assert "Error" not in tab("document.querySelector('#verdict').textContent")


def test_few_models_are_held(folders):
    speakers = Speakers("auto")
    first = speakers[str(folders / "one")]
    speakers[str(folders / "two")]
    assert speakers[str(folders / "one")] is first
    speakers[str(folders / "three")]  # lets go of two, which was used least recently
    assert list(speakers._loaded) == [str(folders / "one"), str(folders / "three")]


def test_two_who_ask_for_a_model_at_once_get_the_same(folders):
    speakers, name = Speakers("auto"), str(folders / "one")
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: id(speakers[name]), range(4)))) == 1


def test_the_models_of_the_page_are_the_registered_policies(folders, tmp_path):
    (tmp_path / "rows").mkdir()
    for name, stage, path in (("p", "sft", folders / "one"), ("r", "reward", folders / "two"), ("w", "pairs", tmp_path / "rows")):
        Registry().add(Artifact(name=name, stage=stage, identity=name, path=str(path), config={}))
    assert policies(Registry()) == ["p"]


def test_without_a_model_there_is_no_page(capsys):
    assert main(["ui"]) == 2
    assert "holds no language model" in capsys.readouterr().err


def test_in_a_browser(page):
    """`pip install playwright` and a Chromium on PATH make this run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    address, votes, names = page
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=[*flags, "--disable-quic", "--disable-sync"])
        tab = browser.new_page()
        errors = []
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.fill("#talk-said textarea", "<img src=x onerror=\"document.title='taken'\">Hello")
        tab.press("#talk-said textarea", "Enter")
        tab.wait_for_selector(".bot")
        tab.get_by_role("tab", name="Compare blind").click()
        for vote in ("left", "right"):
            tab.fill("#compare-said textarea", "How are you?")
            tab.press("#compare-said textarea", "Enter")
            tab.click(f"#vote-{vote}:not([disabled])")
            tab.wait_for_selector('#verdict:has-text("Saved")')
        tab.fill("#compare-said textarea", "How are you?")
        tab.press("#compare-said textarea", "Enter")
        tab.wait_for_selector("#vote-left:not([disabled])")
        tab.get_by_label("Model 1").click()
        tab.get_by_role("option", name=names[1]).click()
        tab.wait_for_selector("#vote-left[disabled]")
        assert tab.input_value("#left textarea") == "", "what the other model answered is not voted on"
        tab.get_by_role("tab", name="Reports").click()
        frame = tab.frame_locator("iframe")
        frame.locator("h1").wait_for()
        assert tab.title() == "align"
        browser.close()
    assert [error for error in errors if "from accessing a cross-origin frame" not in error] == []
    assert len(errors) == 1, "the report's script ran in its frame, and could not reach out of it"
    assert len(load_rows(votes, "preference").rows) == 2


def say(page, box, text):
    """Write `text` into the box and press Enter."""
    page.wait(f"document.querySelector('#{box} textarea')?.offsetParent")
    page(
        f"(async () => {{ const box = document.querySelector('#{box} textarea'); box.value = {json.dumps(text)};"
        "box.dispatchEvent(new Event('input', {bubbles: true})); await new Promise(done => setTimeout(done, 200));"
        "box.dispatchEvent(new KeyboardEvent('keypress', {key: 'Enter', bubbles: true, cancelable: true})) })()"
    )


def press(page, what):
    """Click the one visible button or tab of this name; gradio measures copies of tabs, which nobody reaches."""
    named = f"b.offsetParent && b.tabIndex >= 0 && (b.ariaLabel || b.textContent.trim()) === '{what}'"
    seen = f"[...document.querySelectorAll('button')].find(b => {named})"
    page.wait(seen)
    page(f"{seen}.click()")


def choose(page, box, option):
    """Take an option of the visible dropdown of this name."""
    found = f"[...document.querySelectorAll('input')].find(i => i.offsetParent && i.ariaLabel === '{box}')"
    page(f"{found}.dispatchEvent(new Event('focus'))")
    seen = f"[...document.querySelectorAll('[role=option]')].find(o => o.offsetParent && o.ariaLabel === '{option}')"
    page.wait(seen)
    page(f"{seen}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
@pytest.mark.parametrize("button", ["Begin anew", "Clear"])
def test_an_answer_that_is_still_coming_does_not_outlive_its_conversation(folders, tmp_path, button):
    built = build([str(folders / "one")], votes=tmp_path / "votes.jsonl", runs=tmp_path, decoding=Decoding(480, temperature=0.0))
    address = launch(built, "127.0.0.1")
    try:
        with Browser(address) as page:
            say(page, "talk-said", "How are you?")
            page.wait("document.querySelector('.bot')?.textContent.trim().length > 8")
            press(page, button)
            page.wait("!document.querySelector('.bot')")
            say(page, "talk-said", "And who?")
            page.wait("document.querySelector('.bot')?.textContent.trim().length > 8")
            assert "How are you?" not in page("document.querySelector('.bot').closest('[role=log]').textContent")
    finally:
        built.close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_a_conversation_keeps_its_spaces_and_shows_what_turns_letters_round(page):
    with Browser(page[0]) as tab:
        say(tab, "talk-said", "if  x:\n\treturn\u202e 1\n    y")
        tab.wait("document.querySelector('.user')")
        assert tab("document.querySelector('.user').innerText.trim()") == "if  x:\n\treturn\\u202e 1\n    y"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_other_models_leave_nothing_to_vote_on(page):
    with Browser(page[0]) as tab:
        press(tab, "Compare blind")
        say(tab, "compare-said", "How are you?")
        tab.wait("document.querySelector('#verdict').textContent.includes('Which is better?')")
        choose(tab, "Model 1", page[2][1])
        tab.wait("document.querySelector('#verdict').textContent.includes('Votes go to')")
        assert tab("document.querySelector('#left textarea').value") == ""
        assert tab("document.querySelector('#vote-left').disabled")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_a_question_to_both_closes_the_vote_on_the_last_one_and_may_be_taken_back(folders, tmp_path):
    names = [str(folders / name) for name in ("one", "two")]
    built = build(names, votes=tmp_path / "votes.jsonl", runs=tmp_path, decoding=Decoding(400, temperature=0.0))
    try:
        with Browser(launch(built, "127.0.0.1")) as tab:
            press(tab, "Compare blind")
            verdict = "document.querySelector('#verdict').textContent.includes('{}')"
            say(tab, "compare-said", "How are you?")
            tab.wait(verdict.format("Which is better?"))
            say(tab, "compare-said", "And who?")
            tab.wait(verdict.format("Both are answering"))
            assert tab("document.querySelector('#vote-left').disabled && !document.querySelector('#left textarea').value")
            press(tab, "Begin anew")
            tab.wait(verdict.format("Votes go to"))
            assert not (tmp_path / "votes.jsonl").exists()
    finally:
        built.close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")
def test_a_run_that_finishes_later_can_be_read(page):
    runs = page[1].parent / "runs"
    (runs / "later").mkdir()
    (runs / "later" / "report.html").write_text("<h1>Later</h1>")
    with Browser(page[0]) as tab:
        press(tab, "Reports")
        tab.wait("document.querySelector('iframe')?.srcdoc.includes('The <em>report</em>')")
        choose(tab, "Run", "later")
        tab.wait("document.querySelector('iframe').srcdoc.includes('Later')")


def test_the_page_starts_where_a_proxy_is_named_that_does_not_answer(folders, tmp_path, monkeypatch):
    for name, value in {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")
    built = build([str(folders / "one")], votes=tmp_path / "v.jsonl", runs=tmp_path, decoding=GREEDY)
    assert launch(built, "127.0.0.1").startswith("http://127.0.0.1:")
    built.close()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_a_proxy_that_gradio_cannot_be_imported_beside_is_told_of(proxy, folders, monkeypatch, capsys):
    if proxy.startswith("socks5") and importlib.util.find_spec("socksio") is not None:
        pytest.skip("httpx speaks SOCKS here")
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert main(["ui", str(folders / "one"), "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("align: error: a proxy of the environment (ALL_PROXY, ")
    assert "unset it for this command" in told


def test_nothing_is_sent_home():
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
