"""The completion endpoint: texts are the model's, wrong input is named, overload is refused with the bound, who leaves is cancelled."""

import asyncio
import json
import time
from threading import Event

import pytest
import torch

from moe_served import GREEDY, LetterCoder, Told, carved_lm
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.perception.moe.runtime.requests import QueueClosed, QueueFull
from upcycle3d.perception.moe.runtime.scheduling import BatchLimits, first_in_first_out
from upcycle3d.perception.moe.serving.completion_calls import read_call
from upcycle3d.perception.moe.serving.completion_server import CompletionServer, ServingConfig
from upcycle3d.perception.moe.serving.completions import completions_app
from upcycle3d.perception.moe.serving.http_errors import UnknownModel, error_json, status_of
from upcycle3d.perception.moe.serving.llama_engine import Completion, LlamaLimits
from upcycle3d.perception.moe.serving.served_models import open_served

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return carved_lm(tmp_path_factory.mktemp("small"))


class Held:
    """A policy that waits until it may go on, so that a test decides what happens meanwhile."""

    def __init__(self) -> None:
        self.free = Event()
        self.free.set()

    def __call__(self, waiting, batch) -> None:
        assert self.free.wait(20)
        first_in_first_out(waiting, batch)


def server_of(small, policy=first_in_first_out, **changed) -> CompletionServer:
    config = ServingConfig(**{"budget": 10**6, "policy": policy, "batch": BatchLimits(tokens=32), **changed})
    return CompletionServer(open_served(small.folder), LetterCoder(), config)


def text_of(small, prompt: str, count: int) -> str:
    return LetterCoder().decode(small.greedy(LetterCoder().encode(prompt), count))


def until(ready) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.002)


