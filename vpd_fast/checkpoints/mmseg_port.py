"""Names of the VPD depth model as ported to mmsegmentation 1.x (`VPD` backbone, `VPDDepthHead`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Prefixes in the port -> prefixes in the released depth checkpoint.
_PREFIXES = {
    "backbone.": "encoder.",
    "decode_head.conv1.": "encoder.layer1.",
    "decode_head.conv2.": "encoder.layer2.0.",
    "decode_head.conv_aggregation.": "encoder.out_layer.",
    "decode_head.decoder.": "decoder.",
    "decode_head.depth_pred_layer.": "last_layer_depth.",
}


def is_mmseg_depth(keys: Mapping[str, object]) -> bool:
    """Return whether these are names of the mmsegmentation port."""
    return "decode_head.depth_pred_layer.0.weight" in keys


def from_mmseg(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the port's tensors to the released names. Its 28th embedding, the mean of the 27 scenes, stays a scene."""
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        renamed[_PREFIXES.get(prefix, "") + key[len(prefix) :]] = tensor
    return renamed
