"""An endpoint's completions, against a small server that answers well, late, wrongly, and not at all."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prefopt.errors import ConfigError, EndpointError
from prefopt.records import Message
from prefopt.sampling.completions import Completed, Completer, Settings
from prefopt.sampling.endpoint import Endpoint, retry_after

KEY = "sk-very-secret"
Reply = tuple[int, dict[str, str], str]
Play = Callable[[dict[str, Any], int], Reply]


def said(text: str | None, finish: str = "stop", tokens: int | None = 3) -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": finish}
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return 200, {}, json.dumps({"choices": [choice], **usage})


class Server:
    """Answers the n-th request with `play(body, n)` and remembers what was asked."""

    def __init__(self) -> None:
        self.play: Play = lambda body, n: said("fine")
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(body)
                    server.paths.append(self.path)
                    server.keys.append(self.headers["Authorization"])
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                    n = len(server.asked)
                status, headers, text = server.play(body, n)
                with lock:
                    server.busy -= 1
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has stopped waiting

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PREFOPT_API_KEY", raising=False)
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def ask(server: Server, prompts: list[Any], n: int = 1, **options: Any) -> list[list[Completed]]:
    settings = options.pop("settings", Settings(max_new_tokens=7))
    completer: Completer = Endpoint(server.url, "m", **options)  # the call that a local model takes too
    return [list(mine) for mine in completer.complete(prompts, n, settings)]


def refused(server: Server, **options: Any) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        ask(server, ["Who?"], **options)
    assert KEY not in str(caught.value)
    return caught.value


def test_every_sample_is_a_request_with_a_seed_of_its_own(server: Server) -> None:
    server.play = lambda body, n: said(f"{body['messages'][0]['content']} {body['seed']}", "length", None)
    settings = Settings(max_new_tokens=7, temperature=0.5, top_p=0.9, stop=("\n",), seed=3)
    found = ask(server, ["A", (Message("system", "B"), Message("user", "C"))], 3, settings=settings)
    assert [len(mine) for mine in found] == [3, 3]
    texts = [one.text for mine in found for one in mine]
    assert [t[0] for t in texts] == ["A"] * 3 + ["B"] * 3 and len(set(texts)) == 6
    assert found[0][0].finish == "length" and found[0][0].tokens is None
    assert set(server.paths) == {"/v1/chat/completions"} and set(server.keys) == {None}
    (first,) = {tuple(sorted((k, str(v)) for k, v in b.items() if k not in ("messages", "seed"))) for b in server.asked}
    wanted = {"model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"]}
    assert first == tuple(sorted((k, str(v)) for k, v in wanted.items()))
    assert [m["role"] for b in server.asked for m in b["messages"]].count("system") == 3
    again = ask(server, ["A"], 3, settings=settings)
    assert [one.text for one in again[0]] == texts[:3]


def test_text_is_continued_raw_and_takes_no_conversation(server: Server) -> None:
    server.play = lambda body, n: said(f"{body['prompt']}!")
    assert ask(server, ["Once"], form="text") == [[Completed("Once!", "stop", 3)]]
    assert server.paths == ["/v1/completions"]
    with pytest.raises(ConfigError, match="conversation"):
        ask(server, [(Message("user", "Who?"),)], form="text")


def test_no_more_requests_at_once_than_allowed_and_prompts_are_handed_out_as_they_end(server: Server) -> None:
    def play(body: dict[str, Any], n: int) -> Reply:
        time.sleep(0.3 if body["messages"][0]["content"] == "slow" else 0.02)
        return said(body["messages"][0]["content"])

    server.play = play
    handed: list[tuple[int, list[str]]] = []
    endpoint = Endpoint(server.url, "m", concurrency=3)
    found = endpoint.complete(
        ["slow", "b", "c"], 2, Settings(7), on_prompt=lambda n, mine: handed.append((n, [one.text for one in mine]))
    )
    assert server.busiest <= 3 and len(server.asked) == 6
    assert sorted(handed) == [(0, ["slow"] * 2), (1, ["b"] * 2), (2, ["c"] * 2)]
    assert handed[-1][0] == 0
    assert [[one.text for one in mine] for mine in found] == [["slow"] * 2, ["b"] * 2, ["c"] * 2]


@pytest.mark.parametrize(
    "failure", [(429, {"Retry-After": "0"}, "slow down"), (500, {}, "oops"), (503, {"Retry-After": "soon"}, "")]
)
def test_passing_failures_are_tried_again(server: Server, failure: Reply) -> None:
    server.play = lambda body, n: failure if n == 1 else said("fine")
    assert ask(server, ["Who?"])[0][0].text == "fine"
    assert len(server.asked) == 2 and server.asked[0] == server.asked[1]


def test_tries_are_bounded_and_so_is_what_a_server_may_ask_for(server: Server) -> None:
    server.play = lambda body, n: (429, {"Retry-After": "0"}, "slow down")
    error = refused(server, attempts=2)
    assert len(server.asked) == 2 and error.got == "status 429, Retry-After 0: slow down"
    server.play = lambda body, n: (429, {"Retry-After": "3600"}, "tomorrow")
    assert "Retry-After 3600" in str(refused(server, patience=5.0)) and len(server.asked) == 3


def test_a_wait_is_a_number_or_a_date() -> None:
    assert retry_after("7") == 7 and retry_after("-1") == 0
    assert retry_after("soon") is None and retry_after(None) is None
    wait = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert wait is not None and 90 < wait <= 100


def test_a_slow_answer_is_an_error_that_says_so(server: Server) -> None:
    stop = threading.Event()

    def play(body: dict[str, Any], n: int) -> Reply:
        stop.wait(20)
        return said("late")

    server.play = play
    try:
        error = refused(server, timeout=0.2, attempts=2)
    finally:
        stop.set()
    assert len(server.asked) == 2 and error.what == "The endpoint does not answer in time."
    assert error.expected == "an answer within 0.2 s"


def test_no_server_at_all(server: Server) -> None:
    with pytest.raises(EndpointError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "m", attempts=1).complete(["Who?"], 1, Settings(7))


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("<html>hello</html>", "Expecting value"),
        ('{"choices": []}', "index out of range"),
        ('{"choices": [{"message": {}, "finish_reason": "stop"}]}', "no 'content'"),
        ("[1]", "list indices"),
        (said(None)[2], "no text"),
        (said("x", "tool_calls")[2], "finish_reason 'tool_calls'"),
    ],
)
def test_answers_in_another_form(server: Server, body: str, got: str) -> None:
    server.play = lambda _, n: (200, {}, body)
    error = refused(server)
    assert error.where == f"{server.url}/chat/completions" and error.got is not None and got in error.got
    assert len(server.asked) == 1


def test_what_was_held_back_or_thought_away_is_empty(server: Server) -> None:
    for finish, meaning in (("length", "length"), ("content_filter", "filtered")):
        server.play = lambda body, n, finish=finish: said(None, finish)  # type: ignore[misc]
        assert [(one.text, one.finish) for one in ask(server, ["Who?"])[0]] == [("", meaning)]


def test_the_key_comes_from_the_environment_and_is_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_API_KEY", KEY)
    ask(server, ["Who?"])
    server.play = lambda body, n: (401, {}, f"Incorrect API key provided: {KEY}.")
    error = refused(server)
    assert server.keys == [f"Bearer {KEY}"] * 2  # and it was not tried again
    assert "PREFOPT_API_KEY" in str(error.todo) and "***" in str(error.got)
    with pytest.raises(ConfigError, match="MY_KEY"):
        ask(server, ["Who?"], key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "no\u2028key")
    with pytest.raises(ConfigError, match="characters") as caught:
        ask(server, ["Who?"], key_variable="MY_KEY")
    assert "no\u2028key" not in str(caught.value)


def test_newer_servers_get_the_length_by_its_newer_name(server: Server) -> None:
    def play(body: dict[str, Any], n: int) -> Reply:
        if "max_tokens" in body:
            return 400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return said("fine") if body["max_completion_tokens"] == 7 else (400, {}, "what?")

    server.play = play
    ask(server, ["Who?"], 3, concurrency=1)
    assert len(server.asked) == 4  # learnt once
    server.play = lambda body, n: (400, {}, "no such sampler")
    assert refused(server).got == "status 400: no such sampler"


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000/v1", "ftp://host/v1", "http:///v1"),
        *("http://me:pw@host/v1", "ftp://me:pw@host/v1", "me:pw@host", "http://host/v1?api-key=pw"),
    ],
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url, "m")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0.0}, {"patience": -1.0}])
def test_wrong_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        Endpoint("http://host/v1", "m", **wrong)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"stop": ("",)}, {"seed": -1}]
)
def test_settings_out_of_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="out of bounds"):
        Settings(**{"max_new_tokens": 7, **wrong})
