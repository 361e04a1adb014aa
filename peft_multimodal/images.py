"""The one place where images are read: collators, processors and reports of the package all call `read_image`."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_16_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_SCALE = "Scale it to 8 bits: Image.fromarray((x / x.max() * 255).astype('uint8')), with your data's own maximum."


def read_image(value: Any, name: str = "The image") -> Image.Image:
    """An 8-bit RGB image, whatever form it comes in.

    It is turned as its EXIF orientation says. What is transparent is laid on white, as transformers' processors do.
    16-bit grey is scaled from 0..65535. Integers of 32 bits and floats are refused, since nothing says what their
    range is.

    Args:
        value: One of these.

            - A PIL image of any mode.
            - A path, or the bytes of an image file.
            - {"bytes": ..., "path": ...}, as `datasets.Image(decode=False)` gives it.
            - An array (H, W) or (H, W, C), or a tensor (C, H, W), of bool, uint8 or uint16, with 1 to 4 channels.
        name: How errors call it.

    Returns:
        A PIL image of mode "RGB".

    Raises:
        TypeError: it is none of these.
        ValueError: the file is missing, broken or cut off, the image has no pixels, or its mode, shape or dtype
            doesn't say what its numbers mean.

    Examples:
        >>> import numpy as np
        >>> read_image(np.zeros((20, 30), np.uint16)).size
        >>> read_image("images/1.png")
    """
    if isinstance(value, Mapping):
        value = _stored(value, name)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _opened(io.BytesIO(value), f"{name} holds bytes that are no image", name)
    if isinstance(value, (str, os.PathLike)):
        if str(value).startswith(("http://", "https://")):
            raise ValueError(f"{name} holds the URL {str(value)!r}: download it first.")
        return _opened(value, f"{name} holds the path {str(value)!r}, which can't be read", name)
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
        value = _from_array(value, name)
    if not isinstance(value, Image.Image):
        raise TypeError(
            f"{name} holds {type(value).__name__}, not an image. Images are PIL images, paths, bytes of a file, "
            "{'bytes': ..., 'path': ...}, arrays or tensors."
        )
    return _checked(value, f"{name} holds an image that can't be read", name)


def is_image(value: Any) -> bool:
    """Whether this is one image (a broken one, maybe) rather than a sequence of images."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim <= 3
    return isinstance(value, (Image.Image, Mapping, bytes, bytearray, memoryview, str, os.PathLike))


def _stored(value: Mapping[str, Any], name: str) -> Any:
    if not value.keys() & {"bytes", "path"}:
        raise TypeError(f"{name} holds a dictionary of {sorted(map(str, value))}, not of 'bytes' and 'path'.")
    content = value.get("bytes")
    content = value.get("path") if content is None else content
    if content is None:
        raise ValueError(f"{name} holds neither bytes nor a path: both are None.")
    return content


def _opened(file: Any, trouble: str, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Exception as error:  # what decoders of foreign bytes raise is no closed list
        raise ValueError(f"{trouble} ({_said(error)}).") from error
    with image:
        return _checked(image, trouble, name)


def _checked(image: Image.Image, trouble: str, name: str) -> Image.Image:
    """Decoded, turned and in RGB; a new image where anything had to change."""
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"{trouble} ({_said(error)}). Repair the file, or leave the row out.") from error
    if not all(image.size):
        raise ValueError(f"{name} holds an image without pixels: its size is {image.size}.")
    return _rgb(_upright(image), name)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says. What else stands in the metadata is left out: it may be broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as with foreign bytes
        orientation = None
    if orientation is None:
        return image
    plain = image.copy()
    plain.info = {name: value for name, value in image.info.items() if name == "transparency"}
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(plain)


def _said(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no format that Pillow knows"
    return str(error) or type(error).__name__


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _16_BITS:
        return _eight_bits(np.asarray(image)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} holds an image of mode {image.mode!r}, whose range of values isn't known. {_SCALE}")
    try:
        if image.mode in _ALPHA or "transparency" in image.info:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} holds an image of mode {image.mode!r}: {error}.") from error


def _eight_bits(array: np.ndarray) -> Image.Image:
    if 0 < array.max() < 4096:
        warnings.warn(
            "An image of 16 bits has no value above 4095 of 65535: it becomes nearly black. If its values have 12 bits or "
            "fewer, scale them up before.",
            stacklevel=2,
        )
    return Image.fromarray(np.rint(array / 257).astype(np.uint8))


def _from_array(value: Any, name: str) -> Image.Image:
    dtype = str(value.dtype).removeprefix("torch.").lstrip("<>=")
    if dtype not in ("bool", "uint8", "uint16", "u2"):
        raise ValueError(
            f"{name} holds {type(value).__name__} values of dtype {dtype}, whose range isn't known; bool, uint8 and uint16 "
            f"are read. {_SCALE}"
        )
    # Arrays have their channels last, tensors first; where only the other order fits, it is that.
    axes = (-1, 0) if isinstance(value, np.ndarray) or value.ndim == 2 else (0, -1)
    array = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
    array = array[..., None] if array.ndim == 2 else array
    axis = next((a for a in axes if array.ndim == 3 and 1 <= array.shape[a] <= 4), None)
    if axis is None:
        raise ValueError(f"{name} holds numbers of shape {tuple(value.shape)}: an image is (H, W, C) or (C, H, W).")
    array = np.moveaxis(array, axis, -1)
    if not array.size:
        raise ValueError(f"{name} holds an image without pixels: its shape is {tuple(value.shape)}.")
    array = array[..., 0] if array.shape[-1] == 1 else array
    if array.dtype.itemsize == 2:
        return _eight_bits(array)
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8) * (255 if dtype == "bool" else 1)))
