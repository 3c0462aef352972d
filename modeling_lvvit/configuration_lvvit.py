"""LV-ViT model configuration.

This file is copied into every saved model. It imports only what transformers 4.57 and all later versions have.
"""

from transformers import PretrainedConfig
from transformers.activations import ACT2FN


# Every Auto class that can load a saved model with `trust_remote_code=True`. The library itself lists only the class that
# was saved, so a folder written by the classifier could not be loaded as a backbone.
AUTO_MAP = {
    "AutoConfig": "configuration_lvvit.LVViTConfig",
    "AutoModel": "modeling_lvvit.LVViTModel",
    "AutoModelForImageClassification": "modeling_lvvit.LVViTForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_lvvit.LVViTForSemanticSegmentation",
    "AutoBackbone": "modeling_lvvit.LVViTBackbone",
}
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "stem_hidden_size",
    "patch_size",
    "num_channels",
    "neck_channels",
    "decoder_channels",
)
INTEGERS = (*SIZES, "semantic_loss_ignore_index")
NUMBERS = (
    "residual_divisor",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "initializer_range",
    "layer_norm_eps",
    "patch_logits_weight",
    "decoder_dropout_prob",
    "auxiliary_loss_weight",
)
SWITCHES = ("conv_stem", "qkv_bias", "fused", "apply_layernorm")


