"""Telling an engine by HTTP."""

from __future__ import annotations


def request_inference_to_update(
    url: str, socket_paths: dict[str, str], timeout: float = 300.0, uds: str | None = None
) -> None:
    """Posts vLLM's `collective_rpc` body to `url`, over a UNIX socket if one is named; raises what `httpx` raises."""
    import httpx

    body = {"method": "update_weights_from_ipc", "args": [socket_paths], "timeout": timeout}
    with httpx.Client(transport=httpx.HTTPTransport(uds=uds)) as client:
        client.post(url, json=body, timeout=timeout).raise_for_status()