class Client:
    """Calls an application as a server does, and may leave."""

    def __init__(self, app, path: str, body=None, *, method: str = "POST") -> None:
        self.app, self.left = app, None
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.body = data if method == "POST" else b""
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [],
            "query_string": b"",
            "asgi": {"version": "3.0"},
        }
        self.status, self.headers, self.parts = None, {}, []

    async def run(self) -> "Client":
        self.left, asked = asyncio.Event(), False

        async def receive():
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": self.body}
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
            else:
                self.parts.append(message.get("body", b""))

        await self.app(self.scope, receive, send)
        return self

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)

    @property
    def events(self) -> list:
        lines = [line.removeprefix("data: ") for line in self.data.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def ask(app, body, path: str = "/v1/completions", **how) -> Client:
    return asyncio.run(Client(app, path, body, **how).run())


# ---- the JSON


def test_a_call_is_read_completely_or_refused_with_the_field():
    coder = LetterCoder()

    def read(**fields):
        return read_call(json.dumps(fields).encode(), model="small", coder=coder)

    call = read(prompt="ab", model="small", max_tokens=3, temperature=0, seed=4, stop="c", n=1, logprobs=None, user="me")
    assert (call.prompts, call.new_tokens, call.stop, call.stream) == (((0, 1),), 3, ("c",), False)
    assert (call.samplings[0].temperature, call.samplings[0].seed) == (0, 4)
    assert read(prompt=[0, 1]).prompts == ((0, 1),)
    assert read(prompt=[[0], [1, 2]]).prompts == ((0,), (1, 2))
    two = read(prompt=["a", "b"], seed=7)
    assert [s.seed for s in two.samplings] == [7, 8]
    assert read(prompt="a").new_tokens == 16
    assert read(prompt="a").samplings[0].seed != read(prompt="a").samplings[0].seed
    for fields, message in (
        ({}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [0, "a"]}, "found 0 in it"),
        ({"prompt": [True]}, "prompt must be"),
        ({"prompt": ""}, "has no token"),
        ({"prompt": "?"}, "the tokenizer cannot read"),
        ({"prompt": ["a"] * 65}, "64 prompts"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be 1"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "a", "temperature": -1}, "temperature must be in"),
        ({"prompt": "a", "top_p": 0}, "top_p must be in"),
        ({"prompt": "a", "seed": -2}, "seed must be in"),
        ({"prompt": "a", "stop": [1]}, "stop must be"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop must be"),
        ({"prompt": "a", "stream": 1}, "stream must be true or false"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "include_usage only"),
        ({"prompt": "a", "n": 2}, "cannot obey n=2"),
        ({"prompt": "a", "logprobs": 5}, "cannot obey logprobs"),
        ({"prompt": "a", "echo": True}, "cannot obey echo"),
        ({"prompt": "a", "temprature": 0}, "does not know the field 'temprature'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            read(**fields)
    with pytest.raises(UnknownModel, match="this server has 'small'"):
        read(prompt="a", model="large")
    for body in (b"", b"[1]", b"{", b'{"prompt": "a", "prompt": "b"}', b'{"temperature": NaN}'):
        with pytest.raises(InvalidInput, match="the body of the request"):
            read_call(body, model="small", coder=coder)


def test_errors_say_what_may_be_said():
    cases = [
        (UnknownModel("x"), 404),
        (QueueFull("x"), 429),
        (QueueClosed("x"), 503),
        (InvalidInput("x"), 400),
        (OSError("x"), 500),
    ]
    assert [status_of(error) for error, _ in cases] == [status for _, status in cases]
    assert error_json(QueueFull("the bound is 4"), 429)["error"]["message"] == "the bound is 4"
    assert "secret" not in json.dumps(error_json(ValueError("secret"), 500))


# ---- the server without HTTP


def test_a_server_serves_closes_and_refuses_afterwards(small):
    for whole in (True, False):
        server = server_of(small, whole=whole)
        assert server.healthy
        ends, told = [], Told()
        prompt = tuple(LetterCoder().encode("read"))
        server.send(Completion(prompt=prompt, sampling=GREEDY, told=told), new_tokens=5, ended=ends.append)
        report = server.close()
        assert (report.served, report.queue.open) == (1, 0)
        assert told.text == text_of(small, "read", 5)
        assert ends[0].status == "served"
        assert not server.healthy
        with pytest.raises(QueueClosed):
            server.send(Completion(prompt=prompt, told=told), new_tokens=5, ended=ends.append)
        assert server.close().served == 1
        assert server.resident_bytes == 0


def test_closing_without_grace_refuses_what_is_open_and_frees_everything(small):
    held = Held()
    server, ends = server_of(small, policy=held), []
    held.free.clear()
    for _ in range(3):
        server.send(Completion(prompt=(1, 2), told=Told()), new_tokens=50, ended=ends.append)
    held.free.set()
    server.close(grace=0)
    assert len(ends) == 3
    assert {end.status for end in ends} <= {"refused", "served"}
    assert any(end.status == "refused" for end in ends)
    assert server._computation.budget.reserved == 0


def test_an_engine_that_breaks_ends_all_requests_and_says_so(small):
    def broken(waiting, batch) -> None:
        raise ValueError("a policy with a fault")

    server, ends = server_of(small, policy=broken), []
    server.send(Completion(prompt=(1, 2), told=Told()), new_tokens=2, ended=ends.append)
    server._thread.join(20)
    assert ends[0].status == "failed"
    with pytest.raises(QueueClosed, match="a policy with a fault"):
        server.send(Completion(prompt=(1, 2), told=Told()), new_tokens=2, ended=ends.append)
    with pytest.raises(UpcycleError, match="a policy with a fault"):
        server.close()


def test_a_budget_that_holds_no_piece_is_refused_before_anything_is_served(small):
    with pytest.raises(InvalidInput, match="raise the budget"):
        server_of(small, budget=10)


# ---- the endpoints


@pytest.fixture
def starlette():
    return pytest.importorskip("starlette", reason="starlette is not installed; the extra `serve` brings it")


def test_completions_have_the_form_and_the_text(small, starlette):
    server = server_of(small)
    app = completions_app(server)
    got = ask(app, {"prompt": ["read", "me"], "temperature": 0, "max_tokens": 6})
    answer = json.loads(got.data)
    assert got.status == 200
    assert [c["text"] for c in answer["choices"]] == [text_of(small, "read", 6), text_of(small, "me", 6)]
    assert [c["finish_reason"] for c in answer["choices"]] == ["length"] * 2
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    assert (answer["object"], answer["model"]) == ("text_completion", "small")
    body = {
        "prompt": ["read", "me"],
        "temperature": 0,
        "max_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    got = ask(app, body)
    assert got.headers["content-type"].startswith("text/event-stream")
    texts = {0: "", 1: ""}
    for event in got.events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(texts.values()) == [text_of(small, "read", 6), text_of(small, "me", 6)]
    assert got.events[-1]["usage"] == answer["usage"]
    same = [json.loads(ask(app, {"prompt": "me", "seed": 3, "max_tokens": 5}).data)["choices"][0]["text"] for _ in range(2)]
    assert same[0] == same[1]
    models = json.loads(ask(app, None, "/v1/models", method="GET").data)
    assert [m["id"] for m in models["data"]] == ["small"]
    assert ask(app, None, "/health", method="GET").status == 200
    assert ask(app, None, "/nothing", method="GET").status == 404
    metrics = ask(app, None, "/metrics", method="GET")
    assert metrics.status == 501 or b'upcycle3d_moe_requests_total{status="served"} 6' in metrics.data.replace(b".0", b"")
    server.close()
    assert ask(app, None, "/health", method="GET").status == 503
    late = ask(app, {"prompt": "me"})
    assert (late.status, late.headers["retry-after"]) == (503, "1")


def test_bad_input_and_overload_are_answered_with_what_was_wrong(small, starlette):
    held = Held()
    server = server_of(small, policy=held, most_requests=2, memory=LlamaLimits(longest=40, cache_bytes=10**6))
    app = completions_app(server)
    for body, status, message in (
        ({"prompt": "a", "n": 3}, 400, "cannot obey n=3"),
        ({"prompt": "a", "model": "other"}, 404, "there is no model"),
        ({"prompt": "a", "max_tokens": 50}, 400, "longer than the 40 tokens"),
        ({"prompt": "a" * 35, "max_tokens": 2}, 400, "a batch holds 32"),
        (b"x" * (5 << 20), 413, "more than 4,194,304 bytes"),
    ):
        got = ask(app, body)
        assert got.status == status
        assert message in json.loads(got.data)["error"]["message"]
    held.free.clear()
    ends = []
    for _ in range(2):
        server.send(Completion(prompt=(1,), told=Told()), new_tokens=2, ended=ends.append)
    got = ask(app, {"prompt": "a"})
    assert (got.status, got.headers["retry-after"]) == (429, "1")
    assert "the bound is 2" in json.loads(got.data)["error"]["message"]
    held.free.set()
    until(lambda: len(ends) == 2)
    held.free.clear()
    got = ask(app, {"prompt": ["a", "b", "c"], "stream": True})  # two fit; all are taken, or none
    assert got.status == 429
    held.free.set()
    until(lambda: server.report().queue.open == 0)
    report = server.close()
    assert report.cancelled == 2
    assert server._computation.budget.reserved == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(small, starlette, stream):
    held = Held()
    server = server_of(small, policy=held)
    app = completions_app(server)

    async def leave() -> Client:
        held.free.clear()
        client = Client(app, "/v1/completions", {"prompt": "read", "max_tokens": 30, "stream": stream})
        task = asyncio.ensure_future(client.run())
        while not server.report().queue.open:
            await asyncio.sleep(0.002)
        client.left.set()
        await task
        held.free.set()
        return client

    client = asyncio.run(leave())
    assert client.status == (200 if stream else 499)
    until(lambda: server.report().queue.open == 0)
    report = server.close()
    assert (report.cancelled, report.served) == (1, 0)
    assert server._computation.budget.reserved == 0


def test_a_request_that_fails_gives_an_error_in_both_forms(small, starlette):
    server = server_of(small)
    app = completions_app(server)
    server._computation._decoder.logits = lambda hidden: torch.full((len(hidden), 40), torch.nan)
    got = ask(app, {"prompt": "read"})
    assert got.status == 500
    assert "NaN or infinite logits" in json.loads(got.data)["error"]["message"]
    got = ask(app, {"prompt": "read", "stream": True})
    assert "NaN or infinite logits" in got.events[-1]["error"]["message"]
    assert server.close().failed == 2


def test_the_application_closes_its_server(small, starlette):
    server = server_of(small)
    app = completions_app(server)
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def run() -> None:
        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message["type"])

        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)

    asyncio.run(run())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert not server.healthy
