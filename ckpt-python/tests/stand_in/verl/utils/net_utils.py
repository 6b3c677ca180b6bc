import socket


def get_free_port(address: str) -> tuple[int, socket.socket]:
    probe = socket.socket()
    probe.bind((address, 0))
    return probe.getsockname()[1], probe
