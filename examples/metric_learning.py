"""pytorch-metric-learning: our losses where it expects one of its own.

Its trainers call ``loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)``. Embeddings and references
fit. What does not: the pairs that a miner chose (here hardness weighs all pairs, none is left out), reducers
and distances (``reduction=`` and the temperature are ours).
"""

import torch
from torch import nn

import clce_ext


class MetricLearningLoss(nn.Module):
    """One of the losses of clce_ext with the signature of pytorch-metric-learning's."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        if indices_tuple is not None:
            raise ValueError("clce_ext's losses take all pairs: leave the miner out")
        if ref_emb is None:
            return self.criterion(embeddings, labels)
        return self.criterion(embeddings, labels, keys=ref_emb, key_labels=ref_labels)


def main(steps: int = 40) -> tuple[float, float]:
    """The loss of the first and of the last step."""
    torch.manual_seed(0)
    centres, model = torch.randn(4, 16), nn.Linear(16, 8)
    loss_func = MetricLearningLoss(clce_ext.SCHaNeLoss(temperature=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        labels = torch.randint(4, (64,))
        loss = loss_func(model(centres[labels] + torch.randn(64, 16)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history[0], history[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
