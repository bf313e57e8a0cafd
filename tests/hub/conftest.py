import pytest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that reaches for the network fails at once instead of waiting for it."""
    import socket

    def refuse(self, address, *args):
        if self.family == socket.AF_UNIX:
            return original(self, address, *args)
        raise OSError(f"a test tried to reach {address}")

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
