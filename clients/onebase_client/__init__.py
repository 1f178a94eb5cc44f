"""Calls a onebase server. No torch, no ray."""

from onebase_client.client import Client
from onebase_client.refusal import OnebaseError

__version__ = "0.1.0"

__all__ = ["Client", "OnebaseError", "__version__"]
