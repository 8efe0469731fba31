"""One carved detector as a running whole: it finds objects in scans of many vehicles, grouped by context, within a memory budget.

Each scan stands alone here: scans of many senders are no drive, so there is no hysteresis, and the gate takes the best context.
Read next: `detections.py`, which puts it behind HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ....core.errors import InvalidInput, UpcycleError
from ....core.structures import PointCloud, Predictions
from ...models.detector import unwatched
from ..runtime.engine import Outcome, Ungated
from ..runtime.held_experts import HeldExperts
from ..runtime.requests import Finished, Request
from ..runtime.scheduling import WorkBatch
from ..serving.engine_server import EngineServer, RuntimeConfig
from .carved_folder import CarvedDetector
from .context_store import ContextStore
from .scan_descriptor import describe_scan


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundObjects:
    """What was found in one scan."""

    context: int
    """Number of the context that the gate chose."""
    objects: Predictions
    """The detections, best first, in the frame of the sensor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scan:
    """Payload of a request."""

    points: PointCloud
    told: Callable[[FoundObjects], None]


def _payload(request: Request) -> _Scan:
    assert isinstance(request.payload, _Scan)
    return request.payload


class DetectionComputation:
    """Runs the detector on the scans of a batch, context by context."""

    def __init__(self, opened: CarvedDetector, store: ContextStore) -> None:
        """Keep the parts.

        Args:
            opened: The carved detector.
            store: Holds its contexts.
        """
        self._opened, self._store, self._rig = opened, store, opened.rig

    def gate(self, asked: Sequence[Ungated]) -> Sequence[tuple[int, ...]]:
        """Choose the context of each scan.

        Args:
            asked: The scans.

        Returns:
            One context each. A scan without points gets context 0; nothing is found in it whatever its context is.
        """
        gate = self._opened.gate
        return [(int(gate.logits(describe_scan(_payload(one.request).points, gate.descriptor)).argmax()),) for one in asked]

    def run(self, batch: WorkBatch, experts: HeldExperts) -> Sequence[Outcome]:
        """Find the objects of every scan of a batch. An error in one of them does not touch the others.

        Args:
            batch: The scans.
            experts: Gives their contexts.

        Returns:
            One outcome per scan.
        """
        outcomes = {work: Outcome() for work in batch.works}
        for wave in experts.waves():
            for context in wave.experts:
                detector = self._store.use(context)
                for work in (work for work in wave.works if work.experts[0] == context):
                    scan = _payload(work.request)
                    try:
                        with unwatched(detector):
                            found = detector.detect(scan.points)
                        objects = replace(found, boxes=self._rig.to_sensor(found.boxes))
                        scan.told(FoundObjects(context=context, objects=objects))
                    except UpcycleError as error:
                        outcomes[work] = Outcome(error=error)
        return [outcomes[work] for work in batch.works]

    def release(self, request: Request) -> None:
        """Do nothing: nothing is kept.

        Args:
            request: The request.
        """


class DetectionServer(EngineServer):
    """Serves a carved detector until it is closed.

    Example:
        server = DetectionServer(open_carved_detector("carved"), RuntimeConfig(budget=20_000_000))
        server.send(scan, told=print, ended=print)
        server.close()
    """

    def __init__(self, opened: CarvedDetector, config: RuntimeConfig, *, keep_cached: bool = True) -> None:
        """Start the threads of engine and transfers.

        Args:
            opened: The carved detector. The server closes its files.
            config: How requests are served. A scan counts as one token.
            keep_cached: Whether the system may keep pages of contexts that were read.

        Raises:
            InvalidInput: A context is larger than the budget.
        """
        if opened.context_bytes > config.budget:
            opened.close()
            raise InvalidInput(f"each context has {opened.context_bytes:,} bytes, and the budget is {config.budget:,}; raise it")
        self.opened = opened
        self._numbers = itertools.count()
        store = ContextStore(opened, keep_cached=keep_cached)
        computation = DetectionComputation(opened, store)
        super().__init__(config, store=store, computation=computation, gate=computation.gate)

    def send(self, scan: PointCloud, *, told: Callable[[FoundObjects], None], ended: Callable[[Finished], None]) -> str:
        """Send a scan.

        Args:
            scan: In the frame of the sensor, with the columns of `opened.columns`.
            told: Gets what was found, from the engine's thread. It must not wait.
            ended: Is called once at the end, from the engine's thread. It must not wait.

        Returns:
            Name of the request.

        Raises:
            InvalidInput: Its intensity leaves 0..1 after the rig.
            QueueFull: It cannot be served now; the message says the bound.
            QueueClosed: The server is shutting down.
        """
        points = self.opened.rig.from_sensor(scan)
        id = f"scan-{next(self._numbers)}"
        self.submit(Request(id=id, kind="frame", tokens=1, payload=_Scan(points=points, told=told)), ended)
        return id
