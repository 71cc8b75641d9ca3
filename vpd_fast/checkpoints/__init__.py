"""Reading, writing and converting checkpoints. No file that is read runs code."""

from vpd_fast.checkpoints.checkpoint import Checkpoint
from vpd_fast.checkpoints.checksums import Verification, verify
from vpd_fast.checkpoints.convert import TARGETS, convert
from vpd_fast.checkpoints.formats import open_checkpoint
from vpd_fast.checkpoints.infer import infer_config
from vpd_fast.checkpoints.load import load_checkpoint, load_pretrained, load_stable_diffusion
from vpd_fast.checkpoints.reader import read_tensor
from vpd_fast.checkpoints.report import ConvertReport, LoadReport
from vpd_fast.checkpoints.save import save_pretrained

__all__ = [
    "TARGETS",
    "Checkpoint",
    "ConvertReport",
    "LoadReport",
    "Verification",
    "convert",
    "infer_config",
    "load_checkpoint",
    "load_pretrained",
    "load_stable_diffusion",
    "open_checkpoint",
    "read_tensor",
    "save_pretrained",
    "verify",
]
