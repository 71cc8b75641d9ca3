"""The model card of a repository: what the model is, how it is used, and how good it is."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

from vpd_fast.config import VPDConfig
from vpd_fast.errors import InputError, brief
from vpd_fast.tasks import TASKS

PIPELINES = {"segmentation": "image-segmentation", "referring": "image-segmentation", "depth": "depth-estimation"}
TITLES = {
    "segmentation": "Semantic segmentation",
    "referring": "Referring segmentation",
    "depth": "Monocular depth",
}
_CARD = """---
{data}
---

# {name}

{title} by [vpd_fast](https://github.com/vpd-fast/vpd_fast), a fast implementation of VPD (Zhao et al., *Unleashing
Text-to-Image Diffusion Models for Visual Perception*, ICCV 2023): one pass of Stable Diffusion's UNet, whose averaged
cross-attention maps join its features.

```python
import vpd_fast

{load}
result = model.predict("photo.jpg"{options})
```

{details}
{metrics}"""


def model_card(
    name: str, config: VPDConfig, precision: str | None, metrics: Mapping[str, float], dataset: str | None
) -> str:
    """Return the text of README.md of a repository `name`.

    precision: of a fast model, None for a plain one. metrics: by name, on `dataset`. Raises InputError for a metric
    that is no finite number.
    """
    from huggingface_hub import EvalResult, ModelCardData

    for metric, value in metrics.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(f"metrics must map names to finite numbers, got {brief(value)} for {brief(metric)}")
    title, measured_on = TITLES[config.task], dataset or "unknown"
    data = ModelCardData(
        library_name="vpd_fast",
        pipeline_tag=PIPELINES[config.task],
        tags=["vpd", "stable-diffusion", config.task],
        model_name=name.partition("/")[2],
        eval_results=[
            EvalResult(
                task_type=PIPELINES[config.task], task_name=title, dataset_type=measured_on.lower().replace(" ", "-"),
                dataset_name=measured_on, metric_type=metric, metric_value=float(value),
            )
            for metric, value in metrics.items()
        ] or None,
    )  # fmt: skip
    load = f'model = vpd_fast.VPD.from_pretrained("{name}")'
    if precision is not None:
        load = f'model = vpd_fast.load_engine("{name}")  # {precision}'
    rows = "".join(f"| {metric} | {value:.4g} |\n" for metric, value in metrics.items())
    count = TASKS[config.task].count_field
    details = [f"- Images of {config.base_size}x{config.base_size} in training."]
    if count is not None:
        details.insert(0, f"- {getattr(config, count)} {TASKS[config.task].noun} embeddings.")
    if config.class_names:
        details.insert(1, f"- They are {', '.join(config.class_names)}.")
    return _CARD.format(
        data=data.to_yaml(), name=name, title=title, load=load,
        options=', text="the dog on the left"' if TASKS[config.task].takes_text else "",
        details="\n".join(details) + "\n",
        metrics=f"| on {measured_on} | |\n| --- | --- |\n{rows}" if metrics else "",
    )  # fmt: skip
