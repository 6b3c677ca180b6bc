"""What verl's backends ask of ray."""

from . import util

__all__ = ["util"]
