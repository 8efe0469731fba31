"""A detector is an encoder (the vehicle half) and a decoder (the server half), nothing more.

Everything else in the project (supervised loop, semi-supervised trainer, extractor, evaluation, adaptation) uses the public
methods below and does not know which detector it serves. The detectors that there are stand in `detectors.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import nn

from ...core.config_json import config_to_json, first_difference
from ...core.cut import CutSpec
from ...core.errors import InvalidInput, NonFiniteValue
from ...core.features import CutFeatures
from ...core.structures import Labels, LossTerms, PointCloud, Predictions
from ...core.trained_on import TrainedOn
from .decoders.decoder import Decoder
from .decoders.regions import ScoredProposals
from .encoders.encoder import Encoder
from .encoders.scan_survey import point_features
from .non_finite import FAILURES, name_non_finite
from .scan_guard import ScanGuard

T = TypeVar("T")

FARTHEST_BOX = 1000.0
"""Meters outside the range at which the center of a detection is absurd: only broken weights put one there."""
LARGEST_BOX = 100.0
"""Meters from which the size of a detection is absurd, where the range is not larger itself."""


class DetectorFactory(Protocol):
    """The configuration of a detector: a frozen dataclass of plain values that can build it."""

    def build(self) -> Detector:
        """Make a detector with fresh weights.

        Returns:
            The detector, in training mode, with this configuration as its `config`.
        """
        ...


class Detector(nn.Module):
    """A network that finds objects in scans; `decode(encode(points))` is the whole of it.

    Example:
        ```python
        detector = PRESETS["small"].detector.build().eval()
        found = detector.detect(scan)  # Predictions of one PointCloud
        features = detector.encode([scan])  # what a vehicle hands over
        found = detector.predict(detector.decode(features))[0]  # what the server makes of it
        ```
    """

    encoder: Encoder
    decoder: Decoder
    class_names: tuple[str, ...]
    label: str
    config: DetectorFactory | None
    """The configuration that built this detector, which its file will hold. None for a detector that was put together by hand."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        class_names: tuple[str, ...],
        label: str = "detector",
        config: DetectorFactory | None = None,
    ) -> None:
        """Join two halves.

        Args:
            encoder: the vehicle half.
            decoder: the server half, made for the cut of `encoder`.
            class_names: names of the classes that the decoder tells apart, in label order.
            label: name of this kind of detector in messages and reports, such as "PV-RCNN".
            config: the configuration that builds this detector. A detector without one cannot be saved.
        """
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.class_names, self.label, self.config = class_names, label, config
        self.encoder_frozen = False
        self._guard: ScanGuard | None = None
        self._watches = True

    def freeze_encoder(self) -> Detector:
        """Fix the vehicle half: it gets no gradient and stays in evaluation mode, so its batch-norm statistics do not move.

        Returns:
            This detector.
        """
        self.encoder_frozen = True
        self.encoder.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        """Switch between training and evaluation mode; a frozen encoder stays in evaluation mode.

        Args:
            mode: True for training.

        Returns:
            This detector.
        """
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    @property
    def spec(self) -> CutSpec:
        """Where the network is cut."""
        return self.encoder.spec

    @property
    def point_features(self) -> tuple[str, ...]:
        """Point features that the encoder reads besides x, y, z, in their order."""
        return point_features(self.encoder)

    @property
    def trained_on(self) -> TrainedOn | None:
        """What the training knew about its data, kept at the encoder, which needs it on a vehicle. None where nobody knows."""
        return self.encoder.trained_on

    @trained_on.setter
    def trained_on(self, value: TrainedOn | None) -> None:
        """Note what the training knew.

        Args:
            value: What the file of this detector will say.
        """
        self.encoder.trained_on = value
        self._guard = None

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, points: Sequence[PointCloud]) -> CutFeatures:
        """Compute the features at the cut of a batch of scans.

        Args:
            points: one scan per scene, in the shifted frame (after the rig), on any device.

        Returns:
            Features on the device of the weights; without gradient if the encoder is frozen.

        Raises:
            InvalidInput: There is no scan, an entry is not a `PointCloud`, or a scan lacks point features that the encoder reads.
        """
        clouds = [p.to(self._device) for p in _scans(points)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            features: CutFeatures = self.encoder(clouds)
        return features

    def upload(self, points: Sequence[PointCloud]) -> CutFeatures:
        """Compute what a vehicle would send of a batch of scans, before the codec.

        Args:
            points: one scan per scene, as for `encode`.

        Returns:
            Features with the shape `encoder.upload_spec`, without gradient. Without a defence they are those of `encode`.

        Raises:
            InvalidInput: As for `encode`.
        """
        clouds = [p.to(self._device) for p in _scans(points)]
        with torch.no_grad():
            return self.encoder.upload(clouds, self.encoder.voxelize(clouds))

    def decode(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> Any:
        """Compute the raw outputs of a batch.

        Args:
            features: what `encode` returned, or smashed scenes as a batch, on the device of the weights.
            labels: one per scene in training, None otherwise. They only choose which proposals a second stage trains on.

        Returns:
            Raw outputs for `loss` and `predict`, of the decoder's own type.

        Raises:
            InvalidInput: The features belong to another cut.
        """
        self._check_cut(features)
        return self.decoder(features, None if labels is None else [scene.to(self._device) for scene in labels])

    def loss(self, outputs: Any, labels: Sequence[Labels]) -> LossTerms:
        """Compare raw outputs with labels.

        Args:
            outputs: what `decode` returned.
            labels: one per scene, on any device.

        Returns:
            Named loss terms, already weighted; `total()` is what to minimize.
        """
        return self.decoder.loss(outputs, [scene.to(self._device) for scene in labels])

    def predict(self, outputs: Any) -> list[Predictions]:
        """Turn raw outputs into detections.

        Args:
            outputs: what `decode` returned without labels.

        Returns:
            The detections of every scene, best first.

        Raises:
            NonFiniteValue: A score is NaN, or a box is not finite or absurdly large or far away: the weights are broken.
        """
        found = self.decoder.predict(outputs)
        _refuse_absurd(found, self.spec.grid.range)
        return found

    def proposals(self, features: CutFeatures) -> list[ScoredProposals]:
        """Score every proposal of the first stage with the second stage, before the final suppression.

        Args:
            features: features at the cut, as for `decode`.

        Returns:
            The scored proposals of every scene, in the order of the first stage.

        Raises:
            InvalidInput: The features belong to another cut, or the decoder has no second stage.
            NonFiniteValue: The network computes NaN or infinite values; the message names the weight or the layer.
        """
        self._check_cut(features)
        return self._explained(lambda: self.decoder.proposals(features))

    @overload
    def detect(self, points: PointCloud) -> Predictions: ...

    @overload
    def detect(self, points: Sequence[PointCloud]) -> list[Predictions]: ...

    @torch.no_grad()
    def detect(self, points: PointCloud | Sequence[PointCloud]) -> Predictions | list[Predictions]:
        """Find the objects in one scan or in a batch of scans.

        Args:
            points: one scan or several, in the shifted frame (after the rig), on any device.

        Returns:
            The detections of the scan, best first; for several scans a list with those of each. A scan without a point in the range
            has none.

        Warns:
            UserWarning: The scans differ from those of training (`trained_on`), many of their points lie outside the range, or many
                cells are lost to the voxel limit. Each is said once per detector.

        Raises:
            InvalidInput: The detector is in training mode, or `encode` refuses the scans.
            NonFiniteValue: The network computes NaN or infinite values, or absurd boxes; the message names the weight or the layer.
        """
        if self.training:
            raise InvalidInput(
                "the detector is in training mode, where dropout and batch statistics change what it finds; call eval() before detect"
            )
        if isinstance(points, PointCloud):
            return self._find([points])[0]
        return self._find(points)

    def _find(self, points: Sequence[PointCloud]) -> list[Predictions]:
        """Detect in a batch, and warn of scans that do not suit this detector. The counts come from the voxels that are made anyway."""
        clouds = [p.to(self._device) for p in _scans(points)]
        voxels = self.encoder.voxelize(clouds)
        found = self._explained(lambda: self.predict(self.decode(self.encoder.features(clouds, voxels))))
        counts = voxels.counts
        if self._watches and counts:
            if self._guard is None:
                self._guard = ScanGuard(self.trained_on)
            for text in self._guard.look(clouds, counts):
                warnings.warn(text, stacklevel=4)  # this method, `detect` and `no_grad` lie between here and the caller
        # A network makes boxes of nothing.
        return [
            scene if not counts or counts[i].points > counts[i].points_outside else scene.select(scene.scores > 2)
            for i, scene in enumerate(found)
        ]

    def forward(self, points: Sequence[PointCloud]) -> list[Predictions]:
        """Find the objects in a batch of scans; the same as `detect`.

        Args:
            points: the scans.

        Returns:
            The detections of every scan.
        """
        return self.detect(points)

    def _explained(self, forward: Callable[[], T]) -> T:
        """Run a forward pass; where it fails because of NaN or infinite values, say where they begin."""
        try:
            return forward()
        except FAILURES as error:
            found = name_non_finite({"": self}, forward)
            if not found and not isinstance(error, NonFiniteValue):
                raise
            raise NonFiniteValue(
                f"this {self.label} cannot detect anything here: {found or error}. Its training diverged or its weights were damaged; use "
                "an earlier checkpoint of the run, or train again with a lower learning rate"
            ) from error

    def _check_cut(self, features: CutFeatures) -> None:
        if features.spec == self.spec:
            return
        names = (f"this {self.label}", "the features")
        different = first_difference(config_to_json(self.spec), config_to_json(features.spec), names=names)
        raise InvalidInput(
            f"these features were made at another cut than this {self.label} decodes ({different}); "
            "encode the scans with the encoder of this detector"
        )


@contextmanager
def unwatched(detector: Detector) -> Iterator[None]:
    """Let `detect` compare no scans with those of training, in code that has compared them already or must not warn.

    Args:
        detector: The detector.

    Yields:
        Nothing; afterwards the detector compares again.
    """
    before = getattr(detector, "_watches", True)
    detector._watches = False
    try:
        yield
    finally:
        detector._watches = before


def _refuse_absurd(found: Sequence[Predictions], point_range: Sequence[float]) -> None:
    low, high = (torch.tensor(side, dtype=torch.float32) for side in (point_range[:3], point_range[3:]))
    largest = max(LARGEST_BOX, float((high - low).max()))
    for scene in found:
        boxes = scene.boxes.data.detach().cpu()
        center, size = boxes[:, :3], boxes[:, 3:6]
        good = ((center >= low - FARTHEST_BOX) & (center <= high + FARTHEST_BOX)).all(1) & (size <= largest).all(1)
        if not bool(good.all()):
            x, y, z, *sides = boxes[~good][0, :6].tolist()
            raise NonFiniteValue(
                f"{int((~good).sum())} of {len(good)} boxes are absurd; one has its center at ({x:.3g}, {y:.3g}, {z:.3g}) m and the size "
                f"{' x '.join(f'{side:.3g}' for side in sides)} m"
            )


def _scans(points: Sequence[PointCloud]) -> list[PointCloud]:
    """The scans of a batch, after checking that they are scans."""
    if isinstance(points, PointCloud):
        raise InvalidInput("encode takes a sequence of scans and was given one PointCloud; pass it in a list")
    scans = list(points)
    for scan in scans:
        if not isinstance(scan, PointCloud):
            raise InvalidInput(
                f"a detector reads scans of type PointCloud, found {type(scan).__name__}; make one with PointCloud.from_array(array)"
            )
    return scans
