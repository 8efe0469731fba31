"""`make load`: overload an endpoint on loopback for some minutes, and count what became of every request.

A process serves a small carved language model, or a small carved detector, with few open requests allowed (`overload_server.py`), and more clients than that send to it without a
pause. Some go away while they wait, some read a stream. At the end, SIGTERM comes in the middle of the load. A fault is

* a request that gets no answer, two, or the answer of another one: every one is compared with what the server said when it was alone;
* an overload that is answered with anything but 429, or not at all;
* numbers of the server that do not agree with those of the clients;
* a server whose memory grows, that does not end after SIGTERM, or that cuts an answer off.

    python -m faults.overload --minutes 5 --clients 24 --endpoint completions
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Protocol

import torch

from moe_driven import carved_by_context, scan
from moe_served import carved_lm

MOST_REQUESTS = 6
PROMPTS = tuple(f"{word} {number}" for number in range(8) for word in ("north", "south", "east", "west"))
NEW_TOKENS, LAST_TOKENS = 12, 50
MOST_GROWTH_MB = 12.0
"""A fixed sum that allocators and caches may take after the first tenth of the time. Five minutes of a leak are far more."""


@dataclass(kw_only=True)
class OverloadReport:
    """What one campaign found."""

    seconds: float
    """Time under load."""
    ends: Counter[str] = field(default_factory=Counter)
    """Requests of the clients by how they ended."""
    server: dict[str, int] = field(default_factory=dict)
    """Requests by how they ended, as the server's metrics say."""
    memory_mb: tuple[float, ...] = ()
    """Memory of the server after the first tenth of the time, and at the end."""
    open_at_end: int = 0
    """Requests that were open just before SIGTERM was sent."""
    answered_after_end: int = 0
    """Last requests, of the six, that were answered completely and rightly."""
    seconds_to_end: float = 0.0
    """Time from SIGTERM to the end of the process."""
    faults: list[str] = field(default_factory=list)
    """What is wrong; empty if nothing is."""

    def __str__(self) -> str:
        rows = {
            "seconds under load": f"{self.seconds:.0f}",
            "requests": f"{sum(self.ends.values())}: {dict(self.ends)}",
            "the server counts": str(self.server),
            "memory in MB, first and last": " ".join(f"{mb:.1f}" for mb in self.memory_mb),
            "open at SIGTERM": f"{self.open_at_end}; answered of the last {MOST_REQUESTS} requests: {self.answered_after_end}",
            "seconds from SIGTERM to the end": f"{self.seconds_to_end:.2f}",
            "faults": str(len(self.faults)),
        }
        return "\n".join([*(f"{name:32}  {value}" for name, value in rows.items()), *self.faults[:20]])


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request that clients send again and again."""

    path: str
    """Where it is sent."""
    body: bytes
    """What is sent."""
    kind: str
    """Its content type."""
    stream: bool = False
    """Whether the answer comes in parts."""


class Endpoint(Protocol):
    """What differs between the endpoints."""

    def prepare(self, folder: Path) -> None:
        """Write what is served."""

    def questions(self) -> list[Question]:
        """What clients send: questions whose answers can be told apart."""

    def streamed(self, question: Question) -> Question:
        """The same question with an answer in parts, where the endpoint has such answers."""

    def long(self) -> Question:
        """What is open when SIGTERM comes."""

    def read(self, question: Question, data: str) -> tuple[str, str]:
        """The content of an answer and its name."""


class Completions:
    """`/v1/completions` of a small language model."""

    def prepare(self, folder: Path) -> None:
        carved_lm(folder)

    def questions(self) -> list[Question]:
        return [self._ask(prompt, NEW_TOKENS) for prompt in PROMPTS]

    def streamed(self, question: Question) -> Question:
        body = json.dumps(json.loads(question.body) | {"stream": True})
        return replace(question, body=body.encode(), stream=True)

    def long(self) -> Question:
        return self._ask(PROMPTS[0], LAST_TOKENS)

    def read(self, question: Question, data: str) -> tuple[str, str]:
        return read_stream(data) if question.stream else read_whole(data)

    def _ask(self, prompt: str, new_tokens: int) -> Question:
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": False}
        return Question(path="/v1/completions", body=json.dumps(body).encode(), kind="application/json")


class Detections:
    """`/v1/detections` of a small detector with two driving contexts, of which one fits into memory."""

    def prepare(self, folder: Path) -> None:
        carved_by_context(folder)

    def questions(self) -> list[Question]:
        return [self._ask(context, seed) for context in range(2) for seed in range(8)]

    def streamed(self, question: Question) -> Question:
        return question

    def long(self) -> Question:
        return self._ask(0, 0)

    def read(self, question: Question, data: str) -> tuple[str, str]:
        answer = json.loads(data)
        return json.dumps({name: value for name, value in answer.items() if name != "id"}, sort_keys=True), answer["id"]

    def _ask(self, context: int, seed: int) -> Question:
        cloud = scan(context, seed)
        rows = torch.cat([cloud.xyz, cloud.features], 1).numpy().astype("<f4")
        return Question(path="/v1/detections", body=rows.tobytes(), kind="application/octet-stream")


ENDPOINTS: dict[str, Endpoint] = {"completions": Completions(), "detections": Detections()}


class Campaign:
    """One server and its clients."""

    def __init__(self, folder: Path, endpoint: Endpoint, *, clients: int, seed: int) -> None:
        self.folder, self.endpoint, self.count, self.seed = folder, endpoint, clients, seed
        self.questions, self.log = endpoint.questions(), folder.with_name("server.log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.stop, self.lock = Event(), Lock()
        self.ids: Counter[str] = Counter()
        self.expected: dict[Question, str] = {}

    def run(self, seconds: float) -> OverloadReport:
        """Serve, overload, end."""
        report = OverloadReport(seconds=seconds)
        with self.log.open("w") as log:
            words = [sys.executable, "-m", "faults.overload_server", str(self.folder), str(self.port), str(MOST_REQUESTS)]
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1])
        try:
            self._await_server(process)
            self.expected = {question: self.ask(question)[1] for question in self.questions}
            threads = [Thread(target=self._client, args=(n, report)) for n in range(self.count)]
            for thread in threads:
                thread.start()
            time.sleep(seconds / 10)
            first = memory_of(process.pid)
            time.sleep(0.9 * seconds)
            report.memory_mb = (first, memory_of(process.pid))
            self.stop.set()
            for thread in threads:
                thread.join()
            report.server = self._counts()
            self._end(process, report)
        finally:
            self.stop.set()
            process.kill()
            process.wait()
        report.faults += self._faults(report, process.returncode)
        return report

    def ask(self, question: Question, *, patience: float | None = None) -> tuple[str, str, str]:
        """Send one request.

        Returns:
            How it ended, its content, and the name of the answer. `gone` is a request that this client gave up after `patience` seconds.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60 if patience is None else patience)
        try:
            connection.request("POST", question.path, question.body, {"Content-Type": question.kind})
            answer = connection.getresponse()
            data = answer.read().decode()
            if answer.status != 200:
                good = answer.getheader("Retry-After") and "error" in json.loads(data)
                return (f"{answer.status}" if good else f"{answer.status} without a reason"), "", ""
            return "served", *self.endpoint.read(question, data)
        except TimeoutError:
            return ("gone" if patience is not None else "no answer"), "", ""
        except (ConnectionError, http.client.HTTPException) as error:
            return f"cut off: {type(error).__name__}", "", ""
        finally:
            connection.close()

    def _client(self, number: int, report: OverloadReport) -> None:
        """Send requests until the campaign stops, and note how each ended."""
        draw = random.Random(self.seed * 1000 + number)
        while not self.stop.is_set():
            question, kind = draw.choice(self.questions), draw.random()
            sent = self.endpoint.streamed(question) if kind < 0.2 else question
            end, text, name = self.ask(sent, patience=draw.uniform(0.002, 0.03) if kind > 0.9 else None)
            with self.lock:
                report.ends[end] += 1
                self.ids.update([name] if name else [])
                if end == "served" and text != self.expected[question]:
                    asked = self.questions.index(question)
                    report.faults.append(f"the answer to question {asked} was {text!r}, and alone {self.expected[question]!r}")
            if end == "429":
                time.sleep(draw.uniform(0.0, 0.01))

    def _end(self, process: subprocess.Popen[bytes], report: OverloadReport) -> None:
        """Send as many long requests as the server takes, and SIGTERM while they are served."""
        last = self.endpoint.long()
        alone = self.ask(last)[1]
        answers: list[tuple[str, str, str]] = []
        threads = [Thread(target=lambda: answers.append(self.ask(last))) for _ in range(MOST_REQUESTS)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 5
        while self._open() < MOST_REQUESTS and time.monotonic() < until and not answers:
            time.sleep(0.002)
        report.open_at_end = self._open()
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            report.faults.append("the server did not end within 20 s after SIGTERM")
        report.seconds_to_end = time.monotonic() - begin
        for thread in threads:
            thread.join()
        report.answered_after_end = sum(end == "served" and text == alone for end, text, _ in answers)
        self.ids.update(name for _, _, name in answers if name)

    def _faults(self, report: OverloadReport, code: int) -> list[str]:
        ends, server = report.ends, report.server
        found = [f"{count} requests ended with {end!r}" for end, count in ends.items() if end not in ("served", "429", "gone")]
        found += [f"the answer {name} came {count} times" for name, count in self.ids.items() if count > 1]
        alone, gone = len(self.questions), ends["gone"]
        sent = sum(ends.values()) + alone
        checks = {
            "nothing was overloaded, so nothing was tested": ends["429"] > 0 and ends["served"] > 0,
            "served requests and answers differ": 0 <= server["served"] - alone - ends["served"] <= gone,
            "refusals of the server and of the clients differ": 0 <= server["overloaded"] - ends["429"] <= gone,
            "more requests were sent than the server knows": 0 <= sent - sum(server.values()) <= gone,
            "requests failed": server["failed"] == server["refused"] == server["late"] == 0,
            f"memory grew from {report.memory_mb[0]:.1f} to {report.memory_mb[1]:.1f} MB": report.memory_mb[1]
            <= report.memory_mb[0] + MOST_GROWTH_MB,
            f"the server ended with code {code}": code == 0,
            "nothing was open at SIGTERM, so nothing was tested": report.open_at_end > 0,
            "an answer was cut off by SIGTERM": report.answered_after_end == MOST_REQUESTS,
            "the server did not print its report": "requests served" in self.log.read_text(),
        }
        return found + [text for text, good in checks.items() if not good]

    def _counts(self) -> dict[str, int]:
        """The server's own numbers, when nothing is open any more."""
        until = time.monotonic() + 10
        while self._open() and time.monotonic() < until:
            time.sleep(0.01)
        found = re.findall(r'^upcycle3d_moe_requests_total\{status="(\w+)"\} (\S+)', self._get("/metrics"), re.MULTILINE)
        return {name: int(float(value)) for name, value in found}

    def _open(self) -> int:
        (found,) = re.findall(r"^upcycle3d_moe_open_requests (\S+)", self._get("/metrics"), re.MULTILINE)
        return int(float(found))

    def _get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def _await_server(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            try:
                self._get("/health")
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"the server did not start: {self.log.read_text()[-2000:]}")


def read_whole(data: str) -> tuple[str, str]:
    """Text and name of a whole answer."""
    answer = json.loads(data)
    return answer["choices"][0]["text"], answer["id"]


def read_stream(data: str) -> tuple[str, str]:
    """Text and name of an answer in parts, which must be complete."""
    events = [line.removeprefix("data: ") for line in data.splitlines() if line]
    if events[-1] != "[DONE]":
        return "a stream without its end", ""
    parts = [json.loads(event) for event in events[:-1]]
    names = {part.get("id", "") for part in parts}
    return "".join(part["choices"][0]["text"] for part in parts), names.pop() if len(names) == 1 else "several names"


def memory_of(pid: int) -> float:
    """Resident memory of a process in megabytes."""
    (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kilobytes) / 1000


def overload(seconds: float, endpoint: Endpoint, *, clients: int = 16, seed: int = 0) -> OverloadReport:
    """Run one campaign in a folder of its own."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "served"
        folder.mkdir()
        endpoint.prepare(folder)
        return Campaign(folder, endpoint, clients=clients, seed=seed).run(seconds)


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="faults.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endpoint", choices=list(ENDPOINTS), default="completions")
    options = parser.parse_args()
    report = overload(60 * options.minutes, ENDPOINTS[options.endpoint], clients=options.clients, seed=options.seed)
    print(report)
    return int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main())
