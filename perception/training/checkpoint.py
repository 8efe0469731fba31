"""Checkpoints on disk: safetensors and JSON, never pickle, every file replaced as a whole and hashed.

    checkpoints/step_00001000/   student.safetensors  teacher.safetensors  optimizer.safetensors
                                 checkpoint.json: step, meta, bytes and SHA-256 of every file and of itself

A checkpoint folder is written under a temporary name, flushed to the disk and renamed, so a run killed at any moment finds
either the old or the new one. A damaged checkpoint is an error that says how to go on from the newest good one; nothing falls
back by itself.

Read next: `core/tensor_file.py` for the files inside, and `loop.py`, which saves and resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput
from ...core.files import check_input_file, sync_folder
from ...core.strict_json import strict_json
from ...core.tensor_file import CorruptFile, decode_tensors, encode_tensors, fill_module

INDEX = "checkpoint.json"
CHECKPOINT_VERSION = 1
MAX_INDEX_BYTES = 16 << 20


class CorruptCheckpoint(CorruptFile):
    """A checkpoint does not hold what was written."""


# -------------------------------------------------------------------------------------------------------- checkpoint folders


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write one checkpoint, and then delete all but the newest.

    Args:
        folder: Holds the checkpoints of a run; it is made where needed.
        step: Optimizer steps done.
        modules: The modules to keep, by name, e.g. student and teacher.
        optimizer: Its state is stored by parameter name, so every parameter it holds must belong to one of `modules`.
        meta: Plain JSON, e.g. the resolved configuration.
        keep_last: Number of newest checkpoints that are kept, at least 1.

    Returns:
        The new folder, `folder/step_<step>`.

    Raises:
        InvalidInput: `keep_last` is below 1, a module is called "optimizer", or a parameter belongs to no module.
        OSError: The checkpoint could not be written; the older ones are intact.
    """
    folder = Path(folder)
    if keep_last < 1:
        raise InvalidInput(f"keep_last must be at least 1, found {keep_last}: without a checkpoint a run cannot resume")
    tensors: dict[str, Mapping[str, Tensor]] = {name: module.state_dict() for name, module in modules.items()}
    if "optimizer" in tensors:
        raise InvalidInput(
            "no module may be called 'optimizer', because the optimizer's own file has that name; rename the module"
        )
    tensors["optimizer"] = _optimizer_tensors(optimizer, modules)

    final = checkpoint_path(folder, step)
    temporary = folder / f".tmp-{final.name}"
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    temporary.mkdir()
    files = {}
    try:
        for name, content in tensors.items():
            data = encode_tensors(content)
            _write_and_sync(temporary / f"{name}.safetensors", data)
            files[f"{name}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        plain_meta = json.loads(json.dumps(dict(meta)))  # as it will be read, so that its hash is the same
        index: dict[str, Any] = {"schema_version": CHECKPOINT_VERSION, "step": step, "meta": plain_meta, "files": files}
        index["sha256"] = _index_digest(index)
        _write_and_sync(temporary / INDEX, json.dumps(index, indent=1).encode())
        sync_folder(temporary)
    except OSError:  # on a full disk, its place is needed to say so
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        _set_aside(final)
    os.replace(temporary, final)
    sync_folder(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        os.replace(old, folder / f".tmp-{old.name}")  # never half deleted under its own name
        shutil.rmtree(folder / f".tmp-{old.name}")
    return final


def remove_unfinished(folder: str | Path) -> None:
    """Remove the checkpoints that a killed process left half written. Only the one writer of a run may call it.

    Args:
        folder: Holds the checkpoints; it may not exist.
    """
    for stale in Path(folder).glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Name the folder of one checkpoint.

    Args:
        folder: Holds the checkpoints of a run.
        step: Optimizer steps done.

    Returns:
        The path, whether it exists or not.
    """
    return Path(folder) / f"step_{step:08d}"


def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, without verifying them.

    Args:
        folder: Holds the checkpoints; it may not exist.

    Returns:
        Checkpoint folders, oldest step first.
    """
    found = [p for p in Path(folder).glob("step_*") if p.name[5:].isdecimal() and p.name.isascii() and (p / INDEX).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint of a run, without verifying it (loading does that).

    Args:
        folder: Holds the checkpoints; it may not exist.

    Returns:
        The checkpoint with the highest step, or None.
    """
    found = list_checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(
    path: str | Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Fill modules and optimizer from a checkpoint, in place.

    Every file is read once, compared with its recorded size and SHA-256, and only then used.

    Args:
        path: The checkpoint folder.
        modules: The same names and shapes as when it was saved.
        optimizer: An optimizer of the same parameters.

    Returns:
        The number of steps done, and `meta` as it was saved.

    Raises:
        CorruptCheckpoint: A file is damaged; the message says how to resume from the newest good checkpoint of the run.
        InvalidInput: Names or shapes do not fit.
    """
    path = Path(path)
    decoded, index = _decoded(path)
    wanted = {f"{name}.safetensors" for name in (*modules, "optimizer")}
    if wanted != decoded.keys():
        raise InvalidInput(
            f"the checkpoint {path} holds {sorted(decoded)}, not {sorted(wanted)}; does it belong to another method?"
        )
    for name, module in modules.items():
        fill_module(module, decoded[f"{name}.safetensors"], f"{path / name}.safetensors")
    _fill_optimizer(optimizer, modules, decoded["optimizer.safetensors"], path)
    return int(index["step"]), dict(index["meta"])


def read_checkpoint(path: str | Path) -> tuple[int, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read the weights of a checkpoint, to use them outside of their run.

    Args:
        path: The checkpoint folder.

    Returns:
        The number of steps done, `meta` as it was saved, and the tensors of every module by its name, on the CPU.

    Raises:
        CorruptCheckpoint: A file is damaged.
        InvalidInput: The folder is no checkpoint.
    """
    decoded, index = _decoded(Path(path))
    modules = {name.removesuffix(".safetensors"): tensors for name, tensors in decoded.items() if name != "optimizer.safetensors"}
    return int(index["step"]), dict(index["meta"]), modules


def _decoded(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        data, index = _verified_files(path)
        return {name: decode_tensors(content, path / name) for name, content in data.items()}, index
    except CorruptFile as error:
        raise CorruptCheckpoint(f"{error}\n{_advice(path)}") from error


def _advice(path: Path) -> str:
    damaged = [path]
    for other in reversed(list_checkpoints(path.parent)):
        if other == path:
            continue
        try:
            _verified_files(other)
        except CorruptCheckpoint:
            damaged.append(other)
            continue
        away = ", ".join(map(str, damaged))
        return (
            f"move what is damaged ({away}) out of {path.parent}; the run then resumes from the newest good checkpoint, {other}"
        )
    return f"there is no other good checkpoint in {path.parent}; start the run again in a new folder"


def _set_aside(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    os.replace(path, target)
    return target


def _verified_files(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of every file by name and the index, after comparing sizes and hashes."""
    index = strict_json(_read(path / INDEX), str(path / INDEX), CorruptCheckpoint)
    if not isinstance(index, dict) or "sha256" not in index:
        raise CorruptCheckpoint(f"{path / INDEX} is not a checkpoint index: it has no SHA-256")
    if index["sha256"] != _index_digest(index):
        raise CorruptCheckpoint(f"{path / INDEX} was altered: its content does not have the recorded SHA-256")
    version, files = index.get("schema_version"), index.get("files")
    if version != CHECKPOINT_VERSION:
        raise InvalidInput(
            f"{path} has schema version {version}, this program reads {CHECKPOINT_VERSION}; use the version that wrote it"
        )
    step_is_number = isinstance(index.get("step"), int) and not isinstance(index["step"], bool)
    if (
        not isinstance(files, dict)
        or not all(map(_is_entry, files.items()))
        or not step_is_number
        or not isinstance(index.get("meta"), dict)
    ):
        raise CorruptCheckpoint(f"{path / INDEX} is not a checkpoint index: a step, meta or a list of files is missing")
    data = {}
    for name in files:
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != files[name]["bytes"]:  # before reading, so that a wrong file cannot fill the memory
            raise CorruptCheckpoint(f"{path / name} should have {files[name]['bytes']} bytes, found {size}")
        data[name] = _read(path / name)
        if hashlib.sha256(data[name]).hexdigest() != files[name]["sha256"]:
            raise CorruptCheckpoint(f"{path / name} was altered: its bytes do not have the recorded SHA-256")
    return data, index


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether a file is listed as `save_checkpoint` does it: a plain name, its bytes and its hash."""
    name, entry = item
    plain = name.endswith(".safetensors") and not set(name) & set("/\\\0")
    return plain and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def _index_digest(index: Mapping[str, Any]) -> str:
    body = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ optimizer state


def _parameter_names(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    return {p: f"{key}.{name}" for key, module in modules.items() for name, p in module.named_parameters()}


def _named_parameters(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    names = _parameter_names(modules)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [tuple(p.shape) for p in held if p not in names]
    if strangers:
        raise InvalidInput(
            f"{len(strangers)} parameters of the optimizer belong to no checkpointed module ({sorted(names.values())[:3]}...), "
            f"shapes {strangers[:5]}; add their module to `modules`, or they would not survive a restart"
        )
    return {names[p]: p for p in held}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """State tensors as `<state>/<module>.<parameter>`, e.g. `exp_avg/student.head.weight`."""
    state: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(optimizer, modules).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}/{name}"] = value
    return state


def _fill_optimizer(
    optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], path: Path
) -> None:
    parameters = _named_parameters(optimizer, modules)
    state: dict[Tensor, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        key, name = full_name.split("/", 1)
        if name not in parameters:
            raise InvalidInput(
                f"the optimizer state of {path} has {name!r}, which does not train now; use the run's own configuration"
            )
        parameter = parameters[name]
        if key != "step" and value.shape != parameter.shape:
            raise InvalidInput(f"{full_name!r} of {path} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
        on_device = key != "step" or any(g.get("fused") for g in optimizer.param_groups)  # only fused AdamW counts there
        state.setdefault(parameter, {})[key] = value.to(parameter.device if on_device else "cpu").clone()
    optimizer.state.clear()
    optimizer.state.update(state)


def _read(path: Path) -> bytes:
    check_input_file(path, "file of a checkpoint")
    try:
        if path.name == INDEX and path.stat().st_size > MAX_INDEX_BYTES:
            raise CorruptCheckpoint(f"{path} has more than {MAX_INDEX_BYTES} bytes, so it is not a checkpoint index")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidInput(f"there is no file {path}; is the path right and the run complete?") from error


def _write_and_sync(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
