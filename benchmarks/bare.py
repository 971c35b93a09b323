"""A hand-written loop, as fast as it can be made: the small CNN, tensors in memory, a batch augmented at once.

python3 -m benchmarks.bare N_TRAIN N_EPOCHS        # prints the seconds of each epoch, validation included

Under torchrun each process has its rows of a batch, on the CPU.
"""

import os
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.synthetic import MEAN, STD, images

n_train, n_epochs, batch = int(sys.argv[1]), int(sys.argv[2]), 128
rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
(x, y), (x_valid, y_valid) = ((a.to(device), b.to(device)) for a, b in (images(n_train), images(1280, seed=1)))
scale = (1 / (255 * torch.tensor(STD, device=device))).view(3, 1, 1)
shift = (-torch.tensor(MEAN, device=device) / torch.tensor(STD, device=device)).view(3, 1, 1)
blocks, n_in = [], 3
for n_out in (32, 64, 128):
    blocks += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(n_out), nn.ReLU()]
    n_in = n_out
head = nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Dropout(0.0), nn.Linear(128, 10)
network = nn.Sequential(*blocks, *head).to(device, memory_format=torch.channels_last)
if size > 1:
    torch.distributed.init_process_group("gloo")
    network = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
columns = torch.stack([torch.arange(32), torch.arange(31, -1, -1)]).to(device)
for _ in range(n_epochs):
    began, losses, right = time.perf_counter(), [], []
    network.train()
    for rows in torch.randperm(n_train).split(batch):
        rows = rows.tensor_split(size)[rank]
        xb, yb = (a.index_select(0, rows.to(device)) for a in (x, y))
        top, left = torch.randint(9, (2, len(rows))).to(device)
        xb = F.pad(xb, (4,) * 4).unfold(2, 32, 1).unfold(3, 32, 1)[torch.arange(len(rows)), :, top, left]
        flip = columns[torch.randint(2, (len(rows),))]
        xb = xb.gather(3, flip[:, None, None].expand_as(xb))
        xb = xb.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)
        loss = F.cross_entropy(output := network(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        right.append((output.detach().argmax(1) == yb).sum())
    network.eval()
    with torch.no_grad():
        for xb, yb in zip(x_valid.split(batch), y_valid.split(batch), strict=True):
            xb, yb = xb.tensor_split(size)[rank], yb.tensor_split(size)[rank]
            xb = xb.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)
            right.append((network(xb).argmax(1) == yb).sum())
    found = f"{torch.stack(losses).mean():.4f} {torch.stack(right).sum()}"  # waits for the device
    if rank == 0:
        print(f"{time.perf_counter() - began:.4f} {found}", flush=True)
