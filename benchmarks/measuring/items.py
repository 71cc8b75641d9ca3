"""The items of `measure.py`, the most valuable first: after three minutes the numbers that decide most are there."""

from __future__ import annotations

from measuring.plan import Item, Plan

PLAN = Plan(
    items=(
        Item("sanity", "are results right, so that times mean anything", 20, "measuring.tests:sanity"),
        Item("passes", "how long is a whole pass, by precision, implementation and batch", 90, "measuring.passes:ours"),
        Item("products", "which part of a product costs what, by shape and variant", 60, "measuring.products:variants"),
        Item(
            "memory", "how many bytes a clock do copies from L2 to shared memory bring", 8, "measuring.hardware:copies"
        ),
        Item("rates", "what do matrix instructions reach without loads", 14, "measuring.hardware:rates"),
        Item("contention", "do copies and matrix instructions share the bandwidth", 6, "measuring.hardware:contention"),
        Item("halo", "may a matrix instruction read a tile at any row", 3, "measuring.hardware:halo"),
        Item("launches", "what does a launch in a graph cost", 5, "measuring.hardware:launches"),
        Item("peers", "how long do eager and compiled PyTorch take", 110, "measuring.passes:peers"),
        Item("attention", "which attention is fastest at which shape", 20, "measuring.attention:steps"),
        Item("preparation", "what do preparing rows and statistics cost", 15, "measuring.preparation:steps"),
        Item("labels", "which kernel makes labels fastest", 5, "measuring.labels:steps"),
        Item("narrow", "which kernel convolves images of few channels fastest", 5, "measuring.narrow:steps"),
        Item(
            "static_rows", "do 8-bit results of attention and GEGLU shorten a pass", 14, "measuring.passes:static_rows"
        ),
        Item("tests", "do the tests pass that failed on a GPU", 80, "measuring.tests:suspects"),
        Item("layers", "where is the time, layer by layer", 50, "measuring.layer_times:steps"),
        Item("libraries", "what do cuBLAS and cuDNN take for the same products", 35, "measuring.products:libraries"),
    ),
    setting="measuring.setting:Setting",
)
