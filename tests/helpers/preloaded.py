"""What most processes of tests import (processes.py)."""

from __future__ import annotations

import accelerate  # noqa: F401
import torch
import torch._dynamo  # by optimizers, when they are used first
import torch.distributed

import vpd_fast.bench.catalog
import vpd_fast.cli.main
import vpd_fast.evaluation
import vpd_fast.training.trainer  # noqa: F401

from . import runs  # noqa: F401

torch.set_num_threads(1)
