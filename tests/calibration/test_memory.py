from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from calibration import memory
from calibration.memory import activation_bytes, images_that_fit, memory_bytes

CPU = torch.device("cpu")


def saved_by(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            yield from (v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, Tensor))


def graph_bytes(vit: VisionTransformer, count: int) -> int:
    """What the nodes of autograd's graph hold of `count` images, weights aside: walked, not hooked."""
    vit.requires_grad_(False)
    for block in vit.blocks:
        block.attn.fused_attn = False
    logits = vit(torch.zeros(count, 3, 32, 32, requires_grad=True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in vit.parameters()}
    held: dict[int, Tensor] = {}
    queue, seen = [logits.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        held |= {tensor.untyped_storage().data_ptr(): tensor for tensor in saved_by(node)}
        queue += [following for following, _ in node.next_functions]
    return sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in weights)


class TestActivationBytes:
    def test_is_what_the_graph_holds(self, make_vit: Any) -> None:
        for arguments in ({}, {"depth": 3}, {"embed_dim": 24, "num_heads": 3, "reg_tokens": 2}):
            vit = make_vit(**arguments)
            expected = graph_bytes(vit, 3) - graph_bytes(vit, 2)
            assert expected > 0
            # What is copied to put dimensions in order is not quite the same for one image as for the third.
            assert activation_bytes(vit, torch.float32) == pytest.approx(expected, rel=0.1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_grows_by_the_same_with_every_block(self, make_vit: Any, dtype: torch.dtype) -> None:
        one, two, three, four = (activation_bytes(make_vit(depth=depth), dtype) for depth in (1, 2, 3, 4))
        assert two - one > 0
        assert three - two == four - three == two - one

    def test_by_hand(self, make_vit: Any) -> None:
        """One block more holds, in float32, two inputs of layer norms, queries, keys and values, the map of two heads,
        and the inputs of GELU; T = 17 tokens of D = 16, and four times that in the MLP. And what is copied to put
        dimensions in order, which is less."""
        block = activation_bytes(make_vit(depth=3), torch.float32) - activation_bytes(make_vit(), torch.float32)
        block_by_hand = 4 * (2 * 17 * 16 + 3 * 17 * 16 + 2 * 17 * 17 + 17 * 64)
        assert 0.9 * block_by_hand < block < 1.5 * block_by_hand

    def test_bfloat16_holds_less(self, make_vit: Any) -> None:
        """Also where the weights are larger than the activations: in low precision they are there once, for all."""
        vit = make_vit(embed_dim=128, num_heads=4)
        assert 0.4 < activation_bytes(vit, torch.bfloat16) / activation_bytes(vit, torch.float32) < 0.8

    def test_leaves_nothing_behind(self, make_vit: Any) -> None:
        vit, held = make_vit(), []
        # Softmax holds on to what it gives.
        vit.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda _, inputs: held.append(weakref.ref(inputs[0])))
        activation_bytes(vit, torch.float32)
        gc.collect()
        assert held
        assert all(reference() is None for reference in held)

    def test_leaves_the_model_as_it_was(self, make_vit: Any) -> None:
        vit = make_vit(proj_drop_rate=0.5).train()
        vit.norm.requires_grad_(False)
        vit.blocks[0].attn.fused_attn = True

        def state() -> list[Any]:
            return [
                [module.training for module in vit.modules()],
                [(parameter.requires_grad, parameter.grad) for parameter in vit.parameters()],
                [block.attn.fused_attn for block in vit.blocks],
            ]

        before, randomness = state(), torch.random.get_rng_state()
        with torch.no_grad():
            counted = activation_bytes(vit, torch.float32)
        assert counted == activation_bytes(vit, torch.float32) > 0
        assert state() == before
        assert torch.equal(torch.random.get_rng_state(), randomness)


class TestImagesThatFit:
    @pytest.mark.parametrize(("times", "images"), [(10, 5), (100, 50), (3.9, 1), (1, 1), (0, 1)])
    def test_share_of_all_there_is(
        self, make_vit: Any, monkeypatch: pytest.MonkeyPatch, times: float, images: int
    ) -> None:
        """Half of it, and one image at least."""
        vit = make_vit()
        amount = int(times * activation_bytes(vit, torch.float32)) + (times > 0)
        monkeypatch.setattr(memory, "memory_bytes", lambda device: amount)
        assert images_that_fit(vit, torch.float32) == images

    def test_nobody_knows_how_much_there_is(self, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "memory_bytes", lambda device: None)
        assert images_that_fit(make_vit(), torch.float32) is None

    def test_the_same_whatever_else_runs(self, make_vit: Any) -> None:
        vit = make_vit()
        before = images_that_fit(vit, torch.float32)
        taken = torch.ones(2**26)  # 256 MB
        assert images_that_fit(vit, torch.float32) == before
        assert taken.sum() > 0


class TestMemoryBytes:
    def test_of_a_machine(self, tmp_path: Path) -> None:
        meminfo = tmp_path / "meminfo"
        meminfo.write_text(
            "MemTotal:       16318480 kB\nMemFree:  123 kB\nMemAvailable:    8123456 kB\nHugePages_Total: 0\n"
        )
        assert memory._of_machine(meminfo) == 16318480 * 1024
        meminfo.write_text("MemFree:       16318480 kB\n")
        assert memory._of_machine(meminfo) is None
        assert memory._of_machine(tmp_path / "missing") is None

    @pytest.mark.parametrize(("limit", "amount"), [("1000000", 1000000), ("max", None)])
    def test_of_a_container(self, tmp_path: Path, limit: str, amount: int | None) -> None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory._of_container(tmp_path) == amount

    def test_of_no_container(self, tmp_path: Path) -> None:
        assert memory._of_container(tmp_path) is None

    @pytest.mark.parametrize(
        ("machine", "container", "free"), [(5, 7, 5), (7, 5, 5), (None, 0, 0), (6, None, 6), (None, None, None)]
    )
    def test_the_narrower_of_the_two(
        self, monkeypatch: pytest.MonkeyPatch, machine: int | None, container: int | None, free: int | None
    ) -> None:
        monkeypatch.setattr(memory, "_of_machine", lambda path: machine)
        monkeypatch.setattr(memory, "_of_container", lambda path: container)
        assert memory_bytes(CPU) == free

    def test_on_this_machine(self) -> None:
        free = memory_bytes(CPU)
        assert free is None or 0 < free < 2**50

    def test_of_other_devices_nothing_is_known(self) -> None:
        assert memory_bytes(torch.device("meta")) is None
