"""Evaluation on data sets: metrics, tables, and the worst cases to look at."""

from vpd_fast.evaluation.evaluate import evaluate
from vpd_fast.evaluation.metrics import PRIMARY, DepthMetrics, ReferringMetrics, SegmentationMetrics
from vpd_fast.evaluation.results import Evaluation

__all__ = ["PRIMARY", "DepthMetrics", "Evaluation", "ReferringMetrics", "SegmentationMetrics", "evaluate"]
