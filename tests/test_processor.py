"""Tests whose results depend on kernels that libraries choose by the processor, run again as on lesser processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
HERE = Path(__file__).parent
LESSER = {  # the instructions that libraries may use, and tests that meet their kernels
    "without AVX512": (
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        ["base/test_quantization.py", "train/test_optimizers.py", "run/test_checkpoint.py", "train/test_loop.py"],
    ),
    "AVX512 without bf16": (
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        ["base/test_quantization.py", "plan/test_memory.py::test_predicted_peak_is_the_real_peak"],
    ),
}


@pytest.mark.host
@pytest.mark.parametrize("instructions", LESSER)
def test_what_holds_here_holds_on_a_lesser_processor(instructions):
    limits, files = LESSER[instructions]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-q", *(str(HERE / file) for file in files)]
    done = subprocess.run(command, env=own | limits, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
