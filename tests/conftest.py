import os

from hypothesis import settings

# Nothing here is downloaded: a test that would need the hub fails at once instead of hanging.
os.environ["HF_HUB_OFFLINE"] = "1"

# Shared, noisy cores: an example that is slow once says nothing.
settings.register_profile("onebase", deadline=None)
settings.load_profile("onebase")
