"""ONNX Runtime: exported, optimised for BERT, then quantised, as its documentation says.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: dynamic quantisation
for transformers, after the transformers optimiser (which fuses attention) has been at the model;
int8 weights with a scale a channel. Activations get one scale a tensor, that is of the whole batch.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from torch import nn
from transformers import PreTrainedModel

NAMES = ("input_ids", "attention_mask")


class Logits(nn.Module):
    """What is exported: tensors in, a tensor out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids, attention_mask=attention_mask).logits
        return logits


def export(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Write a BERT classifier as `fp32` and `int8` files. It must attend by "eager"."""
    plain, fp32, int8 = (folder / f"{name}.onnx" for name in ("plain", "fp32", "int8"))
    example = torch.randint(1000, 9000, (2, 16))
    with warnings.catch_warnings():
        # The older exporter: from what the newer one writes the optimiser fuses no attention.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model).eval(),
            (example, torch.ones_like(example)),
            str(plain),
            input_names=[*NAMES],
            output_names=["logits"],
            dynamic_axes={name: {0: "rows", 1: "tokens"} for name in NAMES},
            opset_version=17,
            dynamo=False,
        )
    config = model.config
    optimised = optimizer.optimize_model(
        str(plain),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
    )
    optimised.save_model_to_file(str(fp32))
    quantize_dynamic(
        fp32,
        int8,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what was fused
    )
    return {"fp32": fp32, "int8": int8}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answer(session: onnxruntime.InferenceSession, ids: torch.Tensor) -> torch.Tensor:
    """Map ids without padding, [rows, tokens] int64, to logits, [rows, labels] fp32."""
    given = {NAMES[0]: ids.numpy(), NAMES[1]: torch.ones_like(ids).numpy()}
    return torch.from_numpy(session.run(None, given)[0])
