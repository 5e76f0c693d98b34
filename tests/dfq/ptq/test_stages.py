"""The stages of a network: chained they are its forward pass, and each site belongs to one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq.modules import adapt
from dfq.ptq.sites import list_sites
from dfq.ptq.stages import Stage, stages, suffix

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"architecture": "deit_tiny_distilled_patch16_224"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "pooled by mean, registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
}


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run(chain: list[Stage], images: Tensor) -> Tensor:
    value = chain[0].run((images, None))
    for stage in chain[1:]:
        value = stage.run(value)
    return value


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_together_are_the_forward_pass(kind: str, adapted: bool, tiny: Callable[..., Model]) -> None:
    module = tiny(**KINDS[kind]).module
    logits = module(pictures())
    chain = stages(adapt(module) if adapted else module)
    assert [stage.name for stage in chain] == ["stem", "blocks.0", "blocks.1", "head"]
    assert [stage.module for stage in chain] == [None, module.blocks[0], module.blocks[1], None]
    assert chain[0].run((pictures(), None)).shape == (3, module.num_prefix_tokens + 16, 24)
    torch.testing.assert_close(run(chain, pictures()), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_belongs_to_one_stage(kind: str, tiny: Callable[..., Model]) -> None:
    module = adapt(tiny(**KINDS[kind], depth=11).module)
    chain = stages(module)
    owners = {}
    for site in list_sites(module, "full"):
        (owners[site.name],) = [stage.name for stage in chain if stage.owns(site.name)]
    assert set(owners.values()) == {stage.name for stage in chain}
    assert owners["pos_embed"] == owners["pos_drop.output"] == owners["patch_embed.proj.weight"] == "stem"
    assert owners["blocks.1.attn.softmax"] == "blocks.1"
    assert owners["blocks.10.mlp.fc2.input"] == "blocks.10"
    assert owners["head.input"] == "head"


def check_owners(module: nn.Module) -> None:
    """Every site belongs to one stage, and what passes while it runs are the sites it owns."""
    sites = [site for site in list_sites(module, "full") if site.owner]
    chain = stages(module)
    assert all(sum(stage.owns(site.name) for stage in chain) == 1 for site in sites)
    passed: list[str] = []
    slots = [site.name for site in sites if not site.is_weight]
    for name in slots:
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: passed.append(name))
    value: Any = (pictures(), None)
    for stage in chain:
        value = stage.run(value)
        assert sorted(passed) == sorted(name for name in slots if stage.owns(name)), stage.name
        passed.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sites_of_a_stage_are_those_it_runs_through(kind: str, tiny: Callable[..., Model]) -> None:
    check_owners(adapt(tiny(**KINDS[kind]).module))


def test_every_stage_passes_gradients_on(tiny: Callable[..., Model]) -> None:
    chain = stages(adapt(tiny().module))
    images = pictures().requires_grad_()
    run(chain, images).square().sum().backward()
    assert images.grad is not None
    assert bool((images.grad != 0).all())


def test_the_stem_of_a_sparse_batch_keeps_the_prefix_and_the_kept_patches(tiny: Callable[..., Model]) -> None:
    stem = stages(tiny(reg_tokens=2).module)[0]
    dense = stem.run((pictures(2), None))
    keep = torch.tensor([[0, 5, 15], [1, 2, 3]])
    sparse = stem.run((pictures(2), keep))
    for image in range(2):
        expected = torch.cat([dense[image, :3], dense[image, 3 + keep[image]]])
        assert torch.equal(sparse[image], expected)


def test_the_stem_leaves_the_model_as_it_was(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    slot = module.patch_drop
    batch = torch.zeros(1, 3, 32, 32), torch.tensor([[0]])
    stages(module)[0].run(batch)
    assert module.patch_drop is slot
    assert not module.blocks._forward_pre_hooks

    def broken(_x: Tensor) -> Tensor:
        raise ZeroDivisionError

    module.norm_pre.forward = broken
    with pytest.raises(ZeroDivisionError):
        stages(module)[0].run(batch)
    assert module.patch_drop is slot
    assert not module.blocks._forward_pre_hooks


def check_suffix(module: nn.Module, classifiers: list[nn.Module]) -> None:
    """After any stage it gives the logits, and the mean of what the classifiers read."""
    read: list[Tensor] = []
    handles = [c.register_forward_pre_hook(lambda _m, args: read.append(args[0])) for c in classifiers]
    logits = module(pictures())
    for handle in handles:
        handle.remove()
    feature = torch.stack(read).mean(0)
    *others, head = stages(module)
    value: Any = (pictures(), None)
    for stage in others:
        value = stage.run(value)
        ending = suffix(module, stage, value)
        torch.testing.assert_close(ending.logits, logits)
        torch.testing.assert_close(ending.feature, feature)
    with pytest.raises(ValueError, match="no stage follows head"):
        suffix(module, head, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_suffix_goes_on_where_a_stage_ended(kind: str, tiny: Callable[..., Model]) -> None:
    module = adapt(tiny(**KINDS[kind]).module)
    check_suffix(module, [module.head, module.head_dist] if kind == "distilled" else [module.head])


SWIN_STAGES = [
    "stem",
    "layers.0.blocks.0",
    "layers.0.blocks.1",
    "layers.1.downsample",
    "layers.1.blocks.0",
    "layers.1.blocks.1",
    "head",
]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_stages_of_a_swin(adapted: bool, tiny_swin: Callable[..., Model]) -> None:
    module = tiny_swin().module
    logits = module(pictures())
    if adapted:
        module = adapt(module)
    chain = stages(module)
    assert [stage.name for stage in chain] == SWIN_STAGES
    assert all(stage.module is module.get_submodule(stage.name) for stage in chain[1:-1])
    images = pictures().requires_grad_()
    made = run(chain, images)
    torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)
    made.square().sum().backward()
    assert images.grad is not None
    assert bool((images.grad != 0).all())


def test_every_site_of_a_swin_belongs_to_the_stage_that_runs_it(tiny_swin: Callable[..., Model]) -> None:
    module = adapt(tiny_swin().module)
    check_owners(module)


def test_the_suffix_of_a_swin_goes_on_where_a_stage_ended(tiny_swin: Callable[..., Model]) -> None:
    module = adapt(tiny_swin().module)
    check_suffix(module, [module.head.fc])


def test_the_stem_of_a_swin_takes_whole_images_only(tiny_swin: Callable[..., Model]) -> None:
    stem = stages(tiny_swin().module)[0]
    whole = stem.run((pictures(2), None))
    assert whole.shape == (2, 8, 8, 16)
    assert torch.equal(stem.run((pictures(2), torch.arange(64).expand(2, 64))), whole)
    with pytest.raises(DfqError, match=r"a SwinTransformer cannot run on 63 of its 64 patches: .* dense method"):
        stem.run((pictures(2), torch.arange(63).expand(2, 63)))


def test_other_networks_have_no_stages() -> None:
    with pytest.raises(TypeError, match="Linear has no stages"):
        stages(nn.Linear(1, 1))
