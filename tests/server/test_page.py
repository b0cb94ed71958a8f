"""The web page in a real browser, on a real server: what a person can do with it, and what they see."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from browser import Browser, Tab, browsing
from longforge.chat import encode_prompt
from longforge.engine import Engine
from longforge.forge.code_search.prompts import SYSTEM_PROMPT, TOOL_SPECS
from longforge.protocol import Message
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.page import FOLDER, TYPES
from longforge.server.replies import error_body
from longforge.server.running import BackgroundServer
from longforge.server.wire import tool_body
from small_model import small_model, small_tokenizer, teach
from small_server import CALL, FOUND, GREP, HTTP, QUESTION, Served, answer_ids, serving

MARKUP = '<img src=x onerror="document.title=1"><b>b</b>'
KEY = "open sesame"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """Calls grep when asked "Where?", tells what came, and answers "Tags?" in HTML; thinks first."""
    tokenizer = small_tokenizer()
    called = Message("assistant", "", "hm", (CALL,))
    result = Message("tool", "a.py", tool_call_id="x")
    talks: list[tuple[list[Message], Message, tuple]] = [
        ([QUESTION], called, (GREP,)),
        ([QUESTION, called, result], Message("assistant", FOUND, "ah"), (GREP,)),
        ([Message("user", "Tags?")], Message("assistant", MARKUP, "<i>hm</i>"), ()),
    ]
    dialogues = [
        (encode_prompt(tokenizer, talk, tools), answer_ids(talk, answer, tools))
        for talk, answer, tools in talks
    ]
    yield from serving(teach(small_model(max_positions=2048, hidden_size=256), dialogues))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Tab]:
    """The page with its model known. Whatever the test does, the browser has nothing to complain about."""
    tab = opened(browser, server.url)
    yield tab
    assert tab.complaints() == []
    assert all(url.startswith(f"{server.url}/") for url in tab.requested())


def opened(browser: Browser, url: str, **look: int | bool) -> Tab:
    tab = browser.open(f"{url}/", **look)
    tab.wait("document.querySelector('#served')?.innerText.startsWith('small')")
    return tab


def ask(tab: Tab, text: str) -> None:
    tab.fill("#question", text)
    tab.press("Enter")


def settled(tab: Tab) -> None:
    """Waits for the end of the last answer."""
    tab.wait("document.querySelectorAll('.model').length > 0")
    tab.wait("[...document.querySelectorAll('.model')].every((m) => m.ariaBusy === 'false')")


def offer_grep(tab: Tab) -> None:
    tab.fill("#tools", json.dumps([tool_body(GREP)]))


def test_a_question_a_call_its_result_and_the_answer(page: Tab):
    offer_grep(page)
    assert "Offered: grep" in page.text("#tools-state")
    ask(page, "Where?")
    settled(page)
    assert page.text(".user") == "Where?"
    assert page.text(".call h3") == "calls grep"
    assert page.text(".call .arguments") == '{\n  "limit": 3\n}'
    assert page.value("document.activeElement.ariaLabel") == "Result of grep"
    assert page.value("document.querySelector('#send').disabled")
    page.call("Input.insertText", text="a.py")
    page.press("Enter")
    page.wait(f"[...document.querySelectorAll('.model')].at(-1).innerText.includes({json.dumps(FOUND)})")
    settled(page)
    assert page.text(".model:last-child .text:not(.thinking .text)") == FOUND
    assert page.value("document.activeElement.id") == "question"
    assert page.text("#status") == FOUND


def test_thinking_is_folded_and_opens_from_the_keyboard(page: Tab):
    ask(page, "Tags?")
    settled(page)
    assert re.fullmatch(r"Thought for \d+\.\d s", page.text(".thinking summary"))
    assert not page.shown(".thinking .text")
    page.value("document.querySelector('.thinking summary').focus()")
    page.press("Enter")
    assert page.shown(".thinking .text") and page.text(".thinking .text") == "<i>hm</i>"


def test_what_a_model_writes_is_text_and_never_html(page: Tab):
    ask(page, "Tags?")
    settled(page)
    assert MARKUP in page.text(".model")
    ask(page, MARKUP)
    settled(page)
    assert page.texts(".user")[1] == MARKUP
    assert page.value("document.querySelectorAll('#log img, #log b, #log i').length") == 0
    assert page.value("document.title") == "Longforge"


def test_an_answer_tells_its_tokens_and_its_speed(page: Tab):
    ask(page, "Tags?")
    settled(page)
    badges = page.texts(".badge")
    assert re.fullmatch(r"\d+ tokens", badges[0])
    assert re.fullmatch(r"\d+(\.\d)? tokens/s", badges[1])
    assert any(re.fullmatch(r"prompt \d+", badge) for badge in badges)


def test_stop_ends_the_request_on_the_server(page: Tab, server: Served):
    server.loop.pause()
    try:
        before = HTTP.get(f"{server.url}/health").json()["cancelled"]
        ask(page, "word " * 60)
        page.wait("!document.querySelector('#stop').hidden")
        while not server.loop.open_requests:
            assert page.shown("#stop")
        page.click("#stop")
        settled(page)
        while server.loop.open_requests:
            assert page.shown("#send")
    finally:
        server.loop.resume()
    health = HTTP.get(f"{server.url}/health").json()
    while health["cancelled"] == before:
        health = HTTP.get(f"{server.url}/health").json()
    assert health["running"] == health["waiting"] == 0
    assert health["free_pages"] + health["cached_pages"] == health["pages"]
    assert page.text(".outcome") == "Stopped." and page.shown("#send")
    ask(page, "Tags?")  # and the page is as usable as before
    page.wait("document.querySelectorAll('.user').length === 2")


def test_escape_stops_an_answer_under_way(page: Tab, server: Served):
    page.fill("#max-tokens", "1900")
    page.fill("#temperature", "0")
    ask(page, "class lines path")
    page.wait("document.querySelector('.model .text')?.textContent.length > 3")
    page.press("Escape")
    settled(page)
    assert page.text(".outcome") == "Stopped."
    while server.loop.open_requests:
        assert page.shown("#send")


def test_a_refused_question_is_told_in_words_and_goes_back_to_be_changed(page: Tab):
    ask(page, "word " * 1000)
    page.wait("document.querySelector('.failure')")
    assert page.text(".failure").startswith("prompt: at most 2048 tokens fit")
    assert page.value("document.querySelector('#question').value").startswith("word word")
    assert page.texts(".user") == []


def test_tools_that_are_no_json_are_told_and_nothing_is_sent(page: Tab):
    page.fill("#tools", '[{"name": "grep"')
    assert page.text("#tools-state").startswith("Tools: this is no JSON")
    ask(page, "Where?")
    page.wait("document.querySelector('.failure')")
    assert not any("completions" in url for url in page.requested())


def test_a_new_chat_forgets_the_old_one(page: Tab):
    ask(page, "Tags?")
    settled(page)
    page.click("#new-chat")
    assert page.texts("article") == [] and page.shown("#welcome")
    offer_grep(page)
    ask(page, "Where?")  # answered as taught only where nothing stands before it
    page.wait("document.querySelector('.call .result')")


def test_the_strip_is_hidden_until_blocks_are_reported(page: Tab):
    assert not page.shown("#strip")
    report = "{blocks: [2, 0, 0, 1], block_size: 128}"
    page.value(f"import('/page/strip.js').then((strip) => strip.showBlocks({report}))")
    assert page.text("#strip-caption").startswith(
        "Attention for the newest token: 2 of 4 blocks of 128 tokens"
    )
    colours = page.value(
        "(c => [0.1, 0.4, 0.6, 0.9].map((x) => [...c.getContext('2d')"
        ".getImageData(x * c.width, 9, 1, 1).data].join()))(document.querySelector('#strip-canvas'))"
    )
    assert colours[1] == colours[2] and len(set(colours)) == 3, "busiest, idle, idle, less busy"


def test_cached_tokens_get_a_badge(page: Tab):
    usage = "{prompt_tokens: 90, completion_tokens: 2, prompt_tokens_details: {cached_tokens: 64}}"
    page.value(
        "Promise.all([import('/page/view.js'), import('/page/conversation.js')]).then(([v, c]) => {"
        f"const answer = new c.Answer(); answer.add({{usage: {usage}}});"
        "new v.AnswerView().end(answer, ''); })"
    )
    assert page.texts(".badge.cached") == ["64 cached"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            '{"a": {"b": [1, "x, {y}: \\" z"]}}',
            '{\n  "a": {\n    "b": [\n      1,\n      "x, {y}: \\" z"\n    ]\n  }\n}',
        ),
        ('{"a": "he', '{\n  "a": "he'),
        ('{"a": [], "b": {}}', '{\n  "a": [],\n  "b": {}\n}'),
        ("{}", "{}"),
        ("{", "{\n  "),
        ("", ""),
    ],
)
def test_arguments_are_indented_also_while_they_grow(page: Tab, text: str, shown: str):
    made = page.value(f"import('/page/conversation.js').then((c) => c.indented({json.dumps(text)}))")
    assert made == shown


class AsksForAKey:
    """Lets nobody without the key to /v1."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = (b"authorization", f"Bearer {KEY}".encode())
        if scope["type"] == "http" and scope["path"].startswith("/v1") and wanted not in scope["headers"]:
            body = json.dumps(error_body("API key: expected a known one", "authentication_error")).encode()
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send)


