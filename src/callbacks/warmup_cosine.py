import math
from typing import Any

import gin
from poutyne import Callback


@gin.register
class WarmupCosine(Callback):
    """Linear warm-up to the optimizer's own learning rate, then half a cosine down, by optimizer steps.

    total_steps: the horizon, those of the warm-up included; after it the rate stays where it is. It does not depend on
    n_epochs: a run that trains longer is the same run. final: the last rate as a share of the optimizer's.
    Source: Loshchilov and Hutter 2017, SGDR, eq. 5; the warm-up: Goyal et al. 2017, section 2.2.
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> None:
        super().__init__()
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps = {warmup_steps} must be below total_steps = {total_steps}")
        self.total_steps, self.warmup_steps, self.final = total_steps, warmup_steps, final
        self.step = 0

    def factor(self, step: int) -> float:
        """The share of the optimizer's learning rate at a step; steps count from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))

    def on_train_batch_begin(self, batch_number: int, logs: dict[str, Any]) -> None:
        for group in self.model.optimizer.param_groups:
            # initial_lr is torch's name, and is kept in the checkpoint.
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor(self.step)
        if self.step == self.total_steps and self.model.updated:
            print(f"WarmupCosine: all {self.step} total_steps are done, the learning rate stays at {group['lr']:.3g}")

    def on_train_batch_end(self, batch_number: int, logs: dict[str, Any]) -> None:
        self.step += self.model.updated

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
