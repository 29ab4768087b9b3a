"""Images and classes out of folders and datasets, and the tensors that a model is trained and scored with."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Table
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from gaml_hf.models.exiting_gaml import shown
from gaml_hf.models.image_pipeline_gaml import check_mode

from .files import class_names, column_values, known_classes, row_class_names


logger = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Mean and standard deviation of CIFAR-100's training images; CIFAR-10's differ by less than 0.02.
CIFAR_MEAN, CIFAR_STD = [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]
BYTES_KEPT = 2**30  # of decoded images of a split; more are decoded each time they are used


def cifar_processor() -> ViTImageProcessorPil:
    """What makes tensors of 3 x 32 x 32 of images, for ResNets from scratch."""
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=CIFAR_MEAN, image_std=CIFAR_STD)


def _files_below(path: Path) -> Iterator[Path]:
    """
    All files, in folders that are links too, but for links to a folder that they lie in: those would never end. Hidden
    ones, which editors and systems leave behind, are none.
    """
    for root, folders, names in os.walk(path, followlinks=True):
        above = {Path(root).resolve(), *Path(root).resolve().parents}
        folders[:] = [name for name in folders if name[0] != "." and Path(root, name).resolve() not in above]
        yield from (file for name in names if name[0] != "." and (file := Path(root, name)).is_file())


class ImageSource:
    """
    The images of a split, unread, and the name of each one's class.

    Args:
        count (`int`): how many.
        open_image (`Callable`): from a number to a `PIL.Image`.
        name_of (`Callable`): from a number to what an error calls the image.
        names (`list[str]`, *optional*): of the classes of the images, in their order.
        classes (`list[str]`, *optional*): that there are, in the order of their numbers, where the data say so.
    """

    def __init__(
        self,
        count: int,
        open_image: Callable[[int], Image.Image],
        name_of: Callable[[int], str],
        names: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.count, self.open_image, self.name_of = count, open_image, name_of
        self.names, self.classes = names, classes

    @classmethod
    def from_folder(cls, path: str | Path, argument: str, needs_classes: bool = True) -> "ImageSource":
        """
        `<path>/<class>/<image>`, in the order of their names; without classes, all images below `path`.

        Args:
            path (`str` or `Path`): the folder.
            argument (`str`): what the caller calls `path`, for errors.
            needs_classes (`bool`): whether folders are classes.

        Raises:
            ValueError: there is no folder, no image or, where it needs classes, an image in no class.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(
                f"`{argument}` must be a folder of images. Got `{path}`, "
                + ("which is none." if path.exists() else "which is not there.")
            )
        files = sorted(file for file in _files_below(path) if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"`{argument}` must hold images ({', '.join(SUFFIXES)}). Got `{path}`, which has none.")
        names = None
        if needs_classes:
            parts = [file.relative_to(path).parts for file in files]
            for file, part in zip(files, parts, strict=True):
                if len(part) != 2:
                    raise ValueError(
                        f"`{argument}` must hold a folder for each class and the images in it. Got `{path}`, with "
                        f"the image `{file.relative_to(path)}`."
                    )
            names = [part[0] for part in parts]
            empty = {each.name for each in path.iterdir() if each.is_dir() and each.name[0] != "."} - set(names)
            if empty:
                logger.warning("Folders without an image are no classes: %s.", ", ".join(sorted(empty)))

        def open_image(number: int) -> Image.Image:
            with Image.open(files[number]) as image:
                image.load()
            return image

        return cls(len(files), open_image, lambda number: f"`{files[number]}`", names)

    @classmethod
    def from_table(cls, table: Table, split: str, image_column: str, label_column: str | None) -> "ImageSource":
        """
        A split of a dataset on the Hub, or of another one of `datasets`.

        Raises:
            ValueError: there are no rows, a column is missing or holds no images, or a class is missing or no class.
        """
        for argument, column in (("image_column_name", image_column), ("label_column_name", label_column)):
            if column is not None and column not in table.column_names:
                raise ValueError(
                    f"`{argument}` must be one of {table.column_names}, the columns of the {split} split. "
                    f"Got {column!r}."
                )
        if not isinstance(table.features[image_column], ImageFeature):
            raise ValueError(
                f"`image_column_name` must be a column of images. Got {image_column!r} of the {split} split, which "
                f"holds {table.features[image_column]}."
            )
        if len(table) == 0:
            raise ValueError(f"The {split} split is empty.")
        names = classes = None
        if label_column is not None:
            labels = list(column_values(table, label_column))
            names, classes = row_class_names(labels, table, split, label_column), known_classes(table, label_column)
        images = table.select_columns(image_column)
        return cls(
            len(table),
            lambda number: images[number][image_column],
            lambda number: f"Row {number} of the {split} split, column {image_column!r},",
            names,
            classes,
        )

    def class_names(self) -> list[str]:
        """The classes, in the order of their numbers."""
        return list(self.classes or class_names(self.names))


