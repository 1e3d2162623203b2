"""timm's models behind one face, their weights, and the objectives' stages."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import nn

from clce_ext import CLCELoss, GradCache, LaCViTLoss, SCHaNeLoss
from clce_ext.train import checkpoint, models, plots
from clce_ext.train.cli import parse
from clce_ext.train.config import TrainConfig
from clce_ext.train.errors import TrainingError
from clce_ext.train.loop import train
from clce_ext.train.objectives import OBJECTIVES
from clce_ext.train.predict import load_saved
from clce_ext.train.stages import Stage
from clce_ext.train.stages import stages as stages_of

from .training import quick_config


def create(name="beit_tiny_digits", classes=7, projection=False, **options) -> models.FineTuner:
    return models.create_model(TrainConfig.from_dict({"model": name} | options), classes, projection)


def test_the_digits_model_is_timms_beit():
    model = create()
    assert isinstance(model.backbone, Beit)
    assert model(torch.randn(2, 3, 32, 32))[0].shape == (2, 7)


@pytest.mark.parametrize(
    "name",
    ["beit_tiny_digits", "vit_tiny_patch16_224", "resnet10t", "convnext_atto", "mobilenetv3_small_050"],
)
def test_any_backbone_classifies_what_it_embeds(name):
    size = 32 if name == "beit_tiny_digits" else 64
    model = create(name, image_size=size).eval()
    x = torch.randn(2, 3, size, size)
    logits, embeddings = model(x)
    assert embeddings.shape == (2, model.backbone.get_classifier().in_features)
    assert torch.allclose(logits, model.backbone(x), atol=1e-5)


def test_distilled_deit_has_two_classifiers():
    model = create("deit_tiny_distilled_patch16_224", image_size=32).eval()
    logits, embeddings = model(x := torch.randn(2, 3, 32, 32))
    assert embeddings.shape == (2, 2 * 192)
    assert torch.allclose(logits, model.backbone(x), atol=1e-5)
    model.set_mode("head")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"backbone.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "efficientvim_m1"])
def test_backbones_without_one_embedding_are_refused(name):
    with pytest.raises(TrainingError, match=f"--model {name}: "):
        create(name)


def test_modes_give_the_outputs_and_the_gradients_of_their_stage():
    model = create(projection=True, projection_dim=5, drop_path=0.2)
    x = torch.randn(3, 2, 3, 32, 32)
    classifier = set(model.backbone.get_classifier().parameters())
    shapes = {
        "joint": [(3, 2, 7), (3, 2, 96)],
        "logits": [(3, 2, 7)],
        "contrast": [(3, 2, 5)],
        "head": [(3, 2, 7)],
    }
    for mode, wanted in shapes.items():
        model.set_mode(mode)
        model.train()
        model.zero_grad(set_to_none=True)
        outputs = model(x)
        assert [tuple(o.shape) for o in outputs] == wanted
        sum(o.square().sum() for o in outputs).backward()
        touched = {p for p in model.parameters() if p.grad is not None}
        assert touched == {p for p in model.parameters() if p.requires_grad}
        backbone = set(model.backbone.parameters())
        projection = set(model.projection.parameters())
        assert (
            touched
            == {
                "joint": backbone,
                "logits": backbone,
                "contrast": (backbone - classifier) | projection,
                "head": classifier,
            }[mode]
        )
    assert not model.backbone.training  # drop-path rests with the frozen backbone


def test_weights_of_timm_load_and_grids_are_resized(tmp_path):
    """Relative-position tables of another image size, and a classifier of other classes."""
    saved = timm.create_model("beit_tiny_digits", num_classes=11)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "model.pth")
    for file in ("model.safetensors", "model.pth"):
        same = create(checkpoint=str(tmp_path / file)).backbone
        assert torch.equal(same.blocks[1].mlp.fc1.weight, saved.blocks[1].mlp.fc1.weight)
        table = "blocks.0.attn.relative_position_bias_table"
        assert torch.equal(same.state_dict()[table], saved.state_dict()[table])
        larger = create(checkpoint=str(tmp_path / file), image_size=48).backbone
        assert larger.state_dict()[table].shape[0] > saved.state_dict()[table].shape[0]
        assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 7)


def test_batch_norm_rests_where_weights_were_given(tmp_path):
    """Running statistics stay in every mode of training; scales and shifts receive gradients."""
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    given = {"image_size": 32, "checkpoint": str(tmp_path / "resnet.pth")}
    images = torch.randn(6, 3, 32, 32)
    for options, rests in (
        (given, True),
        (given | {"batch_norm": "train"}, False),
        ({"image_size": 32}, False),
        ({"image_size": 32, "batch_norm": "frozen"}, True),
    ):
        model = create("resnet10t", **options)
        before = {name: value.clone() for name, value in model.named_buffers()}
        for mode in ("joint", "contrast"):
            model.set_mode(mode)
            model.train()
            sum(output.square().sum() for output in model(images)).backward()
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers()) == rests
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms and all(layer.weight.grad is not None for layer in norms)


@pytest.mark.parametrize("name", ["beit_tiny_digits", "resnet10t", "convnext_atto"])
def test_a_new_classifier_on_given_weights_starts_at_zero(tmp_path, name):
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    size = {} if name == "beit_tiny_digits" else {"image_size": 32}
    saved = timm.create_model(name, num_classes=11)
    torch.save(saved.state_dict(), tmp_path / "eleven.pth")
    headless = timm.create_model(name, num_classes=0)
    torch.save(headless.state_dict(), tmp_path / "headless.pth")
    for file in ("eleven.pth", "headless.pth"):
        (logits,) = create(name, checkpoint=str(tmp_path / file), **size).eval()(images)[:1]
        assert nn.functional.cross_entropy(logits, labels).item() == pytest.approx(math.log(7), abs=1e-6)
    # Nobody needs the counters of BatchNorm, and files may leave them out.
    state = {k: v for k, v in saved.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "eleven.pth")
    # A classifier that came with the weights is kept, and a model from scratch keeps timm's initialisation.
    kept = create(name, classes=11, checkpoint=str(tmp_path / "eleven.pth"), **size).backbone
    assert torch.equal(kept.get_classifier().weight, saved.get_classifier().weight)
    assert create(name, **size).backbone.get_classifier().weight.any()


def test_gradient_caching_is_exact_with_batch_norm_at_rest():
    images, labels = torch.randn(8, 3, 32, 32), torch.tensor([0, 1, 2, 3] * 2)
    criterion = CLCELoss()
    gradients = {}
    for batch_norm in ("frozen", "train"):
        model = create("resnet10t", classes=4, image_size=32, batch_norm=batch_norm).double().train()
        for size in (8, 3):
            model.zero_grad()
            GradCache(model, criterion, size)(images.double(), labels)
            gradients[batch_norm, size] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(gradients["frozen", 8], gradients["frozen", 3], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(gradients["train", 8], gradients["train", 3], rtol=1e-2)


def test_position_embeddings_are_resized(tmp_path):
    saved = timm.create_model("vit_tiny_patch16_224", img_size=64)
    torch.save(saved.state_dict(), tmp_path / "vit.pth")
    model = create("vit_tiny_patch16_224", image_size=96, checkpoint=str(tmp_path / "vit.pth"))
    assert model.backbone.pos_embed.shape[1] == 37
    assert model(torch.randn(1, 3, 96, 96))[0].shape == (1, 7)


def test_weights_that_do_not_load(tmp_path):
    saved = timm.create_model("beit_tiny_digits")
    good = tmp_path / "good.safetensors"
    save_file(saved.state_dict(), good)
    torch.save(saved.state_dict(), tmp_path / "good.pth")
    for name in ("good.safetensors", "good.pth"):
        content = (tmp_path / name).read_bytes()
        broken = tmp_path / f"broken_{name}"
        for part in (content[: len(content) // 2], content[:20], b""):
            broken.write_bytes(part)
            with pytest.raises(TrainingError, match=rf"{broken.name}: truncated"):
                create(checkpoint=str(broken))
    with pytest.raises(TrainingError, match=r"none\.pth: no such file"):
        create(checkpoint=str(tmp_path / "none.pth"))
    torch.save({"state_dict": {"weight": 3}}, tmp_path / "odd.pth")
    with pytest.raises(TrainingError, match="no state dict"):
        create(checkpoint=str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("other", ["vit_tiny_patch16_224", "resnet10t"])
def test_weights_of_another_architecture(tmp_path, other):
    torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
    with pytest.raises(TrainingError, match="not weights of beit_tiny_digits"):
        create(checkpoint=str(tmp_path / "other.pth"))
    save_file(timm.create_model("beit_tiny_digits").state_dict(), tmp_path / "beit.safetensors")
    with pytest.raises(TrainingError, match=f"not weights of {other}"):
        create(other, checkpoint=str(tmp_path / "beit.safetensors"))


def test_weights_with_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(TrainingError, match="not a file of weights"):
        create(checkpoint=str(tmp_path / "evil.pth"))


def test_names_that_timm_does_not_have():
    with pytest.raises(TrainingError, match=r"timm has no such model; near it: .*beit"):
        create("beit_enormous")
    for wrong, meant in (
        ("tf_efficientnet_light0", "tf_efficientnet_lite0"),
        ("resnet_50", "resnet50"),
        ("beit3_base", "beit3_base_patch16_224"),
        ("vit-base", "vit_base_patch16_224"),
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("BEiT_Base", "beit_base_patch16_224"),
    ):
        with pytest.raises(TrainingError, match=rf"near it: .*\b{meant}\b"):
            create(wrong)
    for pretrained in (False, True):
        with pytest.raises(TrainingError, match=r"resnet18 has no weights a1_in1; it has .*resnet18.a1_in1k"):
            create("resnet18.a1_in1", pretrained=pretrained)
    with pytest.raises(TrainingError, match="give one"):
        create(pretrained=True, checkpoint="x.pth")


def test_the_hub_out_of_reach(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(TrainingError, match=r"could not be fetched.*couldn't connect.*--checkpoint FILE"):
        create("vit_tiny_patch16_224", pretrained=True)


def test_parameter_groups_cover_what_is_trained():
    model = create(projection=True)
    for mode in model.MODES:
        model.set_mode(mode)
        for decay in (None, 0.7):
            groups = models.parameter_groups(model, 1.0, 0.05, decay)
            found = [p for g in groups for p in g["params"]]
            assert len(found) == len(set(found)) == sum(p.requires_grad for p in model.parameters())
    model.set_mode("joint")
    scales = {g["lr_scale"] for g in models.parameter_groups(model, 1.0, 0.05, 0.5)}
    assert max(scales) == 1.0 and min(scales) <= 0.5**4
    decays = {
        id(p): g["weight_decay"] for g in models.parameter_groups(model, 1.0, 0.05, 0.5) for p in g["params"]
    }
    assert decays[id(model.backbone.cls_token)] == 0 == decays[id(model.backbone.head.bias)]
    assert decays[id(model.backbone.head.weight)] == 0.05


def test_the_classifier_may_have_its_own_learning_rate():
    model = create()
    classifier = set(model.backbone.get_classifier().parameters())
    for decay in (None, 0.7):
        groups = models.parameter_groups(model, 1e-4, 0.05, decay, classifier_lr=5e-4)
        rates = {p: group["lr"] for group in groups for p in group["params"]}
        assert len(rates) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        assert {p for p, rate in rates.items() if rate == 5e-4} == classifier
        assert set(rates.values()) == {1e-4, 5e-4}
        assert {g["weight_decay"] for g in groups if "classifier" in g} == {0, 0.05}


@pytest.mark.parametrize("objective", ["ce", "clce"])
def test_the_classifiers_default_learning_rate(objective):
    (scratch,) = stages(objective=objective, lr=1e-3)
    (given,) = stages(objective=objective, lr=1e-3, checkpoint="weights.pth")
    (chosen,) = stages(objective=objective, lr=1e-3, checkpoint="weights.pth", head_lr=2e-3)
    assert [s.lr for s in (scratch, given, chosen)] == [1e-3] * 3
    assert [s.classifier_lr for s in (scratch, given, chosen)] == pytest.approx([1e-3, 5e-3, 2e-3])
    head = stages(objective="schane", lr=1e-3, head_lr=1e-2)[1]
    assert head.lr == head.classifier_lr == 1e-2


# Objectives


def stages(**options) -> list[Stage]:
    return stages_of(TrainConfig.from_dict(options))


def test_stages_add_up_to_the_epochs():
    for objective, names in {
        "ce": ["joint"],
        "clce": ["joint"],
        "supcon": ["contrast", "head"],
        "lacvit": ["contrast", "head"],
        "schane": ["contrast", "head"],
    }.items():
        found = stages(objective=objective, epochs=10, head_epochs=3)
        assert [s.name for s in found] == names and sum(s.epochs for s in found) == 10
    assert stages(objective="lacvit")[0].views == 2 and stages(objective="lacvit")[1].views == 1
    assert stages(objective="schane")[0].views == 1
    assert stages(objective="schane", head_backbone="trained")[1].mode == "logits"


def test_the_losses_are_the_familys():
    logits, z, y = torch.randn(12, 5), torch.randn(12, 8), torch.randint(3, (12,))
    (clce,) = stages(objective="clce", weight=0.7, temperature=0.3, beta=2.0, label_smoothing=0.1)
    wanted = CLCELoss(weight=0.7, temperature=0.3, beta=2.0, label_smoothing=0.1)(logits, z, y)
    assert torch.equal(clce.criterion(logits, z, y), wanted)
    parts = clce.criterion.parts
    assert 0.3 * parts["ce"] + 0.7 * parts["contrast"] == pytest.approx(wanted.item(), rel=1e-5)
    assert parts["contrast"].item() == pytest.approx(SCHaNeLoss(0.3, 2.0)(z, y).item(), rel=1e-4)
    views = torch.randn(6, 2, 8)
    assert torch.equal(stages(objective="lacvit")[0].criterion(views, y[:6]), LaCViTLoss()(views, y[:6]))
    assert torch.equal(stages(objective="schane")[0].criterion(z, y), SCHaNeLoss()(z, y))


def test_soft_targets_feed_the_cross_entropy_half():
    logits, z = torch.randn(6, 4), torch.randn(6, 8)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    hard = nn.functional.one_hot(labels, 4).float()
    (clce,) = stages(objective="clce")
    assert clce.criterion(logits, z, labels, targets=hard).item() == pytest.approx(
        clce.criterion(logits, z, labels).item(), rel=1e-5
    )
    soft = 0.6 * hard + 0.4 * hard.flip(0)
    found = clce.criterion(logits, z, labels, targets=soft)
    wanted = CLCELoss()(logits, z, soft.argmax(1), targets=soft)
    assert torch.equal(found, wanted)
    # Mixing labels with their partner's dominant class moves the contrastive half too.
    assert not torch.equal(clce.criterion(logits, z, labels, targets=0.2 * hard + 0.8 * hard.flip(0)), found)


def test_an_objective_says_everything_about_itself(capsys):
    """Choices, help, colours, stages and the docs agree with its record."""
    docs = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text()
    with pytest.raises(SystemExit):
        parse(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    for name, record in OBJECTIVES.items():
        assert record.name == name and plots.color(name) == record.color
        assert f"\n| `{name}` |" in docs
        assert record.summary in help_text
        first, *others = stages(objective=name)
        assert (first.views, first.mode, first.mixing) == (record.views, record.outputs, not record.two_stage)
        assert len(others) == record.two_stage
    assert len({record.color for record in OBJECTIVES.values()}) == len(OBJECTIVES)


def test_both_views_count_in_joint_stages():
    logits, z, y = torch.randn(5, 2, 4), torch.randn(5, 2, 8), torch.randint(4, (5,))
    (clce,) = stages(objective="clce", views=2)
    found = clce.criterion(logits, z, y)
    flat = CLCELoss()(logits.flatten(0, 1), z.flatten(0, 1), y.repeat_interleave(2))
    assert found.item() == pytest.approx(flat.item(), rel=1e-5)


def test_run_directories_serve_as_weights(tmp_path):
    saved = timm.create_model("beit_tiny_digits", num_classes=7)
    checkpoint.write_weights(tmp_path / "model.safetensors", saved.state_dict())
    loaded = create(checkpoint=str(tmp_path)).backbone
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


# Checkpoints as they are published


def beit_as_published(version: int) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """Masked-image modelling of a small BEiT or BEiT v2 under the published names, and its timm model."""
    model = timm.create_model("beit_tiny_digits", use_abs_pos_emb=False)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    table = state["blocks.0.attn.relative_position_bias_table"]
    state = {k: v for k, v in state.items() if not k.startswith(("head.", "fc_norm.")) and "table" not in k}
    state |= {
        "mask_token": torch.randn(1, 1, 96),
        "rel_pos_bias.relative_position_bias_table": table,
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
        "norm.weight": torch.randn(96),
        "norm.bias": torch.randn(96),
        "lm_head.weight": torch.randn(64, 96),
        "lm_head.bias": torch.randn(64),
    }
    if version == 2:
        for layer in range(2):
            state |= {
                k.replace("blocks.0", f"cls_pt_layers.{layer}"): v
                for k, v in state.items()
                if k.startswith("blocks.0")
            }
    return state, model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("pool", [None, "token"])
def test_masked_image_modelling_of_beit_loads(tmp_path, monkeypatch, version, pool):
    state, plain = beit_as_published(version)
    torch.save({"model": state}, tmp_path / "beit.pth")
    monkeypatch.setattr(models.timm, "create_model", lambda *_, **__: plain)
    plain.reset_classifier(7)
    model = create(checkpoint=str(tmp_path / "beit.pth"), global_pool=pool)
    found = model.backbone.state_dict()
    for block in range(4):
        assert torch.equal(
            found[f"blocks.{block}.attn.relative_position_bias_table"],
            state["rel_pos_bias.relative_position_bias_table"],
        )
    assert torch.equal(found["blocks.3.mlp.fc2.weight"], state["blocks.3.mlp.fc2.weight"])
    norm = state["norm.weight"] if pool == "token" else torch.ones(96)
    assert torch.equal(found["fc_norm.weight"], norm)
    notes = "; ".join(model.notes)
    assert "mask_token" in notes and "lm_head" in notes and ("cls_pt_layers" in notes) == (version == 2)
    assert "classifier new" in notes and ("fc_norm new" in notes) == (pool is None)


def test_masked_image_modelling_of_beit3_loads(tmp_path):
    """Under torchscale's names: images in branch A, text in branch B."""
    saved = timm.create_model("beit3_base_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
    own = {k: torch.randn_like(v) for k, v in saved.state_dict().items()}
    state = {
        "beit3.text_embed.weight": torch.randn(10, 24),
        "beit3.vision_embed.mask_token": torch.randn(1, 1, 24),
        "beit3.vision_embed.cls_token": own["cls_token"],
        "beit3.vision_embed.proj.weight": own["patch_embed.proj.weight"],
        "beit3.vision_embed.proj.bias": own["patch_embed.proj.bias"],
        "beit3.encoder.embed_positions.A.weight": torch.cat([torch.zeros(2, 24), own["pos_embed"][0]]),
        "beit3.encoder.embed_positions.B.weight": torch.randn(12, 24),
        "mlm_head.weight": torch.randn(10, 24),
        "mim_head.weight": torch.randn(64, 24),
    }
    names = {
        "norm1": "self_attn_layer_norm.{}",
        "norm2": "final_layer_norm.{}",
        "attn.proj": "self_attn.out_proj.{}",
        "attn.norm": "self_attn.inner_attn_ln.{}",
        "mlp.fc1": "ffn.{}.fc1",
        "mlp.fc2": "ffn.{}.fc2",
        "mlp.norm": "ffn.{}.ffn_layernorm",
    }
    for kind in ("weight", "bias"):
        state[f"beit3.encoder.layer_norm.A.{kind}"] = torch.randn(24)
        state[f"beit3.encoder.layer_norm.B.{kind}"] = torch.randn(24)
        for block in range(2):
            layer = f"beit3.encoder.layers.{block}"
            for name, theirs in names.items():
                tensor = own[f"blocks.{block}.{name}.{kind}"]
                state[f"{layer}.{theirs.format('A')}.{kind}"] = tensor
                state[f"{layer}.{theirs.format('B')}.{kind}"] = torch.randn_like(tensor)
            for part, tensor in zip("qkv", own[f"blocks.{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{layer}.self_attn.{part}_proj.A.{kind}"] = tensor
                state[f"{layer}.self_attn.{part}_proj.B.{kind}"] = torch.randn_like(tensor)
    torch.save({"model": state}, tmp_path / "beit3.pth")
    has_classifier, notes = models.load_backbone(saved, tmp_path / "beit3.pth", "beit3_base_patch16_224")
    found = saved.state_dict()
    loaded = [k for k in own if not k.startswith(("head.", "fc_norm."))]
    assert len(loaded) > 30 and all(torch.equal(found[k], own[k]) for k in loaded)
    assert not has_classifier and "fc_norm new" in notes


def test_what_became_of_the_classifier_is_said(tmp_path):
    """As many classes by accident: kept where nobody knows better, replaced where the names differ."""
    state = timm.create_model("beit_tiny_digits", num_classes=3).state_dict()
    state["head.weight"] = torch.randn(3, 96)
    plain, named = tmp_path / "plain.safetensors", tmp_path / "named.safetensors"
    checkpoint.write_weights(plain, state)
    checkpoint.write_weights(named, state, {"classes": '["a", "b", "c"]'})
    for path, names, kept, said in (
        (plain, ["x", "y", "z"], True, "classifier kept, of 3 classes; if they are other"),
        (named, ["a", "b", "c"], True, "classifier kept, of 3 classes"),
        (named, ["x", "y", "z"], False, "classifier new: the weights' is of 3 other classes (a, b, c)"),
        (named, ["x", "y"], False, "classifier new: the weights' is of 3 classes, not 2"),
    ):
        config = TrainConfig.from_dict({"model": "beit_tiny_digits", "checkpoint": str(path)})
        model = models.create_model(config, len(names), False, names)
        head = model.backbone.head.weight
        assert torch.equal(head, state["head.weight"]) if kept else not head.any()
        assert said in "; ".join(model.notes)


def test_pooling_by_another_rule():
    images = torch.randn(2, 3, 32, 32)
    model = create(global_pool="token").eval()
    tokens = model.backbone.forward_features(images)
    assert torch.allclose(model.embed(images), model.backbone.fc_norm(tokens[:, 0]), atol=1e-6)
    with pytest.raises(TrainingError, match="--global-pool: timm refuses"):
        create(global_pool="median")


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "hf_hub:owner/name", "local-dir:somewhere"])
def test_models_of_elsewhere_are_timms_to_find(name, monkeypatch):
    make, asked = timm.create_model, []

    def create_elsewhere(name, pretrained, **options):
        asked.append((name, pretrained))
        return make("resnet10t", **options)

    monkeypatch.setattr("timm.create_model", create_elsewhere)
    create(model=name, pretrained=True)
    assert set(asked) == {(name, True)}


