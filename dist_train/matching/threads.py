"""Threads and pages of a rank. Stands apart from FAISS, after whose import nobody may fork."""

import os
import sys

from threadpoolctl import threadpool_limits


def use_threads() -> None:
    """As many threads as OMP_NUM_THREADS says, or this rank's share of the processors.

    For FAISS, and for the BLAS and the OpenMP of every library that is loaded by now: ranks that
    were started without a launcher would each take all processors.
    """
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // ranks)))
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    threadpool_limits(threads)


def use_huge_pages() -> None:
    """Let torch ask for pages of 2 MB, where Linux gives them to those who ask.

    A product of the join is 4 MB that torch allocates anew: with pages of 4 kB their faults took
    nearly as long as the product. To be called before the process allocates its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
