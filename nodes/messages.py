"""What the nodes say: to the log, to the browser as a toast, and on the node that runs."""

from __future__ import annotations

import logging
from typing import Literal

from comfy_execution.utils import get_executing_context
from server import PromptServer

_log = logging.getLogger("fewstep")
_said: set[tuple[str | None, str]] = set()


def say(text: str, severity: Literal["info", "warn"] = "warn", *, once: bool = True) -> None:
    """Log a sentence and show it as a toast: a warning once a prompt, an information once and for all."""
    context = get_executing_context()
    told = (context.prompt_id if context is not None and severity == "warn" else None, text)
    if once and told in _said:
        return
    _said.add(told)
    _log.log(logging.WARNING if severity == "warn" else logging.INFO, "FewStep: %s", text)
    _send({"text": text, "severity": severity, "node": _running_node()})


def show_run(text: str) -> None:
    """Log what a sampler ran, and write it on the node that ran it."""
    _log.info("FewStep: %s", text)
    server, node = getattr(PromptServer, "instance", None), _running_node()
    if server is not None and node is not None:
        server.send_progress_text(f"FewStep: {text}", node)


def _send(message: dict[str, str | None]) -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync("fewstep.say", message)


def _running_node() -> str | None:
    context = get_executing_context()
    return None if context is None else context.node_id
