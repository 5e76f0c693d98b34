"""The architectures that dfq was tried on: one of every shape that timm has, with what came of it.

Known without building anything, and so without waiting for torch. The tests hold every row to what happens, and
docs/models.md to these rows; of other names `dfq.support` finds out.
"""

from __future__ import annotations

from typing import NamedTuple


class Tried(NamedTuple):
    """What a network has that matters here, and what can be done with it.

    sparse: what says which patches matter in a sparse schedule; dense: "yes", or "yes, head needed" where timm's
    default has no classifier. "no: " is followed by the part that is refused.
    """

    has: str
    sparse: str
    dense: str
    quantization: str


TRIED: dict[str, Tried] = {
    "vit_tiny_patch16_224": Tried("nothing special", "class token", "yes", "yes"),
    "vit_base_patch8_224": Tried("patches of 8", "class token", "yes", "yes"),
    "vit_small_patch32_224": Tried("patches of 32", "class token", "yes", "yes"),
    "vit_base_patch32_clip_224": Tried("a norm before the blocks", "class token", "yes", "yes"),
    "vit_small_patch14_reg4_dinov2": Tried(
        "patches of 14, registers, LayerScale", "class token", "yes, head needed", "yes"
    ),
    "vit_giant_patch14_dinov2": Tried("SwiGLU", "class token", "yes, head needed", "no: GluMlp"),
    "deit_tiny_patch16_224": Tried("nothing special", "class token", "yes", "yes"),
    "deit_tiny_distilled_patch16_224": Tried("two heads", "class token", "yes", "yes"),
    "deit3_small_patch16_224": Tried("a class token without position, LayerScale", "class token", "yes", "yes"),
    "vit_small_patch16_18x2_224": Tried(
        "two attentions and two MLPs side by side", "class token", "yes", "no: ParallelThingsBlock"
    ),
    "vit_base_patch16_xp_224": Tried(
        "attention beside MLP, RMS norms of queries and keys", "class token", "yes", "no: ParallelScalingBlock"
    ),
    "vit_base_patch16_siglip_224": Tried("pooled by attention", "attention pool", "yes, head needed", "yes"),
    "vit_so150m_patch16_reg4_map_256": Tried("pooled by attention, registers left out", "attention pool", "yes", "yes"),
    "test_vit3": Tried("pooled by attention, registers included", "attention pool", "yes", "yes"),
    "vit_medium_patch16_gap_240": Tried("averaged, no class token", "pooled tokens", "yes", "yes"),
    "vit_little_patch16_reg4_gap_256": Tried("averaged, registers", "pooled tokens", "yes", "yes"),
    "test_vit4": Tried("averaged, images of any size", "pooled tokens", "yes", "yes"),
    "beit3_base_patch16_224": Tried("averaged, norms inside attention and MLP", "pooled tokens", "yes", "yes"),
    "vit_base_patch16_rpn_224": Tried(
        "averaged, norms after attention and MLP", "pooled tokens", "yes", "no: ResPostBlock"
    ),
    "vit_pwee_patch16_reg1_gap_256": Tried(
        "averaged, attention beside MLP", "pooled tokens", "yes", "no: ParallelScalingBlock"
    ),
    "vit_dwee_patch16_reg1_gap_256": Tried("differential attention", "no: DiffAttention", "yes", "no: DiffAttention"),
    "vit_dpwee_patch16_reg1_gap_256": Tried(
        "differential attention beside MLP", "no: DiffParallelScalingBlock", "yes", "no: DiffParallelScalingBlock"
    ),
    "beit_base_patch16_224": Tried("relative positions", "no: Beit", "yes", "no: Beit"),
    "vit_relpos_small_patch16_224": Tried(
        "relative positions", "no: VisionTransformerRelPos", "yes", "no: VisionTransformerRelPos"
    ),
    "eva02_tiny_patch14_336": Tried("rotary positions, SwiGLU", "no: Eva", "yes", "no: Eva"),
    "vit_base_patch16_rope_224": Tried("rotary positions", "no: Eva", "yes", "no: Eva"),
    "cait_xxs24_224": Tried("talking heads, class attention", "no: Cait", "yes", "no: Cait"),
    "convit_tiny": Tried("gated positional attention", "no: ConVit", "yes", "no: ConVit"),
    "samvit_base_patch16_224": Tried(
        "attention in windows", "no: VisionTransformerSAM", "yes", "no: VisionTransformerSAM"
    ),
    "swin_tiny_patch4_window7_224": Tried("hierarchical, shifted windows", "no: SwinTransformer", "yes", "yes"),
    "swinv2_tiny_window8_256": Tried("hierarchical", "no: SwinTransformerV2", "yes", "no: SwinTransformerV2"),
    "swinv2_cr_tiny_ns_224": Tried("hierarchical", "no: SwinTransformerV2Cr", "yes", "no: SwinTransformerV2Cr"),
    "nest_tiny": Tried("hierarchical", "no: Nest", "yes", "no: Nest"),
    "vit_base_r50_s16_224": Tried(
        "patches of a convolutional network", "no: HybridEmbed", "no: HybridEmbed", "no: HybridEmbed"
    ),
    "pit_ti_224": Tried("overlapping patches", "no: ConvEmbedding", "no: ConvEmbedding", "no: ConvEmbedding"),
    "naflexvit_base_patch16_gap": Tried("no fixed grid", "no: NaFlexVit", "no: NaFlexVit", "no: NaFlexVit"),
}
