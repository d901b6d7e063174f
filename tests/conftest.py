"""Settings of every test run: one thread, which is fastest for such small models and
gives the same results everywhere.
"""

import gc
import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import set_seed

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """The Trainer collects garbage at each start of training: half a second each, were all modules looked through.

    What exists before a test module's own fixtures is left out of later collections, and still freed when nothing
    refers to it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_process_state() -> Iterator[None]:
    """Reset state of the process that one test could leave to the next.

    accelerate keeps devices, engines and the state of the last data loader in shared objects; TrainingArguments sets
    environment variables; models and samplers use global random numbers.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    set_seed(0)
    with patch.dict(os.environ):
        yield
