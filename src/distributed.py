"""Several processes that train one model, started by torchrun: which rows each has, what they share, how they agree.

The global batch is that of a single process. Rank r takes its rows of it; gradients, losses and outputs are put
together so that the numbers are those of a single process, too. Every wait ends after TIMEOUT.
"""

import copy
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from src.config import Failed
from src.data.dataset import Part
from src.stop import Stopped, StopRequest

TIMEOUT = timedelta(minutes=10)
SIGNAL_BASE = 1000  # a stop that is agreed on: rank * SIGNAL_BASE + signal
LOST = ("gloo", "NCCL", "onnection", "Timed out", "Broken pipe", "store", "peer")  # what errors of a wait speak of
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")  # a mask times the input, drawn row by row


class Team:
    """The processes of a run, of which this is rank `rank`; for one alone nothing here does anything."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.part, self.size = Part(rank, size), size
        self.members: list[tuple[str, int]] = []  # host and process of each, once they have met
        self._asked: tuple[Any, Tensor] | None = None

    def start(self, device: torch.device) -> None:
        """Meets the others: gloo for tensors on the CPU, nccl for those on GPUs."""
        if self.size == 1:
            return
        if sys.platform == "linux":  # if torchrun is killed, its processes get this, and commit
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if device.index is not None:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # after a restart its store still has the old addresses
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        members: list[Any] = [None] * self.size
        dist.all_gather_object(members, (socket.gethostname(), os.getpid()))
        self.members = members

    def end(self) -> None:
        """Parts, together: from here on each process is alone."""
        if self.members:
            if self._asked:
                self._asked[0].wait()
            dist.barrier()
            dist.destroy_process_group()
            self.members = []

    def share(self, value: Any) -> Any:
        """The first process's value, for all."""
        if self.members:
            box = [value]
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
            value = box[0]
        return value

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.members:
            dist.all_gather_object(values, value)
        return values

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Gives all processes the first one's values of the tensors, each [...]."""
        if self.members:  # in one message: each costs a wait
            for tensor, first in zip(tensors, self.share([t.cpu() for t in tensors]), strict=True):
                tensor.copy_(first)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes of `values` [...], of the same shape in each; changed in place."""
        if self.members:
            dist.all_reduce(values)
        return values

    def gather(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Whole batches [size, ...] of these sizes, from this process's rows of each of them."""
        if not self.members:
            return list(parts)
        counts = [[len(range(n)[Part(rank, self.size).rows(n)]) for n in sizes] for rank in range(self.size)]
        own = torch.cat(list(parts))
        padded = own.new_zeros(max(map(sum, counts)), *own.shape[1:])  # all must send as much
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded)
        split = [torch.split(rows[: sum(c)], c) for rows, c in zip(received, counts, strict=True)]
        return [torch.cat(batch) for batch in zip(*split, strict=True)]

    def agree(self, signal: int, is_due: bool) -> tuple[int, int, bool]:
        """A signal, or 0, the rank that got it, and whether a commit is due: the same answer for all.

        All call it in turn. What is said at one call is answered at the next, so that nobody waits.
        """
        if not self.members:
            return signal, 0, is_due
        coded = self.part.rank * SIGNAL_BASE + signal if signal else 0
        before, said = self._asked, torch.tensor([coded, is_due])
        self._asked = dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True), said
        if before is None:
            return 0, 0, False
        before[0].wait()
        coded, due = before[1].tolist()
        return coded % SIGNAL_BASE, coded // SIGNAL_BASE, bool(due)

    @contextmanager
    def watching(self, stop: StopRequest) -> Iterator[None]:
        """Raises Failed, which names it if it was here, when another process of the run has ended or hangs."""
        try:
            yield
        except (RuntimeError, Stopped) as error:
            # torchrun sends a signal, too, which may come in the middle of the error.
            cause = error.__context__ if isinstance(error, Stopped) else error
            if not self.members or not isinstance(cause, RuntimeError) or not any(w in str(cause) for w in LOST):
                raise
            until = time.monotonic() + 2  # torchrun may be a moment behind
            with stop.deferred():
                while not (ended := self._ended()) and time.monotonic() < until:
                    time.sleep(0.05)
            if not ended:
                traceback.print_exception(cause)
            raise Failed(
                f"{ended or 'a process of the run, on another machine or hanging,'} has ended or does not answer "
                f"({str(cause).splitlines()[0][:120]}); its stderr.rankN.txt may say why. What was committed is "
                "intact: go on with training_loop.reload=True"
            ) from None

    def _ended(self) -> str:
        """Names one of the processes on this machine that is no more."""
        here = socket.gethostname()
        for rank, pid in [(rank, pid) for rank, (host, pid) in enumerate(self.members) if host == here]:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return f"rank {rank} (process {pid})"
        return ""


