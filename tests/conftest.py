"""Without a CUDA device Triton kernels run under Triton's interpreter, which has to be chosen before the
import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
