"""Hugging Face Trainer: its model, CLCE on the logits and on the class token. Needs transformers."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import clce_ext


class ContrastiveTrainer(Trainer):
    criterion = clce_ext.CLCELoss(weight=0.9, temperature=0.5)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True)
        embeddings = outputs.hidden_states[-1][:, 0]  # the class token
        loss = self.criterion(outputs.logits, embeddings, labels)
        return (loss, outputs) if return_outputs else loss


class Squares(torch.utils.data.Dataset):
    """Images of noise with a bright corner: which one is the class."""

    def __len__(self):
        return 256

    def __getitem__(self, i):
        image, label = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)), i % 4
        image[:, 8 * (label // 2) :, 8 * (label % 2) :][:, :8, :8] += 1
        return {"pixel_values": image, "labels": label}


def main(steps: int = 24) -> tuple[float, float]:
    """The loss of the first and of the last step that was logged."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=4,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-3,
            logging_steps=4, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )  # fmt: skip
        trainer = ContrastiveTrainer(ViTForImageClassification(config), arguments, train_dataset=Squares())
        trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(history[0]), float(history[-1])


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
