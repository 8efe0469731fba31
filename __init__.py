"""upcycle3d: learn from a fleet's LiDAR without collecting raw point clouds.

The public names below load their module on first use, so `import upcycle3d` is fast and a vehicle never loads server code.

    detect       load_detector, PointCloud, Predictions, Boxes3D, draw_bev
    vehicle      load_encoder, RigSpec, Extractor, extract, SmashedScene
    server       ingest, SmashedStore, train, upcycle, evaluate, adapt
    own data     PreparedDataset, prepare, Frame, Labels

Example:
    import upcycle3d

    detector = upcycle3d.load_detector("runs/source")
    found = detector.detect(upcycle3d.PointCloud.from_file("scan.bin"))
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Public name -> (module, name there).
_PUBLIC = {
    "Boxes3D": ("core.structures", "Boxes3D"),
    "Extractor": ("perception.vehicle.extractor", "Extractor"),
    "Frame": ("core.frame", "Frame"),
    "Labels": ("core.structures", "Labels"),
    "PointCloud": ("core.structures", "PointCloud"),
    "Predictions": ("core.structures", "Predictions"),
    "PreparedDataset": ("datasets.prepared", "PreparedDataset"),
    "RigSpec": ("core.rig", "RigSpec"),
    "SmashedScene": ("core.smashed_scene", "SmashedScene"),
    "SmashedStore": ("perception.server.store", "SmashedStore"),
    "adapt": ("perception.adapt.detection.adapt_detector", "adapt_detector"),
    "draw_bev": ("perception.viz.bev", "draw_bev"),
    "evaluate": ("perception.recipes.jobs", "evaluate_on"),
    "extract": ("perception.vehicle.extractor", "extract"),
    "ingest": ("perception.server.ingest", "ingest"),
    "load_detector": ("perception.training.detector_files", "load_detector"),
    "load_encoder": ("perception.wire.encoder_file", "load_encoder"),
    "prepare": ("datasets.prepare", "prepare"),
    "train": ("perception.recipes.jobs", "train_preset"),
    "upcycle": ("perception.recipes.upcycling_job", "upcycle_preset"),
}

__all__ = [
    "Boxes3D",
    "Extractor",
    "Frame",
    "Labels",
    "PointCloud",
    "Predictions",
    "PreparedDataset",
    "RigSpec",
    "SmashedScene",
    "SmashedStore",
    "__version__",
    "adapt",
    "draw_bev",
    "evaluate",
    "extract",
    "ingest",
    "load_detector",
    "load_encoder",
    "prepare",
    "train",
    "upcycle",
]

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` loads a name when it is used
    from .core.frame import Frame
    from .core.rig import RigSpec
    from .core.smashed_scene import SmashedScene
    from .core.structures import Boxes3D, Labels, PointCloud, Predictions
    from .datasets.prepare import prepare
    from .datasets.prepared import PreparedDataset
    from .perception.adapt.detection.adapt_detector import adapt_detector as adapt
    from .perception.recipes.jobs import evaluate_on as evaluate
    from .perception.recipes.jobs import train_preset as train
    from .perception.recipes.upcycling_job import upcycle_preset as upcycle
    from .perception.server.ingest import ingest
    from .perception.server.store import SmashedStore
    from .perception.training.detector_files import load_detector
    from .perception.vehicle.extractor import Extractor, extract
    from .perception.viz.bev import draw_bev
    from .perception.wire.encoder_file import load_encoder


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'upcycle3d' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
