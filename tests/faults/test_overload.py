"""Some seconds of overload; `make load` does minutes."""

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra `serve` brings it")
pytest.importorskip("starlette", reason="starlette is not installed; the extra `serve` brings it")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed; the extra `serve` brings it")

from faults.overload import ENDPOINTS, overload

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
def test_an_overloaded_server_loses_and_doubles_nothing_and_ends_well(endpoint):
    """More clients than open requests: answers, 429 with a reason, clients that go away, and SIGTERM in the middle."""
    report = overload(3.0, ENDPOINTS[endpoint], clients=12)
    assert report.faults == [], str(report)
