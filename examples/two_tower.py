"""Two towers as in CLIP: images against texts, both ways, with a learnable temperature and no labels."""

import torch
from torch import nn

import clce_ext


class TwoTowers(nn.Module):
    def __init__(self, dim: int = 16, temperature: float = 0.07):
        super().__init__()
        self.image, self.text = nn.Linear(24, dim), nn.Linear(12, dim)
        # Learnt as its logarithm, so that it stays positive. 1 / temperature is CLIP's logit_scale.exp().
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.log_temperature.clamp_min(-4.6).exp()


def clip_loss(images, texts, temperature):
    """Row i of one side belongs to row i of the other: the mean of two cross-entropies, B x B logits each."""
    criterion = clce_ext.NTXentLoss(temperature)
    return (criterion(images, keys=texts) + criterion(texts, keys=images)) / 2


def main(steps: int = 40) -> tuple[float, float]:
    """The loss of the first and of the last step."""
    torch.manual_seed(0)
    to_image, to_text = torch.randn(8, 24), torch.randn(8, 12)
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        meaning = torch.randn(64, 8)
        loss = clip_loss(*model(meaning @ to_image, meaning @ to_text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history[0], history[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
