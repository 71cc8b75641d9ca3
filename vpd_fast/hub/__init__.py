"""The Hugging Face hub: models by the names of their repositories, and models uploaded with their cards."""

from vpd_fast.hub.download import MODEL_FILES, STABLE_DIFFUSION_FILES, local_path
from vpd_fast.hub.upload import push

__all__ = ["MODEL_FILES", "STABLE_DIFFUSION_FILES", "local_path", "push"]
