"""A carved detector from frames to an answered request: what the folder holds, what the command says, and what the endpoint refuses."""

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

import tiny
from moe_driven import CONTEXT_NAMES, CarvedByContext, carved_by_context, scan
from moe_served import listening
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.narrow import NarrowDetectorConfig
from upcycle3d.perception.moe.carving.splits import random_units
from upcycle3d.perception.moe.driving.carved_folder import (
    CONTEXTS,
    GATE_FILE,
    is_carved_detector,
    open_carved_detector,
    write_carved_detector,
)
from upcycle3d.perception.moe.driving.channel_carving import measure_channels, narrow_detector
from upcycle3d.perception.moe.driving.context_gate import Hysteresis, fit_context_gate
from upcycle3d.perception.moe.driving.context_store import ContextStore
from upcycle3d.perception.moe.driving.detection_server import DetectionServer
from upcycle3d.perception.moe.driving.detections import detections_app, scan_of_body
from upcycle3d.perception.moe.driving.scan_descriptor import ScanDescriptorConfig, describe_scan
from upcycle3d.perception.moe.runtime.requests import QueueFull
from upcycle3d.perception.moe.runtime.scheduling import first_in_first_out
from upcycle3d.perception.moe.serving.engine_server import RuntimeConfig
from upcycle3d.perception.recipes.carve_contexts import ContextCarvingConfig, carve_contexts
from upcycle3d.perception.training.detector_files import DETECTOR_FILE, load_detector, save_run_detector
from upcycle3d.tools import evaluate, moe_carve, moe_serve, predict
from upcycle3d.tools.console import run_command

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> CarvedByContext:
    return carved_by_context(tmp_path_factory.mktemp("carved") / "model")


@pytest.fixture(scope="module")
def dense(made):
    return made.dense


@pytest.fixture(scope="module")
def carving(made):
    return made.carving


@pytest.fixture(scope="module")
def folder(made) -> Path:
    return made.folder


def same(found, wanted) -> bool:
    return torch.equal(found.boxes.data, wanted.boxes.data) and torch.equal(found.scores, wanted.scores)


# ---- the folder


def test_the_folder_holds_ordinary_detectors_and_gives_everything_back(folder, dense, carving):
    opened = open_carved_detector(folder)
    assert (opened.gate.contexts, opened.columns) == (CONTEXT_NAMES, ("x", "y", "z", "intensity"))
    assert opened.description.note == "a test"
    for number, name in enumerate(CONTEXT_NAMES):
        loaded = load_detector(folder / CONTEXTS / name)
        assert isinstance(loaded.config, NarrowDetectorConfig)
        assert same(loaded.detect(scan(0)), narrow_detector(dense, carving, number).detect(scan(0)))
        assert encoder_fingerprint(loaded.encoder, RigSpec()) == encoder_fingerprint(dense.encoder, RigSpec())
    whole = sum(t.nbytes for t in loaded.state_dict().values())
    assert opened.common_bytes + opened.context_bytes == whole
    opened.close()


def test_a_pv_rcnn_is_carved_alike(tmp_path):
    """Keypoints and two branches: the store's detector finds what the narrow one finds."""
    detector, config = tiny.pv_rcnn().eval(), ScanDescriptorConfig()
    with torch.no_grad():
        scenes = {name: [detector.encode([scan(n)])] for n, name in enumerate(CONTEXT_NAMES)}
    carved = random_units(measure_channels(detector, scenes, least_tokens=1), 0.5, seed=1)
    scans = {name: [describe_scan(scan(n, s), config) for s in range(2)] for n, name in enumerate(CONTEXT_NAMES)}
    write_carved_detector(tmp_path / "pv", detector, carved, fit_context_gate(scans, config), hysteresis=Hysteresis())
    store = ContextStore(open_carved_detector(tmp_path / "pv"))
    for number in (1, 0):
        store.load(number)
        assert same(store.use(number).detect(scan(0)), narrow_detector(detector, carved, number).detect(scan(0)))
    store.close()


def test_files_of_two_carvings_are_not_mixed_up(folder, dense, carving, tmp_path):
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    save_run_detector(mixed / CONTEXTS / "far", narrow_detector(dense, carving, 0))
    with pytest.raises(InvalidInput, match="is not the file that"):
        open_carved_detector(mixed)
    (mixed / CONTEXTS / "far" / DETECTOR_FILE).unlink()
    with pytest.raises(InvalidInput, match="there is no detector of this program"):
        open_carved_detector(mixed)
    (mixed / GATE_FILE).unlink()
    assert not is_carved_detector(mixed)
    assert is_carved_detector(folder)
    with pytest.raises(InvalidInput, match="there is no gate of a carved detector"):
        open_carved_detector(mixed)
    gate = open_carved_detector(folder).gate
    with pytest.raises(InvalidInput, match="is there already and is not empty"):
        write_carved_detector(folder, dense, carving, gate, hysteresis=Hysteresis())
    whole = random_units(measure_channels(dense, {n: [dense.encode([scan(0)])] for n in CONTEXT_NAMES}), 1.0, seed=0)
    with pytest.raises(InvalidInput, match="leaves nothing out"):
        write_carved_detector(tmp_path / "whole", dense, whole, gate, hysteresis=Hysteresis())
    assert not (tmp_path / "whole").exists()


