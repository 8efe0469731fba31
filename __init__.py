"""upcycle3d: learn from a fleet's LiDAR without collecting raw point clouds."""

__version__ = "0.2.0"
