"""`python -m tests.trainer.measured_run ARGUMENT …`: a run that first prints its own size in GB."""

import sys

import torch

from lwz_trainer.__main__ import main
from lwz_trainer.train import loop  # so that its libraries count as the program
from lwz_trainer.train.metrics import peak_memory_gb

__all__: list[str] = []

if __name__ == "__main__":
    print(loop.__name__, peak_memory_gb(torch.device("cpu")), flush=True)
    sys.exit(main(sys.argv[1:]))
