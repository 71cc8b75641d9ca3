"""VPD on ADE20K with mmsegmentation 1.x: the original's settings, 2 images on each of 8 GPUs.

mmseg's tools/dist_train.sh takes it, and it stands alone: no folder of mmseg's `_base_` configs is needed.
"""

custom_imports = dict(imports=["vpd_fast.interop.mmseg"])
default_scope = "mmseg"

# The model. It begins with Stable Diffusion. Without class_embeddings, a file with features of the texts, CLIP makes
# them from the names of ADE20K's classes. `checkpoint="vpd_seg.ckpt"` in their place goes on from a VPD model.
crop_size = (512, 512)
model = dict(
    type="VPDSegmentor",
    stable_diffusion="checkpoints/v1-5-pruned-emaonly.ckpt",
    class_embeddings=None,
    num_classes=150,
    settings=dict(base_size=512, channels=256, attn_selector="up_cross+down_cross"),
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        size=crop_size,
        pad_val=0,
        seg_pad_val=255,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),
)

# The data, in the folders of ADEChallengeData2016.
dataset_type = "ADE20KDataset"
data_root = "data/ade/ADEChallengeData2016"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# The optimiser. The longest key in a parameter's name decides alone, of equally long ones the first in the alphabet:
# the UNet trains at a tenth of the rate but for its norms, as with the original. The encoder is frozen.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=8e-5, betas=(0.9, 0.999), weight_decay=1e-3),
    paramwise_cfg=dict(custom_keys=dict(unet=dict(lr_mult=0.1), norm=dict(decay_mult=0.0))),
)

# The schedule: a line down to 0 in 80,000 steps, times a line up from 1e-6 in the first 1,500. mmengine divides by one
# step less than `end`.
param_scheduler = [
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=80001, by_epoch=False),
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1501, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
sync_bn = "torch"  # of distributed runs; leave it out on CPUs

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=8000, save_best="mIoU"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
