"""Telling somebody that a run has ended: a webhook or a command."""

from __future__ import annotations

import json
import shlex
import subprocess
import urllib.request
from http.client import HTTPException
from typing import Any

from align.progress import say

STDERR = 2
"""Where a command's words go: standard output may be JSON."""

TIMEOUT = 20.0  # seconds


def notify(target: str, event: dict[str, Any]) -> None:
    """POST `event` as JSON to `target` if that is an http(s) address; otherwise run it as a command with the JSON on its standard
    input. What goes wrong is said, and changes nothing about the run.
    """
    body = json.dumps(event).encode()
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        elif words := shlex.split(target):
            subprocess.run(words, input=body, check=True, timeout=TIMEOUT, stdout=STDERR)
        else:
            say("--notify names neither an address nor a command; nobody was told")
    except (OSError, ValueError, HTTPException, subprocess.SubprocessError) as error:  # the third: no address, or no answer in HTTP
        say(f"--notify {target}: {error}")
