"""Pictures: reading and resizing images, colours, and drawing. Needs no model, and no other part of the package.

reading.py: files, arrays and tensors as RGB arrays. resizing.py: the reference's ways to resize. palette.py: colours of
classes. canvas.py: predictions over a photo, legends, scales and captions.
"""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of the image files in a folder
