"""The page in a real browser: what a reader clicks and types, and texts that try to be code."""

import os
import shutil
import subprocess
import sys

import pytest
from page_runs import evaluation, rollout, training

from igpo_trl.report.page import write_page
from igpo_trl.trajectory import Trajectory, Turn, write_jsonl

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} on the path")

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'><b>bold</b> & <!-- "


@pytest.fixture(scope="module")
def browser():
    # The sandbox of Chromium needs rights that containers often lack; what it shows here is our own file.
    playwright.expect.set_options(timeout=15_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of runs, or an address. At the end nothing may have been written to the console or requested."""
    contexts, complaints = [], []

    def open_(runs, **options):
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        address = runs
        if not isinstance(runs, str):
            address = f"file://{tmp_path / 'page.html'}"
            write_page(tmp_path / "page.html", runs)
            page.on("request", lambda request: request.url != address and complaints.append(request.url))
        page.goto(address)
        return page

    open_.complaints = complaints
    yield open_
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith(("data:", "blob:"))] == []


def expect_shown(page, text):
    playwright.expect(page.locator("#matches span")).to_have_text(text)


def charts(page):
    page.wait_for_selector(".plot .main-svg")


def test_texts_stay_texts(open_page):
    run = [
        rollout(HOSTILE + str(i), (HOSTILE,), texts=[HOSTILE], queries=["x"], said=HOSTILE, stop_reason=HOSTILE,
                data_set=HOSTILE + str(i % 2), step=i)
        for i in range(6)
    ]  # fmt: skip
    page = open_page({HOSTILE: run, "b": run})
    charts(page)
    page.locator("#curves").scroll_into_view_if_needed()
    page.wait_for_selector("#more-charts .chart >> nth=4 >> .main-svg >> nth=0")
    assert page.evaluate("window.hit") is None
    assert page.locator("b", has_text="bold").count() == 0 and page.locator("img").count() == 0
    assert page.locator("#detail h3").inner_text().startswith("</script><script>window.hit = 1</script><img src=x")
    # Its words are marked in what was read and in the answer.
    assert page.locator("#detail mark").first.inner_text().startswith("</script>")
    # Nor can code that got in run: the policy of the page names its own scripts alone.
    with page.expect_console_message():
        blocked = page.evaluate(
            """async () => {
            const violation = new Promise((resolve) => document.addEventListener(
                "securitypolicyviolation", (event) => resolve(event.effectiveDirective)));
            document.body.append(Object.assign(document.createElement("script"), {textContent: "window.hit = 3"}));
            return [await violation, window.hit];
        }"""
        )
    assert blocked == ["script-src-elem", None]
    assert "Content Security Policy" in open_page.complaints.pop()


def test_the_first_screen_says_what_was_learned_lost_and_believed(open_page):
    page = open_page({"a": training()})
    assert page.locator("#headline").inner_text().startswith("It learned: reward 0.00 → 1.00")
    assert page.locator("#headline").get_attribute("class") == "good"
    assert "100 %" in page.locator("#facts").inner_text()
    charts(page)
    assert page.locator("figcaption strong").all_inner_texts()[:2] == [
        "Reward",
        "What the policy believed after each turn",
    ]
    found = page.locator(".questions").nth(1)
    assert found.locator("h3").inner_text().startswith("Found by searching")
    found.locator("button").first.click()
    expect_shown(page, "4 rollouts of 120")
    assert page.locator("#detail h3").inner_text() == page.locator(".row .question").first.inner_text()
    assert page.locator("#detail .badge.right").count() >= 1


def test_filters_and_sorting(open_page):
    run = [
        *(rollout(f"Plain {i}?", beliefs=(0.2, 0.6), step=i, data_set="main") for i in range(8)),
        rollout("Fell?", beliefs=(0.1, 0.9, 0.05), outcome=0.0, step=9, stop_reason="turn_limit"),
        rollout("Idle?", beliefs=(0.3, 0.3, 0.3, 0.3), outcome=0.0, step=10, texts=["needle", "b", "c"]),
        rollout("Doubt?", beliefs=(0.01, 0.02), step=11, data_set="other"),
        rollout("Partly?", beliefs=(0.01, 0.5), outcome=0.5, step=12),
    ]
    page = open_page({"a": run})
    first = page.locator(".row .question").first
    choose = lambda name, value: page.locator(f"#filters select[name={name}]").select_option(value)  # noqa: E731
    for sort, question in (("fall", "Fell?"), ("idle", "Idle?"), ("doubt", "Doubt?"), ("late", "Partly?")):
        choose("sort", sort)
        assert first.inner_text() == question
    choose("sort", "trust")
    expect_shown(page, "2 rollouts of 12")
    assert first.inner_text() == "Idle?"
    page.click("#reset")
    for name, value, count in (
        ("outcome", "partly", 1), ("outcome", "wrong", 2), ("stop", "turn_limit", 1), ("set", "other", 1),
        ("gain", "fell", 1), ("gain", "none", 1), ("gain", "rose", 10),
    ):  # fmt: skip
        choose(name, value)
        expect_shown(page, f"{count} rollout{'s' * (count > 1)} of 12")
        page.click("#reset")
    page.fill("#filters input[name=from]", "4")
    page.fill("#filters input[name=to]", "9")
    expect_shown(page, "5 rollouts of 12")
    page.click("#reset")
    page.fill("#filters input[name=text]", "NEEDLE")  # in what a search found
    expect_shown(page, "1 rollout of 12")
    assert page.locator("#detail h3").inner_text() == "Idle?"
    # A point of a curve shows the rollouts of its step.
    page.click("#reset")
    charts(page)
    page.evaluate("document.querySelector('.plot').emit('plotly_click', {points: [{x: 9}]})")
    expect_shown(page, "1 rollout of 12")
    assert first.inner_text() == "Fell?"


def test_keys(open_page):
    page = open_page({"a": training()})
    question = page.locator("#detail h3")
    rows = page.locator(".row .question")
    page.click(".row >> nth=0")
    first = page.locator(".row[aria-selected=true]").get_attribute("id")
    page.focus("#list")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    assert page.locator(".row[aria-selected=true]").get_attribute("id") == f"row-{int(first[4:]) + 2}"
    assert page.get_attribute("#list", "aria-activedescendant") == f"row-{int(first[4:]) + 2}"
    page.keyboard.press("End")
    assert page.locator(".row[aria-selected=true]").get_attribute("id") == "row-119"
    assert question.inner_text() == "Question 9-2?" and rows.count() < 40
    page.keyboard.press("Home")
    assert question.inner_text() == "Question 0-0?"
    before = page.url
    page.keyboard.press("ArrowRight")  # the next one of the group
    assert question.inner_text() == "Question 0-0?" and page.url != before
    page.keyboard.press("/")
    page.keyboard.type("9-1")
    expect_shown(page, "4 rollouts of 120")
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    # The address names the rollout: the page opens with it.
    page.goto(page.url)
    page.reload()
    assert question.inner_text() == "Question 9-1?"


def test_odd_rollouts(open_page):
    bare = Trajectory("no template", [Turn("")])
    endless = rollout("Long?", beliefs=[0.5] * 60, outcome=-2.0, step=1)
    endless.turns[3].observation = "word " * 5000
    endless.turns[4].belief = endless.turns[3].info_gain = None
    failed = rollout("Inf?", outcome=float("inf"), step=2)
    failed.turns[0].calls[0].error = "timeout"
    failed.turns[0].alias_beliefs = [None]
    page = open_page({"a": [bare, endless, failed]})
    charts(page)
    for number, text in enumerate(("(no text)", "more", "failed call: timeout")):
        page.click(f".row >> nth={number}")
        playwright.expect(page.locator("#detail")).to_contain_text(text)
    page.click(".row >> nth=1")
    page.click("#detail .more >> nth=0")
    assert page.locator("#detail .folded").count() == 0


def test_the_findings_of_the_doctor_are_shown(open_page, tmp_path):
    finding = {"name": "turn_tax", "evidence": "early turns lose " + HOSTILE, "change": "Use another estimator."}
    file = tmp_path / "page.html"
    write_page(file, {"a": training()}, diagnoses={"a": {"findings": [finding], "healthy": ["drift"]}})
    page = open_page(f"file://{file}")
    found = page.locator(".findings").inner_text()
    assert found.startswith("turn tax: early turns lose </script>") and "Use another estimator." not in found
    page.click(".findings summary")
    assert page.locator(".findings").inner_text().endswith("Use another estimator.")


def test_the_group_shows_what_the_best_one_did_differently(open_page):
    same = dict(question="Who?", beliefs=(0.1, 0.2, 0.9), texts=["nothing", "It was Ada."])
    run = [
        rollout(**same, queries=["start", "good"]),
        rollout(**{**same, "beliefs": (0.1, 0.2, 0.05)}, queries=["start", "bad"], outcome=0.0),
    ]
    run[1].turns[1].observation = "<tool_response>It was Adam.</tool_response>"
    page = open_page({"a": run})
    page.click(".row >> nth=1")
    assert "Right answer: Ada" in page.locator("#detail .answers").inner_text()
    assert "Answered: Eve (wrong)" in page.locator("#detail .answers").inner_text()
    assert page.locator(".parting").inner_text().endswith('search(query="good") instead of search(query="bad")')
    differs = page.locator(".differs").inner_text()
    assert "What did the best one do differently?" in differs
    assert "They did the same for 1 turn, then parted" in differs
    assert 'search(query="bad")' in differs and 'search(query="good")' in differs
    assert "belief 0.20 → 0.90, the answer was read" in differs
    turn = page.locator("#turn-0-2")
    assert (
        turn.locator("header").inner_text().split("\n")[-1].endswith("gain −0.15")
        and turn.locator("mark").count() == 0
    )
    page.click(".differs button")
    assert page.locator(".conversation h4").all_inner_texts() == ["this one", "the best of its group"]
    assert page.locator("#turn-1-2 mark").inner_text() == "Ada"
    assert page.locator("#turn-1-2 .read .tag").first.inner_text() == "result, contains the answer"
    playwright.expect(page.locator(".belief-plot .scatterlayer .trace")).to_have_count(2)


def test_two_runs_stand_side_by_side_on_the_same_question(open_page):
    page = open_page({"before": evaluation({0, 1}), "after": evaluation(range(1, 12))})
    assert page.locator("#headline").inner_text().startswith("after does better than before")
    assert page.locator(".questions h3").all_inner_texts() == ["Lost1 question", "Gained10 questions"]
    assert page.locator("#count").inner_text() == "before: 12 rollouts, after: 12 rollouts, 12 shared questions"
    assert page.locator(".questions li .given").first.inner_text() == "answered: Ada → Eve"
    assert page.locator(".questions .fate").first.inner_text() == "never found it"
    page.click(".questions button >> nth=0")
    expect_shown(page, "2 rollouts of 24")
    assert page.locator("#detail .given").all_inner_texts() == ["Answered: Ada (right)", "Answered: Eve (wrong)"]
    assert page.locator("#detail h3").inner_text() == "Question 0?"
    assert page.locator(".conversation h4").all_inner_texts() == ["before", "after"]
    assert page.locator(".conversation .outcome .badge").all_inner_texts() == ["1", "0"]


def test_many_rollouts_are_few_elements_and_open_at_once(open_page):
    run = training(steps=125, groups=5, size=8)
    assert len(run) == 5000
    page = open_page({"a": run})
    # The list is there before the charts: in half a second on an idle machine, with room here for a busy one.
    assert page.evaluate("performance.getEntriesByName('igpo-shown')[0].startTime") < 4000
    expect_shown(page, "5,000 rollouts")
    assert page.locator(".row").count() < 40
    page.evaluate("document.querySelector('#list').scrollTop = 1e9")
    page.wait_for_selector("#row-4999")
    assert page.locator(".row").count() < 40
    charts(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_the_dark(open_page, scheme):
    page = open_page({"a": training()}, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    charts(page)
    page.click(".row >> nth=2")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    top = page.evaluate("document.querySelector('#detail').getBoundingClientRect().top")
    assert 0 <= top < 200  # the page has moved to the rollout
    lightness = (
        "(selector) => Math.max(...getComputedStyle(document.querySelector(selector)).backgroundColor.match(/\\d+/g))"
    )
    assert (page.evaluate(lightness, "body") < 60) == (scheme == "dark")
    title = page.locator(".plot .xtitle").first
    before = title.get_attribute("style")
    page.click("#theme")
    assert (page.evaluate(lightness, "body") < 60) == (scheme == "light")
    playwright.expect(title).not_to_have_attribute("style", before)  # the charts have changed, too


def test_a_page_follows_a_run(open_page, tmp_path):
    command = [sys.executable, "-m", "igpo_trl", "view", str(tmp_path / "run"), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            follow(open_page(process.stdout.readline().split()[4].rstrip(";")), tmp_path / "run")
        finally:
            process.terminate()


def follow(page, folder):
    playwright.expect(page.locator("#live")).to_contain_text("waiting for the first rollouts")
    file, run = folder / "trajectories" / "rank0.jsonl", training(steps=4)
    write_jsonl(file, run[:24])
    expect_shown(page, "24 rollouts")
    page.click(".row >> nth=3")
    question = page.locator("#detail h3").inner_text()
    page.focus("#filters input[name=text]")
    write_jsonl(file, run[24:], append=True)
    expect_shown(page, "48 rollouts")
    playwright.expect(page.locator("#diagnoses")).to_contain_text("igpo doctor checked")
    assert page.locator("#detail h3").inner_text() == question
    assert page.evaluate("document.activeElement.name") == "text"  # who is typing goes on typing
    assert page.locator("#headline").inner_text().startswith("It learned")
    charts(page)
