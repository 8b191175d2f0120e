"""The few transforms that diffusers' trainer uses, on PIL images: torchvision has no build for every torch."""

import enum
import random

import numpy as np
import torch
from PIL import Image, ImageOps


class InterpolationMode(enum.Enum):
    BILINEAR = 2


class Compose:
    def __init__(self, parts):
        self.parts = parts

    def __call__(self, value):
        for part in self.parts:
            value = part(value)
        return value


class Resize:
    def __init__(self, size, interpolation):
        self.size = size

    def __call__(self, image):
        scale = self.size / min(image.size)
        return image.resize([round(side * scale) for side in image.size], Image.BILINEAR)


class CenterCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return ImageOps.fit(image, (self.size, self.size))


class RandomCrop(CenterCrop):
    @staticmethod
    def get_params(image, size):
        height, width = size
        return random.randint(0, image.height - height), random.randint(0, image.width - width), height, width


class RandomHorizontalFlip:
    def __init__(self, p):
        pass

    def __call__(self, image):
        return ImageOps.mirror(image)


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean[0], std[0]

    def __call__(self, tensor):
        return (tensor - self.mean) / self.std
