"""What a ComfyUI tells its browser: a reader of its websocket, with the standard library alone."""

from __future__ import annotations

import base64
import json
import secrets
import socket
import threading
from typing import Any

PREVIEW_IMAGE, PREVIEW_IMAGE_WITH_METADATA = 1, 4
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10


class Events:
    """All events since the connection, in order: ``{"type": ..., "data": ...}``; ``preview`` has an image."""

    def __init__(self, port: int, client_id: str) -> None:
        self.seen: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        request = (
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        if b" 101 " not in status:
            raise ConnectionError(f"the host's websocket answered {status!r}")
        while self._stream.readline().strip():
            pass
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def _read(self) -> None:
        message = b""
        try:
            while True:
                first, length = self._exactly(2)
                kind = first & 15
                if length > 125:
                    length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
                payload = self._exactly(length)
                if kind == _CLOSE:
                    return
                if kind == _PING:
                    self._send(_PONG, payload)
                if kind not in (_TEXT, _BINARY, _CONTINUATION):
                    continue
                if kind != _CONTINUATION:
                    opened, message = kind, b""
                message += payload
                if first & 128:
                    self._add(message, text=opened == _TEXT)
        except (OSError, EOFError, ValueError):
            return  # The host or this side has closed the connection.

    def _add(self, message: bytes, *, text: bool) -> None:
        if text:
            event = json.loads(message)
        else:
            kind = int.from_bytes(message[:4], "big")
            start = 8
            if kind == PREVIEW_IMAGE_WITH_METADATA:
                start += int.from_bytes(message[4:8], "big")
            event = {"type": "preview", "data": message[start:]}
        with self.changed:
            self.seen.append(event)
            self.changed.notify_all()

    def _send(self, kind: int, payload: bytes) -> None:
        mask = secrets.token_bytes(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([128 | kind, 128 | len(payload)]) + mask + masked)

    def _exactly(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            raise EOFError
        return data
