"""The repository root is the package ``upcycle3d``, so that folders stay at the top level and no common name is taken."""

from setuptools import setup

PACKAGES = [
    "upcycle3d",
    "upcycle3d.core",
    "upcycle3d.ops",
    "upcycle3d.perception",
    "upcycle3d.perception.models",
    "upcycle3d.perception.models.encoders",
    "upcycle3d.perception.models.decoders",
    "upcycle3d.perception.wire",
    "upcycle3d.perception.vehicle",
    "upcycle3d.perception.server",
    "upcycle3d.perception.training",
    "upcycle3d.perception.evaluation",
    "upcycle3d.perception.viz",
    "upcycle3d.perception.adapt",
    "upcycle3d.perception.adapt.glc",
    "upcycle3d.perception.adapt.detection",
    "upcycle3d.perception.recipes",
    "upcycle3d.datasets",
    "upcycle3d.datasets.simulation",
    "upcycle3d.tools",
]

setup(
    name="upcycle3d",
    version="0.1.0",
    description="Learn from a fleet's LiDAR without collecting raw point clouds",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"upcycle3d": "."},
    packages=PACKAGES,
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "scipy>=1.11",  # numba compiles np.dot to the BLAS that scipy ships
        "numba>=0.60",
        "safetensors>=0.4.3",
        "zstandard>=0.22",
        "pyarrow>=15",
        "tyro>=0.9",
        "rich>=13",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
    ],
    extras_require={
        "dev": ["pytest>=8", "hypothesis>=6", "shapely>=2", "ruff>=0.6", "mypy>=1.11"],
        "spconv": ["spconv>=2.3.8; python_version < '3.14'"],
        "viz": ["rerun-sdk>=0.20", "open3d-cpu>=0.19"],
        "mmdet3d": ["mmengine>=0.10.7,<1", "mmcv-lite>=2.1,<2.2"],
        "ray": ["ray[data]>=2.30"],
    },
    entry_points={"console_scripts": ["upcycle3d = upcycle3d.tools.main:main"]},
)