def test_models_of_a_directory(tmp_path):
    """What a run saves of it is whole without the directory, with scale and arguments of its own."""
    from timm.models import save_for_hf

    folder = tmp_path / "model"
    original = timm.create_model("resnet10t", num_classes=3, global_pool="max")
    original.pretrained_cfg = original.pretrained_cfg | {"mean": (0.25, 0.25, 0.25)}
    save_for_hf(original, folder, model_config={"num_classes": 3, "model_args": {"global_pool": "max"}})
    model = create(f"local-dir:{folder}", classes=3, pretrained=True, image_size=32)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert model(images)[0].shape == (1, 3)
    assert any("classifier kept" in note for note in model.notes)
    run = train(
        quick_config(
            tmp_path / "run", model=f"local-dir:{folder}", pretrained=True, image_size=32, epochs=0,
            hold_out_classes=list("3456789"),
        ),
        with_map=False,
    )  # fmt: skip
    assert run["classes"] == 3
    shutil.rmtree(folder)
    for pretrained in (True, False):
        with pytest.raises(
            TrainingError, match=r"^--model local-dir:.*: FileNotFoundError: Config file not f"
        ):
            create(f"local-dir:{folder}", pretrained=pretrained)
    again, classes, _ = load_saved(tmp_path / "run")
    assert classes == ["0", "1", "2"] and again.mean.flatten().tolist() == [0.25] * 3
    # The layout in memory differs, and with it the rounding.
    torch.testing.assert_close(again(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_convolutional_backbones_keep_channels_side_by_side():
    """A faster layout in memory, the same numbers within rounding; a transformer stays as it is."""
    torch.manual_seed(0)
    model = create("mobilenetv3_small_050", batch_norm="frozen")
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    images = torch.rand(4, 3, 64, 64)
    found = {}
    for name, net in (("channels last", model), ("usual", usual)):
        net.set_mode("joint")
        net.train()
        features = net.backbone.forward_features(images)
        assert features.is_contiguous(memory_format=torch.channels_last) == (name == "channels last")
        embeddings = net(images)[1]
        embeddings.square().mean().backward()
        found[name] = [
            embeddings.detach(),
            *(p.grad for p in net.backbone.parameters() if p.grad is not None),
        ]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert all(p.is_contiguous() for p in create().parameters())