class LVViTConfig(PretrainedConfig):
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
            image itself, as ViT and DeiT do (the start of the paper's ablation).
        residual_divisor (`float`, defaults to 2.0): Positive constant that divides the output of every attention and
            MLP branch before it joins the residual stream (`skip_lam` in the authors' code: T 1, S and M 2, L 3).
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout on embeddings and branch outputs, in [0, 1].
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on attention weights, in [0, 1].
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last layer, in [0, 1); it grows linearly
            from 0 in the first layer.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal that initializes
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
        apply_layernorm (`bool`, defaults to `True`): Whether the backbone applies the final layer norm to every feature map.
        out_features (`list[str]`, *optional*): Stages that the backbone returns, from `"stem"`, `"stage1"` ...
            `"stage{num_hidden_layers}"`; defaults to the last.
        out_indices (`list[int]`, *optional*): The same as indices into `stage_names`.
        segmentation_head (`"upernet"` or `"fcn"`, defaults to `"upernet"`): Head of `LVViTForSemanticSegmentation`, the only
            class that reads this and the following fields.
        segmentation_stages (`list[str]`, *optional*): The four stages that its neck reads. Defaults to the last one and those
            3, 6 and 9 layers before it.
        neck_channels (`int`, defaults to 2048): Channels of the last of the neck's four maps (published FCN: 768).
        decoder_channels (`int`, defaults to 256): Channels of head and auxiliary head (LV-ViT-L: 512).
        pool_scales (`list[int]`, defaults to `(1, 2, 3, 6)`): Sides of the pooled maps of UperNet.
        decoder_dropout_prob (`float`, defaults to 0.1): Dropout of channels before the heads' classifiers, in [0, 1].
        auxiliary_loss_weight (`float`, defaults to 0.4): Weight of the auxiliary head's loss; with 0 there is no head.
        semantic_loss_ignore_index (`int`, defaults to 255): Label of the pixels that the loss ignores.
        semantic_loss_class_weights (`list[float]`, *optional*): Weight of each class in the loss, at least 0. Defaults to 1 for all.
        segmentation_inference (`dict`, *optional*): How whole images were segmented and masks read in the evaluation of the training:
            window, stride, sides, scales and mirror images, values of masks. The model does not read it; evaluations follow it.

    Raises:
        ValueError: If a value has the wrong type, a size is not positive, `patch_size` is odd, a side of `image_size` is not a multiple of
            `patch_size`, `hidden_size` is not a multiple of `num_attention_heads`, or a rate is out of range.
    """

    model_type = "lvvit"
    # The Trainer would otherwise gather every patch logit of the evaluation set.
    keys_to_ignore_at_inference = ["cls_logits", "patch_logits", "hidden_states", "attentions"]

    def __init__(
        self,
        *,
        hidden_size: int = 384,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 6,
        intermediate_size: int = 1152,
        stem_hidden_size: int = 64,
        conv_stem: bool = True,
        residual_divisor: float | int = 2.0,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float | int = 0.0,
        attention_probs_dropout_prob: float | int = 0.0,
        drop_path_rate: float | int = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        image_size: int | list[int] | tuple[int, int] = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        qkv_bias: bool = False,
        patch_logits_weight: float | int = 0.5,
        fused: bool = False,
        apply_layernorm: bool = True,
        segmentation_head: str = "upernet",
        segmentation_stages: list[str] | None = None,
        neck_channels: int = 2048,
        decoder_channels: int = 256,
        pool_scales: list[int] | tuple[int, ...] = (1, 2, 3, 6),
        decoder_dropout_prob: float | int = 0.1,
        auxiliary_loss_weight: float | int = 0.4,
        semantic_loss_ignore_index: int = 255,
        semantic_loss_class_weights: list[float] | None = None,
        segmentation_inference: dict | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), **AUTO_MAP}
        kwargs.pop("stage_names", None)  # in files of earlier versions; follows from `num_hidden_layers`
        super().__init__(**kwargs)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.stem_hidden_size, self.conv_stem, self.fused = stem_hidden_size, conv_stem, fused
        self.residual_divisor, self.drop_path_rate = residual_divisor, drop_path_rate
        self.hidden_act, self.hidden_dropout_prob = hidden_act, hidden_dropout_prob
        self.qkv_bias, self.attention_probs_dropout_prob = qkv_bias, attention_probs_dropout_prob
        self.initializer_range, self.layer_norm_eps = initializer_range, layer_norm_eps
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.patch_logits_weight, self.apply_layernorm = patch_logits_weight, apply_layernorm
        self.segmentation_head, self.segmentation_stages = segmentation_head, segmentation_stages
        self.neck_channels, self.decoder_channels = neck_channels, decoder_channels
        self.pool_scales, self.decoder_dropout_prob = pool_scales, decoder_dropout_prob
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        self.semantic_loss_class_weights = semantic_loss_class_weights
        self.segmentation_inference = segmentation_inference
        self._check_types()
        self._set_stages(out_features, out_indices)
        self.validate_architecture()

    # Without this line, newer versions would compare the fields of their own base class only.
    __eq__ = PretrainedConfig.__eq__

    def _check_types(self) -> None:
        """Raises a `ValueError` if a value has the wrong type."""
        for names, expected in ((INTEGERS, int), (NUMBERS, (int, float)), (SWITCHES, bool)):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                    kind = {int: "an integer", bool: "a boolean"}.get(expected, "a number")
                    raise ValueError(f"`{name}` must be {kind}, got {value!r}.")
        size = self.image_size
        sides = (size, size) if isinstance(size, int) else size
        if not isinstance(sides, (list, tuple)) or [type(side) for side in sides] != [int, int]:
            raise ValueError(f"`image_size` must be an integer or (height, width), got {size!r}.")

    def validate_architecture(self):
        """Checks that the values fit together. Runs on construction and before saving."""
        for name in (*SIZES, "residual_divisor"):
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
        if not self.pool_scales or min(self.pool_scales) <= 0:
            raise ValueError(f"`pool_scales` must be positive integers, got {self.pool_scales}.")
        if self.auxiliary_loss_weight < 0:
            raise ValueError(f"`auxiliary_loss_weight` must not be negative, got {self.auxiliary_loss_weight}.")
        stages = self.segmentation_stages
        if stages is not None and (len(stages) != 4 or any(stage not in self.stage_names for stage in stages)):
            raise ValueError(f"`segmentation_stages` must be four of {', '.join(self.stage_names)}, got {stages}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate}.")

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Saves the configuration as `PretrainedConfig.save_pretrained` does, if its values still fit together."""
        self._check_types()
        self.validate_architecture()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

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

    @property
    def stage_names(self) -> list[str]:
        """`"stem"`, `"stage1"`, ... `"stage{num_hidden_layers}"`: the feature maps that a backbone can return."""
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that a backbone returns. Setting them sets `out_indices` too."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: list[str] | None):
        self._set_stages(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Indices of the stages that a backbone returns. Setting them sets `out_features` too."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int] | None):
        self._set_stages(None, indices)

    def _set_stages(self, names: list[str] | None, indices: list[int] | None) -> None:
        """Sets the stages that a backbone returns, by name, by index or both. Defaults to the last one."""
        stages = self.stage_names
        if names is None and indices is None:
            indices = [len(stages) - 1]
        if indices is not None and any(not -len(stages) <= index < len(stages) for index in indices):
            raise ValueError(f"`out_indices` must be valid indices for {stages}, got {indices}.")
        if names is None:
            names = [stages[index] for index in indices]
        if not isinstance(names, list) or names != [stage for stage in stages if stage in names]:
            raise ValueError(
                f"`out_features` must be a list of stages from {stages}, in this order and without duplicates, got {names}."
            )
        indices = [stages.index(name) for name in names] if indices is None else list(indices)
        if names != [stages[index] for index in indices]:
            raise ValueError(f"`out_features` ({names}) and `out_indices` ({indices}) must be the same stages.")
        self._out_features, self._out_indices = names, indices

    def to_dict(self) -> dict:
        """The configuration as a dictionary, with `out_features` and `out_indices`."""
        output = super().to_dict()
        output["out_features"] = output.pop("_out_features", None)
        output["out_indices"] = output.pop("_out_indices", None)
        return output


__all__ = ["LVViTConfig"]