ALONE = Team()


@contextmanager
def replaced(functions: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Has other functions stand in torch.nn.functional, where layers look theirs up by name at each call."""
    own = {name: getattr(F, name) for name in functions}
    vars(F).update(functions)
    try:
        yield
    finally:
        vars(F).update(own)


class GlobalBatch:
    """Has dropout and batch norm treat a process's rows as rows of the global batch.

    Dropout draws the mask of the global batch, and keeps its own rows of it: all processes have the same state of
    their random numbers, that of a single process. Batch norm on a CPU, where torch has no synchronised one, takes
    mean and variance over the rows of all.
    """

    def __init__(self, part: Part, sync_batch_norm: bool) -> None:
        self.part, self.n = part, 0
        # A TorchFunctionMode would be asked at each call of torch: a tenth of a millisecond a step.
        self.functions: dict[str, Callable[..., Tensor]] = {
            name: partial(self._dropout, getattr(F, name)) for name in DROPOUTS
        }
        if sync_batch_norm:
            self.functions["batch_norm"] = partial(self._batch_norm, F.batch_norm)

    @contextmanager
    def of(self, n: int) -> Iterator[None]:
        """Within it a forward, and what a backward computes again, is of our rows of a batch of n."""
        self.n = n
        with replaced(self.functions):
            yield

    def _dropout(
        self, draw: Callable[..., Tensor], x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        own = self.part.rows(self.n)
        n_own = own.stop - own.start
        repeats = len(x) // n_own if n_own else 1  # several rows an image, such as tokens
        if not training or p == 0 or len(x) != repeats * n_own:  # the last: no rows of images
            return draw(x, p, training, inplace)
        ones = x.new_ones(self.n * repeats, *x.shape[1:])
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):  # draws follow the memory's order
            ones = ones.contiguous(memory_format=torch.channels_last)
        mask = draw(ones, p)
        return x * mask[own.start * repeats : own.stop * repeats]

    def _batch_norm(
        self, normalise: Callable[..., Tensor], x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if not training:
            return normalise(x, running_mean, running_var, weight, bias, False, momentum, eps)
        kind, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 under autocast
        columns, others = (1, -1) + (1,) * (x.ndim - 2), [0, *range(2, x.ndim)]
        sums = _Sum.apply(torch.cat([x.sum(others), x.new_tensor([x.numel() / x.shape[1]])]))
        n = sums[-1].detach()  # values a channel
        mean: Tensor = sums[:-1] / n
        centred = x - mean.view(columns)
        variance: Tensor = _Sum.apply((centred * centred).sum(others)) / n
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * n / (n - 1), momentum)
        scale = (variance + eps).rsqrt()
        y = centred * (scale if weight is None else scale * weight).view(columns)
        return (y if bias is None else y + bias.view(columns)).to(kind)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(context, gradients[0])


def unreached_draws(network: nn.Module, x: Tensor) -> bool:
    """Whether training on x [B, ...] draws random numbers in another way than by dropout: stochastic depth, say."""

    def without(draw: Callable[..., Tensor], rows: Tensor, *options: Any, **named: Any) -> Tensor:
        return rows if len(rows) % len(x) == 0 else draw(rows, *options, **named)

    nothing = {name: partial(without, getattr(F, name)) for name in DROPOUTS}

    def draws() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.device.type == "cuda" else [])]

    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.no_grad(), replaced(nothing):
        before = draws()
        copy.deepcopy(network).train()(x)
        return not all(map(torch.equal, before, draws()))
