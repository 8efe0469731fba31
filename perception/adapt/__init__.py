"""Adaptation of a trained model to an unlabeled target domain whose classes differ from those of the source domain.

Two rooms:

* `glc/` works on tensors: features and class probabilities, or inputs and two PyTorch modules. It knows no LiDAR.
* `detection/` applies `glc/` to the proposals of a detector.

Each room's `__init__.py` lists its files in reading order; `docs/adapt.md` describes both and gives the measurements.
"""
