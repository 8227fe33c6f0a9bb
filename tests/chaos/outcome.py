"""What a run left, without what no two runs share (times): two runs of one recipe must leave the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

UNSHARED = ("seconds", "created", "path", "version")
CLOCK = "time/"
LEFTOVER = re.compile(r"\.tmp$|\.lock$|^tmp")


def outcome(out: Path, home: Path) -> dict[str, Any]:
    """Every file of every stage (hashes of weights and data, metrics without times), and the registry."""
    found: dict[str, Any] = {}
    for folder in sorted(path for path in out.iterdir() if (path / "artifact.json").is_file()):
        for file in sorted(folder.rglob("*")):
            inside = file.relative_to(folder)
            if file.is_file() and inside.parts[0] != "checkpoints":
                found[f"{folder.name}/{inside}"] = _content(file, out)
    registry = home / "registry"
    for file in sorted(registry.rglob("*.json")):
        entry = json.loads(file.read_text())
        found[f"registry/{file.relative_to(registry)}"] = (entry["identity"], _plain(entry["metrics"]))
        assert (Path(entry["path"]) / "artifact.json").is_file(), f"{file} speaks of a folder without a manifest"
    results = json.loads((out / "results.json").read_text())
    found["results"] = _plain(results["models"])
    return found


def _content(file: Path, out: Path) -> Any:
    text = file.read_bytes().replace(bytes(out), b"OUT")
    if file.name == "metrics.jsonl":
        return [_plain(json.loads(line)) for line in text.splitlines()]
    if file.name == "artifact.json":
        return _plain(json.loads(text))
    return hashlib.sha256(text).hexdigest()


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in UNSHARED and not key.startswith(CLOCK)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(*folders: Path) -> list[str]:
    """Temporary files and locks that nobody needs any more."""
    return [str(path) for folder in folders for path in folder.rglob("*") if LEFTOVER.search(path.name)]


def processes(home: Path) -> list[int]:
    """Living processes that work under this ALIGN_HOME."""
    wanted, found = b"ALIGN_HOME=" + bytes(home), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not dead and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
