"""The export stage: a student becomes a quantized ONNX artifact that proves itself."""
