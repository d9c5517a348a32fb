"""Chains on the workers of a Dask cluster. Run it with one argument that says which: local (the default), gpus or slurm.

python examples/on_a_cluster.py local        two worker processes on this machine
python examples/on_a_cluster.py gpus         one worker per GPU of this machine (pip install dask-cuda)
python examples/on_a_cluster.py slurm        jobs of one GPU each (pip install dask-jobqueue); edit `slurm` for your queues

The output folder must be on a file system that all workers see. Start it again with the same arguments after anything went
wrong: it goes on from what was committed.
"""

import sys
from contextlib import ExitStack
from typing import Any

import dask
import numpy as np
from datasets import Dataset
from distributed import Client
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import devinterp


def local() -> Any:
    from distributed import LocalCluster

    # otherwise Dask has its workers give memory back at once, and take it anew at every operator
    keep_memory = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    environment = dask.config.get("distributed.nanny.pre-spawn-environ") | keep_memory
    dask.config.set({"distributed.nanny.pre-spawn-environ": environment})
    return LocalCluster(n_workers=2, threads_per_worker=1)  # a chain takes one core


def gpus() -> Any:
    from dask_cuda import LocalCUDACluster

    return LocalCUDACluster()  # one worker, and so one chain at a time, per GPU


def slurm() -> Any:
    from dask_jobqueue import SLURMCluster

    cluster = SLURMCluster(
        queue="gpu",
        cores=1,  # tasks at a time in a worker
        processes=1,
        job_cpu=8,
        memory="64GB",
        walltime="12:00:00",
        job_extra_directives=["--gres=gpu:1"],
        worker_extra_args=["--lifetime", "11h50m", "--lifetime-stagger", "5m"],  # hand over before the job is killed
    )
    cluster.scale(jobs=8)
    return cluster


def main(kind: str = "local", output: str = "runs/cluster") -> None:
    # a small model with random weights stands for yours
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    model = GPTNeoXForCausalLM(config)
    tokens = Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(0, 256, (256, 64)).tolist()})
    restrictions = {"full": None, "l0h0": "l0h0", "l1h0": "l1h0", "l1 mlp": "l1 mlp"}
    with ExitStack() as held:
        client = held.enter_context(Client(held.enter_context({"local": local, "gpus": gpus, "slurm": slurm}[kind]())))
        result = devinterp.susceptibilities(
            model, tokens, {"task": tokens, "code": tokens}, restrictions, sampling_task="task", mean_over="dataset",
            lr="auto", n_beta=30.0, localization=1000.0, sampling_method="leimkuhler_matthews", batch_size=8, num_chains=4,
            num_draws=20, output_path=output, executor=client.get_executor(),
        )  # fmt: skip
    print(result["susceptibilities"].to_dataset())


if __name__ == "__main__":  # Dask starts local workers with a look at this script
    main(*sys.argv[1:])
