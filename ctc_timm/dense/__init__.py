"""Detection and segmentation with any timm body: pyramids, readers of COCO, VOC and ADE folders, metrics, training."""
