"""GPUs that nvidia-smi calls healthy and CUDA cannot use: found in the engine's image, before weights are fetched."""

from __future__ import annotations

import pytest
from conftest import Life

FAULT = "/etc/nvidia-stand-in/cuda"
CASES = {
    "802": "cuInit: error 802, system not yet initialized",
    "999 3": "cuDevicePrimaryCtxRetain on GPU 3: error 999, unknown error",
}


@pytest.mark.parametrize("fault", CASES)
def test_a_node_without_cuda_is_refused_before_the_weights_are_fetched(fault: str, node: Life) -> None:
    node.run(f"systemctl stop glm-engine && mkdir -p $(dirname {FAULT}) && echo '{fault}' > {FAULT}")
    # The CDI file mounts the folder of the fault where it is there as the file is written.
    node.run("systemctl restart nvidia-cdi-refresh")
    weights = node.run("systemctl show glm-weights.service --property=InvocationID").strip()
    try:
        assert len(node.run("nvidia-smi -L").splitlines()) == 8
        run = node.fleet.play(glm_model_revision="2" * 40)
        assert run.code == 2
        assert f"CUDA cannot use the GPUs (found {CASES[fault]}, wanted a context on each of 8)" in run.messages[0]
        assert node.run("systemctl show glm-weights.service --property=InvocationID").strip() == weights
    finally:
        node.run(f"rm -f {FAULT}; systemctl start glm-engine")
    node.wait(node.serves)
