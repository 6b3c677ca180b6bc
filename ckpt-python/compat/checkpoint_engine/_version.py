"""The version whose names these are, and whose engine serves them."""

from ckpt_engine import __version__ as _engine

__version__ = f"0.4.2+ckpt.{_engine}"
