"""Programs compiled for an H100 and a TPU v5e that are not here: their kernels and bytes, asserted and shown."""

import os

# The devices are descriptions alone, so all that runs does so on the CPU, also on a machine that has a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What libtpu would ask of a machine with a TPU, and complain about here; and more than one process may load it.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