def test_a_store_switches_contexts_without_a_copy_and_frees_what_is_dropped(folder):
    opened = open_carved_detector(folder)
    store = ContextStore(opened)
    wanted = [load_detector(folder / CONTEXTS / name).detect(scan(0)) for name in CONTEXT_NAMES]
    assert (store.resident_bytes, store.bytes_of(1)) == (0, opened.context_bytes)
    with pytest.raises(InvalidInput, match="must be held while it is used"):
        store.use(0)
    store.load(0)
    store.load(1)
    assert store.resident_bytes == 2 * opened.context_bytes
    slot = dict(opened.detector.named_parameters())[next(n for n in opened.changing if n.endswith("weight"))]
    seen = set()
    for context in (0, 1, 1, 0):
        assert same(store.use(context).detect(scan(0)), wanted[context])
        seen.add(slot.data_ptr())
    assert len(seen) == 2  # the tensors themselves, not copies of them
    store.drop(0)
    assert (store.resident_bytes, slot.numel()) == (opened.context_bytes, 0)
    assert same(store.use(1).detect(scan(0)), wanted[1])
    with pytest.raises(InvalidInput, match="the context 0 is not in memory"):
        store.drop(0)
    store.close()


# ---- the server


def server_of(folder: Path, policy=first_in_first_out, **changed) -> DetectionServer:
    opened = open_carved_detector(folder)
    return DetectionServer(opened, RuntimeConfig(**{"budget": opened.context_bytes, "policy": policy, **changed}))


@pytest.mark.parametrize("contexts", [1, 2])
def test_every_scan_is_answered_as_its_context_alone_answers(folder, contexts):
    """With memory for one context or for both, scans in mixed order find what the detectors of their contexts find."""
    size = open_carved_detector(folder).context_bytes
    server, ends, found = server_of(folder, budget=contexts * size), [], {}
    order = [0, 1, 1, 0, 1, 0]
    for number, context in enumerate(order):
        server.send(scan(context, number), told=lambda f, n=number: found.setdefault(n, f), ended=ends.append)
    report = server.close()
    assert [end.status for end in ends] == ["served"] * 6
    for number, context in enumerate(order):
        assert found[number].context == context
        assert same(
            found[number].objects, load_detector(folder / CONTEXTS / CONTEXT_NAMES[context]).detect(scan(context, number))
        )
    assert report.memory.most_bytes <= contexts * size
    assert report.memory.demand_bytes + report.memory.ahead_bytes >= 2 * size


def test_a_budget_below_one_context_is_refused(folder):
    with pytest.raises(InvalidInput, match=r"each context has .* bytes, and the budget is 1,000; raise it"):
        server_of(folder, budget=1000)


class Blocked:
    """A policy that waits until it may go on."""

    def __init__(self) -> None:
        self.free = Event()

    def __call__(self, waiting, batch) -> None:
        assert self.free.wait(20)
        first_in_first_out(waiting, batch)


class Call:
    """One request to an application, as a server makes it."""

    def __init__(self, app, path: str, body: bytes = b"", *, method: str = "POST", **headers: str) -> None:
        self.app, self.body, self.read = app, body, False
        listed = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "method": method, "path": path, "headers": listed, "query_string": b""}
        self.scope["asgi"] = {"version": "3.0"}
        self.status, self.headers, self.parts = 0, {}, []

    async def run(self) -> "Call":
        async def receive():
            if not self.read:
                self.read = True
                return {"type": "http.request", "body": self.body, "more_body": False}
            await asyncio.sleep(60)

        async def send(message):
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                self.parts.append(message.get("body", b""))

        await asyncio.wait_for(self.app(self.scope, receive, send), 20)
        return self

    @property
    def json(self):
        return json.loads(b"".join(self.parts))


def bytes_of(points: PointCloud) -> bytes:
    return torch.cat([points.xyz, points.features], 1).numpy().astype("<f4").tobytes()


