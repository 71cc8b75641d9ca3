"""The errors vpd_fast raises on purpose. Each message names what was wrong, what came and what was expected."""


class VPDFastError(Exception):
    """Base of every deliberate error; the command line prints it as one line and exits with code 2."""


class InputError(VPDFastError, ValueError):
    """An argument has the wrong shape, dtype, device, range or name."""


class CheckpointError(VPDFastError, ValueError):
    """A checkpoint is unreadable, hostile, incomplete or of another task."""


class ImageError(VPDFastError, ValueError):
    """An image cannot be read, is empty, or cannot be written."""


class DatasetError(VPDFastError, ValueError):
    """A data set's folder or file is missing, misnamed, broken, or does not fit the others."""


class MissingDependencyError(VPDFastError, ImportError):
    """An optional package, a native module or a pretrained model is not available."""


class TrainingError(VPDFastError, RuntimeError):
    """Training cannot go on: the loss or gradients are not finite, step after step."""
