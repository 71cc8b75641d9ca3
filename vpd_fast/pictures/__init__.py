"""Pictures: reading and resizing images, colours, and drawing. Needs no model, and no other part of the package.

decoding.py: opens image files, and turns what decoders raise into ImageError. reading.py: files, arrays and tensors as
RGB arrays. masks.py: pictures of class ids and depths. resizing.py: the reference's ways to resize. palette.py: colours
of classes. canvas.py: predictions over a photo, legends, scales and captions. encoding.py: pictures as bytes of files.
"""

# Of the image files in a folder; some need a package beside Pillow, and the error says which.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
    ".heic", ".heif", ".avif",
)  # fmt: skip
