"""Models a run can start from: those fetched without a hub, directories and hub ids.

Nothing here loads torch: the conversions import what they need when a model is fetched.
"""

from workers.models.cache import KNOWN_MODELS, cached_models
from workers.models.fetch import fetch_model
from workers.models.resolve import resolve_model

__all__ = ["KNOWN_MODELS", "cached_models", "fetch_model", "resolve_model"]
