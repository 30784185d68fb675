"""NVIDIA Triton through PyTriton: its own C++ server, the model in its Python backend, its dynamic batcher."""

from __future__ import annotations

import os
import sysconfig

import numpy as np
from pytriton.decorators import batch  # type: ignore[import-not-found]
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor  # type: ignore[import-not-found]
from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found]

from loadtests.peers.servers.served import (
    DELAY_MS,
    FEATURES,
    HOST,
    MOST_ROWS,
    NAME,
    OUTPUTS,
    Array,
    Served,
    grpc_port,
    http_port,
)


def main() -> None:
    # The backend's process loads whatever libpython the linker finds first: it has to be this interpreter's own.
    os.environ["LD_LIBRARY_PATH"] = str(sysconfig.get_config_var("LIBDIR"))
    model = Served()

    @batch  # type: ignore[untyped-decorator]
    def infer(x: Array) -> dict[str, Array]:
        return {"y": model.run(x)}

    batcher = DynamicBatcher(max_queue_delay_microseconds=1000 * DELAY_MS)
    config = TritonConfig(
        http_address=HOST,
        http_port=http_port(),
        grpc_address=HOST,
        grpc_port=grpc_port(),
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name=NAME,
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=(FEATURES,))],
            outputs=[Tensor(name="y", dtype=np.float32, shape=(OUTPUTS,))],
            config=ModelConfig(max_batch_size=MOST_ROWS, batching=True, batcher=batcher),
        )
        triton.serve()


if __name__ == "__main__":
    main()
