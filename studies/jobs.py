"""What launches of training as processes of their own have in common."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil


def script(name: str) -> str:
    """Return the path of a program that is installed beside this Python, such as ``deepspeed``."""
    return str(Path(sys.executable).with_name(name))


def search_path() -> str:
    """Return PATH with the programs beside this Python in front, such as ninja for DeepSpeed."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a launcher that still runs, and the ranks that it may leave behind.

    Args:
        process: is sent SIGTERM, for which it ends its ranks, on other nodes too.
        grace: seconds that it has for it.
    """
    if process.poll() is not None:
        return
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for rank in ranks:
        if rank.is_running():
            rank.kill()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that appears when it is complete."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
