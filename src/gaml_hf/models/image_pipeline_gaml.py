"""The image-classification pipeline with exits: the stock one, plus where each image left, and a say in it."""

import base64
import os
from collections.abc import Iterator
from io import BytesIO
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ImageClassificationPipeline
from transformers.image_utils import is_valid_image, load_image

from .exiting_gaml import shown
from .pipeline_gaml import (
    EXIT_ARGUMENTS,
    ExitPipelineMixin,
    check_count,
    check_counts,
    known_function,
    numbered_row,
    numbered_rows,
)


class GamlImageClassificationPipeline(ExitPipelineMixin, ImageClassificationPipeline):
    """
    [`~transformers.ImageClassificationPipeline`] for a model with exits: the same calls and the same shapes of
    answers, and each answer, a dict, also says where its image left.

    - **label** (`str`), **score** (`float`): as in the stock pipeline, from the exit at which the image left.
    - **exit_layer** (`int`): the layer (of a ResNet, the block) at which the image left, from 1.
    - **error** (`str`): there only for an image left out under `on_error="skip"`; all other values are then `None`.

    Each of these arguments may be given here, for every call, and in a call, for that call alone:

    Args:
        exit_strategy, patience, budgeted_exit, exit_threshold, exit_policy (*optional*):
            When an image leaves; as in [`GamlTextClassificationPipeline`], and by default as the config says.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What a bad image does: `"raise"` stops with an error that names the row, `"skip"` answers the others and
            puts the error in its place.
        top_k (`int`, *optional*, defaults to 5): how many labels to return, from 1.
        function_to_apply (`str`, *optional*, defaults to `"softmax"`): or `"sigmoid"` or `"none"`.
        timeout (`float`, *optional*): seconds to wait for an image from the web; by default for ever.
        batch_size, num_workers (`int`, *optional*): as in the stock pipeline.

    An image is a `PIL.Image`, an array or tensor, or a `str`: a path, a URL or base64. So where strings come from
    strangers, open their images yourself. An array or tensor is of height and width, alone (grey) or with 1, 3 or 4
    channels, first or last; its numbers are 0 to 255, or fractions of that from 0.0 to 1.0.

    Raises:
        ValueError: an argument is unknown, misspelt or out of range; an image cannot be read; the model's logits are
            not finite.
        TypeError: a row is no image.

    Example:

    ```python
    >>> classifier = pipeline("image-classification", model="path/or/name", trust_remote_code=True, patience=2)
    >>> classifier(["cat.png", "dog.png"], batch_size=2, top_k=1)
    ```
    """

    known_arguments = (
        *EXIT_ARGUMENTS, "top_k", "function_to_apply", "on_error", "timeout", "batch_size", "num_workers"
    )  # fmt: skip

    def __init__(self, model, image_processor=None, **kwargs):
        if image_processor is None:
            raise ValueError("`image_processor` must be the image processor of the model. Got None.")
        super().__init__(model=model, image_processor=image_processor, **kwargs)

    def __call__(self, inputs, **kwargs):
        """
        Classify images.

        Args:
            inputs: an image, or many of them as a list, a tuple, a PyTorch dataset, a generator or another iterator.
            kwargs: the arguments of the class, for this call alone.

        Returns:
            A list of answers, best first, for an image; a list of such lists for a list or tuple; an iterator of them,
            which reads and answers as it is consumed, for datasets, generators and iterators.
        """
        check_counts(kwargs)
        batch_size = kwargs.get("batch_size") or self._batch_size or 1
        on_error = kwargs.get("on_error") or self._preprocess_params.get("on_error")
        if on_error == "skip" and batch_size > 1 and not _makes_one_size(self.image_processor):
            raise ValueError(
                "`on_error='skip'` needs an image processor that makes images of one size (`do_resize` to a height "
                f"and a width, or `do_center_crop`), or `batch_size=1`. Got `batch_size={batch_size}`."
            )
        if isinstance(inputs, (tuple, Iterator)) and not isinstance(inputs, GeneratorType):
            inputs = list(inputs) if isinstance(inputs, tuple) else (image for image in inputs)
        if isinstance(inputs, (list, Dataset, GeneratorType)):
            inputs = numbered_rows(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, on_error=None, function_to_apply=None, **kwargs):
        exits = self._take_exits(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if "top_k" in kwargs:
            check_count("top_k", kwargs["top_k"], 1)
        steps = super()._sanitize_parameters(function_to_apply=known_function(function_to_apply), **kwargs)
        return self._with_exits(steps, exits, on_error)

    def preprocess(self, image, timeout=None, on_error="raise") -> dict[str, Any]:
        """The model's inputs, and under `"about"` what `postprocess` needs to know of this row."""
        name, image = numbered_row(image)
        error = None
        try:
            if not isinstance(image, str) and not is_valid_image(image):
                raise TypeError(
                    "an image must be a `PIL.Image`, an array, a tensor, or a `str` that is a path, a URL or base64. "
                    f"Got {shown(image)} ({type(image).__name__})."
                )
            if isinstance(image, (np.ndarray, torch.Tensor)):
                image = _image_of(image)
            elif isinstance(image, Image.Image):
                check_mode(image)
            elif isinstance(image, str) and os.path.isfile(image):
                with Image.open(image) as file:
                    check_mode(file)
            elif isinstance(image, str) and not image.startswith(("http://", "https://")):
                image = _image_of_base64(image)
            pixel_values = self._pixels(image, timeout)
        except Exception as problem:  # of a decoder, the web or the image processor
            error = f"{name}: {problem}"
            if on_error == "raise":
                raise (TypeError if isinstance(problem, TypeError) else ValueError)(error) from problem
            # The row keeps its place in the batch, with an empty image; the answer to it is never read.
            pixel_values = self._pixels(Image.new("RGB", (32, 32)), None)
        return {"pixel_values": pixel_values, "about": {"row": name, "error": error}}

    def _pixels(self, image: Any, timeout: float | None) -> torch.Tensor:
        image = load_image(image, timeout=timeout)  # also to RGB
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"].to(self.dtype)

    def _forward(self, model_inputs, exit_policy=None) -> dict[str, Any]:
        self._check_training_mode()
        outputs = self.model(pixel_values=model_inputs["pixel_values"], exit_policy=exit_policy, return_dict=True)
        return {"logits": outputs.logits, "exit_layer": outputs.exit_layer, "about": model_inputs["about"]}

    def postprocess(self, model_outputs, function_to_apply=None, top_k=5, on_error="raise") -> list[dict[str, Any]]:
        """The answers to one image, best first."""
        if (error := self._error_of(model_outputs, on_error)) is not None:
            return [{"label": None, "score": None, "exit_layer": None, "error": error}]
        exit_layer = int(model_outputs["exit_layer"][0])
        answers = super().postprocess(model_outputs, function_to_apply=function_to_apply, top_k=top_k)
        return [{**answer, "exit_layer": exit_layer} for answer in answers]


def _makes_one_size(image_processor: Any) -> bool:
    """Whether a wide image, a high one and a small one come out of it in one height and one width."""
    images = [Image.new("RGB", size) for size in ((96, 64), (64, 96), (40, 40))]
    return len({np.shape(image_processor(images=image)["pixel_values"][0]) for image in images}) == 1


def _image_of_base64(text: str) -> Image.Image:
    """As Transformers' `load_image` reads it, but for the mode, which that takes away, and an error of any length."""
    try:
        encoded = text.split(",")[1] if text.startswith("data:image/") else text
        image = Image.open(BytesIO(base64.decodebytes(encoded.encode())))
    except Exception:  # of decoders
        raise ValueError(f"a `str` must be a path, a URL or an image in base64. Got {shown(text)}.") from None
    check_mode(image)
    return image


def check_mode(image: Image.Image) -> None:
    """Refuse more than 8 bits a channel: made RGB, such an image would be cut off at 255, and be white, or black."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(
            f"an image must have 8 bits a channel. Got mode {image.mode!r}, of more: scale its numbers to 0 to 255."
        )


def _image_of(values: np.ndarray | torch.Tensor) -> Image.Image:
    """The image that an array or a tensor holds, in RGB of 8 bits, as an image file has it."""
    if isinstance(values, torch.Tensor):
        x = (values.float() if values.is_floating_point() else values).numpy(force=True)  # NumPy has no bfloat16
    else:
        x = values
    if x.ndim not in (2, 3):
        raise ValueError(
            "an array or a tensor must be one image, of 2 or 3 dimensions; give several as a list. "
            f"Got {x.ndim} dimensions."
        )
    if x.ndim == 3 and x.shape[0] in (1, 3, 4):  # as Transformers decides where both ends would do
        x = np.moveaxis(x, 0, -1)
    if x.size == 0 or (x.ndim == 3 and x.shape[2] not in (1, 3, 4)):
        raise ValueError(
            "an array or a tensor must have pixels, and 1, 3 or 4 channels, first or last. "
            f"Got {' x '.join(map(str, values.shape))}."
        )
    if x.dtype.kind not in "uif" or not (x.min() >= 0 and x.max() <= 255):
        raise ValueError(
            "an array or a tensor must hold numbers from 0 to 255, or fractions of that from 0.0 to 1.0. "
            + (f"Got {x.min()} to {x.max()}." if x.dtype.kind in "uif" else f"Got {x.dtype}.")
        )
    if x.dtype.kind == "f":
        x = (x.astype(np.float64) * (255 if x.max() <= 1 else 1)).round()
    x = x.astype(np.uint8)
    return Image.fromarray(x[:, :, 0] if x.ndim == 3 and x.shape[2] == 1 else x).convert("RGB")


__all__ = ["GamlImageClassificationPipeline"]
