"""Saving and restoring a run: safetensors only, and the last good file survives anything.

A checkpoint is written beside its place, forced to disk, and renamed over it: a kill or a full disk leaves the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from busgen_cds.errors import Misconfigured


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Replace `path` by these tensors and notes, or leave it as it was."""
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"notes": json.dumps(notes, sort_keys=True)},
    )
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = f"the last good one, {path}, is untouched" if path.exists() else "there is no earlier one"
        raise Misconfigured(f"The checkpoint could not be saved ({error.strerror}); {kept}. Make room.") from error


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, also where the processes of one run write the same text at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, found: Any) -> None:
    write_text(path, json.dumps(found))


def same_work(path: Path, asked: Mapping[str, Any], what: str) -> None:
    """A folder goes on with what it was begun with, as its note says; a folder without a note gets one."""
    now = json.loads(json.dumps(asked))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if other := sorted(name for name in before if before[name] != now.get(name)):
        raise Misconfigured(
            f"{path.parent} holds {what} with other settings (see {path.name}: {', '.join(other)}): choose another"
            " folder."
        )
    write_text(path, json.dumps(now, sort_keys=True, indent=1))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes of a checkpoint."""
    try:
        data = path.read_bytes()
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        notes = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("notes", "{}"))
    except OSError as error:
        raise Misconfigured(f"The checkpoint {path} cannot be read ({error.strerror}).") from error
    except (SafetensorError, ValueError) as error:
        raise Misconfigured(f"{path} is not a checkpoint of ours ({error}).") from error
    return tensors, notes


def read_run(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same, of a reader's run: it says with which settings and from which sources it was trained."""
    tensors, notes = read(path)
    if "sources" not in notes.get("settings", {}):
        raise Misconfigured(f"{path} is not the checkpoint of a reader's run: it names no sources.")
    return tensors, notes


def sources(notes: Mapping[str, Any]) -> list[str]:
    """Every source that a run's weights have seen, those of the run it started from included."""
    return list(dict.fromkeys([*notes["settings"]["sources"], *notes.get("before", ())]))


def folds(notes: Mapping[str, Any]) -> list[Any]:
    """The folds that a run, or any run of a blend, was trained for."""
    runs = [notes, *notes.get("blend", ())]
    return [run["settings"]["fold"] for run in runs if run["settings"].get("fold")]


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's memory as named tensors."""
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser.{i}.{name}": torch.as_tensor(value) for i, slot in state.items() for name, value in slot.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part(tensors, "optimiser.").items():
        index, slot = name.split(".", 1)
        state.setdefault(int(index), {})[slot] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def blend(paths: Sequence[Path], shares: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mean of averaged weights, by shares (Wortsman et al. 2022, robust fine-tuning by weight interpolation).

    For runs of which the last started from the others. It is described by the last run's settings, with every source
    that any of them saw.
    """
    if len(paths) != len(shares) or abs(sum(shares) - 1) > 1e-6:
        raise Misconfigured(f"{len(paths)} checkpoints need as many shares that sum to one, not {list(shares)}.")
    opened = [read_run(path) for path in paths]
    names = [set(part(tensors, "average.")) for tensors, _ in opened]
    if any(other != names[0] for other in names):
        raise Misconfigured(f"The checkpoints {', '.join(map(str, paths))} hold networks of different shapes.")
    mixed = {
        f"average.{name}": sum(
            (share * tensors[f"average.{name}"] for share, (tensors, _) in zip(shares, opened, strict=True)),
            torch.zeros(()),
        )
        for name in sorted(names[0])
    }
    last = opened[-1][1]
    seen = sorted({source for _, notes in opened for source in sources(notes)})
    runs = [{"share": share, **notes} for share, (_, notes) in zip(shares, opened, strict=True)]
    return mixed, {"step": last["step"], "settings": last["settings"] | {"sources": seen}, "blend": runs}
