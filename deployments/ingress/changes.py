"""The name by which `handles.py` still imports what is in `catalog.py`."""

from deployments.ingress.catalog import CatalogLost

__all__ = ["CatalogLost"]
