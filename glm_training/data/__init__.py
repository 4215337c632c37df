"""Datasets on disk to batches in memory: scan everything first, then draw, decode and remember where the run is."""

from glm_training.data.dataset import I2IDataset, ImageDataset, T2IDataset, TrainingData, may_flip
from glm_training.data.examples import Batch, Example
from glm_training.data.fingerprint import describe_drift
from glm_training.data.pictures.images import load_image
from glm_training.data.problems import DataError, Problem
from glm_training.data.prompt_lengths import PromptReader
from glm_training.data.prompts_layout.scan import ScanReport, load_examples, scan_dataset
from glm_training.data.samplers.sampler import StatefulSampler

__all__ = [
    "Batch",
    "DataError",
    "Example",
    "I2IDataset",
    "ImageDataset",
    "Problem",
    "PromptReader",
    "ScanReport",
    "StatefulSampler",
    "T2IDataset",
    "TrainingData",
    "describe_drift",
    "load_examples",
    "load_image",
    "may_flip",
    "scan_dataset",
]
