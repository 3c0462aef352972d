"""LV-ViT model configuration."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


if TYPE_CHECKING:
    # Never run: beside whatever is saved, the library copies the files that it finds imported, and those that `AUTO_MAP` names must
    # be there.
    from .modeling_lvvit_segmentation import LVViTForSemanticSegmentation  # noqa: F401

# Every Auto class that can load a saved model with `trust_remote_code=True`. The library's own bookkeeping would list
# only the class that happened to be saved, so that a folder written by the classifier could not serve as a backbone.
AUTO_MAP = {
    "AutoConfig": "configuration_lvvit.LVViTConfig",
    "AutoModel": "modeling_lvvit.LVViTModel",
    "AutoModelForImageClassification": "modeling_lvvit.LVViTForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_lvvit_segmentation.LVViTForSemanticSegmentation",
    "AutoBackbone": "modeling_lvvit.LVViTBackbone",
}


@strict
class LVViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Architecture of an LV-ViT ("All Tokens Matter: Token Labeling for Training Better Vision Transformers",
    NeurIPS 2021). The defaults are LV-ViT-S at 224 pixels; `modeling_lvvit.variants` holds all published sizes.

    Args:
        hidden_size (`int`, defaults to 384): Width of a token.
        num_hidden_layers (`int`, defaults to 16): Number of transformer layers.
        num_attention_heads (`int`, defaults to 6): Attention heads of each layer; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 1152): Hidden width of the MLP (published models: 3 * `hidden_size`).
        stem_hidden_size (`int`, defaults to 64): Channels of the three stem convolutions (128 in LV-ViT-L).
        conv_stem (`bool`, defaults to `True`): Whether three convolutions precede the cut into patches; `False` cuts the
            picture itself, as ViT and DeiT do (the start of the paper's ablation).
        residual_divisor (`float`, defaults to 2.0): Positive constant that divides the output of every attention and
            MLP branch before it joins the residual stream (`skip_lam` in the authors' code: T 1, S and M 2, L 3).
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout on embeddings and branch outputs, in [0, 1].
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on attention weights, in [0, 1].
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last layer, in [0, 1); it grows linearly
            from 0 in the first layer.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal that initialises
            linear layers, the class token and the position table.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        image_size (`int` or `(height, width)`, defaults to 224): Input size in pixels for which the position table
            is laid out; sides must be multiples of `patch_size`.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; even with `conv_stem`, which halves the resolution
            before patches are cut.
        num_channels (`int`, defaults to 3): Channels of an input image.
        qkv_bias (`bool`, defaults to `False`): Whether the query, key and value projections have a bias.
        patch_logits_weight (`float`, defaults to 0.5): Weight w in
            `logits = cls_logits + w * max over patch tokens of patch_logits`. Set it to 0 when the patch head was not
            trained, so that random patch logits cannot enter the prediction.
        fused (`bool`, defaults to `False`): Whether batch norms are folded into the convolutions of the stem and
            `residual_divisor` into the weights, as `LVViTModel.fuse()` does. For inference.
        apply_layernorm (`bool`, defaults to `True`): Whether the backbone normalises every feature map.
        out_features (`list[str]`, *optional*): Stages that the backbone returns, out of `"stem"`, `"stage1"` ...
            `"stage{num_hidden_layers}"`; defaults to the last.
        out_indices (`list[int]`, *optional*): The same as indices into `stage_names`.
        segmentation_head (`"upernet"` or `"fcn"`, defaults to `"upernet"`): Head of `LVViTForSemanticSegmentation`, which
            alone reads this and the following fields.
        segmentation_stages (`list[str]`, *optional*): The four stages that its neck reads; default: the last, and those 3,
            6 and 9 layers before it.
        neck_channels (`int`, defaults to 2048): Channels of the last of the neck's four maps (published FCN: 768).
        decoder_channels (`int`, defaults to 256): Channels of head and auxiliary head (LV-ViT-L: 512).
        pool_scales (`list[int]`, defaults to `(1, 2, 3, 6)`): Sides of the pooled maps of UperNet.
        decoder_dropout_prob (`float`, defaults to 0.1): Dropout of channels before the heads' classifiers, in [0, 1].
        auxiliary_loss_weight (`float`, defaults to 0.4): Weight of the auxiliary head's loss; 0 leaves the head out.
        semantic_loss_ignore_index (`int`, defaults to 255): Label of pixels that do not count.
        semantic_loss_class_weights (`list[float]`, *optional*): Weight of each class in the loss, at least 0; default: all 1.

    Raises:
        ValueError: If a size is not positive, `patch_size` is odd, a side of `image_size` is not a multiple of
            `patch_size`, `hidden_size` is not a multiple of `num_attention_heads`, or a rate is out of range.
    """

    model_type = "lvvit"
    # The Trainer would otherwise gather every patch logit of the evaluation set.
    keys_to_ignore_at_inference = ["cls_logits", "patch_logits", "hidden_states", "attentions"]

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    stem_hidden_size: int = 64
    conv_stem: bool = True
    residual_divisor: float | int = 2.0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = False
    patch_logits_weight: float | int = 0.5
    fused: bool = False
    apply_layernorm: bool = True
    segmentation_head: str = "upernet"
    segmentation_stages: list[str] | None = None
    neck_channels: int = 2048
    decoder_channels: int = 256
    pool_scales: list[int] | tuple[int, ...] = (1, 2, 3, 6)
    decoder_dropout_prob: float | int = 0.1
    auxiliary_loss_weight: float | int = 0.4
    semantic_loss_ignore_index: int = 255
    semantic_loss_class_weights: list[float] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), **AUTO_MAP}
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks that the sizes fit each other; called on construction and before saving."""
        positive = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
        for name in (*positive, "stem_hidden_size", "residual_divisor", "patch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.conv_stem and self.patch_size % 2:
            raise ValueError(
                f"`patch_size` must be even, got {self.patch_size}: the stem halves the resolution before patches "
                f"are cut. Use {self.patch_size - 1 or 2} or {self.patch_size + 1}."
            )
        height, width = self.image_height_width
        if min(height, width) <= 0 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"`image_size` (height {height}, width {width}) must be positive multiples of `patch_size` "
                f"({self.patch_size}), for example "
                f"{tuple(max(1, round(side / self.patch_size)) * self.patch_size for side in (height, width))}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}.")
        if self.segmentation_head not in ("upernet", "fcn"):
            raise ValueError(f"`segmentation_head` must be upernet or fcn, got {self.segmentation_head!r}.")
        widths = (self.neck_channels, self.decoder_channels, *self.pool_scales)
        if min(widths) <= 0 or not self.pool_scales:
            raise ValueError("`neck_channels`, `decoder_channels` and every one of `pool_scales` must be positive.")
        if self.auxiliary_loss_weight < 0:
            raise ValueError(f"`auxiliary_loss_weight` must not be negative, got {self.auxiliary_loss_weight}.")
        stages = self.segmentation_stages
        if stages is not None and (len(stages) != 4 or any(stage not in self.stage_names for stage in stages)):
            raise ValueError(f"`segmentation_stages` must be four of {', '.join(self.stage_names)}, got {stages}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate}.")

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch-token grid."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size


__all__ = ["LVViTConfig"]