class ImageRows(Dataset):
    """
    Images as a model reads them, one row a dict of `pixel_values` and, where there is one, `labels`.

    Each image is opened, turned upright, made RGB and resized by the image processor when this is made, so that one
    that cannot be read is told before the first step. What fits in 1 GiB stays in memory; else images are opened again
    each time. Rows are asked for by the batch, so that a batch is cut, flipped and normalized as one.

    Args:
        source ([`ImageSource`]): the images.
        processor: an image processor; gives size, mean and standard deviation.
        labels (`list[int]`, *optional*): class of each image.

    Raises:
        ValueError: an image cannot be read; says which.
    """

    def __init__(self, source: ImageSource, processor: Any, labels: Sequence[int] | None = None):
        self.source, self.processor = source, processor
        self.numbers = torch.arange(source.count)  # of the images that are rows here, in their order
        self.labels = None if labels is None else torch.tensor(labels)
        self.augments = False
        self._kept: Tensor | None = None  # (number of images, channels, height, width), uint8
        first = self._open(0)
        keeps = source.count * first.numel() <= BYTES_KEPT
        kept = torch.empty((source.count, *first.shape), dtype=torch.uint8) if keeps else None
        for number in range(source.count):
            image = first if number == 0 else self._open(number)
            if image.shape != first.shape:
                raise ValueError(
                    "The image processor must make images of one size, with `do_resize`. Got "
                    f"{tuple(first.shape)} of {source.name_of(0)} and {tuple(image.shape)} of "
                    f"{source.name_of(number)}."
                )
            if keeps:
                kept[number] = image
        self._kept = kept
        self.image_size = tuple(first.shape[1:])

    def _open(self, number: int) -> Tensor:
        """An image before it is normalized, `(channels, height, width)` in uint8."""
        try:
            image = self.source.open_image(number)
            check_mode(image)
            image = ImageOps.exif_transpose(image).convert("RGB")
            return self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # of a decoder
            raise ValueError(f"{self.source.name_of(number)} must be an image. It cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, numbers: Iterable[int]) -> "ImageRows":
        """Some rows, by their places here."""
        part = object.__new__(type(self))
        vars(part).update(vars(self))
        part.numbers = self.numbers[torch.as_tensor(list(numbers), dtype=torch.int64)]
        return part

    def names(self) -> list[str]:
        """What each row is called: the path of its file, or its place in a dataset."""
        return [self.source.name_of(number).strip("`,") for number in self.numbers.tolist()]

    def shuffle(self, seed: int) -> "ImageRows":
        """All rows, in an order drawn from `seed`."""
        return self.select(np.random.default_rng(seed).permutation(len(self)).tolist())

    def augmented(self) -> "ImageRows":
        """The same rows as for training: flipped or not, and cut out of a frame of an eighth of their size."""
        part = self.select(range(len(self)))
        part.augments = True
        return part

    def __getitem__(self, place: int | str) -> Any:
        if place == "labels":
            return self.labels[self.numbers].tolist()
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        numbers = self.numbers[torch.as_tensor(places)]
        images = self._kept[numbers] if self._kept is not None else torch.stack([self._open(int(n)) for n in numbers])
        if self.augments:
            images = flip_and_crop(images)
        pixel_values = self.normalized(images)
        if self.labels is None:
            return [{"pixel_values": pixels} for pixels in pixel_values]
        labels = self.labels[numbers].tolist()
        return [{"pixel_values": pixels, "labels": k} for pixels, k in zip(pixel_values, labels, strict=True)]

    def normalized(self, images: Tensor) -> Tensor:
        """What the image processor makes of uint8, `(batch_size, channels, height, width)`."""
        processor = self.processor
        values = images.float()
        if processor.do_rescale:
            values = values * processor.rescale_factor
        if not processor.do_normalize:
            return values
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (processor.image_mean, processor.image_std))
        return (values - mean) / std


def flip_and_crop(images: Tensor) -> Tensor:
    """
    Each image flipped with probability 1/2, and cut out of itself with a black frame of an eighth of its size (4 for
    32x32: He et al., 2016, Sec. 4.2), all drawn anew.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`).

    Returns:
        `torch.Tensor` of the same shape and type.
    """
    batch_size, _, height, width = images.shape
    frame_y, frame_x = height // 8, width // 8
    padded = F.pad(images, (frame_x, frame_x, frame_y, frame_y))
    top = torch.randint(0, 2 * frame_y + 1, (batch_size, 1))
    left = torch.randint(0, 2 * frame_x + 1, (batch_size, 1))
    flip = torch.rand(batch_size, 1) < 0.5
    y = top + torch.arange(height)  # (batch_size, height)
    x = torch.arange(width).expand(batch_size, -1)
    x = left + torch.where(flip, width - 1 - x, x)
    row = torch.arange(batch_size)[:, None, None]
    cut = padded.permute(0, 2, 3, 1)[row, y[:, :, None], x[:, None, :]]  # (batch_size, height, width, channels)
    return cut.permute(0, 3, 1, 2).contiguous()


def image_columns(table: Table, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The columns of the images and of the classes; where none is named, the only one of its kind, or `label`."""
    if image_column is None:
        images = [name for name, kind in table.features.items() if isinstance(kind, ImageFeature)]
        if len(images) != 1:
            raise ValueError(
                f"`image_column_name` must name the column of the images, out of {table.column_names}. Of images are "
                f"{shown(images)}."
            )
        image_column = images[0]
    if label_column is None:
        classes = [name for name in table.column_names if known_classes(table, name) is not None]
        label_column = classes[0] if len(classes) == 1 else "label"
    return image_column, label_column