def test_a_server_with_keys_is_asked_with_the_key_that_was_typed(browser: Browser):
    loop = EngineLoop(Engine(small_model(), pages=60, max_running=2), threads=1)
    guarded = AsksForAKey(create_app(loop, small_tokenizer(), "small"))
    with BackgroundServer(guarded, on_stop=loop.stop) as server:
        tab = browser.open(f"{server.url}/")
        tab.wait("document.querySelector('#key-form')?.hidden === false")
        tab.fill("#key", "wrong")
        tab.press("Enter")
        tab.wait("document.querySelector('.failure')?.innerText.startsWith('API key: expected')")
        tab.fill("#key", KEY)
        tab.press("Enter")
        tab.wait("document.querySelector('#served').innerText.startsWith('small')")
        assert not tab.shown("#key-form")
        assert tab.value("[Object.values(sessionStorage), Object.values(localStorage)]") == [[KEY], []]


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (380, False)])
def test_it_fits_the_window(browser: Browser, server: Served, tmp_path: Path, width: int, dark: bool):
    tab = opened(browser, server.url, width=width, height=800, dark=dark)
    if width < 600:
        assert not tab.shown("#settings")
        tab.click("#show-settings")
    offer_grep(tab)
    if width < 600:
        tab.click("#show-settings")
    ask(tab, "Where?")
    tab.wait("document.querySelector('.call .result')")
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert tab.value("document.querySelector('#composer').getBoundingClientRect().bottom <= innerHeight")
    ground = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 150) == dark


def test_the_files_come_with_a_policy_and_nothing_else_is_served(server: Served):
    for path in ("/", *(f"/page/{name}" for name in TYPES)):
        reply = HTTP.get(f"{server.url}{path}")
        assert reply.status_code == 200, path
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/__init__.py", "/page/..%2Fapp.py", "/page/"):
        assert HTTP.get(f"{server.url}{path}").status_code == 404
    assert {file.name for file in FOLDER.iterdir() if file.is_file()} == {*TYPES, "index.html", "__init__.py"}


def test_the_example_is_what_the_shipped_model_learned():
    example = json.loads((FOLDER / "examples.json").read_text())
    assert example["system"] == SYSTEM_PROMPT
    assert example["tools"] == [tool_body(tool) for tool in TOOL_SPECS]
