"""Callbacks (Poutyne's). Each has `state_dict` and `load_state_dict`, or says `stateless = True`."""

import sys

# Poutyne imports these if they are there, for what is not used here: 3 s of every start.
_SPARED = [name for name in ("torchmetrics", "pandas", "matplotlib") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_SPARED))  # type: ignore[arg-type]
try:
    import poutyne as poutyne
finally:
    for name in _SPARED:
        del sys.modules[name]

from src.callbacks.early_stopping import EarlyStopping as EarlyStopping
from src.callbacks.lr_schedule import LRSchedule as LRSchedule
from src.callbacks.warmup_cosine import WarmupCosine as WarmupCosine
