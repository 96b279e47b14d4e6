"""Settings for all tests: reproducible examples, no deadlines, one thread, and the scripts of tools/ importable."""
import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

# "fixed" draws the same examples on every run, so that a failure is about the change at hand;
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# The networks are tiny: one thread is as fast, and the order of additions does not depend on the number of cores.
torch.set_num_threads(1)
