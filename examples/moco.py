"""A queue as in MoCo: two views of each image, the second by a slowly moving copy of the encoder.

In MoCo an image's only negatives are the queue's entries. Here the other images' keys of the batch are
negatives too: they are at hand and up to date.
"""

import copy

import torch
from torch import nn

import clce_ext


def main(steps: int = 40, momentum: float = 0.99) -> tuple[float, float]:
    """The loss of the first step with a full queue, and of the last step."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
    slow = copy.deepcopy(encoder).requires_grad_(False)
    queue = clce_ext.EmbeddingQueue(size=512, dim=32)
    criterion = clce_ext.NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    images = torch.arange(64)  # every image is a class of its own
    history = []
    for _ in range(steps):
        x = torch.randn(64, 16)
        first, second = (x + 0.1 * torch.randn_like(x) for _ in range(2))
        with torch.no_grad():
            keys = slow(second)
        loss = criterion(encoder(first), images, keys=keys, key_labels=images, queue=queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(keys)  # without labels: negatives for every later image
        with torch.no_grad():
            for theirs, ours in zip(slow.parameters(), encoder.parameters(), strict=True):
                theirs.lerp_(ours, 1 - momentum)
        history.append(loss.item())
    # Before the queue is full there are fewer negatives.
    return history[512 // 64], history[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