def test_a_request_is_answered_with_boxes_and_wrong_ones_are_named(folder):
    pytest.importorskip("starlette", reason="starlette is not installed; the extra `serve` brings it")
    server = server_of(folder)
    app = detections_app(server, most_points=300)

    async def ask(body: bytes = b"", path: str = "/v1/detections", **more) -> Call:
        return await Call(app, path, body, **more).run()

    async def talk() -> None:
        asked = scan(1, 3)
        answer = (await ask(bytes_of(asked))).json
        wanted = load_detector(folder / CONTEXTS / "far").detect(asked)
        assert (answer["context"], answer["points"], answer["model"]) == ("far", len(asked), server.opened.digest)
        assert set(answer["labels"]) == {"Car"}
        assert len(answer["boxes"]) == len(answer["scores"]) == len(wanted)
        np.testing.assert_allclose(answer["boxes"], wanted.boxes.data.numpy(), atol=6e-4)
        np.testing.assert_allclose(answer["scores"], wanted.scores.numpy(), atol=6e-5)
        for body, headers, status, said in (
            (b"", {}, 400, "the body is empty"),
            (b"x" * 17, {}, 400, "17 bytes, which is no whole number of points of 16 bytes"),
            (np.float32([[1, 2, np.nan, 0]]).tobytes(), {}, 400, "1 of 1 points hold NaN or inf"),
            (np.float32([[1, 2, 3, 200]]).tobytes(), {}, 400, "intensity must lie in 0..1"),
            (b"{}", {"content_type": "application/json"}, 400, "must be the numbers themselves"),
            (b"0" * 16 * 301, {}, 413, "more than 4,800 bytes; send one scan of at most 300 points"),
        ):
            refused = await ask(body, **headers)
            assert refused.status == status
            assert said in refused.json["error"]["message"]
        told = await ask(b"0", content_length="99999999")
        assert (told.status, told.read) == (413, False)  # refused before a byte was read
        model = (await ask(path="/v1/models", method="GET")).json["data"][0]
        assert (model["columns"], model["contexts"]) == (["x", "y", "z", "intensity"], ["near", "far"])
        assert (await ask(path="/health", method="GET")).json == {"status": "ok"}
        assert (await ask(path="/metrics", method="GET")).status in (200, 501)
        assert (await ask(path="/v1/detections", method="GET")).status == 405

    asyncio.run(talk())
    server.close()
    assert not server.healthy


