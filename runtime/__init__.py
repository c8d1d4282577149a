"""The runtime: artifact → answers, with onnxruntime, numpy and tokenizers alone."""

from onnxpress.runtime.cuda import CUDA
from onnxpress.runtime.embedder import Embedder
from onnxpress.runtime.fill_mask import FillMask
from onnxpress.runtime.generator import Generation, Generator, Piece
from onnxpress.runtime.loading import load
from onnxpress.runtime.module_runner import ModuleRunner
from onnxpress.runtime.openvino import OpenVINO
from onnxpress.runtime.providers import CPU
from onnxpress.runtime.question_answerer import QuestionAnswerer
from onnxpress.runtime.session import Session
from onnxpress.runtime.tensorrt import NvTensorRtRtx, TensorRT
from onnxpress.runtime.text_classifier import TextClassifier
from onnxpress.runtime.token_classifier import TokenClassifier
from onnxpress.runtime.tokenization import TruncationWarning

__all__ = [
    "CPU",
    "CUDA",
    "Embedder",
    "FillMask",
    "Generation",
    "Generator",
    "ModuleRunner",
    "NvTensorRtRtx",
    "OpenVINO",
    "Piece",
    "QuestionAnswerer",
    "Session",
    "TensorRT",
    "TextClassifier",
    "TokenClassifier",
    "TruncationWarning",
    "load",
]
