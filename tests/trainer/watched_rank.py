"""One rank of a small program that meets others in collectives, and misbehaves when told to.

`python -m tests.trainer.watched_rank MODE BAD_RANK TIMEOUT_S`, with torchrun's variables set.
"""

import sys
import time

from lwz_trainer.parallel import Ranks, start_ranks


def work(ranks: Ranks, mode: str, bad_rank: int) -> None:
    for step in range(10_000):
        ranks.enter(f"step {step}")
        ranks.sum([1.0])
        print(f"step {step}", flush=True)
        if step == 2 and ranks.rank == bad_rank:
            ranks.enter(f"being bad, {mode}")
            if mode == "hang":
                time.sleep(10_000)
            if mode == "raise":
                raise RuntimeError("a bug of this rank alone")
            if mode == "leave":
                return
        if step == 5 and mode == "finish":
            return
        time.sleep(0.02)


def main() -> None:
    mode, bad_rank, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ranks = start_ranks(device="cpu", num_threads=1, timeout_s=timeout_s)
    try:
        work(ranks, mode, bad_rank)
    except BaseException as error:
        ranks.abandon(error)
        raise
    ranks.close()


if __name__ == "__main__":
    main()
