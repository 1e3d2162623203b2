"""Plain PyTorch: cross-entropy and a contrastive loss with hard negatives on the same batch (CLCE)."""

import torch
from torch import nn

import clce_ext


class Classifier(nn.Module):
    def __init__(self, dim: int = 32, classes: int = 4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        embeddings = self.backbone(x)
        return self.head(embeddings), embeddings


def main(steps: int = 30) -> tuple[float, float]:
    """The loss of the first and of the last step."""
    torch.manual_seed(0)
    centres = torch.randn(4, 16)
    model, criterion = Classifier(), clce_ext.CLCELoss(weight=0.9, temperature=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        labels = torch.randint(4, (64,))
        logits, embeddings = model(centres[labels] + torch.randn(64, 16))
        loss = criterion(logits, embeddings, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history[0], history[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
