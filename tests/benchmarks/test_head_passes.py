"""The head for GPUs moves its logits as often as `scoring/fused_head.py` says."""

import json
import subprocess
import sys

import pytest

from benchmarks.roofline.fake_device import compiler
from benchmarks.work import ROOT

pytestmark = pytest.mark.slow

# A separate process, because the fake device must be registered before torch is imported.
COUNT = """
import json
from benchmarks.roofline.fake_device import load_device
load_device()
import benchmarks.head_passes as passes
passes.TOKENS = 512
found = {}
for with_gradient in (True, False):
    for name, scored in passes.heads().items():
        work, _ = passes.counted(scored, with_gradient)
        wide = [w for w in work if not w.flop]
        found[f"{name.split(',')[0]} {with_gradient}"] = sum(w.bytes for w in wide)
print("COUNTS " + json.dumps(found))
"""


def test_bytes_of_passes_per_logit():
    """Products (2 bytes written, 2 read for the gradient) are not passes: 24 − 4 and 16 − 2 bytes per logit are left.

    In place: fp32 copy 6, maximum 4, subtraction 8, exponential 8, sum 4, half-precision copy
    6. Tensors of width H or less add less than 2 %: H is 2,560, the vocabulary has 151,936
    tokens, and the gradient uses about eight such tensors, of 2 to 8 bytes per element.
    """
    if compiler() is None:
        pytest.skip("needs a C++ compiler, for a CUDA device that does nothing")
    run = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, timeout=600)
    line = next((line for line in run.stdout.splitlines() if line.startswith("COUNTS ")), None)
    assert line, run.stderr[-3000:]
    logits = 512 * 151_936
    per_logit = {name: moved / logits for name, moved in json.loads(line.removeprefix("COUNTS ")).items()}
    assert per_logit["ours True"] == pytest.approx(6 + 8 + 6, rel=0.05)
    assert per_logit["ours False"] == pytest.approx(6 + 8, rel=0.02)
    assert per_logit["in place True"] == pytest.approx(6 + 4 + 8 + 8 + 4 + 6, rel=0.05)
    assert per_logit["in place False"] == pytest.approx(6 + 4 + 8 + 8 + 4, rel=0.02)