def test_overload_is_refused_with_the_bound(folder):
    pytest.importorskip("starlette", reason="starlette is not installed; the extra `serve` brings it")
    policy = Blocked()
    server = server_of(folder, policy, most_requests=2)
    app, body = detections_app(server), bytes_of(scan(0))

    async def talk() -> list[Call]:
        running = [asyncio.ensure_future(Call(app, "/v1/detections", body).run()) for _ in range(2)]
        while server.report().queue.open < 2:
            await asyncio.sleep(0.01)
        refused = await Call(app, "/v1/detections", body).run()
        assert refused.status == 429
        assert "the bound is 2" in refused.json["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        with pytest.raises(QueueFull):
            server.send(scan(0), told=print, ended=print)
        policy.free.set()
        return list(await asyncio.gather(*running))

    assert [call.status for call in asyncio.run(talk())] == [200, 200]
    report = server.close()
    assert (report.served, report.queue.overloaded) == (2, 2)


def test_bodies_are_little_endian_rows():
    rows = np.float32([[1, -2, 3, 0.5], [4, 5, 6, 0.25]])
    found = scan_of_body(rows.astype("<f4").tobytes(), ("x", "y", "z", "intensity"))
    assert found.xyz.tolist() == rows[:, :3].tolist()
    assert found.features[:, 0].tolist() == [0.5, 0.25]
    assert scan_of_body(rows[:, :3].astype("<f4").tobytes(), ("x", "y", "z")).feature_names == ()


# ---- the commands


@pytest.fixture(scope="module")
def job(dense, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("job")
    save_run_detector(place / "run", dense)
    for name in CONTEXT_NAMES:
        tiny.prepared(place / name)
    return place


def words(job: Path, out: str, *more: str) -> list[str]:
    contexts = [f"{name}={job / name}:train" for name in CONTEXT_NAMES]
    return [str(job / "run"), "--contexts", *contexts, "--out", str(job / out), *more]


def test_from_frames_to_an_answered_request(job, capsys):
    """Carve with a recovery, score, then serve the folder over a real socket and ask it."""
    validation = ["--validation", *(f"{name}={job / name}:val" for name in CONTEXT_NAMES)]
    options = ["--ratio", "0.5", "--steps", "2", "--frames", "4", *validation, "--json", str(job / "n.json")]
    assert run_command(moe_carve.command, words(job, "carved", *options)) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert "readme: 2 contexts (near, far), ratio 0.5" in said
    assert "dense, " in said
    numbers = json.loads((job / "n.json").read_text())
    assert set(numbers["scores"]["near"]) == {"dense", "pooled", "carved", "worst"}
    assert numbers["parameters"]["carved"] < numbers["parameters"]["dense"]
    detector = load_detector(job / "carved" / CONTEXTS / "near")
    start = load_detector(job / "run")
    trained = detector.decoder.anchor_head.conv_cls.weight
    assert not torch.equal(trained, start.decoder.anchor_head.conv_cls.weight)  # the recovery trained the decoder
    assert encoder_fingerprint(detector.encoder, RigSpec()) == encoder_fingerprint(start.encoder, RigSpec())
    assert run_command(moe_carve.command, words(job, "carved")) == 2  # a result is never overwritten
    assert "is not empty" in " ".join(capsys.readouterr().err.split())
    pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra `serve` brings it")
    config = moe_serve.MoeServe(folder=job / "carved", budget="1MB")
    settings = moe_serve.detector_config(config)
    opened = open_carved_detector(config.folder)
    assert "float32 rows of x, y, z, intensity in the frame of the sensor" in moe_serve.describe_detector(opened, settings)
    server = DetectionServer(opened, settings)
    with listening(detections_app(server)) as address:
        call = urllib.request.Request(f"{address}/v1/detections", bytes_of(scan(0)))
        with urllib.request.urlopen(call, timeout=20) as answer:
            found = json.loads(answer.read())
        wanted = load_detector(job / "carved" / CONTEXTS / found["context"]).detect(scan(0))
        assert len(found["boxes"]) == len(wanted)
        big = urllib.request.Request(f"{address}/v1/detections", b"0" * 16 * 400_001)
        with pytest.raises(
            (urllib.error.HTTPError, urllib.error.URLError)
        ):  # 413, or the connection is cut while the client sends
            urllib.request.urlopen(big, timeout=20)
    assert not server.healthy


def test_the_detector_of_a_context_works_with_the_ordinary_commands(job, dense, tmp_path, capsys):
    config = ContextCarvingConfig(frames=2)
    splits = moe_carve.named_splits([f"{name}={job / name}:train" for name in CONTEXT_NAMES], "--contexts")
    run = carve_contexts(job / "run", splits, tmp_path / "carved", config)
    assert run.frames == {"near": 2, "far": 2}
    place = tmp_path / "carved" / CONTEXTS / "near"
    assert (
        run_command(
            evaluate.command, ["run", "--detector", str(place), "--data", f"{job / 'near'}:val", "--protocol", "cross_dataset"]
        )
        == 0
    )
    write_bin(tmp_path / "scan.bin", scan(0))
    assert (
        run_command(
            predict.command, ["--detector", str(place), "--scans", str(tmp_path / "scan.bin"), "--out", str(tmp_path / "found")]
        )
        == 0
    )
    assert len(json.loads((tmp_path / "found" / "scan.json").read_text())) > 0
    capsys.readouterr()


def test_contexts_are_found_where_nobody_named_them(job, capsys):
    assert run_command(moe_carve.command, words(job, "found", "--groups", "2", "--frames", "3")) == 0, capsys.readouterr().err
    assert open_carved_detector(job / "found").gate.contexts == ("group0", "group1")


def test_mistakes_are_named_before_anything_is_computed(job, capsys):
    for more, said in (
        (["--contexts", f"near={job / 'near'}:train"], "needs two contexts or more"),
        (["--contexts", "near", "far"], "takes NAME=DIR[:SPLIT]"),
        (["--contexts", *[f"near={job / 'near'}"] * 2], "has the name 'near' twice"),
        (["--contexts", f"a/b={job / 'near'}", f"c={job / 'near'}"], "becomes a folder"),
        (["--validation", f"fog={job / 'near'}:val"], "there is no context ['fog'] to validate"),
        (["--groups", "2", "--validation", f"near={job / 'near'}:val"], "have no validation frames of their own"),
        (["--ratio", "0"], "ratio must be in"),
        (["--margin", "0"], "margin must be above 0"),
    ):
        assert run_command(moe_carve.command, words(job, "no", *more)) == 2
        assert said in " ".join(capsys.readouterr().err.split()), said
    narrow = job / "carved" / CONTEXTS / "near"
    if narrow.exists():
        assert run_command(moe_carve.command, [str(narrow), *words(job, "no")[1:]]) == 2
        assert "only a dense detector can be carved" in " ".join(capsys.readouterr().err.split())
        serve = [str(job / "carved"), "--budget", "1MB", "--whole"]
        assert run_command(moe_serve.command, serve) == 2
        assert "--whole belongs to language models" in " ".join(capsys.readouterr().err.split())
    assert not (job / "no").exists()
