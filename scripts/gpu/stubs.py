"""What lets checkpoint-engine be imported without packages that the measurements do not use."""
import sys
import types


def without_http_packages():
    """checkpoint-engine imports its HTTP layer, which is not used here and need not be installed."""

    class Anything(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Exception,), {})

    for name in ("fastapi", "fastapi.responses", "httpx", "uvicorn"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = Anything(name)
