"""Imports all that a run of a recipe imports, so that a forked process has it already."""

import matplotlib.figure  # noqa: F401
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch.onnx  # noqa: F401
import transformers  # noqa: F401

import supple.cli.main
import supple.deploy.export
import supple.recipe.run
import supple.report.table
import supple.search.nsga2  # noqa: F401
